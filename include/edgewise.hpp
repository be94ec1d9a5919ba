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
// Contents: 1 errors and results   2 Fd   3 Poller   4 addresses and sockets
//           5 reading and writing  6 LineBuffer      7 WriteBuffer
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
#include <net/if.h>  // the zone of a link-local IPv6 address
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>  // NOLINT(modernize-deprecated-headers): POSIX's part
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
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
auto retry_on_eintr(Call call) noexcept {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

}  // namespace detail

enum class IoStatus : std::uint8_t {
  ok,             // bytes moved (or there was nothing to move)
  would_block,    // the kernel has nothing more to give, or no more room
  end_of_stream,  // the peer sent FIN: it will send nothing more
  failed,         // the descriptor is of no more use: see error
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

  // Nothing more will come: end of stream or failure.
  bool ended() const noexcept { return end_of_stream() || failed(); }
};

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
// and only add takes it.
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

}  // namespace detail

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
  // An error is pending: the next read, write or SO_ERROR names it.
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

// Owns one epoll instance and the array that receives its events.
//
// Cost: one system call each; set takes a second where it adds. Waiting with a limit also reads the
// clock, which is none. Memory is allocated by the constructor alone.
// Errors: all but try_add and remove throw std::system_error.
// Threads: one waits at a time. add, modify, set and remove may be called from any thread, also
// during a wait, and take effect in it. See epoll(7), epoll_ctl(2), epoll_wait(2).
class Poller {
 public:
  // `batch` is the most events that one wait hands out. If more are ready, the kernel takes them in
  // turn, so none starves however small the batch.
  explicit Poller(std::size_t batch = 256) : epoll_(::epoll_create1(EPOLL_CLOEXEC)) {
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
      const int ready = collect(nullptr);
      if (ready >= 0) return {events_.get(), static_cast<std::size_t>(ready)};
    }
  }

  // Waits for at least one event, for `timeout` at most. No events: time is up. Zero (or less) only
  // looks; more than a century is forever. Precise to the nanosecond where the kernel has
  // epoll_pwait2 (5.11), else rounded up to a millisecond; never early. A signal handler that runs
  // meanwhile does not prolong the wait, nor end it.
  template <class Rep, class Period>
  Events wait(std::chrono::duration<Rep, Period> timeout) & {
    using std::chrono::nanoseconds, std::chrono::steady_clock;
    // In double, because neither a century of picoseconds nor an eternity of days fits 64 bits.
    constexpr std::chrono::duration<double> century{36525.0 * 24 * 60 * 60};
    if (timeout > century) return wait();
    const auto start = steady_clock::now();
    const auto limit =
        timeout > timeout.zero() ? std::chrono::ceil<nanoseconds>(timeout) : nanoseconds::zero();
    for (auto left = limit;;
         left = std::max(start + limit - steady_clock::now(), nanoseconds::zero())) {
      const int ready = collect(&left);
      if (ready >= 0) return {events_.get(), static_cast<std::size_t>(ready)};
    }
  }

  // The same up to a point in time. One in the past only looks.
  Events wait_until(std::chrono::steady_clock::time_point deadline) & {
    const auto now = std::chrono::steady_clock::now();
    return wait(deadline > now ? deadline - now : std::chrono::nanoseconds::zero());
  }

  // A range-for over a temporary poller's events would read freed memory.
  Events wait() && = delete;
  template <class Rep, class Period>
  Events wait(std::chrono::duration<Rep, Period>) && = delete;
  Events wait_until(std::chrono::steady_clock::time_point) && = delete;

  // An epoll instance is itself a descriptor that another poller can watch.
  FdView fd() const noexcept { return epoll_; }

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
    if (error == EINVAL) hint = " (it is a poller itself, or was added with Mode::exclusive)";
    if (error == EPERM) hint = " (it cannot be waited for, like a regular file: just use it)";
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

  // One system call. Returns the number of events, or -1 where the caller has to wait on for the
  // rest of its time.
  int collect(const std::chrono::nanoseconds* timeout) {
    if (precise_) {
      const int ready = epoll_pwait2(timeout);
      if (ready >= 0) return ready;
      // Old kernels answer ENOSYS; so do, or with EPERM, old sandboxes.
      precise_ = errno != ENOSYS && errno != EPERM;
      if (precise_) return interrupted();
    }
    // Rounded up: rounding down would spin through the last millisecond.
    const std::int64_t limit = timeout != nullptr ? (timeout->count() + 999'999) / 1'000'000 : -1;
    const bool clamped = limit > INT_MAX;
    const int ready = ::epoll_wait(epoll_.get(), raw_events(), static_cast<int>(batch_),
                                   clamped ? INT_MAX : static_cast<int>(limit));
    if (ready < 0) return interrupted();
    return ready == 0 && clamped ? -1 : ready;
  }

  // Through syscall(2), since a C library may lack it where the kernel has it.
  int epoll_pwait2(const std::chrono::nanoseconds* timeout) noexcept {
#ifdef SYS_epoll_pwait2
    // The kernel's own timespec, 64 bits wide on 32-bit machines too.
    struct {
      std::int64_t seconds, nanoseconds;
    } limit{};
    if (timeout != nullptr)
      limit = {timeout->count() / 1'000'000'000, timeout->count() % 1'000'000'000};
    return static_cast<int>(::syscall(SYS_epoll_pwait2, epoll_.get(), raw_events(),
                                      static_cast<int>(batch_),
                                      timeout != nullptr ? &limit : nullptr, nullptr, 0));
#else
    static_cast<void>(timeout);
    errno = ENOSYS;
    return -1;
#endif
  }

  ::epoll_event* raw_events() noexcept { return reinterpret_cast<::epoll_event*>(events_.get()); }

  static int interrupted() {
    if (const int error = errno; error != EINTR) detail::fail(error, {"poller: wait"});
    return -1;
  }

  Fd epoll_;
  std::unique_ptr<Event[]> events_;
  std::size_t batch_ = 0;
  bool precise_ = true;
};

