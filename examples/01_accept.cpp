// 01_accept: an event loop that accepts connections.
//
// One thread waits for the listening socket and takes each connection as it
// comes. It has nowhere to keep one yet, so each is closed at once.
//
//   01_accept [ADDRESS:PORT]     127.0.0.1:8080 if left out
//   nc 127.0.0.1 8080            in another terminal

#include <csignal>
#include <iostream>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;

namespace {

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int) { stop_requested = 1; }

constexpr Token listener_token{0};

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
        if (event.token() == listener_token) accept_clients();
      }
    }
  }

 private:
  void accept_clients() {
    for (;;) {
      const Accepted accepted = accept(listener_);
      if (accepted.retry()) continue;
      if (!accepted.ok()) return;
      std::cout << "connection from " << accepted.peer.to_string() << std::endl;
    }
  }

  Fd listener_;
  Poller poller_;
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
