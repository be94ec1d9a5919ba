// 09_threads: one event loop for each processor.
//
// Each loop has a listener of its own for the same port, and the kernel deals
// the clients out. The loops share nothing but mailboxes: what a loop has heard
// in a turn, it posts to each other one, all of it at once.
//
//   09_threads [ADDRESS:PORT [SECONDS [THREADS]]]    127.0.0.1:8080, 600, and
//                                                    one for each processor
//   nc 127.0.0.1 8080                                in two or three terminals
//
// Ten thousand clients need as many descriptors: ulimit -n 20000.

#include <fcntl.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>

#include <atomic>
#include <csignal>
#include <deque>
#include <iostream>
#include <mutex>
#include <optional>
#include <thread>
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
constexpr Token mailbox_token{3};

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

// A loop posts what it has heard when it is so much, or else once in a turn.
constexpr std::size_t largest_batch = 64 << 10;

// While a mailbox has more, nobody who posts to it reads from anybody.
constexpr std::size_t most_mail = 1 << 20;

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

// What has happened since the last line about it, in all loops.
struct Stats {
  std::atomic<std::uint64_t> joined = 0;
  std::atomic<std::uint64_t> left = 0;
  std::atomic<std::uint64_t> lines = 0;
};

// Bytes that the socket has taken, but the peer's kernel has not: see tcp(7).
std::uint64_t unacknowledged(const Fd& socket) {
  int bytes = 0;
  ::ioctl(socket.get(), SIOCOUTQ, &bytes);
  return static_cast<std::uint64_t>(bytes);
}

// Whole lines, for all loops to read and for none to change.
using Batch = std::shared_ptr<const std::string>;

// What other loops have for one: it may be posted to from all threads.
class Mailbox {
 public:
  // The lock is held for a few instructions, and never while the kernel is
  // called.
  void post(const Batch& batch) {
    bool was_empty = false;
    {
      const std::lock_guard lock(mutex_);
      was_empty = batches_.empty();
      batches_.push_back(batch);
      size_ += batch->size();
    }
    // Who has not looked yet has been woken already.
    if (was_empty) waker_.wake();
  }

  struct Mail {
    std::deque<Batch> batches;
    bool was_full;  // so that others may have stopped reading
  };

  // All that is there, in the order in which it came.
  Mail take() {
    const std::lock_guard lock(mutex_);
    const bool was_full = is_full();
    size_ = 0;
    return {std::exchange(batches_, {}), was_full};
  }

  bool is_empty() const { return size_ == 0; }
  bool is_full() const { return size_ > most_mail; }
  Waker& waker() { return waker_; }

 private:
  std::mutex mutex_;
  std::deque<Batch> batches_;
  std::atomic<std::size_t> size_ = 0;  // in bytes; to be asked without a lock
  Waker waker_;
};

// All that the loops share.
struct Room {
  explicit Room(std::size_t loops) : mailboxes(loops) {}

  std::vector<Mailbox> mailboxes;             // one for each loop
  std::atomic<int> stops = 0;                 // signals so far
  std::atomic<std::size_t> silent_loops = 0;  // that will post nothing more
  std::atomic<std::size_t> ended_loops = 0;
  std::atomic<std::uint64_t> clients = 0;
  Stats stats;
};

// One event loop with its clients.
class Server {
 public:
  Server(Room& room, std::size_t number, Fd listener,
         std::chrono::seconds idle_timeout)
      : room_(room),
        mailbox_(room.mailboxes[number]),
        listener_(std::move(listener)),
        idle_timeout_(idle_timeout) {
    poller_.add(listener_, listener_token, Interest::readable);
    poller_.add(timer_, timer_token, Interest::readable);
    poller_.add(mailbox_.waker(), mailbox_token, Interest::readable);
  }

  // One of the loops hears of signals, for all.
  void watch(Signals& signals) {
    signals_ = &signals;
    poller_.add(signals, signals_token, Interest::readable);
  }

