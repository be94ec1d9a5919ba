// check: grades a broadcast server, chapter by chapter, in any language.
//
//   check NN -- PROGRAM [ARGUMENT...]
//
//   check 04 -- build/examples/04_broadcast 127.0.0.1:0
//   check 04 -- python3 my_server.py 127.0.0.1:{port}
//   check rat -- build/examples/rat --port 0
//
// NN is the chapter (01 to 08) or rat. The program is started anew for each
// check and is seen from outside only. `{port}` in an argument stands for a
// port that is free. From chapter 07 on, one more argument is the time in
// seconds after which a silent client is disconnected. Options for doctest go
// in front of NN, such as -tc='*reset*' to make only the checks whose names
// match.

#include <linux/sockios.h>
#include <sys/ioctl.h>

#include <atomic>
#include <iostream>
#include <map>
#include <set>
#include <span>
#include <thread>

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include "peers.hpp"

using namespace peers;

namespace {

// ---------------------------------------------------------------------------
// The program to check
// ---------------------------------------------------------------------------

struct Subject {
  std::string milestone;
  Command command;

  bool is_rat() const { return milestone == "rat"; }
  bool broadcasts() const { return milestone >= "04"; }  // rat, too
};

Subject subject;

// Why the check that runs could not be made on this machine, if so.
std::string skip_reason;

void skip(std::string reason) { skip_reason = std::move(reason); }

constexpr std::size_t max_line = 65536;

Command command_with(const Command& extra) {
  Command command = subject.command;
  for (std::string& argument : command) {
    const auto place = argument.find("{port}");
    if (place != argument.npos)
      argument.replace(place, 6, std::to_string(free_port()));
  }
  command.insert(command.end(), extra.begin(), extra.end());
  return command;
}

// The same with another address to listen on.
Command command_for(const std::string& address) {
  if (subject.is_rat()) {
    const auto colon = address.rfind(':');
    std::string host = address.substr(0, colon);
    if (host.starts_with('[')) host = host.substr(1, host.size() - 2);
    return command_with({"--host", host, "--port", address.substr(colon + 1)});
  }
  Command command = command_with({});
  if (command.size() > 1) command.pop_back();
  command.push_back(address);
  return command;
}

// What sets the time after which a silent client is disconnected.
Command idle_timeout(int seconds) {
  Command extra{std::to_string(seconds)};
  if (subject.is_rat()) extra.insert(extra.begin(), "--idle-timeout");
  return extra;
}

RoomOptions room_options() {
  RoomOptions options;
  options.broadcasts = subject.broadcasts();
  options.many_loops = subject.milestone == "09";
  return options;
}

class StartedRoom : public Room {
 public:
  explicit StartedRoom(const Command& extra = {})
      : Room(command_with(extra), room_options()) {}
};

// ---------------------------------------------------------------------------
// Assertions
// ---------------------------------------------------------------------------

// Shows that the server serves whoever comes now, and so has met all who came
// before: they stood in the same queue.
void prove_service(Room& room) {
  if (subject.milestone == "01") {
    room.wait_for_end_of_stream(room.connect());
  } else if (subject.broadcasts()) {
    for (Peer* peer : room.join(2)) peer->leave();
  } else {
    const bool lines = subject.milestone == "03";
    const std::string text = lines ? "are you there?" : std::string(76, '.');
    const std::string answer = lines ? ": " + text + '\n' : " sent 77 bytes\n";
    const std::size_t before = room.output().size();
    Peer& peer = room.connect();
    peer.say(text + '\n');
    room.wait(
        [&] {
          return room.output().substr(before).find(answer) !=
                 std::string_view::npos;
        },
        "a new client is served: it prints " + shown(answer));
    peer.leave();
  }
  expect(room.server().running(), "it is still running", room.server().fate());
}

// A run-time may open a descriptor or two when it is first needed.
std::size_t base_line(const Room& room) { return room.idle_descriptors() + 3; }

// ---------------------------------------------------------------------------
// Runs that end by themselves
// ---------------------------------------------------------------------------

std::string in_words(const Command& command) {
  std::string text;
  for (const std::string& argument : command)
    text += (text.empty() ? "" : " ") +
            (argument.empty() || argument.find(' ') != argument.npos
                 ? '\'' + argument + '\''
                 : argument);
  return text;
}

void expect_refusal(const Command& command, int code) {
  step("run " + in_words(command));
  Process process(command);
  process.wait_for_exit("it ends");
  expect(process.exited_with(code), "exit code " + std::to_string(code),
         process.fate());
  expect(is_one_line(process.error()), "one line on standard error",
         shown(process.error()));
  expect(process.output().empty(), "nothing on standard output",
         shown(process.output()));
}

void expect_busy_port_refusal(const Command& command,
                              const std::string& address) {
  step("run " + in_words(command) + ", the port being taken");
  Process process(command);
  process.wait_for_exit("it ends");
  expect(process.exited_with(1), "exit code 1", process.fate());
  expect(is_one_line(process.error()), "one line on standard error",
         shown(process.error()));
  for (const std::string& part :
       {address, std::string("Address already in use")})
    expect(process.error().find(part) != std::string::npos,
           shown(part) + " on standard error", shown(process.error()));
}

void expect_clean_exit(Room& room, int signal, const std::string& name) {
  step("send " + name);
  room.server().signal(signal);
  room.server().wait_for_exit("it ends");
  expect(room.server().exited_with(0), "exit code 0", room.server().fate());
}

}  // namespace

// ---------------------------------------------------------------------------
// Every milestone
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("all");

TEST_CASE("the first line tells the real address") {
  StartedRoom room;
  step("connect to the port that the first line names");
  expect(room.port() != 0, "a port that is not 0", room.first_line());
  prove_service(room);
}

TEST_CASE("a busy port is reported in one line and by exit code 1") {
  const Descriptor taken = bind_free_port(true);
  const std::string address =
      "127.0.0.1:" + std::to_string(local_port(taken.get()));
  expect_busy_port_refusal(command_for(address), address);
}

TEST_CASE("an IPv6 address is written in brackets") {
  if (!has_ipv6_loopback()) return skip("this machine has no IPv6 loopback");
  Room room(command_for("[::1]:0"), room_options());
  step("start it on [::1]:0");
  expect(room.first_line().starts_with("listening on [::1]:"),
         "listening on [::1]:PORT", room.first_line());
  prove_service(room);
}

TEST_CASE("SIGTERM ends it with exit code 0") {
  StartedRoom room;
  prove_service(room);
  expect_clean_exit(room, SIGTERM, "SIGTERM");
}

TEST_CASE("SIGINT ends it with exit code 0") {
  StartedRoom room;
  prove_service(room);
  expect_clean_exit(room, SIGINT, "SIGINT");
}

TEST_CASE("SIGTERM ends it while clients are connected") {
  StartedRoom room;
  step("three clients connect");
  for (int i = 0; i < 3; ++i) room.connect();
  prove_service(room);
  expect_clean_exit(room, SIGTERM, "SIGTERM");
}

TEST_CASE("it survives being stopped and continued") {
  StartedRoom room;
  for (int i = 0; i < 3; ++i) {
    prove_service(room);
    room.wait_for_descriptors(base_line(room));
    room.server().wait_until_asleep();
    step("send SIGSTOP, then SIGCONT, which interrupts its wait");
    room.server().stop();
    room.server().resume();
    prove_service(room);
  }
}

TEST_CASE("200 clients that connect and leave at once leave nothing behind") {
  StartedRoom room;
  step("200 times connect and close");
  for (int i = 0; i < 200; ++i) {
    Peer& peer = room.connect();
    peer.leave();
    room.forget(peer);
  }
  prove_service(room);
  room.wait_for_descriptors(base_line(room));
}

TEST_CASE("200 clients that connect and reset leave nothing behind") {
  StartedRoom room;
  step("200 times connect and reset");
  for (int i = 0; i < 200; ++i) {
    Peer& peer = room.connect();
    peer.reset();
    room.forget(peer);
  }
  prove_service(room);
  room.wait_for_descriptors(base_line(room));
}

TEST_CASE("a client that says nothing harms nobody") {
  StartedRoom room;
  Peer& silent = room.connect();
  for (int i = 0; i < 3; ++i) prove_service(room);
  step("one client connects and is silent, others come and go");
  room.watch_for(100ms);
  if (subject.milestone != "01")
    expect(!silent.ended(), "the silent client stays connected",
           room.describe_peer(silent));
}

namespace {

void expect_idle(Room& room) {
  const auto busy_before = room.server().cpu_time();
  const auto start = Clock::now();
  room.watch_for(500ms);
  const std::chrono::duration<double> watched = Clock::now() - start;
  const double share = (room.server().cpu_time() - busy_before) / watched * 100;
  expect(share < 20, "next to no processor time, as there is nothing to do",
         std::to_string(static_cast<int>(share)) + " % of a processor");
}

}  // namespace

