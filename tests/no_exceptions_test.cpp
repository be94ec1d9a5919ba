// Without exceptions a failed set-up prints its line and aborts.
//
// CMake compiles this file alone with -fno-exceptions and -fno-rtti.
#ifdef __cpp_exceptions
  #error "compile this with -fno-exceptions"
#endif

#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <edgewise.hpp>
#include <string>

using namespace edgewise;

namespace {

struct Death {
  int signal = 0;  // 0: it lived
  std::string said;
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
  return death;
}

}  // namespace

TEST_CASE("without exceptions, a busy port prints its line and aborts") {
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  const Address address = local_address(listener);
  const Death death = death_of([&] { const Fd second = listen(address); });
  CHECK(death.signal == SIGABRT);
  CHECK(death.said ==
        "listen on " + address.to_string() + ": Address already in use\n");
}

TEST_CASE(
    "without exceptions, a refused descriptor prints its line and "
    "aborts") {
  const Death death = death_of([] {
    Poller poller;
    poller.add(FdView{-1}, Token{1}, Interest::readable);
  });
  CHECK(death.signal == SIGABRT);
  CHECK(death.said ==
        "poller: add descriptor -1 (it is not open): Bad file descriptor\n");
}

TEST_CASE("without exceptions, what returns results still does") {
  Poller poller;
  CHECK(poller.try_add(FdView{-1}, Token{1}, Interest::readable) ==
        std::errc::bad_file_descriptor);
  CHECK(accept(FdView{-1}).error == EBADF);
  CHECK(write(FdView{-1}, "a").error == EBADF);
  CHECK(connect(Address()).failed());
  WriteBuffer buffer{{1, 1}};
  CHECK_FALSE(buffer.append("too much"));
}
