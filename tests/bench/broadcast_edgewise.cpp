// A chat server on the header: what one client says, all others hear. The
// same, and as much of it, as broadcast_plain.cpp. It ends with its last
// client.

#include <cstdio>
#include <vector>

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
  bool too_slow = false;
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
      flush_unsent();
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
    if (event.readable() && !client.finished && !read(token, client))
      return drop(token, client);
    if (event.writable()) flush(token, client);
  }

  // False if the client is of no more use.
  bool read(Token token, Client& client) {
    const IoResult result = client.lines.fill(client.socket);
    while (const auto line = client.lines.next()) broadcast(token, *line);
    if (result.end_of_stream()) return finish(token, client);
    return !result.failed() && !client.lines.overlong();
  }

  // The client says nothing more: it is sent what is queued, then closed.
  bool finish(Token token, Client& client) {
    if (const auto rest = client.lines.rest(); !rest.empty())
      broadcast(token, std::string(rest) + '\n');
    client.finished = true;
    if (client.output.empty()) return false;
    set_interest(token, client);
    return true;
  }

  void broadcast(Token sender, std::string_view line) {
    for (const auto [token, client] : clients_) {
      if (token == sender || client.too_slow) continue;
      // What is not empty is in the list already, or awaits room.
      if (client.output.empty()) unsent_.push_back(token);
      if (client.output.append(line)) continue;
      client.too_slow = true;
      unsent_.push_back(token);
    }
  }

  void flush(Token token, Client& client) {
    if (client.too_slow) return drop(token, client);
    const IoResult result = client.output.flush(client.socket);
    const bool blocked = result.would_block();
    if (result.failed() || (client.finished && !blocked))
      return drop(token, client);
    if (client.awaits_room == blocked) return;
    client.awaits_room = blocked;
    set_interest(token, client);
  }

  void flush_unsent() {
    for (const Token token : unsent_)
      if (Client* const client = clients_.find(token)) flush(token, *client);
    unsent_.clear();
  }

  void set_interest(Token token, const Client& client) {
    const Interest reading =
        client.finished ? Interest::none : Interest::readable;
    const Interest writing =
        client.awaits_room ? Interest::writable : Interest::none;
    poller_.modify(client.socket, token, reading | writing);
  }

  void drop(Token token, Client& client) {
    poller_.remove(client.socket);
    clients_.erase(token);
  }

  Fd listener_ = listen(*Address::parse("127.0.0.1:0"));
  Poller poller_;
  Slab<Client> clients_;
  std::vector<Token> unsent_;  // whose output was empty before this turn
};

}  // namespace

int main() { Server().run(); }