// ===========================================================================
// 4  Addresses and sockets                                       (chapter 01)
//
// A server has one socket that listens, and one more for each client, which accept makes out of the
// queue of connections that the kernel has completed. All of them are Fds, and non-blocking.
// ===========================================================================

// An IPv4 or IPv6 address with a port: "127.0.0.1:8080", "[::1]:9000", "[fe80::1%eth0]:9000".
// Numbers only; names are not looked up, since that can block for seconds. A value of 28 bytes;
// only to_string allocates.
class Address {
 public:
  // Unspecified: what a failed accept has for a peer.
  Address() noexcept = default;

  // Nothing if the text is not an address with a port.
  [[nodiscard]] static std::optional<Address> parse(std::string_view text) noexcept {
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
    return address;
  }

  int family() const noexcept { return raw_.any.sa_family; }

  std::uint16_t port() const noexcept {
    return ntohs(family() == AF_INET6 ? raw_.v6.sin6_port : raw_.v4.sin_port);
  }

  // As parse reads it.
  std::string to_string() const {
    if (family() == AF_UNSPEC) return "unspecified";
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
  ::socklen_t size() const noexcept {
    return family() == AF_INET6 ? sizeof raw_.v6 : sizeof raw_.v4;
  }

  // From what a system call or getaddrinfo(3) has written. Unspecified if it is neither IPv4 nor 6.
  static Address from_native(const ::sockaddr* native, ::socklen_t size) noexcept {
    Address address;
    const bool known = native->sa_family == AF_INET || native->sa_family == AF_INET6;
    if (known && size <= sizeof address.raw_.v6) std::memcpy(&address.raw_.v6, native, size);
    return address;
  }

  friend bool operator==(const Address& left, const Address& right) noexcept {
    if (left.family() != right.family() || left.port() != right.port()) return false;
    if (left.family() != AF_INET6)
      return left.raw_.v4.sin_addr.s_addr == right.raw_.v4.sin_addr.s_addr;
    return left.raw_.v6.sin6_scope_id == right.raw_.v6.sin6_scope_id &&
           std::memcmp(&left.raw_.v6.sin6_addr, &right.raw_.v6.sin6_addr,
                       sizeof left.raw_.v6.sin6_addr) == 0;
  }

 private:
  static bool parse_number(std::string_view text, std::uint32_t& number) noexcept {
    const char* end = text.data() + text.size();
    const auto [rest, error] = std::from_chars(text.data(), end, number);
    return error == std::errc{} && rest == end;
  }

  union Raw {
    ::sockaddr_in6 v6{};  // the largest, first, so that all of it is zeroed
    ::sockaddr_in v4;
    ::sockaddr any;
  } raw_;
};

// How to listen. The defaults suit a server.
struct ListenOptions {
  int backlog = INT_MAX;      // connections that wait: net.core.somaxconn is the limit
  bool reuse_address = true;  // restart at once, though old ones linger
  bool reuse_port = false;    // several listeners share the port (socket(7))
  bool dual_stack = true;     // an IPv6 listener on [::] takes IPv4 too
  bool no_delay = true;       // accepted sockets inherit TCP_NODELAY: tcp(7)
};

namespace detail {

inline Fd stream_socket(const Address& address) noexcept {
  return Fd{::socket(address.family(), SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
}

inline bool set_option(FdView socket, int level, int option, bool value) noexcept {
  const int number = value ? 1 : 0;
  return ::setsockopt(socket.get(), level, option, &number, sizeof number) == 0;
}

}  // namespace detail

// A TCP socket that listens on an address. Port 0 lets the kernel choose one: ask local_address
// which.
//
// Errors: throws std::system_error, "listen on ADDRESS: " and the reason. See listen(2), tcp(7).
[[nodiscard]] inline Fd listen(const Address& address, const ListenOptions& options = {}) {
  using detail::set_option;
  Fd fd = detail::stream_socket(address);
  const auto enable = [&](bool wanted, int level, int option) {
    return !wanted || set_option(fd, level, option, true);
  };
  const bool listening = fd && enable(options.reuse_address, SOL_SOCKET, SO_REUSEADDR) &&
                         enable(options.reuse_port, SOL_SOCKET, SO_REUSEPORT) &&
                         enable(options.no_delay, IPPROTO_TCP, TCP_NODELAY) &&
                         (address.family() != AF_INET6 ||
                          set_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, !options.dual_stack)) &&
                         ::bind(fd.get(), address.data(), address.size()) == 0 &&
                         ::listen(fd.get(), options.backlog) == 0;
  if (const int error = errno; !listening) detail::fail(error, {"listen on ", address.to_string()});
  return fd;
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
  exhausted,    // out of descriptors or memory; who waits is still waiting
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
// After `exhausted` the client is still in the queue: a level-triggered listener reports it again
// at once, an edge-triggered one not until the next arrives. See accept4(2).
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

enum class ConnectStatus : std::uint8_t {
  connected,
  in_progress,  // wait until the socket is writable, then finish_connect
  failed,       // refused, unreachable, timed out: see error
};

// What became of an attempt to connect.
struct [[nodiscard]] Connected {
  Fd fd;  // empty if failed
  ConnectStatus status = ConnectStatus::connected;
  int error = 0;  // errno if failed, else 0

  bool ok() const noexcept { return status == ConnectStatus::connected; }
  bool in_progress() const noexcept { return status == ConnectStatus::in_progress; }
  bool failed() const noexcept { return status == ConnectStatus::failed; }
};

// Starts a TCP connection and does not wait for it. TCP_NODELAY is set.
//
// Usually in_progress: add the socket with Interest::writable (not before this call: an unconnected
// socket reports a hang-up) and let finish_connect tell how it went. See connect(2), EINPROGRESS.
inline Connected connect(const Address& address) noexcept {
  Connected result{detail::stream_socket(address)};
  if (result.fd && detail::set_option(result.fd, IPPROTO_TCP, TCP_NODELAY, true) &&
      ::connect(result.fd.get(), address.data(), address.size()) == 0)
    return result;
  // Interrupted by a signal, the connection goes on being made all the same.
  if (errno == EINPROGRESS || errno == EINTR) {
    result.status = ConnectStatus::in_progress;
    return result;
  }
  return {Fd{}, ConnectStatus::failed, errno};
}

// How a connection in progress went: ok, failed, or would_block if it is still in progress. To be
// called when the socket is writable. A failure is told once and is final. One or two system calls.
inline IoResult finish_connect(FdView socket) noexcept {
  int error = 0;
  ::socklen_t length = sizeof error;
  if (::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
  if (error != 0) return {0, IoStatus::failed, error};
  ::sockaddr_storage peer;
  length = sizeof peer;
  if (::getpeername(socket.get(), reinterpret_cast<::sockaddr*>(&peer), &length) == 0) return {};
  return {0, IoStatus::would_block, 0};
}

// ===========================================================================
// 5  Reading and writing                                         (chapter 03)
//
// A non-blocking read takes what is there, a non-blocking write puts what fits. Both may move less
// than they were asked to: that is success.
// ===========================================================================

namespace detail {

// What a system call's return value means; errno is still its own.
inline IoResult moved(::ssize_t count) noexcept {
  if (count >= 0) return {static_cast<std::size_t>(count), IoStatus::ok, 0};
  if (errno == EAGAIN) return {0, IoStatus::would_block, 0};
  return {0, IoStatus::failed, errno};
}

// Pipes and the like have no MSG_NOSIGNAL. So SIGPIPE is blocked for this thread while it writes,
// and if the write raised it, swallowed.
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
  constexpr ::timespec now{};
  if (result.error == EPIPE && ::sigismember(&pending, SIGPIPE) == 0)
    ::sigtimedwait(&sigpipe, nullptr, &now);
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return result;
}

}  // namespace detail

// Reads once into `room`, from any kind of descriptor. ok: 1 byte or more. An empty room is ok with
// 0 bytes. See read(2).
inline IoResult read(FdView fd, std::span<char> room) noexcept {
  if (room.empty()) return {};
  const IoResult result = detail::moved(
      detail::retry_on_eintr([&] { return ::read(fd.get(), room.data(), room.size()); }));
  if (result.ok() && result.bytes == 0) return {0, IoStatus::end_of_stream, 0};
  return result;
}

// Writes once: ok if any byte was taken, perhaps not all. Never raises SIGPIPE: a peer that is gone
// is failed with EPIPE. A socket takes one system call; pipes and the like take a few more, for the
// sake of that promise. See send(2).
inline IoResult write(FdView fd, std::string_view bytes) noexcept {
  if (bytes.empty()) return {};
  const IoResult result = detail::moved(detail::retry_on_eintr(
      [&] { return ::send(fd.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL); }));
  if (result.error != ENOTSOCK) return result;
  const ::iovec piece{const_cast<char*>(bytes.data()), bytes.size()};
  return detail::write_to_non_socket(fd, &piece, 1);
}

// The same for bytes in several pieces, of which the first IOV_MAX (1,024) are looked at. See
// sendmsg(2), writev(2).
inline IoResult writev(FdView fd, std::span<const ::iovec> pieces) noexcept {
  const std::size_t count = pieces.size() < IOV_MAX ? pieces.size() : IOV_MAX;
  ::msghdr message{};
  message.msg_iov = const_cast<::iovec*>(pieces.data());
  message.msg_iovlen = static_cast<decltype(message.msg_iovlen)>(count);  // int in musl
  const IoResult result = detail::moved(
      detail::retry_on_eintr([&] { return ::sendmsg(fd.get(), &message, MSG_NOSIGNAL); }));
  if (result.error != ENOTSOCK) return result;
  return detail::write_to_non_socket(fd, pieces.data(), count);
}

// Says that nothing more will be written (half-close): the peer reads what is on its way, then end
// of stream, and can still answer. See shutdown(2), SHUT_WR.
inline void shutdown_write(FdView socket) noexcept { ::shutdown(socket.get(), SHUT_WR); }

namespace detail {

// Bytes in one heap block: put in at the end, taken out at the front. What the two buffers below
// have in common.
//
// The first block of a queue has FirstBlock bytes, and each thread keeps up to Spares of those for
// its next queues. So up to Spares queues at once that need no more than that fill and empty all
// day without an allocation, and still an empty one owns nothing.
template <std::size_t FirstBlock, std::size_t Spares>
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
  ~ByteQueue() = default;

  std::size_t size() const noexcept { return end_ - begin_; }
  bool empty() const noexcept { return begin_ == end_; }
  std::string_view bytes() const noexcept { return {block_.get() + begin_, size()}; }

  // The room behind the bytes, of which put declares a part as filled.
  std::span<char> room() noexcept { return {block_.get() + end_, capacity_ - end_}; }
  void put(std::size_t count) noexcept { end_ += count; }
  void take(std::size_t count) noexcept { begin_ += count; }

  // Sees to room for `extra` bytes. False, and nothing changed: out of memory.
  bool reserve(std::size_t extra) noexcept {
    if (extra <= capacity_ - end_) return true;
    const std::size_t needed = size() + extra;
    // The bytes move to the front if that gains a quarter of their number, else to a block with a
    // quarter to spare. So at most four are moved for each one put in: the cost is linear. A block
    // that a peak has left much too large is changed for a smaller one.
    const bool oversized = capacity_ > FirstBlock && needed < capacity_ / 8;
    if (needed <= capacity_ && size() <= 4 * begin_ && !oversized) {
      std::memmove(block_.get(), bytes().data(), size());
    } else {
      const std::size_t capacity = std::max(FirstBlock, std::bit_ceil(needed + size() / 4));
      Block block = new_block(capacity);
      if (!block) return false;
      std::copy_n(bytes().data(), size(), block.get());
      block_ = std::move(block);
      capacity_ = capacity;
    }
    end_ -= begin_;
    begin_ = 0;
    return true;
  }

  // Forgets the bytes and parts with the memory.
  void reset() noexcept {
    if (capacity_ == FirstBlock) keep_spare(std::move(block_));
    block_.reset();
    begin_ = end_ = capacity_ = 0;
  }

 private:
  using Block = std::unique_ptr<char[]>;

  // A list that runs through the first bytes of the blocks. It has no destructor, so that static
  // objects may still use queues when the main thread's thread-local objects are gone.
  struct SpareList {
    char* first;
    std::size_t count;
    bool closed;
  };
  static inline constinit thread_local SpareList spares{nullptr, 0, false};

  // NOLINTNEXTLINE(cppcoreguidelines-special-member-functions): one a thread, never copied
  struct CloseAtThreadExit {
    ~CloseAtThreadExit() {
      while (spares.count > 0) take_spare();
      spares.closed = true;
    }
  };

  static void keep_spare(Block block) noexcept {
    if (spares.count == Spares || spares.closed) return;
    static thread_local const CloseAtThreadExit at_thread_exit;
    static_cast<void>(at_thread_exit);
    std::memcpy(block.get(), &spares.first, sizeof spares.first);
    spares.first = block.release();
    ++spares.count;
  }

  static Block take_spare() noexcept {
    Block block(spares.first);
    std::memcpy(&spares.first, block.get(), sizeof spares.first);
    --spares.count;
    return block;
  }

  static Block new_block(std::size_t capacity) noexcept {
    if (capacity == FirstBlock && spares.count > 0) return take_spare();
    return Block(new (std::nothrow) char[capacity]);
  }

  void swap(ByteQueue& other) noexcept {
    std::swap(block_, other.block_);
    std::swap(begin_, other.begin_);
    std::swap(end_, other.end_);
    std::swap(capacity_, other.capacity_);
  }

  Block block_;
  std::size_t begin_ = 0;
  std::size_t end_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace detail

// ===========================================================================
// 6  LineBuffer                                                  (chapter 03)
//
// TCP carries bytes, not messages. A line may come in ten pieces, ten lines in one piece, and where
// the cuts fall says nothing about what was sent.
// ===========================================================================

// Takes bytes in as they come and hands whole lines out, newline included.
//
//   IoResult result = lines.fill(socket);
//   while (const auto line = lines.next()) use(*line);
//
// A read goes into a block of 64 KiB that is borrowed from the thread's spare one; lines are views
// of it. Only a line that the end of the block cuts is copied, into memory of its own.
//
// Cost: every byte is looked at once, in memchr, and copied at most once (and once more now and
// then as a long line grows), however the stream is cut. Whole lines cost no allocation, a line
// that is cut one or two. An idle buffer owns no heap memory; one that holds a piece of a line, at
// most twice that piece. Out of memory ends the program (noexcept).
class LineBuffer {
 public:
  static constexpr std::size_t block_size = 65536;

  // `max_line` bounds a line's bytes, newline included.
  explicit LineBuffer(std::size_t max_line = 65536) noexcept
      : max_line_(std::max<std::size_t>(max_line, 1)) {}

  // Reads once. Call next until it returns nothing before you fill again: that gives the block
  // back. While lines are left, fill reads only as much as has room behind them, perhaps nothing.
  IoResult fill(FdView fd) noexcept {
    const IoResult result = read(fd, prepare());
    commit(result.bytes);
    return result;
  }

  // Where to put bytes that do not come from a descriptor's read; then say with commit how many
  // there are (zero too: the block goes back).
  std::span<char> prepare() noexcept {
    if (block_.empty() && !block_.reserve(block_size)) std::terminate();
    return block_.room();
  }
  void commit(std::size_t count) noexcept {
    block_.put(count);
    if (block_.empty() || overlong_) block_.reset();
  }

  // The next whole line, or nothing until more is read. The view is good until the next call of
  // next, fill or prepare.
  [[nodiscard]] std::optional<std::string_view> next() noexcept {
    if (std::exchange(partial_is_whole_, false)) partial_.clear();
    const std::string_view bytes = block_.bytes();
    const char* newline = find_newline(bytes);
    const std::size_t length =
        newline != nullptr ? static_cast<std::size_t>(newline - bytes.data()) + 1 : bytes.size();
    // Without its newline a line of max_line bytes is too long already.
    const std::size_t limit = newline != nullptr ? max_line_ : max_line_ - 1;
    if (partial_.size() + length > limit) return give_up();
    if (newline == nullptr) return keep_partial(bytes);
    block_.take(length);
    if (partial_.empty()) return bytes.substr(0, length);
    partial_is_whole_ = true;
    return partial_.append(bytes, 0, length);
  }

  // A line is longer than max_line. The lines before it have been handed out; it and all that
  // follows is thrown away. Nothing but destroying or assigning ends this state: whoever sends such
  // lines is best disconnected.
  bool overlong() const noexcept { return overlong_; }

  // The beginning of a line whose newline has not come, once next() has returned nothing: at end of
  // stream, the unterminated last line.
  std::string_view rest() const noexcept {
    return partial_is_whole_ ? std::string_view() : partial_;
  }

 private:
  static const char* find_newline(std::string_view bytes) noexcept {
    if (bytes.empty()) return nullptr;
    return static_cast<const char*>(std::memchr(bytes.data(), '\n', bytes.size()));
  }

  std::nullopt_t keep_partial(std::string_view bytes) noexcept {
    // Memory that a long line has left goes back when a short piece, or nothing, comes after it.
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

  detail::ByteQueue<block_size, 1> block_;  // read, and not looked at yet
  std::string partial_;                     // looked at: there is no newline
  std::size_t max_line_;
  bool partial_is_whole_ = false;  // a newline was added: it is handed out
  bool overlong_ = false;
};

// ===========================================================================
// 7  WriteBuffer                                                 (chapter 04)
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
// Cost: append copies; flush is one send(2) of all that is queued. Empty, it owns no heap memory;
// else at most about twice what is queued, and at least 4 KiB.
class WriteBuffer {
 public:
  explicit WriteBuffer(WriteLimits limits = {}) noexcept : limits_(limits) {}

  // Queues all of it, or nothing: false if the bound would be passed, or memory is out. Sends
  // nothing: gather what there is to say, then flush once.
  [[nodiscard]] bool append(std::string_view bytes) noexcept {
    if (bytes.size() > limits_.bound - size()) return false;
    if (!queue_.reserve(bytes.size())) return false;
    std::copy(bytes.begin(), bytes.end(), queue_.room().begin());
    queue_.put(bytes.size());
    return true;
  }

  // Sends once: ok if the buffer is empty now, would_block if a part is left. Then the socket is
  // full (epoll(7) says that a partial write is proof enough, in edge-triggered mode too): wait
  // until it is writable, and call again. Nothing is lost or sent twice.
  IoResult flush(FdView fd) noexcept {
    IoResult result = write(fd, queue_.bytes());
    queue_.take(result.bytes);
    if (queue_.empty()) {
      queue_.reset();
    } else if (result.ok()) {
      result.status = IoStatus::would_block;
    }
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

}  // namespace v0
}  // namespace edgewise

#endif  // EDGEWISE_HPP
