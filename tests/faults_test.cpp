// rat while system calls fail: what tests/faults.cpp makes of its kernel. Not a
// line may be lost, and it may not be kept busy by what will pass.
#include <doctest/doctest.h>

#include "rat.hpp"

using namespace peers;

namespace {

Command faulty_rat(const std::string& faults, const Command& options = {}) {
  Command command{EDGEWISE_RAT, "--port", "0", "--stall-timeout", "20"};
  command.insert(command.end(), options.begin(), options.end());
  return with_faults(faults, command);
}

class FaultyRoom : public Room {
 public:
  explicit FaultyRoom(const std::string& faults, const Command& options = {})
      : Room(faulty_rat(faults, options), broadcasting()) {}

  // Nothing is left of it: not a descriptor, and no reason to wake up.
  void expect_quiet_end(std::size_t descriptors) {
    wait_for_descriptors(descriptors);
    watch_for(200ms);
    step("nobody says anything for a second");
    const auto busy = server().cpu_time();
    const std::size_t sleeps = server().sleeps();
    watch_for(1s);
    expect((server().cpu_time() - busy).count() < 0.3,
           "next to no processor time", "it is busy");
    expect(server().sleeps() - sleeps < 30, "it sleeps",
           std::to_string(server().sleeps() - sleeps) + " wake-ups");
    end_decently(*this);
  }
};

// Eight talk at once, one half-closes with half a line, one resets.
void expect_all_is_well(const std::string& faults, const Command& options = {},
                        std::size_t lines_each = 500) {
  FaultyRoom room(faults, options);
  const std::size_t before = room.server().descriptors();
  const auto peers = room.join(8);
  step("8 clients send " + std::to_string(lines_each) +
       " lines each, and the calls fail: " + faults);
  const auto sent = make_talk(8, lines_each);
  for (std::size_t i = 0; i < 8; ++i) peers[i]->say(sent[i]);
  expect_all_talk(room, peers, sent);
  for (Peer* peer : peers) peer->inbox.clear();
  step("one half-closes after half a line");
  peers[7]->say("half a line");
  peers[7]->finish();
  for (std::size_t i = 0; i < 7; ++i)
    room.wait_for_inbox(*peers[i], "half a line\n");
  room.wait_for_end_of_stream(*peers[7]);
  step("one resets after a line and a half");
  peers[6]->say("whole\nhalf");
  for (std::size_t i = 0; i < 6; ++i) room.wait_for_inbox(*peers[i], "whole\n");
  peers[6]->reset();
  step("the others leave");
  for (std::size_t i = 0; i < 6; ++i) {
    expect(peers[i]->inbox.empty(), "half a line is thrown away",
           shown(peers[i]->inbox));
    peers[i]->leave();
  }
  room.expect_quiet_end(before);
}

}  // namespace

TEST_SUITE_BEGIN("faults" * doctest::skip(!rat_is_built));

// With an error that rat can do nothing about, to see that it meets it at all.
TEST_CASE("the library makes calls fail") {
  for (const std::string call : {"recv", "accept"}) {
    FaultyRoom room(call + ":ENOSPC=100");
    step("with all calls of " + call + " failing, A says something to B");
    room.connect().say("hello\n");
    room.connect().say("hello\n");
    room.wait(
        [&] {
          return room.server().error().find("No space left on device") !=
                 std::string::npos;
        },
        "the error is in its log");
  }
  FaultyRoom deaf("send:ENOSPC=100");
  step("with all sends failing, A says something to B, who half-closes");
  Peer& a = deaf.connect();
  Peer& b = deaf.connect();
  a.say("hello\n");
  a.finish();
  b.finish();
  deaf.wait_for_end(a);
  deaf.wait_for_end(b);
  CHECK(b.inbox.empty());
  step("start it with all waits failing");
  Process process(faulty_rat("wait:EMFILE=100"));
  process.wait_for_exit("it ends");
  CHECK(process.exited_with(1));
}

TEST_CASE("parts of what was asked for") {
  expect_all_is_well("recv:short=60,send:short=60", {}, 200);
}

TEST_CASE("interrupted calls") {
  expect_all_is_well(
      "recv:EINTR=30,send:EINTR=30,accept:EINTR=50,wait:EINTR=30");
}

TEST_CASE("events for which there is nothing") {
  expect_all_is_well("recv:EAGAIN=40,send:EAGAIN=40,accept:EAGAIN=30");
}

TEST_CASE("no memory in the kernel, now and then") {
  expect_all_is_well("recv:ENOMEM=20,send:ENOBUFS=30,send:ENOMEM=10");
}

TEST_CASE(
    "clients that are gone before they are accepted, and no descriptors") {
  expect_all_is_well(
      "accept:ECONNABORTED=40,accept:EMFILE=20,accept:ENOMEM=10");
}

TEST_CASE("all of it, with a log that is always full") {
  expect_all_is_well(
      "recv:short=30,recv:EAGAIN=10,recv:EINTR=10,send:short=30,"
      "send:EAGAIN=10,send:ENOBUFS=10,send:EINTR=10,wait:EINTR=10",
      {"--high-water", "500", "--max-backlog", "2000", "--max-line", "400"},
      150);
}

TEST_CASE("who cannot be watched is told so, and nobody else is harmed") {
  FaultyRoom room("watch:ENOSPC=60", {});
  const std::size_t before = room.server().descriptors();
  std::vector<Peer*> stayed;
  std::size_t refused = 0;
  step("forty come, one by one");
  for (int i = 0; i < 40; ++i) {
    Peer& peer = room.connect();
    // The first who is let in only listens, and hears who else is.
    const std::string greeting = stayed.empty() ? "" : "hello\n";
    const std::string address = ':' + std::to_string(peer.port()) + '\n';
    peer.say(greeting);
    room.wait(
        [&] {
          const bool is_in = stayed.empty()
                                 ? room.server().error().ends_with(address)
                                 : stayed[0]->inbox == greeting;
          return peer.ended() || is_in;
        },
        "it is let in, or told that it is not");
    if (peer.ended()) {
      CHECK(peer.inbox == "error: server full\n");
      ++refused;
      room.forget(peer);
      continue;
    }
    for (Peer* other : stayed) room.wait_for_inbox(*other, greeting);
    stayed.push_back(&peer);
  }
  CHECK(refused > 10);
  CHECK(stayed.size() > 5);
  for (Peer* peer : stayed) peer->leave();
  room.expect_quiet_end(before);
}

TEST_SUITE_END();
