// crowd, against servers that do what they should, and against broken ones: a
// verdict that cannot fail says nothing.
//
// CMake says in EDGEWISE_CROWD and EDGEWISE_RAT where the programs are, if they
// are built.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "peers.hpp"
#include "support.hpp"

#ifndef EDGEWISE_CROWD
  #define EDGEWISE_CROWD ""
  #define EDGEWISE_RAT ""
#endif

using namespace edgewise;
using support::contains;
using namespace std::chrono_literals;

REGISTER_EXCEPTION_TRANSLATOR(const peers::Failure& failure) {
  return ("expected: " + failure.expected + "; got: " + failure.got).c_str();
}

namespace {

// ---------------------------------------------------------------------------
// A server that can be broken
// ---------------------------------------------------------------------------

struct Receiver {
  Fd socket;
  LineBuffer lines;
  std::string held_back;
};

// What to send instead of a line, or nothing: then the receiver is
// disconnected. Deliveries are numbered, greetings left out.
using Tamper = std::function<std::optional<std::string>(
    int delivery, Receiver& receiver, std::string line)>;

std::optional<std::string> send_as_it_is(int, Receiver&, std::string line) {
  return line;
}

struct ServerOptions {
  Address address = *Address::parse("127.0.0.1:0");
  Tamper tamper = send_as_it_is;
  bool greets = true;  // passes greetings on
  int backlog = 128;
  std::size_t most = 1000;  // clients; then nobody listens any more
};

// Passes lines on, on a thread of its own, until it is destroyed.
class Server {
 public:
  explicit Server(ServerOptions options)
      : options_(std::move(options)), listener_(make_listener()) {
    address_ = local_address(listener_);
    poller_.add(waker_, waker_token, Interest::readable);
    poller_.add(listener_, listener_token, Interest::readable);
    thread_ = std::thread([this] { run(); });
  }
  ~Server() {
    stopped_ = true;
    waker_.wake();
    thread_.join();
  }
  Server(const Server&) = delete;
  Server& operator=(const Server&) = delete;

  // For crowd's command line.
  std::string port() const { return std::to_string(address_.port()); }

 private:
  static constexpr Token waker_token{0};
  static constexpr Token listener_token{1};

  Fd make_listener() const {
    ListenOptions listening;
    listening.backlog = options_.backlog;
    return listen(options_.address, listening);
  }

  void run() {
    while (!stopped_) {
      for (const Event& event : poller_.wait()) {
        if (event.token() == listener_token) {
          take_in();
        } else if (receivers_.contains(event.token())) {
          read_from(event.token());
        }
      }
    }
  }

  void take_in() {
    Accepted accepted = accept(listener_);
    if (!accepted.ok()) return;
    const Token token{next_token_++};
    poller_.add(accepted.fd, token, Interest::readable);
    receivers_[token].socket = std::move(accepted.fd);
    if (receivers_.size() < options_.most) return;
    poller_.remove(listener_);
    listener_.reset();
  }

  void read_from(Token sender) {
    // A copy of what has come: a receiver may go while it is passed on.
    LineBuffer& lines = receivers_[sender].lines;
    const IoResult result = lines.fill(receivers_[sender].socket);
    std::vector<std::string> whole;
    while (const auto line = lines.next()) whole.emplace_back(*line);
    for (const std::string& line : whole) pass_on(sender, line);
    if (result.ended()) drop(sender);
  }

  void pass_on(Token sender, const std::string& line) {
    const bool greeting = line.starts_with("crowd hello");
    if (greeting && !options_.greets) return;
    std::vector<Token> dropped;
    for (auto& [token, receiver] : receivers_) {
      if (token == sender) continue;
      const auto bytes =
          greeting ? line : options_.tamper(++deliveries_, receiver, line);
      if (!bytes) dropped.push_back(token);
      if (bytes) static_cast<void>(write(receiver.socket, *bytes));
    }
    for (const Token token : dropped) drop(token);
  }

  void drop(Token token) {
    const auto found = receivers_.find(token);
    if (found == receivers_.end()) return;
    poller_.remove(found->second.socket);
    receivers_.erase(found);
  }

  ServerOptions options_;
  Fd listener_;
  Address address_;
  Waker waker_;
  Poller poller_;
  std::map<Token, Receiver> receivers_;
  std::uint64_t next_token_ = 2;
  int deliveries_ = 0;
  std::atomic<bool> stopped_{false};
  std::thread thread_;
};

Server make_server(Tamper tamper) {
  ServerOptions options;
  options.tamper = std::move(tamper);
  return Server(std::move(options));
}

// ---------------------------------------------------------------------------
// Running crowd
// ---------------------------------------------------------------------------

struct Run {
  int code = -1;
  std::string output;
  std::string error;

