// 08_one_copy: each line is kept once, however many are to hear it.
//
// All that is said goes into one BroadcastLog, and of each client only its
// place in there is kept. When the log is full, those who talk have to wait,
// each in the middle of what it was saying.
//
//   08_one_copy [ADDRESS:PORT [SECONDS]]    127.0.0.1:8080 and 600
//   nc 127.0.0.1 8080                       in two or three other terminals
//
// Ten thousand clients need as many descriptors: ulimit -n 20000. And all of
// them are served by one processor.

#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <csignal>
#include <deque>
#include <iostream>
#include <optional>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;
using std::chrono::steady_clock;

namespace {

// Smaller than any token of a Slab.
constexpr Token listener_token{0};
constexpr Token signals_token{1};
constexpr Token timer_token{2};

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

// How much may be queued for all clients together. At the high-water mark the
// log is full, and nobody is read until it is down to the low one: two marks,
// lest every few bytes switch it off and on again.
constexpr std::size_t high_water = 8 << 20;
constexpr std::size_t low_water = high_water / 2;

// How often to look at who takes what is queued for him, and how often in a row
// he may have taken nothing: he has 5 seconds.
constexpr auto sample_interval = 1s;
constexpr int samples_without_progress = 5;

// When asked to stop, how long to wait until what is queued has arrived, and
// how often to look whether it has: no event tells.
constexpr auto farewell_time = 5s;
constexpr auto arrival_interval = 20ms;

constexpr auto stats_interval = 10s;

constexpr auto never = steady_clock::time_point::max();

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
  BroadcastLog::Cursor cursor;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
  State state = State::open;
  bool held = false;          // not read for now: Interest::readable is not set
  std::uint64_t sent = 0;     // to its socket, in bytes
  std::uint64_t arrived = 0;  // of those, as of the last sample
  int stalled_samples = 0;    // in a row: something was queued, nothing arrived
  steady_clock::time_point last_heard = steady_clock::now();
  std::optional<std::string_view> line;  // the log was full: to be said later
};

// What has happened since the last line about it.
struct Stats {
  std::uint64_t joined = 0;
  std::uint64_t left = 0;
  std::uint64_t lines = 0;

  bool operator==(const Stats&) const = default;
};

// Bytes that the socket has taken, but the peer's kernel has not: see tcp(7).
std::uint64_t unacknowledged(const Fd& socket) {
  int bytes = 0;
  ::ioctl(socket.get(), SIOCOUTQ, &bytes);
  return static_cast<std::uint64_t>(bytes);
}

class Server {
 public:
  Server(const Address& address, std::chrono::seconds idle_timeout)
      : listener_(listen(address)), idle_timeout_(idle_timeout) {
    poller_.add(listener_, listener_token, Interest::readable);
    poller_.add(signals_, signals_token, Interest::readable);
    poller_.add(timer_, timer_token, Interest::readable);
    std::cout << "listening on " << local_address(listener_).to_string()
              << std::endl;
  }

  void run() {
    while (!stopped()) {
      for (const Event& event : poller_.wait()) {
        if (event.token() == listener_token) {
          accept_clients();
        } else if (event.token() == signals_token) {
          stop();
        } else if (event.token() == timer_token) {
          timer_.expirations();
          timer_set_for_ = never;
        } else {
          if (event.readable()) read_client(event.token());
          if (event.writable()) flush(event.token());
        }
      }
      flush_all();
      do_what_is_due();
    }
    // An end of stream, though what clients still say is not read any more.
    for (auto [token, client] : clients_) shutdown_write(client.socket);
  }

 private:
  // At the end of each turn, whatever woke the loop.
  void do_what_is_due() {
    drop_lingering();
    if (steady_clock::now() >= resume_at_) resume_accepting();
    if (!log_.empty() && steady_clock::now() >= next_sample_) drop_stalled();
    if (may_read()) resume_reading();
    if (steady_clock::now() >= next_idle_check_) drop_silent();
    if (stats_ != Stats{} && steady_clock::now() >= next_stats_) print_stats();
    set_timer();
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
      client.cursor = log_.join();
      // Whoever comes later is not due before the first one.
      next_idle_check_ =
          std::min(next_idle_check_, steady_clock::now() + idle_timeout_);
      ++stats_.joined;
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
    client.last_heard = steady_clock::now();
    if (reading_paused_) return hold(token, client, held_);
    for (int reads = 0; reads < reads_per_event && !reading_paused_; ++reads) {
      // First what was left when the log was full.
      if (!broadcast_lines(client)) break;
      const IoResult result = client.lines.fill(client.socket);
      if (!broadcast_lines(client)) break;
      if (result.would_block()) return;
      if (result.end_of_stream()) return finish(token, client);
      if (result.failed()) return drop(token);
      if (client.lines.overlong()) reject(token, client);
    }
    if (reading_paused_) return hold(token, client, heard_);
    // There may be more, and no edge will tell: modify arms it again.
    set_interest(token, client);
  }

