// The pitfalls of epoll that concern several parts of the header at once: what
// a program that is executed inherits (P05), which calls are repeated (P21),
// and whether one fast peer can keep a loop from the others (P29). And corners
// of P24 and P25. The rest is in the tests of each part.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <fstream>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;

// ---------------------------------------------------------------------------
// The interposed calls
// ---------------------------------------------------------------------------

namespace spy {

// Two functions make a descriptor and close it before they return. Only a child
// process that another thread starts meanwhile would inherit it, so look at the
// flags instead.
int epoll_flags = -1;
unsigned memory_flags = 0;

// The next close says that a signal has interrupted it. By then, on Linux, the
// number is free.
bool interrupt_close = false;
int closes = 0;

bool break_pipe = false;  // writev fails with EPIPE and raises nothing

}  // namespace spy

extern "C" int epoll_create1(int flags) noexcept {
  static auto* const real = next_definition<int(int)>("epoll_create1");
  spy::epoll_flags = flags;
  return real(flags);
}

extern "C" int memfd_create(const char* name, unsigned flags) noexcept {
  static auto* const real =
      next_definition<int(const char*, unsigned)>("memfd_create");
  spy::memory_flags = flags;
  return real(name, flags);
}

extern "C" int close(int descriptor) {
  static auto* const real = next_definition<int(int)>("close");
  ++spy::closes;
  const int result = real(descriptor);
  if (!std::exchange(spy::interrupt_close, false)) return result;
  errno = EINTR;
  return -1;
}

extern "C" ::ssize_t writev(int descriptor, const ::iovec* pieces, int count) {
  static auto* const real =
      next_definition<::ssize_t(int, const ::iovec*, int)>("writev");
  if (!spy::break_pipe) return real(descriptor, pieces, count);
  errno = EPIPE;
  return -1;
}

// ---------------------------------------------------------------------------
// P05
// ---------------------------------------------------------------------------

namespace {

// Executes another program that looks which of these descriptors it has.
// Returns the place of the first one among them, from 1 on, or 0.
int first_inherited(const std::vector<int>& numbers) {
  return run_in_child([&] {
    std::vector<std::string> words{
        "/bin/sh", "-c",
        "n=0; for fd do n=$((n + 1)); [ -e /proc/$$/fd/$fd ] && exit $n; done; "
        "exit 0",
        "sh"};
    for (const int number : numbers) words.push_back(std::to_string(number));
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    ::execv(arguments[0], arguments.data());
    return 98;
  });
}

// The descriptor that the header's function makes of one passed to it, which is
// not close-on-exec itself.
Fd passed_descriptor() {
  const SocketPair ends = open_socket_pair();
  const Fd inheritable{::dup(STDERR_FILENO)};
  REQUIRE(send_fd(ends.first, "a", inheritable).ok());
  std::array<char, 1> room{};
  Received received = receive(ends.second, room);
  REQUIRE(received.fd);
  return std::move(received.fd);
}

// Makes `descriptor` standard input for as long as it lives.
class StandardInput {
 public:
  explicit StandardInput(FdView descriptor)
      : before_(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3)) {
    REQUIRE(::dup2(descriptor.get(), STDIN_FILENO) == STDIN_FILENO);
  }
  ~StandardInput() {
    if (before_) {
      ::dup2(before_.get(), STDIN_FILENO);
    } else {
      ::close(STDIN_FILENO);
    }
  }
  StandardInput(const StandardInput&) = delete;
  StandardInput& operator=(const StandardInput&) = delete;

 private:
  Fd before_;
};

Fd standard_input_that_is(FdView descriptor) {
  const StandardInput redirected(descriptor);
  return open_standard_input();
}

std::vector<int> open_descriptors() {
  std::vector<int> numbers;
  for (int number = 0; number < 256; ++number)
    if (is_open(number)) numbers.push_back(number);
  return numbers;
}

}  // namespace

TEST_CASE("P05 a program that is executed inherits no descriptor of ours") {
  const Pipe pipe = open_pipe();
  const SocketPair pair = open_socket_pair();
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  const Fd datagrams = bind_datagram(*Address::parse("127.0.0.1:0"));
  const Connected connected = connect(local_address(listener));
  REQUIRE_FALSE(connected.failed());
  REQUIRE(becomes_readable(listener));
  const Accepted accepted = accept(listener);
  REQUIRE(accepted.ok());
  const Fd passed = passed_descriptor();
  const Fd reopened = standard_input_that_is(pipe.reader);
  const Fd duplicated = standard_input_that_is(pair.first);
  const Poller poller;
  const Waker waker;
  const Timer timer;
  const Signals signals{SIGUSR1};
  const Child child(::getpid());

  std::vector<int> numbers;
  for (const FdView each :
       {FdView(pipe.reader), FdView(pipe.writer), FdView(pair.first),
        FdView(pair.second), FdView(listener), FdView(datagrams),
        FdView(connected.fd), FdView(accepted.fd), FdView(passed),
        FdView(reopened), FdView(duplicated), FdView(poller), FdView(waker),
        FdView(timer), FdView(signals), FdView(child)}) {
    REQUIRE(is_open(each.get()));
    numbers.push_back(each.get());
  }
  CHECK(first_inherited(numbers) == 0);

  // The question can be answered otherwise, too.
  const Fd inheritable{::dup(STDERR_FILENO)};
  numbers.push_back(inheritable.get());
  CHECK(first_inherited(numbers) == static_cast<int>(numbers.size()));
}

