// read, write, writev and drain: what is moved, and no surprise in it.
#include <doctest/doctest.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>

#include <array>
#include <climits>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

const std::string megabyte(std::size_t{1} << 20, 'x');

::iovec piece_of(std::string_view text) {
  return {const_cast<char*>(text.data()), text.size()};
}

// Writes until nothing more fits. Returns how much that was.
std::size_t fill_up(FdView fd) {
  std::size_t total = 0;
  for (;;) {
    const IoResult result = write(fd, megabyte);
    total += result.bytes;
    if (!result.ok()) return total;
  }
}

bool is_pending(int number) {
  ::sigset_t pending;
  ::sigpending(&pending);
  return ::sigismember(&pending, number) == 1;
}

bool is_blocked(int number) {
  ::sigset_t blocked;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
  return ::sigismember(&blocked, number) == 1;
}

void block(int number) {
  ::sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, number);
  ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
}

}  // namespace

// ---------------------------------------------------------------------------
// IoResult
// ---------------------------------------------------------------------------

TEST_CASE("each status of a result answers to its own question") {
  using Answers = std::array<bool, 5>;
  const auto answers = [](IoStatus status) {
    const IoResult result{0, status, 0};
    return Answers{result.ok(), result.would_block(), result.end_of_stream(),
                   result.failed(), result.ended()};
  };
  CHECK(answers(IoStatus::ok) == Answers{true, false, false, false, false});
  CHECK(answers(IoStatus::would_block) ==
        Answers{false, true, false, false, false});
  CHECK(answers(IoStatus::end_of_stream) ==
        Answers{false, false, true, false, true});
  CHECK(answers(IoStatus::failed) == Answers{false, false, false, true, true});
  CHECK(IoResult{}.ok());
  CHECK(IoResult{}.bytes == 0);
  CHECK(IoResult{}.error == 0);
}

// ---------------------------------------------------------------------------
// read
// ---------------------------------------------------------------------------

TEST_CASE("read takes what is there, up to the room for it") {
  const auto ends = make_socketpair();
  send_all(ends.near, "abcdef");
  std::array<char, 4> room{};
  IoResult result = read(ends.far, room);
  CHECK(result.ok());
  CHECK(result.bytes == 4);
  CHECK(std::string_view(room.data(), 4) == "abcd");
  result = read(ends.far, room);
  CHECK(result.ok());
  CHECK(result.bytes == 2);
  CHECK(std::string_view(room.data(), 2) == "ef");
}

TEST_CASE("read would block while nothing is there") {
  for (const Ends& ends :
       std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    char room[4];
    const IoResult result = read(ends.far, room);
    CHECK(result.would_block());
    CHECK(result.bytes == 0);
    CHECK(result.error == 0);
  }
}

TEST_CASE(
    "read meets the end of the stream after the last byte, again and "
    "again") {
  for (Ends& ends : std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    send_all(ends.near, "ab");
    ends.near.reset();
    char room[4];
    REQUIRE(becomes_readable(ends.far));
    CHECK(read(ends.far, room).bytes == 2);
    REQUIRE(becomes_readable(ends.far));
    for (int turn = 0; turn < 2; ++turn) {
      const IoResult result = read(ends.far, room);
      CHECK(result.end_of_stream());
      CHECK(result.bytes == 0);
      CHECK(result.error == 0);
    }
  }
}

TEST_CASE("read into no room is ok and touches nothing") {
  CHECK(read(FdView{-1}, {}).ok());
  auto ends = make_pipe();
  ends.near.reset();
  const IoResult result = read(ends.far, {});
  CHECK(result.ok());
  CHECK(result.bytes == 0);
}

TEST_CASE("read from any kind of descriptor") {
  const Fd event{::eventfd(7, EFD_NONBLOCK | EFD_CLOEXEC)};
  char room[8];
  CHECK(read(event, room).bytes == 8);
  CHECK(read(event, room).would_block());
  const Fd file{::open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC)};
  CHECK(read(file, room).bytes > 0);
}

TEST_CASE("read from what is not open is failed") {
  char room[4];
  const IoResult result = read(FdView{-1}, room);
  CHECK(result.failed());
  CHECK(result.error == EBADF);
  CHECK(result.bytes == 0);
}