  // What it says waits in its socket, and when that is full, with the client.
  void hold(Token token, Client& client, std::vector<Token>& waiting) {
    if (client.held) return;
    client.held = true;
    waiting.push_back(token);
    set_interest(token, client);
  }

  bool may_read() {
    return log_.room() >= high_water - low_water && !stopping();
  }

  // First those who have waited, and a turn later those who have been heard:
  // one who never stops talking would be the first each time.
  void resume_reading() {
    reading_paused_ = false;
    const auto released = std::exchange(held_.empty() ? heard_ : held_, {});
    for (const Token token : released) {
      Client* const client = clients_.find(token);
      if (client == nullptr) continue;
      client->held = false;
      set_interest(token, *client);
      // Of lines that have been read already no event tells.
      if (client->line) read_client(token);
    }
    flush_all();
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client) {
    if (client.state == State::reset) return drop(token);
    if (!client.lines.rest().empty()) {
      // If the log is full, the end of the stream is read again later.
      if (!broadcast(client, std::string(client.lines.rest()) + '\n'))
        return set_interest(token, client);
    }
    client.state = State::finished;
    client.cursor.close();
    if (client.cursor.behind() == 0) drop(token);
  }

  // Of a line that is too long nothing has gone out, and its sender hears why.
  void reject(Token token, Client& client) {
    if (client.state != State::open) return;
    client.state = State::rejected;
    client.cursor.close();
    flush(token);
  }

