// bare_send: what sends cost by themselves, by their size. Below that no server
// that sends so much at once can get.
//
// One process sends to 50 TCP sockets on this machine in turn, on processor 0;
// another one reads all of them and looks at nothing, on processor 1. Prints a
// Markdown table: processor time of the sender, without what it waits.
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

namespace {

constexpr std::size_t receivers = 50;
constexpr int rounds = 5;
constexpr auto turn = std::chrono::milliseconds(200);

[[noreturn]] void die(const char* what) {
  std::perror(what);
  std::exit(1);
}

void pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(processor), &set);
  static_cast<void>(::sched_setaffinity(0, sizeof set, &set));
}

double cpu_seconds() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) +
         static_cast<double>(time.tv_nsec) / 1e9;
}

// Until the senders are gone.
[[noreturn]] void read_everything(const sockaddr_in& address) {
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  pin(1);
  const int poller = ::epoll_create1(0);
  for (std::size_t i = 0; i < receivers; ++i) {
    const int socket = ::socket(AF_INET, SOCK_STREAM, 0);
    if (::connect(socket, reinterpret_cast<const sockaddr*>(&address),
                  sizeof address) != 0)
      die("connect");
    epoll_event event{EPOLLIN, {.fd = socket}};
    ::epoll_ctl(poller, EPOLL_CTL_ADD, socket, &event);
  }
  static std::array<char, 65536> room;
  std::array<epoll_event, receivers> events;
  for (;;) {
    const int count = ::epoll_wait(poller, events.data(), events.size(), -1);
    for (int i = 0; i < count; ++i)
      if (::read(events[static_cast<std::size_t>(i)].data.fd, room.data(),
                 room.size()) <= 0)
        std::_Exit(0);
  }
}

std::vector<int> start_receivers() {
  const int listener = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  auto* const native = reinterpret_cast<sockaddr*>(&address);
  if (::bind(listener, native, size) != 0 || ::listen(listener, 128) != 0 ||
      ::getsockname(listener, native, &size) != 0)
    die("listen");
  if (::fork() == 0) read_everything(address);
  std::vector<int> sockets(receivers);
  for (int& socket : sockets) {
    const int yes = 1;
    socket = ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK);
    ::setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  }
  return sockets;
}

// As much once to each socket.
void send_to_all(const std::vector<int>& sockets,
                 const std::vector<char>& bytes) {
  for (const int socket : sockets) {
    for (std::size_t sent = 0; sent < bytes.size();) {
      const ssize_t count = ::send(socket, bytes.data() + sent,
                                   bytes.size() - sent, MSG_NOSIGNAL);
      if (count < 0 && errno != EAGAIN) die("send");
      if (count > 0) sent += static_cast<std::size_t>(count);
      pollfd waiting{socket, POLLOUT, 0};
      if (sent < bytes.size()) ::poll(&waiting, 1, -1);
    }
  }
}

// Seconds of processor time for one send.
double cost_of_a_send(const std::vector<int>& sockets, std::size_t size) {
  std::vector<char> bytes(size, 'x');
  const auto end = std::chrono::steady_clock::now() + turn;
  const double before = cpu_seconds();
  std::size_t sends = 0;
  while (std::chrono::steady_clock::now() < end) {
    std::fill(bytes.begin(), bytes.end(), 'y');  // as a read does
    send_to_all(sockets, bytes);
    sends += sockets.size();
  }
  return (cpu_seconds() - before) / static_cast<double>(sends);
}

}  // namespace

int main() {
  pin(0);
  const std::vector<int> sockets = start_receivers();
  constexpr std::array<std::size_t, 8> sizes{64,     4096,   16384,  65536,
                                             131072, 262144, 524288, 1048576};
  std::vector<std::vector<double>> costs(sizes.size());
  for (int round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < sizes.size(); ++i)
      costs[i].push_back(cost_of_a_send(sockets, sizes[i]));
  std::printf(
      "| bytes at once | us for them | us for 4 KiB of them "
      "|\n|---|---|---|\n");
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    std::sort(costs[i].begin(), costs[i].end());
    const double cost = costs[i][rounds / 2] * 1e6;
    std::printf("| %zu | %.2f | %.3f |\n", sizes[i], cost,
                cost * 4096 / static_cast<double>(sizes[i]));
  }
  return 0;
}