// A Reserve does not show its descriptor: it is the one more that is open.
TEST_CASE("P05 the descriptor held in reserve is not inherited, even renewed") {
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  const std::vector<int> before = open_descriptors();
  Reserve reserve;
  for (int turn = 0; turn < 2; ++turn) {
    std::vector<int> added;
    for (const int number : open_descriptors())
      if (std::find(before.begin(), before.end(), number) == before.end())
        added.push_back(number);
    REQUIRE(added.size() == 1);
    CHECK(first_inherited(added) == 0);
    CHECK_FALSE(reserve.shed(listener, ""));
  }
}

TEST_CASE(
    "P05 a BroadcastLog keeps no descriptor, and briefly had one closed "
    "on exec") {
  const std::vector<int> before = open_descriptors();
  spy::memory_flags = 0;
  const BroadcastLog log{65536};
  CHECK(open_descriptors() == before);
  CHECK((spy::memory_flags & MFD_CLOEXEC) != 0);
}

TEST_CASE("P05 pollable makes no descriptor") {
  const Fd file{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
  const std::vector<int> before = open_descriptors();
  spy::epoll_flags = -1;
  CHECK_FALSE(pollable(file));
  CHECK(open_descriptors() == before);
  CHECK(spy::epoll_flags == -1);
}

// ---------------------------------------------------------------------------
// P21
// ---------------------------------------------------------------------------

TEST_CASE(
    "P21 an interrupted close is not repeated: the number may be somebody "
    "else's by then") {
  Pipe pipe = open_pipe();
  const int number = pipe.reader.get();
  spy::closes = 0;
  spy::interrupt_close = true;
  pipe.reader.reset();
  CHECK(spy::closes == 1);
  CHECK_FALSE(is_open(number));
  Fd nothing;
  nothing.reset();
  CHECK(spy::closes == 1);
}

TEST_CASE("P21 what succeeds is not repeated, whatever errno was before") {
  const Pipe pipe = open_pipe();
  const SocketPair pair = open_socket_pair();
  std::array<char, 8> room{};
  for (const auto& [from, to] :
       {std::pair{FdView(pipe.reader), FdView(pipe.writer)},
        std::pair{FdView(pair.first), FdView(pair.second)}}) {
    errno = EINTR;
    CHECK(write(to, "ab").bytes == 2);
    errno = EINTR;
    CHECK(read(from, {room.data(), 1}).bytes == 1);
    CHECK(room[0] == 'a');
    CHECK(read(from, room).bytes == 1);
    CHECK(room[0] == 'b');
  }
}

// ---------------------------------------------------------------------------
// P24
// ---------------------------------------------------------------------------

TEST_CASE("P24 a flush sends all that the socket takes, in one go") {
  const auto ends = make_socketpair();
  WriteBuffer buffer;
  const std::string much(100'000, 'x');
  REQUIRE(buffer.append(much));
  const IoResult result = buffer.flush(ends.near);
  CHECK(result.ok());
  CHECK(result.bytes == much.size());
}

TEST_CASE("P24 what fills a queue's block to the last byte stays in it") {
  detail::ByteQueue<4096, 1> queue;
  REQUIRE(queue.reserve(4096));
  const char* const block = queue.room().data();
  queue.put(4096);
  queue.take(1000);
  REQUIRE(queue.reserve(1000));
  CHECK(queue.bytes().data() == block);
  CHECK(queue.size() == 3096);
  CHECK(queue.room().size() == 1000);
}

// ---------------------------------------------------------------------------
// P25
// ---------------------------------------------------------------------------

// Some devices do that: a sound card that has run out of samples, for one.
TEST_CASE("P25 EPIPE without a SIGPIPE is failed, and nothing waits for one") {
  const int code = run_in_child([] {
    const Pipe pipe = open_pipe();
    spy::break_pipe = true;
    return write(pipe.writer, "a").error == EPIPE ? 0 : 1;
  });
  CHECK(code == 0);
}

namespace {

volatile std::sig_atomic_t sigpipes = 0;

// True if SIGPIPE is in a set of signals of the main thread: "SigBlk" are those
// that it blocks, "SigPnd" those that wait for it.
bool main_thread_has_sigpipe(std::string_view set) {
  std::ifstream status("/proc/self/task/" + std::to_string(::getpid()) +
                       "/status");
  for (std::string line; std::getline(status, line);) {
    if (!line.starts_with(set)) continue;
    const auto signals = std::stoull(line.substr(set.size() + 1), nullptr, 16);
    return (signals >> (SIGPIPE - 1) & 1) != 0;
  }
  return false;
}

void await_sigpipe_in(std::string_view set) {
  const auto limit = Clock::now() + patience;
  while (!main_thread_has_sigpipe(set) && Clock::now() < limit)
    std::this_thread::sleep_for(1ms);
}

// A write to a full pipe, during which somebody else sends this thread a
// SIGPIPE.
int write_while_sigpipe_comes() {
  std::signal(SIGPIPE, [](int) { sigpipes = sigpipes + 1; });
  const Pipe pipe = open_pipe();
  while (write(pipe.writer, std::string(65536, 'x')).ok()) continue;
  make_blocking(pipe.writer);
  std::thread other([&, main_thread = ::pthread_self()] {
    await_sigpipe_in("SigBlk:");
    ::pthread_kill(main_thread, SIGPIPE);
    await_sigpipe_in("SigPnd:");
    receive_some(pipe.reader);
  });
  const IoResult result = write(pipe.writer, "a");
  other.join();
  if (!result.ok()) return 1;
  return sigpipes == 1 ? 0 : 2;
}

}  // namespace

TEST_CASE("P25 a SIGPIPE that somebody else sends meanwhile is not swallowed") {
  CHECK(run_in_child(write_while_sigpipe_comes) == 0);
}

// ---------------------------------------------------------------------------
// P29
// ---------------------------------------------------------------------------

namespace {

// A peer that sends as fast as it can, and reads as fast as it can, until the
// other end is closed: `ours` always has something to read, and always room.
class FastPeer {
 public:
  FastPeer() {
    Ends ends = make_socketpair();
    make_blocking(ends.far);
    ours = std::move(ends.near);
    theirs_ = std::move(ends.far);
    writer_ = std::thread([this] {
      const std::string much = std::string(65535, 'x') + '\n';
      while (::send(theirs_.get(), much.data(), much.size(), MSG_NOSIGNAL) > 0)
        continue;
    });
    reader_ = std::thread([this] {
      std::string room(65536, '\0');
      while (::read(theirs_.get(), room.data(), room.size()) > 0) continue;
    });
  }
  ~FastPeer() {
    ours.reset();
    writer_.join();
    reader_.join();
  }
  FastPeer(const FastPeer&) = delete;
  FastPeer& operator=(const FastPeer&) = delete;

  Fd ours{};

 private:
  Fd theirs_{};
  std::thread writer_{};
  std::thread reader_{};
};

// Serves a fast peer and a quiet one from one loop: what the quiet one sends is
// seen in the very next turn, whatever the fast one does. `serve` reads once.
template <class Serve>
void alternate(Serve serve) {
  const FastPeer fast;
  const auto quiet = make_socketpair();
  REQUIRE(becomes_readable(fast.ours));
  Poller poller;
  poller.add(fast.ours, Token{1}, Interest::readable);
  poller.add(quiet.far, Token{2}, Interest::readable);
  std::size_t fast_bytes = 0;
  for (int turn = 0; turn < 500; ++turn) {
    send_all(quiet.near, "a");
    bool heard = false;
    for (const Event& event : poller.wait(patience)) {
      if (event.token() == Token{1}) {
        fast_bytes += serve(fast.ours);
      } else {
        heard = receive_some(quiet.far) == "a";
      }
    }
    REQUIRE(heard);
  }
  CHECK(fast_bytes > 0);
}

}  // namespace

TEST_CASE(
    "P29 a fast sender cannot keep LineBuffer::fill for longer than a block") {
  LineBuffer lines{65536};
  alternate([&](FdView fd) {
    const IoResult result = lines.fill(fd);
    CHECK_FALSE(result.ended());
    CHECK(result.bytes <= LineBuffer::block_size);
    while (lines.next()) continue;
    return result.bytes;
  });
}

TEST_CASE("P29 a fast sender cannot keep drain for longer than its room") {
  std::vector<char> room(100'000);
  alternate([&](FdView fd) {
    const IoResult result = drain(fd, room);
    CHECK_FALSE(result.ended());
    CHECK(result.bytes <= room.size());
    CHECK(result.ok() == (result.bytes == room.size()));
    return result.bytes;
  });
}

TEST_CASE(
    "P29 a fast reader cannot keep BroadcastLog::flush for longer than its "
    "budget") {
  constexpr std::size_t capacity = 4 << 20;
  constexpr std::size_t budget = 10'000;
  const FastPeer fast;
  BroadcastLog log{capacity};
  const BroadcastLog::Cursor cursor = log.join();
  // Own bytes in between, so that both ways of sending are taken.
  const std::string line(5000, 'x');
  while (log.room() > capacity / 2) {
    REQUIRE(log.append(line));
    REQUIRE(log.append("own", &cursor));
  }
  std::size_t total = 0;
  int turns = 0;
  for (; cursor.behind() > 0; ++turns) {
    const IoResult result = log.flush(fast.ours, cursor, budget);
    REQUIRE_FALSE(result.ended());
    REQUIRE(result.bytes <= budget);
    if (result.would_block()) REQUIRE(becomes_writable(fast.ours));
    total += result.bytes;
  }
  CHECK(total % line.size() == 0);
  CHECK(turns >= static_cast<int>(total / budget));
  CHECK(total >= capacity / 3);
}
