// Standard input of every kind, and which descriptors a poller can wait for.
#include <doctest/doctest.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <termios.h>

#include <array>
#include <cstdlib>
#include <string>

#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

// A terminal: what goes in at `near` is typed at `far`.
Ends make_terminal() {
  Ends ends;
  ends.near.reset(::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC));
  REQUIRE(static_cast<bool>(ends.near));
  REQUIRE(::grantpt(ends.near.get()) == 0);
  REQUIRE(::unlockpt(ends.near.get()) == 0);
  char name[64];
  REQUIRE(::ptsname_r(ends.near.get(), name, sizeof name) == 0);
  ends.far.reset(::open(name, O_RDWR | O_NOCTTY | O_CLOEXEC));
  REQUIRE(static_cast<bool>(ends.far));
  ::termios settings{};
  REQUIRE(::tcgetattr(ends.far.get(), &settings) == 0);
  settings.c_lflag &= ~static_cast<::tcflag_t>(ECHO);
  REQUIRE(::tcsetattr(ends.far.get(), TCSANOW, &settings) == 0);
  return ends;
}

// A pipe or a socket as a shell makes them: one whose end blocks.
Ends blocking(Ends ends) {
  make_blocking(ends.far);
  return ends;
}

// A regular file that nobody else sees.
Fd make_file(std::string_view content) {
  char name[] = "/tmp/edgewise-XXXXXX";
  Fd fd{::mkostemp(name, O_CLOEXEC)};
  REQUIRE(static_cast<bool>(fd));
  ::unlink(name);
  send_all(fd, content);
  REQUIRE(::lseek(fd.get(), 0, SEEK_SET) == 0);
  return fd;
}

int status_flags(FdView fd) { return ::fcntl(fd.get(), F_GETFL); }

// Runs the function in a child whose standard input is the descriptor.
template <class Function>
int run_with_standard_input(FdView fd, Function function) {
  return run_in_child([&] {
    if (::dup2(fd.get(), STDIN_FILENO) != STDIN_FILENO) return 98;
    return function();
  });
}

// Reads standard input to its end, as a program does that copes with all kinds
// of it.
std::string all_of_standard_input() {
  const Fd input = open_standard_input();
  const bool waits = pollable(input);
  Poller poller;
  if (waits) poller.add(input, Token{1}, Interest::readable);
  std::string all;
  std::string room(1000, '\0');
  for (;;) {
    if (waits && poller.wait(patience).empty()) return "nothing came";
    const IoResult result = read(input, room);
    all.append(room, 0, result.bytes);
    if (result.ended()) return all;
  }
}

std::string text_of_lines(int count) {
  std::string text;
  for (int number = 0; number < count; ++number)
    text += "line " + std::to_string(number) + '\n';
  return text;
}

}  // namespace

// ---------------------------------------------------------------------------
// Standard input
// ---------------------------------------------------------------------------

namespace {

// What is opened anew never blocks, and does not touch descriptor 0. Returns 0
// if all is as it should be.
int check_opened_anew(FdView typist) {
  const int before = status_flags(FdView{STDIN_FILENO});
  if ((before & O_NONBLOCK) != 0) return 1;
  Fd input = open_standard_input();
  if (input.get() == STDIN_FILENO) return 2;
  if (!is_non_blocking(input) || !is_close_on_exec(input)) return 3;
  if (status_flags(FdView{STDIN_FILENO}) != before) return 4;

  char room[64];
  if (!read(input, room).would_block()) return 5;
  Poller poller;
  poller.add(input, Token{1}, Interest::readable);
  send_all(typist, "typed\n");
  if (poller.wait(patience).size() != 1) return 6;
  const IoResult result = read(input, room);
  if (std::string_view(room, result.bytes) != "typed\n") return 7;
  if (!read(input, room).would_block()) return 8;

  // Closing it leaves standard input to whoever else reads that.
  input.reset();
  send_all(typist, "more\n");
  if (::read(STDIN_FILENO, room, sizeof room) != 5) return 9;
  return status_flags(FdView{STDIN_FILENO}) == before ? 0 : 10;
}

}  // namespace

TEST_CASE(
    "P32 a terminal is opened anew: reading it never blocks, and descriptor 0 "
    "blocks as before") {
  const Ends terminal = make_terminal();
  CHECK(run_with_standard_input(terminal.far, [&] {
          return check_opened_anew(terminal.near);
        }) == 0);
  CHECK_FALSE(is_non_blocking(terminal.far));  // the shell's
}

