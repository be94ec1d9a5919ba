// rat: the broadcast server of the tutorial with a command line of its own.
//
// What one client says, line by line, all others hear. Built from milestones 1
// to 4; `rat --help` tells what it can do so far.
//
//   rat --port 8080
//   nc 127.0.0.1 8080            in two or three other terminals

#include <fcntl.h>
#include <poll.h>
#include <sys/resource.h>

#include <algorithm>
#include <csignal>
#include <deque>
#include <iostream>
#include <unordered_map>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;
using std::chrono::steady_clock;

namespace {

constexpr std::string_view help_text =
    R"(usage: rat [OPTION]...

A TCP broadcast server: each line that a client sends goes to all the others.

  --host ADDRESS    the address to listen on (127.0.0.1)
  --port N          the port to listen on, 0 for any free one (8080)
  --max-line BYTES  the longest line, its newline included (65536)
  --echo            send a line to its sender too
  --quiet           log nothing
  --help            print this and exit
  --version         print the version and exit

Talk to it with netcat: nc 127.0.0.1 8080
)";

struct Options {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8080;
  std::uint32_t max_line = 65536;
  bool echo = false;
  bool quiet = false;
  bool help = false;
  bool version = false;
};

// A longer line would leave no room for another in a client's queue.
constexpr std::uint32_t longest_max_line = 1 << 24;

// What a bad command line is answered with.
struct UsageError {
  std::string what;
};

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int) { stop_requested = 1; }

constexpr Token listener_token{0};

// One client may fill this many blocks of 64 KiB before others have their turn.
constexpr int reads_per_event = 2;

// As many may come in before those who are there have their turn.
constexpr int accepts_per_event = 64;

// How long to listen to a rejected client, so that it can read why.
constexpr auto linger_time = 1s;

// How long not to accept when descriptors have run out.
constexpr auto accept_pause = 100ms;

constexpr auto too_slow_text = "reads too slowly, its queue is full";

// Lines to standard error. A log must never stop the server: where nobody reads
// the pipe that standard error leads to, lines are left out and counted.
class Log {
 public:
  explicit Log(bool quiet) : quiet_(quiet) {}

  void line(std::string text) {
    if (quiet_) return;
    pollfd standard_error{STDERR_FILENO, POLLOUT, 0};
    if (::poll(&standard_error, 1, 0) != 1 ||
        (standard_error.revents & POLLOUT) == 0) {
      ++left_out_;
      return;
    }
    if (left_out_ > 0)
      text += " (" + std::to_string(std::exchange(left_out_, 0)) +
              " lines before this one were left out)";
    text += '\n';
    static_cast<void>(::write(STDERR_FILENO, text.data(), text.size()));
  }

 private:
  bool quiet_;
  std::uint64_t left_out_ = 0;
};

std::string name_of(Token token) {
  return "client " + std::to_string(static_cast<std::uint64_t>(token));
}

enum class State {
  open,
  deaf,       // takes nothing any more: read to the end, then closed
  reset,      // the same, but half a line at its end is not worth sending
  finished,   // its stream has ended: sent what is queued, then closed
  rejected,   // sent an over-long line: told so, then lingering
  lingering,  // our half is closed, and what it still sends is thrown away
  too_slow,   // its queue is full: closed
};

struct Client {
  explicit Client(Fd accepted, std::size_t max_line)
      : socket(std::move(accepted)), lines(max_line) {}

  Fd socket;
  LineBuffer lines;
  WriteBuffer output;
  State state = State::open;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
};

class Server {
 public:
  Server(const Address& address, const Options& options)
      : options_(options), log_(options.quiet), listener_(listen(address)) {
    poller_.add(listener_, listener_token, Interest::readable);
    std::cout << "listening on " << local_address(listener_).to_string()
              << std::endl;
  }

  void run() {
    while (stop_requested == 0) {
      for (const Event& event : poller_.wait(100ms)) {
        if (event.token() == listener_token) {
          accept_clients();
        } else {
          if (event.readable()) read_client(event.token());
          if (event.writable()) flush(event.token());
        }
      }
      for (const Token token : unsent_) flush(token);
      unsent_.clear();
      drop_lingering();
      if (accepting_paused_ && steady_clock::now() >= resume_at_)
        resume_accepting();
    }
    log_.line("stopped");
  }

