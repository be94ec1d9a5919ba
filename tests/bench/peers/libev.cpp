// The broadcast server on libev: a watcher for reading and one for writing.
#include <arpa/inet.h>
#include <ev.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cerrno>

#include "room.hpp"

namespace {

struct Client : Member {
  int socket = -1;
  ev_io reading;
  ev_io writing;
};

Room<Client> room;
struct ev_loop* const loop = ev_default_loop(EVFLAG_AUTO);
std::array<char, 65536> input;

void drop(Client& client) {
  ev_io_stop(loop, &client.reading);
  ev_io_stop(loop, &client.writing);
  room.leave(client);
  close(client.socket);
  delete &client;
}

void flush(Client& client) {
  const std::string_view bytes = client.unwritten();
  const ssize_t count =
      send(client.socket, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  if (count < 0 && errno != EAGAIN) return drop(client);
  if (count > 0) client.consume(static_cast<std::size_t>(count));
  const bool waits = !client.queue.empty();
  if (waits == std::exchange(client.waits, waits)) return;
  if (waits)
    ev_io_start(loop, &client.writing);
  else
    ev_io_stop(loop, &client.writing);
}

void readable(struct ev_loop*, ev_io* watcher, int) {
  Client& client = *static_cast<Client*>(watcher->data);
  const ssize_t count = read(client.socket, input.data(), input.size());
  if (count > 0)
    return room.hear(client, {input.data(), static_cast<std::size_t>(count)});
  if (count == 0 || errno != EAGAIN) drop(client);
}

void writable(struct ev_loop*, ev_io* watcher, int) {
  flush(*static_cast<Client*>(watcher->data));
}

void connected(struct ev_loop*, ev_io* listener, int) {
  for (;;) {
    const int socket =
        accept4(listener->fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (socket < 0) return;
    const int yes = 1;
    setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    auto* const client = new Client;
    client->socket = socket;
    ev_io_init(&client->reading, readable, socket, EV_READ);
    ev_io_init(&client->writing, writable, socket, EV_WRITE);
    client->reading.data = client->writing.data = client;
    ev_io_start(loop, &client->reading);
    room.join(*client);
  }
}

}  // namespace

int main() {
  const int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  bind(listener, reinterpret_cast<sockaddr*>(&address), size);
  listen(listener, 4096);
  getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
  announce(ntohs(address.sin_port));
  ev_io accepting;
  ev_io_init(&accepting, connected, listener, EV_READ);
  ev_io_start(loop, &accepting);
  ev_prepare end_of_turn;
  ev_prepare_init(&end_of_turn,
                  [](struct ev_loop*, ev_prepare*, int) { room.flush(flush); });
  ev_prepare_start(loop, &end_of_turn);
  ev_run(loop, 0);
}
