// What rat promises beyond the milestones, whose checks it passes too: its
// limits, its time-outs, Unix sockets, and what it says about itself.
#include "rat.hpp"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <thread>

using namespace peers;

namespace {

// Of options that are given twice, the last one counts.
Command rat(const Command& options = {}) {
  Command command{EDGEWISE_RAT, "--port", "0"};
  command.insert(command.end(), options.begin(), options.end());
  return command;
}

class RatRoom : public Room {
 public:
  explicit RatRoom(const Command& command) : Room(command, broadcasting()) {}

  std::string_view log() { return server().error(); }

  void wait_for_log(const std::string& text) {
    wait([&] { return log().find(text) != log().npos; },
         "its log says " + shown(text));
  }
};

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != text.npos;
}

}  // namespace

TEST_SUITE_BEGIN("rat" * doctest::skip(!rat_is_built));

// ---------------------------------------------------------------------------
// How many
// ---------------------------------------------------------------------------

TEST_CASE("one client too many is told so, and has its turn when one leaves") {
  RatRoom room(rat({"--max-clients", "2"}));
  CHECK(contains(room.log(), "room for 2 clients"));
  const auto peers = room.join(2);
  for (int i = 0; i < 50; ++i) {
    step("a third client comes, and says something at once");
    Peer& third = room.connect();
    third.say("is there room?\n");
    // A reset if it came before what was said could be read.
    room.wait_for_end(third);
    CHECK(third.inbox == "error: server full\n");
    room.forget(third);
  }
  expect_delivery(room, *peers[0], "we are two\n", {peers[1]});
  step("one of two leaves, and another comes");
  peers[0]->leave();
  room.wait_for_log("client 1 left");
  expect_delivery(room, room.join(), "we are two again\n", {peers[1]});
  end_decently(room);
}

TEST_CASE("without descriptors for more, the limit is what it has") {
  Command command{"sh", "-c", "ulimit -n 20 && exec \"$0\" \"$@\""};
  for (const std::string& word : rat()) command.push_back(word);
  RatRoom room(command);
  const auto place = room.log().find("room for ");
  REQUIRE(place != room.log().npos);
  const auto most = std::stoul(std::string(room.log().substr(place + 9)));
  CHECK(most > 5);
  CHECK(most < 20);
  const auto peers = room.join(most);
  for (int i = 0; i < 10; ++i) {
    Peer& refused = room.connect();
    room.wait_for_end_of_stream(refused);
    CHECK(refused.inbox == "error: server full\n");
  }
  const std::vector<Peer*> others(peers.begin() + 1, peers.end());
  expect_delivery(room, *peers[0], "all of us\n", others);
  end_decently(room);
}

TEST_CASE("2,000 who connect and reset leave no descriptor behind") {
  RatRoom room(rat({"--quiet"}));
  const auto peers = room.join(2);
  const std::size_t before = room.server().descriptors();
  for (int i = 0; i < 2000; ++i) {
    Peer& peer = room.connect();
    if (i % 2 == 0) peer.say("half a line");
    peer.reset();
    room.forget(peer);
  }
  expect_delivery(room, *peers[0], "still there\n", {peers[1]});
  room.wait_for_descriptors(before);
  end_decently(room);
}

namespace {

// Sends short lines as fast as a processor can, until it goes.
class Flooder {
 public:
  explicit Flooder(std::uint16_t port) {
    const Address address = ipv4_loopback(port);
    if (::connect(socket_.get(), address.data(), address.size) != 0)
      fail("a peer can connect", std::strerror(errno));
    thread_ = std::thread([this] {
      const std::string lines = [] {
        std::string text;
        while (text.size() < mebibyte) text += "fifteen letters\n";
        return text;
      }();
      while (::send(socket_.get(), lines.data(), lines.size(), MSG_NOSIGNAL) >
             0)
        continue;
    });
  }
  Flooder(const Flooder&) = delete;
  Flooder& operator=(const Flooder&) = delete;
  ~Flooder() {
    ::shutdown(socket_.get(), SHUT_RDWR);
    thread_.join();
  }

