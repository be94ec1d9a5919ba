// 04_broadcast: what one client says, all others hear.
//
// Each client has a WriteBuffer for what its socket does not take at once. The
// server asks to be told of room for writing only while something waits there.
//
//   04_broadcast [ADDRESS:PORT]  127.0.0.1:8080 if left out
//   nc 127.0.0.1 8080            in two or three other terminals
//
// It gives up clients who read too slowly, and spins when descriptors run out.

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

enum class State {
  open,
  deaf,      // takes nothing any more: read to the end, then closed
  reset,     // the same, but half a line at its end is not worth sending
  finished,  // its stream has ended: sent what is queued, then closed
  too_slow,  // its queue is full: closed
};

struct Client {
  Fd socket;
  LineBuffer lines;
  WriteBuffer output;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
  State state = State::open;
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
      // Can fail for lack of kernel memory: then this client is closed.
      if (poller_.try_add(accepted.fd, token, Interest::readable, Mode::edge))
        continue;
      clients_[token].socket = std::move(accepted.fd);
    }
  }

  void read_client(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    if (client.state == State::finished) return;
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
    if (client.state == State::reset || client.state == State::too_slow)
      return drop(token);
    if (!client.lines.rest().empty()) {
      broadcast(token, std::string(client.lines.rest()) + '\n');
    }
    client.state = State::finished;
    if (client.output.empty()) drop(token);
  }

  void broadcast(Token sender, std::string_view line) {
    for (auto& [token, client] : clients_) {
      if (token == sender || client.state != State::open) continue;
      // What is not empty is in the list already, or awaits room.
      if (client.output.empty()) unsent_.push_back(token);
      if (client.output.append(line)) continue;
      client.state = State::too_slow;
      unsent_.push_back(token);
    }
  }

  void flush(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    if (client.state == State::too_slow) return drop(token);
    const IoResult result = client.output.flush(client.socket);
    if (client.state == State::finished && !result.would_block())
      return drop(token);
    if (result.failed()) return stop_writing(token, client, result.error);
    if (client.awaits_room == result.would_block()) return;
    client.awaits_room = result.would_block();
    set_interest(token, client);
  }

  // The client is gone, but lines that it sent before may still be unread. So
  // only reading ends it: modify reports what there is to read once more.
  void stop_writing(Token token, Client& client, int error) {
    client.state = error == ECONNRESET ? State::reset : State::deaf;
    client.output = WriteBuffer();
    client.awaits_room = false;
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