TEST_CASE(
    "P32 a pipe is opened anew: reading it never blocks, and descriptor 0 "
    "blocks as before") {
  const Ends pipe = blocking(make_pipe());
  CHECK(run_with_standard_input(
            pipe.far, [&] { return check_opened_anew(pipe.near); }) == 0);
  CHECK_FALSE(is_non_blocking(pipe.far));
}

TEST_CASE("P32 a descriptor 0 that never blocked goes on so") {
  const Ends pipe = make_pipe();
  const int code = run_with_standard_input(pipe.far, [] {
    const Fd input = open_standard_input();
    return is_non_blocking(FdView{STDIN_FILENO}) && is_non_blocking(input) ? 0
                                                                           : 1;
  });
  CHECK(code == 0);
}

TEST_CASE("a terminal does not become the program's controlling terminal") {
  const Ends terminal = make_terminal();
  const int code = run_with_standard_input(terminal.far, [] {
    if (::setsid() < 0) return 1;
    const Fd input = open_standard_input();
    const Fd controlling{::open("/dev/tty", O_RDONLY | O_CLOEXEC)};
    return controlling ? 2 : 0;
  });
  CHECK(code == 0);
}

TEST_CASE(
    "P32 a terminal that is another user's is read all the same, once for "
    "each event") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: only root can become another user");
    return;
  }
  const Ends terminal = make_terminal();
  const int code = run_with_standard_input(terminal.far, [&] {
    constexpr ::uid_t somebody = 65534;
    if (::setuid(somebody) != 0) return 1;
    const int before = status_flags(FdView{STDIN_FILENO});
    const Fd input = open_standard_input();
    if (!is_close_on_exec(input)) return 2;
    if (status_flags(FdView{STDIN_FILENO}) != before) return 3;
    send_all(terminal.near, "typed\n");
    if (!becomes_readable(input)) return 4;
    char room[64];
    return read(input, room).bytes == 6 ? 0 : 5;
  });
  CHECK(code == 0);
}

TEST_CASE(
    "P32 a socket is duplicated, and descriptor 0 blocks as before: it is "
    "read once for each event") {
  const Ends socket = blocking(make_socketpair());
  const int code = run_with_standard_input(socket.far, [&] {
    const int before = status_flags(FdView{STDIN_FILENO});
    const Fd input = open_standard_input();
    if (!is_close_on_exec(input) || input.get() == STDIN_FILENO) return 1;
    if (status_flags(FdView{STDIN_FILENO}) != before) return 2;
    Poller poller;
    poller.add(input, Token{1}, Interest::readable);
    if (!poller.wait(0ms).empty()) return 3;
    send_all(socket.near, "hello");
    if (poller.wait(patience).size() != 1) return 4;
    char room[64];
    return read(input, room).bytes == 5 ? 0 : 5;
  });
  CHECK(code == 0);
}

TEST_CASE("a regular file is read on from where it was") {
  const Fd file = make_file("already read, and the rest");
  const int code = run_with_standard_input(file, [] {
    char room[64];
    if (::read(STDIN_FILENO, room, 14) != 14) return 1;
    const int before = status_flags(FdView{STDIN_FILENO});
    const Fd input = open_standard_input();
    if (!is_close_on_exec(input) || input.get() == STDIN_FILENO) return 2;
    if (status_flags(FdView{STDIN_FILENO}) != before) return 3;
    const IoResult result = read(input, room);
    if (std::string_view(room, result.bytes) != "and the rest") return 4;
    // The offset is shared, as by all who inherited the descriptor.
    return ::lseek(STDIN_FILENO, 0, SEEK_CUR) == 26 ? 0 : 5;
  });
  CHECK(code == 0);
}

TEST_CASE("without a standard input, opening it throws") {
  const int code = run_in_child([] {
    ::close(STDIN_FILENO);
    const Thrown thrown =
        thrown_by([] { const Fd input = open_standard_input(); });
    if (thrown.error != EBADF) return 1;
    return thrown.text == "open standard input: Bad file descriptor" ? 0 : 2;
  });
  CHECK(code == 0);
}

TEST_CASE("standard input without a free descriptor throws") {
  const Ends pipe = make_pipe();
  const Fd file = make_file("content");
  for (const FdView kind : {FdView{pipe.far}, FdView{file}}) {
    const int code = run_with_standard_input(kind, [] {
      const Thrown thrown = thrown_by([] {
        const NoDescriptors none;
        const Fd input = open_standard_input();
      });
      return thrown.error == EMFILE ? 0 : 1;
    });
    CHECK(code == 0);
  }
}

