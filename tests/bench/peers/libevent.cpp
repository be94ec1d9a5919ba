// The broadcast server on libevent's bufferevents, which do the writing.
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <array>

#include "room.hpp"

namespace {

struct Client : Member {
  bufferevent* stream = nullptr;
};

Room<Client> room;
event* end_of_turn;

void drop(Client& client) {
  room.leave(client);
  bufferevent_free(client.stream);
  delete &client;
}

void readable(bufferevent* stream, void* context) {
  static std::array<char, 65536> input;
  Client& client = *static_cast<Client*>(context);
  evbuffer* const buffer = bufferevent_get_input(stream);
  while (const int count = evbuffer_remove(buffer, input.data(), input.size()))
    room.hear(client, {input.data(), static_cast<std::size_t>(count)});
  // Runs once, when all events of this turn have been handled.
  event_active(end_of_turn, 0, 0);
}

void ended(bufferevent*, short, void* context) {
  drop(*static_cast<Client*>(context));
}

void flush(Client& client) {
  bufferevent_write(client.stream, client.queue.data(), client.queue.size());
  client.queue.clear();
}

void connected(evconnlistener* listener, evutil_socket_t socket, sockaddr*, int,
               void*) {
  const int yes = 1;
  setsockopt(socket, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  auto* const client = new Client;
  client->stream = bufferevent_socket_new(evconnlistener_get_base(listener),
                                          socket, BEV_OPT_CLOSE_ON_FREE);
  bufferevent_set_max_single_read(client->stream, 65536);
  bufferevent_set_max_single_write(client->stream, 262144);
  bufferevent_setcb(client->stream, readable, nullptr, ended, client);
  bufferevent_enable(client->stream, EV_READ | EV_WRITE);
  room.join(*client);
}

}  // namespace

int main() {
  event_base* const base = event_base_new();
  event_base_priority_init(base, 3);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  evconnlistener* const listener = evconnlistener_new_bind(
      base, connected, nullptr, LEV_OPT_CLOSE_ON_FREE, 4096,
      reinterpret_cast<sockaddr*>(&address), sizeof address);
  socklen_t size = sizeof address;
  getsockname(evconnlistener_get_fd(listener),
              reinterpret_cast<sockaddr*>(&address), &size);
  announce(ntohs(address.sin_port));
  end_of_turn = event_new(
      base, -1, EV_PERSIST,
      [](evutil_socket_t, short, void*) { room.flush(flush); }, nullptr);
  event_priority_set(end_of_turn, 2);  // after all others, which have 1
  event_base_dispatch(base);
}
