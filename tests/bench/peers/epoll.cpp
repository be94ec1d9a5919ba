// The broadcast server on epoll by hand, level-triggered.
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "room.hpp"

namespace {

struct Client : Member {
  int socket = -1;
};

const int poller = epoll_create1(EPOLL_CLOEXEC);
Room<Client> room;
std::array<char, 65536> input;
std::vector<Client*> gone;  // may still be in this batch of events

void control(int operation, Client& client, unsigned events) {
  epoll_event event{};
  event.events = events;
  event.data.ptr = &client;
  epoll_ctl(poller, operation, client.socket, &event);
}

void drop(Client& client) {
  if (client.socket < 0) return;
  room.leave(client);
  close(std::exchange(client.socket, -1));
  gone.push_back(&client);
}

void flush(Client& client) {
  const std::string_view bytes = client.unwritten();
  const ssize_t count =
      send(client.socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  if (count < 0 && errno != EAGAIN) return drop(client);
  if (count > 0) client.consume(static_cast<std::size_t>(count));
  const bool waits = !client.queue.empty();
  if (waits != std::exchange(client.waits, waits))
    control(EPOLL_CTL_MOD, client, waits ? EPOLLIN | EPOLLOUT : EPOLLIN);
}

void serve(Client& client, unsigned events) {
  if (client.socket < 0) return;
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR)) != 0) {
    const ssize_t count = read(client.socket, input.data(), input.size());
    if (count == 0 || (count < 0 && errno != EAGAIN)) return drop(client);
    if (count > 0)
      room.hear(client, {input.data(), static_cast<std::size_t>(count)});
  }
  if ((events & EPOLLOUT) != 0) flush(client);
}

void accept_all(int listener) {
  for (;;) {
    const int socket =
        accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (socket < 0) return;
    const int yes = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    auto* const client = new Client;
    client->socket = socket;
    control(EPOLL_CTL_ADD, *client, EPOLLIN);
    room.join(*client);
  }
}

}  // namespace

int main() {
  Client listener;
  listener.socket = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(listener.socket, reinterpret_cast<sockaddr*>(&address), size);
  listen(listener.socket, 4096);
  getsockname(listener.socket, reinterpret_cast<sockaddr*>(&address), &size);
  announce(ntohs(address.sin_port));
  control(EPOLL_CTL_ADD, listener, EPOLLIN);
  static std::array<epoll_event, 1024> events;
  for (;;) {
    const int count = epoll_wait(poller, events.data(), events.size(), -1);
    for (int i = 0; i < count; ++i) {
      auto* const client =
          static_cast<Client*>(events[static_cast<std::size_t>(i)].data.ptr);
      if (client == &listener)
        accept_all(listener.socket);
      else
        serve(*client, events[static_cast<std::size_t>(i)].events);
    }
    room.flush(flush);
    for (const Client* const client : std::exchange(gone, {})) delete client;
  }
}
