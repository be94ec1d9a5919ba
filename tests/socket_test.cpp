// listen, accept and connect, through the loopback device.
#include <doctest/doctest.h>
#include <netinet/tcp.h>
#include <sys/resource.h>

#include <array>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;

// connect(2) on a non-blocking socket answers EINPROGRESS and little else. The
// other answers are made here, from a connection that is really on its way. And
// before accept4(2) something may happen that is rare outside.
namespace spy {
enum class Answer { own, interrupted, at_once };
Answer answer = Answer::own;

enum class BeforeAccept { nothing, abort, theft };
BeforeAccept before_accept = BeforeAccept::nothing;
Fd stolen;  // by another thread, as it were
}  // namespace spy

extern "C" int connect(int socket, const ::sockaddr* address,
                       ::socklen_t length) {
  using Function = int(int, const ::sockaddr*, ::socklen_t);
  static auto* const real = next_definition<Function>("connect");
  const int result = real(socket, address, length);
  switch (std::exchange(spy::answer, spy::Answer::own)) {
    case spy::Answer::own: return result;
    case spy::Answer::interrupted: errno = EINTR; return -1;
    case spy::Answer::at_once: break;
  }
  return becomes_writable(FdView{socket}) ? 0 : -1;
}

extern "C" int accept4(int socket, ::sockaddr* address, ::socklen_t* length,
                       int flags) {
  using Function = int(int, ::sockaddr*, ::socklen_t*, int);
  static auto* const real = next_definition<Function>("accept4");
  using spy::BeforeAccept;
  switch (std::exchange(spy::before_accept, BeforeAccept::nothing)) {
    case BeforeAccept::nothing: break;
    case BeforeAccept::abort: errno = ECONNABORTED; return -1;
    case BeforeAccept::theft: spy::stolen.reset(::dup(socket)); break;
  }
  return real(socket, address, length, flags);
}

