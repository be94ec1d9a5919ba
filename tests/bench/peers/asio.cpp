// The broadcast server on asio, without Boost.
#include <array>
#include <asio.hpp>
#include <memory>

#include "room.hpp"

namespace {

using asio::ip::tcp;

struct Client : Member, std::enable_shared_from_this<Client> {
  explicit Client(tcp::socket accepted) : socket(std::move(accepted)) {}
  tcp::socket socket;
};
using Handle = std::shared_ptr<Client>;

asio::io_context loop(1);
Room<Client> room;
std::array<char, 65536> input;
bool flush_is_posted = false;

void drop(Client& client) {
  if (!client.socket.is_open()) return;
  room.leave(client);
  client.socket.close();
}

void flush(Client& client) {
  asio::error_code error;
  const std::size_t count =
      client.socket.write_some(asio::buffer(client.unwritten()), error);
  if (error && error != asio::error::would_block) return drop(client);
  client.consume(count);
  client.waits = !client.queue.empty();
  if (!client.waits) return;
  client.socket.async_wait(
      tcp::socket::wait_write,
      [handle = client.shared_from_this()](asio::error_code failed) {
        if (!failed) flush(*handle);
      });
}

void flush_all() {
  flush_is_posted = false;
  room.flush(flush);
}

void listen_to(const Handle& client) {
  client->socket.async_wait(
      tcp::socket::wait_read, [client](asio::error_code error) {
        std::size_t count = 0;
        if (!error)
          count = client->socket.read_some(asio::buffer(input), error);
        if (error && error != asio::error::would_block) return drop(*client);
        room.hear(*client, {input.data(), count});
        // Behind what else is ready by now.
        if (!std::exchange(flush_is_posted, true)) asio::post(loop, flush_all);
        listen_to(client);
      });
}

void accept_all(tcp::acceptor& acceptor) {
  acceptor.async_accept([&](asio::error_code error, tcp::socket socket) {
    if (!error) {
      socket.non_blocking(true);
      socket.set_option(tcp::no_delay(true));
      const auto client = std::make_shared<Client>(std::move(socket));
      room.join(*client);
      listen_to(client);
    }
    accept_all(acceptor);
  });
}

}  // namespace

int main() {
  tcp::acceptor acceptor(loop,
                         tcp::endpoint(asio::ip::address_v4::loopback(), 0));
  announce(acceptor.local_endpoint().port());
  accept_all(acceptor);
  loop.run();
}
