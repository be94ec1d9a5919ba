// edgewise: an epoll toolkit in one header. C++20, Linux, nothing else.
// SPDX-License-Identifier: MIT
//
// It gives you the parts of a single-threaded network server and lets you
// write the loop. There are no callbacks and no framework: whoever reads your
// loop sees your program. A complete server that prints what clients say:
//
//   #include <cstdio>
//   #include <map>
//
//   #include "edgewise.hpp"
//   using namespace edgewise;
//
//   struct Client {
//     Fd socket;
//     LineBuffer lines;
//   };
//
//   int main() {
//     const Fd listener = listen(*Address::parse("127.0.0.1:8080"));
//     std::map<Token, Client> clients;
//     std::uint64_t next = 1;
//     Poller poller;
//     poller.add(listener, Token{0}, Interest::readable);
//     for (;;) {
//       for (const Event& event : poller.wait()) {
//         if (event.token() == Token{0}) {
//           Accepted accepted = accept(listener);
//           if (!accepted.ok()) continue;
//           poller.add(accepted.fd, Token{next}, Interest::readable);
//           clients[Token{next++}].socket = std::move(accepted.fd);
//         }
//         const auto found = clients.find(event.token());
//         if (found == clients.end()) continue;
//         Client& client = found->second;
//         const IoResult result = client.lines.fill(client.socket);
//         while (const auto line = client.lines.next())
//           std::fwrite(line->data(), 1, line->size(), stdout);
//         if (!result.ended()) continue;
//         poller.remove(client.socket);
//         clients.erase(found);
//       }
//     }
//   }
//
// Contents: 1 errors and results   2 Fd     3 Poller   4 Waker, Timer, Signals, Child
//           5 Slab   6 addresses and sockets           7 reading and writing
//           8 LineBuffer, FrameBuffer   9 WriteBuffer  10 BroadcastLog
//
// Conventions that hold everywhere:
// - Setting up throws std::system_error, whose text names the call and what it
//   was about: "listen on 127.0.0.1:8080: Address already in use". Built with
//   -fno-exceptions, the same line goes to standard error and the program
//   aborts.
// - Moving bytes and accepting never throws: would-block and end-of-stream are
//   results, and a result cannot be ignored by accident.
// - EINTR never reaches you, and SIGPIPE never kills you.
// - Every socket is made non-blocking, and every descriptor close-on-exec, by
//   the system call that creates it.
// - Objects of the same type on different threads are independent. One object
//   belongs to one thread at a time, except where its comment says otherwise.
#ifndef EDGEWISE_HPP
#define EDGEWISE_HPP

#define EDGEWISE_VERSION_MAJOR 0
#define EDGEWISE_VERSION_MINOR 1
#define EDGEWISE_VERSION_PATCH 0

#if !defined(__linux__)
  #error "edgewise is a toolkit for epoll, which only Linux has"
#elif __cplusplus < 202002L
  #error "edgewise needs C++20: compile with -std=c++20"
#endif

#include <arpa/inet.h>
#include <fcntl.h>
#include <net/if.h>  // the zone of a link-local IPv6 address
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>  // NOLINT(modernize-deprecated-headers): POSIX's part
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>

