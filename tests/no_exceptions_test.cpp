// Without exceptions a failed set-up prints its line and aborts.
//
// CMake compiles this file alone with -fno-exceptions and -fno-rtti.
#ifdef __cpp_exceptions
  #error "compile this with -fno-exceptions"
#endif

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <csignal>
#include <cstdint>
#include <edgewise.hpp>
#include <string>

using namespace edgewise;

namespace {

struct Death {
  int signal = 0;    // 0: it lived
  std::string said;  // the first line; emulators add their own
};

// Runs a function in a child process and tells what became of that, and what it
// wrote on standard error.
template <class Function>
Death death_of(Function function) {
  int ends[2];
  Death death;
  if (::pipe2(ends, O_CLOEXEC) != 0) return death;
  Fd from{ends[0]};
  Fd to{ends[1]};
  const ::pid_t child = ::fork();
  if (child == 0) {
    std::signal(SIGABRT, SIG_DFL);
    ::alarm(20);
    ::dup2(to.get(), STDERR_FILENO);
    function();
    ::_exit(0);
  }
  to.reset();
  char room[512];
  for (;;) {
    const IoResult result = read(from, room);
    if (!result.ok()) break;
    death.said.append(room, result.bytes);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  death.signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
  death.said.resize(std::min(death.said.size(), death.said.find('\n') + 1));
  return death;
}

template <class Function>
void check_dies(const std::string& line, Function function) {
  CAPTURE(line);
  const Death death = death_of(function);
  CHECK(death.signal == SIGABRT);
  CHECK(death.said == line + '\n');
}

// In a process that may open no descriptor.
template <class Function>
void check_dies_of_emfile(const std::string& what, Function function) {
  check_dies(what + ": Too many open files", [&] {
    const ::rlimit none{0, 0};
    if (::setrlimit(RLIMIT_NOFILE, &none) == 0) function();
  });
}

}  // namespace

TEST_CASE("without exceptions, a busy address prints its line and aborts") {
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  Address address = local_address(listener);
  check_dies("listen on " + address.to_string() + ": Address already in use",
             [&] { const Fd second = listen(address); });

  const Fd datagrams = bind_datagram(*Address::parse("127.0.0.1:0"));
  address = local_address(datagrams);
  check_dies("bind to " + address.to_string() + ": Address already in use",
             [&] { const Fd second = bind_datagram(address); });
}

TEST_CASE(
    "without exceptions, a refused descriptor prints its line and aborts") {
  check_dies("poller: add descriptor -1 (it is not open): Bad file descriptor",
             [] {
               Poller poller;
               poller.add(FdView{-1}, Token{1}, Interest::readable);
             });
  check_dies("address of descriptor -1: Bad file descriptor",
             [] { static_cast<void>(local_address(FdView{-1})); });
  check_dies("open standard input: Bad file descriptor", [] {
    ::close(STDIN_FILENO);
    const Fd input = open_standard_input();
  });
}

TEST_CASE("without exceptions, a bad argument prints its line and aborts") {
  check_dies("create a poller with a batch of 0 events: Invalid argument",
             [] { const Poller poller{0}; });
  check_dies("watch signal " + std::to_string(SIGKILL) + ": Invalid argument",
             [] { const Signals signals{SIGKILL}; });
  const std::string most = std::to_string(INT_MAX);
  check_dies("watch process " + most + ": No such process",
             [] { const Child child{INT_MAX}; });
  const std::string all = std::to_string(SIZE_MAX);
  check_dies(
      "make a broadcast log of " + all + " bytes: Cannot allocate memory",
      [] { const BroadcastLog log{SIZE_MAX}; });
}

TEST_CASE(
    "without exceptions, whatever there is no descriptor for prints its line "
    "and aborts") {
  check_dies_of_emfile("open a pipe", [] { const Pipe pipe = open_pipe(); });
  check_dies_of_emfile("open a socket pair",
                       [] { const SocketPair pair = open_socket_pair(); });
  check_dies_of_emfile("create a poller", [] { const Poller poller; });
  check_dies_of_emfile("create a waker", [] { const Waker waker; });
  check_dies_of_emfile("create a timer", [] { const Timer timer; });
  check_dies_of_emfile("watch signals", [] { const Signals signals{SIGUSR1}; });
  const ::pid_t self = ::getpid();
  check_dies_of_emfile("watch process " + std::to_string(self),
                       [&] { const Child child{self}; });
  check_dies_of_emfile("reserve a descriptor", [] { const Reserve reserve; });
  check_dies_of_emfile("make a broadcast log of 1 bytes",
                       [] { const BroadcastLog log{1}; });
}

TEST_CASE("without exceptions, what returns results still does") {
  Poller poller;
  CHECK(poller.try_add(FdView{-1}, Token{1}, Interest::readable) ==
        std::errc::bad_file_descriptor);
  CHECK(accept(FdView{-1}).error == EBADF);
  CHECK(write(FdView{-1}, "a").error == EBADF);
  CHECK(connect(Address()).failed());
  char room[1];
  CHECK(receive(FdView{-1}, room).error == EBADF);
  CHECK(send_fd(FdView{-1}, "a", FdView{-1}).error == EBADF);
  WriteBuffer buffer{{1, 1}};
  CHECK_FALSE(buffer.append("too much"));
}
