// Fd and FdView: one owner, one close. And the flags of every descriptor that
// the header makes.
#include <doctest/doctest.h>
#include <sys/eventfd.h>

#include <string>
#include <type_traits>

#include "support.hpp"

using namespace edgewise;
using namespace support;

static_assert(sizeof(Fd) == sizeof(int));
static_assert(!std::is_copy_constructible_v<Fd>);
static_assert(!std::is_copy_assignable_v<Fd>);
static_assert(std::is_nothrow_move_constructible_v<Fd>);
static_assert(std::is_nothrow_move_assignable_v<Fd>);
static_assert(!std::is_convertible_v<int, Fd>);
static_assert(!std::is_convertible_v<Fd, bool>);
static_assert(std::is_convertible_v<const Fd&, FdView>);
static_assert(!std::is_convertible_v<int, FdView>);

namespace {

int open_something() {
  const int descriptor = ::eventfd(0, EFD_CLOEXEC);
  REQUIRE(descriptor >= 0);
  return descriptor;
}

}  // namespace

TEST_CASE("an Fd closes its descriptor at the end of its scope") {
  const int descriptor = open_something();
  {
    const Fd fd{descriptor};
    CHECK(fd.get() == descriptor);
    CHECK(static_cast<bool>(fd));
    CHECK(is_open(descriptor));
  }
  CHECK_FALSE(is_open(descriptor));
}

TEST_CASE("an empty Fd owns nothing and closes nothing") {
  Fd fd;
  CHECK_FALSE(static_cast<bool>(fd));
  CHECK(fd.get() == -1);
  fd.reset();
  CHECK(fd.release() == -1);
}

TEST_CASE("a moved-from Fd is empty and leaves the number alone") {
  const int descriptor = open_something();
  int reused = -1;
  {
    Fd first{descriptor};
    {
      const Fd second{std::move(first)};
      CHECK(second.get() == descriptor);
      CHECK_FALSE(static_cast<bool>(first));  // NOLINT(bugprone-use-after-move)
      CHECK(is_open(descriptor));
    }
    CHECK_FALSE(is_open(descriptor));
    // The kernel hands out the lowest free number: the same one again.
    reused = open_something();
    REQUIRE(reused == descriptor);
  }
  CHECK(is_open(reused));
  ::close(reused);
}

TEST_CASE("move assignment closes what was owned before, once") {
  const int old = open_something();
  const int descriptor = open_something();
  Fd target{old};
  Fd source{descriptor};
  target = std::move(source);
  CHECK(target.get() == descriptor);
  CHECK_FALSE(static_cast<bool>(source));  // NOLINT(bugprone-use-after-move)
  CHECK(is_open(descriptor));
  CHECK_FALSE(is_open(old));
}

TEST_CASE("an Fd assigned to itself keeps its descriptor open") {
  Fd fd{open_something()};
  const int descriptor = fd.get();
  Fd& same = fd;
  fd = std::move(same);
  CHECK(fd.get() == descriptor);
  CHECK(is_open(descriptor));
}

TEST_CASE("release gives the descriptor away open") {
  int descriptor = -1;
  {
    Fd fd{open_something()};
    descriptor = fd.release();
    CHECK_FALSE(static_cast<bool>(fd));
  }
  CHECK(is_open(descriptor));
  ::close(descriptor);
}

TEST_CASE("reset closes the old descriptor and owns the new one") {
  const int old = open_something();
  const int next = open_something();
  {
    Fd fd{old};
    fd.reset(next);
    CHECK_FALSE(is_open(old));
    CHECK(is_open(next));
    CHECK(fd.get() == next);
    fd.reset();
    CHECK_FALSE(is_open(next));
    CHECK_FALSE(static_cast<bool>(fd));
  }
}

TEST_CASE("an error of close is harmless") {
  Fd fd{open_something()};
  ::close(fd.get());
  fd.reset();
  CHECK_FALSE(static_cast<bool>(fd));
}

TEST_CASE("descriptor 0 is a descriptor") {
  const int code = run_in_child([] {
    ::close(0);
    {
      const Fd fd{::eventfd(0, EFD_CLOEXEC)};
      if (fd.get() != 0 || !fd) return 1;
    }
    return is_open(0) ? 2 : 0;
  });
  CHECK(code == 0);
}

TEST_CASE("an FdView names a descriptor and never closes it") {
  const Fd fd{open_something()};
  {
    const FdView view = fd;
    const FdView bare{fd.get()};
    CHECK(view.get() == fd.get());
    CHECK(bare.get() == fd.get());
  }
  CHECK(is_open(fd.get()));
}

TEST_CASE("what goes in at a pipe's writer comes out at its reader") {
  Pipe pipe = open_pipe();
  send_all(pipe.writer, "through");
  CHECK(receive(pipe.reader, 7) == "through");
  char byte = 0;
  CHECK(::read(pipe.writer.get(), &byte, 1) < 0);
  CHECK(::write(pipe.reader.get(), &byte, 1) < 0);
  pipe.writer.reset();
  CHECK(::read(pipe.reader.get(), &byte, 1) == 0);
}

TEST_CASE("neither end of a pipe ever blocks") {
  const Pipe pipe = open_pipe();
  char byte = 0;
  CHECK(::read(pipe.reader.get(), &byte, 1) < 0);
  CHECK(errno == EAGAIN);
  const std::string kilobyte(1024, 'x');
  while (::write(pipe.writer.get(), kilobyte.data(), kilobyte.size()) > 0)
    continue;
  CHECK(errno == EAGAIN);
}

TEST_CASE("a pipe that cannot be had is refused by name") {
  const Thrown thrown = thrown_by([] {
    const NoDescriptors none;
    const Pipe pipe = open_pipe();
  });
  CHECK(thrown.error == EMFILE);
  CHECK(thrown.text == "open a pipe: Too many open files");
}

TEST_CASE(
    "every descriptor is made close-on-exec, and each socket and pipe so that "
    "it never blocks") {
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  const Connected connected = connect(local_address(listener));
  REQUIRE_FALSE(connected.failed());
  REQUIRE(becomes_readable(listener));
  const Accepted accepted = accept(listener);
  REQUIRE(accepted.ok());
  const Fd datagrams = bind_datagram(*Address::parse("127.0.0.1:0"));
  const Pipe pipe = open_pipe();
  const SocketPair pair = open_socket_pair();
  const Poller poller;

  CHECK(is_close_on_exec(poller));
  for (const Fd* fd : {&listener, &accepted.fd, &connected.fd, &datagrams,
                       &pipe.reader, &pipe.writer, &pair.first, &pair.second}) {
    CHECK(is_close_on_exec(*fd));
    CHECK(is_non_blocking(*fd));
  }
}
