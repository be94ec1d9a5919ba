// WriteBuffer: nothing lost, nothing twice, nothing beyond its bound.
#include <doctest/doctest.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "allocation_count.hpp"
#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace spy {
int sends = 0;
}  // namespace spy

// Counts how often the kernel is asked to send.
extern "C" ::ssize_t send(int socket, const void* bytes, std::size_t count,
                          int flags) {
  using Function = ::ssize_t(int, const void*, std::size_t, int);
  static auto* const real = next_definition<Function>("send");
  ++spy::sends;
  return real(socket, bytes, count, flags);
}

namespace {

using Random = std::mt19937;

std::size_t up_to(Random& random, std::size_t most) {
  return std::uniform_int_distribution<std::size_t>{0, most}(random);
}

// Bytes that tell their place, so that a lost or swapped one shows.
std::string next_bytes(std::size_t count, unsigned& place) {
  std::string text(count, '\0');
  for (char& byte : text) byte = static_cast<char>(place++ * 2654435761U >> 24);
  return text;
}

// Reads up to `most` bytes onto the end of a text.
void receive_up_to(FdView fd, std::size_t most, std::string& all) {
  std::string room(most, '\0');
  const IoResult result = read(fd, room);
  all.append(room, 0, result.bytes);
}

// Appends, flushes and reads random amounts. False if anything differs, in the
// end, from what was appended.
bool arrives_in_order(const Ends& ends, Random& random, std::size_t largest) {
  WriteBuffer buffer;
  std::string sent;
  std::string received;
  unsigned place = 0;
  for (int turn = 0; turn < 150; ++turn) {
    for (std::size_t count = up_to(random, 3); count > 0; --count) {
      const std::string text = next_bytes(up_to(random, largest), place);
      if (!buffer.append(text)) return false;
      sent += text;
    }
    const std::size_t before = buffer.size();
    const IoResult result = buffer.flush(ends.near);
    if (result.ended() || result.bytes != before - buffer.size()) return false;
    if (result.ok() != buffer.empty()) return false;
    receive_up_to(ends.far, 1 + up_to(random, 3 * largest), received);
  }
  while (received.size() < sent.size()) {
    if (buffer.flush(ends.near).failed()) return false;
    if (!becomes_readable(ends.far)) return false;
    receive_up_to(ends.far, 65536, received);
  }
  return buffer.empty() && received == sent;
}

// A buffer with more in it than the socket takes, partly sent. Returns how much
// was sent.
std::size_t overfill(WriteBuffer& buffer, FdView fd, std::string_view text) {
  REQUIRE(buffer.append(text));
  const IoResult result = buffer.flush(fd);
  REQUIRE(result.would_block());
  REQUIRE(result.bytes > 0);
  return result.bytes;
}

const std::string megabyte(std::size_t{1} << 20, 'x');

}  // namespace

// ---------------------------------------------------------------------------
// Sending
// ---------------------------------------------------------------------------

TEST_CASE("what is appended is sent by flush, in order, and not before") {
  const auto ends = make_socketpair();
  WriteBuffer buffer;
  CHECK(buffer.empty());
  CHECK(buffer.append("one "));
  CHECK(buffer.append("two "));
  CHECK(buffer.append("three"));
  CHECK(buffer.size() == 13);
  CHECK_FALSE(buffer.empty());
  CHECK(receive_some(ends.far).empty());
  const IoResult result = buffer.flush(ends.near);
  CHECK(result.ok());
  CHECK(result.bytes == 13);
  CHECK(buffer.empty());
  CHECK(buffer.size() == 0);
  CHECK(receive_some(ends.far) == "one two three");
}