 private:
  Descriptor socket_{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  std::thread thread_;
};

}  // namespace

TEST_CASE("who talks alone and without a pause keeps nobody out") {
  RatRoom room(rat());
  step("A says short lines without a pause; then B connects");
  const Flooder flooder(room.port());
  room.wait_for_log("client 1 connected");
  room.watch_for(200ms);
  Peer& listener = room.connect();
  room.wait([&] { return !listener.inbox.empty(); }, "B hears some of them");
  end_decently(room);
}

// ---------------------------------------------------------------------------
// Who takes nothing
// ---------------------------------------------------------------------------

namespace {

// A sender without a pause, and one who takes all of it.
class Flood {
 public:
  explicit Flood(RatRoom& room)
      : room_(&room), peers_(room.join(2)), reader_(*peers_[1]) {}

  // Goes on until the condition holds, with a limit on what is sent.
  void until(const Condition& holds, const std::string& expected) {
    room_->wait(
        [&] {
          go_on();
          return holds();
        },
        expected);
  }

  std::size_t received() const { return reader_.received(); }

  // No more is sent; what has been reaches the reader and somebody else.
  void finish(BlockReader& other) {
    wait_for(other);
    finish();
  }
  void finish() { wait_for(reader_); }

  std::size_t sent() const { return sent_ * mebibyte; }

 private:
  void wait_for(BlockReader& reader) {
    room_->wait(
        [&] {
          reader.take(sent());
          reader.expect_not_ended(sent());
          return reader.received() == sent();
        },
        "all " + std::to_string(sent_) + " MiB arrive");
  }

  void go_on() {
    constexpr std::size_t window = 4 * mebibyte;
    reader_.take(sent());
    if (peers_[0]->unsent() > 0 || sent() - reader_.received() >= window)
      return;
    peers_[0]->say(block_of_lines());
    ++sent_;
  }

  RatRoom* room_;
  std::vector<Peer*> peers_;
  BlockReader reader_;
  std::size_t sent_ = 0;
};

bool is_disconnected(const Peer& peer) {
  pollfd state{peer.socket(), POLLRDHUP, 0};
  return ::poll(&state, 1, 0) > 0;
}

// The longest time in which the reader got nothing.
struct Silence {
  Clock::time_point last = Clock::now();
  std::size_t before = 0;
  std::chrono::duration<double> longest{0};