 private:
  void accept_clients() {
    // Level-triggered: whoever is still waiting is reported again.
    for (int accepts = 0; accepts < accepts_per_event; ++accepts) {
      Accepted accepted = accept(listener_);
      if (accepted.retry()) continue;
      if (accepted.exhausted()) return pause_accepting(accepted.error);
      if (!accepted.ok()) return;
      const Token token{next_token_++};
      if (const auto error = poller_.try_add(accepted.fd, token,
                                             Interest::readable, Mode::edge)) {
        log_.line("cannot watch " + name_of(token) + ": " + error.message());
        continue;
      }
      shortage_logged_ = false;
      clients_.try_emplace(token, std::move(accepted.fd), options_.max_line);
      log_.line(name_of(token) + " connected from " +
                accepted.peer.to_string());
    }
  }

  // A level-triggered listener with nothing to accept into would report itself
  // for ever. Who waits in its queue is served when a descriptor is free.
  void pause_accepting(int error) {
    poller_.modify(listener_, listener_token, Interest::none);
    accepting_paused_ = true;
    resume_at_ = steady_clock::now() + accept_pause;
    if (!std::exchange(shortage_logged_, true))
      log_.line("cannot accept more than " + std::to_string(clients_.size()) +
                " clients: " + std::generic_category().message(error));
  }

  void resume_accepting() {
    if (!accepting_paused_) return;
    poller_.modify(listener_, listener_token, Interest::readable);
    accepting_paused_ = false;
  }

  void read_client(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    if (client.state == State::finished) return;
    for (int reads = 0; reads < reads_per_event; ++reads) {
      const IoResult result = client.lines.fill(client.socket);
      while (const auto line = client.lines.next()) broadcast(token, *line);
      if (result.would_block()) return;
      if (result.failed())
        return drop(token, std::generic_category().message(result.error));
      if (result.end_of_stream()) return finish(token, client);
      if (client.lines.overlong()) reject(token, client);
    }
    // There may be more, and no edge will tell: modify arms it again.
    set_interest(token, client);
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client) {
    if (client.state == State::reset) return drop(token, "connection reset");
    if (client.state == State::too_slow) return drop(token, too_slow_text);
    if (!client.lines.rest().empty()) {
      broadcast(token, std::string(client.lines.rest()) + '\n');
    }
    client.state = State::finished;
    if (client.output.empty()) drop(token, "end of stream");
  }

  // Closing at once, with bytes of the line still unread, would send a reset
  // and could take the error line from the client before it has read it. So
  // only our half is closed, and for a while what comes is read and thrown
  // away.
  void reject(Token token, Client& client) {
    if (client.state != State::open) return;
    const std::string reason = "error: a line may have at most " +
                               std::to_string(options_.max_line) +
                               " bytes, its newline included\n";
    client.state = State::rejected;
    enqueue(token, client, reason);
  }

  void linger(Token token, Client& client) {
    client.state = State::lingering;
    shutdown_write(client.socket);
    lingering_.emplace_back(steady_clock::now() + linger_time, token);
  }

  void drop_lingering() {
    while (!lingering_.empty() &&
           lingering_.front().first <= steady_clock::now()) {
      const Token token = lingering_.front().second;
      lingering_.pop_front();
      if (clients_.contains(token)) drop(token, "line too long");
    }
  }

  void broadcast(Token sender, std::string_view line) {
    for (auto& [token, client] : clients_) {
      if (client.state != State::open) continue;
      if (token == sender && !options_.echo) continue;
      enqueue(token, client, line);
    }
  }

  // To be sent at the end of the turn.
  void enqueue(Token token, Client& client, std::string_view text) {
    // What is not empty is in the list already, or awaits room.
    if (client.output.empty()) unsent_.push_back(token);
    if (client.output.append(text)) return;
    client.state = State::too_slow;
    unsent_.push_back(token);
  }

  void flush(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    if (client.state == State::too_slow) return drop(token, too_slow_text);
    const IoResult result = client.output.flush(client.socket);
    if (client.state == State::finished && !result.would_block())
      return drop(token, "end of stream");
    if (result.failed()) return stop_writing(token, client, result.error);
    if (client.state == State::rejected && result.ok()) linger(token, client);
    if (client.awaits_room == result.would_block()) return;
    client.awaits_room = result.would_block();
    set_interest(token, client);
  }

