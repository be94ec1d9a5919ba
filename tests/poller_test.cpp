// Poller and Event, on pipes, sockets and the real clock. The C library's
// wrappers of the epoll calls are interposed: they count, note the time limit
// that the kernel is given, and refuse where a test asks them to.
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/time_types.h>
#include <netinet/tcp.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <array>
#include <atomic>
#include <cstdarg>
#include <cstring>
#include <limits>
#include <map>
#include <set>
#include <thread>
#include <type_traits>
#include <vector>

#include "allocation_count.hpp"
#include "support.hpp"

using namespace edgewise;
using namespace support;
using std::chrono::nanoseconds;

// ---------------------------------------------------------------------------
// The interposed calls
// ---------------------------------------------------------------------------

namespace spy {

constexpr auto forever = nanoseconds{-1};

std::atomic<int> precise_waits{0};  // epoll_pwait2
std::atomic<int> coarse_waits{0};   // epoll_wait
nanoseconds limit{};                // of the last wait of either kind

int refuse_precise = 0;       // the errno that epoll_pwait2 fails with
int refuse_control = 0;       // the errno that epoll_ctl fails with
bool elapse_at_once = false;  // the next epoll_wait claims that time is up
bool interrupt_late = false;  // a signal ends the next wait after its time

void reset() {
  precise_waits = coarse_waits = 0;
  limit = {};
  refuse_precise = refuse_control = 0;
  elapse_at_once = interrupt_late = false;
}

// True if the wait under way is to be ended by a late signal.
bool interrupted_late() {
  if (!std::exchange(interrupt_late, false)) return false;
  const auto end = Clock::now() + limit;
  while (Clock::now() <= end) std::this_thread::yield();
  errno = EINTR;
  return true;
}

}  // namespace spy

extern "C" long syscall(long number, ...) noexcept {
  using Function = long(long, ...);
  // No static local that is made here: what guards one may call syscall.
  static constinit std::atomic<Function*> known{nullptr};
  Function* real = known;
  if (real == nullptr) known = real = next_definition<Function>("syscall");
  std::va_list list;
  va_start(list, number);
  long arguments[6];
  for (long& argument : arguments) argument = va_arg(list, long);
  va_end(list);
  if (number == SYS_epoll_pwait2) {
    ++spy::precise_waits;
    spy::limit = spy::forever;
    if (arguments[3] != 0) {
      ::__kernel_timespec limit;
      // NOLINTNEXTLINE(performance-no-int-to-ptr)
      std::memcpy(&limit, reinterpret_cast<void*>(arguments[3]), sizeof limit);
      spy::limit =
          std::chrono::seconds{limit.tv_sec} + nanoseconds{limit.tv_nsec};
    }
    if (spy::refuse_precise != 0) {
      errno = spy::refuse_precise;
      return -1;
    }
    if (spy::interrupted_late()) return -1;
  }
  return real(number, arguments[0], arguments[1], arguments[2], arguments[3],
              arguments[4], arguments[5]);
}

extern "C" int epoll_wait(int epoll, ::epoll_event* events, int count,
                          int timeout) {
  static auto* const real =
      next_definition<int(int, ::epoll_event*, int, int)>("epoll_wait");
  ++spy::coarse_waits;
  spy::limit = timeout < 0 ? spy::forever
                           : nanoseconds{std::chrono::milliseconds{timeout}};
  if (std::exchange(spy::elapse_at_once, false)) return 0;
  if (spy::interrupted_late()) return -1;
  return real(epoll, events, count, timeout);
}

extern "C" int epoll_ctl(int epoll, int operation, int fd,
                         ::epoll_event* event) noexcept {
  static auto* const real =
      next_definition<int(int, int, int, ::epoll_event*)>("epoll_ctl");
  if (spy::refuse_control != 0) {
    errno = spy::refuse_control;
    return -1;
  }
  return real(epoll, operation, fd, event);
}

namespace {

// Both ways of waiting have to behave: a test runs once for each.
void wait_coarsely(bool coarsely) {
  spy::reset();
  if (coarsely) spy::refuse_precise = ENOSYS;
}

int waits() { return spy::precise_waits + spy::coarse_waits; }

// Events that have come already, without waiting.
Events look(Poller& poller) { return poller.wait(0ns); }

bool silent(Poller& poller) { return look(poller).empty(); }

// Waits for one event and copies it.
Event one_event(Poller& poller) {
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  return events[0];
}

std::set<std::uint64_t> tokens(Events events) {
  std::set<std::uint64_t> all;
  for (const Event& event : events)
    all.insert(static_cast<std::uint64_t>(event.token()));
  return all;
}

using Tokens = std::set<std::uint64_t>;

constexpr Token any{1};

constexpr Interest read_and_write = Interest::readable | Interest::writable;

}  // namespace

// ---------------------------------------------------------------------------
// What does not compile, and what lies where
// ---------------------------------------------------------------------------

namespace {

template <class P>
concept WaitsForever = requires(P&& poller) {
  std::forward<P>(poller).wait();
};
template <class P>
concept WaitsFor = requires(P&& poller) {
  std::forward<P>(poller).wait(1ms);
};
template <class P>
concept WaitsUntil = requires(P&& poller) {
  std::forward<P>(poller).wait_until(Clock::now());
};

}  // namespace

static_assert(!std::is_copy_constructible_v<Poller>);
static_assert(std::is_trivially_copyable_v<Event>);
static_assert(std::is_standard_layout_v<Event>);
static_assert(alignof(Event) == alignof(::epoll_event));

// The events would lie in a poller that is gone.
TEST_CASE("P33 a wait on a temporary poller does not compile") {
  CHECK((WaitsForever<Poller&> && !WaitsForever<Poller>));
  CHECK((WaitsFor<Poller&> && !WaitsFor<Poller>));
  CHECK((WaitsUntil<Poller&> && !WaitsUntil<Poller>));
}

TEST_CASE("an Event is the kernel's epoll_event, all 64 bits of token in it") {
  const auto ends = make_pipe();
  Poller poller;
  for (const std::uint64_t number :
       {std::uint64_t{0}, std::uint64_t{1} << 33,
        std::numeric_limits<std::uint64_t>::max()}) {
    poller.set(ends.near, Token{number}, Interest::writable);
    const Event event = one_event(poller);
    ::epoll_event raw;
    std::memcpy(&raw, &event, sizeof raw);
    const std::uint64_t data = raw.data.u64;
    const std::uint32_t bits = raw.events;
    CHECK(data == number);
    CHECK(event.token() == Token{number});
    CHECK(bits == EPOLLOUT);
    CHECK(event.bits() == EPOLLOUT);
  }
}

TEST_CASE("P30 an Event is packed as the kernel packs it") {
  CHECK(sizeof(Event) == sizeof(::epoll_event));
  CHECK(alignof(Event) == alignof(::epoll_event));
#ifdef __x86_64__
  CHECK(sizeof(Event) == 12);
  CHECK(alignof(Event) == 1);
#endif
}