  void sample(std::size_t received) {
    if (received == std::exchange(before, received)) return;
    longest = std::max<std::chrono::duration<double>>(
        longest, Clock::now() - std::exchange(last, Clock::now()));
  }
};

}  // namespace

TEST_CASE(
    "who stalls again and again stops the room once; nobody pays for him") {
  RatRoom room(rat({"--stall-timeout", "2"}));
  Flood flood(room);
  const auto dead = room.join(3, 4096, 1000);
  for (Peer* peer : dead) peer->reads = false;
  step("A sends to B without a pause, and three take nothing");
  Silence silence;
  const auto run = [&](const Condition& holds, const std::string& expected) {
    flood.until(
        [&] {
          silence.sample(flood.received());
          return holds();
        },
        expected);
  };
  run([&] { return contains(room.log(), "took nothing"); },
      "the first of them is disconnected");
  step("for 5 seconds more, another one comes whenever one has been dropped");
  for (Peer* peer : dead) peer->leave();
  silence = {Clock::now(), flood.received()};
  Peer* staller = nullptr;
  const auto come_back = [&] {
    if (staller != nullptr && is_disconnected(*staller))
      room.forget(*std::exchange(staller, nullptr));
    if (staller != nullptr) return;
    staller = &room.connect(4096, 1000);
    staller->reads = false;
  };
  const auto start = Clock::now();
  run(
      [&] {
        come_back();
        return Clock::now() - start > 5s;
      },
      "five seconds pass");
  INFO("at the most, nothing came for ", silence.longest.count(), " s");
  CHECK(silence.longest < 1500ms);
  step("an honest newcomer reads only now and then");
  Peer& slow = room.connect();
  slow.reads = false;
  auto next = Clock::now();
  run(
      [&] {
        come_back();
        if (Clock::now() >= next) {
          next += 400ms;
          slow.reads = true;
          slow.receive();
          slow.reads = false;
          expect(!slow.ended(), "he is not disconnected", "he is");
        }
        return Clock::now() - start > 9s;
      },
      "four seconds pass");
  CHECK_FALSE(is_disconnected(slow));
}

TEST_CASE("who takes nothing is disconnected, and the log says why") {
  RatRoom room(rat({"--stall-timeout", "0.5"}));
  Flood flood(room);
  Peer& dead = *room.join(1, 4096, 1000).front();
  dead.reads = false;
  step("A sends to B without a pause, and C takes nothing");
  flood.until([&] { return contains(room.log(), "client 3 left"); },
              "C is disconnected");
  CHECK(contains(room.log(), "client 3 left: took nothing for 0.5"));
  flood.finish();
  CHECK(is_disconnected(dead));
}

TEST_CASE("with --stall-timeout 0, who takes nothing is waited for") {
  RatRoom room(rat({"--stall-timeout", "0"}));
  Flood flood(room);
  Peer& late = *room.join(1, 4096, 1000).front();
  late.reads = false;
  step("A sends to B without a pause, and C takes nothing for 3 seconds");
  const auto start = Clock::now();
  flood.until([&] { return Clock::now() - start > 3s; }, "3 seconds pass");
  step("then C reads, too");
  late.reads = true;
  BlockReader backlog(late);
  flood.finish(backlog);
  CHECK_FALSE(contains(room.log(), "took nothing"));
}

namespace {

// A few bytes four times a second, with a time-out of one second.
void expect_slow_reader_is_kept(const Command& command, std::size_t portion) {
  RatRoom room(command);
  Flood flood(room);
  Peer& slow = room.join();
  slow.reads = false;
  slow.portion = portion;
  step("A sends to B without a pause, and C takes " +
       std::to_string(4 * portion) + " bytes a second");
  BlockReader backlog(slow);
  const auto start = Clock::now();
  auto next = start;
  flood.until(
      [&] {
        if (Clock::now() >= next) {
          next += 250ms;
          slow.reads = true;
          slow.receive();
          slow.reads = false;
          backlog.take(SIZE_MAX);
        }
        backlog.expect_not_ended(SIZE_MAX);
        return Clock::now() - start > 5s;
      },
      "5 seconds pass");
  step("then C takes everything at once");
  slow.reads = true;
  slow.portion = 262144;
  flood.finish(backlog);
  CHECK_FALSE(contains(room.log(), "took nothing"));
}

}  // namespace

TEST_CASE("a reader of 100 bytes a second is kept with a time-out of one") {
  expect_slow_reader_is_kept(rat({"--stall-timeout", "1"}), 25);
}

TEST_CASE(
    "a rejected slow reader gets his backlog, though he goes on sending") {
  RatRoom room(rat({"--stall-timeout", "1"}));
  const auto peers = room.join(2);
  Peer& slow = *peers[1];
  slow.reads = false;
  const std::string talk = block_of_lines().substr(0, 600 * 1024);
  step(
      "A says 600 KB, B an over-long line; for 4 s B reads 5,000 bytes a "
      "second");
  peers[0]->say(talk);
  room.wait([&] { return peers[0]->unsent() == 0; }, "A has said it");
  room.watch_for(200ms);
  slow.say(std::string(70'000, 'x') + '\n');
  slow.portion = 500;
  const auto start = Clock::now();
  auto next = start;
  room.wait(
      [&] {
        if (Clock::now() >= next) {
          next += 100ms;
          slow.say("x");
          slow.reads = true;
          slow.receive();
          slow.reads = false;
        }
        return Clock::now() - start > 4s;
      },
      "4 seconds pass");
  step("then B reads all");
  slow.reads = true;
  slow.portion = 262144;
  room.wait_for_end(slow);
  CHECK(slow.inbox.starts_with(talk));
  CHECK(slow.inbox.find("\nerror:") != std::string::npos);
}

TEST_CASE("who is silent for too long still gets what is queued for him") {
  RatRoom room(rat({"--idle-timeout", "1", "--stall-timeout", "0",
                    "--high-water", "4194304"}));
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096, 1000).front();
  late.reads = false;
  step("A says 3 MiB, which B reads and C does not; then all are silent");
  send_blocks(room, *peers[0], {peers[1]}, 3);
  room.wait_for_log("client 2 left: said nothing for 1");
  step("a second later, C reads");
  room.watch_for(1s);
  late.reads = true;
  room.wait_for_end_of_stream(late);
  BlockReader backlog(late);
  backlog.take(3 * mebibyte);
  CHECK(backlog.received() == 3 * mebibyte);
  CHECK(late.inbox.empty());
}

// ---------------------------------------------------------------------------
// Unix sockets
// ---------------------------------------------------------------------------

namespace {

Command unix_rat(const std::string& path, const Command& options = {}) {
  Command command{EDGEWISE_RAT, "--unix", path};
  command.insert(command.end(), options.begin(), options.end());
  return command;
}

::mode_t mode_of(const std::string& path) {
  struct stat status {};
  REQUIRE(::lstat(path.c_str(), &status) == 0);
  return status.st_mode & 07777;
}

}  // namespace

TEST_CASE("on a Unix socket, for nobody else, and gone at the end") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  RatRoom room(unix_rat(path));
  CHECK(room.first_line() == "listening on unix:" + path);
  CHECK(room.output().empty());
  CHECK(mode_of(path) == 0600);
  const auto peers = room.join(3);
  expect_delivery(room, *peers[0], "hello\n", {peers[1], peers[2]});
  peers[2]->say("bye");
  peers[2]->finish();
  for (Peer* peer : {peers[0], peers[1]}) room.wait_for_inbox(*peer, "bye\n");
  room.wait_for_end_of_stream(*peers[2]);
  end_decently(room);
  CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("with --unix-mode, for whom it says, whatever the umask") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  Command command{"sh", "-c", "umask 077 && exec \"$0\" \"$@\""};
  for (const std::string& word : unix_rat(path, {"--unix-mode", "666"}))
    command.push_back(word);
  RatRoom room(command);
  CHECK(mode_of(path) == 0666);
  end_decently(room);
}

TEST_CASE("what a killed server has left behind is replaced") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  {
    RatRoom killed(unix_rat(path));
    killed.server().signal(SIGKILL);
    killed.wait_for_exit("it is gone");
  }
  REQUIRE(std::filesystem::exists(path));
  RatRoom room(unix_rat(path));
  const auto peers = room.join(2);
  expect_delivery(room, *peers[0], "hello\n", {peers[1]});
}

