// The broadcast server on libuv: uv_try_write first, and uv_write for what the
// socket does not take.
#include <netinet/in.h>
#include <uv.h>

#include <array>

#include "room.hpp"

namespace {

struct Client : Member {
  uv_tcp_t socket;
  uv_write_t request;
  std::string in_flight;  // what uv_write has not written yet
};

Room<Client> room;
uv_prepare_t end_of_turn;
std::array<char, 65536> input;

void drop(Client& client) {
  auto* const handle = reinterpret_cast<uv_handle_t*>(&client.socket);
  if (uv_is_closing(handle)) return;
  room.leave(client);
  uv_close(handle, [](uv_handle_t* closed) {
    delete static_cast<Client*>(closed->data);
  });
}

void written(uv_write_t* request, int status);

void flush(Client& client) {
  auto* const stream = reinterpret_cast<uv_stream_t*>(&client.socket);
  uv_buf_t bytes = uv_buf_init(client.queue.data(),
                               static_cast<unsigned>(client.queue.size()));
  const int count = uv_try_write(stream, &bytes, 1);
  if (count < 0 && count != UV_EAGAIN) return drop(client);
  if (count > 0) client.consume(static_cast<std::size_t>(count));
  if (client.queue.empty()) return;
  std::swap(client.in_flight, client.queue);
  bytes = uv_buf_init(
      client.in_flight.data() + client.written,
      static_cast<unsigned>(client.in_flight.size() - client.written));
  client.queue.clear();
  client.written = 0;
  client.waits = true;
  client.request.data = &client;
  uv_write(&client.request, stream, &bytes, 1, written);
}

void written(uv_write_t* request, int status) {
  Client& client = *static_cast<Client*>(request->data);
  client.waits = false;
  if (status < 0) return drop(client);
  if (!client.queue.empty()) flush(client);
}

void allocate(uv_handle_t*, std::size_t, uv_buf_t* buffer) {
  *buffer = uv_buf_init(input.data(), input.size());
}

void received(uv_stream_t* stream, ssize_t count, const uv_buf_t*) {
  Client& client = *static_cast<Client*>(stream->data);
  if (count < 0) return drop(client);
  room.hear(client, {input.data(), static_cast<std::size_t>(count)});
  // libuv calls this up to 32 times before it is another one's turn.
  if (room.has_enough_news()) room.flush(flush);
}

void connected(uv_stream_t* listener, int) {
  auto* const client = new Client;
  uv_tcp_init(listener->loop, &client->socket);
  client->socket.data = client;
  auto* const stream = reinterpret_cast<uv_stream_t*>(&client->socket);
  room.join(*client);
  if (uv_accept(listener, stream) != 0) return drop(*client);
  uv_tcp_nodelay(&client->socket, 1);
  uv_read_start(stream, allocate, received);
}

}  // namespace

int main() {
  uv_loop_t* const loop = uv_default_loop();
  uv_tcp_t listener;
  sockaddr_in address{};
  uv_ip4_addr("127.0.0.1", 0, &address);
  uv_tcp_init(loop, &listener);
  uv_tcp_bind(&listener, reinterpret_cast<sockaddr*>(&address), 0);
  uv_listen(reinterpret_cast<uv_stream_t*>(&listener), 4096, connected);
  int size = sizeof address;
  uv_tcp_getsockname(&listener, reinterpret_cast<sockaddr*>(&address), &size);
  announce(ntohs(address.sin_port));
  uv_prepare_init(loop, &end_of_turn);
  uv_prepare_start(&end_of_turn, [](uv_prepare_t*) { room.flush(flush); });
  return uv_run(loop, UV_RUN_DEFAULT);
}