  // Closing at once, with bytes of the line still unread, would send a reset,
  // which can overtake the reason. So only our half is closed, and for a while
  // what comes is read and thrown away.
  void linger(Token token, Client& client) {
    client.state = State::lingering;
    client.cursor = {};
    // All that was queued is sent, so there is room for so little.
    static_cast<void>(write(client.socket, too_long_text));
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

  // False: the log is full. The line that it did not take is kept, and those
  // behind it stay where they are.
  bool broadcast_lines(Client& client) {
    while (client.line || (client.line = client.lines.next())) {
      if (!broadcast(client, *client.line)) return false;
      client.line.reset();
    }
    return true;
  }

  // To be sent at the end of the turn. False: the log is full.
  bool broadcast(Client& sender, std::string_view line) {
    if (!log_.append(line, &sender.cursor)) {
      reading_paused_ = true;
      return false;
    }
    unsent_ = true;
    ++stats_.lines;
    return true;
  }

  // Those who await room are reported when there is some.
  void flush_all() {
    if (!std::exchange(unsent_, false)) return;
    for (auto [token, client] : clients_)
      if (!client.awaits_room && client.cursor.behind() > 0) flush(token);
  }

  void flush(Token token) {
    Client* const found = clients_.find(token);
    if (found == nullptr) return;
    Client& client = *found;
    const IoResult result = log_.flush(client.socket, client.cursor);
    client.sent += result.bytes;
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
    client.cursor = {};
    client.awaits_room = false;
    set_interest(token, client);
  }

  void set_interest(Token token, const Client& client) {
    const Interest writing =
        client.awaits_room ? Interest::writable : Interest::none;
    const Interest reading = client.held ? Interest::none : Interest::readable;
    poller_.modify(client.socket, token, reading | writing, Mode::edge);
  }

  // A socket may take megabytes that nobody ever reads, and have no room for
  // long while somebody reads slowly. So not what it takes counts, but what
  // arrives. By samples, not by the clock: while this process is stopped, no
  // time passes for the client.
  void drop_stalled() {
    next_sample_ = steady_clock::now() + sample_interval;
    for (auto [token, client] : clients_) {
      const std::uint64_t before = client.arrived;
      client.arrived = client.sent - unacknowledged(client.socket);
      const bool stalls =
          client.cursor.behind() > 0 && client.arrived == before;
      client.stalled_samples = stalls ? client.stalled_samples + 1 : 0;
      if (client.stalled_samples > samples_without_progress) drop(token);
    }
  }

  // Not those who are held, or have still something to hear.
  void drop_silent() {
    const auto now = steady_clock::now();
    next_idle_check_ = never;
    for (auto [token, client] : clients_) {
      if (client.held || client.cursor.behind() > 0) client.last_heard = now;
      const auto due = client.last_heard + idle_timeout_;
      if (client.state == State::open && due <= now) {
        drop(token);
      } else if (client.state == State::open) {
        next_idle_check_ = std::min(next_idle_check_, due);
      }
    }
  }

  void drop(Token token) {
    poller_.remove(clients_.find(token)->socket);
    clients_.erase(token);
    ++stats_.left;
    resume_accepting();
  }

  // A second signal ends it at once.
  void stop() {
    while (signals_.next()) {
      stop_by_ = steady_clock::now() + (stopping() ? 0s : farewell_time);
    }
    poller_.remove(listener_);
    listener_.reset();
    accepting_paused_ = false;
    reading_paused_ = true;
  }

  bool stopping() const { return stop_by_ != never; }

  bool stopped() {
    if (!stopping() || steady_clock::now() >= stop_by_) return stopping();
    // What is in a socket counts, too: a close can throw it away.
    bool arrived = true;
    for (auto [token, client] : clients_) {
      // Who is gone acknowledges nothing.
      if (client.state == State::deaf || client.state == State::reset) continue;
      arrived = arrived && client.cursor.behind() == 0 &&
                unacknowledged(client.socket) == 0;
    }
    return arrived;
  }

  // Standard error must not hold up the server: if nobody reads what it leads
  // to, the line is left out, and the next one counts on.
  void print_stats() {
    next_stats_ = steady_clock::now() + stats_interval;
    pollfd standard_error{STDERR_FILENO, POLLOUT, 0};
    if (::poll(&standard_error, 1, 0) != 1) return;
    const std::string line = std::to_string(clients_.size()) + " clients, " +
                             std::to_string(stats_.joined) + " joined, " +
                             std::to_string(stats_.left) + " left, " +
                             std::to_string(stats_.lines) + " lines\n";
    static_cast<void>(write(FdView{STDERR_FILENO}, line));
    stats_ = Stats{};
  }

  // One timer does for all, set for whatever is due first.
  void set_timer() {
    auto next = std::min(next_idle_check_, stop_by_);
    if (!lingering_.empty()) next = std::min(next, lingering_.front().first);
    if (accepting_paused_) next = std::min(next, resume_at_);
    if (!log_.empty()) next = std::min(next, next_sample_);
    if (stats_ != Stats{}) next = std::min(next, next_stats_);
    if (stopping() && log_.empty())
      next = std::min(next, steady_clock::now() + arrival_interval);
    if (may_read() && held_.size() + heard_.size() > 0)
      next = steady_clock::now();
    // Being woken too soon, and once, costs less than setting it back each
    // time.
    if (next >= timer_set_for_) return;
    timer_.expire_at(next);
    timer_set_for_ = next;
  }

  Signals signals_{SIGINT, SIGTERM};
  Timer timer_;
  steady_clock::time_point timer_set_for_ = never;
  Fd listener_;
  Poller poller_;
  BroadcastLog log_{high_water};
  bool unsent_ = false;  // something was appended to it in this turn
  Slab<Client> clients_;
  std::deque<std::pair<steady_clock::time_point, Token>> lingering_;
  bool accepting_paused_ = false;
  steady_clock::time_point resume_at_;
  bool reading_paused_ = false;  // the log was full
  std::vector<Token> held_;      // who has had something to say meanwhile
  std::vector<Token> heard_;     // who may have more, but has had his turn
  steady_clock::time_point next_sample_;
  std::chrono::seconds idle_timeout_;
  steady_clock::time_point next_idle_check_ = never;
  steady_clock::time_point stop_by_ = never;
  Stats stats_;
  steady_clock::time_point next_stats_ = steady_clock::now() + stats_interval;
};

std::optional<std::chrono::seconds> parse_seconds(std::string_view text) {
  std::uint32_t seconds = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, seconds);
  if (error != std::errc{} || rest != end || seconds == 0) return std::nullopt;
  return std::chrono::seconds(seconds);
}

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
  const auto idle_timeout = parse_seconds(argc > 2 ? argv[2] : "600");
  if (argc > 3 || !address || !idle_timeout) {
    std::cerr << "usage: " << argv[0] << " [ADDRESS:PORT [SECONDS]]"
              << ", such as 127.0.0.1:8080 or [::1]:9000 600\n";
    return 2;
  }
  occupy_standard_streams();
  std::signal(SIGPIPE, SIG_IGN);  // standard output may be a pipe
  try {
    Server(*address, *idle_timeout).run();
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
  return 0;
}