// Where the kernel packs it, an event may lie at any address, so no reference
// to its 64 bits may be formed on the way. UBSan watches.
TEST_CASE("P30 events at any address are read right") {
  constexpr std::size_t count = 5;
  alignas(8) std::array<char, 8 + count * sizeof(Event)> memory{};
  for (std::size_t offset = 0; offset < 8; offset += alignof(Event)) {
    char* const place = memory.data() + offset;
    for (std::size_t index = 0; index < count; ++index) {
      ::epoll_event raw{};
      raw.events = static_cast<std::uint32_t>(1U << index);
      raw.data.u64 = std::uint64_t{0x0123456789abcdef} + index;
      std::memcpy(place + index * sizeof raw, &raw, sizeof raw);
    }
    const Events events(reinterpret_cast<const Event*>(place), count);
    std::uint64_t index = 0;
    for (const Event& event : events) {
      CHECK(event.token() == Token{0x0123456789abcdef + index});
      CHECK(event.bits() == 1U << index);
      ++index;
    }
    CHECK(index == count);
  }
}

TEST_CASE("interests and modes combine") {
  CHECK(static_cast<std::uint32_t>(read_and_write) ==
        (std::uint32_t{EPOLLIN} | EPOLLRDHUP | EPOLLOUT));
  CHECK(static_cast<std::uint32_t>(Mode::edge | Mode::oneshot) ==
        (std::uint32_t{EPOLLET} | EPOLLONESHOT));
  CHECK((Interest::readable | Interest::readable) == Interest::readable);
  CHECK((Mode::edge | Mode::edge) == Mode::edge);
}

namespace {

// An event as the kernel would write it.
Event event_of(std::uint32_t bits) {
  ::epoll_event raw{};
  raw.events = bits;
  Event event;
  std::memcpy(static_cast<void*>(&event), &raw, sizeof raw);
  return event;
}

}  // namespace

TEST_CASE("each bit of an event answers to its own questions") {
  using Answers = std::array<bool, 6>;
  const auto answers = [](std::uint32_t bits) {
    const Event event = event_of(bits);
    return Answers{event.readable(), event.writable(), event.priority(),
                   event.error(),    event.hang_up(),  event.read_closed()};
  };
  CHECK(answers(0) == Answers{});
  CHECK(answers(EPOLLIN) == Answers{true, false, false, false, false, false});
  CHECK(answers(EPOLLOUT) == Answers{false, true, false, false, false, false});
  CHECK(answers(EPOLLPRI) == Answers{false, false, true, false, false, false});
  CHECK(answers(EPOLLERR) == Answers{true, true, false, true, false, false});
  CHECK(answers(EPOLLHUP) == Answers{true, true, false, false, true, true});
  CHECK(answers(EPOLLRDHUP) == Answers{true, false, false, false, false, true});
}

// ---------------------------------------------------------------------------
// Modes
// ---------------------------------------------------------------------------

TEST_CASE("level-triggered: reported at each wait, as long as it is ready") {
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.far, any, Interest::readable);
  CHECK(silent(poller));
  send_all(ends.near, "ab");
  for (int turn = 0; turn < 3; ++turn) {
    const Event event = one_event(poller);
    CHECK(event.token() == any);
    CHECK(event.readable());
    CHECK_FALSE(event.writable());
    CHECK_FALSE(event.priority());
    CHECK_FALSE(event.error());
    CHECK_FALSE(event.hang_up());
    CHECK_FALSE(event.read_closed());
  }
  CHECK(receive_some(ends.far) == "ab");
  CHECK(silent(poller));
}

TEST_CASE("edge-triggered: reported once each time that something arrives") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable, Mode::edge);
  for (int turn = 0; turn < 3; ++turn) {
    send_all(ends.near, "ab");
    CHECK(one_event(poller).readable());
    CHECK(silent(poller));
  }
}

TEST_CASE(
    "P01 what a partial read left is not reported again by an edge, "
    "until more arrives") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable, Mode::edge);
  send_all(ends.near, "abcd");
  CHECK(one_event(poller).readable());
  char room[2];
  REQUIRE(read(ends.far, room).bytes == 2);
  CHECK(silent(poller));
  send_all(ends.near, "e");
  CHECK(one_event(poller).readable());
  CHECK(receive_some(ends.far) == "cde");
}

namespace {

std::size_t bytes_pending(FdView fd) {
  int count = 0;
  REQUIRE(::ioctl(fd.get(), FIONREAD, &count) == 0);
  return static_cast<std::size_t>(count);
}

// In a network the bytes need their time.
void await_bytes(FdView fd, std::size_t count) {
  const auto limit = Clock::now() + patience;
  while (bytes_pending(fd) < count && Clock::now() < limit)
    std::this_thread::yield();
  REQUIRE(bytes_pending(fd) == count);
}

}  // namespace

TEST_CASE(
    "P31 several writes before a wait are one edge, and reading until it "
    "would block gets them all") {
  for (const Ends& ends :
       std::array{make_pipe(), make_socketpair(), make_tcp()}) {
    Poller poller;
    poller.add(ends.far, any, Interest::readable, Mode::edge);
    for (int round = 0; round < 3; ++round) {
      for (const char* const text : {"a", "bc", "def"})
        send_all(ends.near, text);
      await_bytes(ends.far, 6);
      CHECK(one_event(poller).readable());
      CHECK(silent(poller));

      // A room that is too small is spent, and says so: there may be more.
      std::array<char, 4> room{};
      IoResult result = drain(ends.far, room);
      CHECK(result.ok());
      CHECK(std::string_view(room.data(), result.bytes) == "abcd");
      result = drain(ends.far, room);
      CHECK(result.would_block());
      CHECK(std::string_view(room.data(), result.bytes) == "ef");
      CHECK(silent(poller));
    }
  }
}

TEST_CASE("P31 several writes to an eventfd are one edge, and one read") {
  const Fd event{::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)};
  Poller poller;
  poller.add(event, any, Interest::readable, Mode::edge);
  for (int round = 0; round < 3; ++round) {
    for (int count = 0; count < 3; ++count)
      REQUIRE(::eventfd_write(event.get(), 1) == 0);
    CHECK(one_event(poller).readable());
    CHECK(silent(poller));
    std::array<char, 64> room{};
    const IoResult result = drain(event, room);
    CHECK(result.would_block());
    CHECK(result.bytes == sizeof(std::uint64_t));
    CHECK(room[0] == 3);
    CHECK(silent(poller));
  }
}

TEST_CASE(
    "P02 data that came before add is reported, in edge-triggered mode "
    "too") {
  for (const Mode mode :
       {Mode::level, Mode::edge, Mode::oneshot, Mode::exclusive,
        Mode::edge | Mode::oneshot, Mode::edge | Mode::exclusive}) {
    CAPTURE(static_cast<std::uint32_t>(mode));
    const auto ends = make_socketpair();
    send_all(ends.near, "early");
    Poller poller;
    poller.add(ends.far, any, Interest::readable, mode);
    CHECK(one_event(poller).readable());
  }
}

TEST_CASE("P02 modify arms an edge again while the descriptor is ready") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable, Mode::edge);
  send_all(ends.near, "a");
  CHECK(one_event(poller).readable());
  CHECK(silent(poller));
  poller.modify(ends.far, Token{2}, Interest::readable, Mode::edge);
  CHECK(one_event(poller).token() == Token{2});
  CHECK(silent(poller));
}