  void run() {
    while (!stopped()) {
      for (const Event& event : poller_.wait()) {
        if (event.token() == listener_token) {
          accept_clients();
        } else if (event.token() == signals_token) {
          pass_signals_on();
        } else if (event.token() == mailbox_token) {
          mailbox_.waker().clear();
        } else if (event.token() == timer_token) {
          timer_.expirations();
          timer_set_for_ = never;
        } else {
          if (event.readable()) read_client(event.token());
          if (event.writable()) flush(event.token());
        }
      }
      post();
      do_what_is_due();
    }
    // An end of stream, though what clients still say is not read any more.
    for (auto [token, client] : clients_) shutdown_write(client.socket);
    ++room_.ended_loops;
  }

 private:
  // At the end of each turn, whatever woke the loop.
  void do_what_is_due() {
    if (room_.stops > stops_heeded_) stop();
    drop_lingering();
    if (steady_clock::now() >= resume_at_) resume_accepting();
    if (!log_.empty() && steady_clock::now() >= next_sample_) drop_stalled();
    hear_others();
    flush_all();
    if (may_read()) resume_reading();
    if (steady_clock::now() >= next_idle_check_) drop_silent();
    if (signals_ != nullptr && has_news() && steady_clock::now() >= next_stats_)
      print_stats();
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
      ++room_.stats.joined;
      ++room_.clients;
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
    return log_.room() >= high_water - low_water && !stopping() &&
           incoming_.empty() && !somebody_is_full();
  }

