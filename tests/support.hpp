// What several unit tests need: pairs of connected descriptors, a child process
// to die in, a signal that keeps knocking, and questions to ask of a
// descriptor. Every wait in here has a limit.
#ifndef TESTS_SUPPORT_HPP
#define TESTS_SUPPORT_HPP

#include <dlfcn.h>
#include <doctest/doctest.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <edgewise.hpp>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>

namespace support {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using edgewise::Fd;
using edgewise::FdView;

// No wait in the tests takes longer, however slow the machine.
constexpr std::chrono::milliseconds patience = 10s;

// ---------------------------------------------------------------------------
// Descriptors
// ---------------------------------------------------------------------------

inline bool is_open(int descriptor) {
  return ::fcntl(descriptor, F_GETFD) >= 0;
}

inline bool is_close_on_exec(FdView fd) {
  return (::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC) != 0;
}

inline bool is_non_blocking(FdView fd) {
  return (::fcntl(fd.get(), F_GETFL) & O_NONBLOCK) != 0;
}

inline void make_blocking(FdView fd) {
  const int flags = ::fcntl(fd.get(), F_GETFL);
  REQUIRE(::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK) == 0);
}

inline int option_of(FdView socket, int level, int option) {
  int value = -1;
  ::socklen_t length = sizeof value;
  REQUIRE(::getsockopt(socket.get(), level, option, &value, &length) == 0);
  return value;
}

inline void set_buffer(FdView socket, int option, int bytes) {
  REQUIRE(::setsockopt(socket.get(), SOL_SOCKET, option, &bytes,
                       sizeof bytes) == 0);
}

// poll(2) rather than the Poller, which is what is being tested.
inline bool becomes(FdView fd, short condition) {
  ::pollfd waiting{fd.get(), condition, 0};
  const auto deadline = Clock::now() + patience;
  while (Clock::now() < deadline)
    if (::poll(&waiting, 1, 100) > 0) return true;
  return false;
}
inline bool becomes_readable(FdView fd) { return becomes(fd, POLLIN); }
inline bool becomes_writable(FdView fd) { return becomes(fd, POLLOUT); }

// Two ends that are connected: what is written to `near` is read from `far`.
struct Ends {
  Fd near;
  Fd far;
};

inline Ends make_pipe() {
  int ends[2];
  REQUIRE(::pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0);
  return {Fd{ends[1]}, Fd{ends[0]}};
}

inline Ends make_socketpair() {
  int ends[2];
  REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0,
                       ends) == 0);
  return {Fd{ends[0]}, Fd{ends[1]}};
}

// A connection through the loopback device; `near` is the accepted end. Buffers
// are set on the listener and before connecting, since TCP fixes its window
// scale in the handshake.
inline Ends make_tcp(int send_buffer = 0, int receive_buffer = 0) {
  const Fd listener =
      edgewise::listen(*edgewise::Address::parse("127.0.0.1:0"));
  if (send_buffer != 0) set_buffer(listener, SO_SNDBUF, send_buffer);
  Fd far{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  REQUIRE(far);
  if (receive_buffer != 0) set_buffer(far, SO_RCVBUF, receive_buffer);
  const edgewise::Address address = edgewise::local_address(listener);
  REQUIRE(::connect(far.get(), address.data(), address.size()) == 0);
  REQUIRE(::fcntl(far.get(), F_SETFL, O_NONBLOCK) == 0);
  REQUIRE(becomes_readable(listener));
  edgewise::Accepted accepted = edgewise::accept(listener);
  REQUIRE(accepted.ok());
  return {std::move(accepted.fd), std::move(far)};
}

inline void send_all(FdView fd, std::string_view bytes) {
  REQUIRE(::write(fd.get(), bytes.data(), bytes.size()) ==
          static_cast<::ssize_t>(bytes.size()));
}

// Whatever can be read without waiting.
inline std::string receive_some(FdView fd) {
  std::string all;
  char room[4096];
  for (;;) {
    const ::ssize_t count = ::read(fd.get(), room, sizeof room);
    if (count <= 0) return all;
    all.append(room, static_cast<std::size_t>(count));
  }
}

inline std::string receive(FdView fd, std::size_t count) {
  std::string all;
  while (all.size() < count && becomes_readable(fd)) {
    const std::string some = receive_some(fd);
    if (some.empty()) break;
    all += some;
  }
  return all;
}

// Closes with RST instead of FIN.
inline void reset_connection(Fd& fd) {
  const ::linger at_once{1, 0};
  REQUIRE(::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &at_once,
                       sizeof at_once) == 0);
  fd.reset();
}