TEST_CASE(
    "P03 an edge with both interests says writable at each byte that "
    "comes in") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, read_and_write, Mode::edge);
  CHECK(one_event(poller).writable());
  CHECK(silent(poller));
  for (int turn = 0; turn < 2; ++turn) {
    send_all(ends.near, "a");
    const Event event = one_event(poller);
    CHECK(event.readable());
    CHECK(event.writable());
  }
}

TEST_CASE("oneshot: reported once, then never until modify") {
  for (const Mode mode : {Mode::oneshot, Mode::edge | Mode::oneshot}) {
    const auto ends = make_socketpair();
    Poller poller;
    poller.add(ends.far, any, Interest::readable, mode);
    send_all(ends.near, "a");
    CHECK(one_event(poller).readable());
    CHECK(silent(poller));
    send_all(ends.near, "b");
    CHECK(silent(poller));
    poller.modify(ends.far, any, Interest::readable, mode);
    CHECK(one_event(poller).readable());
    CHECK(silent(poller));
  }
}

TEST_CASE("exclusive goes with edge, and reports a half-close as readable") {
  for (const Mode mode : {Mode::exclusive, Mode::edge | Mode::exclusive}) {
    const auto ends = make_socketpair();
    Poller poller;
    poller.add(ends.far, any, read_and_write, mode);
    CHECK(one_event(poller).writable());
    send_all(ends.near, "a");
    CHECK(one_event(poller).readable());
    CHECK(receive_some(ends.far) == "a");
    static_cast<void>(look(poller));
    REQUIRE(::shutdown(ends.near.get(), SHUT_WR) == 0);
    CHECK(one_event(poller).readable());
  }
}

TEST_CASE("P17 what exclusive cannot go with is refused by name") {
  const auto ends = make_socketpair();
  Poller poller;
  const std::string number = std::to_string(ends.far.get());
  const auto text = [&](const char* verb, const char* clash) {
    return "poller: " + std::string(verb) + " descriptor " + number +
           " (Mode::exclusive cannot go with " + clash + "): Invalid argument";
  };

  Thrown thrown = thrown_by([&] {
    poller.add(ends.far, any, Interest::readable,
               Mode::exclusive | Mode::oneshot);
  });
  CHECK(thrown.text == text("add", "Mode::oneshot"));
  CHECK(thrown.error == EINVAL);

  thrown = thrown_by([&] {
    poller.add(ends.far, any, Interest::readable | Interest::priority,
               Mode::exclusive);
  });
  CHECK(thrown.text == text("add", "Interest::priority"));
  CHECK(thrown.error == EINVAL);

  poller.add(ends.far, any, Interest::readable);
  thrown = thrown_by([&] {
    poller.modify(ends.far, any, Interest::readable, Mode::exclusive);
  });
  CHECK(thrown.text == text("modify", "modify: remove and add"));
  CHECK(thrown.error == EINVAL);

  thrown = thrown_by(
      [&] { poller.set(ends.far, any, Interest::readable, Mode::exclusive); });
  CHECK(thrown.text == text("set", "set: remove and add"));
  CHECK(thrown.error == EINVAL);

  // It is watched as it was before.
  send_all(ends.near, "a");
  CHECK(one_event(poller).token() == any);
  CHECK(one_event(poller).token() == any);
}

TEST_CASE(
    "P17 what was added as exclusive cannot be modified, and the message "
    "says why") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable, Mode::exclusive);
  const auto check_refused = [&](const std::string& verb, auto change) {
    CAPTURE(verb);
    const Thrown thrown = thrown_by(change);
    CHECK(thrown.error == EINVAL);
    CHECK(thrown.text.starts_with("poller: " + verb + " descriptor " +
                                  std::to_string(ends.far.get()) + " ("));
    CHECK(contains(thrown.text, "was added with Mode::exclusive"));
    CHECK(thrown.text.ends_with("): Invalid argument"));
  };
  const Token other{2};
  check_refused("modify",
                [&] { poller.modify(ends.far, other, Interest::none); });
  check_refused("set", [&] { poller.set(ends.far, other, Interest::none); });
  check_refused("set",
                [&] { poller.set(ends.far, other, Interest::writable); });

  // It is watched as it was before, until it is removed and added.
  CHECK(silent(poller));
  send_all(ends.near, "a");
  CHECK(one_event(poller).token() == any);
  CHECK(one_event(poller).readable());
  CHECK(poller.remove(ends.far));
  CHECK(silent(poller));
  poller.set(ends.far, other, Interest::readable);
  CHECK(one_event(poller).token() == other);
}

// ---------------------------------------------------------------------------
// Adding, modifying, removing
// ---------------------------------------------------------------------------

TEST_CASE("P07 adding twice, and modifying what was never added, are refused") {
  const auto ends = make_socketpair();
  const std::string number = std::to_string(ends.far.get());
  Poller poller;

  Thrown thrown =
      thrown_by([&] { poller.modify(ends.far, any, Interest::readable); });
  CHECK(thrown.error == ENOENT);
  CHECK(thrown.text == "poller: modify descriptor " + number +
                           " (it was never added: add or set it): "
                           "No such file or directory");

  poller.add(ends.far, any, Interest::readable);
  thrown = thrown_by([&] { poller.add(ends.far, any, Interest::readable); });
  CHECK(thrown.error == EEXIST);
  CHECK(thrown.text == "poller: add descriptor " + number +
                           " (it was added before: modify or set it): "
                           "File exists");
}

TEST_CASE("P07 remove tells whether it knew the descriptor") {
  const auto ends = make_socketpair();
  Poller poller;
  CHECK_FALSE(poller.remove(ends.far));
  poller.add(ends.far, any, Interest::writable);
  CHECK(one_event(poller).writable());
  CHECK(poller.remove(ends.far));
  CHECK(silent(poller));
  CHECK_FALSE(poller.remove(ends.far));
  CHECK_FALSE(poller.remove(FdView{-1}));
}

TEST_CASE("set adds what was not added and modifies what was") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.set(ends.far, Token{1}, Interest::readable);
  CHECK(silent(poller));
  poller.set(ends.far, Token{2}, Interest::writable);
  const Event event = one_event(poller);
  CHECK(event.token() == Token{2});
  CHECK(event.writable());
  poller.set(ends.far, Token{2}, Interest::none);
  CHECK(silent(poller));
}

TEST_CASE("set passes other errors on") {
  Poller poller;
  const Thrown thrown =
      thrown_by([&] { poller.set(FdView{-1}, any, Interest::readable); });
  CHECK(thrown.error == EBADF);
  CHECK(contains(thrown.text, "poller: set descriptor -1 (it is not open)"));
}

TEST_CASE("P08 a regular file or directory is refused with a hint") {
  Poller poller;
  const Fd directory{::open(".", O_RDONLY | O_CLOEXEC)};
  const Fd file{::open("/proc/self/exe", O_RDONLY | O_CLOEXEC)};
  REQUIRE(directory);
  REQUIRE(file);
  for (const Fd* const fd : {&directory, &file}) {
    const Thrown thrown =
        thrown_by([&] { poller.add(*fd, any, Interest::readable); });
    CHECK(thrown.error == EPERM);
    CHECK(thrown.text == "poller: add descriptor " + std::to_string(fd->get()) +
                             " (a regular file or the like is always ready: do "
                             "not add it, just read or write it): "
                             "Operation not permitted");
  }
}