  // Who can take no more mail makes all others stop reading; when it has taken
  // what it has, it wakes them.
  bool somebody_is_full() const {
    for (const Mailbox& mailbox : room_.mailboxes)
      if (&mailbox != &mailbox_ && mailbox.is_full()) return true;
    return false;
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
    post();
    flush_all();
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client) {
    if (client.state == State::reset) return drop(token);
    // What was said elsewhere by now is still for it. While the log has no room
    // for that, or for its own last line, its end is read again later.
    hear_others();
    if (!incoming_.empty()) {
      reading_paused_ = true;
      return set_interest(token, client);
    }
    if (!client.lines.rest().empty()) {
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
    outgoing_ += line;
    if (outgoing_.size() >= largest_batch) post();
    ++room_.stats.lines;
    return true;
  }

  // What was heard here, to all other loops.
  void post() {
    if (outgoing_.empty()) return;
    const auto batch =
        std::make_shared<const std::string>(std::exchange(outgoing_, {}));
    for (Mailbox& mailbox : room_.mailboxes)
      if (&mailbox != &mailbox_) mailbox.post(batch);
    if (somebody_is_full()) reading_paused_ = true;
  }

  // What was heard elsewhere. While the log is full it stays where it is, and
  // when the mailbox is full, too, nobody elsewhere is read from.
  void hear_others() {
    while (!incoming_.empty() || fetch_mail()) {
      const std::string& batch = *incoming_.front();
      if (log_.room() < batch.size()) flush_all();
      if (log_.room() < batch.size()) return;
      static_cast<void>(log_.append(batch));
      unsent_ = true;
      incoming_.pop_front();
    }
  }

  bool fetch_mail() {
    if (mailbox_.is_empty()) return false;
    Mailbox::Mail mail = mailbox_.take();
    incoming_ = std::move(mail.batches);
    if (mail.was_full) wake_others();
    return !incoming_.empty();
  }

  void wake_others() {
    for (Mailbox& mailbox : room_.mailboxes)
      if (&mailbox != &mailbox_) mailbox.waker().wake();
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
    ++room_.stats.left;
    --room_.clients;
    resume_accepting();
  }

  void pass_signals_on() {
    while (signals_->next()) ++room_.stops;
    wake_others();
  }

  // A second signal ends it at once.
  void stop() {
    stops_heeded_ = room_.stops;
    stop_by_ = steady_clock::now() +
               (stops_heeded_ > 1 ? steady_clock::duration(0s) : farewell_time);
    if (!listener_) return;
    poller_.remove(listener_);
    listener_.reset();
    accepting_paused_ = false;
    reading_paused_ = true;
    // All that was heard here has been posted.
    ++room_.silent_loops;
  }

  bool stopping() const { return stop_by_ != never; }

  bool stopped() {
    if (!stopping() || steady_clock::now() >= stop_by_) return stopping();
    const std::size_t loops = room_.mailboxes.size();
    if (room_.silent_loops < loops || !incoming_.empty() ||
        !mailbox_.is_empty())
      return false;
    // Another signal has to be heard for those who go on.
    if (signals_ != nullptr && room_.ended_loops + 1 < loops) return false;
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
    Stats& stats = room_.stats;
    const std::string line =
        std::to_string(room_.clients) + " clients, " +
        std::to_string(stats.joined.exchange(0)) + " joined, " +
        std::to_string(stats.left.exchange(0)) + " left, " +
        std::to_string(stats.lines.exchange(0)) + " lines\n";
    static_cast<void>(write(FdView{STDERR_FILENO}, line));
  }

  bool has_news() const {
    const Stats& stats = room_.stats;
    return stats.joined + stats.left + stats.lines > 0;
  }

  // One timer does for all, set for whatever is due first.
  void set_timer() {
    auto next = std::min(next_idle_check_, stop_by_);
    if (!lingering_.empty()) next = std::min(next, lingering_.front().first);
    if (accepting_paused_) next = std::min(next, resume_at_);
    if (!log_.empty()) next = std::min(next, next_sample_);
    if (signals_ != nullptr && has_news()) next = std::min(next, next_stats_);
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

  Room& room_;
  Mailbox& mailbox_;
  std::string outgoing_;        // heard here and not posted yet
  std::deque<Batch> incoming_;  // out of the mailbox and not in the log yet
  int stops_heeded_ = 0;
  Signals* signals_ = nullptr;
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
  steady_clock::time_point next_stats_ = steady_clock::now() + stats_interval;
};

std::optional<std::uint32_t> parse_number(std::string_view text) {
  std::uint32_t number = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest != end || number == 0) return std::nullopt;
  return number;
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

// The first loop runs on this thread, each other one on a thread of its own.
void serve(Address address, std::chrono::seconds idle_timeout,
           std::size_t loops) {
  // Before the threads are started, so that none of them is interrupted.
  Signals signals{SIGINT, SIGTERM};
  // Listeners that share a port share it with another server as well. One that
  // does not finds out whether there is one, and which port is free.
  address = local_address(listen(address));
  Room room(loops);
  std::deque<Server> servers;
  for (std::size_t number = 0; number < loops; ++number) {
    servers.emplace_back(room, number, listen(address, {.reuse_port = true}),
                         idle_timeout);
  }
  servers.front().watch(signals);
  std::cout << "listening on " << address.to_string() << std::endl;
  std::vector<std::thread> threads;
  for (std::size_t number = 1; number < loops; ++number)
    threads.emplace_back([&server = servers[number]] { server.run(); });
  servers.front().run();
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
  const auto address = Address::parse(argc > 1 ? argv[1] : "127.0.0.1:8080");
  const auto idle_timeout = parse_number(argc > 2 ? argv[2] : "600");
  const auto processors = std::max(1U, std::thread::hardware_concurrency());
  const auto loops =
      argc > 3 ? parse_number(argv[3]) : std::optional(processors);
  if (argc > 4 || !address || !idle_timeout || !loops || *loops > 1024) {
    std::cerr << "usage: " << argv[0] << " [ADDRESS:PORT [SECONDS [THREADS]]]"
              << ", such as 127.0.0.1:8080 or [::1]:9000 600 4\n";
    return 2;
  }
  occupy_standard_streams();
  std::signal(SIGPIPE, SIG_IGN);  // standard output may be a pipe
  try {
    serve(*address, std::chrono::seconds(*idle_timeout), *loops);
  } catch (const std::exception& error) {
    std::cerr << argv[0] << ": " << error.what() << '\n';
    return 1;
  }
  return 0;
}
