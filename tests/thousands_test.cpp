// rat with ten thousand clients.
#include <doctest/doctest.h>

#include "rat.hpp"

using namespace peers;

namespace {

// Ten thousand, or as many as this machine has descriptors for.
std::size_t most_clients() {
  constexpr std::size_t wanted = 10'000;
  constexpr std::size_t others = 100;
  const auto limit =
      static_cast<std::size_t>(raise_descriptor_limit(wanted + others));
  if (limit >= wanted + others) return wanted;
  MESSAGE("with ", limit - others, " clients, for lack of descriptors");
  return limit - others;
}

}  // namespace

TEST_SUITE_BEGIN("thousands" * doctest::skip(!rat_is_built));

TEST_CASE("all hear all that four of them say") {
  const std::size_t count = most_clients();
  Room room({EDGEWISE_RAT, "--port", "0", "--quiet"}, broadcasting());
  step("crowd connects " + std::to_string(count) + " clients");
  Process crowd({EDGEWISE_CROWD, "--port", std::to_string(room.port()),
                 "--clients", std::to_string(count), "--senders", "4",
                 "--seconds", "2", "--patience", "20"});
  crowd.wait_for_exit("crowd ends");
  INFO(crowd.output(), crowd.error());
  CHECK(crowd.exited_with(0));
  room.wait_for_descriptors(room.idle_descriptors());
}

TEST_CASE("idle, each costs at most 128 bytes, and no processor time") {
  const std::size_t count = most_clients();
  Room room({EDGEWISE_RAT_PLAIN, "--port", "0", "--quiet"}, broadcasting());
  REQUIRE_FALSE(room.server().sanitized());
  room.join(2);
  const std::size_t before = room.server().memory("VmRSS");
  step(std::to_string(count) + " clients connect and hear one line");
  room.join(count - 2);
  const std::size_t taken = room.server().memory("VmRSS") - before;
  const double each = static_cast<double>(taken) / static_cast<double>(count);
  MESSAGE(each, " bytes of resident memory for each");
  CHECK(each <= 128);
  step("nobody says anything for two seconds");
  const auto busy = room.server().cpu_time();
  const std::size_t sleeps = room.server().sleeps();
  room.watch_for(2s);
  CHECK((room.server().cpu_time() - busy).count() < 0.1);
  CHECK(room.server().sleeps() - sleeps <= 1);
  step("all reset");
  const std::size_t one_each = room.server().descriptors() - count;
  room.reset_all();
  room.wait_for_descriptors(one_each);
}

TEST_SUITE_END();