TEST_CASE("a poller that was moved from says that it is of no use") {
  Poller former;
  const Poller poller{std::move(former)};
  // NOLINTNEXTLINE(bugprone-use-after-move)
  const Thrown thrown = thrown_by([&] { former.wait(); });
  CHECK(thrown.error == EBADF);
  CHECK(thrown_by([&] { former.wait(1ms); }).error == EBADF);
}

TEST_CASE("a timeout that is not a number only looks") {
  Poller poller;
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK(poller.wait(std::chrono::duration<double>(nan)).empty());
  using Sevenths = std::chrono::duration<double, std::ratio<1, 7>>;
  CHECK(poller.wait(Sevenths(nan)).empty());
}

TEST_CASE("P08 a poller cannot watch itself, but another one it can") {
  Poller inner;
  Poller outer;
  const Thrown thrown =
      thrown_by([&] { inner.add(inner, any, Interest::readable); });
  CHECK(thrown.error == EINVAL);
  CHECK(contains(thrown.text, "it is this poller itself"));

  const auto ends = make_pipe();
  inner.add(ends.far, any, Interest::readable);
  outer.add(inner, Token{7}, Interest::readable);
  CHECK(silent(outer));
  send_all(ends.near, "a");
  CHECK(one_event(outer).token() == Token{7});
}

TEST_CASE("P17 a poller that is added as exclusive is refused with a hint") {
  Poller inner;
  Poller outer;
  const auto refused = [&] {
    outer.add(inner, any, Interest::readable, Mode::exclusive);
  };
  const Thrown thrown = thrown_by(refused);
  CHECK(thrown.error == EINVAL);
  CHECK(thrown.text.starts_with("poller: add descriptor " +
                                std::to_string(FdView(inner).get()) + " ("));
  CHECK(contains(thrown.text, "or another one with Mode::exclusive"));
  outer.add(inner, any, Interest::readable);
}

TEST_CASE("P08 pollers in a circle, or too deep, are refused with a hint") {
  const auto check_refused = [](const Thrown& thrown, const Poller& watched) {
    CHECK(thrown.error == ELOOP);
    CHECK(thrown.text.starts_with("poller: add descriptor " +
                                  std::to_string(FdView(watched).get()) +
                                  " (pollers would watch each other"));
    CHECK(contains(thrown.text, "in a circle"));
    CHECK(contains(thrown.text, "deep"));
  };
  Poller inner;
  Poller outer;
  outer.add(inner, any, Interest::readable);
  check_refused(thrown_by([&] { inner.add(outer, any, Interest::readable); }),
                outer);

  // Each is watched by the next one, as far as the kernel goes.
  std::array<Poller, 10> chain;
  Thrown thrown;
  std::size_t last = 0;
  while (thrown.error == 0 && last + 1 < chain.size()) {
    thrown = thrown_by([&] {
      chain.at(last + 1).add(chain.at(last), any, Interest::readable);
    });
    if (thrown.error == 0) ++last;
  }
  check_refused(thrown, chain.at(last));
}

TEST_CASE("a descriptor that is not open is refused with a hint") {
  Poller poller;
  const Thrown thrown =
      thrown_by([&] { poller.add(FdView{-1}, any, Interest::readable); });
  CHECK(thrown.error == EBADF);
  CHECK(thrown.text ==
        "poller: add descriptor -1 (it is not open): Bad file descriptor");
}

TEST_CASE("a full kernel table is refused with the name of its limit") {
  const auto ends = make_pipe();
  Poller poller;
  spy::reset();
  spy::refuse_control = ENOSPC;
  const Thrown thrown =
      thrown_by([&] { poller.add(ends.far, any, Interest::readable); });
  const std::error_code code =
      poller.try_add(ends.far, any, Interest::readable);
  spy::reset();
  CHECK(thrown.error == ENOSPC);
  CHECK(contains(thrown.text, "fs.epoll.max_user_watches"));
  CHECK(code == std::errc::no_space_on_device);
}

TEST_CASE("try_add returns the error instead of throwing it") {
  const auto ends = make_pipe();
  Poller poller;
  CHECK_FALSE(poller.try_add(ends.far, any, Interest::readable));
  send_all(ends.near, "a");
  CHECK(one_event(poller).readable());
  CHECK(poller.try_add(ends.far, any, Interest::readable) ==
        std::errc::file_exists);
  CHECK(poller.try_add(FdView{-1}, any, Interest::readable) ==
        std::errc::bad_file_descriptor);
  CHECK(poller.try_add(ends.near, any, Interest::readable,
                       Mode::exclusive | Mode::oneshot) ==
        std::errc::invalid_argument);
  static_assert(noexcept(poller.try_add(ends.far, any, Interest::readable)));
}

TEST_CASE(
    "P04 a descriptor that was removed before closing is silent, though "
    "a duplicate lives") {
  const auto ends = make_pipe();
  send_all(ends.near, "a");
  Poller poller;

  Fd forgotten{::dup(ends.far.get())};
  poller.add(forgotten, any, Interest::readable);
  forgotten.reset();
  CHECK(one_event(poller).readable());  // and nobody can switch it off

  Poller tidy;
  Fd removed{::dup(ends.far.get())};
  tidy.add(removed, any, Interest::readable);
  CHECK(tidy.remove(removed));
  removed.reset();
  CHECK(silent(tidy));
}

namespace {

// A process that does nothing but hold a copy of every descriptor which was
// open when it was made.
class Bystander {
 public:
  Bystander() : pid_(::fork()) {
    REQUIRE(pid_ >= 0);
    if (pid_ != 0) return;
    ::alarm(60);
    for (;;) ::pause();
  }
  ~Bystander() { end(); }
  Bystander(const Bystander&) = delete;
  Bystander& operator=(const Bystander&) = delete;

  // Returns when its descriptors are closed.
  void end() {
    if (pid_ < 0) return;
    ::kill(pid_, SIGKILL);
    while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) continue;
    pid_ = -1;
  }

 private:
  ::pid_t pid_;
};

}  // namespace

TEST_CASE(
    "P05 a descriptor that was closed without remove is reported as long as "
    "a child process has a copy") {
  auto ends = make_pipe();
  send_all(ends.near, "a");
  Poller poller;
  poller.add(ends.far, any, Interest::readable);
  Bystander child;
  const int number = ends.far.get();
  ends.far.reset();
  for (int turn = 0; turn < 3; ++turn) CHECK(one_event(poller).token() == any);
  CHECK_FALSE(poller.remove(FdView{number}));  // it has no name here any more
  CHECK(one_event(poller).token() == any);
  child.end();
  CHECK(silent(poller));
}

TEST_CASE(
    "P05 a descriptor that was removed before closing is silent, though a "
    "child process has a copy") {
  auto ends = make_pipe();
  send_all(ends.near, "a");
  Poller poller;
  poller.add(ends.far, any, Interest::readable);
  const Bystander child;
  CHECK(poller.remove(ends.far));
  ends.far.reset();
  CHECK(silent(poller));
}