TEST_CASE("standard input from a pipe, a socket or a terminal is read whole") {
  const std::string text = text_of_lines(200);
  for (Ends& ends : std::array{blocking(make_pipe()),
                               blocking(make_socketpair()), make_terminal()}) {
    const bool terminal = ::isatty(ends.far.get()) == 1;
    send_all(ends.near, text);
    // A terminal's end is typed: control D.
    if (terminal) {
      send_all(ends.near, "\4");
    } else {
      ends.near.reset();
    }
    CHECK(run_with_standard_input(ends.far, [&] {
            return all_of_standard_input() == text ? 0 : 1;
          }) == 0);
  }
}

TEST_CASE("P08 program < file is read whole") {
  const std::string text = text_of_lines(100'000);
  const Fd file = make_file(text);
  CHECK(run_with_standard_input(file, [&] {
          return all_of_standard_input() == text ? 0 : 1;
        }) == 0);
}

TEST_CASE("P08 program < /dev/null is at its end at once") {
  const Fd null{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
  CHECK(run_with_standard_input(
            null, [] { return all_of_standard_input().empty() ? 0 : 1; }) == 0);
}

// ---------------------------------------------------------------------------
// pollable
// ---------------------------------------------------------------------------

TEST_CASE("P08 pollable is what a poller adds") {
  const auto pipe = make_pipe();
  const auto socket = make_socketpair();
  const auto terminal = make_terminal();
  const Fd event{::eventfd(0, EFD_CLOEXEC)};
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  const Poller inner;
  const Fd file = make_file("content");
  const Fd directory{::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  const Fd null{::open("/dev/null", O_RDWR | O_CLOEXEC)};

  Poller poller;
  const auto adds = [&](FdView fd) {
    return !poller.try_add(fd, Token{1}, Interest::readable);
  };
  for (const FdView fd :
       {FdView{pipe.near}, FdView{pipe.far}, FdView{socket.near},
        FdView{terminal.far}, FdView{terminal.near}, FdView{event},
        FdView{listener}, FdView{inner}}) {
    CHECK(pollable(fd));
    CHECK(pollable(fd));  // asking changes nothing
    CHECK(adds(fd));
  }
  for (const FdView fd : {FdView{file}, FdView{directory}, FdView{null}}) {
    CHECK_FALSE(pollable(fd));
    CHECK_FALSE(adds(fd));
  }
}

TEST_CASE("P08 what is not open is not pollable: add says what is wrong") {
  CHECK_FALSE(pollable(FdView{-1}));
  int closed = 0;
  while (is_open(closed)) ++closed;
  CHECK_FALSE(pollable(FdView{closed}));
  Poller poller;
  CHECK(thrown_by([&] {
          poller.add(FdView{-1}, Token{1}, Interest::readable);
        }).text ==
        "poller: add descriptor -1 (it is not open): Bad file descriptor");
}

TEST_CASE("P08 pollable is right when there is no descriptor to be had, too") {
  const auto pipe = make_pipe();
  const auto socket = make_socketpair();
  const Poller inner;
  const Fd file = make_file("content");
  const Fd directory{::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
  const Fd null{::open("/dev/null", O_RDWR | O_CLOEXEC)};
  const NoDescriptors none;
  for (const FdView fd : {FdView{pipe.near}, FdView{pipe.far},
                          FdView{socket.near}, FdView{inner}})
    CHECK(pollable(fd));
  for (const FdView fd :
       {FdView{file}, FdView{directory}, FdView{null}, FdView{-1}})
    CHECK_FALSE(pollable(fd));
}

TEST_CASE("pollable leaves no descriptor behind") {
  const auto pipe = make_pipe();
  const Fd file = make_file("");
  const auto lowest_free = [] { return Fd{::dup(0)}.get(); };
  const int free_before = lowest_free();
  CHECK(pollable(pipe.far));
  CHECK_FALSE(pollable(file));
  CHECK(lowest_free() == free_before);
}

TEST_CASE("P08 a poller refuses a regular file, and says what to do instead") {
  const Fd file = make_file("content");
  Poller poller;
  const Thrown thrown =
      thrown_by([&] { poller.add(file, Token{1}, Interest::readable); });
  CHECK(thrown.error == EPERM);
  CHECK(thrown.text ==
        "poller: add descriptor " + std::to_string(file.get()) +
            " (a regular file or the like is always ready: do not add it, "
            "just read or write it): Operation not permitted");
}