// ---------------------------------------------------------------------------
// Errors
// ---------------------------------------------------------------------------

// The text and the errno of the std::system_error that a call throws.
struct Thrown {
  std::string text = "nothing was thrown";
  int error = 0;
};

template <class Call>
Thrown thrown_by(Call call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return {error.what(), error.code().value()};
  }
  return {};
}

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// While it lives, this process can open no further descriptor.
class NoDescriptors {
 public:
  NoDescriptors() {
    // UBSan opens a pipe to look at an object of a type that it has not met.
    static_cast<void>(thrown_by([] { const edgewise::Child nobody{-1}; }));
    // Not 0: poll takes no more descriptors than the limit.
    int lowest_free = 0;
    while (is_open(lowest_free)) ++lowest_free;
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &before_) == 0);
    const ::rlimit none{static_cast<::rlim_t>(lowest_free), before_.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
  }
  ~NoDescriptors() { ::setrlimit(RLIMIT_NOFILE, &before_); }
  NoDescriptors(const NoDescriptors&) = delete;
  NoDescriptors& operator=(const NoDescriptors&) = delete;

 private:
  ::rlimit before_{};
};

// ---------------------------------------------------------------------------
// Interposed functions
// ---------------------------------------------------------------------------

// The function that a test's own one of the same name stands in front of. No
// REQUIRE: it may be called before doctest is there.
template <class Function>
Function* next_definition(const char* name) {
  auto* const function = reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
  if (function == nullptr) {
    std::fprintf(stderr, "there is no %s to stand in front of\n", name);
    std::abort();
  }
  return function;
}

// ---------------------------------------------------------------------------
// Processes and signals
// ---------------------------------------------------------------------------

// Runs a function in a child process and tells how that ended: with the
// function's value, or with 128 and the number of the signal that killed it.
template <class Function>
int run_in_child(Function function) {
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    // doctest's own handlers would report a death as a failed test case.
    for (const int number : {SIGABRT, SIGTERM, SIGSEGV, SIGFPE})
      std::signal(number, SIG_DFL);
    ::alarm(20);
    try {
      ::_exit(function());
    } catch (...) {  // a REQUIRE: this process must not run the other tests
      ::_exit(99);
    }
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0) REQUIRE(errno == EINTR);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// While it lives, SIGALRM interrupts this process every two milliseconds. After
// five seconds it gives up, so that a wait which each signal prolongs ends too.
class Interruptions {
 public:
  // `flags` are sigaction's: SA_RESTART or none.
  explicit Interruptions(int flags) {
    count() = 0;
    struct sigaction action {};
    action.sa_handler = [](int) {
      count() = count() + 1;
      if (count() == 2500) set_timer(0);
    };
    action.sa_flags = flags;
    REQUIRE(::sigaction(SIGALRM, &action, &before_) == 0);
    set_timer(2000);
  }
  ~Interruptions() {
    set_timer(0);
    ::sigaction(SIGALRM, &before_, nullptr);
  }
  Interruptions(const Interruptions&) = delete;
  Interruptions& operator=(const Interruptions&) = delete;

  static volatile std::sig_atomic_t& count() {
    static volatile std::sig_atomic_t handled = 0;
    return handled;
  }

 private:
  static void set_timer(::suseconds_t microseconds) {
    const ::timeval period{0, microseconds};
    const ::itimerval timer{period, period};
    ::setitimer(ITIMER_REAL, &timer, nullptr);
  }

  struct sigaction before_ {};
};

// Keeps SIGALRM off a thread, so that it hits the one under test.
inline void block_interruptions() {
  ::sigset_t alarm;
  ::sigemptyset(&alarm);
  ::sigaddset(&alarm, SIGALRM);
  ::pthread_sigmask(SIG_BLOCK, &alarm, nullptr);
}

}  // namespace support

#endif  // TESTS_SUPPORT_HPP
