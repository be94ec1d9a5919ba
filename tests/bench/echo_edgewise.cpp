// An echo server on the header: what a client sends goes back to it. The same,
// and as much of it, as echo_plain.cpp. It ends with its last client.

#include <array>
#include <cstdio>
#include <string_view>

#include "edgewise.hpp"

using namespace edgewise;

namespace {

constexpr Token listener_token{0};

struct Client {
  Fd socket;
  bool awaits_room = false;
  WriteBuffer output{};
};

class Server {
 public:
  Server() {
    poller_.add(listener_, listener_token, Interest::readable);
    std::printf("%d\n", local_address(listener_).port());
    std::fflush(stdout);
  }

  void run() {
    do {
      for (const Event& event : poller_.wait()) {
        if (event.token() == listener_token) {
          accept_clients();
        } else if (Client* const client = clients_.find(event.token())) {
          serve(*client, event);
        }
      }
    } while (!clients_.empty());
  }

 private:
  void accept_clients() {
    for (;;) {
      Accepted accepted = accept(listener_);
      if (accepted.retry()) continue;
      if (!accepted.ok()) return;
      const auto [token, client] = clients_.emplace(std::move(accepted.fd));
      if (poller_.try_add(client.socket, token, Interest::readable))
        clients_.erase(token);
    }
  }

  void serve(Client& client, const Event& event) {
    if (client.awaits_room) {
      send_rest(client, event.token());
    } else if (event.readable()) {
      echo(client, event.token());
    }
  }

  void echo(Client& client, Token token) {
    const FdView socket = client.socket;
    const IoResult received = read(socket, input_);
    if (received.would_block()) return;
    if (received.ended()) return drop(client, token);
    const std::string_view bytes(input_.data(), received.bytes);
    const IoResult sent = write(socket, bytes);
    if (sent.failed()) return drop(client, token);
    if (sent.bytes == bytes.size()) return;
    if (!client.output.append(bytes.substr(sent.bytes)))
      return drop(client, token);
    set_awaits_room(client, token, true);
  }

  void send_rest(Client& client, Token token) {
    const IoResult result = client.output.flush(client.socket);
    if (result.failed()) return drop(client, token);
    if (result.ok()) set_awaits_room(client, token, false);
  }

  void set_awaits_room(Client& client, Token token, bool awaits_room) {
    client.awaits_room = awaits_room;
    // While its socket is full, a client is not read from.
    poller_.modify(client.socket, token,
                   awaits_room ? Interest::writable : Interest::readable);
  }

  void drop(Client& client, Token token) {
    poller_.remove(client.socket);
    clients_.erase(token);
  }

  Fd listener_ = listen(*Address::parse("127.0.0.1:0"));
  Poller poller_;
  Slab<Client> clients_;
  // Every read goes here: what a socket does not take at once is queued.
  std::array<char, 65536> input_;
};

}  // namespace

int main() { Server().run(); }