TEST_CASE(
    "P13 after a reset a read is failed with ECONNRESET, then ended, and "
    "a write is failed with EPIPE") {
  auto ends = make_tcp();
  reset_connection(ends.far);
  REQUIRE(becomes(ends.near, POLLHUP));
  char room[4];
  const IoResult result = read(ends.near, room);
  CHECK(result.failed());
  CHECK(result.error == ECONNRESET);
  CHECK(read(ends.near, room).end_of_stream());
  CHECK(write(ends.near, "a").error == EPIPE);
}

// ---------------------------------------------------------------------------
// write
// ---------------------------------------------------------------------------

TEST_CASE(
    "write puts the bytes where they are read, whatever the "
    "descriptor") {
  for (const Ends& ends :
       std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    const IoResult result = write(ends.near, "hello");
    CHECK(result.ok());
    CHECK(result.bytes == 5);
    CHECK(result.error == 0);
    CHECK(receive(ends.far, 5) == "hello");
  }
}

TEST_CASE("P24 write takes what fits and says how much, then would block") {
  for (const Ends& ends : std::array{make_tcp(16384, 16384), make_pipe()}) {
    const IoResult result = write(ends.near, megabyte);
    CHECK(result.ok());
    CHECK(result.bytes > 0);
    CHECK(result.bytes < megabyte.size());
    std::size_t total = result.bytes + fill_up(ends.near);
    const IoResult full = write(ends.near, megabyte);
    CHECK(full.would_block());
    CHECK(full.bytes == 0);
    CHECK(full.error == 0);

    // Nothing but what was counted arrives, and then there is room again.
    while (total > 0 && becomes_readable(ends.far)) {
      const std::size_t count = receive_some(ends.far).size();
      REQUIRE(count <= total);
      total -= count;
    }
    CHECK(total == 0);
    REQUIRE(becomes_writable(ends.near));
    CHECK(write(ends.near, "a").ok());
  }
}

TEST_CASE("write of nothing is ok and touches nothing") {
  CHECK(write(FdView{-1}, "").ok());
  auto ends = make_socketpair();
  ends.far.reset();
  CHECK(write(ends.near, {}).ok());
}

TEST_CASE("write to what is not open is failed") {
  const IoResult result = write(FdView{-1}, "a");
  CHECK(result.failed());
  CHECK(result.error == EBADF);
}

// ---------------------------------------------------------------------------
// writev
// ---------------------------------------------------------------------------

TEST_CASE("writev puts all pieces in their order") {
  for (const Ends& ends :
       std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    const std::array pieces{piece_of("one "), piece_of(""), piece_of("two "),
                            piece_of("three")};
    const IoResult result = writev(ends.near, pieces);
    CHECK(result.ok());
    CHECK(result.bytes == 13);
    CHECK(receive(ends.far, 13) == "one two three");
  }
}

TEST_CASE("writev looks at the first 1,024 of its pieces") {
  static_assert(IOV_MAX == 1024);
  const std::vector<::iovec> pieces(5000, piece_of("ab"));
  for (const Ends& ends :
       std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    const IoResult result = writev(ends.near, pieces);
    CHECK(result.ok());
    CHECK(result.bytes == 2048);
    CHECK(receive(ends.far, 2048).size() == 2048);
  }
}

TEST_CASE("writev of no pieces is ok") {
  for (const Ends& ends : std::array{make_pipe(), make_tcp()}) {
    const IoResult result = writev(ends.near, {});
    CHECK(result.ok());
    CHECK(result.bytes == 0);
  }
}

TEST_CASE("P24 writev takes what fits, then would block") {
  const std::array pieces{piece_of(megabyte), piece_of(megabyte)};
  for (const Ends& ends : std::array{make_tcp(16384, 16384), make_pipe()}) {
    const IoResult result = writev(ends.near, pieces);
    CHECK(result.ok());
    CHECK(result.bytes > 0);
    CHECK(result.bytes < megabyte.size());
    fill_up(ends.near);
    CHECK(writev(ends.near, pieces).would_block());
  }
}

TEST_CASE("writev to what is not open is failed") {
  const ::iovec piece = piece_of("a");
  CHECK(writev(FdView{-1}, {&piece, 1}).error == EBADF);
}

// ---------------------------------------------------------------------------
// drain
// ---------------------------------------------------------------------------