TEST_CASE(
    "P05 what a child adds to an inherited poller, its parent is told; what "
    "it adds to one of its own, nobody else") {
  const auto ends = make_pipe();
  send_all(ends.near, "a");
  Poller poller;

  int code = run_in_child([&] {
    poller = Poller();
    poller.add(ends.far, Token{7}, Interest::readable);
    return one_event(poller).token() == Token{7} ? 0 : 1;
  });
  CHECK(code == 0);
  CHECK(silent(poller));

  code = run_in_child([&] {
    poller.add(ends.far, Token{8}, Interest::readable);
    return 0;
  });
  CHECK(code == 0);
  CHECK(one_event(poller).token() == Token{8});
}

TEST_CASE("P06 a stale event of the same batch names a token that nobody has") {
  std::map<Token, Ends> clients;
  Poller poller;
  for (const Token token : {Token{1}, Token{2}}) {
    clients[token] = make_pipe();
    send_all(clients[token].near, "a");
    poller.add(clients[token].far, token, Interest::readable);
  }
  const Events batch = poller.wait(patience);
  REQUIRE(batch.size() == 2);

  // The first event's handler ends the second's client, and a new client comes
  // who gets the same descriptor number.
  const Token stale = batch[1].token();
  const int number = clients[stale].far.get();
  CHECK(poller.remove(clients[stale].far));
  clients.erase(stale);
  const Token fresh{3};
  clients[fresh] = make_pipe();
  REQUIRE((clients[fresh].far.get() == number ||
           clients[fresh].near.get() == number));
  poller.add(clients[fresh].far, fresh, Interest::readable);

  CHECK(batch[1].token() == stale);
  CHECK(clients.count(batch[1].token()) == 0);
  CHECK(tokens(look(poller)) ==
        Tokens{static_cast<std::uint64_t>(batch[0].token())});
}

// ---------------------------------------------------------------------------
// Ends
// ---------------------------------------------------------------------------

TEST_CASE("P09 interest in nothing still reports a hang-up, until removed") {
  auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::none);
  send_all(ends.near, "a");
  CHECK(silent(poller));
  ends.near.reset();
  const Event event = one_event(poller);
  CHECK(event.bits() == EPOLLHUP);
  CHECK(event.hang_up());
  CHECK(event.writable());
  CHECK(write(ends.far, "a").error == EPIPE);
  CHECK(one_event(poller).hang_up());
  CHECK(poller.remove(ends.far));
  CHECK(silent(poller));
}

TEST_CASE(
    "P09 a oneshot that has fired reports not even a hang-up, until "
    "modify") {
  auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable, Mode::oneshot);
  send_all(ends.near, "a");
  CHECK(one_event(poller).readable());
  ends.near.reset();
  CHECK(silent(poller));
  poller.modify(ends.far, any, Interest::none, Mode::oneshot);
  CHECK(one_event(poller).hang_up());
}

TEST_CASE("P10 the end of a pipe is a hang-up without data, and is readable") {
  auto ends = make_pipe();
  Poller poller;
  poller.add(ends.far, any, Interest::readable);
  ends.near.reset();
  const Event event = one_event(poller);
  CHECK(event.bits() == EPOLLHUP);
  CHECK(event.readable());
  CHECK(event.hang_up());
  CHECK(event.read_closed());
  CHECK_FALSE(event.error());
  char room[1];
  CHECK(read(ends.far, room).end_of_stream());
}

TEST_CASE("P10 a pipe that nobody reads is writable, with an error") {
  auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::none);
  ends.far.reset();
  const Event event = one_event(poller);
  CHECK(event.bits() == EPOLLERR);
  CHECK(event.writable());
  CHECK(event.readable());
  CHECK(event.error());
  CHECK_FALSE(event.hang_up());
  CHECK(write(event.error() ? ends.near : ends.far, "a").error == EPIPE);
}

TEST_CASE(
    "P11 a half-close is readable and not a hang-up; unread data comes "
    "first and writing goes on") {
  const auto ends = make_tcp();
  Poller poller;
  poller.add(ends.near, any, read_and_write);
  send_all(ends.far, "abc");
  REQUIRE(::shutdown(ends.far.get(), SHUT_WR) == 0);
  REQUIRE(becomes(ends.near, POLLRDHUP));
  const Event event = one_event(poller);
  CHECK(event.readable());
  CHECK(event.writable());
  CHECK(event.read_closed());
  CHECK_FALSE(event.hang_up());
  CHECK_FALSE(event.error());

  char room[8];
  CHECK(read(ends.near, room).bytes == 3);
  CHECK(read(ends.near, room).end_of_stream());
  CHECK(write(ends.near, "still here").bytes == 10);
  CHECK(receive(ends.far, 10) == "still here");
}

TEST_CASE("P11 a half-close alone, all data read, is reported as readable") {
  const auto ends = make_socketpair();
  Poller poller;
  poller.add(ends.far, any, Interest::readable);
  REQUIRE(::shutdown(ends.near.get(), SHUT_WR) == 0);
  const Event event = one_event(poller);
  CHECK(event.bits() == (EPOLLIN | EPOLLRDHUP));
  CHECK(event.readable());
  CHECK(event.read_closed());
}

TEST_CASE(
    "P12 an urgent byte is priority, never readable, and only reported "
    "to those who asked") {
  const auto ends = make_tcp();
  Poller poller;
  poller.add(ends.near, any, Interest::readable | Interest::priority);
  REQUIRE(::send(ends.far.get(), "!", 1, MSG_OOB) == 1);
  const Event event = one_event(poller);
  CHECK(event.priority());
  CHECK_FALSE(event.readable());
  CHECK_FALSE(event.writable());
  poller.modify(ends.near, any, Interest::readable);
  CHECK(silent(poller));
}

TEST_CASE(
    "P13 a reset is readable and writable, with an error, a hang-up and "
    "a closed reading side") {
  auto ends = make_tcp();
  Poller poller;
  poller.add(ends.near, any, Interest::none);
  reset_connection(ends.far);
  const Event event = one_event(poller);
  CHECK(event.bits() == (EPOLLERR | EPOLLHUP));
  CHECK(event.readable());
  CHECK(event.writable());
  CHECK(event.error());
  CHECK(event.hang_up());
  CHECK(event.read_closed());
}

// ---------------------------------------------------------------------------
// Batches
// ---------------------------------------------------------------------------

TEST_CASE("P14 a batch of 2 with 6 ready ones takes them in turn") {
  std::vector<Ends> pipes;
  Poller poller{2};
  for (std::uint64_t number = 1; number <= 6; ++number) {
    pipes.push_back(make_pipe());
    send_all(pipes.back().near, "a");
    poller.add(pipes.back().far, Token{number}, Interest::readable);
  }
  for (int round = 0; round < 6; ++round) {
    wait_coarsely(round >= 3);
    Tokens seen;
    for (int turn = 0; turn < 3; ++turn) {
      const Events events = look(poller);
      CHECK(events.size() == 2);
      seen.merge(tokens(events));
    }
    CHECK(seen == Tokens{1, 2, 3, 4, 5, 6});
  }
  spy::reset();
}