TEST_CASE("an idle server uses no processor time") {
  StartedRoom room;
  prove_service(room);
  for (int i = 0; i < 3; ++i) room.connect();
  prove_service(room);
  step("three clients are connected and silent for half a second");
  expect_idle(room);
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// The milestones, whose one argument is an address
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("address");

TEST_CASE("a bad address is refused in one line and by exit code 2") {
  for (const char* bad : {"nonsense", "127.0.0.1:99999", "127.0.0.1", ":",
                          "[::1]", "127.0.0.1:80x", ""})
    expect_refusal(command_for(bad), 2);
}

TEST_CASE("a second argument is refused in one line and by exit code 2") {
  Command command = command_for("127.0.0.1:0");
  command.emplace_back("127.0.0.1:0");
  expect_refusal(command, 2);
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 01
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("01");

TEST_CASE("each connection is printed with its address, and closed") {
  StartedRoom room;
  std::string printed;
  for (int i = 0; i < 3; ++i) {
    step("a client connects and reads");
    Peer& peer = room.connect();
    printed +=
        "connection from 127.0.0.1:" + std::to_string(peer.port()) + '\n';
    room.wait_for_output(printed);
    room.wait_for_end_of_stream(peer);
    expect(peer.inbox.empty(), "nothing to read", shown(peer.inbox));
  }
}

TEST_CASE("connections that came at the same time are all accepted") {
  StartedRoom room;
  step("stop the server, connect five times, continue the server");
  room.server().stop();
  std::string printed;
  for (int i = 0; i < 5; ++i)
    printed +=
        "connection from 127.0.0.1:" + std::to_string(room.connect().port()) +
        '\n';
  room.server().resume();
  room.wait_for_output(printed);
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 02
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("02-03");

TEST_CASE("a client that closes has left") {
  StartedRoom room;
  step("a client connects");
  Peer& peer = room.connect();
  room.wait_for_output("client 1 connected\n");
  step("it closes");
  peer.leave();
  room.wait_for_output("client 1 connected\nclient 1 left\n");
}

TEST_CASE("a client that resets has left") {
  StartedRoom room;
  step("a client connects");
  Peer& peer = room.connect();
  room.wait_for_output("client 1 connected\n");
  step("it resets");
  peer.reset();
  room.wait_for_output("client 1 connected\nclient 1 left\n");
}

TEST_CASE("a client that half-closes has left, and reads end of stream") {
  StartedRoom room;
  step("a client connects");
  Peer& peer = room.connect();
  room.wait_for_output("client 1 connected\n");
  step("it half-closes");
  peer.finish();
  room.wait_for_output("client 1 connected\nclient 1 left\n");
  room.wait_for_end_of_stream(peer);
}

TEST_CASE("clients are numbered from 1, and no number is used again") {
  StartedRoom room;
  step("a client connects, leaves, and another connects");
  std::string printed = "client 1 connected\n";
  Peer& first = room.connect();
  room.wait_for_output(printed);
  first.leave();
  printed += "client 1 left\n";
  room.wait_for_output(printed);
  Peer& second = room.connect();
  printed += "client 2 connected\n";
  room.wait_for_output(printed);
  step("a third one connects, then the second one leaves");
  room.connect();
  printed += "client 3 connected\n";
  room.wait_for_output(printed);
  second.leave();
  printed += "client 2 left\n";
  room.wait_for_output(printed);
}

TEST_CASE("the descriptor of a client that left is closed") {
  StartedRoom room;
  prove_service(room);
  room.wait_for_descriptors(base_line(room));
  step("20 clients connect; all leave, by close, reset and half-close");
  std::vector<Peer*> clients;
  clients.reserve(20);
  for (int i = 0; i < 20; ++i) clients.push_back(&room.connect());
  prove_service(room);
  for (std::size_t i = 0; i < clients.size(); ++i) {
    if (i % 3 == 0) clients[i]->leave();
    if (i % 3 == 1) clients[i]->reset();
    if (i % 3 == 2) clients[i]->finish();
  }
  room.wait_for_descriptors(base_line(room));
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("02");

TEST_CASE("it prints how many bytes each client has sent") {
  StartedRoom room;
  std::string printed = "client 1 connected\nclient 2 connected\n";
  step("two clients connect");
  Peer& first = room.connect();
  Peer& second = room.connect();
  room.wait_for_output(printed);
  for (int i = 0; i < 2; ++i) {
    step("the second sends 7 bytes, then the first sends 6");
    second.say("7 bytes");
    printed += "client 2 sent 7 bytes\n";
    room.wait_for_output(printed);
    first.say("hello\n");
    printed += "client 1 sent 6 bytes\n";
    room.wait_for_output(printed);
  }
}

TEST_CASE("what a client sent before it left is counted") {
  StartedRoom room;
  Peer& peer = room.connect();
  room.wait_for_output("client 1 connected\n");
  step("stop the server, a client sends 6 bytes and closes, continue");
  room.server().stop();
  peer.say("hello\n");
  peer.leave();
  room.server().resume();
  room.wait_for_output(
      "client 1 connected\nclient 1 sent 6 bytes\nclient 1 left\n");
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 03
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("03");

TEST_CASE("a line that comes in pieces is printed whole") {
  StartedRoom room;
  std::string printed = "client 1 connected\nclient 2 connected\n";
  Peer& talker = room.connect();
  Peer& marker = room.connect();
  room.wait_for_output(printed);
  for (const char piece : std::string_view("hello")) {
    step(R"(a client sends "hello\n" byte by byte)");
    talker.say({&piece, 1});
    // Once this is printed, the server has seen the piece by itself.
    marker.say("mark\n");
    printed += "client 2: mark\n";
    room.wait_for_output(printed);
  }
  talker.say("\n");
  printed += "client 1: hello\n";
  room.wait_for_output(printed);
}

TEST_CASE("several lines in one segment are printed apart") {
  StartedRoom room;
  Peer& talker = room.connect();
  step(R"(a client sends "one\ntwo\n\nthree\nfo" at once, then "ur\n")");
  std::string printed =
      "client 1 connected\nclient 1: one\nclient 1: two\n"
      "client 1: \nclient 1: three\n";
  talker.say("one\ntwo\n\nthree\nfo");
  room.wait_for_output(printed);
  talker.say("ur\n");
  printed += "client 1: four\n";
  room.wait_for_output(printed);
}

TEST_CASE("more than one read's worth of lines is printed to the last") {
  StartedRoom room;
  Peer& talker = room.connect();
  step("a client sends 20,000 lines in one go");
  std::string printed = "client 1 connected\n";
  std::string sent;
  for (int i = 0; i < 20'000; ++i) {
    const std::string line = "line " + std::to_string(i) + '\n';
    sent += line;
    printed += "client 1: " + line;
  }
  talker.say(sent);
  room.wait_for_output(printed);
}

TEST_CASE("an over-long line drops its sender and nobody else") {
  StartedRoom room;
  std::string printed = "client 1 connected\nclient 2 connected\n";
  Peer& talker = room.connect();
  Peer& other = room.connect();
  room.wait_for_output(printed);
  step("a client sends a line of 65,536 bytes");
  const std::string longest(max_line - 1, 'x');
  talker.say(longest + '\n');
  printed += "client 1: " + longest + '\n';
  room.wait_for_output(printed);
  step(R"(it sends "before\n" and a line of 65,537 bytes)");
  talker.say("before\n" + longest + "x\n");
  printed += "client 1: before\nclient 1 left\n";
  room.wait_for_output(printed);
  room.wait_for_end(talker);
  step(R"(another client sends "after\n")");
  other.say("after\n");
  printed += "client 2: after\n";
  room.wait_for_output(printed);
}

TEST_CASE("a line without an end drops its sender, too") {
  StartedRoom room;
  Peer& talker = room.connect();
  step("a client sends 200,000 bytes without a newline");
  talker.say(std::string(200'000, 'x'));
  room.wait_for_output("client 1 connected\nclient 1 left\n");
}

TEST_CASE("half a line is not printed after a reset") {
  StartedRoom room;
  std::string printed = "client 1 connected\nclient 1: whole\n";
  Peer& talker = room.connect();
  step(R"(a client sends "whole\nhalf" and resets)");
  talker.say("whole\nhalf");
  room.wait_for_output(printed);
  talker.reset();
  printed += "client 1 left\n";
  room.wait_for_output(printed);
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 04 and rat
// ---------------------------------------------------------------------------

namespace {

// Waits until a peer has exactly these lines, in whatever order.
void wait_for_lines(Room& room, Peer& peer, std::vector<std::string> wanted) {
  std::size_t size = 0;
  for (const std::string& line : wanted) size += line.size();
  const std::string what =
      peer.name() + " gets " + std::to_string(wanted.size()) +
      " lines in any order, among them " + shown(wanted.back());
  room.wait([&] { return peer.inbox.size() >= size || peer.ended(); }, what);
  const auto lines = lines_of(peer.inbox);
  std::vector<std::string> got(lines.begin(), lines.end());
  std::ranges::sort(got);
  std::ranges::sort(wanted);
  if (got != wanted) fail(what, room.describe_peer(peer));
  peer.inbox.clear();
}

}  // namespace

TEST_SUITE_BEGIN("04+");

TEST_CASE("a line goes to all the others and not to its sender") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& a = *peers[0];
  Peer& b = *peers[1];
  Peer& c = *peers[2];
  for (int i = 0; i < 3; ++i) {
    step(R"(A says "from a\n", then B "from b\n", then C "from c\n")");
    expect_delivery(room, a, "from a\n", {&b, &c});
    expect_delivery(room, b, "from b\n", {&a, &c});
    expect_delivery(room, c, "from c\n", {&a, &b});
  }
  expect(room.output().empty(), "nothing more on standard output",
         shown(room.output()));
}

TEST_CASE("a line cut in two at any place comes out whole") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& marker = *peers[1];
  Peer& reader = *peers[2];
  const std::string line = "hello, world\n";
  for (std::size_t cut = 1; cut < line.size(); ++cut) {
    const std::string head = line.substr(0, cut);
    const std::string tail = line.substr(cut);
    step("A sends " + shown(head) + R"(, B "mark\n", A )" + shown(tail));
    talker.say(head);
    // Once C has this, the server has seen the head by itself.
    expect_delivery(room, marker, "mark\n", {&reader});
    talker.say(tail);
    room.wait_for_inbox(reader, line);
  }
}

TEST_CASE("a line sent byte by byte comes out whole") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& marker = *peers[1];
  Peer& reader = *peers[2];
  const std::string line = "hello, world\n";
  step(R"(A sends "hello, world\n" byte by byte, B a line after each)");
  for (const char& piece : line) {
    talker.say({&piece, 1});
    if (piece != '\n') expect_delivery(room, marker, "mark\n", {&reader});
  }
  room.wait_for_inbox(reader, line);
}

TEST_CASE("many lines in one segment come out in order") {
  StartedRoom room;
  const auto peers = room.join(3);
  step("A sends 10,000 lines in one go");
  std::string text;
  for (int i = 0; i < 10'000; ++i) text += "line " + std::to_string(i) + '\n';
  expect_delivery(room, *peers[0], text, {peers[1], peers[2]});
}

TEST_CASE("a line may hold any bytes") {
  StartedRoom room;
  const auto peers = room.join(3);
  step("A sends all byte values, NUL and \\r\\n among them");
  std::string text;
  for (int i = 0; i < 256; ++i) {
    if (i != '\n') text += static_cast<char>(i);
  }
  text += "\r\n";
  text += std::string("\0\n", 2);
  text += "\r\n";
  expect_delivery(room, *peers[0], text, {peers[1], peers[2]});
}

TEST_CASE("an empty line is a line") {
  StartedRoom room;
  const auto peers = room.join(3);
  step(R"(A sends "\n", then "\n\nword\n\n")");
  expect_delivery(room, *peers[0], "\n", {peers[1], peers[2]});
  expect_delivery(room, *peers[0], "\n\nword\n\n", {peers[1], peers[2]});
}

TEST_CASE("a line of 65,536 bytes passes") {
  StartedRoom room;
  const auto peers = room.join(3);
  step(R"(A sends "before\n", twice a line of 65,536 bytes, and "after\n")");
  const std::string longest = std::string(max_line - 1, 'x') + '\n';
  expect_delivery(room, *peers[0], "before\n" + longest + longest + "after\n",
                  {peers[1], peers[2]});
  step("A sends the first half of such a line, B a line, A the rest");
  peers[0]->say(longest.substr(0, 30'000));
  expect_delivery(room, *peers[1], "mark\n", {peers[2]});
  peers[0]->say(longest.substr(30'000));
  room.wait_for_inbox(*peers[2], longest);
}

TEST_CASE("a line of 65,537 bytes drops its sender; lines before it go out") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& other = *peers[1];
  Peer& reader = *peers[2];
  step(R"(A sends "before\n", a line of 65,537 bytes and "behind\n")");
  talker.say("before\n" + std::string(max_line, 'x') + "\nbehind\n");
  room.wait_for_inbox(reader, "before\n");
  room.wait_for_inbox(other, "before\n");
  room.wait_for_end(talker);
  step(R"(after that, B sends "after\n")");
  expect_delivery(room, other, "after\n", {&reader});
  expect(other.inbox.empty(), "B has nothing more", shown(other.inbox));
}

TEST_CASE("a line without an end drops its sender, too") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& other = *peers[1];
  Peer& reader = *peers[2];
  const std::size_t before = room.server().descriptors();
  step("A sends 500,000 bytes without a newline");
  talker.say(std::string(500'000, 'x'));
  room.wait_for_end(talker);
  talker.leave();
  room.wait_for_descriptors(before - 1);
  step(R"(after that, B sends "after\n")");
  expect_delivery(room, other, "after\n", {&reader});
}

TEST_CASE("1,000 clients get each line once and in order") {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  if (limit.rlim_cur < 1100) return skip("it needs 1,100 descriptors");
  StartedRoom room;
  const auto peers = room.join(1000);
  step("1,000 clients are connected, A sends 20 lines one by one");
  std::string all;
  for (std::size_t i = 0; i < 20; ++i) {
    const std::string line = "line " + std::to_string(i) + '\n';
    all += line;
    peers[0]->say(line);
    room.wait_for_inbox(*peers[1 + i], all);
    peers[1 + i]->inbox = all;
  }
  const std::vector<Peer*> others(peers.begin() + 1, peers.end());
  for (Peer* peer : others) room.wait_for_inbox(*peer, all);
  step("... and another one");
  expect_delivery(room, *peers[0], "last\n", others);
}

TEST_CASE("eight who talk at once never garble one another's lines") {
  StartedRoom room;
  const auto peers = room.join(8);
  step("8 clients send 2,000 lines each, at the same time");
  const auto sent = make_talk(8, 2000);
  for (std::size_t i = 0; i < 8; ++i) peers[i]->say(sent[i]);
  expect_all_talk(room, peers, sent);
}

TEST_CASE("half a line is thrown away when its sender resets") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& other = *peers[1];
  Peer& reader = *peers[2];
  const std::size_t before = room.server().descriptors();
  step(R"(A sends "whole\nhalf" and resets, then B sends "after\n")");
  talker.say("whole\nhalf");
  room.wait_for_inbox(reader, "whole\n");
  room.wait_for_inbox(other, "whole\n");
  talker.reset();
  room.wait_for_descriptors(before - 1);
  expect_delivery(room, other, "after\n", {&reader});
  expect_delivery(room, reader, "answer\n", {&other});
}

TEST_CASE("lines sent before a reset arrive though a send to it fails first") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& other = *peers[1];
  Peer& reader = *peers[2];
  const std::size_t before = room.server().descriptors();
  step("A sends 16 MiB, which opens its window");
  send_blocks(room, talker, {&other, &reader}, 16);
  step("behind the stopped server's back A sends 200 KB and resets, B talks");
  std::string said;
  while (said.size() < 200'000) said += std::string(999, 'a') + '\n';
  room.server().stop();
  talker.say(said + "half");
  const auto taken = [&] {
    int unacknowledged = 0;
    ::ioctl(talker.socket(), SIOCOUTQ, &unacknowledged);
    return talker.unsent() == 0 && unacknowledged == 0;
  };
  for (int i = 0; i < 100 && !taken(); ++i) room.watch_for(10ms);
  if (!taken()) {
    room.server().resume();
    return skip("the kernel does not hold 200 KB for a server that is stopped");
  }
  talker.reset();
  other.say("from B\n");
  room.server().resume();
  const std::string from_b = "from B\n";
  room.wait([&] { return reader.inbox.size() >= said.size() + from_b.size(); },
            "C gets all lines of both");
  room.wait_for_descriptors(before - 1);
  const auto place = reader.inbox.find(from_b);
  expect(place != reader.inbox.npos, "C gets B's line",
         room.describe_peer(reader));
  reader.inbox.erase(place, from_b.size());
  expect(reader.inbox == said, "C gets A's whole lines and no more",
         room.describe_peer(reader));
  reader.inbox.clear();
  room.wait_for_inbox(other, said);
  expect_delivery(room, other, "after\n", {&reader});
}

TEST_CASE("an unterminated last line is delivered with a newline") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& other = *peers[1];
  Peer& reader = *peers[2];
  step(R"(A sends "whole\nlast" and half-closes)");
  talker.say("whole\nlast");
  talker.finish();
  room.wait_for_inbox(reader, "whole\nlast\n");
  room.wait_for_inbox(other, "whole\nlast\n");
  room.wait_for_end_of_stream(talker);
  step(R"(B sends "whole\n" and half-closes)");
  other.say("whole\n");
  other.finish();
  room.wait_for_inbox(reader, "whole\n");
  room.wait_for_end_of_stream(other);
  step(R"(D joins and sends "after\n")");
  expect_delivery(room, room.join(), "after\n", {&reader});
}

TEST_CASE("a client that half-closes is sent its backlog, then closed") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& late = *room.join(1, 4096).front();
  const std::size_t before = room.server().descriptors();
  step("A sends 8 MiB, which C does not read");
  late.reads = false;
  send_blocks(room, talker, {&reader}, 8);
  step("C, who has 8 MiB coming, sends \"bye\" and half-closes");
  late.say("bye");
  late.finish();
  // Only an end of stream makes this a line: the server has seen it.
  room.wait_for_inbox(reader, "bye\n");
  room.wait_for_inbox(talker, "bye\n");
  step("C has half-closed and does not read its backlog for half a second");
  expect_idle(room);
  step("C, who has half-closed, reads its backlog");
  late.reads = true;
  BlockReader backlog(late);
  room.wait(
      [&] {
        backlog.take(8 * mebibyte);
        return late.ended();
      },
      "C gets its 8 MiB, then end of stream");
  expect_equal("bytes that C gets", backlog.received(), 8 * mebibyte);
  room.wait_for_end_of_stream(late);
  room.wait_for_descriptors(before - 1);
}

TEST_CASE("writing to clients that are gone does not kill the server") {
  StartedRoom room;
  const auto peers = room.join(3);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& gone = *peers[2];
  step("behind the stopped server's back, A sends three lines, C closes");
  room.server().stop();
  talker.say("one\ntwo\nthree\n");
  gone.leave();
  room.server().resume();
  room.wait_for_inbox(reader, "one\ntwo\nthree\n");
  Peer& late = *room.join(1, 4096).front();
  const std::size_t before = room.server().descriptors();
  step("A sends 8 MiB, which D does not read; D half-closes, then resets");
  late.reads = false;
  send_blocks(room, talker, {&reader}, 8);
  late.say("bye");
  late.finish();
  room.wait_for_inbox(reader, "bye\n");
  room.wait_for_inbox(talker, "bye\n");
  late.reset();
  room.wait_for_descriptors(before - 1);
  expect_delivery(room, talker, "after\n", {&reader});
}

namespace {

// One round of the check below: all that can happen to several clients at once
// happens while the server is stopped, so that it meets all of it in one batch
// of events.
void act_behind_its_back(Room& room, Peer& talker, Peer& watcher, int round) {
  const std::string number = std::to_string(round) + '\n';
  const auto guests = room.join(5);
  Peer& leaver = *guests[0];
  Peer& resetter = *guests[1];
  Peer& finisher = *guests[2];
  Peer& swamped = *guests[3];
  Peer& swamped_resetter = *guests[4];
  const bool with_backlog = round % 5 == 0;
  if (with_backlog) {
    step("A sends 6 MiB; two clients do not read");
    swamped.reads = swamped_resetter.reads = false;
    send_blocks(room, talker, {&watcher, &leaver, &resetter, &finisher}, 6);
  }
  step("round " + number.substr(0, number.size() - 1) +
       ": behind the stopped server's back, clients send their last line and"
       " leave, reset, half-close, and others connect");
  room.server().stop();
  // What had been sent to them before gives room for more: now they are both
  // readable and writable.
  if (with_backlog) {
    swamped.drain_kernel();
    swamped_resetter.drain_kernel();
  }
  std::vector<std::string> wanted = {"leaver " + number, "finisher " + number,
                                     "swamped " + number};
  std::vector<Peer*> newcomers;
  const auto let_two_in = [&] {
    for (int i = 0; i < 2; ++i) {
      wanted.push_back("newcomer " + std::to_string(newcomers.size()) + " of " +
                       number);
      newcomers.push_back(&room.connect());
      newcomers.back()->say(wanted.back());
    }
  };
  // Events come in the order in which they happened. The leaver's line finds
  // the resetter gone already; a newcomer may get its descriptor; and then
  // comes what happened to the resetter.
  leaver.say("leaver " + number);
  leaver.leave();
  let_two_in();
  resetter.say("half");
  resetter.reset();
  finisher.say("finisher " + number);
  finisher.finish();
  swamped.reads = true;
  swamped.say("swamped " + number);
  swamped.finish();
  swamped_resetter.say("half");
  swamped_resetter.reset();
  let_two_in();
  room.server().resume();
  wait_for_lines(room, watcher, wanted);
  wait_for_lines(room, talker, wanted);
  room.wait_for_end_of_stream(finisher);
  room.wait_for_end_of_stream(swamped);
  if (with_backlog) {
    BlockReader backlog(swamped);
    backlog.take(6 * mebibyte);
    expect_equal("bytes for the client that had a backlog", backlog.received(),
                 6 * mebibyte);
  }
  step("... and after that, A sends a line");
  expect_delivery(room, talker, "end of " + number, {&watcher});
  for (Peer* newcomer : newcomers) {
    room.wait([&] { return newcomer->inbox.ends_with("end of " + number); },
              newcomer->name() + ", a newcomer, gets it too");
    newcomer->finish();
  }
  for (Peer* newcomer : newcomers) {
    room.wait_for_end_of_stream(*newcomer);
    room.forget(*newcomer);
  }
  for (Peer* guest : guests) room.forget(*guest);
}

}  // namespace

TEST_CASE("whatever happens in one batch of events, the others are served") {
  StartedRoom room;
  const auto peers = room.join(2);
  for (int round = 0; round < 20; ++round)
    act_behind_its_back(room, *peers[0], *peers[1], round);
  room.wait_for_descriptors(base_line(room) + 2);
}

TEST_CASE("a line sent right before the sender closes arrives") {
  StartedRoom room;
  const auto peers = room.join(2);
  for (int i = 0; i < 50; ++i) {
    const std::string line = "bye " + std::to_string(i) + '\n';
    step("a client joins, sends " + shown(line) + " and closes");
    Peer& guest = room.join();
    guest.say(line);
    guest.leave();
    for (Peer* peer : peers) room.wait_for_inbox(*peer, line);
    room.forget(guest);
  }
}

TEST_CASE("500 clients that say one line and leave are all heard") {
  StartedRoom room;
  Peer& watcher = *room.join(2).front();
  std::vector<std::string> wanted;
  for (int wave = 0; wave < 10; ++wave) {
    step("wave " + std::to_string(wave) +
         ": 50 clients connect, send a line and half-close");
    std::vector<Peer*> clients;
    for (int i = 0; i < 50; ++i) {
      clients.push_back(&room.connect());
      wanted.push_back("storm " + std::to_string(wave * 50 + i) + '\n');
      clients.back()->say(wanted.back());
      clients.back()->finish();
    }
    for (Peer* client : clients) {
      room.wait_for_end_of_stream(*client);
      room.forget(*client);
    }
  }
  wait_for_lines(room, watcher, wanted);
  room.wait_for_descriptors(base_line(room) + 2);
}

namespace {

// Sends without a pause, from a thread of its own, until it is destroyed.
class Flood {
 public:
  Flood(const Peer& sender, const Peer& reader)
      : socket_(sender.socket()),
        reader_(reader.socket()),
        thread_([this] { run(); }) {}
  Flood(const Flood&) = delete;
  Flood& operator=(const Flood&) = delete;
  ~Flood() {
    stopping_ = true;
    thread_.join();
  }
  void received(std::size_t bytes) { received_ += bytes; }

 private:
  // A reader that is far behind though there is something to read is slow by
  // our own fault, and might be dropped. One that is far behind with nothing to
  // read waits for the server, which deserves no mercy.
  bool reader_is_slow(std::size_t sent) const {
    int unread = 0;
    return sent > received_ + 24 * mebibyte &&
           ::ioctl(reader_, FIONREAD, &unread) == 0 && unread > 0;
  }

  void run() {
    const std::string& block = block_of_lines();
    std::size_t sent = 0;
    while (!stopping_) {
      if (reader_is_slow(sent)) {
        std::this_thread::yield();
        continue;
      }
      const std::size_t place = sent % block.size();
      const ssize_t moved = ::send(socket_, block.data() + place,
                                   block.size() - place, MSG_NOSIGNAL);
      if (moved > 0) {
        sent += static_cast<std::size_t>(moved);
        continue;
      }
      if (moved < 0 && errno != EAGAIN && errno != EINTR) return;
      pollfd waiting{socket_, POLLOUT, 0};
      ::poll(&waiting, 1, 50);
    }
  }

  int socket_;
  int reader_;
  std::atomic<bool> stopping_ = false;
  std::atomic<std::size_t> received_ = 0;
  std::thread thread_;
};

}  // namespace

namespace {

// One floods; now and then, when so much of that has arrived, another says a
// line, and a third one has to get it.
void flood_and_talk(Room& room, const std::vector<Peer*>& peers,
                    std::size_t pause) {
  Peer& quiet = *peers[1];
  Peer& reader = *peers[2];
  Flood flood(*peers[0], reader);
  std::string seen;  // the end of what C has received
  const auto take = [&] {
    flood.received(reader.inbox.size());
    seen = seen.substr(seen.size() - std::min<std::size_t>(seen.size(), 32));
    seen += reader.inbox;
    if (reader.ended()) fail("C gets what A sends", describe(reader.end()));
    for (Peer* peer : peers) peer->inbox.clear();
  };
  std::size_t received = 0;
  for (std::size_t i = 1; i <= 5; ++i) {
    room.wait(
        [&] {
          received += reader.inbox.size();
          take();
          return received >= i * pause;
        },
        "C gets what A sends");
    const std::string line = "quiet " + std::to_string(i) + '\n';
    quiet.say(line);
    room.wait(
        [&] {
          take();
          return seen.find(line) != seen.npos;
        },
        "C gets " + shown(line) + " from B amid A's lines");
  }
}

}  // namespace

TEST_CASE("one who talks without a pause does not silence the others") {
  StartedRoom room;
  const auto peers = room.join(3);
  step("A sends without a pause; now and then B sends a line");
  flood_and_talk(room, peers, 8 * mebibyte);
}

namespace {

struct SystemCall {
  std::string name;
  std::string descriptor;
  bool has_line = false;
};

// Reads what strace prints: "[pid 12] recvfrom(7, "text", ...) = 5".
std::vector<SystemCall> parse_trace(const std::string& trace,
                                    std::string_view line) {
  std::vector<SystemCall> calls;
  for (std::string_view text : lines_of(trace)) {
    if (text.starts_with("[pid")) text.remove_prefix(text.find(']') + 2);
    const auto open = text.find('(');
    if (open == text.npos || text.starts_with("strace:")) continue;
    const auto end = text.find_first_of(",)", open);
    if (end == text.npos) continue;
    calls.push_back({std::string(text.substr(0, open)),
                     std::string(text.substr(open + 1, end - open - 1)),
                     text.find(line) != text.npos});
  }
  return calls;
}

bool reads(const SystemCall& call) {
  const std::set<std::string> names = {"read", "readv", "recvfrom", "recvmsg"};
  return names.contains(call.name);
}

bool writes(const SystemCall& call) {
  const std::set<std::string> names = {"write", "writev", "sendto", "sendmsg",
                                       "sendmmsg"};
  return names.contains(call.name) && call.descriptor != "1" &&
         call.descriptor != "2";
}

// What the server asks of the kernel on the way of one line from the first to
// all the others; empty if it cannot be traced.
std::string trace_of_one_line(Room& room, const std::vector<Peer*>& peers,
                              const std::string& line) {
  Process strace(
      {"strace", "-f", "-s", "64", "-p", std::to_string(room.server().pid())});
  room.accompany(&strace);
  room.wait(
      [&] {
        return strace.error().find("attached") != std::string::npos ||
               !strace.running();
      },
      "strace attaches");
  if (!strace.running()) {
    room.accompany(nullptr);
    return "";
  }
  step("100 clients are connected and silent, A sends one line");
  expect_delivery(room, *peers[0], line + '\n',
                  {peers.begin() + 1, peers.end()});
  room.accompany(nullptr);
  strace.signal(SIGINT);
  strace.wait_for_exit("strace detaches");
  return strace.error();
}

}  // namespace

TEST_CASE("a line costs one read, one send for each receiver, and no more") {
  StartedRoom room;
  const auto peers = room.join(101);
  const std::string line = "this line is traced";
  const std::string trace = trace_of_one_line(room, peers, line);
  if (trace.empty()) return skip("strace is missing, or may not trace here");
  const auto calls = parse_trace(trace, line);
  std::string sender;
  std::map<std::string, int> sends;
  for (const SystemCall& call : calls) {
    if (reads(call) && call.has_line) sender = call.descriptor;
    // Not what wakes another loop.
    if (writes(call) && call.has_line) ++sends[call.descriptor];
  }
  if (sender.empty()) return skip("it reads with calls unknown to this check");
  const auto reads_of_sender = std::ranges::count_if(
      calls, [&](const auto& c) { return reads(c) && c.descriptor == sender; });
  expect(reads_of_sender <= 2, "at most 2 reads of A's socket",
         std::to_string(reads_of_sender));
  const auto twice = std::ranges::count_if(
      sends, [](const auto& entry) { return entry.second != 1; });
  expect_equal("receivers with more than one send",
               static_cast<std::size_t>(twice), 0);
  expect_equal("sends", sends.size(), 100);
  expect_equal("calls of epoll_ctl",
               static_cast<std::size_t>(
                   std::ranges::count(calls, "epoll_ctl", &SystemCall::name)),
               0);
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 04 and 05: the slow have no end of room, until there is an end of it
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("04-05");

TEST_CASE("a slow reader gets everything and holds nobody up") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& slow = *room.join(1, 8192).front();
  step("A sends 16 MiB; B reads, C does not yet");
  slow.reads = false;
  send_blocks(room, talker, {&reader}, 16);
  step("C reads 16 MiB that have waited, in small portions");
  slow.reads = true;
  slow.portion = 4000;
  BlockReader backlog(slow);
  const auto progress = [&] {
    backlog.take(16 * mebibyte);
    return backlog.received() == 16 * mebibyte || slow.ended();
  };
  room.wait(progress, "C gets all 16 MiB");
  expect_equal("bytes that C gets", backlog.received(), 16 * mebibyte);
  step("A and C, now up to date, talk on");
  expect_delivery(room, talker, "next\n", {&slow, &reader});
  expect_delivery(room, slow, "thanks\n", {&talker, &reader});
}

TEST_CASE("a client that never reads is dropped, and the others don't notice") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& dead = *room.join(1, 4096).front();
  const std::size_t before = room.server().descriptors();
  step("A sends 160 MiB; B reads, C never does");
  dead.reads = false;
  constexpr std::size_t blocks = 160;
  const std::size_t bound = (room.server().sanitized() ? 600 : 200) * mebibyte;
  std::size_t most = 0;
  for (std::size_t sent = 0; sent < blocks; sent += 16) {
    send_blocks(room, talker, {&reader}, 16);
    most = std::max(most, room.server().memory("VmRSS"));
  }
  expect(most < bound,
         "at most " + std::to_string(bound / mebibyte) + " MiB of memory",
         std::to_string(most / mebibyte) + " MiB");
  step("A has sent 160 MiB, C has read nothing");
  room.wait_for_descriptors(before - 1);
  dead.reads = true;
  std::size_t bytes = 0;
  room.wait(
      [&] {
        bytes += dead.inbox.size();
        dead.inbox.clear();
        return dead.ended();
      },
      "C is disconnected");
  expect(bytes < blocks * mebibyte, "C was dropped before it had everything",
         "C got everything");
  step("C is gone");
  expect_delivery(room, talker, "next\n", {&reader});
  expect_delivery(room, reader, "thanks\n", {&talker});
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 05 and later
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("05+");

namespace {

// The next lines that a peer gets, of guests who come in any order.
std::set<std::string> hear_guests(Room& room, Peer& peer, std::size_t count) {
  const auto lines_so_far = [&] {
    return static_cast<std::size_t>(std::ranges::count(peer.inbox, '\n'));
  };
  room.wait([&] { return lines_so_far() >= count; },
            peer.name() + " hears " + std::to_string(count) + " guests");
  std::set<std::string> guests;
  std::istringstream inbox(std::exchange(peer.inbox, {}));
  for (std::string line; std::getline(inbox, line);) guests.insert(line);
  expect_equal("guests that " + peer.name() + " hears", guests.size(), count);
  return guests;
}

}  // namespace

TEST_CASE("without descriptors it neither spins nor forgets who waits") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& a = *peers[0];
  step("two descriptors are left; five clients connect and say a line");
  room.server().limit_descriptors(2);
  std::map<std::string, Peer*> guests;
  for (const char* name :
       {"guest 0", "guest 1", "guest 2", "guest 3", "guest 4"}) {
    guests[name] = &room.connect();
    guests[name]->say(std::string(name) + '\n');
  }
  auto heard = hear_guests(room, a, 2);
  step("two are served, three wait for a descriptor");
  expect_idle(room);
  expect(hear_guests(room, *peers[1], 2) == heard, "B hears the same ones",
         "others");
  expect_delivery(room, a, "hello\n", {peers[1]});
  step("one leaves, and makes room for the third");
  guests.at(*heard.begin())->leave();
  heard.merge(hear_guests(room, a, 1));
  step("there are descriptors again, though nobody has left");
  room.server().limit_descriptors(100);
  const auto last = hear_guests(room, a, 2);
  heard.insert(last.begin(), last.end());
  expect_equal("guests that A hears", heard.size(), 5);
  expect_delivery(room, *guests.at(*last.begin()), "thanks\n", {&a});
}

namespace {

// The sender of a line that is too long reads why, and then a proper end.
void expect_rejection(Room& room, Peer& talker) {
  room.wait_for_end_of_stream(talker);
  expect(talker.inbox.starts_with("error:") && is_one_line(talker.inbox),
         talker.name() + " reads one line that starts with \"error:\"",
         shown(talker.inbox));
}

}  // namespace

TEST_CASE("the sender of an over-long line is told, then closed properly") {
  StartedRoom room;
  const auto peers = room.join(3);
  const std::size_t before = room.server().descriptors();
  step("A sends a line of 65,537 bytes");
  peers[0]->say("before\n" + std::string(max_line, 'x') + "\nbehind\n");
  room.wait_for_inbox(*peers[1], "before\n");
  room.wait_for_inbox(*peers[2], "before\n");
  expect_rejection(room, *peers[0]);
  step("A, having been told, does not close its side");
  room.wait_for_descriptors(before - 1);
  step("B sends 8 MiB without a newline, and only then reads");
  peers[1]->reads = false;
  peers[1]->say(std::string(8 * mebibyte, 'x'));
  room.wait([&] { return peers[1]->unsent() == 0; },
            "B can send all of it, or is disconnected");
  peers[1]->reads = true;
  expect_rejection(room, *peers[1]);
  peers[1]->leave();
  room.wait_for_descriptors(before - 2);
  step(R"(D joins and says "after\n")");
  expect_delivery(room, room.join(), "after\n", {peers[2]});
}

TEST_CASE("who is given up in the batch in which he speaks harms nobody") {
  StartedRoom room;
  const auto peers = room.join(9);
  Peer& reader = *peers[0];
  Peer& dead = *room.join(1, 4096).front();
  dead.reads = false;
  const std::size_t before = room.server().descriptors();
  // Little enough to be read in one go, so that all of it is in one batch.
  const std::string said = block_of_lines().substr(0, std::size_t{59} << 10);
  for (int round = 0; round < 200; ++round) {
    step("round " + std::to_string(round) +
         ": behind the stopped server's back, 8 clients send 59 KiB, then R,"
         " who never reads, a line, and another one connects");
    room.server().stop();
    for (std::size_t i = 1; i < peers.size(); ++i) peers[i]->say(said);
    dead.say("R\n");
    Peer& newcomer = room.connect();
    newcomer.say("newcomer\n");
    room.server().resume();
    room.wait(
        [&] {
          for (std::size_t i = 1; i < peers.size(); ++i)
            peers[i]->inbox.clear();
          return reader.inbox.size() >= 8 * said.size() &&
                 reader.inbox.find("newcomer\n") != reader.inbox.npos;
        },
        "A gets everybody's lines");
    newcomer.finish();
    room.wait_for_end_of_stream(newcomer);
    room.forget(newcomer);
    reader.inbox.clear();
    if (room.server().descriptors() < before) break;
  }
  step("R is gone");
  room.wait_for_descriptors(before - 1);
  prove_service(room);
}

namespace {

void expect_service_despite(Streams streams, const std::string& description) {
  RoomOptions options = room_options();
  options.streams = streams;
  options.port = free_port();
  Room room(command_for("127.0.0.1:" + std::to_string(options.port)), options);
  step(description + ", clients talk, and 3,000 connect and reset");
  const auto peers = room.join(2);
  // Here a log line that went to a socket would come to light.
  expect_delivery(room, *peers[0], "hello\n", {peers[1]});
  const std::size_t before = room.server().descriptors();
  for (int i = 0; i < 3000; ++i) {
    Peer& guest = room.connect();
    guest.reset();
    room.forget(guest);
  }
  prove_service(room);
  for (Peer* peer : peers) peer->inbox.clear();
  expect_delivery(room, *peers[0], "hello\n", {peers[1]});
  expect_delivery(room, *peers[1], "hello\n", {peers[0]});
  room.wait_for_descriptors(before);
  expect_clean_exit(room, SIGTERM, "SIGTERM");
}

}  // namespace

TEST_CASE("closed standard streams harm nobody") {
  expect_service_despite({false, Stream::closed, Stream::captured},
                         "standard output is closed");
  expect_service_despite({false, Stream::captured, Stream::closed},
                         "standard error is closed");
  // Whatever is opened first gets their numbers.
  expect_service_despite({true, Stream::closed, Stream::closed},
                         "all three standard streams are closed");
}

TEST_CASE("standard streams that nobody reads do not hold it up") {
  expect_service_despite({false, Stream::stuffed, Stream::stuffed},
                         "nobody reads standard output and error");
}

TEST_CASE("standard streams whose reader has gone do not kill it") {
  expect_service_despite({false, Stream::broken, Stream::broken},
                         "the reader of standard output and error has gone");
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 06 and later
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("06+");

TEST_CASE("a client that reads nothing costs little, and is given up in time") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& dead = *room.join(1, 4096).front();
  const std::size_t before = room.server().descriptors();
  const std::size_t memory = room.server().memory("VmRSS");
  step("A sends 64 MiB; B reads, C does not");
  dead.reads = false;
  const auto start = Clock::now();
  send_blocks(room, talker, {&reader}, 64);
  room.wait_for_descriptors(before - 1);
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited > 4s && waited < 15s,
         "C, who takes nothing, is disconnected after 5 seconds",
         "after " + std::to_string(waited.count()) + " s");
  const std::size_t bound = (room.server().sanitized() ? 300 : 40) * mebibyte;
  const std::size_t grown = room.server().memory("VmHWM") - memory;
  expect(grown < bound,
         "at most " + std::to_string(bound / mebibyte) + " MiB more memory",
         std::to_string(grown / mebibyte) + " MiB");
  step("C, who has been disconnected, reads");
  dead.reads = true;
  room.wait_for_end(dead);
  expect(dead.inbox.size() < 64 * mebibyte, "C did not get everything",
         "C got everything");
  step("C is gone");
  expect_delivery(room, talker, "next\n", {&reader});
  expect_delivery(room, reader, "thanks\n", {&talker});
}

TEST_CASE("one who reads slowly, but steadily, loses nothing") {
  constexpr std::size_t blocks = 72;
  constexpr std::size_t total = blocks * mebibyte;
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& slow = *room.join(1, 8192).front();
  step("A sends 72 MiB; B reads, and C 4,000 bytes now and then, for 12 s");
  slow.reads = false;
  BlockReader received(reader);
  BlockReader backlog(slow);
  std::size_t sent = 0;
  const auto go_on = [&] {
    received.take(total);
    backlog.take(total);
    received.expect_not_ended(total);
    backlog.expect_not_ended(total);
    for (; sent < blocks && talker.unsent() == 0; ++sent)
      talker.say(block_of_lines());
  };
  const auto start = Clock::now();
  auto next = start;
  room.wait(
      [&] {
        go_on();
        if (Clock::now() < next) return false;
        next += 50ms;
        slow.portion = 4000;
        slow.reads = true;
        slow.receive();
        slow.reads = false;
        return next - start > 12s;
      },
      "C reads on");
  step("A sends 72 MiB; B reads, and C too, now");
  const int large = mebibyte;
  ::setsockopt(slow.socket(), SOL_SOCKET, SO_RCVBUF, &large, sizeof large);
  slow.portion = 262144;
  slow.reads = true;
  room.wait(
      [&] {
        go_on();
        return backlog.received() == total && received.received() == total;
      },
      "B and C get all 72 MiB");
}

TEST_CASE("lines that had to wait come out once and in order") {
  StartedRoom room;
  const auto peers = room.join(8);
  step("8 clients send 12,000 lines each, and one of them does not read yet");
  const auto sent = make_talk(8, 12'000);
  peers[7]->reads = false;
  for (std::size_t i = 0; i < 8; ++i) peers[i]->say(sent[i]);
  room.watch_for(1s);
  peers[7]->reads = true;
  expect_all_talk(room, peers, sent);
}

TEST_CASE("one who talks without a pause does not silence a large room") {
  StartedRoom room;
  const auto peers = room.join(150);
  step("A sends without a pause to 149 others; now and then B sends a line");
  flood_and_talk(room, peers, mebibyte);
}

TEST_CASE("while the server itself is stopped, no client is late") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& reader = *peers[1];
  Peer& late = *room.join(1, 4096).front();
  const std::size_t before = room.server().descriptors();
  step("A sends 12 MiB; B reads, C does not yet");
  late.reads = false;
  for (int i = 0; i < 12; ++i) peers[0]->say(block_of_lines());
  room.watch_for(1s);
  step("the server is stopped for 7 seconds, and continued");
  room.server().stop();
  room.watch_for(7s);
  room.server().resume();
  room.watch_for(1s);
  expect_equal("descriptors, with C's among them", room.server().descriptors(),
               before);
  step("C reads");
  late.reads = true;
  BlockReader received(reader);
  BlockReader backlog(late);
  room.wait(
      [&] {
        received.take(12 * mebibyte);
        backlog.take(12 * mebibyte);
        received.expect_not_ended(12 * mebibyte);
        backlog.expect_not_ended(12 * mebibyte);
        return received.received() + backlog.received() == 24 * mebibyte;
      },
      "B and C get all 12 MiB");
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 07 and later
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("07+");

TEST_CASE("a server with nothing to do sleeps") {
  StartedRoom room;
  const auto peers = room.join(3);
  expect_delivery(room, *peers[0], "hello\n", {peers[1], peers[2]});
  room.watch_for(200ms);
  step("three clients are connected and silent for 3 seconds");
  const std::size_t before = room.server().sleeps();
  room.watch_for(3s);
  const std::size_t sleeps = room.server().sleeps() - before;
  // One for what it may have to say of what happened before.
  expect(sleeps <= 1, "it is not woken", std::to_string(sleeps) + " times");
}

namespace {

// Leaves one client with 4 MiB or so that the server still has for it.
void leave_backlog(Room& room, const std::vector<Peer*>& peers, Peer& late) {
  step("A sends 7 MiB; B reads, C does not yet");
  late.reads = false;
  send_blocks(room, *peers[0], {peers[1]}, 7);
}

}  // namespace

TEST_CASE("asked to stop, it sends what is queued, then ends") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096).front();
  leave_backlog(room, peers, late);
  step("SIGTERM is sent, and A and C say something more");
  room.server().signal(SIGTERM);
  room.watch_for(300ms);
  // Unread, it must not make a reset out of the end of C's stream.
  for (Peer* peer : {peers[0], &late}) peer->say("too late\n");
  room.watch_for(200ms);
  step("C reads");
  late.reads = true;
  BlockReader backlog(late);
  room.wait_for_exit("it ends, and so do all connections");
  backlog.take(7 * mebibyte);
  expect_equal("bytes that C gets", backlog.received(), 7 * mebibyte);
  for (Peer* peer : {peers[0], peers[1], &late}) {
    room.expect_end_of_stream(*peer);
    expect(peer->inbox.empty(), peer->name() + " has nothing more",
           shown(peer->inbox));
  }
  expect(room.server().exited_with(0), "exit code 0", room.server().fate());
}

TEST_CASE("asked to stop, it waits no longer than five seconds") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096).front();
  leave_backlog(room, peers, late);
  const auto start = Clock::now();
  expect_clean_exit(room, SIGTERM, "SIGTERM, though C never reads");
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited > 3s && waited < 8s, "it ends after 5 seconds",
         "after " + std::to_string(waited.count()) + " s");
}

TEST_CASE("asked to stop, it does not wait for who is gone") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096).front();
  leave_backlog(room, peers, late);
  step("send SIGTERM; then C, who has a backlog, resets its connection");
  room.server().signal(SIGTERM);
  room.watch_for(300ms);
  const auto start = Clock::now();
  late.reset();
  room.wait_for_exit("it ends");
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited < 3s, "it ends at once",
         "after " + std::to_string(waited.count()) + " s");
  expect(room.server().exited_with(0), "exit code 0", room.server().fate());
}