TEST_CASE("P01 drain reads until it would block, so the next edge comes") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, Token{1}, Interest::readable, Mode::edge);
  send_all(ends.near, "abcdef");
  REQUIRE(poller.wait(patience).size() == 1);
  std::array<char, 16> room{};
  const IoResult result = drain(ends.far, room);
  CHECK(result.would_block());
  CHECK(result.bytes == 6);
  CHECK(result.error == 0);
  CHECK(std::string_view(room.data(), 6) == "abcdef");
  CHECK(poller.wait(0ms).empty());
  send_all(ends.near, "g");
  CHECK(poller.wait(patience).size() == 1);
  CHECK(drain(ends.far, room).bytes == 1);
}

TEST_CASE("P01 drain reads on when a read brings less than there is") {
  // A pipe that keeps packets apart: each read takes one.
  int numbers[2];
  REQUIRE(::pipe2(numbers, O_DIRECT | O_NONBLOCK | O_CLOEXEC) == 0);
  const Fd reader{numbers[0]};
  const Fd writer{numbers[1]};
  for (const char* packet : {"one", "two", "three"}) send_all(writer, packet);
  std::array<char, 64> room{};
  const IoResult result = drain(reader, room);
  CHECK(result.would_block());
  CHECK(std::string_view(room.data(), result.bytes) == "onetwothree");
}

TEST_CASE("P29 the room is drain's budget: ok means that more may be pending") {
  const auto ends = make_socketpair();
  send_all(ends.near, "0123456789");
  std::array<char, 4> room{};
  for (const std::string_view part : {"0123", "4567"}) {
    const IoResult result = drain(ends.far, room);
    CHECK(result.ok());
    CHECK(std::string_view(room.data(), result.bytes) == part);
  }
  CHECK(drain(ends.far, room).bytes == 2);
  CHECK(drain(ends.far, room).would_block());
  send_all(ends.near, "full");  // nothing is pending, but drain cannot know
  CHECK(drain(ends.far, room).ok());
  const IoResult nothing = drain(ends.far, room);
  CHECK(nothing.would_block());
  CHECK(nothing.bytes == 0);
}