TEST_CASE("a batch holds up to as many events as was said, 256 by default") {
  std::vector<Fd> events;
  Poller poller;
  Poller small{1};
  for (std::uint64_t number = 0; number < 300; ++number) {
    events.push_back(make_pipe().near);
    poller.add(events.back(), Token{number}, Interest::writable);
    small.add(events.back(), Token{number}, Interest::writable);
  }
  for (const bool coarsely : {false, true}) {
    CAPTURE(coarsely);
    wait_coarsely(coarsely);
    CHECK(look(poller).size() == 256);
    CHECK(look(small).size() == 1);
    if (coarsely) CHECK(spy::coarse_waits == 2);
  }
  CHECK(poller.wait().size() == 256);
  CHECK(small.wait().size() == 1);
  spy::reset();
}

TEST_CASE(
    "a batch of no events, or of more than the kernel allows, is "
    "refused") {
  Thrown thrown = thrown_by([] { const Poller poller{0}; });
  CHECK(thrown.error == EINVAL);
  CHECK(thrown.text ==
        "create a poller with a batch of 0 events: Invalid argument");
  const std::size_t most = INT_MAX / sizeof(::epoll_event);
  thrown = thrown_by([&] { const Poller poller{most + 1}; });
  CHECK(thrown.error == EINVAL);
}

TEST_CASE("a poller for which there is no descriptor says so") {
  const int code = run_in_child([] {
    const ::rlimit none{0, 0};
    ::setrlimit(RLIMIT_NOFILE, &none);
    const Thrown thrown = thrown_by([] { const Poller poller; });
    return thrown.text == "create a poller: Too many open files" ? 0 : 1;
  });
  CHECK(code == 0);
}

TEST_CASE("a poller moves, with what it watches") {
  const auto ends = make_pipe();
  Poller first;
  first.add(ends.near, any, Interest::writable);
  Poller second{std::move(first)};
  CHECK(one_event(second).token() == any);
}

namespace {

// A poller that watches as many pipes, all of them ready.
struct Busy {
  explicit Busy(std::uint64_t count) {
    for (std::uint64_t number = 1; number <= count; ++number) {
      pipes.push_back(make_pipe());
      poller.add(pipes.back().near, Token{number}, Interest::writable);
    }
  }
  std::vector<Ends> pipes{};
  Poller poller{};
};

}  // namespace

TEST_CASE("P33 a poller may be moved while its events are walked through") {
  Busy busy{5};
  Poller second;
  Tokens seen;
  for (const Event& event : busy.poller.wait(patience)) {
    if (seen.empty()) {
      Poller first{std::move(busy.poller)};
      second = std::move(first);
    }
    seen.insert(static_cast<std::uint64_t>(event.token()));
  }
  CHECK(seen == Tokens{1, 2, 3, 4, 5});
  CHECK(look(second).size() == 5);
}

TEST_CASE("P33 a wait within a walk through another poller's events is fine") {
  Busy outer{5};
  Busy inner{3};
  Tokens seen;
  for (const Event& event : outer.poller.wait(patience)) {
    CHECK(tokens(inner.poller.wait(patience)) == Tokens{1, 2, 3});
    seen.insert(static_cast<std::uint64_t>(event.token()));
  }
  CHECK(seen == Tokens{1, 2, 3, 4, 5});
}

// A program that does this loses events, for the second batch overwrites the
// first. But it reads no memory that is not the batch's; ASan watches.
TEST_CASE(
    "P33 a wait within a walk through the same poller's events puts the new "
    "ones in their place") {
  Busy busy{5};
  int turns = 0;
  for (const Event& event : busy.poller.wait(patience)) {
    CHECK(event.token() != Token{0});
    for (std::uint64_t number = 1; number <= 5; ++number)
      busy.poller.set(busy.pipes[static_cast<std::size_t>(number - 1)].near,
                      Token{number + 100},
                      number <= 2 ? Interest::writable : Interest::none);
    CHECK(tokens(busy.poller.wait(patience)) == Tokens{101, 102});
    if (turns < 2) CHECK(event.token() > Token{100});
    if (turns >= 2) CHECK(event.token() <= Token{5});
    ++turns;
  }
  CHECK(turns == 5);
}

TEST_CASE("waiting, adding, modifying and removing allocate nothing") {
  const auto ends = make_pipe();
  Poller poller;
  const allocation_count::Since start;
  poller.add(ends.near, any, Interest::writable);
  const std::size_t ready = look(poller).size();
  poller.modify(ends.near, any, Interest::none);
  const std::size_t none = poller.wait(1ms).size();
  poller.remove(ends.near);
  poller.set(ends.near, any, Interest::writable);
  const std::size_t again = poller.wait().size();
  CHECK(start.allocations() == 0);
  CHECK(ready == 1);
  CHECK(none == 0);
  CHECK(again == 1);
}

// ---------------------------------------------------------------------------
// Time
// ---------------------------------------------------------------------------