  // A figure of the JSON report.
  std::int64_t operator[](const std::string& name) const {
    const std::string key = '"' + name + "\":";
    const auto at = output.find(key);
    REQUIRE_MESSAGE(at != std::string::npos, name, " is not in ", output,
                    error);
    return std::strtoll(output.c_str() + at + key.size(), nullptr, 10);
  }
  bool says(const std::string& text) const { return contains(output, text); }
};

peers::Command crowd(const std::vector<std::string>& arguments) {
  peers::Command command{EDGEWISE_CROWD};
  command.insert(command.end(), arguments.begin(), arguments.end());
  return command;
}

Run end_of(peers::Process& process) {
  process.wait_for_exit("crowd ends");
  Run run{-1, process.output(), process.error()};
  for (const int code : {0, 1, 2})
    if (process.exited_with(code)) run.code = code;
  INFO(process.fate(), ": ", run.error);
  CHECK(run.code >= 0);
  return run;
}

Run run(const peers::Command& command) {
  peers::Process process(command);
  return end_of(process);
}

// Eight clients, of which one sends 50 lines: 350 deliveries.
peers::Command small_crowd(const Server& server, const char* patience = "10") {
  return crowd({"--port", server.port(), "--clients", "8", "--senders", "1",
                "--lines", "50", "--window", "16", "--patience", patience,
                "--json"});
}

Run run_small(const Server& server, const char* patience = "10") {
  return run(small_crowd(server, patience));
}

struct Rat {
  explicit Rat(peers::Command options = {}) : process(command(options)) {
    peers::wait_by_looking(
        [&] {
          process.drain();
          return contains(process.output(), "\n") || !process.running();
        },
        "rat listens", [&] { return process.error(); });
    const std::string& line = process.output();
    const auto colon = line.rfind(':');
    REQUIRE(colon != std::string::npos);
    port = line.substr(colon + 1, line.find('\n') - colon - 1);
  }

  static peers::Command command(const peers::Command& options) {
    peers::Command all{EDGEWISE_RAT, "--port", "0", "--quiet"};
    all.insert(all.end(), options.begin(), options.end());
    return all;
  }

  // Until it has work to do, and crowd's lines are on their way.
  void wait_until_busy() {
    const auto before = process.cpu_time();
    peers::wait_by_looking(
        [&] { return (process.cpu_time() - before).count() > 0.2; },
        "rat is busy", [&] { return process.fate(); });
  }

  peers::Process process;
  std::string port;
};

void check_all_zero_but(const Run& run, const std::vector<std::string>& names) {
  for (const char* name : {"lost", "duplicated", "out_of_order", "corrupted",
                           "disconnected", "unconnected", "unreached"}) {
    INFO(name, " of ", run.output);
    if (std::find(names.begin(), names.end(), name) == names.end())
      CHECK(run[name] == 0);
  }
}

}  // namespace

// ---------------------------------------------------------------------------
// Servers that do what they should
// ---------------------------------------------------------------------------

TEST_CASE("200 clients hear every line that rat passes on") {
  const Rat rat;
  const Run report = run(crowd(
      {"--port", rat.port, "--clients", "200", "--lines", "25", "--json"}));
  CHECK(report.code == 0);
  CHECK(report.says("\"ok\":true"));
  check_all_zero_but(report, {});
  CHECK(report["lines_sent"] == 100);
  CHECK(report["deliveries"] == 100 * 199);
  CHECK(report["expected"] == 100 * 199);
  CHECK(report["latency_p50_ns"] > 0);
  CHECK(report["latency_p50_ns"] <= report["latency_p99_ns"]);
  CHECK(report["latency_p999_ns"] <= report["latency_max_ns"]);
  CHECK(report["latency_max_ns"] <= report["elapsed_ns"]);
}

TEST_CASE("the report for people has the same figures, and a histogram") {
  const Rat rat;
  const Run report =
      run(crowd({"--port", rat.port, "--clients", "21", "--senders", "2",
                 "--lines", "50", "--size", "5000"}));
  CHECK(report.code == 0);
  CHECK(report.says("OK: every line reached everybody"));
  CHECK(report.says("          2,000\n"));
  CHECK(report.says("latency p50 "));
  CHECK(report.says("####"));
  CHECK(report.error.empty());
}

