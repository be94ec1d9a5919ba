// 05_survive: nothing that a client does ends the server.
//
// Clients live in a Slab, where an event of somebody who has left finds nobody.
// Without descriptors, accepting pauses. Whoever sends a line that is too long
// is told so before he is disconnected. And standard output may be closed.
//
//   05_survive [ADDRESS:PORT]    127.0.0.1:8080 if left out
//   nc 127.0.0.1 8080            in two or three other terminals
//
// It still queues up to 64 MiB for each client who reads too slowly, and then
// gives him up.

#include <fcntl.h>

#include <csignal>
#include <deque>
#include <iostream>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;
using std::chrono::steady_clock;

namespace {

volatile std::sig_atomic_t stop_requested = 0;

void request_stop(int) { stop_requested = 1; }

constexpr Token listener_token{0};

// One client may fill this many blocks of 64 KiB before others have their turn.
constexpr int reads_per_event = 2;

// As many may come in before those who are there have their turn.
constexpr int accepts_per_event = 64;

// How long not to accept when descriptors have run out.
constexpr auto accept_pause = 100ms;

// How long to listen to a rejected client, so that it can read why.
constexpr auto linger_time = 1s;

constexpr std::string_view too_long_text =
    "error: a line has 65536 bytes at most\n";

enum class State {
  open,
  deaf,       // takes nothing any more: read to the end, then closed
  reset,      // the same, but half a line at its end is not worth sending
  finished,   // its stream has ended: sent what is queued, then closed
  rejected,   // its line was too long: sent what is queued, then lingering
  lingering,  // our half is closed, and what it still sends is thrown away
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
      do_what_is_due();
    }
  }

 private:
  // At the end of each turn, whatever woke the loop.
  void do_what_is_due() {
    drop_lingering();
    if (steady_clock::now() >= resume_at_) resume_accepting();
  }

  void accept_clients() {
    // The listener is level-triggered: who still waits is reported again.
    for (int accepts = 0; accepts < accepts_per_event; ++accepts) {
      Accepted accepted = accept(listener_);
      if (accepted.retry()) continue;
      if (accepted.exhausted()) return pause_accepting();
      if (!accepted.ok()) return;
      const auto [token, client] = clients_.emplace(std::move(accepted.fd));
      // Can fail for lack of kernel memory: then this client is closed.
      if (poller_.try_add(client.socket, token, Interest::readable,
                          Mode::edge)) {
        clients_.erase(token);
        continue;
      }
    }
  }

  // A listener with somebody in its queue would be reported at every wait. Who
  // waits there is served when a descriptor is free, or memory.
  void pause_accepting() {
    poller_.modify(listener_, listener_token, Interest::none);
    accepting_paused_ = true;
    resume_at_ = steady_clock::now() + accept_pause;
  }

  void resume_accepting() {
    if (!accepting_paused_) return;
    poller_.modify(listener_, listener_token, Interest::readable);
    accepting_paused_ = false;
  }

  void read_client(Token token) {
    Client* const found = clients_.find(token);
    if (found == nullptr) return;
    Client& client = *found;
    if (client.state == State::finished) return;
    for (int reads = 0; reads < reads_per_event; ++reads) {
      const IoResult result = client.lines.fill(client.socket);
      while (const auto line = client.lines.next()) broadcast(token, *line);
      if (result.would_block()) return;
      if (result.end_of_stream()) return finish(token, client);
      if (result.failed()) return drop(token);
      if (client.lines.overlong()) reject(token, client);
    }
    // There may be more, and no edge will tell: modify arms it again.
    set_interest(token, client);
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client) {
    if (client.state == State::reset) return drop(token);
    if (!client.lines.rest().empty()) {
      broadcast(token, std::string(client.lines.rest()) + '\n');
    }
    client.state = State::finished;
    if (client.output.empty()) drop(token);
  }

  // Of a line that is too long nothing has gone out, and its sender hears why.
  void reject(Token token, Client& client) {
    if (client.state != State::open) return;
    client.state = State::rejected;
    // A queue that is full has no room for it.
    static_cast<void>(enqueue(token, client, too_long_text));
  }

  // Closing at once, with bytes of the line still unread, would send a reset,
  // which can overtake the reason. So only our half is closed, and for a while
  // what comes is read and thrown away.
  void linger(Token token, Client& client) {
    client.state = State::lingering;
    shutdown_write(client.socket);
    lingering_.emplace_back(steady_clock::now() + linger_time, token);
  }

  void drop_lingering() {
    while (!lingering_.empty() &&
           lingering_.front().first <= steady_clock::now()) {
      const Token token = lingering_.front().second;
      lingering_.pop_front();
      if (clients_.find(token) != nullptr) drop(token);
    }
  }

  void broadcast(Token sender, std::string_view line) {
    for (auto [token, client] : clients_) {
      if (token == sender || client.state != State::open) continue;
      // It may have an event later in this batch, which will find nobody.
      if (!enqueue(token, client, line)) drop(token);
    }
  }

  // To be sent at the end of the turn. False: the queue is full.
  bool enqueue(Token token, Client& client, std::string_view text) {
    // What is not empty is in the list already, or awaits room.
    if (client.output.empty()) unsent_.push_back(token);
    return client.output.append(text);
  }

  void flush(Token token) {
    Client* const found = clients_.find(token);
    if (found == nullptr) return;
    Client& client = *found;
    const IoResult result = client.output.flush(client.socket);
    if (client.state == State::finished && !result.would_block())
      return drop(token);
    if (result.failed()) return stop_writing(token, client, result.error);
    if (client.state == State::rejected && result.ok()) linger(token, client);
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
    poller_.remove(clients_.find(token)->socket);
    clients_.erase(token);
    resume_accepting();
  }

  Fd listener_;
  Poller poller_;
  Slab<Client> clients_;
  std::vector<Token> unsent_;  // whose output was empty before this turn
  std::deque<std::pair<steady_clock::time_point, Token>> lingering_;
  bool accepting_paused_ = false;
  steady_clock::time_point resume_at_;
};

// Started without standard streams, the server would get their numbers for its
// sockets, and print into one of them.
void occupy_standard_streams() {
  int descriptor = 0;
  do {
    descriptor = ::open("/dev/null", O_RDWR);
  } while (descriptor >= 0 && descriptor <= STDERR_FILENO);
  if (descriptor > STDERR_FILENO) ::close(descriptor);
}

}  // namespace

int main(int argc, char** argv) {
  const auto address = Address::parse(argc > 1 ? argv[1] : "127.0.0.1:8080");
  if (argc > 2 || !address) {
    std::cerr << "usage: " << argv[0] << " [ADDRESS:PORT]"
              << ", such as 127.0.0.1:8080 or [::1]:9000\n";
    return 2;
  }
  occupy_standard_streams();
  std::signal(SIGINT, request_stop);
  std::signal(SIGTERM, request_stop);
  std::signal(SIGPIPE, SIG_IGN);  // standard output may be a pipe
  try {
    Server(*address).run();
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
  return 0;
}
