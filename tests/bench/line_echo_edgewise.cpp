// An echo server on the header, line by line: each line goes back to whoever
// sent it, and one that is too long ends its client. The same, and as much of
// it, as line_echo_plain.cpp. It ends with its last client.

#include <cstdio>

#include "edgewise.hpp"

using namespace edgewise;

namespace {

constexpr Token listener_token{0};

struct Client {
  Fd socket;
  LineBuffer lines{};
  WriteBuffer output{};
  bool awaits_room = false;
  bool finished = false;
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
    const Token token = event.token();
    if (event.readable() && !client.awaits_room && !read(client))
      return drop(token, client);
    const IoResult result = client.output.flush(client.socket);
    if (result.failed()) return drop(token, client);
    if (client.finished && result.ok()) return drop(token, client);
    if (client.awaits_room == result.would_block()) return;
    client.awaits_room = result.would_block();
    // While its socket is full, a client is not read from.
    poller_.modify(
        client.socket, token,
        client.awaits_room ? Interest::writable : Interest::readable);
  }

  // False if the client is of no more use.
  static bool read(Client& client) {
    const IoResult result = client.lines.fill(client.socket);
    while (const auto line = client.lines.next())
      if (!client.output.append(*line)) return false;
    if (result.failed() || client.lines.overlong()) return false;
    client.finished = result.end_of_stream();
    return !client.finished || client.output.append(client.lines.rest());
  }

  void drop(Token token, Client& client) {
    poller_.remove(client.socket);
    clients_.erase(token);
  }

  Fd listener_ = listen(*Address::parse("127.0.0.1:0"));
  Poller poller_;
  Slab<Client> clients_;
};

}  // namespace

int main() { Server().run(); }