TEST_CASE("a sender hears itself if the server echoes, and only then") {
  const Rat echoing({"--echo"});
  const Rat silent;
  const auto command = [](const Rat& rat, const char* more) {
    return crowd({"--port", rat.port, "--clients", "5", "--senders", "1",
                  "--lines", "20", "--patience", "1", "--json", more});
  };
  // Meanwhile this one waits in vain.
  peers::Process waiting(command(silent, "--echo"));
  const Run expected = run(command(echoing, "--echo"));
  CHECK(expected.code == 0);
  CHECK(expected["deliveries"] == 20 * 5);
  const Run unexpected = run(command(echoing, "--json"));
  CHECK(unexpected.code == 1);
  CHECK(unexpected["duplicated"] == 20);
  CHECK(unexpected.says("without --echo"));
  const Run missed = end_of(waiting);
  CHECK(missed.code == 1);
  check_all_zero_but(missed, {"lost"});
  CHECK(missed["lost"] == 20);
  CHECK(missed.says("client 0 did not get line 0 of sender 0"));
}

TEST_CASE("lines in pieces, and other senders' in between, are no trouble") {
  const Server server =
      make_server([](int delivery, Receiver& receiver, std::string line) {
        // Ten bytes late, always.
        std::string bytes = receiver.held_back + line;
        const std::size_t now = bytes.size() - (delivery > 2'500 ? 0 : 10);
        receiver.held_back = bytes.substr(now);
        return std::optional(bytes.substr(0, now));
      });
  // The window is full from the second line on: whoever has lines held back
  // gets the rest of them with the next ones.
  const Run report =
      run(crowd({"--port", server.port(), "--clients", "6", "--senders", "6",
                 "--lines", "100", "--window", "3", "--json"}));
  CHECK(report.code == 0);
  CHECK(report["deliveries"] == 6 * 100 * 5);
}

TEST_CASE("a Unix socket will do, even one with a short queue") {
  ServerOptions options;
  options.backlog = 1;
  options.address =
      *Address::from_path("@crowd_test" + std::to_string(::getpid()));
  const Server server(std::move(options));
  const Run report =
      run(crowd({"--unix", "@crowd_test" + std::to_string(::getpid()),
                 "--clients", "50", "--lines", "10", "--json"}));
  CHECK(report.code == 0);
  CHECK(report["deliveries"] == 40 * 49);
}

TEST_CASE("a rate is kept") {
  const Rat rat;
  const Run report =
      run(crowd({"--port", rat.port, "--clients", "4", "--senders", "2",
                 "--rate", "100", "--lines", "21", "--json"}));
  CHECK(report.code == 0);
  CHECK(report["lines_sent"] == 42);
  CHECK(report["elapsed_ns"] > 200'000'000);
}

TEST_CASE("who is refused tries again") {
  const std::uint16_t port = peers::free_port();
  peers::Process process(crowd({"--port", std::to_string(port), "--clients",
                                "8", "--lines", "5", "--json"}));
  std::this_thread::sleep_for(300ms);
  ServerOptions options;
  options.address = *Address::from("127.0.0.1", port);
  const Server server(std::move(options));
  CHECK(end_of(process).code == 0);
}

// ---------------------------------------------------------------------------
// Servers that are broken
// ---------------------------------------------------------------------------

TEST_CASE("one lost line is noticed") {
  const Server server =
      make_server([](int delivery, Receiver&, std::string line) {
        return std::optional(delivery == 100 ? "" : line);
      });
  const Run report = run_small(server);
  CHECK(report.code == 1);
  CHECK(report.says("\"ok\":false"));
  CHECK(report["lost"] == 1);
  CHECK(report["deliveries"] == 349);
  CHECK(report.says("missed the lines before line 15 of sender 0"));
  check_all_zero_but(report, {"lost"});
}

TEST_CASE("the very last line, lost, is noticed") {
  const Server server =
      make_server([](int delivery, Receiver&, std::string line) {
        return std::optional(delivery == 350 ? "" : line);
      });
  const Run report = run_small(server, "1");
  CHECK(report.code == 1);
  CHECK(report["lost"] == 1);
  CHECK(report.says("did not get line 49 of sender 0"));
  check_all_zero_but(report, {"lost"});
}

TEST_CASE("one line that comes twice is noticed, the last one too") {
  for (const int which : {100, 350}) {
    const Server server =
        make_server([=](int delivery, Receiver&, std::string line) {
          return std::optional(delivery == which ? line + line : line);
        });
    const Run report = run_small(server);
    CHECK(report.code == 1);
    CHECK(report["duplicated"] == 1);
    CHECK(report["deliveries"] == 350);
    check_all_zero_but(report, {"duplicated"});
  }
}

TEST_CASE("two lines that change places are noticed") {
  const Server server =
      make_server([](int delivery, Receiver& receiver, std::string line) {
        if (delivery == 100) {
          receiver.held_back = line;
          return std::optional(std::string());
        }
        return std::optional(line + std::exchange(receiver.held_back, ""));
      });
  const Run report = run_small(server);
  CHECK(report.code == 1);
  CHECK(report["out_of_order"] == 1);
  CHECK(report["deliveries"] == 350);
  check_all_zero_but(report, {"out_of_order"});
}

TEST_CASE("one changed byte is noticed, wherever it is") {
  struct Pair {
    explicit Pair(std::size_t place)
        : server(make_server([=](int delivery, Receiver&, std::string line) {
            const char changed = static_cast<char>(line[place] ^ 1);
            if (delivery == 100) line[place] = changed;
            return std::optional(line);
          })),
          process(small_crowd(server)) {}

    Server server;
    peers::Process process;
  };
  // In the word, sender, number, time, padding, end.
  const std::vector<std::size_t> places{0, 9, 20, 40, 62, 63};
  std::vector<std::unique_ptr<Pair>> pairs;
  for (const std::size_t place : places)
    pairs.push_back(std::make_unique<Pair>(place));
  for (std::size_t i = 0; i < places.size(); ++i) {
    CAPTURE(places[i]);
    const Run report = end_of(pairs[i]->process);
    CHECK(report.code == 1);
    CHECK(report["corrupted"] == 1);
    // Without its end it takes the next line along.
    CHECK(report["lost"] == (places[i] == 63 ? 2 : 1));
    check_all_zero_but(report, {"corrupted", "lost"});
  }
}

TEST_CASE("a shorter, a longer and a stranger's line are noticed") {
  for (const char* added : {"crowd 0000 00000", "error: go away"}) {
    const Server server =
        make_server([=](int delivery, Receiver&, std::string line) {
          return std::optional(delivery == 100 ? line + added + '\n' : line);
        });
    const Run report = run_small(server);
    CHECK(report.code == 1);
    CHECK(report["corrupted"] == 1);
    CHECK(report["deliveries"] == 350);
    CHECK(report.says(std::string("what nobody sent: ") + added));
    check_all_zero_but(report, {"corrupted"});
  }
}

TEST_CASE("a line without an end is noticed") {
  const Server server =
      make_server([](int delivery, Receiver&, std::string line) {
        return std::optional(delivery == 100 ? std::string(70'000, '"') : line);
      });
  const Run report = run_small(server);
  CHECK(report.code == 1);
  CHECK(report["corrupted"] == 1);
  CHECK(report["disconnected"] == 1);
}

TEST_CASE("a client that is disconnected is noticed, and the others go on") {
  const Server server =
      make_server([](int delivery, Receiver&, std::string line) {
        return delivery == 100 ? std::nullopt : std::optional(line);
      });
  const Run report = run_small(server);
  CHECK(report.code == 1);
  CHECK(report["disconnected"] == 1);
  CHECK(report["lines_sent"] == 50);
  CHECK(report["deliveries"] >= 6 * 50);
  CHECK(report["deliveries"] + report["lost"] == report["expected"]);
  check_all_zero_but(report, {"disconnected", "lost"});
}

TEST_CASE("a server that is killed is noticed") {
  Rat rat;
  peers::Process process(crowd(
      {"--port", rat.port, "--clients", "50", "--seconds", "60", "--json"}));
  rat.wait_until_busy();
  rat.process.signal(SIGKILL);
  const Run report = end_of(process);
  CHECK(report.code == 1);
  CHECK(report["disconnected"] == 50);
  CHECK(report["corrupted"] == 0);
  CHECK(report["deliveries"] > 0);
}

TEST_CASE("nobody who listens, and one who says nothing, are told apart") {
  // Bound, so that nobody else gets the port, and not listening.
  const peers::Descriptor bound = peers::bind_free_port(false);
  const std::string port = std::to_string(peers::local_port(bound.get()));
  peers::Process alone(crowd({"--port", port}));
  ServerOptions options;
  options.greets = false;
  const Server server(std::move(options));
  const Run silence = run_small(server, "1");
  CHECK(silence.code == 1);
  CHECK(silence["unreached"] == 8);
  CHECK(silence["lines_sent"] == 0);
  const Run nobody = end_of(alone);
  CHECK(nobody.code == 1);
  CHECK(nobody.output.empty());
  CHECK(nobody.error == "crowd: cannot connect to 127.0.0.1:" + port +
                            ": Connection refused\n");
}

TEST_CASE("a server that takes some clients only is noticed") {
  ServerOptions options;
  options.most = 5;
  const Server server(std::move(options));
  const Run report = run_small(server);
  CHECK(report.code == 1);
  CHECK(report["unconnected"] + report["disconnected"] >= 3);
  CHECK(report["deliveries"] == report["expected"]);
}

// ---------------------------------------------------------------------------
// The program
// ---------------------------------------------------------------------------

TEST_CASE("CTRL-C ends the run early, and all that was sent is waited for") {
  Rat rat;
  peers::Process process(crowd(
      {"--port", rat.port, "--clients", "20", "--seconds", "60", "--json"}));
  rat.wait_until_busy();
  process.signal(SIGINT);
  const Run report = end_of(process);
  CHECK(report.code == 0);
  CHECK(report.says("\"interrupted\":true"));
  CHECK(report["lines_sent"] > 0);
  CHECK(report["deliveries"] == report["expected"]);
}

TEST_CASE("a second CTRL-C ends the waiting") {
  Rat rat;
  peers::Process process(crowd(
      {"--port", rat.port, "--clients", "20", "--seconds", "60", "--json"}));
  rat.wait_until_busy();
  rat.process.stop();
  process.signal(SIGINT);
  process.wait_until_asleep();
  process.signal(SIGINT);
  const Run report = end_of(process);
  CHECK(report.code == 1);
  CHECK(report.says("\"interrupted\":true"));
  CHECK(report["lost"] > 0);
  check_all_zero_but(report, {"lost"});
}

TEST_CASE("on a terminal there is a line of progress") {
  const Fd terminal{::posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK)};
  REQUIRE(::grantpt(terminal.get()) == 0);
  REQUIRE(::unlockpt(terminal.get()) == 0);
  const Rat rat;
  const std::string script =
      "exec \"$0\" \"$@\" 2>" + std::string(::ptsname(terminal.get()));
  for (const bool quiet : {false, true}) {
    peers::Command command{"sh", "-c", script};
    for (const std::string& word :
         crowd({"--port", rat.port, "--clients", "5", "--senders", "1",
                "--rate", "100", "--lines", quiet ? "1" : "30"}))
      command.push_back(word);
    if (quiet) command.emplace_back("--quiet");
    CHECK(run(command).code == 0);
    const std::string shown = support::receive_some(terminal);
    CHECK(contains(shown, "\r\033[K5 clients, ") == !quiet);
    CHECK(contains(shown, " deliveries/s, 0 lost") == !quiet);
    CHECK(!contains(shown, "\n"));
  }
}

TEST_CASE("too few descriptors are told before anybody connects") {
  const Run report = run({"sh", "-c", "ulimit -n 50; exec \"$0\" \"$@\"",
                          EDGEWISE_CROWD, "--clients", "100"});
  CHECK(report.code == 1);
  CHECK(report.error ==
        "crowd: 100 clients need 116 descriptors, but the hard limit is 50: "
        "raise it, see ulimit -Hn\n");
}

TEST_CASE("a bad command line is answered with one line and exit code 2") {
  const std::vector<std::vector<std::string>> bad{
      {"--port", "0"},
      {"--port"},
      {"--clients", "1"},
      {"--clients", "2x"},
      {"--senders", "101"},
      {"--size", "42"},
      {"--host", "here"},
      {"--echo=1"},
      {"--what\never"},
      {"--window=0"},
      {"--patience", ""},
      {"--unix", std::string(200, 'x')},
      {"stray"}};
  std::vector<std::unique_ptr<peers::Process>> processes;
  for (const auto& arguments : bad)
    processes.push_back(std::make_unique<peers::Process>(crowd(arguments)));
  for (std::size_t i = 0; i < bad.size(); ++i) {
    CAPTURE(bad[i].front());
    const Run report = end_of(*processes[i]);
    CHECK(report.code == 2);
    CHECK(report.output.empty());
    CHECK(report.error.starts_with("crowd: "));
    CHECK(report.error.ends_with(" (see crowd --help)\n"));
    CHECK(report.error.find('\n') == report.error.size() - 1);
  }
  CHECK(run(crowd({"--help"})).says("--patience SECONDS"));
  CHECK(run(crowd({"--version"})).output.starts_with("crowd "));
}

int main(int argc, char** argv) {
  if (std::string_view(EDGEWISE_CROWD).empty()) {
    std::puts("skipped: the examples crowd and rat are not built");
    return 77;
  }
  return doctest::Context(argc, argv).run();
}