TEST_CASE("a socket that is in use is not replaced") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  RatRoom room(unix_rat(path));
  const std::string answer = refusal(unix_rat(path), 1);
  CHECK(contains(answer, path));
  CHECK(contains(answer, "Address already in use"));
  const auto peers = room.join(2);
  expect_delivery(room, *peers[0], "unharmed\n", {peers[1]});
}

TEST_CASE("a file that is no socket is not replaced") {
  const TemporaryFolder folder;
  const std::string path = folder.path("precious");
  std::ofstream(path) << "data\n";
  const std::string answer = refusal(unix_rat(path), 1);
  CHECK(contains(answer, path));
  CHECK(contains(answer, "no socket"));
  std::string kept;
  std::getline(std::ifstream(path), kept);
  CHECK(kept == "data");
}

TEST_CASE("at the end, another server's socket is left alone") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  RatRoom first(unix_rat(path));
  std::filesystem::remove(path);
  RatRoom second(unix_rat(path));
  end_decently(first);
  const auto peers = second.join(2);
  expect_delivery(second, *peers[0], "hello\n", {peers[1]});
}

TEST_CASE("clients of a Unix and of a TCP socket are in one room") {
  const TemporaryFolder folder;
  const std::string path = folder.path("socket");
  RatRoom room(rat({"--unix", path}));
  CHECK(room.output() == "listening on unix:" + path + "\n");
  Peer& tcp = room.join();
  const Address address = unix_address(path);
  const Descriptor local{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  REQUIRE(::connect(local.get(), address.data(), address.size) == 0);
  REQUIRE(::send(local.get(), "from here\n", 10, MSG_NOSIGNAL) == 10);
  room.wait_for_inbox(tcp, "from here\n");
  tcp.say("from there\n");
  pollfd waiting{local.get(), POLLIN, 0};
  room.wait([&] { return ::poll(&waiting, 1, 0) == 1; }, "it is answered");
  std::array<char, 100> answer;
  const auto got = ::recv(local.get(), answer.data(), answer.size(), 0);
  REQUIRE(got > 0);
  CHECK(std::string_view(answer.data(), static_cast<std::size_t>(got)) ==
        "from there\n");
}

// There the kernel tells of each KiB that has been read, and not of each byte.
TEST_CASE("a slow reader on a Unix socket is kept") {
  const TemporaryFolder folder;
  expect_slow_reader_is_kept(
      unix_rat(folder.path("socket"), {"--stall-timeout", "1"}), 500);
}

// ---------------------------------------------------------------------------
// What it says
// ---------------------------------------------------------------------------

TEST_CASE("of a burst, its log has the beginning and the number of the rest") {
  constexpr std::size_t count = 1500;
  RatRoom room(rat({}));
  const auto start = Clock::now();
  for (std::size_t i = 0; i < count; ++i) {
    Peer& peer = room.connect();
    peer.leave();
    room.forget(peer);
  }
  std::size_t logged = 0;
  std::size_t left_out = 0;
  const auto count_all = [&] {
    logged = 0;
    left_out = 0;
    for (const std::string_view line : lines_of(room.log())) {
      if (line.ends_with(" left out of this log\n"))
        left_out += std::stoul(std::string(line));
      else if (line.starts_with("client "))
        ++logged;
    }
    return logged + left_out == 2 * count;
  };
  room.wait(count_all, "each of 3,000 events is logged, or counted");
  const std::chrono::duration<double> took = Clock::now() - start;
  INFO(logged, " lines and ", left_out, " left out in ", took.count(), " s");
  CHECK(logged >= 50);
  CHECK(static_cast<double>(logged) <= 100 * (took.count() + 2));
  CHECK(left_out > 0);
}

TEST_CASE("--stats logs clients, lines, deliveries, backlog and drops") {
  RatRoom room(rat({"--stats", "0.2"}));
  const auto peers = room.join(3);
  std::string talk;
  for (int i = 0; i < 1000; ++i) talk += "line " + std::to_string(i) + '\n';
  expect_delivery(room, *peers[0], talk, {peers[1], peers[2]});
  const auto stats = [&] {
    std::vector<std::array<std::size_t, 5>> all;
    for (const std::string_view line : lines_of(room.log())) {
      std::array<std::size_t, 5> n{};
      if (std::sscanf(std::string(line).c_str(),
                      "stats: %zu %*[clients], %zu lines/s, %zu deliveries/s, "
                      "backlog %zu %*[bytes], %zu drops",
                      &n[0], &n[1], &n[2], &n[3], &n[4]) == 5)
        all.push_back(n);
    }
    return all;
  };
  room.wait(
      [&] {
        const auto all = stats();
        return !all.empty() && all.back()[1] == 0 && all.back()[0] == 3;
      },
      "a line of statistics without lines, after one with some");
  double lines = 0;
  double deliveries = 0;
  for (const auto& numbers : stats()) {
    lines += static_cast<double>(numbers[1]);
    deliveries += static_cast<double>(numbers[2]);
    CHECK(numbers[3] == 0);
    CHECK(numbers[4] == 0);
  }
  // In lines a second: 1,000 in a fifth of a second or so.
  CHECK(lines > 1000);
  CHECK(deliveries / lines == doctest::Approx(2).epsilon(0.05));
}

TEST_CASE("it tells when it can be reached from outside, and how far not") {
  RatRoom open(rat({"--host", "0.0.0.0"}));
  open.join();
  end_decently(open);
  CHECK(contains(open.log(), "anyone who can reach this machine"));
  RatRoom closed(rat({"--host", "127.0.0.1"}));
  closed.join();
  end_decently(closed);
  CHECK_FALSE(contains(closed.log(), "anyone"));
}

// ---------------------------------------------------------------------------
// The end
// ---------------------------------------------------------------------------

TEST_CASE("asked to stop with a full log, it sends whole lines, in order") {
  RatRoom room(rat({"--high-water", "1000", "--max-backlog", "70000"}));
  const auto peers = room.join(1);
  Peer& late = *room.join(1, 4096, 1000).front();
  late.reads = false;
  step("A sends 4 MiB, C does not read yet");
  for (int i = 0; i < 4; ++i) peers[0]->say(block_of_lines());
  room.watch_for(500ms);
  step("SIGTERM is sent, then C reads");
  room.server().signal(SIGTERM);
  room.watch_for(100ms);
  late.reads = true;
  room.wait_for_exit("it ends, and so do all connections");
  expect(room.server().exited_with(0), "exit code 0", room.server().fate());
  room.expect_end_of_stream(late);
  BlockReader backlog(late);
  backlog.take(4 * mebibyte);
  CHECK(backlog.received() % 1024 == 0);
  CHECK(backlog.received() > 70000);
  CHECK(backlog.received() < 4 * mebibyte);
}

TEST_SUITE_END();
