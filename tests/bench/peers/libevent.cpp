// The broadcast server on libevent's bufferevents, which queue and write
// themselves: when all events of a turn have been handled, in the next one.
#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <malloc.h>
#include <netinet/in.h>
#include <netinet/tcp.h>

#include <array>

#include "room.hpp"

namespace {

struct Client : Member {
  bufferevent* stream = nullptr;
};

Room<Client> room;

void drop(Client& client) {
  room.leave(client);
  bufferevent_free(client.stream);
  delete &client;
}

void hand_over(Client& client) {
  bufferevent_write(client.stream, client.queue.data(), client.queue.size());
  client.queue.clear();
}

void readable(bufferevent* stream, void* context) {
  static std::array<char, 65536> input;
  Client& client = *static_cast<Client*>(context);
  evbuffer* const buffer = bufferevent_get_input(stream);
  while (const int count = evbuffer_remove(buffer, input.data(), input.size()))
    room.hear(client, {input.data(), static_cast<std::size_t>(count)});
  room.flush(hand_over);
}

void ended(bufferevent*, short, void* context) {
  drop(*static_cast<Client*>(context));
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
  // Its buffers come and go with each turn. Where they are all that lies at the
  // heap's end, glibc would give that back and take it again each time, at four
  // times the cost.
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 16 << 20);
  event_base* const base = event_base_new();
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
  event_base_dispatch(base);
}
