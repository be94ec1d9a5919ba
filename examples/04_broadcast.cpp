// 04_broadcast: what one client says, all others hear.
//
// Each client has a WriteBuffer for what its socket does not take at once. The
// server asks to be told of room for writing only while something waits there.
//
//   04_broadcast [ADDRESS:PORT]  127.0.0.1:8080 if left out
//   nc 127.0.0.1 8080            in two or three other terminals

#include <csignal>
#include <iostream>
#include <unordered_map>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;

namespace {

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int) { stop_requested = 1; }

constexpr Token listener_token{0};

// One client may fill this many blocks of 64 KiB before others have their turn.
constexpr int reads_per_event = 2;

struct Client {
  Fd socket;
  LineBuffer lines;
  WriteBuffer output;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
  bool finished = false;     // its stream ended: closed when output is sent
  bool too_slow = false;     // output is full: closed without further ado
};

class Server {
 public:
  explicit Server(const Address& address) : listener_(listen(address)) {
    poller_.add(listener_, listener_token, Interest::readable);
    std::cout << "listening on " << local_address(listener_).to_string()
              << std::endl;
  }

  void run() {
    while (stop_requested == 0) {
      for (const Event& event : poller_.wait(100ms)) {
        if (event.token() == listener_token) {
          accept_clients();
        } else {
          if (event.readable()) read_client(event.token());
          if (event.writable()) flush(event.token());
        }
      }
      for (const Token token : unsent_) flush(token);
      unsent_.clear();
    }
  }

 private:
  void accept_clients() {
    for (;;) {
      Accepted accepted = accept(listener_);
      if (accepted.retry()) continue;
      if (!accepted.ok()) return;
      const Token token{next_token_++};
      // Can fail for want of kernel memory: then this client is closed.
      if (poller_.try_add(accepted.fd, token, Interest::readable, Mode::edge))
        continue;
      clients_[token].socket = std::move(accepted.fd);
    }
  }

  void read_client(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end() || found->second.finished) return;
    Client& client = found->second;
    for (int reads = 0; reads < reads_per_event; ++reads) {
      const IoResult result = client.lines.fill(client.socket);
      while (const auto line = client.lines.next()) broadcast(token, *line);
      if (result.would_block()) return;
      if (result.end_of_stream()) return finish(token, client);
      if (result.ended() || client.lines.overlong()) return drop(token);
    }
    // There may be more, and no edge will tell: modify arms it again.
    set_interest(token, client);
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client) {
    if (!client.lines.rest().empty()) {
      broadcast(token, std::string(client.lines.rest()) + '\n');
    }
    client.finished = true;
    if (client.output.empty()) drop(token);
  }

  void broadcast(Token sender, std::string_view line) {
    for (auto& [token, client] : clients_) {
      if (token == sender || client.finished || client.too_slow) continue;
      // What is not empty is in the list already, or awaits room.
      if (client.output.empty()) unsent_.push_back(token);
      if (client.output.append(line)) continue;
      client.too_slow = true;
      unsent_.push_back(token);
    }
  }

  void flush(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    const IoResult result = client.output.flush(client.socket);
    const bool done = client.finished && result.ok();
    if (result.failed() || done || client.too_slow) return drop(token);
    if (client.awaits_room == result.would_block()) return;
    client.awaits_room = result.would_block();
    set_interest(token, client);
  }

  void set_interest(Token token, const Client& client) {
    const Interest writing =
        client.awaits_room ? Interest::writable : Interest::none;
    poller_.modify(client.socket, token, Interest::readable | writing,
                   Mode::edge);
  }

  void drop(Token token) {
    poller_.remove(clients_.at(token).socket);
    clients_.erase(token);
  }

  Fd listener_;
  Poller poller_;
  std::unordered_map<Token, Client> clients_;
  std::uint64_t next_token_ = 1;
  std::vector<Token> unsent_;  // whose output was empty before this turn
};

}  // namespace

int main(int argc, char** argv) {
  const auto address = Address::parse(argc > 1 ? argv[1] : "127.0.0.1:8080");
  if (argc > 2 || !address) {
    std::cerr << "usage: " << argv[0] << " [ADDRESS:PORT]"
              << ", such as 127.0.0.1:8080 or [::1]:9000\n";
    return 2;
  }
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  try {
    Server(*address).run();
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
  return 0;
}
