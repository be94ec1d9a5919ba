// 03_lines: bytes become lines.
//
// Each client has a LineBuffer that puts a line together however the network
// cut it. Clients are edge-triggered now: every event is read to its end.
//
//   03_lines [ADDRESS:PORT]      127.0.0.1:8080 if left out
//   nc 127.0.0.1 8080            in two other terminals

#include <csignal>
#include <iostream>
#include <unordered_map>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;

namespace {

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int) { stop_requested = 1; }

constexpr Token listener_token{0};

struct Client {
  Fd socket;
  LineBuffer lines;
};

std::ostream& operator<<(std::ostream& out, Token token) {
  return out << "client " << static_cast<std::uint64_t>(token);
}

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
          read_client(event.token());
        }
      }
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
      std::cout << token << " connected" << std::endl;
    }
  }

  void read_client(Token token) {
    const auto found = clients_.find(token);
    if (found == clients_.end()) return;
    Client& client = found->second;
    for (;;) {
      const IoResult result = client.lines.fill(client.socket);
      while (const auto line = client.lines.next()) {
        print_line(token, line->substr(0, line->size() - 1));
      }
      if (result.would_block()) return;
      if (result.end_of_stream() && !client.lines.rest().empty()) {
        print_line(token, client.lines.rest());
      }
      if (result.ended() || client.lines.overlong()) return drop(token);
    }
  }

  static void print_line(Token token, std::string_view line) {
    std::cout << token << ": " << line << std::endl;
  }

  void drop(Token token) {
    poller_.remove(clients_.at(token).socket);
    clients_.erase(token);
    std::cout << token << " left" << std::endl;
  }

  Fd listener_;
  Poller poller_;
  std::unordered_map<Token, Client> clients_;
  std::uint64_t next_token_ = 1;
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