TEST_CASE(
    "all that is queued is sent by one system call, and nothing by none") {
  const auto ends = make_socketpair();
  WriteBuffer buffer;
  for (int count = 0; count < 100; ++count) REQUIRE(buffer.append("line\n"));
  spy::sends = 0;
  CHECK(buffer.flush(ends.near).bytes == 500);
  CHECK(spy::sends == 1);
  CHECK(buffer.flush(ends.near).ok());
  CHECK(buffer.append(""));
  CHECK(buffer.empty());
  const IoResult nothing = buffer.flush(FdView{-1});
  CHECK(nothing.ok());
  CHECK(nothing.bytes == 0);
  CHECK(spy::sends == 1);
}

TEST_CASE("a pipe takes it as well") {
  const auto ends = make_pipe();
  WriteBuffer buffer;
  REQUIRE(buffer.append("through a pipe"));
  CHECK(buffer.flush(ends.near).ok());
  CHECK(receive_some(ends.far) == "through a pipe");
}

TEST_CASE(
    "P24 random appends through a slow reader: every byte arrives, once, "
    "in order") {
  Random random{20240608};
  for (const std::size_t largest : {20U, 3000U, 30'000U}) {
    CAPTURE(largest);
    const auto pair = make_socketpair();
    set_buffer(pair.near, SO_SNDBUF, 4096);
    CHECK(arrives_in_order(pair, random, largest));
    CHECK(arrives_in_order(make_tcp(16384, 16384), random, largest));
    CHECK(arrives_in_order(make_pipe(), random, largest));
  }
}

TEST_CASE(
    "P24 a flush that sends a part is one system call, would block, and "
    "says how much it was") {
  const auto ends = make_tcp(16384, 16384);
  WriteBuffer buffer;
  REQUIRE(buffer.append(megabyte));
  spy::sends = 0;
  const IoResult result = buffer.flush(ends.near);
  CHECK(spy::sends == 1);
  CHECK(result.would_block());
  CHECK(result.bytes > 0);
  CHECK(result.bytes + buffer.size() == megabyte.size());
}

TEST_CASE(
    "P24 the kernel says when there is room after a partial flush, to an "
    "edge-triggered poller too") {
  for (const Ends& ends :
       std::array{make_tcp(16384, 16384), make_socketpair(), make_pipe()}) {
    Poller poller;
    poller.add(ends.near, Token{1}, Interest::writable, Mode::edge);
    CHECK(poller.wait(patience).size() == 1);
    WriteBuffer buffer;
    REQUIRE(buffer.append(megabyte));
    std::size_t received = 0;
    while (buffer.flush(ends.near).would_block()) {
      while (poller.wait(0ms).empty()) {
        REQUIRE(becomes_readable(ends.far));
        received += receive_some(ends.far).size();
      }
    }
    while (received < megabyte.size() && becomes_readable(ends.far))
      received += receive_some(ends.far).size();
    CHECK(received == megabyte.size());
  }
}

TEST_CASE("P24 a partly sent buffer takes more, and goes on where it stopped") {
  const auto ends = make_tcp(16384, 16384);
  unsigned place = 0;
  std::string sent = next_bytes(300'000, place);
  WriteBuffer buffer;
  const std::size_t first = overfill(buffer, ends.near, sent);
  CHECK(buffer.size() == sent.size() - first);
  const std::string more = next_bytes(300'000, place);
  CHECK(buffer.append(more));
  CHECK(buffer.size() == sent.size() - first + more.size());
  sent += more;
  std::string received;
  while (received.size() < sent.size() && becomes_readable(ends.far)) {
    receive_up_to(ends.far, 50'000, received);
    static_cast<void>(buffer.flush(ends.near).ok());
  }
  CHECK(received == sent);
  CHECK(buffer.flush(ends.near).ok());
}

TEST_CASE("a full socket: flush would block, and nothing is lost") {
  const auto ends = make_tcp(16384, 16384);
  WriteBuffer buffer;
  const std::size_t sent = overfill(buffer, ends.near, megabyte);
  const std::size_t left = buffer.size();
  CHECK(left == megabyte.size() - sent);
  const IoResult result = buffer.flush(ends.near);
  CHECK(result.would_block());
  CHECK(result.bytes + buffer.size() == left);
  CHECK(result.error == 0);
}

TEST_CASE(
    "P13 flush to a peer that is gone is failed, as often as it is tried, "
    "and keeps the bytes") {
  auto ends = make_tcp();
  WriteBuffer buffer;
  REQUIRE(buffer.append("nobody reads this"));
  reset_connection(ends.far);
  REQUIRE(becomes(ends.near, POLLHUP));
  IoResult result = buffer.flush(ends.near);
  CHECK(result.failed());
  CHECK((result.error == ECONNRESET || result.error == EPIPE));
  for (int turn = 0; turn < 2; ++turn) {
    result = buffer.flush(ends.near);
    CHECK(result.failed());
    CHECK(result.error == EPIPE);
    CHECK(result.bytes == 0);
    CHECK(buffer.size() == 17);
  }
  CHECK(buffer.append("more"));
}

// ---------------------------------------------------------------------------
// Limits
// ---------------------------------------------------------------------------

TEST_CASE("the bound is kept: all is queued or nothing") {
  const auto ends = make_socketpair();
  WriteBuffer buffer{{4, 10}};
  CHECK(buffer.append("123456"));
  CHECK_FALSE(buffer.append("78901"));
  CHECK(buffer.size() == 6);
  CHECK(buffer.append("7890"));
  CHECK(buffer.append(""));
  CHECK_FALSE(buffer.append("1"));
  CHECK(buffer.flush(ends.near).bytes == 10);
  CHECK(receive_some(ends.far) == "1234567890");
  CHECK_FALSE(buffer.append("12345678901"));
  CHECK(buffer.append("abcdefghij"));
}

TEST_CASE("a bound of none takes nothing but nothing") {
  WriteBuffer buffer{{0, 0}};
  CHECK(buffer.append(""));
  CHECK_FALSE(buffer.append("a"));
}

TEST_CASE("what is sent makes room below the bound") {
  const auto ends = make_tcp(16384, 16384);
  WriteBuffer buffer{{1 << 20, megabyte.size()}};
  const std::size_t sent = overfill(buffer, ends.near, megabyte);
  CHECK_FALSE(buffer.append(std::string(sent + 1, 'y')));
  CHECK(buffer.append(std::string(sent, 'y')));
  CHECK(buffer.size() == megabyte.size());
}

TEST_CASE(
    "the high-water mark is passed above it, not at it, and again below "
    "after a flush") {
  const auto ends = make_socketpair();
  WriteBuffer buffer{{5, 100}};
  CHECK_FALSE(buffer.above_high_water());
  CHECK(buffer.append("12345"));
  CHECK_FALSE(buffer.above_high_water());
  CHECK(buffer.append("6"));
  CHECK(buffer.above_high_water());
  CHECK(buffer.flush(ends.near).ok());
  CHECK_FALSE(buffer.above_high_water());
}

TEST_CASE("by default the high-water mark is 1 MiB and the bound 64 MiB") {
  WriteBuffer buffer;
  CHECK(buffer.append(megabyte));
  CHECK_FALSE(buffer.above_high_water());
  for (int count = 1; count < 64; ++count) REQUIRE(buffer.append(megabyte));
  CHECK(buffer.above_high_water());
  CHECK_FALSE(buffer.append("1"));
}

TEST_CASE("out of memory, append queues nothing and says so") {
  std::thread([] {  // a new thread has no spare blocks
    WriteBuffer buffer;
    allocation_count::refuse = true;
    const bool first = buffer.append("a");
    const std::size_t size = buffer.size();
    allocation_count::refuse = false;
    CHECK_FALSE(first);
    CHECK(size == 0);

    REQUIRE(buffer.append("kept"));
    allocation_count::refuse = true;
    const bool second = buffer.append(megabyte);
    allocation_count::refuse = false;
    CHECK_FALSE(second);
    const auto ends = make_socketpair();
    CHECK(buffer.flush(ends.near).bytes == 4);
    CHECK(receive_some(ends.far) == "kept");
  })
      .join();
}

TEST_CASE("out of memory, a block that would do as it is does") {
  const auto refused = [](auto& queue, std::string_view bytes) {
    allocation_count::refuse = true;
    const bool done = queue.append(bytes);
    allocation_count::refuse = false;
    return !done;
  };
  unsigned place = 0;
  // Of a mebibyte so much is taken that a smaller block would hold the rest;
  // and of a full block too little to be worth a move.
  for (const auto& [put, taken] :
       {std::pair<std::size_t, std::size_t>{1 << 20, (1 << 20) - 1000},
        std::pair<std::size_t, std::size_t>{4096, 100}}) {
    CAPTURE(put);
    detail::ByteQueue<4096, 4> queue;
    std::string text = next_bytes(put, place);
    REQUIRE(queue.append(text));
    queue.take(taken);
    text += next_bytes(100, place);
    CHECK_FALSE(refused(queue, std::string_view(text).substr(put)));
    CHECK(queue.bytes() == std::string_view(text).substr(taken));
    // What it does not hold it has no memory for, and nothing is lost.
    CHECK(refused(queue, megabyte));
    CHECK(queue.bytes() == std::string_view(text).substr(taken));
    // With memory again, all goes on.
    const std::string more = next_bytes(5000, place);
    CHECK(queue.append(more));
    CHECK(queue.bytes() == text.substr(taken) + more);
  }
}

// ---------------------------------------------------------------------------
// Costs
// ---------------------------------------------------------------------------

TEST_CASE("an empty buffer owns no memory, before and after its use") {
  const allocation_count::Since start;
  std::thread([] {
    const auto ends = make_socketpair();
    const allocation_count::Since unused;
    std::vector<WriteBuffer> buffers(10'000);
    const long array = unused.bytes();
    CHECK(unused.allocations() == 1);
    for (WriteBuffer& buffer : buffers) {
      if (!buffer.append("a few bytes")) return;
      if (!buffer.flush(ends.near).ok()) return;
      if (receive_some(ends.far) != "a few bytes") return;
    }
    // One block went round among all of them.
    CHECK(unused.bytes() < array + 5000);
  }).join();
  CHECK(start.bytes() < 5000);
}

TEST_CASE("fan-out to 500 buffers allocates nothing in the steady state") {
  const auto ends = make_socketpair();
  std::vector<WriteBuffer> buffers(500);
  const std::string line = "a line for everyone\n";
  const auto fan_out = [&] {
    for (WriteBuffer& buffer : buffers)
      if (!buffer.append(line) || !buffer.append(line)) return false;
    char room[64];
    for (WriteBuffer& buffer : buffers) {
      if (!buffer.flush(ends.near).ok()) return false;
      if (read(ends.far, room).bytes != 2 * line.size()) return false;
    }
    return true;
  };
  REQUIRE(fan_out());  // warms up
  const allocation_count::Since start;
  bool all_sent = true;
  for (int round = 0; round < 20; ++round) all_sent = fan_out() && all_sent;
  CHECK(all_sent);
  CHECK(start.allocations() == 0);
}

TEST_CASE("a thread keeps a thousand small spare blocks, not more") {
  const allocation_count::Since start;
  std::thread([] {
    const auto ends = make_socketpair();
    std::vector<WriteBuffer> buffers(1500);
    const allocation_count::Since empty;
    for (WriteBuffer& buffer : buffers)
      if (!buffer.append("a")) return;
    CHECK(empty.bytes() >= 1500L * 4096);
    for (WriteBuffer& buffer : buffers) {
      if (!buffer.flush(ends.near).ok()) return;
      receive_some(ends.far);
    }
    CHECK(empty.bytes() >= 1000L * 4096);
    CHECK(empty.bytes() <= 1024L * 4200);
  }).join();
  CHECK(start.bytes() < 50'000);
}

TEST_CASE("the memory of a big backlog is given back once it is sent") {
  const auto ends = make_socketpair();
  WriteBuffer buffer;
  const allocation_count::Since start;
  for (int count = 0; count < 4; ++count) REQUIRE(buffer.append(megabyte));
  CHECK(start.bytes() >= 4L << 20);
  CHECK(start.bytes() <= 8L << 20);
  std::size_t received = 0;
  while (!buffer.flush(ends.near).ok()) {
    const std::size_t count = receive_some(ends.far).size();
    if (count == 0) break;
    received += count;
  }
  received += receive_some(ends.far).size();
  CHECK(received == 4 * megabyte.size());
  CHECK(start.bytes() == 0);
}

TEST_CASE("a backlog that has become small gives the memory of its peak back") {
  detail::ByteQueue<4096, 4> queue;
  const allocation_count::Since start;
  REQUIRE(queue.reserve(1 << 20));
  queue.put(1 << 20);
  queue.take((1 << 20) - 1000);  // never empty again
  for (int count = 0; count < 100; ++count) {
    REQUIRE(queue.reserve(100));
    queue.put(100);
    queue.take(100);
  }
  CHECK(queue.size() == 1000);
  CHECK(start.bytes() < 10'000);
}

namespace {

// The bytes that a queue moves about while `puts` times `size` bytes are put
// in and taken out, with `backlog` bytes always waiting.
std::size_t moved_bytes(std::size_t backlog, std::size_t size,
                        std::size_t puts) {
  detail::ByteQueue<4096, 4> queue;
  REQUIRE(queue.reserve(backlog));
  queue.put(backlog);
  std::size_t moved = 0;
  for (std::size_t count = 0; count < puts; ++count) {
    const char* const before = queue.bytes().data();
    const std::size_t kept = queue.size();
    REQUIRE(queue.reserve(size));
    if (queue.bytes().data() != before) moved += kept;
    queue.put(size);
    queue.take(size);
  }
  return moved;
}

}  // namespace

TEST_CASE(
    "whatever the backlog, at most a handful of bytes is moved for each "
    "that is put in") {
  for (const std::size_t backlog :
       {1000U, 4000U, 4096U, 60'000U, 65'500U, 65'536U, 1'000'000U}) {
    for (const std::size_t size : {16U, 100U, 4096U}) {
      CAPTURE(backlog);
      CAPTURE(size);
      const std::size_t puts = 4 * backlog / size + 1000;
      const std::size_t moved = moved_bytes(backlog, size, puts);
      CHECK(moved <= 4 * puts * size + 2 * backlog);
    }
  }
}

TEST_CASE(
    "a backlog that grows bit by bit is moved a few times, not each "
    "time") {
  WriteBuffer buffer;
  const allocation_count::Since start;
  for (int count = 0; count < 100'000; ++count)
    if (!buffer.append("0123456789")) break;
  CHECK(buffer.size() == 1'000'000);
  CHECK(start.allocations() < 15);
}

TEST_CASE(
    "a backlog that stays the same needs no more memory, however much "
    "passes through") {
  detail::ByteQueue<4096, 4> queue;
  REQUIRE(queue.reserve(100'000));
  queue.put(100'000);
  const allocation_count::Since start;
  for (int count = 0; count < 100'000; ++count) {
    REQUIRE(queue.reserve(100));
    queue.put(100);
    queue.take(100);
  }
  CHECK(start.bytes() <= 262'144);
  CHECK(start.allocations() <= 2);

  detail::ByteQueue<4096, 4> small;
  REQUIRE(small.reserve(100));
  small.put(100);
  const allocation_count::Since first_block;
  for (int count = 0; count < 1000; ++count) {
    REQUIRE(small.reserve(100));
    small.put(100);
    small.take(100);
  }
  CHECK(first_block.allocations() == 0);
}

// ---------------------------------------------------------------------------
// Life
// ---------------------------------------------------------------------------

TEST_CASE(
    "a buffer moves with its bytes and its limits; the old one is empty "
    "and works on") {
  const auto ends = make_socketpair();
  WriteBuffer first{{2, 8}};
  REQUIRE(first.append("moved"));
  WriteBuffer second{std::move(first)};
  // NOLINTNEXTLINE(bugprone-use-after-move): that is the point
  CHECK(first.empty());
  CHECK(first.append("again"));
  CHECK(second.above_high_water());
  CHECK_FALSE(second.append("1234"));

  WriteBuffer third;
  REQUIRE(third.append("forgotten"));
  third = std::move(second);
  // NOLINTNEXTLINE(bugprone-use-after-move): that is the point
  CHECK(second.empty());
  CHECK_FALSE(third.append("1234"));
  CHECK(third.flush(ends.near).ok());
  CHECK(first.flush(ends.near).ok());
  CHECK(receive_some(ends.far) == "movedagain");
}

namespace {
// So that { socket } makes a struct of a socket and a WriteBuffer.
WriteBuffer make_of_nothing() { return {}; }
}  // namespace

static_assert(!std::is_convertible_v<WriteLimits, WriteBuffer>);
static_assert(!std::is_convertible_v<std::size_t, WriteBuffer>);
static_assert(std::is_constructible_v<WriteBuffer, WriteLimits>);
static_assert(std::is_nothrow_default_constructible_v<WriteBuffer>);

TEST_CASE("a buffer is made of nothing where one is wanted") {
  const auto ends = make_socketpair();
  WriteBuffer buffer = {};
  CHECK(buffer.append("a"));
  CHECK(buffer.flush(ends.near).ok());
  CHECK(receive_some(ends.far) == "a");
  buffer = make_of_nothing();
  CHECK(buffer.append(std::string((1 << 20) + 1, 'x')));
  CHECK(buffer.above_high_water());
}

TEST_CASE("a partly sent buffer that is assigned to itself goes on") {
  const auto ends = make_socketpair();
  WriteBuffer buffer;
  REQUIRE(buffer.append("still here"));
  WriteBuffer& same = buffer;
  buffer = std::move(same);
  CHECK(buffer.flush(ends.near).ok());
  CHECK(receive_some(ends.far) == "still here");
}

TEST_CASE(
    "a buffer that is destroyed with bytes waiting frees them, and keeps "
    "no spare") {
  std::thread([] {
    const allocation_count::Since start;
    {
      WriteBuffer buffer;
      CHECK(buffer.append("waiting"));
      CHECK(start.bytes() >= 4096);
    }
    CHECK(start.bytes() == 0);
  }).join();
}

TEST_CASE("a buffer may be filled on one thread and flushed on another") {
  const auto ends = make_socketpair();
  const allocation_count::Since start;
  WriteBuffer buffer;
  std::thread([&] { CHECK(buffer.append("from afar")); }).join();
  CHECK(buffer.flush(ends.near).ok());
  CHECK(receive_some(ends.far) == "from afar");
}

namespace {

// Destroyed after this thread's spare blocks are gone. It uses a queue even
// then, as a static object of the program might; the sanitizers watch.
struct AtExit {
  ~AtExit() {
    const allocation_count::Since start;
    // Without REQUIRE: doctest has ended.
    int pair[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair) != 0)
      give_up();
    const Ends ends{Fd{pair[0]}, Fd{pair[1]}};
    if (!buffer.append("and more") || !buffer.flush(ends.near).ok()) give_up();
    WriteBuffer late;
    if (!late.append("late") || !late.flush(ends.near).ok()) give_up();
    if (receive_some(ends.far) != "never sentand morelate") give_up();
    // Both blocks are freed, not kept for a thread that is no more.
    if (start.bytes() > -4096) give_up();
  }
  [[noreturn]] static void give_up() {
    std::fputs("a static buffer misbehaved at exit\n", stderr);
    std::_Exit(1);
  }
  WriteBuffer buffer;
};
AtExit at_exit;

}  // namespace

TEST_CASE(
    "a static buffer may hold bytes, and be used, when the program "
    "ends") {
  at_exit.buffer = WriteBuffer();
  CHECK(at_exit.buffer.append("never sent"));
}