namespace {

const Address loopback = *Address::parse("127.0.0.1:0");

bool has_ipv6() {
  const Fd fd{::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const Address address = *Address::parse("[::1]:0");
  return fd && ::bind(fd.get(), address.data(), address.size()) == 0;
}

// A client of a listener, connected as far as its own kernel knows.
Fd client_of(const Fd& listener) {
  Connected connected = connect(local_address(listener));
  REQUIRE_FALSE(connected.failed());
  REQUIRE(becomes_writable(connected.fd));
  REQUIRE(finish_connect(connected.fd).ok());
  return std::move(connected.fd);
}

Accepted accept_soon(const Fd& listener) {
  REQUIRE(becomes_readable(listener));
  return accept(listener);
}

// An address of this machine where nobody listens.
Address nobody() { return local_address(listen(loopback)); }

int lowest_free_descriptor() {
  const Fd fd{::dup(0)};
  return fd.get();
}

std::string text_of(const Address& address) { return address.to_string(); }

}  // namespace

// ---------------------------------------------------------------------------
// listen
// ---------------------------------------------------------------------------

TEST_CASE("port 0 listens on a port that local_address tells") {
  const Fd listener = listen(loopback);
  const Address address = local_address(listener);
  CHECK(address.port() != 0);
  CHECK(text_of(address) == "127.0.0.1:" + std::to_string(address.port()));
  CHECK(option_of(listener, SOL_SOCKET, SO_ACCEPTCONN) == 1);
  const Fd client = client_of(listener);
  CHECK(accept_soon(listener).ok());
}

TEST_CASE("by default as many may wait as the system allows") {
  std::ifstream setting("/proc/sys/net/core/somaxconn");
  unsigned allowed = 0;
  setting >> allowed;
  REQUIRE(allowed > 0);
  const Fd listener = listen(loopback);
  ::tcp_info info{};
  ::socklen_t length = sizeof info;
  REQUIRE(::getsockopt(listener.get(), IPPROTO_TCP, TCP_INFO, &info, &length) ==
          0);
  CHECK(info.tcpi_sacked == allowed);  // of a listener: its backlog
}

TEST_CASE("a busy port is refused by name, and no descriptor is lost") {
  const Fd listener = listen(loopback);
  const Address address = local_address(listener);
  const int free_before = lowest_free_descriptor();
  const Thrown thrown = thrown_by([&] { const Fd second = listen(address); });
  CHECK(thrown.error == EADDRINUSE);
  CHECK(thrown.text == "listen on 127.0.0.1:" + std::to_string(address.port()) +
                           ": Address already in use");
  CHECK(lowest_free_descriptor() == free_before);
}

TEST_CASE("a privileged port is refused by name") {
  const int code = run_in_child([] {
    constexpr ::uid_t somebody = 65534;
    if (::geteuid() == 0 && ::setuid(somebody) != 0) return 77;
    const Thrown thrown =
        thrown_by([] { const Fd fd = listen(*Address::parse("127.0.0.1:1")); });
    if (thrown.error == 0) return 77;
    return thrown.text == "listen on 127.0.0.1:1: Permission denied" ? 0 : 1;
  });
  if (code == 77) {
    MESSAGE("skipped: whoever runs this may listen on port 1");
  } else {
    CHECK(code == 0);
  }
}

TEST_CASE("an address that is not this machine's is refused by name") {
  const Thrown thrown = thrown_by(
      [] { const Fd fd = listen(*Address::parse("203.0.113.1:8080")); });
  CHECK(thrown.text ==
        "listen on 203.0.113.1:8080: Cannot assign requested address");
}

TEST_CASE("an unspecified address is refused by name") {
  const Thrown thrown = thrown_by([] { const Fd fd = listen(Address()); });
  CHECK(thrown.error == EAFNOSUPPORT);
  CHECK(contains(thrown.text, "listen on unspecified: "));
}

TEST_CASE("a port whose old connections linger can be listened on again") {
  Address address;
  {
    const Fd listener = listen(loopback);
    address = local_address(listener);
    Fd client = client_of(listener);
    Accepted accepted = accept_soon(listener);
    // Who closes first lingers (TIME_WAIT): here the server does.
    accepted.fd.reset();
    REQUIRE(becomes(client, POLLRDHUP));
  }
  ListenOptions options;
  options.reuse_address = false;
  CHECK(thrown_by([&] { const Fd fd = listen(address, options); }).error ==
        EADDRINUSE);
  CHECK(static_cast<bool>(listen(address)));
}

TEST_CASE("reuse_port lets two listeners share a port, if both say so") {
  ListenOptions options;
  options.reuse_port = true;
  const Fd first = listen(loopback, options);
  const Address address = local_address(first);
  const Fd second = listen(address, options);
  CHECK(local_address(second) == address);
  CHECK(thrown_by([&] { const Fd third = listen(address); }).error ==
        EADDRINUSE);
}

TEST_CASE("a listener on [::] takes IPv4 too, unless told not to") {
  if (!has_ipv6()) {
    MESSAGE("skipped: there is no IPv6 here");
    return;
  }
  const Address everywhere = *Address::parse("[::]:0");
  const Fd dual = listen(everywhere);
  const auto port = local_address(dual).port();
  const Connected client = connect(*Address::from("127.0.0.1", port));
  REQUIRE_FALSE(client.failed());
  const Accepted accepted = accept_soon(dual);
  REQUIRE(accepted.ok());
  CHECK(text_of(accepted.peer) ==
        "[::ffff:127.0.0.1]:" +
            std::to_string(local_address(client.fd).port()));

  ListenOptions options;
  options.dual_stack = false;
  const Fd single = listen(everywhere, options);
  const Address four =
      *Address::from("127.0.0.1", local_address(single).port());
  const Connected refused = connect(four);
  REQUIRE(becomes_writable(refused.fd));
  CHECK(finish_connect(refused.fd).error == ECONNREFUSED);
}

TEST_CASE("IPv6 peers are told as such") {
  if (!has_ipv6()) {
    MESSAGE("skipped: there is no IPv6 here");
    return;
  }
  const Fd listener = listen(*Address::parse("[::1]:0"));
  const Fd client = client_of(listener);
  const Accepted accepted = accept_soon(listener);
  REQUIRE(accepted.ok());
  CHECK(accepted.peer == local_address(client));
  CHECK(accepted.peer.family() == AF_INET6);
}

TEST_CASE("TCP_NODELAY is on for accepted and for connected sockets") {
  const Fd listener = listen(loopback);
  const Fd client = client_of(listener);
  const Accepted accepted = accept_soon(listener);
  CHECK(option_of(accepted.fd, IPPROTO_TCP, TCP_NODELAY) == 1);
  CHECK(option_of(client, IPPROTO_TCP, TCP_NODELAY) == 1);

  ListenOptions options;
  options.no_delay = false;
  const Fd slow = listen(loopback, options);
  const Fd other = client_of(slow);
  CHECK(option_of(accept_soon(slow).fd, IPPROTO_TCP, TCP_NODELAY) == 0);
}

TEST_CASE("no_delay may be off for connected sockets too") {
  const Fd listener = listen(loopback);
  const Connected client =
      connect(local_address(listener), {.no_delay = false});
  REQUIRE_FALSE(client.failed());
  CHECK(option_of(client.fd, IPPROTO_TCP, TCP_NODELAY) == 0);
}

namespace {

struct KeepAlive {
  int on;
  int idle;
  int interval;
  bool operator==(const KeepAlive&) const = default;
};

KeepAlive keep_alive_of(FdView socket) {
  return {option_of(socket, SOL_SOCKET, SO_KEEPALIVE),
          option_of(socket, IPPROTO_TCP, TCP_KEEPIDLE),
          option_of(socket, IPPROTO_TCP, TCP_KEEPINTVL)};
}

// Of a socket that is accepted with this option, and of its client's.
KeepAlive accepted_with(std::chrono::seconds keep_alive) {
  const Fd listener = listen(loopback, {.keep_alive = keep_alive});
  const Connected client =
      connect(local_address(listener), {.keep_alive = keep_alive});
  REQUIRE_FALSE(client.failed());
  const Accepted accepted = accept_soon(listener);
  REQUIRE(accepted.ok());
  CHECK(keep_alive_of(client.fd) == keep_alive_of(accepted.fd));
  return keep_alive_of(accepted.fd);
}

}  // namespace

TEST_CASE(
    "keep_alive is inherited by accepted, and set for connected sockets") {
  CHECK(accepted_with(7s) == KeepAlive{1, 7, 7});
  CHECK(accepted_with(1s) == KeepAlive{1, 1, 1});
  CHECK(accepted_with(10min) == KeepAlive{1, 600, 600});
}

TEST_CASE("keep_alive of more than the kernel takes is the most it takes") {
  constexpr int most = 32767;
  for (const auto huge :
       {std::chrono::seconds{most}, std::chrono::seconds{most + 1},
        std::chrono::seconds{24h * 365}, std::chrono::seconds::max()})
    CHECK(accepted_with(huge) == KeepAlive{1, most, most});
}

TEST_CASE("keep_alive of 0, which is the default, sets nothing") {
  const Fd bare{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const KeepAlive unset = keep_alive_of(bare);
  REQUIRE(unset.on == 0);
  // The last would be 5 seconds, were it cut to the 32 bits of an int.
  for (const std::chrono::seconds none : {0s, -1s, std::chrono::seconds::min(),
                                          5s - (1s * (std::int64_t{1} << 32))})
    CHECK(accepted_with(none) == unset);
  CHECK(keep_alive_of(listen(loopback)) == unset);
}

TEST_CASE("local_address of a socket of another family is unspecified") {
  const Fd fd{::socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  CHECK(local_address(fd) == Address());
}

TEST_CASE("local_address of what is no socket throws and says which") {
  const auto ends = make_pipe();
  const Thrown thrown =
      thrown_by([&] { static_cast<void>(local_address(ends.near)); });
  CHECK(thrown.text == "address of descriptor " +
                           std::to_string(ends.near.get()) +
                           ": Socket operation on non-socket");
}

// ---------------------------------------------------------------------------
// accept
// ---------------------------------------------------------------------------

TEST_CASE("accept would block while nobody is waiting") {
  const Fd listener = listen(loopback);
  const Accepted accepted = accept(listener);
  CHECK(accepted.would_block());
  CHECK_FALSE(accepted.ok());
  CHECK(accepted.error == EAGAIN);
  CHECK_FALSE(static_cast<bool>(accepted.fd));
  CHECK(accepted.peer == Address());
}

TEST_CASE("accept takes one connection and tells its peer") {
  const Fd listener = listen(loopback);
  const Fd client = client_of(listener);
  const Accepted accepted = accept_soon(listener);
  REQUIRE(accepted.ok());
  CHECK(accepted.error == 0);
  CHECK(accepted.peer == local_address(client));
  CHECK(local_address(accepted.fd) == local_address(listener));
  send_all(client, "hello");
  CHECK(receive(accepted.fd, 5) == "hello");
  CHECK(accept(listener).would_block());
}

TEST_CASE("accept on what does not listen is failed") {
  const auto pair = make_tcp();
  const Accepted not_listening = accept(pair.near);
  CHECK(not_listening.failed());
  CHECK(not_listening.error == EINVAL);
  const auto pipe = make_pipe();
  CHECK(accept(pipe.near).error == ENOTSOCK);
  const Accepted closed = accept(FdView{-1});
  CHECK(closed.failed());
  CHECK(closed.error == EBADF);
}

TEST_CASE("each error of accept is what the caller can do about it") {
  const auto classify = detail::classify_accept_error;
  CHECK(classify(EAGAIN) == AcceptStatus::would_block);
  for (const int error : {EMFILE, ENFILE, ENOBUFS, ENOMEM})
    CHECK(classify(error) == AcceptStatus::exhausted);
  for (const int error :
       {ECONNABORTED, EPROTO, ENETDOWN, ENOPROTOOPT, EHOSTDOWN, ENONET,
        EHOSTUNREACH, ENETUNREACH, ETIMEDOUT})
    CHECK(classify(error) == AcceptStatus::retry);
  for (const int error :
       {EBADF, EINVAL, ENOTSOCK, EFAULT, EOPNOTSUPP, EPERM, 0})
    CHECK(classify(error) == AcceptStatus::failed);
}

TEST_CASE("each status of accept answers to its own question") {
  const auto answers = [](AcceptStatus status) {
    Accepted accepted;
    accepted.status = status;
    return std::vector<bool>{accepted.ok(), accepted.would_block(),
                             accepted.retry(), accepted.exhausted(),
                             accepted.failed()};
  };
  using Answers = std::vector<bool>;
  CHECK(answers(AcceptStatus::accepted) == Answers{1, 0, 0, 0, 0});
  CHECK(answers(AcceptStatus::would_block) == Answers{0, 1, 0, 0, 0});
  CHECK(answers(AcceptStatus::retry) == Answers{0, 0, 1, 0, 0});
  CHECK(answers(AcceptStatus::exhausted) == Answers{0, 0, 0, 1, 0});
  CHECK(answers(AcceptStatus::failed) == Answers{0, 0, 0, 0, 1});
}

namespace {

// From now on no descriptor can be had.
void leave_no_descriptors() {
  ::rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limit) == 0);
  limit.rlim_cur = static_cast<::rlim_t>(lowest_free_descriptor());
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

void leave_one_more_descriptor() {
  ::rlimit limit{};
  REQUIRE(::getrlimit(RLIMIT_NOFILE, &limit) == 0);
  ++limit.rlim_cur;
  REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
}

// Runs out of descriptors with a client waiting, in a child whose descriptors
// are few. Returns 0 if all was as it should be.
int run_out_of_descriptors(Mode mode) {
  const Fd listener = listen(loopback);
  Poller poller;
  poller.add(listener, Token{1}, Interest::readable, mode);
  const Fd client = client_of(listener);
  leave_no_descriptors();

  if (poller.wait(patience).size() != 1) return 1;
  const Accepted refused = accept(listener);
  if (!refused.exhausted() || refused.error != EMFILE || refused.fd) return 2;
  const bool again = poller.wait(0ms).size() == 1;
  if (again != (mode == Mode::level)) return 3;

  leave_one_more_descriptor();
  const Accepted accepted = accept(listener);
  if (!accepted.ok()) return 4;
  return accepted.peer == local_address(client) ? 0 : 5;
}

}  // namespace

TEST_CASE(
    "P15 out of descriptors: who waits goes on waiting; level-triggered "
    "reports it again, edge-triggered does not") {
  for (const Mode mode : {Mode::level, Mode::edge})
    CHECK(run_in_child([=] { return run_out_of_descriptors(mode); }) == 0);
}

namespace {

Fd unconnected(const Address& address) {
  return Fd{::socket(address.family(),
                     SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
}

// As far as its own kernel knows.
void connect_to(const Address& address, const Fd& client) {
  ::connect(client.get(), address.data(), address.size());
  REQUIRE(becomes_writable(client));
  REQUIRE(finish_connect(client).ok());
}

// True if what is sent to the client is the reason, and then the end.
bool is_told(const Fd& client, std::string_view reason) {
  if (!becomes(client, POLLRDHUP)) return false;
  char room[64];
  const IoResult result = drain(client, room);
  return result.end_of_stream() &&
         std::string_view(room, result.bytes) == reason;
}

// Waits until all that was sent has reached the other side's kernel. A Unix
// socket puts it there at once, and counts it as unsent until it is read.
bool has_arrived(const Fd& client) {
  if (local_address(client).family() == AF_UNIX) return true;
  const auto deadline = Clock::now() + patience;
  for (int unsent = 1; Clock::now() < deadline;) {
    if (::ioctl(client.get(), TIOCOUTQ, &unsent) != 0) return false;
    if (unsent == 0) return true;
    std::this_thread::yield();
  }
  return false;
}

// A server's turns without a descriptor, until so many clients are turned away.
// Returns how many were.
int turn_away(Poller& poller, const Fd& listener, Reserve& reserve,
              int expected) {
  int turned_away = 0;
  // A turn serves one client at least, or something is wrong.
  for (int turn = 0; turn < expected && turned_away < expected; ++turn) {
    if (poller.wait(patience).empty()) break;
    CHECK(accept(listener).exhausted());
    while (turned_away <= expected && reserve.shed(listener, "full\n"))
      ++turned_away;
  }
  return turned_away;
}

}  // namespace

TEST_CASE(
    "P15 with a Reserve, who comes when descriptors are out is told why: in "
    "both modes no client is stranded, and no wait spins") {
  for (const Address& address : {loopback, *Address::parse("unix:")}) {
    for (const Mode mode : {Mode::level, Mode::edge}) {
      CAPTURE(to_string(mode));
      const Fd listener = listen(address);
      const Address there = local_address(listener);
      Poller poller;
      poller.add(listener, Token{1}, Interest::readable, mode);
      std::array<Fd, 3> clients;
      for (Fd& client : clients) client = unconnected(address);
      Reserve reserve;
      const NoDescriptors none;

      connect_to(there, clients[0]);
      connect_to(there, clients[1]);
      CHECK(turn_away(poller, listener, reserve, 2) == 2);
      CHECK(poller.wait(0ms).empty());
      connect_to(there, clients[2]);
      CHECK(turn_away(poller, listener, reserve, 1) == 1);
      CHECK(poller.wait(0ms).empty());
      for (const Fd& client : clients) CHECK(is_told(client, "full\n"));
      CHECK(lowest_free_descriptor() == -1);  // the reserve is held again
    }
  }
}

TEST_CASE("P15 who had sent something before is told why, and not reset") {
  for (const Address& address : {loopback, *Address::parse("unix:")}) {
    for (const std::size_t count : {1U, 20'000U}) {
      CAPTURE(address.to_string());
      CAPTURE(count);
      const Fd listener = listen(address);
      const Fd client = client_of(listener);
      send_all(client, std::string(count, 'x'));
      REQUIRE(has_arrived(client));
      REQUIRE(becomes_readable(listener));
      Reserve reserve;
      CHECK(reserve.shed(listener, "full\n"));
      CHECK(is_told(client, "full\n"));
      CHECK(is_told(client, ""));  // the end stays the end
    }
  }
}

TEST_CASE("P15 nor is who had sent all that a Unix socket takes") {
  const Fd listener = listen(*Address::parse("unix:"));
  const Fd client = client_of(listener);
  // In small pieces and in large ones: the kernel keeps each by itself.
  for (int line = 0; line < 50; ++line) send_all(client, "a line\n");
  const std::string much(30'000, 'x');
  while (write(client, much).ok()) continue;
  Reserve reserve;
  CHECK(reserve.shed(listener, "full\n"));
  CHECK(is_told(client, "full\n"));
}

TEST_CASE("shed takes one client, the one who waits longest") {
  const Fd listener = listen(loopback);
  const Fd first = client_of(listener);
  REQUIRE(becomes_readable(listener));
  const Fd second = client_of(listener);
  Reserve reserve;
  CHECK(reserve.shed(listener, "full\n"));
  CHECK(is_told(first, "full\n"));
  CHECK(accept_soon(listener).peer == local_address(second));
}

TEST_CASE("shed without a reason only closes") {
  const Fd listener = listen(loopback);
  const Fd client = client_of(listener);
  REQUIRE(becomes_readable(listener));
  Reserve reserve;
  CHECK(reserve.shed(listener, ""));
  CHECK(is_told(client, ""));
}

TEST_CASE("P15 shed is false while nobody waits, and the reserve is kept") {
  const Fd listener = listen(loopback);
  Reserve reserve;
  CHECK_FALSE(reserve.shed(listener, "full\n"));
  CHECK_FALSE(reserve.shed(FdView{-1}, "full\n"));
  const NoDescriptors none;
  for (int turn = 0; turn < 3; ++turn) {
    CHECK_FALSE(reserve.shed(listener, "full\n"));
    CHECK(lowest_free_descriptor() == -1);
  }
}

TEST_CASE("shed passes over who is gone already") {
  const Fd listener = listen(loopback);
  const Fd client = client_of(listener);
  REQUIRE(becomes_readable(listener));
  Reserve reserve;
  spy::before_accept = spy::BeforeAccept::abort;
  CHECK(reserve.shed(listener, "full\n"));
  CHECK(is_told(client, "full\n"));
}

TEST_CASE("P25 shed of a client that is gone already kills nobody") {
  const int code = run_in_child([] {
    std::signal(SIGPIPE, SIG_DFL);
    const Fd listener = listen(*Address::parse("unix:"));
    Reserve reserve;
    { const Connected client = connect(local_address(listener)); }
    return reserve.shed(listener, "full\n") ? 0 : 1;
  });
  CHECK(code == 0);
}

TEST_CASE("P15 if another takes the reserve, the client goes on waiting") {
  const Fd listener = listen(loopback);
  const Fd client = client_of(listener);
  REQUIRE(becomes_readable(listener));
  Reserve reserve;
  const NoDescriptors none;
  spy::before_accept = spy::BeforeAccept::theft;
  CHECK_FALSE(reserve.shed(listener, "full\n"));
  REQUIRE(static_cast<bool>(spy::stolen));
  CHECK_FALSE(reserve.shed(listener, "full\n"));
  spy::stolen.reset();
  CHECK(reserve.shed(listener, "full\n"));
  CHECK(is_told(client, "full\n"));
  CHECK(lowest_free_descriptor() == -1);  // and the reserve is back
}

TEST_CASE("a reserve that cannot be had is refused by name") {
  const Thrown thrown = thrown_by([] {
    const NoDescriptors none;
    const Reserve reserve;
  });
  CHECK(thrown.text == "reserve a descriptor: Too many open files");
}

TEST_CASE(
    "P15 after exhausted, modify reports all who wait, in both modes, and "
    "until then no wait spins") {
  for (const Mode mode : {Mode::level, Mode::edge}) {
    CAPTURE(to_string(mode));
    const Fd listener = listen(loopback);
    Poller poller;
    poller.add(listener, Token{1}, Interest::readable, mode);
    const Fd first = client_of(listener);
    const Fd second = client_of(listener);
    std::array<Fd, 2> others{Fd{::dup(0)}, Fd{::dup(0)}};
    const NoDescriptors none;

    REQUIRE(poller.wait(patience).size() == 1);
    CHECK(accept(listener).exhausted());
    if (mode == Mode::level)
      poller.modify(listener, Token{1}, Interest::none, mode);
    CHECK(poller.wait(0ms).empty());
    for (Fd& other : others) other.reset();
    CHECK(poller.wait(0ms).empty());
    poller.modify(listener, Token{1}, Interest::readable, mode);
    REQUIRE(poller.wait(patience).size() == 1);
    const Accepted one = accept(listener);
    CHECK(one.peer == local_address(first));
    const Accepted two = accept_soon(listener);
    CHECK(two.peer == local_address(second));
  }
}

TEST_CASE("P16 an edge stands for all who wait: accept until it would block") {
  const Fd listener = listen(loopback);
  Poller poller;
  poller.add(listener, Token{1}, Interest::readable, Mode::edge);
  const Fd first = client_of(listener);
  const Fd second = client_of(listener);
  REQUIRE(poller.wait(patience).size() == 1);
  CHECK(accept(listener).peer == local_address(first));
  CHECK(poller.wait(0ms).empty());
  CHECK(accept(listener).peer == local_address(second));
  CHECK(accept(listener).would_block());
}

TEST_CASE("a signal does not interrupt accept") {
  const Fd listener = listen(loopback);
  make_blocking(listener);
  Accepted accepted;
  const Address address = local_address(listener);
  {
    const Interruptions every_few_milliseconds{0};
    Fd client;
    std::thread late([&] {
      block_interruptions();
      const auto limit = Clock::now() + patience;
      while (Interruptions::count() < 10 && Clock::now() < limit)
        std::this_thread::sleep_for(1ms);
      client = connect(address).fd;
    });
    accepted = accept(listener);
    late.join();
  }
  CHECK(accepted.ok());
}

// ---------------------------------------------------------------------------
// connect
// ---------------------------------------------------------------------------

TEST_CASE("connect is in progress, then writable, then connected") {
  const Fd listener = listen(loopback);
  const Connected connected = connect(local_address(listener));
  CHECK(connected.in_progress());
  CHECK_FALSE(connected.ok());
  CHECK_FALSE(connected.failed());
  CHECK(connected.error == 0);
  Poller poller;
  poller.add(connected.fd, Token{1}, Interest::writable);
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  CHECK(events[0].writable());
  CHECK_FALSE(events[0].error());
  CHECK(finish_connect(connected.fd).ok());
  CHECK(finish_connect(connected.fd).ok());
  CHECK(accept_soon(listener).peer == local_address(connected.fd));
}

TEST_CASE("P23 a refused connection is writable, and finish_connect says why") {
  const Connected connected = connect(nobody());
  REQUIRE(connected.in_progress());
  Poller poller;
  poller.add(connected.fd, Token{1}, Interest::writable);
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  CHECK(events[0].writable());
  CHECK(events[0].error());
  const ConnectResult result = finish_connect(connected.fd);
  CHECK(result.refused());
  CHECK(result.failed());
  CHECK_FALSE(result.timed_out());
  CHECK(result.error == ECONNREFUSED);
  CHECK_FALSE(finish_connect(connected.fd).ok());  // told once, and final
}

TEST_CASE("P23 a socket that nobody connected reports a hang-up at once") {
  const Fd fd{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  Poller poller;
  poller.add(fd, Token{1}, Interest::writable);
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  CHECK(events[0].writable());
  CHECK(events[0].hang_up());
}

TEST_CASE(
    "finish_connect is in progress while the listener's backlog is full, "
    "and is ok later") {
  ListenOptions options;
  options.backlog = 1;
  const Fd listener = listen(loopback, options);
  // Linux queues one more than the backlog, and drops who comes then.
  const Fd first = client_of(listener);
  const Fd second = client_of(listener);
  const Connected third = connect(local_address(listener));
  REQUIRE(third.in_progress());
  ConnectResult result = finish_connect(third.fd);
  CHECK(result.in_progress());
  CHECK(result.error == 0);

  // A second later the kernel tries again.
  CHECK(accept_soon(listener).ok());
  CHECK(accept_soon(listener).ok());
  REQUIRE(becomes_writable(third.fd));
  result = finish_connect(third.fd);
  CHECK(result.ok());
}

TEST_CASE("P23 a connection that nobody answers is timed out") {
  const Fd listener = listen(loopback, {.backlog = 0});
  // Linux queues one more than the backlog, and drops who comes then.
  const Fd queued = client_of(listener);
  const Connected connected = connect(local_address(listener));
  REQUIRE(connected.in_progress());
  // The kernel gives up when it would try again, a second later.
  constexpr int milliseconds = 1;
  REQUIRE(::setsockopt(connected.fd.get(), IPPROTO_TCP, TCP_USER_TIMEOUT,
                       &milliseconds, sizeof milliseconds) == 0);
  REQUIRE(becomes_writable(connected.fd));
  const ConnectResult result = finish_connect(connected.fd);
  CHECK(result.timed_out());
  CHECK(result.failed());
  CHECK_FALSE(result.refused());
  CHECK_FALSE(result.in_progress());
  CHECK(result.error == ETIMEDOUT);
  CHECK_FALSE(finish_connect(connected.fd).ok());  // told once, and final
}

TEST_CASE("P23 each error of connect is what the caller can do about it") {
  const auto classify = [](int error) {
    const ConnectResult result = detail::classify_connect_error(error);
    const bool told = result.error == (result.failed() ? error : 0);
    CHECK(told);
    return result.status;
  };
  CHECK(classify(0) == ConnectStatus::connected);
  CHECK(classify(EINPROGRESS) == ConnectStatus::in_progress);
  CHECK(classify(EINTR) == ConnectStatus::in_progress);
  CHECK(classify(ECONNREFUSED) == ConnectStatus::refused);
  CHECK(classify(ENOENT) == ConnectStatus::refused);
  CHECK(classify(ETIMEDOUT) == ConnectStatus::timed_out);
  for (const int error : {EAGAIN, EACCES, ENETUNREACH, EHOSTUNREACH, EMFILE,
                          EADDRNOTAVAIL, ECONNRESET, EPROTOTYPE})
    CHECK(classify(error) == ConnectStatus::failed);
}

TEST_CASE("P23 each status of connect answers to its own question") {
  const auto answers = [](ConnectStatus status) {
    const ConnectResult result{status, 0};
    return std::vector<bool>{result.ok(), result.in_progress(),
                             result.refused(), result.timed_out(),
                             result.failed()};
  };
  using Answers = std::vector<bool>;
  CHECK(answers(ConnectStatus::connected) == Answers{1, 0, 0, 0, 0});
  CHECK(answers(ConnectStatus::in_progress) == Answers{0, 1, 0, 0, 0});
  CHECK(answers(ConnectStatus::refused) == Answers{0, 0, 1, 0, 1});
  CHECK(answers(ConnectStatus::timed_out) == Answers{0, 0, 0, 1, 1});
  CHECK(answers(ConnectStatus::failed) == Answers{0, 0, 0, 0, 1});
}

TEST_CASE("connect fails at once for what cannot be connected to") {
  const Connected unspecified = connect(Address());
  CHECK(unspecified.failed());
  CHECK(unspecified.error == EAFNOSUPPORT);
  CHECK_FALSE(static_cast<bool>(unspecified.fd));

  const int free_before = lowest_free_descriptor();
  const Connected broadcast = connect(*Address::parse("255.255.255.255:80"));
  CHECK(broadcast.failed());
  CHECK(broadcast.error != 0);
  CHECK_FALSE(static_cast<bool>(broadcast.fd));
  CHECK(lowest_free_descriptor() == free_before);
}

TEST_CASE("connect without a free descriptor is failed") {
  const int code = run_in_child([] {
    leave_no_descriptors();
    const Connected connected = connect(*Address::parse("127.0.0.1:80"));
    return connected.failed() && connected.error == EMFILE ? 0 : 1;
  });
  CHECK(code == 0);
}

TEST_CASE("a connect that a signal interrupts is in progress all the same") {
  const Fd listener = listen(loopback);
  spy::answer = spy::Answer::interrupted;
  const Connected connected = connect(local_address(listener));
  CHECK(connected.in_progress());
  REQUIRE(becomes_writable(connected.fd));
  CHECK(finish_connect(connected.fd).ok());
}

TEST_CASE("a connection that is made at once is connected") {
  const Fd listener = listen(loopback);
  spy::answer = spy::Answer::at_once;
  const Connected connected = connect(local_address(listener));
  CHECK(connected.ok());
  CHECK(finish_connect(connected.fd).ok());
}

TEST_CASE("finish_connect of a connection that was reset meanwhile is failed") {
  const Fd listener = listen(loopback);
  const Connected connected = connect(local_address(listener));
  Accepted accepted = accept_soon(listener);
  REQUIRE(becomes_writable(connected.fd));
  reset_connection(accepted.fd);
  REQUIRE(becomes(connected.fd, POLLRDHUP));
  CHECK(finish_connect(connected.fd).error == ECONNRESET);
}

TEST_CASE("finish_connect of what is no socket is failed") {
  const auto ends = make_pipe();
  const ConnectResult result = finish_connect(ends.near);
  CHECK(result.failed());
  CHECK(result.error == ENOTSOCK);
  CHECK(finish_connect(FdView{-1}).error == EBADF);
}
