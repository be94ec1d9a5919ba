// Servers with several event loops, watched by ThreadSanitizer: 1,000 clients
// on four threads, and what the loops do to each other at their limits and at
// the end.
#include <doctest/doctest.h>

#include "rat.hpp"

// CMake says where it is, if it can be built.
#ifndef EDGEWISE_LOOPS
  #define EDGEWISE_LOOPS ""
#endif

using namespace peers;

namespace {

const bool loops_are_built = std::string_view(EDGEWISE_LOOPS) != "";

class LoopsRoom : public Room {
 public:
  LoopsRoom() : Room({EDGEWISE_LOOPS, "127.0.0.1:0", "600", "4"}, options()) {}

  ~LoopsRoom() {
    INFO(server().error());
    CHECK(server().error().find("ThreadSanitizer") == std::string::npos);
  }

 private:
  static RoomOptions options() {
    RoomOptions options = broadcasting();
    options.many_loops = true;
    return options;
  }
};

void expect_crowd_is_satisfied(Room& room, const Command& load) {
  Command command{EDGEWISE_CROWD, "--port", std::to_string(room.port()),
                  "--patience",   "20",     "--quiet"};
  command.insert(command.end(), load.begin(), load.end());
  step("crowd: " + load[1] + " clients");
  Process crowd(command);
  room.accompany(&crowd);
  room.wait([&] { return !crowd.running(); }, "crowd ends");
  room.accompany(nullptr);
  INFO(crowd.output(), crowd.error());
  CHECK(crowd.exited_with(0));
}

}  // namespace

TEST_SUITE_BEGIN("loops" * doctest::skip(!loops_are_built));

TEST_CASE("1,000 clients of four loops hear each line once, in order") {
  raise_descriptor_limit(2'000);
  LoopsRoom room;
  expect_crowd_is_satisfied(
      room, {"--clients", "1000", "--senders", "100", "--lines", "20"});
  room.wait_for_descriptors(room.idle_descriptors());
  end_decently(room);
}

TEST_CASE("more than the mailboxes hold is waited for, and nothing is lost") {
  LoopsRoom room;
  expect_crowd_is_satisfied(
      room, {"--clients", "24", "--senders", "8", "--lines", "2000", "--size",
             "4096", "--window", "512"});
  end_decently(room);
}

TEST_CASE(
    "who takes nothing in one loop stops all for a while, and is dropped") {
  LoopsRoom room;
  const auto peers = room.join(8);
  Peer& dead = *room.join(1, 4096, 1000).front();
  dead.reads = false;
  const std::size_t descriptors = room.server().descriptors();
  const std::vector<Peer*> readers(peers.begin() + 1, peers.end());
  step("A sends 24 MiB; seven read all of it, and one nothing");
  send_blocks(room, *peers[0], readers, 24);
  room.wait_for_descriptors(descriptors - 1);
  expect_delivery(room, *peers[0], "without him\n", readers);
  end_decently(room);
}

TEST_CASE("asked to stop, it brings what was said to all loops, then ends") {
  constexpr std::size_t blocks = 6;
  LoopsRoom room;
  const auto peers = room.join(8);
  step("A sends 6 MiB, which only B reads; then SIGTERM");
  const std::vector<Peer*> late(peers.begin() + 2, peers.end());
  for (Peer* peer : late) peer->reads = false;
  send_blocks(room, *peers[0], {peers[1]}, blocks);
  room.server().signal(SIGTERM);
  room.watch_for(200ms);
  for (Peer* peer : late) peer->reads = true;
  room.wait_for_exit("it ends");
  CHECK(room.server().exited_with(0));
  for (Peer* peer : late) {
    BlockReader backlog(*peer);
    backlog.take(blocks * mebibyte);
    CHECK(backlog.received() == blocks * mebibyte);
    room.expect_end_of_stream(*peer);
  }
}

TEST_CASE("the port of a running server is busy, however many share it") {
  LoopsRoom room;
  const std::string answer = refusal(
      {EDGEWISE_LOOPS, "127.0.0.1:" + std::to_string(room.port()), "600", "4"},
      1);
  CHECK(answer.find("Address already in use") != std::string::npos);
  end_decently(room);
}

TEST_SUITE_END();