TEST_CASE("P20 a wait is never early, and is one system call") {
  for (const bool coarsely : {false, true}) {
    CAPTURE(coarsely);
    Poller poller;
    for (const nanoseconds timeout : {nanoseconds{1}, nanoseconds{300us},
                                      nanoseconds{1ms}, nanoseconds{1'700us}}) {
      wait_coarsely(coarsely);
      CAPTURE(timeout.count());
      int early = 0;
      for (int turn = 0; turn < 200; ++turn) {
        const auto start = Clock::now();
        const bool none = poller.wait(timeout).empty();
        if (!none || Clock::now() - start < timeout) ++early;
      }
      CHECK(early == 0);
      // A busy loop would show up here.
      CHECK((coarsely ? spy::coarse_waits : spy::precise_waits) == 200);
    }
  }
  spy::reset();
}

TEST_CASE(
    "P20 a wait of 30 ms is one system call that takes no processor "
    "time") {
  for (const bool coarsely : {false, true}) {
    Poller poller;
    wait_coarsely(coarsely);
    static_cast<void>(look(poller));  // finds out which call there is
    spy::precise_waits = spy::coarse_waits = 0;
    const std::clock_t before = std::clock();
    const auto start = Clock::now();
    CHECK(poller.wait(30ms).empty());
    CHECK(Clock::now() - start >= 30ms);
    CHECK(waits() == 1);
    CHECK(std::clock() - before < CLOCKS_PER_SEC / 50);
  }
  spy::reset();
}

TEST_CASE(
    "P20 the kernel is given the nanoseconds, or milliseconds rounded "
    "up") {
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::writable);
  spy::reset();
  for (const nanoseconds timeout :
       {0ns, 1ns, nanoseconds{999'999'999}, nanoseconds{1s},
        nanoseconds{3'000'000'007}}) {
    CHECK(poller.wait(timeout).size() == 1);
    CHECK(spy::limit == timeout);
  }
  CHECK(spy::coarse_waits == 0);

  spy::refuse_precise = ENOSYS;
  const std::pair<nanoseconds, nanoseconds> rounded[] = {{0ns, 0ns},
                                                         {1ns, 1ms},
                                                         {1ms, 1ms},
                                                         {1'000'001ns, 2ms},
                                                         {999'999'999ns, 1s}};
  for (const auto& [timeout, limit] : rounded) {
    CHECK(poller.wait(timeout).size() == 1);
    CHECK(spy::limit == limit);
  }
  spy::reset();
}

TEST_CASE("a timeout of zero or less only looks") {
  for (const bool coarsely : {false, true}) {
    const auto ends = make_pipe();
    Poller poller;
    for (const nanoseconds timeout :
         {0ns, -1ns, nanoseconds{-5s}, nanoseconds::min()}) {
      wait_coarsely(coarsely);
      CHECK(poller.wait(timeout).empty());
      CHECK(spy::limit == 0ns);
    }
    for (const auto timeout :
         {std::chrono::seconds::min(),
          std::chrono::seconds::min() + std::chrono::seconds{633402445}}) {
      wait_coarsely(coarsely);
      CHECK(poller.wait(timeout).empty());
      CHECK(spy::limit == 0ns);
    }
    CHECK(poller.wait(std::chrono::hours::min()).empty());
    poller.add(ends.near, any, Interest::writable);
    CHECK(poller.wait(nanoseconds::min()).size() == 1);
    CHECK(poller.wait(std::chrono::duration<int, std::pico>{1}).size() == 1);
  }
  spy::reset();
}

TEST_CASE(
    "P20 a timeout of more than a century waits for ever, whatever its "
    "unit") {
  for (const bool coarsely : {false, true}) {
    const auto ends = make_pipe();
    Poller poller;
    poller.add(ends.near, any, Interest::writable);
    wait_coarsely(coarsely);
    const auto waits_for_ever = [&](auto timeout) {
      spy::limit = {};
      return poller.wait(timeout).size() == 1 && spy::limit == spy::forever;
    };
    CHECK(waits_for_ever(nanoseconds::max()));
    CHECK(waits_for_ever(std::chrono::microseconds::max()));
    CHECK(waits_for_ever(std::chrono::milliseconds::max()));
    CHECK(waits_for_ever(std::chrono::seconds::max()));
    CHECK(waits_for_ever(std::chrono::hours::max()));
    CHECK(waits_for_ever(std::chrono::duration<double>{1e300}));
    CHECK(waits_for_ever(24h * 36525 + 1s));
    CHECK(waits_for_ever(std::chrono::days::max()));
    CHECK(poller.wait_until(Clock::time_point::max()).size() == 1);
    CHECK(spy::limit == spy::forever);
    CHECK(poller.wait(24h * 36525).size() == 1);
    CHECK(spy::limit > 0ns);
  }
  spy::reset();
}

TEST_CASE("P20 a timeout finer than nanoseconds is rounded up, too") {
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::writable);
  spy::reset();
  CHECK(poller.wait(std::chrono::duration<double, std::nano>{1.25}).size() ==
        1);
  CHECK(spy::limit == 2ns);
}

namespace {

// Units that no number of nanoseconds makes up: the frames of sound, and one
// that hardly anybody has.
using Frames = std::chrono::duration<std::int64_t, std::ratio<1, 44'100>>;
using Sevenths = std::chrono::duration<std::int64_t, std::ratio<1, 7>>;

nanoseconds time_left(const Timer& timer) {
  ::itimerspec times{};
  REQUIRE(::timerfd_gettime(FdView(timer).get(), &times) == 0);
  return std::chrono::seconds{times.it_value.tv_sec} +
         nanoseconds{times.it_value.tv_nsec};
}

}  // namespace

TEST_CASE("P20 a timeout in frames or sevenths of a second is never early") {
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::writable);
  spy::reset();
  const auto limit_of = [&](auto timeout) {
    REQUIRE(poller.wait(timeout).size() == 1);
    return spy::limit;
  };
  for (std::int64_t count = 1; count < 2000; ++count) {
    CAPTURE(count);
    const auto frames = limit_of(Frames{count}).count() * 441;
    REQUIRE(frames >= count * 10'000'000);
    REQUIRE(frames <= count * 10'000'000 + 441);
    const auto sevenths = limit_of(Sevenths{count}).count() * 7;
    REQUIRE(sevenths >= count * 1'000'000'000);
    REQUIRE(sevenths <= count * 1'000'000'000 + 7);
  }
  CHECK(limit_of(Frames{0}) == 0ns);
  CHECK(limit_of(Frames{-1}) == 0ns);
  CHECK(limit_of(Frames::min()) == 0ns);

  for (const bool coarsely : {false, true}) {
    wait_coarsely(coarsely);
    Poller idle;
    Timer timer;
    for (int turn = 0; turn < 5; ++turn) {
      auto start = Clock::now();
      CHECK(idle.wait(Frames{441}).empty());
      CHECK(Clock::now() - start >= 10ms);
      start = Clock::now();
      timer.expire_after(Frames{441});
      CHECK(becomes_readable(timer));
      CHECK(Clock::now() - start >= 10ms);
    }
  }
  spy::reset();
}

TEST_CASE("P20 a timeout of years in frames or sevenths overflows nowhere") {
  constexpr auto day = std::chrono::hours{24};
  constexpr std::int64_t day_in_frames = std::int64_t{86'400} * 44'100;
  constexpr std::int64_t day_in_sevenths = std::int64_t{86'400} * 7;
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::writable);
  Timer timer;
  const auto about = [](nanoseconds time, nanoseconds wanted) {
    return time >= wanted && time <= wanted + 1us;
  };
  const auto check_both = [&](auto timeout, nanoseconds wanted) {
    spy::reset();
    CHECK(poller.wait(timeout).size() == 1);
    CHECK(about(spy::limit, wanted));
    spy::refuse_precise = ENOSYS;
    Poller coarse;
    coarse.add(ends.near, any, Interest::writable);
    CHECK(coarse.wait(timeout).size() == 1);
    spy::reset();

    timer.expire_after(timeout);
    CHECK(time_left(timer) > wanted - patience);
    CHECK(time_left(timer) <= wanted + 1us);
    timer.expire_every(timeout);
    CHECK(time_left(timer) > wanted - patience);
    CHECK(time_left(timer) <= wanted + 1us);
  };
  check_both(Frames{250 * day_in_frames}, 250 * day);
  check_both(Sevenths{18'263 * day_in_sevenths}, 18'263 * day);  // 50 years
  check_both(Frames{36'500 * day_in_frames}, 36'500 * day);

  CHECK(poller.wait(Frames::max()).size() == 1);
  CHECK(spy::limit == spy::forever);
}

TEST_CASE(
    "P20 a timeout of more milliseconds than an int holds is waited for "
    "in parts") {
  const auto ends = make_pipe();
  Poller poller;
  poller.add(ends.near, any, Interest::writable);
  spy::reset();
  spy::refuse_precise = ENOSYS;
  spy::elapse_at_once = true;  // as if 24 days had gone by
  CHECK(poller.wait(24h * 60).size() == 1);
  CHECK(spy::coarse_waits == 2);
  CHECK(spy::limit == nanoseconds{std::chrono::milliseconds{INT_MAX}});

  // What an int holds is waited for in one.
  spy::elapse_at_once = true;
  CHECK(poller.wait(std::chrono::milliseconds{INT_MAX}).empty());
  spy::reset();
}

TEST_CASE(
    "wait_until waits up to a point in time, and one in the past only "
    "looks") {
  const auto ends = make_pipe();
  Poller poller;
  spy::reset();
  for (const Clock::time_point past :
       {Clock::time_point::min(), Clock::time_point{}, Clock::now() - 1ns}) {
    CHECK(poller.wait_until(past).empty());
    CHECK(spy::limit == 0ns);
  }
  const auto deadline = Clock::now() + 20ms;
  CHECK(poller.wait_until(deadline).empty());
  CHECK(Clock::now() >= deadline);

  poller.add(ends.near, any, Interest::writable);
  CHECK(poller.wait_until(Clock::time_point::min()).size() == 1);
  CHECK(poller.wait_until(Clock::now() + patience).size() == 1);
}

TEST_CASE("P20 a kernel or sandbox without epoll_pwait2 is asked for it once") {
  for (const int error : {ENOSYS, EPERM}) {
    const auto ends = make_pipe();
    Poller poller;
    poller.add(ends.near, any, Interest::writable);
    spy::reset();
    spy::refuse_precise = error;
    for (int turn = 1; turn <= 3; ++turn) {
      CHECK(poller.wait(patience).size() == 1);
      CHECK(spy::limit == patience);
      CHECK(spy::precise_waits == 1);
      CHECK(spy::coarse_waits == turn);
    }
  }
  spy::reset();
}

namespace {

// As an old container runtime does: the kernel has the call and the sandbox
// refuses it. False where this process may not install a filter.
bool forbid_precise_waits(unsigned error) {
  ::sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_epoll_pwait2, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | error),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const ::sock_fprog filter{4, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

int wait_in_a_sandbox(unsigned error) {
  if (!forbid_precise_waits(error)) return 77;
  const auto ends = make_pipe();
  Poller poller;
  for (int turn = 0; turn < 50; ++turn) {
    const auto start = Clock::now();
    if (!poller.wait(300us).empty()) return 1;
    if (Clock::now() - start < 300us) return 2;
  }
  poller.add(ends.near, any, Interest::writable);
  if (poller.wait().size() != 1) return 3;
  return spy::precise_waits == 1 ? 0 : 4;
}

}  // namespace

TEST_CASE("P20 waiting works in a sandbox that refuses epoll_pwait2") {
  for (const unsigned error : {unsigned{ENOSYS}, unsigned{EPERM}}) {
    spy::reset();
    const int code = run_in_child([=] { return wait_in_a_sandbox(error); });
    if (code == 77) {
      MESSAGE("skipped: no seccomp filter can be installed here");
    } else {
      CHECK(code == 0);
    }
  }
}

TEST_CASE("P21 signals neither cut a wait short nor prolong it") {
  for (const bool coarsely : {false, true}) {
    for (const int flags : {0, SA_RESTART}) {
      CAPTURE(coarsely);
      CAPTURE(flags);
      Poller poller;
      wait_coarsely(coarsely);
      const auto start = Clock::now();
      std::size_t events = 0;
      int signals = 0;
      {
        const Interruptions every_few_milliseconds{flags};
        events = poller.wait(100ms).size();
        signals = Interruptions::count();
      }
      const auto took = Clock::now() - start;
      CHECK(events == 0);
      CHECK(signals >= 5);
      // A signal is no reason to give the precise call up.
      CHECK((coarsely ? spy::precise_waits : spy::coarse_waits) ==
            (coarsely ? 1 : 0));
      CHECK(took >= 100ms);
      CHECK(took < 4s);  // every signal prolonging it would make that 5
    }
  }
  spy::reset();
}

TEST_CASE("P21 a signal that comes when time is up leaves a last look") {
  for (const bool coarsely : {false, true}) {
    Poller poller;
    wait_coarsely(coarsely);
    spy::interrupt_late = true;
    CHECK(poller.wait(1ms).empty());
    CHECK(spy::limit == 0ns);
  }
  spy::reset();
}

TEST_CASE(
    "P21 signals do not end a wait without a limit, nor one beyond the "
    "end of the clock") {
  for (const bool coarsely : {false, true}) {
    for (const auto timeout : {spy::forever, nanoseconds::max()}) {
      CAPTURE(coarsely);
      const auto ends = make_pipe();
      Poller poller;
      poller.add(ends.far, any, Interest::readable);
      wait_coarsely(coarsely);
      const Interruptions every_few_milliseconds{0};
      std::thread writer([&] {
        block_interruptions();
        const auto limit = Clock::now() + patience;
        while (Interruptions::count() < 10 && Clock::now() < limit)
          std::this_thread::sleep_for(1ms);
        static_cast<void>(!::write(ends.near.get(), "a", 1));
      });
      const std::size_t events = timeout == spy::forever
                                     ? poller.wait().size()
                                     : poller.wait(timeout).size();
      writer.join();
      CHECK(events == 1);
      CHECK(waits() > 2);
    }
  }
  spy::reset();
}

TEST_CASE("a wait that fails for any other reason throws") {
  for (const bool coarsely : {false, true}) {
    for (const bool limited : {false, true}) {
      Poller poller;
      wait_coarsely(coarsely);
      ::close(FdView{poller}.get());
      const Thrown thrown = thrown_by([&] {
        static_cast<void>(limited ? poller.wait(1s) : poller.wait());
      });
      CHECK(thrown.error == EBADF);
      CHECK(thrown.text == "poller: wait: Bad file descriptor");
    }
  }
  spy::reset();
}

// ---------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------

namespace {

// Runs `change` on another thread once this one has begun to wait, and returns
// what the wait reported.
template <class Change>
Tokens wait_during(Poller& poller, Change change) {
  spy::reset();
  std::thread other([&] {
    while (waits() == 0) std::this_thread::yield();
    std::this_thread::sleep_for(5ms);  // from the call into the kernel
    change();
  });
  const Tokens reported = tokens(poller.wait(patience));
  other.join();
  CHECK(spy::precise_waits == 1);
  return reported;
}

}  // namespace

TEST_CASE(
    "add, modify, set and remove from another thread take effect in a "
    "wait") {
  const auto first = make_pipe();
  const auto second = make_pipe();
  Poller poller;
  CHECK(wait_during(poller, [&] {
          poller.add(first.near, Token{1}, Interest::writable);
        }) == Tokens{1});

  poller.modify(first.near, Token{1}, Interest::none);
  CHECK(wait_during(poller, [&] {
          poller.modify(first.near, Token{2}, Interest::writable);
        }) == Tokens{2});

  poller.set(first.near, Token{2}, Interest::none);
  CHECK(wait_during(poller, [&] {
          poller.set(first.near, Token{3}, Interest::writable);
        }) == Tokens{3});

  poller.remove(first.near);
  poller.add(first.far, Token{4}, Interest::readable);
  poller.add(second.far, Token{5}, Interest::readable);
  CHECK(wait_during(poller, [&] {
          poller.remove(first.far);
          static_cast<void>(!::write(first.near.get(), "a", 1));
          static_cast<void>(!::write(second.near.get(), "a", 1));
        }) == Tokens{5});
}