TEST_CASE("P29 a peer that never stops does not hold drain for ever") {
  const Fd zero{::open("/dev/zero", O_RDONLY | O_CLOEXEC)};
  std::vector<char> room(100'000);
  const IoResult result = drain(zero, room);
  CHECK(result.ok());
  CHECK(result.bytes == room.size());
}

TEST_CASE("drain tells the end of the stream with what came before it") {
  for (Ends& ends : std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    send_all(ends.near, "ab");
    ends.near.reset();
    // A pipe's end is a hang-up, a socket's a readable end.
    REQUIRE(becomes(ends.far, POLLRDHUP));
    char room[8];
    IoResult result = drain(ends.far, room);
    CHECK(result.end_of_stream());
    CHECK(result.bytes == 2);
    result = drain(ends.far, room);
    CHECK(result.end_of_stream());
    CHECK(result.bytes == 0);
  }
}

TEST_CASE("P13 drain tells a failure with what came before it") {
  auto ends = make_tcp();
  send_all(ends.far, "ab");
  REQUIRE(becomes_readable(ends.near));
  reset_connection(ends.far);
  REQUIRE(becomes(ends.near, POLLHUP));
  char room[8];
  const IoResult result = drain(ends.near, room);
  CHECK(result.failed());
  CHECK(result.error == ECONNRESET);
  CHECK(result.bytes == 2);
  CHECK(drain(FdView{-1}, room).error == EBADF);
}

TEST_CASE("drain into no room is ok and touches nothing") {
  const IoResult result = drain(FdView{-1}, {});
  CHECK(result.ok());
  CHECK(result.bytes == 0);
}

// ---------------------------------------------------------------------------
// shutdown_write
// ---------------------------------------------------------------------------

TEST_CASE(
    "P11 after shutdown_write the peer reads what is on its way, then "
    "the end, and can still answer") {
  for (const Ends& ends : std::array{make_socketpair(), make_tcp()}) {
    CHECK(write(ends.near, "question").ok());
    shutdown_write(ends.near);
    CHECK(receive(ends.far, 8) == "question");
    REQUIRE(becomes_readable(ends.far));
    char room[8];
    CHECK(read(ends.far, room).end_of_stream());
    CHECK(write(ends.far, "answer").ok());
    CHECK(receive(ends.near, 6) == "answer");
    CHECK(write(ends.near, "more").error == EPIPE);
  }
}

TEST_CASE("shutdown_write of what is no socket does nothing") {
  shutdown_write(FdView{-1});
  const auto ends = make_pipe();
  shutdown_write(ends.near);
  CHECK(write(ends.near, "a").ok());
}

// ---------------------------------------------------------------------------
// Signals
// ---------------------------------------------------------------------------

namespace {

// Writes in both ways to somebody who is gone. In a child process that SIGPIPE
// would kill.
int write_to_the_dead(Ends ends) {
  std::signal(SIGPIPE, SIG_DFL);
  ends.far.reset();
  const ::iovec piece = piece_of("a");
  for (int turn = 0; turn < 2; ++turn) {
    const IoResult single = write(ends.near, "a");
    if (!single.failed() || single.error != EPIPE) return 1;
    const IoResult gathered = writev(ends.near, {&piece, 1});
    if (!gathered.failed() || gathered.error != EPIPE) return 2;
  }
  if (is_pending(SIGPIPE)) return 3;
  return is_blocked(SIGPIPE) ? 4 : 0;
}

}  // namespace

TEST_CASE(
    "P25 SIGPIPE kills nobody who writes to a socket or a pipe without "
    "a reader") {
  CHECK(run_in_child([] { return write_to_the_dead(make_socketpair()); }) == 0);
  CHECK(run_in_child([] { return write_to_the_dead(make_pipe()); }) == 0);
}

TEST_CASE("P25 SIGPIPE kills nobody who writes to a reset connection") {
  const int code = run_in_child([] {
    std::signal(SIGPIPE, SIG_DFL);
    auto ends = make_tcp();
    reset_connection(ends.far);
    if (!becomes(ends.near, POLLHUP)) return 1;
    if (!write(ends.near, "a").failed()) return 2;
    return write(ends.near, "a").error == EPIPE ? 0 : 3;
  });
  CHECK(code == 0);
}

TEST_CASE("P25 a SIGPIPE that was pending already stays pending") {
  const int code = run_in_child([] {
    std::signal(SIGPIPE, SIG_DFL);
    block(SIGPIPE);
    ::raise(SIGPIPE);
    auto ends = make_pipe();
    ends.far.reset();
    if (write(ends.near, "a").error != EPIPE) return 1;
    if (!is_blocked(SIGPIPE)) return 2;
    return is_pending(SIGPIPE) ? 0 : 3;
  });
  CHECK(code == 0);
}

TEST_CASE(
    "P25 who has SIGPIPE blocked finds it blocked, and none pending, "
    "after the write") {
  const int code = run_in_child([] {
    block(SIGPIPE);
    auto ends = make_pipe();
    ends.far.reset();
    if (write(ends.near, "a").error != EPIPE) return 1;
    if (!is_blocked(SIGPIPE)) return 2;
    return is_pending(SIGPIPE) ? 3 : 0;
  });
  CHECK(code == 0);
}

namespace {

// A blocking pipe takes as much as it holds, and then its reader goes away. In
// a child process that SIGPIPE would kill.
template <class Write>
int outlive_the_reader(Write write) {
  std::signal(SIGPIPE, SIG_DFL);
  auto ends = make_pipe();
  make_blocking(ends.near);
  const int capacity = ::fcntl(ends.near.get(), F_GETPIPE_SZ);
  if (capacity <= 0) return 1;
  std::thread reader([&] {
    const auto limit = Clock::now() + patience;
    int held = 0;
    while (::ioctl(ends.far.get(), FIONREAD, &held) == 0 && held < capacity &&
           Clock::now() < limit)
      std::this_thread::sleep_for(1ms);
    ends.far.reset();
  });
  const std::string more(2 * static_cast<std::size_t>(capacity), 'x');
  const IoResult partial = write(ends.near, more);
  reader.join();
  if (!partial.ok()) return 2;
  if (partial.bytes != static_cast<std::size_t>(capacity)) return 3;
  if (write(ends.near, more).error != EPIPE) return 4;
  return 0;
}

// Both ways to write.
IoResult in_one_piece(FdView fd, std::string_view bytes) {
  return write(fd, bytes);
}
IoResult in_two_pieces(FdView fd, std::string_view bytes) {
  const ::iovec pieces[]{piece_of(bytes.substr(0, 1000)),
                         piece_of(bytes.substr(1000))};
  return writev(fd, pieces);
}

}  // namespace

TEST_CASE(
    "P25 SIGPIPE kills nobody whose reader goes when a blocking pipe has "
    "taken a part") {
  for (const auto write : {in_one_piece, in_two_pieces}) {
    const int code = run_in_child([write] {
      if (const int wrong = outlive_the_reader(write); wrong != 0) return wrong;
      if (is_pending(SIGPIPE)) return 5;
      return is_blocked(SIGPIPE) ? 6 : 0;
    });
    CHECK(code == 0);
  }
}

TEST_CASE("P25 where a pipe has taken a part, no SIGPIPE is left or lost") {
  for (const bool before : {false, true}) {
    CAPTURE(before);
    const int code = run_in_child([before] {
      block(SIGPIPE);
      if (before) ::raise(SIGPIPE);
      if (const int wrong = outlive_the_reader(in_one_piece); wrong != 0)
        return wrong;
      if (!is_blocked(SIGPIPE)) return 5;
      return is_pending(SIGPIPE) == before ? 0 : 6;
    });
    CHECK(code == 0);
  }
}

TEST_CASE("a write to a pipe leaves other signals alone") {
  const int code = run_in_child([] {
    block(SIGUSR1);
    ::raise(SIGUSR1);
    auto ends = make_pipe();
    if (!write(ends.near, "a").ok()) return 1;
    ends.far.reset();
    if (write(ends.near, "a").error != EPIPE) return 2;
    if (!is_pending(SIGUSR1)) return 3;
    return is_blocked(SIGTERM) ? 4 : 0;
  });
  CHECK(code == 0);
}

namespace {

// Runs `call`, which blocks, amid signals; `release` ends the blocking from
// another thread once some of them have come.
template <class Call, class Release>
IoResult amid_signals(Call call, Release release) {
  const Interruptions every_few_milliseconds{0};
  std::thread other([&] {
    block_interruptions();
    const auto limit = Clock::now() + patience;
    while (Interruptions::count() < 10 && Clock::now() < limit)
      std::this_thread::sleep_for(1ms);
    release();
  });
  const IoResult result = call();
  other.join();
  return result;
}

}  // namespace

TEST_CASE("P21 a signal does not interrupt a read") {
  const auto ends = make_pipe();
  make_blocking(ends.far);
  char room[4];
  const IoResult result = amid_signals(
      [&] { return read(ends.far, room); },
      [&] { static_cast<void>(!::write(ends.near.get(), "a", 1)); });
  CHECK(result.ok());
  CHECK(result.bytes == 1);
}

TEST_CASE("P21 a signal does not interrupt a write or a writev") {
  const ::iovec piece = piece_of("a");
  for (Ends& ends : std::array{make_pipe(), make_socketpair()}) {
    for (const bool gathered : {false, true}) {
      CAPTURE(gathered);
      fill_up(ends.near);
      make_blocking(ends.near);
      const IoResult result = amid_signals(
          [&] {
            return gathered ? writev(ends.near, {&piece, 1})
                            : write(ends.near, "a");
          },
          [&] { receive_some(ends.far); });
      CHECK(result.ok());
      CHECK(result.bytes == 1);
      REQUIRE(::fcntl(ends.near.get(), F_SETFL, O_NONBLOCK) == 0);
    }
  }
}

TEST_CASE("P21 a signal does not interrupt a receive") {
  const auto ends = make_socketpair();
  make_blocking(ends.far);
  char room[4];
  const IoResult result = amid_signals(
      [&] { return edgewise::receive(ends.far, room); },
      [&] { static_cast<void>(!::write(ends.near.get(), "a", 1)); });
  CHECK(result.ok());
  CHECK(result.bytes == 1);
}

TEST_CASE("P21 a signal does not interrupt a send_to or a send_fd") {
  const Fd server = bind_datagram(*Address::parse("unix:"));
  const Fd client = bind_datagram(*Address::parse("unix:"));
  const Address address = local_address(server);
  while (send_to(client, "a", address).ok()) continue;
  make_blocking(client);
  const IoResult sent =
      amid_signals([&] { return send_to(client, "a", address); },
                   [&] { receive_some(server); });
  CHECK(sent.ok());

  const auto ends = make_socketpair();
  fill_up(ends.near);
  make_blocking(ends.near);
  const IoResult passed =
      amid_signals([&] { return send_fd(ends.near, "a", ends.near); },
                   [&] { receive_some(ends.far); });
  CHECK(passed.ok());
}