TEST_CASE("asked to stop twice, it ends at once") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096).front();
  leave_backlog(room, peers, late);
  step("send SIGTERM");
  room.server().signal(SIGTERM);
  room.watch_for(300ms);
  const auto start = Clock::now();
  expect_clean_exit(room, SIGINT, "SIGINT");
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited < 2s, "it ends at once",
         "after " + std::to_string(waited.count()) + " s");
}

TEST_CASE("asked to stop, it accepts nobody") {
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& late = *room.join(1, 4096).front();
  leave_backlog(room, peers, late);
  step("send SIGTERM, and connect");
  room.server().signal(SIGTERM);
  room.watch_for(300ms);
  const Descriptor socket{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const Address address = ipv4_loopback(room.port());
  expect(::connect(socket.get(), address.data(), address.size) != 0,
         "nobody listens any more", "a new client can connect");
}

TEST_CASE("who says nothing for too long is disconnected") {
  StartedRoom room(idle_timeout(2));
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& silent = *peers[1];
  step("the idle time-out is 2 s; A says a line every 300 ms, B nothing");
  const auto start = Clock::now();
  auto next = start;
  room.wait(
      [&] {
        if (Clock::now() >= next) {
          talker.say("I am here\n");
          next += 300ms;
        }
        return silent.ended();
      },
      "B is disconnected");
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited > 1s && waited < 6s, "B is disconnected after 2 s",
         "after " + std::to_string(waited.count()) + " s");
  room.expect_end_of_stream(silent);
  expect(!talker.ended(), "A stays connected", room.describe_peer(talker));
  step("then A says nothing any more");
  room.wait_for_end_of_stream(talker);
}

