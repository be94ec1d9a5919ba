// An echo server in plain epoll: what a client sends goes back to it. The same,
// and as much of it, as echo_edgewise.cpp. It ends with its last client.

#include "plain.hpp"

using namespace plain;

namespace {

void set_awaits_room(Client* client, int fd, bool awaits_room) {
  client->awaits_room = awaits_room;
  // While its socket is full, a client is not read from.
  set_interest(fd, awaits_room ? EPOLLOUT : EPOLLIN | EPOLLRDHUP);
}

void echo(Client* client, int fd) {
  const ssize_t received = read_once(fd);
  if (received < 0 && errno == EAGAIN) return;
  if (received <= 0) return drop(client, fd);
  ssize_t sent = send_once(fd, input, static_cast<std::size_t>(received));
  if (sent == received) return;
  if (sent < 0 && errno != EAGAIN) return drop(client, fd);
  if (sent < 0) sent = 0;
  if (!append(&client->output, input + sent,
              static_cast<std::size_t>(received - sent)))
    return drop(client, fd);
  set_awaits_room(client, fd, true);
}

void send_rest(Client* client, int fd) {
  const Flushed flushed = flush(&client->output, fd);
  if (flushed == flush_failed) return drop(client, fd);
  if (flushed == flush_done) set_awaits_room(client, fd, false);
}

void serve(Client* client, int fd, std::uint32_t events) {
  if (client->awaits_room) {
    send_rest(client, fd);
  } else if ((events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
    echo(client, fd);
  }
}

}  // namespace

int main() {
  start();
  static epoll_event events[batch];
  do {
    const int ready = wait_for_events(events);
    for (int i = 0; i < ready; ++i) {
      const std::uint64_t token = events[i].data.u64;
      if (token == listener_token) {
        accept_clients();
      } else if (Client* const client = find(token)) {
        serve(client, static_cast<int>(client - clients), events[i].events);
      }
    }
  } while (client_count > 0);
  return 0;
}