  // The client is gone, but lines that it sent before may still be unread. So
  // only reading ends it: modify reports what there is to read once more.
  void stop_writing(Token token, Client& client, int error) {
    client.state = error == ECONNRESET ? State::reset : State::deaf;
    client.output = WriteBuffer();
    client.awaits_room = false;
    set_interest(token, client);
  }

  void set_interest(Token token, const Client& client) {
    const Interest writing =
        client.awaits_room ? Interest::writable : Interest::none;
    poller_.modify(client.socket, token, Interest::readable | writing,
                   Mode::edge);
  }

  void drop(Token token, const std::string& reason) {
    poller_.remove(clients_.at(token).socket);
    clients_.erase(token);
    log_.line(name_of(token) + " left: " + reason);
    resume_accepting();
  }

  Options options_;
  Log log_;
  Fd listener_;
  Poller poller_;
  std::unordered_map<Token, Client> clients_;
  std::uint64_t next_token_ = 1;
  std::vector<Token> unsent_;  // whose output was empty before this turn
  std::deque<std::pair<steady_clock::time_point, Token>> lingering_;
  bool accepting_paused_ = false;
  steady_clock::time_point resume_at_;
  bool shortage_logged_ = false;
};

template <class Number>
Number parse_number(std::string_view name, std::string_view text,
                    Number smallest, Number largest) {
  Number number{};
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error == std::errc{} && rest == end && number >= smallest &&
      number <= largest)
    return number;
  throw UsageError{std::string(name) + " takes a number from " +
                   std::to_string(smallest) + " to " + std::to_string(largest) +
                   ", not '" + std::string(text) + "'"};
}

// Takes `--name VALUE` and `--name=VALUE`.
Options parse_options(std::span<char* const> arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view argument = arguments[i];
    const std::string_view name = argument.substr(0, argument.find('='));
    const bool attached = name.size() < argument.size();
    const auto value = [&]() -> std::string_view {
      if (attached) return argument.substr(name.size() + 1);
      if (++i < arguments.size()) return arguments[i];
      throw UsageError{std::string(name) + " needs a value"};
    };
    if (name == "--host") {
      options.host = value();
    } else if (name == "--port") {
      options.port = parse_number<std::uint16_t>(name, value(), 0, 65535);
    } else if (name == "--max-line") {
      options.max_line =
          parse_number<std::uint32_t>(name, value(), 1, longest_max_line);
    } else if (argument == "--echo") {
      options.echo = true;
    } else if (argument == "--quiet") {
      options.quiet = true;
    } else if (argument == "--help") {
      options.help = true;
    } else if (argument == "--version") {
      options.version = true;
    } else {
      throw UsageError{"unknown option '" + std::string(argument) + "'"};
    }
  }
  return options;
}

// Started without standard streams, rat would take their numbers for sockets,
// and print into one of them.
void occupy_standard_streams() {
  int descriptor = 0;
  do {
    descriptor = ::open("/dev/null", O_RDWR);
  } while (descriptor >= 0 && descriptor <= STDERR_FILENO);
  if (descriptor > STDERR_FILENO) ::close(descriptor);
}

// A shell's usual limit of 1,024 descriptors is soft: up to the hard limit they
// are ours for the asking.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

int serve(const Options& options) {
  const auto address = Address::from(options.host, options.port);
  if (!address)
    throw UsageError{"--host takes an address such as 127.0.0.1 or ::1, not '" +
                     options.host + "'"};
  occupy_standard_streams();
  raise_descriptor_limit();
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  std::signal(SIGPIPE, SIG_IGN);  // standard output and error may be pipes
  Server(*address, options).run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options(
        std::span(argv, static_cast<std::size_t>(argc)).subspan(1));
    if (options.help) {
      std::cout << help_text;
    } else if (options.version) {
      std::cout << "rat " << EDGEWISE_VERSION_MAJOR << '.'
                << EDGEWISE_VERSION_MINOR << '.' << EDGEWISE_VERSION_PATCH
                << '\n';
    } else {
      return serve(options);
    }
  } catch (UsageError& error) {
    // What was typed may hold a newline, and the answer is one line.
    std::replace_if(
        error.what.begin(), error.what.end(),
        [](unsigned char byte) { return byte < ' '; }, '?');
    std::cerr << "rat: " << error.what << " (see rat --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "rat: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