TEST_CASE("a line on standard error tells now and then how it goes") {
  if (subject.is_rat()) return skip("rat has --stats");
  StartedRoom room;
  const auto peers = room.join(2);
  expect_delivery(room, *peers[0], "hello\n", {peers[1]});
  step("two clients have talked; they are silent for 10 seconds");
  room.wait([&] { return !room.server().error().empty(); },
            "a line on standard error, every 10 seconds or so");
  room.watch_for(1s);
  expect(is_one_line(room.server().error()), "one line on standard error",
         shown(room.server().error()));
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// 08 and later
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("08+");

namespace {

// How much memory it takes that so many clients are 5 MiB behind.
std::size_t memory_for_late_clients(std::size_t count) {
  constexpr std::size_t blocks = 5;
  StartedRoom room;
  const auto peers = room.join(2);
  const auto late = room.join(count, 4096, 1000);
  const std::size_t before = room.server().memory("VmRSS");
  step("A sends 5 MiB; B reads, " + std::to_string(count) + " others do not");
  for (Peer* peer : late) peer->reads = false;
  const auto start = Clock::now();
  send_blocks(room, *peers[0], {peers[1]}, blocks);
  const std::chrono::duration<double> waited = Clock::now() - start;
  expect(waited < 4s, "so few bytes hold nobody up",
         "B had them after " + std::to_string(waited.count()) + " s");
  const std::size_t after = room.server().memory("VmRSS");
  step("... who read now");
  std::vector<BlockReader> backlogs;
  for (Peer* peer : late) {
    peer->reads = true;
    backlogs.emplace_back(*peer);
  }
  room.wait(
      [&] {
        std::size_t least = SIZE_MAX;
        for (BlockReader& backlog : backlogs) {
          backlog.take(blocks * mebibyte);
          backlog.expect_not_ended(blocks * mebibyte);
          least = std::min(least, backlog.received());
        }
        return least == blocks * mebibyte;
      },
      "all get all 5 MiB");
  return after - std::min(before, after);
}

}  // namespace

TEST_CASE("who half-closes is sent what was said before, and no more") {
  constexpr std::size_t blocks = 5;
  StartedRoom room;
  const auto peers = room.join(2);
  Peer& talker = *peers[0];
  Peer& reader = *peers[1];
  Peer& late = *room.join(1, 4096, 1000).front();
  step("A sends 5 MiB, which C does not read; C half-closes, A talks on");
  late.reads = false;
  send_blocks(room, talker, {&reader}, blocks);
  late.say("bye");
  late.finish();
  room.wait_for_inbox(reader, "bye\n");
  room.wait_for_inbox(talker, "bye\n");
  expect_delivery(room, talker, "after\n", {&reader});
  step("C, who has half-closed, reads");
  late.reads = true;
  room.wait_for_end_of_stream(late);
  BlockReader backlog(late);
  backlog.take(blocks * mebibyte);
  expect_equal("bytes that C gets", backlog.received(), blocks * mebibyte);
  expect(late.inbox.empty(), "C has nothing more", shown(late.inbox));
}

TEST_CASE("200 who are behind cost no more memory than 10") {
  const std::size_t few = memory_for_late_clients(10);
  const std::size_t many = memory_for_late_clients(200);
  expect(many < few + 8 * mebibyte,
         "about as much memory as for 10, " + std::to_string(few / mebibyte) +
             " MiB",
         std::to_string(many / mebibyte) + " MiB");
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// rat
// ---------------------------------------------------------------------------

TEST_SUITE_BEGIN("rat");

TEST_CASE("a bad option is refused in one line and by exit code 2") {
  for (const Command& bad : std::vector<Command>{{"--port", "99999"},
                                                 {"--port", "x"},
                                                 {"--port", ""},
                                                 {"--port"},
                                                 {"--port=-1"},
                                                 {"--host", "nonsense"},
                                                 {"--host"},
                                                 {"--unknown"},
                                                 {"--max-line", "0"},
                                                 {"--max-line=-5"},
                                                 {"--max-line", "abc"},
                                                 {"--max-line", "-5"},
                                                 {"stray"},
                                                 {"--echo=1"},
                                                 {""}})
    expect_refusal(command_with(bad), 2);
}

TEST_CASE("--help and --version print on standard output") {
  for (const char* option : {"--help", "--version"}) {
    step("run it with " + std::string(option));
    Process process(command_with({option}));
    process.wait_for_exit("it ends");
    expect(process.exited_with(0), "exit code 0", process.fate());
    expect(process.output().ends_with('\n'), "lines on standard output",
           shown(process.output()));
    expect(process.error().empty(), "nothing on standard error",
           shown(process.error()));
  }
}

TEST_CASE("--echo sends a line to its sender, too") {
  RoomOptions options = room_options();
  options.echoes = true;
  Room room(command_with({"--echo"}), options);
  const auto peers = room.join(3);
  Peer& a = *peers[0];
  Peer& b = *peers[1];
  Peer& c = *peers[2];
  step(R"(with --echo, A says "from a\n", then B "from b\n")");
  expect_delivery(room, a, "from a\n", {&a, &b, &c});
  expect_delivery(room, b, "from b\n", {&a, &b, &c});
}

TEST_CASE("--max-line sets the longest line, its newline included") {
  for (const Command& option :
       std::vector<Command>{{"--max-line", "100"}, {"--max-line=100"}}) {
    StartedRoom room(option);
    const auto peers = room.join(3);
    step("with --max-line 100, A sends a line of 100 bytes");
    expect_delivery(room, *peers[0], std::string(99, 'x') + '\n',
                    {peers[1], peers[2]});
    step(R"(A sends "before\n", a line of 101 bytes and "behind\n")");
    peers[0]->say("before\n" + std::string(100, 'x') + "\nbehind\n");
    room.wait_for_inbox(*peers[1], "before\n");
    room.wait_for_inbox(*peers[2], "before\n");
    expect_rejection(room, *peers[0]);
    step(R"(then B sends "after\n")");
    expect_delivery(room, *peers[1], "after\n", {peers[2]});
  }
}

namespace {

// Something of every kind that is worth a line in a log.
void have_eventful_life(Room& room) {
  const auto peers = room.join(4);
  const std::size_t before = room.server().descriptors();
  step("clients join, talk, reset, half-close and send an over-long line");
  peers[0]->say(std::string(max_line, 'x') + '\n');
  room.wait_for_end(*peers[0]);
  peers[1]->reset();
  peers[2]->finish();
  room.wait_for_end_of_stream(*peers[2]);
  peers[0]->leave();
  room.wait_for_descriptors(before - 3);
  prove_service(room);
}

}  // namespace

TEST_CASE("it logs to standard error, and with --quiet not at all") {
  StartedRoom talking;
  have_eventful_life(talking);
  expect_clean_exit(talking, SIGTERM, "SIGTERM");
  const auto logged = std::ranges::count(talking.server().error(), '\n');
  expect(logged >= 8, "a line on standard error for each event, 8 or more",
         std::to_string(logged));
  expect(talking.output().empty(), "nothing more on standard output",
         shown(talking.output()));
  StartedRoom quiet({"--quiet"});
  have_eventful_life(quiet);
  expect_clean_exit(quiet, SIGTERM, "SIGTERM");
  expect(quiet.server().error().empty(), "with --quiet, no log",
         shown(quiet.server().error()));
}

TEST_SUITE_END();

// ---------------------------------------------------------------------------
// The report, and main
// ---------------------------------------------------------------------------

namespace {

bool nothing_was_checked = false;

// One line for each check; what a failed one did, expected and got.
class Report : public doctest::IReporter {
 public:
  explicit Report(const doctest::ContextOptions& options)
      : out_(*options.cout) {}

  void test_case_start(const doctest::TestCaseData& data) override {
    name_ = data.m_name;
    details_.clear();
    current_step().clear();
    skip_reason.clear();
  }

  void test_case_exception(const doctest::TestCaseException& e) override {
    add_details(e.error_string.c_str());
  }

  void log_assert(const doctest::AssertData& data) override {
    if (data.m_failed) add_details(data.m_expr);
  }

  void log_message(const doctest::MessageData& data) override {
    if (data.m_string.size() > 0) add_details(data.m_string.c_str());
  }

  void test_case_end(const doctest::CurrentTestCaseStats& stats) override {
    const bool passed = stats.failure_flags == 0;
    const bool skipped = passed && !skip_reason.empty();
    if (skipped) add_details(skip_reason);
    skips_ += skipped ? 1 : 0;
    out_ << (skipped  ? "skip  "
             : passed ? "ok    "
                      : "FAIL  ")
         << name_ << '\n'
         << details_ << std::flush;
  }

  void test_run_end(const doctest::TestRunStats& stats) override {
    const unsigned ran = stats.numTestCasesPassingFilters;
    out_ << ran - stats.numTestCasesFailed - skips_ << " passed, "
         << stats.numTestCasesFailed << " failed";
    if (skips_ > 0) out_ << ", " << skips_ << " skipped";
    out_ << std::endl;
    nothing_was_checked = ran == 0;
  }

  void report_query(const doctest::QueryData& query) override {
    for (unsigned i = 0; i < query.num_data; ++i)
      out_ << query.data[i]->m_name << '\n';
  }

  void test_run_start() override {}
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}

 private:
  void add_details(std::string_view text) {
    for (const std::string_view line : lines_of(text))
      details_ += "        " + std::string(line);
    if (!details_.ends_with('\n')) details_ += '\n';
  }

  std::ostream& out_;
  std::string name_;
  std::string details_;
  unsigned skips_ = 0;
};

REGISTER_REPORTER("check", 0, Report);

REGISTER_EXCEPTION_TRANSLATOR(const Failure& failure) {
  const std::string text = failure_text(failure);
  return {text.c_str()};
}

// The suites that a milestone has to pass.
const std::map<std::string, std::string> suites = {
    {"01", "all,address,01"},
    {"02", "all,address,02-03,02"},
    {"03", "all,address,02-03,03"},
    {"04", "all,address,04+,04-05"},
    {"05", "all,address,04+,04-05,05+"},
    {"06", "all,address,04+,05+,06+"},
    {"07", "all,address,04+,05+,06+,07+"},
    {"08", "all,address,04+,05+,06+,07+,08+"},
    {"09", "all,address,04+,05+,06+,07+,08+"},
    {"rat", "all,04+,05+,06+,07+,08+,rat"},
};

// Fills in what to check; returns how many arguments are doctest's.
int parse_command_line(std::span<char*> arguments) {
  const auto dashes = std::ranges::find(arguments, std::string_view("--"));
  const auto before = static_cast<std::size_t>(dashes - arguments.begin());
  if (dashes == arguments.end() || dashes + 1 == arguments.end() || before < 2)
    return -1;
  subject.milestone = arguments[before - 1];
  subject.command.assign(dashes + 1, arguments.end());
  for (const char* option : arguments.subspan(1, before - 2)) {
    if (option[0] != '-') return -1;
  }
  return suites.contains(subject.milestone) ? static_cast<int>(before) - 1 : -1;
}

}  // namespace

int main(int argc, char** argv) {
  const int options =
      parse_command_line({argv, static_cast<std::size_t>(argc)});
  if (options < 0) {
    std::cerr << "usage: check [DOCTEST-OPTION...] NN -- PROGRAM [ARGUMENT...]"
                 ", where NN is 01 to 09 or rat\n";
    return 2;
  }
  const std::string& program = subject.command.front();
  if (program.find('/') != program.npos &&
      ::access(program.c_str(), X_OK) != 0) {
    std::cerr << "check: cannot run " << program << ": " << std::strerror(errno)
              << '\n';
    return 2;
  }
  raise_descriptor_limit(4096);
  doctest::Context context;
  context.setOption("reporters", "check");
  context.applyCommandLine(options, argv);
  context.addFilter("test-suite", suites.at(subject.milestone).c_str());
  const int result = context.run();
  if (context.shouldExit()) return result;
  if (nothing_was_checked) {
    std::cerr << "check: no check of chapter " << subject.milestone
              << " has such a name\n";
    return 2;
  }
  return result;
}