namespace edgewise {
inline namespace v0 {

// ===========================================================================
// 1  Errors and results
//
// Two kinds of failure want two answers. A port that is taken ends the set-up, so it is an
// exception. A socket with nothing to read is ordinary, so it is a value that the loop looks at.
// ===========================================================================

namespace detail {

[[noreturn]] inline void fail(int error, std::initializer_list<std::string_view> words) {
  std::string what;
  for (const std::string_view word : words) what += word;
#ifdef __cpp_exceptions
  throw std::system_error(error, std::generic_category(), what);
#else
  std::fprintf(stderr, "%s: %s\n", what.c_str(), std::strerror(error));
  std::abort();
#endif
}

// Repeats a system call that a signal handler has interrupted, and returns what it returned. errno
// is the call's own.
template <class Call>
[[gnu::always_inline]] inline auto retry_on_eintr(Call call) noexcept {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace detail

enum class IoStatus : std::uint8_t {
  ok,             // bytes moved (or there was nothing to move)
  would_block,    // the kernel has nothing more to give, or no more room
  end_of_stream,  // the peer sent FIN: it will send nothing more
  failed,         // see error: a stream is of no more use, a datagram socket may be
};

// What became of an attempt to move bytes. `bytes` counts what was moved before the status came
// about: a flush that sent 5,000 bytes of 9,000 and found the socket full is {5000, would_block}.
struct [[nodiscard]] IoResult {
  std::size_t bytes = 0;
  IoStatus status = IoStatus::ok;
  int error = 0;  // an errno value if the status is failed, else 0

  bool ok() const noexcept { return status == IoStatus::ok; }
  bool would_block() const noexcept { return status == IoStatus::would_block; }
  bool end_of_stream() const noexcept { return status == IoStatus::end_of_stream; }
  bool failed() const noexcept { return status == IoStatus::failed; }

  // Of a stream: nothing more will come, for it has ended or failed.
  bool ended() const noexcept { return end_of_stream() || failed(); }
};

// For a log: "5000 bytes, would block", "end of stream", "failed: Connection reset by peer".
inline std::string to_string(const IoResult& result) {
  std::string text;
  if (result.bytes > 0 || result.ok())
    text = std::to_string(result.bytes) + (result.bytes == 1 ? " byte" : " bytes");
  if (result.ok()) return text;
  if (!text.empty()) text += ", ";
  if (result.would_block()) return text + "would block";
  if (result.end_of_stream()) return text + "end of stream";
  return text + "failed: " + std::strerror(result.error);
}

// ===========================================================================
// 2  Fd                                                          (chapter 01)
//
// In Linux nearly everything that can be waited for is a file descriptor: a small number that
// stands for something in the kernel and must be closed exactly once. Fd makes that the compiler's
// business.
// ===========================================================================

// Owns one descriptor and closes it. Moves, never copies; empty when moved from.
//
// Cost: the size of an int; one close(2).
// Order: take a descriptor out of its Poller before it is closed. The kernel forgets it by itself
// only when its last duplicate is closed, and until then reports events that nobody can switch off
// (epoll(7), questions and answers).
class Fd {
 public:
  Fd() noexcept = default;
  explicit Fd(int descriptor) noexcept : descriptor_(descriptor) {}
  Fd(Fd&& other) noexcept : descriptor_(other.release()) {}
  Fd& operator=(Fd&& other) noexcept {
    reset(other.release());
    return *this;
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  ~Fd() { reset(); }

  int get() const noexcept { return descriptor_; }
  explicit operator bool() const noexcept { return descriptor_ >= 0; }

  // Gives the descriptor away; the caller closes it.
  [[nodiscard]] int release() noexcept { return std::exchange(descriptor_, -1); }

  // Closes the descriptor, if there is one, and owns `next` from now on.
  void reset(int next = -1) noexcept {
    // No retry: on Linux the number is free again even if close says EINTR, and may be somebody
    // else's by the time of a second try. See close(2).
    if (descriptor_ >= 0) ::close(descriptor_);
    descriptor_ = next;
  }

 private:
  int descriptor_ = -1;
};

// A descriptor that somebody else owns: to Fd what string_view is to string. Functions below take
// it, so they accept an Fd as it is and a bare number, such as standard input's, spelled out:
// FdView{STDIN_FILENO}.
class FdView {
 public:
  // NOLINTNEXTLINE(google-explicit-constructor)
  FdView(const Fd& owner) noexcept : descriptor_(owner.get()) {}
  explicit FdView(int descriptor) noexcept : descriptor_(descriptor) {}

  int get() const noexcept { return descriptor_; }

 private:
  int descriptor_;
};

// A pipe: what goes in at `writer` comes out at `reader`. See pipe(7).
struct Pipe {
  Fd reader;
  Fd writer;
};

// Both ends are non-blocking. Throws std::system_error.
[[nodiscard]] inline Pipe open_pipe() {
  std::array<int, 2> ends{};
  if (::pipe2(ends.data(), O_NONBLOCK | O_CLOEXEC) != 0) detail::fail(errno, {"open a pipe"});
  return {Fd{ends[0]}, Fd{ends[1]}};
}

// ===========================================================================
// 3  Poller                                           (chapters 01, 02 and 03)
//
// epoll(7) is a set of descriptors inside the kernel. You say once what you want to know of each
// (your interest) and give it a token; then you ask again and again which of them are ready. An
// answer costs time for the ready ones only, however many are idle.
// ===========================================================================

// Who is ready: 64 bits of your choice, handed back with every event. All values are yours. Never
// give a client a number that a former one had while events of that one may still be on their way;
// counting up is the simplest way.
enum class Token : std::uint64_t {};

// What you want to be told of a descriptor. Combine with |. Errors and hang-ups are reported
// whatever the interest, none included: the kernel insists.
enum class Interest : std::uint32_t {
  none = 0,
  readable = EPOLLIN | EPOLLRDHUP,  // there is something to read, or an end
  writable = EPOLLOUT,              // there is room to write
  priority = EPOLLPRI,              // urgent data (TCP), or a state change
};

// When you are told. Combine with |; exclusive goes with neither oneshot nor Interest::priority,
// and only add and try_add take it.
enum class Mode : std::uint32_t {
  level = 0,                   // at each wait, as long as it is ready
  edge = EPOLLET,              // once each time that something new arrives
  oneshot = EPOLLONESHOT,      // once, then never until modify
  exclusive = EPOLLEXCLUSIVE,  // of several pollers on it, not all are woken
};

constexpr Interest operator|(Interest left, Interest right) noexcept {
  return Interest{static_cast<std::uint32_t>(left) | static_cast<std::uint32_t>(right)};
}

constexpr Mode operator|(Mode left, Mode right) noexcept {
  return Mode{static_cast<std::uint32_t>(left) | static_cast<std::uint32_t>(right)};
}

namespace detail {

template <class Flags>
constexpr bool has(Flags set, Flags part) noexcept {
  return (static_cast<std::uint32_t>(set) & static_cast<std::uint32_t>(part)) != 0;
}

struct FlagName {
  std::uint32_t flag;
  const char* name;
};

inline std::string names_of(std::uint32_t flags, std::initializer_list<FlagName> names) {
  std::string text;
  for (const FlagName& each : names) {
    if ((flags & each.flag) == 0) continue;
    if (!text.empty()) text += ", ";
    text += each.name;
  }
  return text.empty() ? "nothing" : text;
}

}  // namespace detail

// For a log: "readable, writable", and "nothing" for none.
inline std::string to_string(Interest interest) {
  return detail::names_of(static_cast<std::uint32_t>(interest),
                          {{EPOLLIN, "readable"}, {EPOLLOUT, "writable"}, {EPOLLPRI, "priority"}});
}

// For a log: "level-triggered", "edge-triggered, one-shot".
inline std::string to_string(Mode mode) {
  const char* trigger = detail::has(mode, Mode::edge) ? "edge-triggered" : "level-triggered";
  return std::string(trigger) + (detail::has(mode, Mode::oneshot) ? ", one-shot" : "") +
         (detail::has(mode, Mode::exclusive) ? ", exclusive" : "");
}

// One ready descriptor, laid out as the kernel's epoll_event.
//
// An event is a hint of how things stood: by the time you handle it the bytes may be gone, and the
// client too, if an earlier event of the batch removed it. Look tokens up and treat a missing one
// as nothing to do.
class Event {
 public:
  // A copy, because data lies unaligned in the kernel's packed struct.
  Token token() const noexcept { return Token{raw_.data.u64}; }

  // A read would tell something: bytes, an end of stream, or an error. So every end of a connection
  // is met by a read.
  bool readable() const noexcept {
    return (raw_.events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
  }
  // A write would tell something: there is room, or it fails.
  bool writable() const noexcept { return (raw_.events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0; }
  bool priority() const noexcept { return (raw_.events & EPOLLPRI) != 0; }
  // An error is pending: the next read, write or SO_ERROR names it, unless an end of stream came
  // before it.
  bool error() const noexcept { return (raw_.events & EPOLLERR) != 0; }
  // Both directions are closed. There may still be bytes to read.
  bool hang_up() const noexcept { return (raw_.events & EPOLLHUP) != 0; }
  // The peer has finished sending (half-close) and may still read.
  bool read_closed() const noexcept { return (raw_.events & (EPOLLRDHUP | EPOLLHUP)) != 0; }
  std::uint32_t bits() const noexcept { return raw_.events; }

 private:
  friend class Poller;
  ::epoll_event raw_{};
};
static_assert(sizeof(Event) == sizeof(::epoll_event));

// For a log, in the kernel's words: "token 7: readable, read closed".
inline std::string to_string(const Event& event) {
  return "token " + std::to_string(static_cast<std::uint64_t>(event.token())) + ": " +
         detail::names_of(event.bits(), {{EPOLLIN, "readable"},
                                         {EPOLLOUT, "writable"},
                                         {EPOLLPRI, "priority"},
                                         {EPOLLRDHUP, "read closed"},
                                         {EPOLLHUP, "hang-up"},
                                         {EPOLLERR, "error"}});
}

// The events of one wait, to iterate over: a view into the Poller, overwritten by its next wait.
class Events {
 public:
  Events(const Event* first, std::size_t count) noexcept : first_(first), count_(count) {}

  const Event* begin() const noexcept { return first_; }
  const Event* end() const noexcept { return first_ + count_; }
  std::size_t size() const noexcept { return count_; }
  bool empty() const noexcept { return count_ == 0; }
  const Event& operator[](std::size_t index) const noexcept { return first_[index]; }

 private:
  const Event* first_;
  std::size_t count_;
};

namespace detail {

inline constexpr std::chrono::nanoseconds century{std::int64_t{36525} * 86'400 * 1'000'000'000};

// In double, because neither a century of picoseconds nor an eternity of days fits 64 bits.
template <class Rep, class Period>
constexpr bool exceeds_century(std::chrono::duration<Rep, Period> time) noexcept {
  using Seconds = std::chrono::duration<double>;
  return Seconds(time) > Seconds(century);
}

// Rounded up, at least zero, and at most a century.
template <class Rep, class Period>
constexpr std::chrono::nanoseconds clamp(std::chrono::duration<Rep, Period> time) noexcept {
  using std::chrono::nanoseconds;
  if (exceeds_century(time)) return century;
  if (!(time > time.zero())) return century.zero();  // not a number, too
  using Unit = std::ratio_divide<Period, std::nano>;
  if constexpr (Unit::num == 1 || Unit::den == 1) {
    return std::chrono::ceil<nanoseconds>(time);
  } else {
    // Such as frames of a 44,100th: in one step, a year of them would overflow.
    const auto whole = std::chrono::floor<std::chrono::seconds>(time);
    return whole + std::chrono::ceil<nanoseconds>(time - whole);
  }
}

}  // namespace detail

// Owns one epoll instance and the array that receives its events.
//
// Cost: one system call each; set takes a second where it adds. Waiting with a limit also reads the
// clock, which is none. Memory is allocated by the constructor alone.
// Errors: all but try_add and remove throw std::system_error.
// Threads: one waits at a time. add, modify, set and remove may be called from any thread, also
// during a wait, and take effect in it.
// Processes: after fork(2) both would change one and the same set, so the child makes a Poller of
// its own. See epoll(7), epoll_ctl(2), epoll_wait(2).
class Poller {
 public:
  Poller() : Poller(256) {}
  // `batch` is the most events that one wait hands out. If more are ready, the kernel takes them in
  // turn, so none starves however small the batch.
  explicit Poller(std::size_t batch) : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
    if (const int error = errno; !epoll_) detail::fail(error, {"create a poller"});
    if (batch == 0 || batch > INT_MAX / sizeof(Event))
      detail::fail(EINVAL, {"create a poller with a batch of ", std::to_string(batch), " events"});
    events_ = std::make_unique<Event[]>(batch);
    batch_ = batch;
  }

  // Starts reporting a descriptor. What is ready already is reported too, in every mode.
  void add(FdView fd, Token token, Interest interest, Mode mode = Mode::level) {
    if (detail::has(mode, Mode::exclusive)) check_exclusive(fd, interest, mode);
    if (const auto error = try_add(fd, token, interest, mode)) refuse("add", fd, error.value());
  }

  // The same, for registering clients in a running server: a full kernel table (ENOSPC, ENOMEM) is
  // this client's misfortune, and not the server's end.
  [[nodiscard]] std::error_code try_add(FdView fd, Token token, Interest interest,
                                        Mode mode = Mode::level) noexcept {
    return control(EPOLL_CTL_ADD, fd, token, interest, mode);
  }

  // Changes token, interest and mode. Anything ready is reported afresh, also in edge-triggered and
  // one-shot mode: this is how an edge is armed again.
  void modify(FdView fd, Token token, Interest interest, Mode mode = Mode::level) {
    if (detail::has(mode, Mode::exclusive))
      refuse_exclusive("modify", fd, "modify: remove and add");
    if (const auto error = control(EPOLL_CTL_MOD, fd, token, interest, mode))
      refuse("modify", fd, error.value());
  }

  // Modifies what was added, adds what was not.
  void set(FdView fd, Token token, Interest interest, Mode mode = Mode::level) {
    if (detail::has(mode, Mode::exclusive)) refuse_exclusive("set", fd, "set: remove and add");
    auto error = control(EPOLL_CTL_MOD, fd, token, interest, mode);
    if (error.value() == ENOENT) error = control(EPOLL_CTL_ADD, fd, token, interest, mode);
    // Another thread may have added it between the two.
    if (error.value() == EEXIST) error = control(EPOLL_CTL_MOD, fd, token, interest, mode);
    if (error) refuse("set", fd, error.value());
  }

  // Stops reporting a descriptor. Call it before closing. False if the poller does not know the
  // descriptor. Events of the current batch stay: see Event.
  bool remove(FdView fd) noexcept {
    return ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd.get(), nullptr) == 0;
  }

  // Waits for at least one event, for as long as that takes.
  Events wait() & {
    for (;;) {
      const int ready = ::epoll_wait(epoll_.get(), raw_events(), static_cast<int>(batch_), -1);
      if (ready >= 0) return events(ready);
      check_interrupted();
    }
  }

  // Waits for at least one event, for `timeout` at most. No events: time is up. Zero (or less) only
  // looks; more than a century is forever. Precise to the nanosecond where the kernel has
  // epoll_pwait2 (5.11), else rounded up to a millisecond; never early. A signal handler that runs
  // meanwhile does not prolong the wait, nor end it.
  template <class Rep, class Period>
  Events wait(std::chrono::duration<Rep, Period> timeout) & {
    if (detail::exceeds_century(timeout)) return wait();
    return wait_at_most(detail::clamp(timeout));
  }

  // The same up to a point in time. One in the past only looks.
  Events wait_until(std::chrono::steady_clock::time_point deadline) & {
    const auto now = std::chrono::steady_clock::now();
    if (deadline <= now) return wait_at_most(detail::century.zero());
    return deadline - now > detail::century ? wait() : wait_at_most(deadline - now);
  }

  // A range-for over a temporary poller's events would read freed memory.
  Events wait() && = delete;
  template <class Rep, class Period>
  Events wait(std::chrono::duration<Rep, Period>) && = delete;
  Events wait_until(std::chrono::steady_clock::time_point) && = delete;

  // An epoll instance is itself a descriptor that another poller can watch.
  operator FdView() const noexcept { return epoll_; }  // NOLINT(google-explicit-constructor)

 private:
  // The kernel would say EINVAL and leave the reader to guess.
  static void check_exclusive(FdView fd, Interest interest, Mode mode) {
    if (detail::has(mode, Mode::oneshot)) refuse_exclusive("add", fd, "Mode::oneshot");
    if (detail::has(interest, Interest::priority))
      refuse_exclusive("add", fd, "Interest::priority");
  }

  [[noreturn]] static void refuse_exclusive(const char* verb, FdView fd, const char* clash) {
    detail::fail(EINVAL, {"poller: ", verb, " descriptor ", std::to_string(fd.get()),
                          " (Mode::exclusive cannot go with ", clash, ")"});
  }

  [[noreturn]] static void refuse(const char* verb, FdView fd, int error) {
    const char* hint = "";
    if (error == EEXIST) hint = " (it was added before: modify or set it)";
    if (error == ENOENT) hint = " (it was never added: add or set it)";
    if (error == EBADF) hint = " (it is not open)";
    if (error == EINVAL)
      hint =
          " (it is this poller itself, or another one with Mode::exclusive, or was added with "
          "Mode::exclusive: remove and add it)";
    if (error == ELOOP) hint = " (pollers would watch each other in a circle, or too deep)";
    if (error == EPERM)
      hint = " (a regular file or the like is always ready: do not add it, just read or write it)";
    if (error == ENOSPC) hint = " (the limit fs.epoll.max_user_watches is reached)";
    detail::fail(error, {"poller: ", verb, " descriptor ", std::to_string(fd.get()), hint});
  }

  std::error_code control(int operation, FdView fd, Token token, Interest interest,
                          Mode mode) noexcept {
    ::epoll_event event{};
    event.events = static_cast<std::uint32_t>(interest) | static_cast<std::uint32_t>(mode);
    // With EPOLLEXCLUSIVE the kernel refuses EPOLLRDHUP; an end of stream is EPOLLIN as well, so
    // nothing is missed.
    if (detail::has(mode, Mode::exclusive)) event.events &= ~std::uint32_t{EPOLLRDHUP};
    event.data.u64 = static_cast<std::uint64_t>(token);
    const int result = ::epoll_ctl(epoll_.get(), operation, fd.get(), &event);
    return {result == 0 ? 0 : errno, std::generic_category()};
  }

  Events wait_at_most(std::chrono::nanoseconds limit) {
    using std::chrono::steady_clock;
    const auto start = steady_clock::now();
    for (auto left = limit;; left = std::max(start + limit - steady_clock::now(), limit.zero())) {
      const int ready = collect(left);
      if (ready >= 0) return events(ready);
    }
  }

  // One system call. Returns the number of events, or -1 where the caller has to wait on for the
  // rest of its time.
  int collect(std::chrono::nanoseconds timeout) {
    if (precise_) {
      const int ready = epoll_pwait2(timeout);
      if (ready >= 0) return ready;
      // Old kernels answer ENOSYS; so do, or with EPERM, old sandboxes.
      precise_ = errno != ENOSYS && errno != EPERM;
      if (precise_) return check_interrupted();
    }
    // Rounded up: rounding down would spin through the last millisecond.
    const std::int64_t limit = (timeout.count() + 999'999) / 1'000'000;
    const bool clamped = limit > INT_MAX;
    const int ready = ::epoll_wait(epoll_.get(), raw_events(), static_cast<int>(batch_),
                                   clamped ? INT_MAX : static_cast<int>(limit));
    if (ready < 0) return check_interrupted();
    return ready == 0 && clamped ? -1 : ready;
  }

  // Through syscall(2), since a C library may lack it where the kernel has it.
  int epoll_pwait2(std::chrono::nanoseconds timeout) noexcept {
#ifdef SYS_epoll_pwait2
    // The kernel's own timespec, 64 bits wide on 32-bit machines too.
    const std::int64_t limit[]{timeout.count() / 1'000'000'000, timeout.count() % 1'000'000'000};
    return static_cast<int>(::syscall(SYS_epoll_pwait2, epoll_.get(), raw_events(),
                                      static_cast<int>(batch_), limit, nullptr, 0));
#else
    static_cast<void>(timeout);
    errno = ENOSYS;
    return -1;
#endif
  }

  ::epoll_event* raw_events() noexcept {
    return events_ != nullptr ? &events_[0].raw_ : nullptr;  // moved from: let the kernel say so
  }
  Events events(int count) const noexcept {
    return {events_.get(), static_cast<std::size_t>(count)};
  }

  // Throws, unless a signal handler is the reason why a wait has failed: then -1, to wait on.
  static int check_interrupted() {
    if (const int error = errno; error != EINTR) detail::fail(error, {"poller: wait"});
    return -1;
  }

  Fd epoll_;
  std::unique_ptr<Event[]> events_;
  std::size_t batch_ = 0;
  bool precise_ = true;
};

// ===========================================================================
// 4  Waker, Timer, Signals, Child                        (chapters 07 and 09)
//
// A loop waits in one place only. So whatever else may happen (another thread has work, time is up,
// a signal comes, a child process ends) has to become a descriptor too, and Linux has one for each.
// Add these to a Poller like any other: poller.add(timer, Token{2}, Interest::readable).
// ===========================================================================

namespace detail {

// What these have in common: a descriptor to wait for and, but for Child, something to read from
// it.
class Source {
 public:
  operator FdView() const noexcept { return fd_; }  // NOLINT(google-explicit-constructor)

 protected:
  // Of what a system call has returned: -1 throws, with errno.
  Source(long descriptor, std::initializer_list<std::string_view> what)
      : fd_(static_cast<int>(descriptor)) {
    if (const int error = errno; !fd_) fail(error, what);
  }

  // False: there is nothing to read now.
  template <class Value>
  bool take(Value& value) const noexcept {
    return retry_on_eintr([&] { return ::read(fd_.get(), &value, sizeof value); }) > 0;
  }

  Fd fd_;  // NOLINT(cppcoreguidelines-non-private-member-variables-in-classes)
};

}  // namespace detail

// Ends a wait from outside: wake makes it readable until clear.
//
//   other thread                         the loop, when the waker is readable
//   put something into a mailbox         waker.clear()
//   waker.wake()                         take all there is out of the mailbox
//
// Clear first, then look: so nothing that is put in later goes unseen. Any number of wakes before
// the clear are one event, unless it is watched edge-triggered.
// Cost: a descriptor; one system call each. Errors: only the constructor throws.
// Threads: wake may be called from any thread, and in a signal handler. See eventfd(2).
class Waker : public detail::Source {
 public:
  Waker() : Source(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC), {"create a waker"}) {}

  void wake() const noexcept {
    const int interrupted_code = errno;  // in a signal handler, its errno is not ours to change
    constexpr std::uint64_t one = 1;
    // EAGAIN, from a counter that is full, is as good: it is awake.
    static_cast<void>(detail::retry_on_eintr([&] { return ::write(fd_.get(), &one, sizeof one); }));
    errno = interrupted_code;
  }

  // True if there was a wake since the last clear.
  bool clear() noexcept {
    std::uint64_t wakes = 0;
    return take(wakes);
  }
};

// Readable when time is up, once or again and again. On the monotonic clock, which nobody sets and
// which stands still while the machine sleeps.
//
// A time that is zero, negative or past is up at once; a delay or period of more than a century
// counts as a century, or as 68 years where time_t has 32 bits.
// Cost: a descriptor; one system call each. Errors: only the constructor throws.
// See timerfd_create(2).
class Timer : public detail::Source {
 public:
  Timer()
      : Source(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), {"create a timer"}) {}

  // Each of these replaces what was set before.
  template <class Rep, class Period>
  void expire_after(std::chrono::duration<Rep, Period> delay) noexcept {
    set(0, at_least_1ns(detail::clamp(delay)), {});
  }
  template <class Rep, class Period>
  void expire_every(std::chrono::duration<Rep, Period> period) noexcept {
    const auto time = at_least_1ns(detail::clamp(period));
    set(0, time, time);
  }
  void expire_at(std::chrono::steady_clock::time_point deadline) noexcept {
    set(TFD_TIMER_ABSTIME, at_least_1ns(deadline.time_since_epoch()), {});
  }
  void stop() noexcept { set(0, {}, {}); }

  // How often time was up since this was last asked or the timer was set: more than 1 where a loop
  // was too busy to keep up with a period. Makes the timer unreadable until the next time.
  std::uint64_t expirations() noexcept {
    std::uint64_t count = 0;
    return take(count) ? count : 0;
  }

 private:
  // To the kernel, zero means stop.
  static std::chrono::nanoseconds at_least_1ns(std::chrono::nanoseconds time) noexcept {
    return std::max(time, std::chrono::nanoseconds{1});
  }

  static ::timespec to_timespec(std::chrono::nanoseconds time) noexcept {
    const std::int64_t seconds = time.count() / 1'000'000'000;
    // time_t has 32 bits on some 32-bit machines.
    constexpr std::int64_t most = std::numeric_limits<decltype(::timespec::tv_sec)>::max();
    ::timespec result{};
    result.tv_sec = static_cast<decltype(result.tv_sec)>(std::min(seconds, most));
    result.tv_nsec = static_cast<decltype(result.tv_nsec)>(time.count() % 1'000'000'000);
    return result;
  }

  void set(int flags, std::chrono::nanoseconds first, std::chrono::nanoseconds period) noexcept {
    const ::itimerspec times{to_timespec(period), to_timespec(first)};
    ::timerfd_settime(fd_.get(), flags, &times, nullptr);
  }
};

// Signals as something to read, instead of a handler that may interrupt anything.
//
// The constructor blocks them for this thread, and for the threads and processes that it starts
// afterwards: so make this before the first thread. They stay blocked when this is gone, lest a
// second SIGTERM end a shutdown half-way. A program that you start would inherit that and be deaf
// to them: unblock them between fork and exec (sigprocmask(2)). Signals of the same number that
// come before you look are one, but real-time signals queue. After fork(2), the child makes a
// Signals of its own: this one's readiness in an inherited Poller is the parent's.
//
// Cost: a descriptor; one system call each. Errors: only the constructor throws, also for SIGKILL
// and SIGSTOP, which nobody can block. See signalfd(2).
class Signals : public detail::Source {
 public:
  explicit Signals(std::initializer_list<int> numbers) : Signals(set_of(numbers)) {}

  // A signal that has come, with its number (ssi_signo) and sender (ssi_pid), or nothing. Call it
  // until there is nothing more.
  std::optional<::signalfd_siginfo> next() noexcept {
    ::signalfd_siginfo info;
    if (!take(info)) return std::nullopt;
    return info;
  }

 private:
  explicit Signals(const ::sigset_t& set)
      : Source(::signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC), {"watch signals"}) {
    ::pthread_sigmask(SIG_BLOCK, &set, nullptr);
  }

  static ::sigset_t set_of(std::initializer_list<int> numbers) {
    ::sigset_t set;
    ::sigemptyset(&set);
    for (const int number : numbers)
      if (number == SIGKILL || number == SIGSTOP || ::sigaddset(&set, number) != 0)
        detail::fail(EINVAL, {"watch signal ", std::to_string(number)});
    return set;
  }
};

// How a process ended: with exit code `code`, or killed by `signal` if that is not 0.
struct ExitStatus {
  int code = 0;
  int signal = 0;

  bool ok() const noexcept { return code == 0 && signal == 0; }
};

// A process, readable once it has ended; then reap it and remove this from the Poller, since it
// stays readable, whatever reap finds. Destroying it neither ends nor reaps the process.
//
// Cost: a descriptor; one system call each. Errors: only the constructor throws, with ESRCH if
// there is no such process, and ENOSYS before Linux 5.3; reap needs 5.4. While a program ignores
// SIGCHLD, the kernel reaps its children itself, and reap finds nothing. See pidfd_open(2),
// waitid(2).
class Child : public detail::Source {
 public:
  explicit Child(::pid_t pid)
      : Source(::syscall(SYS_pidfd_open, pid, 0), {"watch process ", std::to_string(pid)}),
        pid_(pid) {}

  ::pid_t pid() const noexcept { return pid_; }

  // Takes the zombie away and tells how the process ended. Nothing while it runs, and if it is not
  // this process's own child or was reaped before.
  std::optional<ExitStatus> reap() noexcept {
    constexpr auto by_pidfd = static_cast<::idtype_t>(3);  // P_PIDFD, which glibc has since 2.36
    ::siginfo_t info{};
    const int result = detail::retry_on_eintr([&] {
      return ::waitid(by_pidfd, static_cast<::id_t>(fd_.get()), &info, WEXITED | WNOHANG);
    });
    if (result != 0 || info.si_pid == 0) return std::nullopt;
    if (info.si_code == CLD_EXITED) return ExitStatus{info.si_status, 0};
    return ExitStatus{0, info.si_status};
  }

  // Sends a signal. Unlike kill(2) it never hits a stranger who got the same number since. False if
  // the process has been reaped or is not yours to signal, or there is no such signal.
  bool kill(int signal) noexcept {
    return ::syscall(SYS_pidfd_send_signal, fd_.get(), signal, nullptr, 0) == 0;
  }

 private:
  ::pid_t pid_;
};

// ===========================================================================
// 5  Slab                                                        (chapter 05)
//
// A batch of events is a snapshot. When the handler of its first event ends the client of its
// second one, that event is stale, and a new client may already sit in the old one's place: under
// the same descriptor number, and in a plain array under the same index. So a token has to say
// which of all who ever sat there is meant.
// ===========================================================================

// Values, each found by a Token that is never given out again: the index of a slot, and the slot's
// generation, which changes with each tenant. A stale token finds nothing. Neither moved nor
// copied.
//
//   auto [token, client] = clients.emplace(std::move(socket));
//   poller.add(client.socket, token, Interest::readable);
//   if (Client* client = clients.find(event.token())) ...
//
// All its tokens are 2^32 or more, so smaller ones are yours, for the listener and the like. Values
// stay where they are until erased: pointers to them stay good, whatever else comes and goes.
//
// Cost: find is two array look-ups and a comparison. 8 bytes a slot besides the value and what its
// alignment adds. Slots are allocated 64 at a time and used again, but not freed before the Slab
// is. A walk visits every slot that was ever in use. Errors: emplace throws what the value's
// constructor throws, or bad_alloc.
template <class T>
class Slab {
  template <class Value>
  class Iterator;
  struct End {};

 public:
  template <class Value>
  struct Entry {
    Token token;
    Value& value;
  };

  Slab() noexcept = default;
  Slab(const Slab&) = delete;
  Slab& operator=(const Slab&) = delete;
  ~Slab() {
    clear();
    for (std::size_t first = 0; first < used_; first += chunk_size)
      std::allocator<Slot>().deallocate(chunks_[first / chunk_size], chunk_size);
    delete[] chunks_;
  }

  // Makes a value of the arguments, in the slot that was freed last.
  template <class... Arguments>
  Entry<T> emplace(Arguments&&... arguments) {
    // Taken before the constructor runs, which may throw, or use this Slab itself.
    Vacancy vacancy(*this);
    Slot& slot = slot_at(vacancy.index);
    // An aggregate's other members have their defaults.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
    if constexpr (std::is_constructible_v<T, Arguments...>) {
      ::new (static_cast<void*>(std::addressof(slot.value)))
          T(std::forward<Arguments>(arguments)...);
    } else {
      ::new (static_cast<void*>(std::addressof(slot.value)))
          T{std::forward<Arguments>(arguments)...};
    }
#pragma GCC diagnostic pop
    slot.token = to_token(slot.generation() + 1, std::exchange(vacancy.index, none));
    ++size_;
    return {slot.token, slot.value};
  }

  // The value, or nullptr if it was erased, or the token is none of this Slab's.
  T* find(Token token) noexcept {
    Slot* const slot = slot_of(token);
    return slot != nullptr ? std::addressof(slot->value) : nullptr;
  }
  const T* find(Token token) const noexcept {
    const Slot* const slot = slot_of(token);
    return slot != nullptr ? std::addressof(slot->value) : nullptr;
  }

  // Destroys the value. False if there was none. Fine during a walk.
  [[gnu::noinline]] bool erase(Token token) noexcept {  // so that callers stay lean
    Slot* const slot = slot_of(token);
    if (slot == nullptr) return false;
    slot->token = to_token(slot->generation() + 1, none);
    --size_;
    slot->value.~T();
    // A slot whose generations are used up is retired, lest a token come again.
    if (slot->generation() != 0) give_back(index_of(token));
    return true;
  }

  void clear() noexcept {
    while (!empty())  // a destructor may have emplaced another
      for (const auto& entry : *this) erase(entry.token);
  }

  std::size_t size() const noexcept { return size_; }
  bool empty() const noexcept { return size_ == 0; }

  // for (auto [token, value] : slab). What is erased meanwhile is not visited; what is emplaced
  // meanwhile may be.
  Iterator<T> begin() noexcept { return Iterator<T>{this}; }
  Iterator<const T> begin() const noexcept { return Iterator<const T>{this}; }
  End end() const noexcept { return {}; }

 private:
  static constexpr std::uint32_t chunk_size = 64;  // slots
  static constexpr std::uint32_t none = UINT32_MAX;

  // NOLINTNEXTLINE(cppcoreguidelines-special-member-functions): never copied
  struct Slot {
    Slot() noexcept {}  // NOLINT(modernize-use-equals-default): the union forbids it
    ~Slot() {}          // NOLINT(modernize-use-equals-default)

    std::uint32_t generation() const noexcept {
      return static_cast<std::uint32_t>(static_cast<std::uint64_t>(token) >> 32);
    }
    bool occupied() const noexcept { return generation() % 2 == 1; }

    union {
      T value;
    };
    // Its value's token; of a free slot, whose generation is even, the lower half is the index of
    // the next free one. So no free slot has a token that names the slot itself.
    Token token = to_token(0, none);
  };

  // A free slot, taken out of the list; it goes back unless a value keeps it.
  // NOLINTNEXTLINE(cppcoreguidelines-special-member-functions): never copied
  struct Vacancy {
    explicit Vacancy(Slab& owner) : slab(owner), index(owner.take_free()) {}
    ~Vacancy() {
      if (index != none) slab.give_back(index);
    }

    Slab& slab;
    std::uint32_t index;
  };

  template <class Value>
  class Iterator {
   public:
    using Owner = std::conditional_t<std::is_const_v<Value>, const Slab, Slab>;
    explicit Iterator(Owner* slab) noexcept : slab_(slab) { skip_free(); }

    Entry<Value> operator*() const noexcept { return {slot_->token, slot_->value}; }
    Iterator& operator++() noexcept {
      ++slot_;
      skip_free();
      return *this;
    }
    bool operator!=(End) const noexcept { return slot_ != nullptr; }

   private:
    void skip_free() noexcept {
      while ((slot_ != chunk_end_ || enter_next_chunk()) && !slot_->occupied()) ++slot_;
    }
    bool enter_next_chunk() noexcept {
      slot_ = nullptr;
      if (next_ >= slab_->used_) return false;
      slot_ = slab_->chunks_[next_ / chunk_size];
      chunk_end_ = slot_ + std::min<std::size_t>(chunk_size, slab_->used_ - next_);
      next_ += chunk_size;
      return true;
    }

    Owner* slab_;
    Slot* slot_ = nullptr;  // at the end again
    Slot* chunk_end_ = nullptr;
    std::size_t next_ = 0;  // the first index of the next chunk
  };

  static Token to_token(std::uint32_t generation, std::uint32_t index) noexcept {
    return Token{std::uint64_t{generation} << 32 | index};
  }
  static std::uint32_t index_of(Token token) noexcept { return static_cast<std::uint32_t>(token); }

  Slot& slot_at(std::uint32_t index) const noexcept {
    return chunks_[index / chunk_size][index % chunk_size];
  }
  // The slot that a token's value is in, or nullptr.
  Slot* slot_of(Token token) const noexcept {
    if (index_of(token) >= used_) return nullptr;
    Slot& slot = slot_at(index_of(token));
    return slot.token == token ? &slot : nullptr;
  }

  std::uint32_t take_free() {
    if (free_ == none) return new_slot();
    return std::exchange(free_, index_of(slot_at(free_).token));
  }

  void give_back(std::uint32_t index) noexcept {
    Slot& slot = slot_at(index);
    slot.token = to_token(slot.generation(), std::exchange(free_, index));
  }

  // One that never was in use. Its memory was not touched before.
  std::uint32_t new_slot() {
    if (used_ % chunk_size == 0) add_chunk();
    ::new (static_cast<void*>(&slot_at(used_))) Slot();
    return used_++;
  }

  // The table of chunks has as many places as the power of two that is next.
  void add_chunk() {
    const std::size_t count = used_ / chunk_size;
    if (std::has_single_bit(count) || count == 0) {
      auto** const chunks = new Slot*[count == 0 ? 1 : 2 * count];
      for (std::size_t chunk = 0; chunk < count; ++chunk) chunks[chunk] = chunks_[chunk];
      delete[] std::exchange(chunks_, chunks);
    }
    chunks_[count] = std::allocator<Slot>().allocate(chunk_size);
  }

  Slot** chunks_ = nullptr;
  std::uint32_t used_ = 0;  // slots that ever had a value: all below this index
  std::uint32_t free_ = none;
  std::size_t size_ = 0;
};

// ===========================================================================
// 6  Addresses and sockets                                       (chapter 01)
//
// A server has one socket that listens, and one more for each client, which accept makes out of the
// queue of connections that the kernel has completed. All of them are Fds, and non-blocking.
// ===========================================================================

// An IPv4 or IPv6 address with a port, or a Unix socket's: "127.0.0.1:8080", "[::1]:9000",
// "[fe80::1%eth0]:9000", "unix:/run/rat.sock", and "unix:@rat" in Linux's abstract namespace, which
// has no file. Numbers only (but for an interface, whose look-up needs a descriptor for a moment);
// names are not looked up, since that can block for seconds. A value of 116 bytes; only to_string
// allocates.
class Address {
 public:
  // Unspecified: what a failed accept has for a peer.
  Address() noexcept = default;

  // Nothing if the text is not an address.
  [[nodiscard]] static std::optional<Address> parse(std::string_view text) noexcept {
    if (text.starts_with(unix_prefix)) return from_path(text.substr(unix_prefix.size()));
    const auto colon = text.rfind(':');
    if (colon == std::string_view::npos) return std::nullopt;
    std::string_view host = text.substr(0, colon);
    const std::string_view digits = text.substr(colon + 1);
    std::uint32_t port = 0;
    if (!parse_number(digits, port) || port > UINT16_MAX) return std::nullopt;
    const bool bracketed =
        host.starts_with('[') && host.ends_with(']') && host.find(':') != std::string_view::npos;
    if (bracketed) host = host.substr(1, host.size() - 2);
    // Without brackets, 2001:db8::1:80 could mean two things.
    if (!bracketed && host.find(':') != std::string_view::npos) return std::nullopt;
    return from(host, static_cast<std::uint16_t>(port));
  }

  // The same from its parts; an IPv6 host stands without brackets here.
  [[nodiscard]] static std::optional<Address> from(std::string_view host,
                                                   std::uint16_t port) noexcept {
    std::array<char, INET6_ADDRSTRLEN + IF_NAMESIZE + 1> text{};
    if (host.size() >= text.size() || host.find('\0') != host.npos) return std::nullopt;
    std::copy(host.begin(), host.end(), text.begin());

    Address address;
    if (::inet_pton(AF_INET, text.data(), &address.raw_.v4.sin_addr) == 1) {
      address.raw_.v4.sin_family = AF_INET;
      address.raw_.v4.sin_port = htons(port);
      address.size_ = sizeof address.raw_.v4;
      return address;
    }
    address = Address();
    if (char* zone = std::strchr(text.data(), '%'); zone != nullptr) {
      *zone++ = '\0';
      // By its interface's name or, as in RFC 4007, by number.
      address.raw_.v6.sin6_scope_id = ::if_nametoindex(zone);
      if (address.raw_.v6.sin6_scope_id == 0 && !parse_number(zone, address.raw_.v6.sin6_scope_id))
        return std::nullopt;
    }
    if (::inet_pton(AF_INET6, text.data(), &address.raw_.v6.sin6_addr) != 1) return std::nullopt;
    address.raw_.v6.sin6_family = AF_INET6;
    address.raw_.v6.sin6_port = htons(port);
    address.size_ = sizeof address.raw_.v6;
    return address;
  }

  // A Unix socket's: a file, or after @ an abstract name; at most 107 bytes, the @ not counted.
  // Empty: listen and bind_datagram choose an abstract name, as with port 0. See unix(7).
  [[nodiscard]] static std::optional<Address> from_path(std::string_view path) noexcept {
    Address address;
    const bool abstract = path.starts_with('@');
    if (path.size() >= sizeof address.raw_.un.sun_path + (abstract ? 1 : 0)) return std::nullopt;
    if (!abstract && path.find('\0') != path.npos) return std::nullopt;
    address.raw_.un.sun_family = AF_UNIX;
    std::copy(path.begin(), path.end(), address.raw_.un.sun_path);
    if (abstract) address.raw_.un.sun_path[0] = '\0';
    // A file's name ends with a NUL that counts; in an abstract name every byte is the name's.
    const bool terminated = !path.empty() && !abstract;
    address.size_ = static_cast<::socklen_t>(path_offset + path.size() + (terminated ? 1 : 0));
    return address;
  }

  int family() const noexcept { return raw_.any.sa_family; }

  // Zero for Unix sockets.
  std::uint16_t port() const noexcept {
    if (family() == AF_UNIX) return 0;
    return ntohs(family() == AF_INET6 ? raw_.v6.sin6_port : raw_.v4.sin_port);
  }

  // As parse reads it.
  std::string to_string() const {
    if (family() == AF_UNSPEC) return "unspecified";
    if (family() == AF_UNIX) return path_to_string();
    const bool v6 = family() == AF_INET6;
    const void* bytes = v6 ? static_cast<const void*>(&raw_.v6.sin6_addr) : &raw_.v4.sin_addr;
    std::array<char, INET6_ADDRSTRLEN> host{};
    ::inet_ntop(family(), bytes, host.data(), host.size());
    std::string text = v6 ? "[" : "";
    text += host.data();
    if (v6 && raw_.v6.sin6_scope_id != 0) {
      std::array<char, IF_NAMESIZE> zone{};
      text += '%';
      text += ::if_indextoname(raw_.v6.sin6_scope_id, zone.data()) != nullptr
                  ? zone.data()
                  : std::to_string(raw_.v6.sin6_scope_id);
    }
    text += v6 ? "]:" : ":";
    text += std::to_string(port());
    return text;
  }

  // For system calls.
  const ::sockaddr* data() const noexcept { return &raw_.any; }
  ::socklen_t size() const noexcept { return size_; }

  // From what a system call or getaddrinfo(3) has written. Unspecified if it is of another family.
  [[nodiscard]] static Address from_native(const ::sockaddr* native, ::socklen_t size) noexcept {
    Address address;
    const int family = size >= sizeof native->sa_family ? native->sa_family : AF_UNSPEC;
    const ::socklen_t most = family == AF_INET    ? sizeof address.raw_.v4
                             : family == AF_INET6 ? sizeof address.raw_.v6
                                                  : sizeof address.raw_.un;
    const bool known =
        family == AF_UNIX || ((family == AF_INET || family == AF_INET6) && size >= most);
    if (!known) return address;
    // The size may be that of a sockaddr_storage. And the kernel counts a NUL behind a path that
    // fills all of sun_path, but takes none: unix(7).
    address.size_ = std::min(size, most);
    std::memcpy(static_cast<void*>(&address.raw_), native, address.size_);
    // And programs often pass all of a sockaddr_un, whatever the path's length.
    if (family == AF_UNIX && size > path_offset && address.raw_.un.sun_path[0] != '\0') {
      const std::size_t room = address.size_ - path_offset;
      const std::size_t path = ::strnlen(address.raw_.un.sun_path, room);
      address.size_ = static_cast<::socklen_t>(path_offset + std::min(path + 1, room));
    }
    return address;
  }

  friend bool operator==(const Address& left, const Address& right) noexcept {
    if (left.family() != right.family() || left.port() != right.port()) return false;
    if (left.family() == AF_UNIX)
      return left.size_ == right.size_ && std::memcmp(&left.raw_, &right.raw_, left.size_) == 0;
    if (left.family() != AF_INET6)
      return left.raw_.v4.sin_addr.s_addr == right.raw_.v4.sin_addr.s_addr;
    return left.raw_.v6.sin6_scope_id == right.raw_.v6.sin6_scope_id &&
           std::memcmp(&left.raw_.v6.sin6_addr, &right.raw_.v6.sin6_addr,
                       sizeof left.raw_.v6.sin6_addr) == 0;
  }

 private:
  static constexpr std::string_view unix_prefix = "unix:";
  static constexpr std::size_t path_offset = offsetof(::sockaddr_un, sun_path);

  static bool parse_number(std::string_view text, std::uint32_t& number) noexcept {
    const char* end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, number);
    return error == std::errc{} && rest == end;
  }

  std::string path_to_string() const {
    std::string text(unix_prefix);
    if (size_ <= path_offset) return text;  // unnamed
    const bool abstract = raw_.un.sun_path[0] == '\0';
    const std::size_t room = size_ - path_offset;
    if (raw_.un.sun_path[0] == '@') text += "./";  // a file's name, not an abstract one
    text.append(raw_.un.sun_path, abstract ? room : ::strnlen(raw_.un.sun_path, room));
    if (abstract) text[unix_prefix.size()] = '@';
    return text;
  }

  union Raw {
    ::sockaddr_un un{};  // the largest, first, so that all of it is zeroed
    ::sockaddr_in6 v6;
    ::sockaddr_in v4;
    ::sockaddr any;
  } raw_;
  ::socklen_t size_ = sizeof(::sockaddr_in);
};

// What a socket carries: a stream of bytes (TCP) or single datagrams (UDP). Unix sockets do either.
enum class SocketType : std::uint8_t { stream = SOCK_STREAM, datagram = SOCK_DGRAM };

// How to listen. The defaults suit a server. Unix sockets heed backlog and permissions alone;
// datagram sockets reuse_port, dual_stack and permissions.
struct ListenOptions {
  int backlog = INT_MAX;      // connections that wait: net.core.somaxconn is the limit
  bool reuse_address = true;  // restart at once, though old ones linger
  bool reuse_port = false;    // several listeners share the port (socket(7))
  bool dual_stack = true;     // an IPv6 listener on [::] takes IPv4 too, as [::ffff:127.0.0.1]
  bool no_delay = true;       // accepted sockets inherit TCP_NODELAY: tcp(7)
  // Accepted sockets inherit it: who was silent for so long is probed, then as often again, and the
  // connection fails with ETIMEDOUT when net.ipv4.tcp_keepalive_probes go unanswered. 0: never.
  std::chrono::seconds keep_alive{0};
  // Of a Unix socket's file, less the umask: who may write it may connect.
  ::mode_t permissions = 0600;
};

// How to connect. Only TCP heeds no_delay and keep_alive.
struct ConnectOptions {
  SocketType type = SocketType::stream;
  bool no_delay = true;
  std::chrono::seconds keep_alive{0};  // as above
};

namespace detail {

inline Fd open_socket(int family, SocketType type) noexcept {
  return Fd{::socket(family, static_cast<int>(type) | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
}

struct SocketOption {
  int level;
  int name;
  int value;
};

inline bool set_options(FdView socket, std::initializer_list<SocketOption> options) noexcept {
  for (const SocketOption& each : options)
    if (::setsockopt(socket.get(), each.level, each.name, &each.value, sizeof each.value) != 0)
      return false;
  return true;
}

inline bool set_tcp_options(FdView socket, bool no_delay,
                            std::chrono::seconds keep_alive) noexcept {
  constexpr std::int64_t most = 32'767;  // the kernel's limit
  const int seconds = static_cast<int>(std::clamp<std::int64_t>(keep_alive.count(), 0, most));
  return set_options(socket, {{IPPROTO_TCP, TCP_NODELAY, no_delay ? 1 : 0}}) &&
         (seconds == 0 || set_options(socket, {{SOL_SOCKET, SO_KEEPALIVE, 1},
                                               {IPPROTO_TCP, TCP_KEEPIDLE, seconds},
                                               {IPPROTO_TCP, TCP_KEEPINTVL, seconds}}));
}

inline bool bind(FdView socket, const Address& address, const ListenOptions& options) noexcept {
  if (address.family() == AF_INET6 &&
      !set_options(socket, {{IPPROTO_IPV6, IPV6_V6ONLY, options.dual_stack ? 0 : 1}}))
    return false;
  // Set before bind, it is the file's mode from the beginning.
  if (address.family() == AF_UNIX) {
    if (::fchmod(socket.get(), options.permissions) != 0) return false;
  } else if (!set_options(socket, {{SOL_SOCKET, SO_REUSEPORT, options.reuse_port ? 1 : 0}})) {
    return false;
  }
  return ::bind(socket.get(), address.data(), address.size()) == 0;
}

}  // namespace detail

// A socket that listens for TCP or Unix stream connections on an address. Port 0 lets the kernel
// choose one: ask local_address which. A Unix socket's file must not exist yet, and stays when the
// socket is closed.
//
// Errors: throws std::system_error, "listen on ADDRESS: " and the reason. See listen(2), tcp(7).
[[nodiscard]] inline Fd listen(const Address& address, const ListenOptions& options = {}) {
  Fd fd = detail::open_socket(address.family(), SocketType::stream);
  const auto set_tcp = [&] {
    return detail::set_options(fd, {{SOL_SOCKET, SO_REUSEADDR, options.reuse_address ? 1 : 0}}) &&
           detail::set_tcp_options(fd, options.no_delay, options.keep_alive);
  };
  const bool listening = fd && (address.family() == AF_UNIX || set_tcp()) &&
                         detail::bind(fd, address, options) &&
                         ::listen(fd.get(), options.backlog) == 0;
  if (const int error = errno; !listening) detail::fail(error, {"listen on ", address.to_string()});
  return fd;
}

// A socket that receives datagrams, UDP or Unix, at an address, and sends them from there; see
// receive and send_to. For a client that only needs replies, port 0 will do.
//
// Errors: throws std::system_error, "bind to ADDRESS: " and the reason. See udp(7), unix(7).
[[nodiscard]] inline Fd bind_datagram(const Address& address, const ListenOptions& options = {}) {
  Fd fd = detail::open_socket(address.family(), SocketType::datagram);
  const bool bound = fd && detail::bind(fd, address, options);
  if (const int error = errno; !bound) detail::fail(error, {"bind to ", address.to_string()});
  return fd;
}

// Two Unix sockets, connected to each other: a pipe in both directions.
struct SocketPair {
  Fd first;
  Fd second;
};

// Throws std::system_error. See socketpair(2).
[[nodiscard]] inline SocketPair open_socket_pair(SocketType type = SocketType::stream) {
  std::array<int, 2> ends{};
  const int flags = static_cast<int>(type) | SOCK_NONBLOCK | SOCK_CLOEXEC;
  if (::socketpair(AF_UNIX, flags, 0, ends.data()) != 0)
    detail::fail(errno, {"open a socket pair"});
  return {Fd{ends[0]}, Fd{ends[1]}};
}

// The address that a socket is bound to. Throws std::system_error.
[[nodiscard]] inline Address local_address(FdView socket) {
  ::sockaddr_storage storage{};
  auto* native = reinterpret_cast<::sockaddr*>(&storage);
  ::socklen_t length = sizeof storage;
  if (::getsockname(socket.get(), native, &length) != 0) {
    const int error = errno;
    detail::fail(error, {"address of descriptor ", std::to_string(socket.get())});
  }
  return Address::from_native(native, length);
}

enum class AcceptStatus : std::uint8_t {
  accepted,
  would_block,  // nobody is waiting
  retry,        // this one is gone already; another may be waiting
  exhausted,    // out of descriptors or memory; whoever waits is still waiting
  failed,       // the listener is of no use: see error
};

// What became of an attempt to accept a connection.
struct [[nodiscard]] Accepted {
  Fd fd;         // the connection, non-blocking, close-on-exec
  Address peer;  // where it comes from
  AcceptStatus status = AcceptStatus::accepted;
  int error = 0;  // errno, unless the status is accepted

  bool ok() const noexcept { return status == AcceptStatus::accepted; }
  bool would_block() const noexcept { return status == AcceptStatus::would_block; }
  bool retry() const noexcept { return status == AcceptStatus::retry; }
  bool exhausted() const noexcept { return status == AcceptStatus::exhausted; }
  bool failed() const noexcept { return status == AcceptStatus::failed; }
};

// For a log: "accepted 127.0.0.1:51234", "exhausted: Too many open files".
inline std::string to_string(const Accepted& accepted) {
  constexpr const char* names[]{"accepted ", "would block", "retry: ", "exhausted: ", "failed: "};
  std::string text = names[static_cast<std::size_t>(accepted.status)];
  if (accepted.ok()) return text + accepted.peer.to_string();
  if (!accepted.would_block()) text += std::strerror(accepted.error);
  return text;
}

namespace detail {

inline AcceptStatus classify_accept_error(int error) noexcept {
  switch (error) {
    case EAGAIN: return AcceptStatus::would_block;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM: return AcceptStatus::exhausted;
    // Linux may pass pending network errors of the new connection on: accept(2) says to treat them
    // as a reason to try again.
    case ECONNABORTED:
    case EPROTO:
    case ENETDOWN:
    case ENOPROTOOPT:
    case EHOSTDOWN:
    case ENONET:
    case EHOSTUNREACH:
    case ENETUNREACH:
    case ETIMEDOUT: return AcceptStatus::retry;
    default: return AcceptStatus::failed;
  }
}

}  // namespace detail

// Takes one waiting connection off a listener. One system call, no allocation.
//
// After `exhausted` the client, if there is one, is still in the queue. A level-triggered listener
// reports it again at once, and for ever: set its interest to none. An edge-triggered one says
// nothing more until the next client comes. In both modes, modify the interest to readable when a
// descriptor is free again, and all who wait are reported; or turn them away with a Reserve. See
// accept4(2).
inline Accepted accept(FdView listener) noexcept {
  ::sockaddr_storage storage{};
  auto* native = reinterpret_cast<::sockaddr*>(&storage);
  ::socklen_t length = 0;
  Accepted accepted;
  accepted.fd.reset(detail::retry_on_eintr([&] {
    length = sizeof storage;
    return ::accept4(listener.get(), native, &length, SOCK_NONBLOCK | SOCK_CLOEXEC);
  }));
  if (accepted.fd) {
    accepted.peer = Address::from_native(native, length);
  } else {
    accepted.error = errno;
    accepted.status = detail::classify_accept_error(accepted.error);
  }
  return accepted;
}

// A descriptor held in reserve for the day when there is no other, to turn clients away with a
// reason instead of leaving them in the queue. One each for a process is enough.
//
// Cost: a descriptor. Errors: the constructor throws. Threads: between giving the reserve up and
// accepting with it, another thread may take it; then shed finds nothing to do.
class Reserve {
 public:
  Reserve() : fd_(open_any()) {
    if (const int error = errno; !fd_) detail::fail(error, {"reserve a descriptor"});
  }

  // Accepts one client, sends the reason (as much as its socket takes at once), and closes. Call it
  // until it is false: then nobody is waiting, or can be accepted. Several system calls.
  bool shed(FdView listener, std::string_view reason) noexcept {
    fd_.reset();
    Accepted client = accept(listener);
    while (client.retry()) client = accept(listener);
    const bool turned_away = client.ok();
    if (turned_away) {
      ::send(client.fd.get(), reason.data(), reason.size(), MSG_NOSIGNAL);
      discard_input(client.fd);
      client.fd.reset();
    }
    fd_.reset(open_any());
    return turned_away;
  }

 private:
  // Closing with bytes unread would send a reset, which can overtake the reason. TCP throws them
  // away when asked to (MSG_TRUNC, tcp(7)); from a Unix socket they are read, some 200 KiB at most
  // unless the client has enlarged its buffer.
  static void discard_input(FdView socket) noexcept {
    ::recv(socket.get(), nullptr, INT_MAX, MSG_TRUNC);
    std::array<char, 4096> room;
    for (int reads = 0; reads < 64; ++reads)
      if (::recv(socket.get(), room.data(), room.size(), 0) <= 0) return;
  }

  static int open_any() noexcept { return ::open("/dev/null", O_RDONLY | O_CLOEXEC); }

  Fd fd_;
};

enum class ConnectStatus : std::uint8_t {
  connected,
  in_progress,  // wait until the socket is writable, then finish_connect
  refused,      // nobody listens there: ECONNREFUSED, or ENOENT for a Unix socket's file
  timed_out,    // nobody answered: ETIMEDOUT
  failed,       // for another reason, such as no route: see error
};

// How an attempt to connect stands.
struct [[nodiscard]] ConnectResult {
  ConnectStatus status = ConnectStatus::connected;
  int error = 0;  // errno, unless connected or in progress

  bool ok() const noexcept { return status == ConnectStatus::connected; }
  bool in_progress() const noexcept { return status == ConnectStatus::in_progress; }
  bool refused() const noexcept { return status == ConnectStatus::refused; }
  bool timed_out() const noexcept { return status == ConnectStatus::timed_out; }
  bool failed() const noexcept { return !ok() && !in_progress(); }  // for whatever reason
};

// The same with the socket, which is empty if failed.
struct [[nodiscard]] Connected : ConnectResult {
  Fd fd;
};

// For a log: "connected", "in progress", "refused: Connection refused".
inline std::string to_string(const ConnectResult& result) {
  constexpr const char* names[]{"connected", "in progress", "refused: ", "timed out: ", "failed: "};
  std::string text = names[static_cast<std::size_t>(result.status)];
  if (result.failed()) text += std::strerror(result.error);
  return text;
}

namespace detail {

inline ConnectResult classify_connect_error(int error) noexcept {
  switch (error) {
    case 0: return {};
    // Interrupted by a signal, the connection goes on being made all the same.
    case EINTR:
    case EINPROGRESS: return {ConnectStatus::in_progress, 0};
    case ENOENT:
    case ECONNREFUSED: return {ConnectStatus::refused, error};
    case ETIMEDOUT: return {ConnectStatus::timed_out, error};
    default: return {ConnectStatus::failed, error};
  }
}

}  // namespace detail

// Starts a connection and does not wait for it.
//
// TCP is usually in_progress: add the socket with Interest::writable (not before this call: an
// unconnected socket reports a hang-up) and let finish_connect tell how it went. A Unix socket, or
// a datagram one, whose address is only noted, is connected or not at once; EAGAIN is a Unix
// listener whose queue is full. See connect(2).
inline Connected connect(const Address& address, const ConnectOptions& options = {}) noexcept {
  Fd fd = detail::open_socket(address.family(), options.type);
  const bool tcp = address.family() != AF_UNIX && options.type == SocketType::stream;
  const bool connected =
      fd && (!tcp || detail::set_tcp_options(fd, options.no_delay, options.keep_alive)) &&
      ::connect(fd.get(), address.data(), address.size()) == 0;
  const ConnectResult result = detail::classify_connect_error(connected ? 0 : errno);
  if (result.failed()) fd.reset();
  return {result, std::move(fd)};
}

// How a connection in progress went, or in_progress if it is not decided yet. To be called when the
// socket is writable. A failure is final, and told once: asked again, it would be in_progress for
// ever. To give up earlier, remove the socket from the Poller and close it. One or two system
// calls.
inline ConnectResult finish_connect(FdView socket) noexcept {
  int error = 0;
  ::socklen_t length = sizeof error;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
  if (error != 0) return detail::classify_connect_error(error);
  ::sockaddr_storage peer;
  length = sizeof peer;
  if (::getpeername(socket.get(), reinterpret_cast<::sockaddr*>(&peer), &length) == 0) return {};
  return {ConnectStatus::in_progress, 0};
}

// ===========================================================================
// 7  Reading and writing                                         (chapter 03)
//
// A non-blocking read takes what is there, a non-blocking write puts what fits. Both may move less
// than they were asked to: that is success.
// ===========================================================================

namespace detail {

// What a system call's return value means; errno is still its own.
inline IoResult moved(::ssize_t count) noexcept {
  if (count >= 0) [[likely]]
    return {static_cast<std::size_t>(count), IoStatus::ok, 0};
  if (errno == EAGAIN) return {0, IoStatus::would_block, 0};
  return {0, IoStatus::failed, errno};
}

// Pipes and the like have no MSG_NOSIGNAL. So SIGPIPE is blocked for this thread while it writes,
// and if the write raised it, swallowed: also where a blocking pipe has taken a part before.
inline IoResult write_to_non_socket(FdView fd, const ::iovec* pieces, std::size_t count) noexcept {
  ::sigset_t sigpipe;
  ::sigset_t before;
  ::sigset_t pending;
  ::sigemptyset(&sigpipe);
  ::sigaddset(&sigpipe, SIGPIPE);
  ::sigpending(&pending);
  ::pthread_sigmask(SIG_BLOCK, &sigpipe, &before);
  const IoResult result =
      moved(retry_on_eintr([&] { return ::writev(fd.get(), pieces, static_cast<int>(count)); }));
  std::size_t size = 0;
  for (std::size_t piece = 0; piece < count; ++piece) size += pieces[piece].iov_len;
  constexpr ::timespec now{};
  if (result.bytes < size && !result.would_block() && ::sigismember(&pending, SIGPIPE) == 0)
    ::sigtimedwait(&sigpipe, nullptr, &now);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

inline IoResult writev(FdView fd, const ::iovec* pieces, std::size_t count) noexcept {
  ::msghdr message{};
  message.msg_iov = const_cast<::iovec*>(pieces);
  message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(count);  // int in musl
  const ::ssize_t sent =
      retry_on_eintr([&] { return ::sendmsg(fd.get(), &message, MSG_NOSIGNAL); });
  if (sent >= 0 || errno != ENOTSOCK) [[likely]]
    return moved(sent);
  return write_to_non_socket(fd, pieces, count);
}

}  // namespace detail

// Reads once into `room`, from any kind of descriptor. ok: 1 byte or more. An empty room is ok with
// 0 bytes. See read(2).
inline IoResult read(FdView fd, std::span<char> room) noexcept {
  if (room.empty()) return {};
  const ::ssize_t count =
      detail::retry_on_eintr([&] { return ::read(fd.get(), room.data(), room.size()); });
  if (count == 0) return {0, IoStatus::end_of_stream, 0};
  return detail::moved(count);
}

// Writes once: ok if any byte was taken, perhaps not all. (An array of char would count as text up
// to its first NUL: pass {room, size}.) Never raises SIGPIPE: a peer that is gone
// is failed with EPIPE. A socket takes one system call; pipes and the like take a few more, for the
// sake of that promise. See send(2).
inline IoResult write(FdView fd, std::string_view bytes) noexcept {
  if (bytes.empty()) return {};
  const ::ssize_t count = detail::retry_on_eintr(
      [&] { return ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL); });
  if (count >= 0 || errno != ENOTSOCK) [[likely]]
    return detail::moved(count);
  const ::iovec piece{const_cast<char*>(bytes.data()), bytes.size()};
  return detail::write_to_non_socket(fd, &piece, 1);
}

// The same for bytes in several pieces, of which the first IOV_MAX (1,024) are looked at; a socket
// for datagrams sends one even if all are empty. See sendmsg(2), writev(2).
inline IoResult writev(FdView fd, std::span<const ::iovec> pieces) noexcept {
  return detail::writev(fd, pieces.data(), std::min<std::size_t>(pieces.size(), IOV_MAX));
}

// Reads until there is nothing more for now, the stream ends, or the room is full. So the room is
// the budget, and ok means that it is spent and more may be pending. `bytes` is what was read in
// all, whatever the status.
inline IoResult drain(FdView fd, std::span<char> room) noexcept {
  IoResult total;
  while (total.ok() && total.bytes < room.size()) {
    const IoResult result = read(fd, room.subspan(total.bytes));
    total = {total.bytes + result.bytes, result.status, result.error};
  }
  return total;
}

// Says that nothing more will be written (half-close): the peer reads what is on its way, then end
// of stream, and can still answer. See shutdown(2), SHUT_WR.
inline void shutdown_write(FdView socket) noexcept { ::shutdown(socket.get(), SHUT_WR); }

// Sends one datagram to an address: all of it or nothing. On a connected socket, write does the
// same without one, unless the datagram is empty. failed with EMSGSIZE: too long; with
// ECONNREFUSED: an earlier one found nobody. See sendto(2), udp(7).
inline IoResult send_to(FdView socket, std::string_view datagram, const Address& to) noexcept {
  return detail::moved(detail::retry_on_eintr([&] {
    return ::sendto(socket.get(), datagram.data(), datagram.size(), MSG_NOSIGNAL, to.data(),
                    to.size());
  }));
}

namespace detail {

inline int socket_option(FdView socket, int name) noexcept {
  int value = -1;
  ::socklen_t length = sizeof value;
  ::getsockopt(socket.get(), SOL_SOCKET, name, &value, &length);
  return value;
}

}  // namespace detail

// Sends bytes through a Unix socket, at least one, and with them a descriptor: the other process
// receives a duplicate. Yours stays yours, and may be closed at once. It goes with the first byte:
// if not all were taken, write the rest. Two system calls. See unix(7), SCM_RIGHTS.
inline IoResult send_fd(FdView socket, std::string_view bytes, FdView passed) noexcept {
  if (bytes.empty()) return {0, IoStatus::failed, EINVAL};
  // TCP would send the bytes alone.
  const int domain = detail::socket_option(socket, SO_DOMAIN);
  if (domain >= 0 && domain != AF_UNIX) return {0, IoStatus::failed, EOPNOTSUPP};
  ::iovec piece{const_cast<char*>(bytes.data()), bytes.size()};
  const int number = passed.get();
  alignas(::cmsghdr) std::array<char, CMSG_SPACE(sizeof number)> control{};
  ::msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ::cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof number);
  std::memcpy(CMSG_DATA(header), &number, sizeof number);
  return detail::moved(
      detail::retry_on_eintr([&] { return ::sendmsg(socket.get(), &message, MSG_NOSIGNAL); }));
}

// What has been received, with what came along.
struct [[nodiscard]] Received : IoResult {
  Address from;  // a datagram's sender, if it has a name; unspecified on a stream
  Fd fd;         // a descriptor that was passed: close-on-exec, else as the sender had it
  // The datagram was longer than the room; or something else that came along was not taken, such as
  // a second descriptor, or the first when no more can be opened.
  bool truncated = false;
};

// Receives once from a socket: one datagram, whose end is lost if the room is too small, or what a
// stream has. One descriptor is taken along; any more are closed. Unlike read, ok may have 0 bytes:
// a datagram can be empty. See recvmsg(2).
inline Received receive(FdView socket, std::span<char> room) noexcept {
  ::iovec piece{room.data(), room.size()};
  ::sockaddr_storage from{};
  alignas(::cmsghdr) std::array<char, CMSG_SPACE(sizeof(int))> control{};
  ::msghdr message{};
  message.msg_name = &from;
  message.msg_namelen = sizeof from;
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  // CMSG_SPACE rounds up to what would hold two, and we would leak the second.
  message.msg_controllen = CMSG_LEN(sizeof(int));
  Received received{detail::moved(detail::retry_on_eintr(
                        [&] { return ::recvmsg(socket.get(), &message, MSG_CMSG_CLOEXEC); })),
                    Address(), Fd(), false};
  if (!received.ok()) return received;
  received.from = Address::from_native(reinterpret_cast<::sockaddr*>(&from), message.msg_namelen);
  // Unlike TCP, a Unix stream names its peer each time.
  const auto is_stream = [&] { return detail::socket_option(socket, SO_TYPE) == SOCK_STREAM; };
  if (received.from.family() == AF_UNIX && is_stream()) received.from = Address();
  received.truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  const ::cmsghdr* const header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_level == SOL_SOCKET && header->cmsg_type == SCM_RIGHTS) {
    int number = -1;
    std::memcpy(&number, CMSG_DATA(header), sizeof number);
    received.fd.reset(number);
  }
  if (received.bytes == 0 && !room.empty() && is_stream())
    received.status = IoStatus::end_of_stream;
  return received;
}

// True for what a Poller can wait for. A regular file, a directory and /dev/null it refuses with
// EPERM: they are always ready, so read or write them and do not wait. False also for what is not
// open. One system call. See epoll_ctl(2).
inline bool pollable(FdView fd) noexcept {
  // Nothing can watch itself, but the kernel says so only after it has looked whether it could be
  // watched at all. So no epoll instance is needed, for which no descriptor may be left.
  ::epoll_event event{};
  ::epoll_ctl(fd.get(), EPOLL_CTL_ADD, fd.get(), &event);
  return errno != EPERM && errno != EBADF;
}

// Standard input, to be read without blocking and closed at will.
//
// O_NONBLOCK belongs to the open file, which the shell and other programs share: set on descriptor
// 0 it would break them. So a terminal or a pipe is opened anew. What cannot be (a socket, another
// user's terminal) is duplicated and may still block: read it once each time that it is reported,
// level-triggered. So is a regular file, as in `program < file`: ask pollable. Throws
// std::system_error if there is no standard input.
[[nodiscard]] inline Fd open_standard_input() {
  struct ::stat status {};
  Fd fd;
  if (::fstat(STDIN_FILENO, &status) == 0 && (S_ISCHR(status.st_mode) || S_ISFIFO(status.st_mode)))
    fd.reset(::open("/proc/self/fd/0", O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY));
  if (!fd) fd.reset(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 0));
  if (const int error = errno; !fd) detail::fail(error, {"open standard input"});
  return fd;
}

namespace detail {

// Bytes in one heap block: put in at the end, taken out at the front. What the two buffers below
// have in common.
//
// The first block of a queue has FirstBlock bytes, and each thread keeps up to Spares of those for
// its next queues. So up to Spares queues at once that need no more than that fill and empty all
// day without an allocation, and still an empty one owns nothing.
template <std::size_t FirstBlock, std::uint32_t Spares>
class ByteQueue {
 public:
  ByteQueue() noexcept = default;
  ByteQueue(ByteQueue&& other) noexcept { swap(other); }
  ByteQueue& operator=(ByteQueue&& other) noexcept {
    ByteQueue(std::move(other)).swap(*this);
    return *this;
  }
  ByteQueue(const ByteQueue&) = delete;
  ByteQueue& operator=(const ByteQueue&) = delete;
  ~ByteQueue() { delete[] block_; }

  std::size_t size() const noexcept { return end_ - begin_; }
  bool empty() const noexcept { return begin_ == end_; }
  std::string_view bytes() const noexcept { return {block_ + begin_, size()}; }

  // Copies all of it to the end. False, and nothing changed: out of memory.
  bool append(std::string_view bytes) noexcept {
    if (bytes.empty()) return true;  // perhaps nothing at nowhere: not for memcpy
    if (!reserve(bytes.size())) return false;
    std::memcpy(block_ + end_, bytes.data(), bytes.size());
    put(bytes.size());
    return true;
  }

  // The room behind the bytes, of which put declares a part as filled.
  std::span<char> room() noexcept { return {block_ + end_, capacity_ - end_}; }
  void put(std::size_t count) noexcept { end_ += count; }
  void take(std::size_t count) noexcept { begin_ += count; }

  // Sees to room for `extra` bytes. False, and nothing changed: out of memory.
  bool reserve(std::size_t extra) noexcept {
    if (extra <= capacity_ - end_) return true;
    if (capacity_ != 0 || extra > FirstBlock || spares.first == nullptr) return make_room(extra);
    block_ = take_spare();
    capacity_ = FirstBlock;
    return true;
  }

  // Forgets the bytes and parts with the memory.
  void reset() noexcept {
    if (capacity_ == FirstBlock && (spares.room > 0 || spares.open())) {
      keep_spare(block_);
    } else {
      delete[] block_;
    }
    block_ = nullptr;
    begin_ = end_ = capacity_ = 0;
  }

 private:
  // A list that runs through the first bytes of the blocks. It has no destructor, so that static
  // objects may still use queues when the main thread's thread-local objects are gone: there is no
  // room in it then.
  struct SpareList {
    // At first there is no room either, so that who never keeps a block registers no destructor.
    // False if that has been done.
    [[gnu::noinline]] bool open() noexcept {
      if (std::exchange(opened, true)) return false;
      static thread_local const CloseAtThreadExit at_thread_exit;
      static_cast<void>(at_thread_exit);
      room = Spares;
      return true;
    }

    char* first;
    std::uint32_t room;
    bool opened;
  };
  static inline constinit thread_local SpareList spares{nullptr, 0, false};

  // NOLINTNEXTLINE(cppcoreguidelines-special-member-functions): one a thread, never copied
  struct CloseAtThreadExit {
    ~CloseAtThreadExit() {
      while (spares.first != nullptr) delete[] take_spare();
      spares.room = 0;
    }
  };

  static void keep_spare(char* block) noexcept {
    std::memcpy(block, &spares.first, sizeof spares.first);
    spares.first = block;
    --spares.room;
  }

  static char* take_spare() noexcept {
    char* const block = spares.first;
    std::memcpy(&spares.first, block, sizeof spares.first);
    ++spares.room;
    return block;
  }

  // Out of line, so that whoever appends keeps its registers.
  [[gnu::noinline]] bool make_room(std::size_t extra) noexcept {
    if (extra > SIZE_MAX / 4 - size()) return false;
    const std::size_t needed = size() + extra;
    // The bytes move to the front if that gains a quarter of their number, else to a block with a
    // quarter to spare. So at most four are moved for each one put in: the cost is linear. A block
    // that a peak has left much too large is changed for a smaller one.
    const bool oversized = capacity_ > FirstBlock && needed < capacity_ / 8;
    char* block = nullptr;
    if (needed > capacity_ || size() / 4 > begin_ || oversized) {
      const std::size_t capacity = std::max(FirstBlock, std::bit_ceil(needed + size() / 4));
      block = new (std::nothrow) char[capacity];
      if (block == nullptr && needed > capacity_) return false;
      if (block != nullptr) capacity_ = capacity;
    }
    if (block == nullptr) {
      std::memmove(block_, bytes().data(), size());
    } else {
      if (!empty()) std::memcpy(block, bytes().data(), size());
      delete[] std::exchange(block_, block);
    }
    end_ -= begin_;
    begin_ = 0;
    return true;
  }

  void swap(ByteQueue& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(begin_, other.begin_);
    std::swap(end_, other.end_);
    std::swap(capacity_, other.capacity_);
  }

  char* block_ = nullptr;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace detail

// ===========================================================================
// 8  LineBuffer, FrameBuffer                                     (chapter 03)
//
// TCP carries bytes, not messages. A line may come in ten pieces, ten lines in one piece, and where
// the cuts fall says nothing about what was sent.
// ===========================================================================

namespace detail {

// What the two buffers below have in common: bytes in as they come, whole messages out. A template
// so that it costs those who do not use it little to compile.
template <std::size_t BlockSize>
class MessageBuffer {
 public:
  static constexpr std::size_t block_size = BlockSize;

  // Reads once, up to a block: ok means that more may be pending. Call next until it returns
  // nothing before you fill again: that gives the block back. While messages are left, fill reads
  // only as much as has room behind them, perhaps nothing.
  IoResult fill(FdView fd) noexcept {
    const IoResult result = read(fd, prepare());
    commit(result.bytes);
    return result;
  }

  // Where to put bytes that do not come from a descriptor's read: a block's size, or what messages
  // have left of it; then say with commit how many there are (zero too: the block goes back).
  std::span<char> prepare() noexcept {
    if (block_.empty() && !block_.reserve(block_size)) std::terminate();
    return block_.room();
  }
  void commit(std::size_t count) noexcept {
    block_.put(count);
    if (block_.empty() || overlong_) block_.reset();
  }

  // A message is longer than is allowed. Those before it have been handed out; it and all that
  // follows is thrown away. Nothing but destroying or assigning ends this state: whoever sends such
  // messages is best disconnected.
  bool overlong() const noexcept { return overlong_; }

  // The beginning of a message whose end has not come, once next() has returned nothing: at end of
  // stream, the unterminated last line.
  std::string_view rest() const noexcept {
    return partial_is_whole_ ? std::string_view() : partial_;
  }

 protected:
  explicit MessageBuffer(std::size_t longest) noexcept : longest_(longest) {}

  // All of the first `length` bytes, which are a message, with the piece that came before them.
  std::string_view hand_out(std::size_t length) noexcept {
    const std::string_view bytes = block_.bytes();
    block_.take(length);
    if (partial_.empty()) return bytes.substr(0, length);
    partial_is_whole_ = true;
    return partial_.append(bytes, 0, length);
  }

  void forget_handed_out() noexcept {
    if (!partial_is_whole_) return;
    partial_is_whole_ = false;
    partial_.clear();
  }

  // Everything has been handed out, but for what partial_ holds. Memory that a long message has
  // left goes back when nothing, or a short piece, comes after it.
  std::nullopt_t give_back() noexcept {
    if (partial_.empty() && partial_.capacity() > std::string().capacity())
      std::string().swap(partial_);
    block_.reset();
    return std::nullopt;
  }

  std::nullopt_t keep_partial() noexcept {
    const std::string_view bytes = block_.bytes();
    if (partial_.empty() && partial_.capacity() > 2 * bytes.size()) std::string().swap(partial_);
    partial_.append(bytes);
    block_.reset();
    return std::nullopt;
  }

  std::nullopt_t give_up() noexcept {
    overlong_ = true;
    std::string().swap(partial_);
    block_.reset();
    return std::nullopt;
  }

  // NOLINTBEGIN(cppcoreguidelines-non-private-member-variables-in-classes)
  ByteQueue<block_size, 1> block_;  // read, and not looked at yet
  std::string partial_;             // looked at: it is no whole message
  std::size_t longest_;
  // NOLINTEND(cppcoreguidelines-non-private-member-variables-in-classes)

 private:
  bool partial_is_whole_ = false;  // its end was added: it is handed out
  bool overlong_ = false;
};

// Finds the newlines of 64 bytes at once, where the processor has an instruction for it, and
// remembers those behind the first: so short lines do not cost a search each.
class NewlineSearch {
 public:
  NewlineSearch() noexcept = default;
  NewlineSearch(NewlineSearch&& other) noexcept : ahead_(std::exchange(other.ahead_, 0)) {}
  NewlineSearch& operator=(NewlineSearch&& other) noexcept {
    ahead_ = std::exchange(other.ahead_, 0);
    return *this;
  }
  NewlineSearch(const NewlineSearch&) = delete;
  NewlineSearch& operator=(const NewlineSearch&) = delete;
  ~NewlineSearch() = default;

  // The length of the line that these bytes begin with, newline included, or 0 if it has no end
  // yet. The next call is to be with the bytes behind that line, and perhaps more.
  std::size_t first_line(std::string_view bytes) noexcept {
    std::size_t searched = 0;
    if (ahead_ == 0 && bytes.size() >= block_size) {
      ahead_ = newlines_in_block(bytes.data());
      searched = block_size;
    }
    if (ahead_ != 0) {
      const int before = std::countr_zero(ahead_);
      ahead_ = ahead_ >> before >> 1;
      return static_cast<std::size_t>(before) + 1;
    }
    const char* const start = bytes.data() + searched;
    const void* const newline = std::memchr(start, '\n', bytes.size() - searched);
    if (newline == nullptr) return 0;
    return static_cast<std::size_t>(static_cast<const char*>(newline) - bytes.data()) + 1;
  }

 private:
#ifdef __SSE2__
  static constexpr std::size_t block_size = 64;

  // A bit for each newline, the lowest for the first byte.
  static std::uint64_t newlines_in_block(const char* block) noexcept {
    return newlines_in_quarter(block) | newlines_in_quarter(block + 16) << 16 |
           newlines_in_quarter(block + 32) << 32 | newlines_in_quarter(block + 48) << 48;
  }
  static std::uint64_t newlines_in_quarter(const char* bytes) noexcept {
    using Quarter [[gnu::vector_size(16)]] = char;
    Quarter quarter;
    std::memcpy(&quarter, bytes, sizeof quarter);
    return static_cast<std::uint32_t>(__builtin_ia32_pmovmskb128(quarter == '\n'));
  }
#else
  static constexpr std::size_t block_size = SIZE_MAX;  // memchr alone
  static std::uint64_t newlines_in_block(const char*) noexcept { return 0; }
#endif

  std::uint64_t ahead_ = 0;  // bit i: a newline i bytes behind the last line's
};

}  // namespace detail

// Takes bytes in as they come and hands whole lines out, newline included.
//
//   IoResult result = lines.fill(socket);
//   while (const auto line = lines.next()) use(*line);
//
// A read goes into a block of 64 KiB that is borrowed from the thread's spare one; lines are views
// of it. Only a line that the end of the block cuts is copied, into memory of its own.
//
// Cost: every byte is looked at once, or twice in short lines, and copied at most once (and once
// more now and then as a long line grows), however the stream is cut. Whole lines cost no
// allocation, a line that is cut one or two. An idle buffer owns no heap memory; one that holds a
// piece of a line, at most twice that piece. Out of memory ends the program (noexcept).
class LineBuffer : public detail::MessageBuffer<65536> {
 public:
  LineBuffer() noexcept : LineBuffer(65536) {}
  // `max_line` bounds a line's bytes, newline included.
  explicit LineBuffer(std::size_t max_line) noexcept
      : MessageBuffer(std::max<std::size_t>(max_line, 1)) {}

  // The next whole line, or nothing until more is read. The view is good until the next call of
  // next, fill or prepare.
  [[nodiscard]] std::optional<std::string_view> next() noexcept {
    forget_handed_out();
    const std::string_view bytes = block_.bytes();
    if (bytes.empty()) return give_back();
    const std::size_t length = newlines_.first_line(bytes);
    // Without its newline a line of the greatest length is too long already.
    if (partial_.size() + (length > 0 ? length : bytes.size() + 1) > longest_) return give_up();
    if (length == 0) return keep_partial();
    return hand_out(length);
  }

 private:
  detail::NewlineSearch newlines_;
};

// What goes before a frame of `length` bytes: the length in 4 bytes, the highest first.
constexpr std::array<char, 4> frame_prefix(std::uint32_t length) noexcept {
  return {static_cast<char>(length >> 24), static_cast<char>(length >> 16),
          static_cast<char>(length >> 8), static_cast<char>(length)};
}

// The same for frames, whose bytes may be any, as their length is sent before them: frame_prefix,
// then the bytes. Each frame comes out without its prefix; rest includes what came of it. Costs as
// LineBuffer, and nothing is searched.
class FrameBuffer : public detail::MessageBuffer<65536> {
 public:
  FrameBuffer() noexcept : FrameBuffer(65536) {}
  // `max_frame` bounds a frame's bytes, its prefix not included: believe no length before you have
  // looked at it.
  explicit FrameBuffer(std::size_t max_frame) noexcept : MessageBuffer(max_frame) {}

  // The next whole frame, or nothing until more is read. The view is good until the next call of
  // next, fill or prepare.
  [[nodiscard]] std::optional<std::string_view> next() noexcept {
    forget_handed_out();
    if (block_.empty()) return give_back();
    const std::size_t size = partial_.size() + block_.size();
    if (size < prefix_size) return keep_partial();
    const std::size_t length = frame_length();
    if (length > longest_) return give_up();
    if (size - prefix_size < length) return keep_partial();
    return hand_out(prefix_size + length - partial_.size()).substr(prefix_size);
  }

 private:
  static constexpr std::size_t prefix_size = frame_prefix(0).size();

  std::size_t frame_length() const noexcept {
    const std::string_view bytes = block_.bytes();
    std::uint32_t length = 0;
    for (std::size_t at = 0; at < prefix_size; ++at) {
      const char byte = at < partial_.size() ? partial_[at] : bytes[at - partial_.size()];
      length = length << 8 | static_cast<unsigned char>(byte);
    }
    return length;
  }
};

// ===========================================================================
// 9  WriteBuffer                                                 (chapter 04)
//
// A peer reads as fast as it likes. What its socket does not take at once has to wait here, in
// order, and not forever: a buffer without a bound is a leak with a delay.
// ===========================================================================

// How much may wait for one peer, in bytes.
struct WriteLimits {
  std::size_t high_water = std::size_t{1} << 20;  // above: slow the senders down
  std::size_t bound = std::size_t{64} << 20;      // never more than this
};

// Bytes queued for one peer.
//
// Cost: append copies; flush is one send(2) of all that is queued. Empty, it owns no heap memory
// (up to 4 MiB of empty blocks are the thread's, for the next); else at least 4 KiB, and at most
// about twice the most that was queued since it was empty.
class WriteBuffer {
 public:
  WriteBuffer() noexcept = default;
  explicit WriteBuffer(WriteLimits limits) noexcept : limits_(limits) {}

  // Queues all of it, or nothing: false if the bound would be passed, or memory is out. Sends
  // nothing: gather what there is to say, then flush once.
  [[nodiscard]] bool append(std::string_view bytes) noexcept {
    return bytes.size() <= limits_.bound - size() && queue_.append(bytes);
  }

  // Sends once: ok if the buffer is empty now, would_block if a part is left. Then the socket is
  // full (epoll(7) says that a partial write is proof enough, in edge-triggered mode too): wait
  // until it is writable, and call again. Nothing is lost or sent twice.
  IoResult flush(FdView fd) noexcept {
    const IoResult result = write(fd, queue_.bytes());
    queue_.take(result.bytes);
    if (!queue_.empty())
      return result.ok() ? IoResult{result.bytes, IoStatus::would_block, 0} : result;
    queue_.reset();
    return result;
  }

  bool empty() const noexcept { return queue_.empty(); }
  std::size_t size() const noexcept { return queue_.size(); }
  bool above_high_water() const noexcept { return size() > limits_.high_water; }

 private:
  // A thousand spare blocks of 4 KiB let a fan-out to a thousand peers, which fills their buffers
  // and then empties them, go without an allocation.
  detail::ByteQueue<4096, 1024> queue_;
  WriteLimits limits_;
};

// ===========================================================================
// 10  BroadcastLog                                               (chapter 08)
//
// What goes to ten thousand peers need not be queued ten thousand times. One log holds it once, and
// of each peer only its place in the log is kept. Whoever reads slowly falls behind; what everybody
// has been sent is free again.
// ===========================================================================

namespace detail {

// Memory that is mapped twice in a row: what runs over its end goes on at its beginning.
class MirroredMemory {
 public:
  // Rounds up to whole pages, at least one. Without data, errno says why.
  explicit MirroredMemory(std::size_t size) noexcept {
    errno = ENOMEM;
    if (size > SIZE_MAX / 4) return;
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    size_ = (std::max<std::size_t>(size, 1) + page - 1) / page * page;
    const Fd file{::memfd_create("edgewise", MFD_CLOEXEC)};
    if (!file || ::ftruncate(file.get(), static_cast<::off_t>(size_)) != 0) return;
    // The whole range first, so that the halves land side by side.
    void* const whole = ::mmap(nullptr, 2 * size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (whole == MAP_FAILED) return;
    data_ = static_cast<char*>(whole);
    if (!map(file, data_) || !map(file, data_ + size_)) unmap();
  }
  MirroredMemory(const MirroredMemory&) = delete;
  MirroredMemory& operator=(const MirroredMemory&) = delete;
  ~MirroredMemory() { unmap(); }

  char* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }

 private:
  bool map(FdView file, char* place) const noexcept {
    return ::mmap(place, size_, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file.get(), 0) !=
           MAP_FAILED;
  }
  void unmap() noexcept {
    if (data_ != nullptr) ::munmap(std::exchange(data_, nullptr), 2 * size_);
  }

  char* data_ = nullptr;
  std::size_t size_ = 0;
};

}  // namespace detail

// Bytes queued once for all peers. Each peer has a Cursor, its place in the log.
//
//   BroadcastLog log{8 << 20};                  // bytes
//   client.cursor = log.join();                 // hears what is appended from now on
//   if (!log.append(line, &client.cursor)) ...  // to all but the client itself
//   for (auto [token, client] : clients)
//     if (const auto result = log.flush(client.socket, client.cursor); !result.ok()) ...
//
// The first ... is reached when the log is full: keep the line, read from nobody, flush, and append
// it when room() is enough again. (A LineBuffer keeps the lines behind it: call next later.) The
// second is would_block, wait until the socket is writable, or the end of this peer.
//
// The log is a ring of memory that is mapped twice in a row, so that any part of it lies in one
// piece, across the seam too. Positions count the bytes since the beginning, and always:
//
//   oldest <= every cursor <= end, but for closed ones; and end - oldest <= capacity;
//   a peer's own bytes ahead of its cursor are noted as ranges, in order, with others' bytes
//   between any two and before the first: so a cursor never stands before bytes that its peer is
//   not sent.
//
// Cost: append copies once, however many peers there are. flush is one send(2), or one sendmsg(2)
// for every 16 pieces where own bytes are left out. Finding out what is free looks at every cursor,
// and only after the slowest peer has moved. A peer and a range take 32 bytes each, from a Slab;
// a range counts for 24 against the capacity. An empty log starts again at the front of the ring,
// where the cache is warm; memory that a backlog has touched stays with the log. Errors: the
// constructor throws std::system_error, and join bad_alloc; out of memory for ranges ends the
// program. After fork(2) both processes would write into one ring: leave it to one of them. The log
// must outlive its cursors. See mmap(2), memfd_create(2).
class BroadcastLog {
  struct Range {
    std::uint64_t begin;
    std::uint64_t end;
    Token next;
  };
  struct Peer {
    std::uint64_t position;
    Token first;  // of its own ranges ahead of position
    Token last;
  };
  static constexpr Token none{0};  // no Slab's token

 public:
  // A peer's place in the log. Moves, never copies; empty when moved from, or not from join. When
  // it is destroyed, the log no longer waits for this peer.
  class Cursor {
   public:
    Cursor() noexcept = default;
    Cursor(Cursor&& other) noexcept
        : log_(std::exchange(other.log_, nullptr)), peer_(other.peer_) {}
    Cursor& operator=(Cursor&& other) noexcept {
      Cursor former(std::move(other));  // and then this one's own, which is left
      std::swap(log_, former.log_);
      std::swap(peer_, former.peer_);
      return *this;
    }
    Cursor(const Cursor&) = delete;
    Cursor& operator=(const Cursor&) = delete;
    ~Cursor() {
      if (log_ != nullptr) log_->leave(peer_);
    }

    // How far the peer is behind the end of the log, or behind where it was closed, in bytes, its
    // own in between included. 0: it has been sent everything.
    std::size_t behind() const noexcept {
      if (log_ == nullptr) return 0;
      const Peer& peer = *log_->peers_.find(peer_);
      const std::uint64_t end = log_->end_of(peer);
      return peer.position < end ? static_cast<std::size_t>(end - peer.position) : 0;
    }

    // Ends the peer's part of the log here: it is sent what it has still to be sent, and nothing
    // that is appended from now on; as a sender it is nobody. Makes a range if it is behind.
    void close() noexcept {
      if (log_ != nullptr) log_->close(*log_->peers_.find(peer_));
    }

   private:
    friend class BroadcastLog;
    Cursor(BroadcastLog* log, Token peer) noexcept : log_(log), peer_(peer) {}

    BroadcastLog* log_ = nullptr;
    Token peer_{0};
  };

  // `capacity` is the most that the log ever holds, in bytes, and may be 0: then it takes nothing.
  explicit BroadcastLog(std::size_t capacity) : capacity_(capacity), ring_(capacity) {
    if (const int error = errno; ring_.data() == nullptr)
      detail::fail(error, {"make a broadcast log of ", std::to_string(capacity), " bytes"});
  }
  BroadcastLog(const BroadcastLog&) = delete;
  BroadcastLog& operator=(const BroadcastLog&) = delete;
  ~BroadcastLog() = default;

  [[nodiscard]] Cursor join() {
    const Token peer = peers_.emplace(Peer{end_, none, none}).token;
    if (oldest_ == end_) ++at_oldest_;
    return {this, peer};
  }

  // Queues all of it for everybody but the sender, or nothing: false if the log is too full. Sends
  // nothing: gather what there is to say, then flush everybody once. A sender that is empty, or
  // another log's, is nobody.
  [[nodiscard]] bool append(std::string_view bytes, const Cursor* sender = nullptr) noexcept {
    if (bytes.empty()) return true;
    const bool is_peer = sender != nullptr && sender->log_ == this;
    Peer* own = is_peer ? peers_.find(sender->peer_) : nullptr;
    if (own != nullptr && is_closed(*own)) own = nullptr;
    const std::size_t note = own != nullptr && needs_range(*own) ? sizeof(Range) : 0;
    const std::size_t most = room();
    if (note > most || bytes.size() > most - note) return false;
    if (oldest_ == end_) front_ = end_;  // as room has just found out
    std::memcpy(at(end_), bytes.data(), bytes.size());
    end_ += bytes.size();
    if (own != nullptr) leave_out(*own, end_ - bytes.size(), end_);
    return true;
  }

  // Sends what the peer has not been sent, in order: ok if that is all now, or the budget of bytes
  // is spent (then behind() is not 0, and no event will tell: flush again); would_block if the
  // socket is full: wait until it is writable. For a cursor that is empty, or another log's, there
  // is nothing to send.
  IoResult flush(FdView fd, const Cursor& cursor, std::size_t budget = SIZE_MAX) noexcept {
    if (cursor.log_ != this) return {};
    Peer& peer = *peers_.find(cursor.peer_);
    return peer.first == none ? flush_straight(fd, peer, budget) : flush_around(fd, peer, budget);
  }

  // Bytes that some peer has still to be sent. To be held against a high-water mark: above, stop
  // reading from those who send.
  std::size_t size() noexcept { return static_cast<std::size_t>(end_ - oldest()); }
  bool empty() noexcept { return size() == 0; }
  std::size_t capacity() const noexcept { return capacity_; }
  // The most that append would take now; 24 less, a range, from a sender that is behind.
  std::size_t room() noexcept {
    const std::size_t taken = size() + ranges_.size() * sizeof(Range);
    return taken < capacity_ ? capacity_ - taken : 0;
  }

 private:
  struct Pieces {
    std::array<::iovec, 16> vectors;
    std::size_t count = 0;
    std::size_t bytes = 0;
  };

  char* at(std::uint64_t position) const noexcept {
    return ring_.data() + (position - front_) % ring_.size();
  }

  // Without own bytes ahead. What a closed peer has ahead is all its own.
  IoResult flush_straight(FdView fd, Peer& peer, std::size_t budget) noexcept {
    if (peer.position >= end_) return {};
    const auto size =
        static_cast<std::size_t>(std::min<std::uint64_t>(end_ - peer.position, budget));
    IoResult sent = write(fd, {at(peer.position), size});
    if (sent.bytes > 0) move(peer, peer.position + sent.bytes);
    if (sent.ok() && sent.bytes < size) sent.status = IoStatus::would_block;
    return sent;
  }

  // Own bytes are left out.
  IoResult flush_around(FdView fd, Peer& peer, std::size_t budget) noexcept {
    IoResult total;
    while (total.ok() && peer.position < end_of(peer) && total.bytes < budget) {
      const Pieces pieces = pieces_ahead(peer, budget - total.bytes);
      const IoResult sent = pieces.count == 1
                                ? write(fd, {at(peer.position), pieces.bytes})
                                : detail::writev(fd, pieces.vectors.data(), pieces.count);
      advance(peer, sent.bytes);
      total = {total.bytes + sent.bytes, sent.status, sent.error};
      if (sent.ok() && sent.bytes < pieces.bytes) total.status = IoStatus::would_block;
    }
    return total;
  }

  // The position of the slowest peer, or the end if there is none.
  std::uint64_t oldest() noexcept {
    if (at_oldest_ > 0) return oldest_;
    oldest_ = end_;
    if (peers_.empty()) return oldest_;  // without a walk over empty places
    for (const auto& entry : peers_) {
      if (entry.value.position < oldest_) at_oldest_ = 0;
      oldest_ = std::min(oldest_, entry.value.position);
      if (entry.value.position == oldest_) ++at_oldest_;
    }
    return oldest_;
  }

  // What is appended later is as if it were the peer's own, for ever.
  void close(Peer& peer) noexcept {
    if (!is_closed(peer)) leave_out(peer, end_, UINT64_MAX);
  }
  bool is_closed(const Peer& peer) const noexcept {
    const Range* const last = ranges_.find(peer.last);
    return (last != nullptr ? last->end : peer.position) == UINT64_MAX;
  }

  // Where the peer's part of the log ends.
  std::uint64_t end_of(const Peer& peer) const noexcept {
    if (!is_closed(peer)) return end_;
    return peer.last != none ? ranges_.find(peer.last)->begin : UINT64_MAX;
  }

  void leave(Token token) noexcept {
    Peer& peer = *peers_.find(token);
    while (peer.first != none) peer.first = drop_range(peer.first);
    move(peer, UINT64_MAX);
    peers_.erase(token);
  }

  // Only here do positions change, so that the number of peers at the oldest one is known.
  void move(Peer& peer, std::uint64_t position) noexcept {
    if (peer.position == oldest_ && at_oldest_ > 0) --at_oldest_;
    peer.position = position;
  }

  Token drop_range(Token token) noexcept {
    const Token next = ranges_.find(token)->next;
    ranges_.erase(token);
    return next;
  }

  // Own bytes need a note unless nothing lies between them and the cursor or the note before.
  bool needs_range(const Peer& peer) noexcept {
    return peer.position != end_ && (peer.last == none || ranges_.find(peer.last)->end != end_);
  }

  // What lies from `begin` to `end` is the peer's own.
  void leave_out(Peer& peer, std::uint64_t begin, std::uint64_t end) noexcept {
    if (peer.position == begin) return move(peer, end);
    Range* const last = ranges_.find(peer.last);
    if (last != nullptr && last->end == begin) {
      last->end = end;
      return;
    }
    const Token added = ranges_.emplace(Range{begin, end, none}).token;
    (last != nullptr ? last->next : peer.first) = added;
    peer.last = added;
  }

  // Others' bytes, from the cursor on, up to the budget and the number of pieces in an array.
  Pieces pieces_ahead(const Peer& peer, std::size_t budget) noexcept {
    Pieces pieces;
    Token next = peer.first;
    for (std::uint64_t position = peer.position;
         position < end_ && pieces.count < pieces.vectors.size() && pieces.bytes < budget;) {
      const Range* const own = ranges_.find(next);
      const std::uint64_t until = own != nullptr ? own->begin : end_;
      const auto size = static_cast<std::size_t>(
          std::min<std::uint64_t>(until - position, budget - pieces.bytes));
      pieces.vectors[pieces.count++] = {at(position), size};
      pieces.bytes += size;
      position = own != nullptr ? own->end : end_;
      next = own != nullptr ? own->next : none;
    }
    return pieces;
  }

  // The peer has been sent so many of others' bytes.
  void advance(Peer& peer, std::size_t count) noexcept {
    std::uint64_t position = peer.position + count;
    while (Range* const own = ranges_.find(peer.first)) {
      if (position < own->begin) break;
      position += own->end - own->begin;
      peer.first = drop_range(peer.first);
    }
    if (peer.first == none) peer.last = none;
    if (count > 0) move(peer, position);
  }

  std::size_t capacity_;
  detail::MirroredMemory ring_;
  std::uint64_t front_ = 0;   // the position that lies at the front of the ring
  std::uint64_t end_ = 0;     // where the next byte goes
  std::uint64_t oldest_ = 0;  // the slowest peer's, if at_oldest_ peers are there, else to be found
  std::size_t at_oldest_ = 0;
  Slab<Peer> peers_;
  Slab<Range> ranges_;
};

}  // namespace v0
}  // namespace edgewise

#endif  // EDGEWISE_HPP
