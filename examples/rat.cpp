// rat: the broadcast server of the tutorial with a command line of its own.
//
// What one client says, line by line, all others hear. Everything that the
// milestones teach meets here; `rat --help` tells what it can do.
//
//   rat --port 8080
//   nc 127.0.0.1 8080            in two or three other terminals
//
// All lines are in one BroadcastLog. While more than the high-water mark of it
// is still to be sent to somebody, nobody is read from, and TCP makes the
// senders wait. So no line is lost to a client that keeps reading, and memory
// is bounded. Who takes nothing for the stall time-out is disconnected.

#include <dirent.h>
#include <fcntl.h>
#include <linux/inet_diag.h>
#include <linux/netlink.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <deque>
#include <iostream>
#include <optional>
#include <thread>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;
using std::chrono::steady_clock;

namespace {

constexpr std::string_view help_text =
    R"(usage: rat [OPTION]...

A TCP broadcast server: each line that a client sends goes to all the others.

  --host ADDRESS           the address to listen on (127.0.0.1)
  --port N                 the port to listen on, 0 for any free one (8080)
  --unix PATH              listen on this Unix socket; on TCP too only if --host
                           or --port is given
  --unix-mode MODE         who may connect to it, in octal (600)
  --max-clients N          more are turned away (as many as descriptors allow)
  --max-line BYTES         the longest line, its newline included (65536); no
                           longer than the backlog
  --high-water BYTES       while more is queued, nobody is read from (1048576);
                           at most half of the backlog
  --max-backlog BYTES      the most that is ever queued, in total (8388608),
                           besides the beginnings of lines that have no end yet
  --stall-timeout SECONDS  disconnect who takes nothing of its backlog for so
                           long, 0 for never (5)
  --idle-timeout SECONDS   disconnect who says nothing for so long (0: never)
  --echo                   send a line to its sender too
  --stats SECONDS          log a line of figures this often (0: never)
  --quiet                  log nothing
  --help                   print this and exit
  --version                print the version and exit

Talk to it with netcat: nc 127.0.0.1 8080
SIGINT or SIGTERM ends it when what is queued has been sent, or after 5 seconds.
)";

using Seconds = std::chrono::duration<double>;

struct Options {
  std::string host = "127.0.0.1";
  std::uint16_t port = 8080;
  bool tcp = false;  // asked for by --host or --port
  std::string unix_path;
  std::uint32_t unix_mode = 0600;
  std::uint32_t max_clients = UINT32_MAX;
  std::uint32_t max_line = 65536;
  std::uint32_t high_water = 1 << 20;
  std::uint32_t max_backlog = 8 << 20;
  Seconds stall_timeout{5};
  Seconds idle_timeout{0};
  Seconds stats{0};
  bool echo = false;
  bool quiet = false;
  bool help = false;
  bool version = false;
};

// What a bad command line is answered with.
struct UsageError {
  std::string what;
};

constexpr Token tcp_token{0};
constexpr Token unix_token{1};
constexpr Token signals_token{2};

// As many may come in before those who are there have their turn.
constexpr int accepts_per_event = 64;

// What may be read from all clients together before it is sent, and what all
// those sends may come to, which takes some milliseconds.
constexpr std::size_t most_read_in_a_turn = 512 << 10;
constexpr std::size_t most_sent_in_a_turn = 32 << 20;

// How long to pause before so much is sent, or more: for each client a part of
// what a send to it takes, some 6 us or some 60 us. The kernel adds 50 us of
// its own to each pause (prctl(2), PR_SET_TIMERSLACK), so short ones are no
// use.
constexpr std::size_t much_news = 64 << 10;
constexpr std::chrono::nanoseconds gather_time_each = 1us;
constexpr std::chrono::nanoseconds drain_time_each = 20us;
constexpr std::chrono::nanoseconds shortest_pause = 50us;
constexpr std::chrono::nanoseconds longest_pause = 1ms;

// How long to listen to a rejected client, so that it can read why.
constexpr auto linger_time = 1s;

// How long not to accept when descriptors have run out.
constexpr auto accept_pause = 100ms;

// How long the end may take.
constexpr auto shutdown_time = 5s;

// For how long the room remembers that somebody has stalled: see read_mark.
constexpr auto stall_memory = 60s;

// The most that one send brings to a Unix socket.
constexpr std::size_t unix_send_size = 1024;

// How often to look, then, whether everybody has everything.
constexpr auto stop_check_interval = 10ms;

constexpr std::string_view full_text = "error: server full\n";

std::string plural(std::uint64_t count, const std::string& noun) {
  return std::to_string(count) + ' ' + noun + (count == 1 ? "" : "s");
}

std::string to_text(Seconds time) {
  std::string text = std::to_string(time.count());
  text.erase(text.find_last_not_of('0') + 1);
  if (text.ends_with('.')) text.pop_back();
  return text + " s";
}

// Lines to standard error. They must never slow the loop: of a burst, the rest
// is counted and summed up; and where nobody reads the pipe that standard error
// leads to, lines are left out and counted too.
class Log {
 public:
  explicit Log(bool quiet) : quiet_(quiet) {}

  void line(const std::string& text) {
    if (quiet_) return;
    refill();
    if (allowed_ == 0 || !write(text)) {
      ++left_out_;
      return;
    }
    --allowed_;
  }

  // When to call summarize: a burst may be over, and no further line come.
  std::optional<steady_clock::time_point> deadline() const {
    if (left_out_ == 0) return std::nullopt;
    return refilled_ + interval;
  }
  void summarize() {
    refill();
    if (left_out_ > 0 && allowed_ > 0) write("");
  }

 private:
  static constexpr int burst = 100;  // lines at once, and in each interval
  static constexpr auto interval = 1s;

  void refill() {
    const auto now = steady_clock::now();
    if (now - refilled_ < interval) return;
    refilled_ = now;
    allowed_ = burst;
  }

  bool write(std::string text) {
    pollfd standard_error{output_.get(), POLLOUT, 0};
    if (::poll(&standard_error, 1, 0) != 1 ||
        (standard_error.revents & POLLOUT) == 0)
      return false;
    if (left_out_ > 0)
      text = plural(std::exchange(left_out_, 0), "line") +
             " left out of this log" + (text.empty() ? "" : "\n" + text);
    text += '\n';
    return ::write(output_.get(), text.data(), text.size()) > 0;
  }

  // A terminal or a pipe is opened anew, since to make it non-blocking would
  // do the same to the shell's.
  static Fd open_output() {
    struct stat status {};
    const bool can_block =
        ::fstat(STDERR_FILENO, &status) == 0 &&
        (S_ISCHR(status.st_mode) || S_ISFIFO(status.st_mode));
    constexpr int flags = O_WRONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY;
    Fd output{can_block ? ::open("/proc/self/fd/2", flags) : -1};
    if (!output) output.reset(::fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, 0));
    return output;
  }

  bool quiet_;
  Fd output_ = open_output();
  int allowed_ = burst;
  std::uint64_t left_out_ = 0;
  steady_clock::time_point refilled_ = steady_clock::now();
};

enum class State : std::uint8_t {
  open,
  deaf,       // takes nothing any more: read to the end, then closed
  reset,      // the same, but half a line at its end is not worth sending
  finished,   // its stream has ended: sent what is queued, then closed
  rejected,   // sent an over-long line: sent what is queued, then told so
  lingering,  // our half is closed, and what it still sends is thrown away
};

// What only a client has that is in the middle of something.
struct Work {
  explicit Work(std::size_t max_line) : lines(max_line) {}

  LineBuffer lines;
  std::optional<std::string_view> line;  // out of `lines`, not in the log yet
  std::int64_t sent = 0;                 // bytes, since its socket was full
  std::int64_t acknowledged = 0;         // of these, by its kernel
  std::uint32_t unread = 0;              // of these, by itself
  std::string last_words;                // to a rejected client
  steady_clock::duration stalled{0};
};

// An idle one costs 40 bytes here, and as many in the Slab and the log.
struct Client {
  Fd socket;
  State state = State::open;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
  bool in_waiting = false;   // and its progress is looked at
  bool paused : 1 = false;   // not read from until the backlog has drained
  bool watched : 1 = true;   // by the poller: not if it hung up while paused
  bool is_unix : 1 = false;
  std::uint32_t number = 0;
  std::uint32_t heard_at = 0;  // milliseconds since the server's start
  BroadcastLog::Cursor cursor{};
  std::unique_ptr<Work> work{};
};

std::string name_of(const Client& client) {
  return "client " + std::to_string(client.number);
}

// The kernel is out of memory for the moment: that is nobody's end.
bool is_final(const IoResult& result) {
  return result.failed() && result.error != ENOBUFS && result.error != ENOMEM;
}

// Bytes that a peer's kernel has not acknowledged, or on a Unix socket the
// memory of what the peer has not read. See tcp(7), SIOCOUTQ.
std::int64_t unacknowledged(FdView socket) {
  int bytes = 0;
  ::ioctl(socket.get(), SIOCOUTQ, &bytes);
  return bytes;
}

std::int64_t unread(FdView socket) {
  int bytes = 0;
  ::ioctl(socket.get(), FIONREAD, &bytes);
  return bytes;
}

// Asks the kernel how much a TCP peer on this machine has received and not read
// yet. A kernel acknowledges what a slow reader takes only in large steps: here
// of 64 KiB, which at 1 KB/s is a minute. See sock_diag(7).
class LocalPeers {
 public:
  // Nothing: the peer is elsewhere, or no TCP, or the kernel does not tell.
  std::optional<std::uint32_t> unread_by(FdView socket) const {
    struct {
      nlmsghdr header;
      inet_diag_req_v2 body;
    } request{};
    request.header.nlmsg_len = sizeof request;
    request.header.nlmsg_type = SOCK_DIAG_BY_FAMILY;
    request.header.nlmsg_flags = NLM_F_REQUEST;
    request.body.sdiag_protocol = IPPROTO_TCP;
    request.body.idiag_states = UINT32_MAX;
    inet_diag_sockid& id = request.body.id;
    id.idiag_cookie[0] = id.idiag_cookie[1] = INET_DIAG_NOCOOKIE;
    sockaddr_storage end{};
    if (!get_end(::getpeername, socket, end)) return std::nullopt;
    put_end(end, &id.idiag_src, &id.idiag_sport);
    if (!get_end(::getsockname, socket, end)) return std::nullopt;
    put_end(end, &id.idiag_dst, &id.idiag_dport);
    request.body.sdiag_family = static_cast<std::uint8_t>(end.ss_family);
    return ask(&request, sizeof request);
  }

 private:
  using GetEnd = int(int, sockaddr*, socklen_t*);
  static bool get_end(GetEnd* get, FdView socket, sockaddr_storage& end) {
    socklen_t length = sizeof end;
    return get(socket.get(), reinterpret_cast<sockaddr*>(&end), &length) == 0 &&
           end.ss_family != AF_UNIX;
  }
  static void put_end(const sockaddr_storage& end, void* address, void* port) {
    sockaddr_in v4{};
    sockaddr_in6 v6{};
    std::memcpy(&v4, &end, sizeof v4);
    std::memcpy(&v6, &end, sizeof v6);
    std::memcpy(port, &v4.sin_port, sizeof v4.sin_port);  // at the same place
    if (end.ss_family == AF_INET)
      std::memcpy(address, &v4.sin_addr, sizeof v4.sin_addr);
    else
      std::memcpy(address, &v6.sin6_addr, sizeof v6.sin6_addr);
  }

  std::optional<std::uint32_t> ask(const void* request,
                                   std::size_t size) const {
    struct {
      nlmsghdr header;
      inet_diag_msg body;
      std::array<char, 1024> more;
    } answer{};
    if (::send(kernel_.get(), request, size, 0) < 0) return std::nullopt;
    const auto length = ::recv(kernel_.get(), &answer, sizeof answer, 0);
    const auto least = sizeof answer.header + sizeof answer.body;
    if (length < static_cast<ssize_t>(least) ||
        answer.header.nlmsg_type != SOCK_DIAG_BY_FAMILY)
      return std::nullopt;
    return answer.body.idiag_rqueue;
  }

  Fd kernel_{::socket(AF_NETLINK, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
                      NETLINK_SOCK_DIAG)};
};

// The kernel shall keep nothing for who will not take it.
void reset_when_closed(FdView socket) {
  const linger at_once{1, 0};
  ::setsockopt(socket.get(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
}

// How many descriptors below `limit` are open. Those that were inherited may
// have any numbers, so only /proc can tell: see proc_pid_fd(5).
::rlim_t count_descriptors(::rlim_t limit) {
  DIR* const directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return errno == EMFILE ? limit : STDERR_FILENO + 1;
  ::rlim_t count = 0;
  while (const dirent* const entry = ::readdir(directory))
    if (entry->d_name[0] != '.' &&
        std::strtoull(entry->d_name, nullptr, 10) < limit)
      ++count;
  ::closedir(directory);
  return count - 1;  // the directory's own
}

struct Listeners {
  Fd tcp{};
  Fd unix{};
};

class Server {
 public:
  Server(Listeners listeners, Signals signals, const Options& options)
      : options_(options),
        log_(options.quiet),
        listeners_(std::move(listeners)),
        signals_(std::move(signals)),
        lines_(options.max_backlog) {
    set_accepting(Interest::readable);
    poller_.add(signals_, signals_token, Interest::readable);
    if (options_.stats > 0s) stats_at_ = now_ + to_duration(options_.stats);
    limit_clients();
  }

  void run() {
    while (!(stopping_ && (clients_.empty() || now_ >= *stop_at_))) {
      const auto deadline = next_deadline();
      const Events events =
          deadline ? poller_.wait_until(*deadline) : poller_.wait();
      now_ = steady_clock::now();
      handle(events);
      if (news_ > 0) {
        pause_before_flush();
        flush_all();
      }
      keep_house();
      while (reading_paused_ && resume_reading()) flush_all();
      if (stopping_) drop_who_has_all();
    }
    log_.line("stopped");
  }

 private:
  // As many as there are descriptors for. Of those, one is held in reserve to
  // tell more clients so.
  void limit_clients() {
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const ::rlim_t used = count_descriptors(limit.rlim_cur);
    const ::rlim_t most = limit.rlim_cur > used ? limit.rlim_cur - used : 0;
    if (options_.max_clients > most)
      options_.max_clients = static_cast<std::uint32_t>(most);
    log_.line("room for " + plural(options_.max_clients, "client"));
  }

  // A short pause can spare more than it costs. Where several talk at once,
  // more are about to, and to send all of it at once costs little more than a
  // part. And where much is sent, those who have not taken in the last of it
  // should first have time to: what waits in the kernel leaves the cache.
  void pause_before_flush() {
    const bool is_little = news_ < much_news;
    if (is_little ? talkers_ < 2 : !first_receiver_lags()) return;
    const auto pause = static_cast<int>(clients_.size()) *
                       (is_little ? gather_time_each : drain_time_each);
    if (pause >= shortest_pause)
      std::this_thread::sleep_for(std::min(pause, longest_pause));
    if (!is_little) return;
    const Events events = poller_.wait(0s);
    now_ = steady_clock::now();
    handle(events);
  }

  // It has not acknowledged what it was sent before. To ask all would cost too
  // much.
  bool first_receiver_lags() {
    for (auto [token, client] : clients_)
      if (client.cursor.behind() > 0 && !client.awaits_room)
        return unacknowledged(client.socket) > 0;
    return false;
  }

  void handle(const Events& events) {
    share_reading(events.size());
    for (const Event& event : events) handle(event);
  }

  void handle(const Event& event) {
    const Token token = event.token();
    if (token == tcp_token) return accept_clients(listeners_.tcp);
    if (token == unix_token) return accept_clients(listeners_.unix);
    if (token == signals_token) return stop();
    if (event.readable()) {
      if (Client* const client = clients_.find(token))
        read_client(token, *client, event);
    }
    if (event.writable()) {
      if (Client* const client = clients_.find(token)) flush(token, *client);
    }
  }

  // -------------------------------------------------------------------------
  // Clients come and go
  // -------------------------------------------------------------------------

  void accept_clients(const Fd& listener) {
    // Level-triggered: whoever is still waiting is reported again.
    for (int accepts = 0; accepts < accepts_per_event && listener; ++accepts) {
      if (clients_.size() >= options_.max_clients) {
        if (!reserve_.shed(listener, full_text)) {
          // Reported and not to be had: perhaps there is no descriptor at all.
          if (accepts == 0) pause_accepting(EMFILE);
          return;
        }
        log_.line("turned a client away: there are " +
                  plural(clients_.size(), "client") + " already");
        continue;
      }
      Accepted accepted = accept(listener);
      if (accepted.retry()) continue;
      if (accepted.would_block()) return;
      if (!accepted.ok()) return pause_accepting(accepted.error);
      welcome(accepted);
    }
  }

  void welcome(Accepted& accepted) {
    const auto [token, client] = clients_.emplace(std::move(accepted.fd));
    client.number = ++last_number_;
    if (const auto error =
            poller_.try_add(client.socket, token, Interest::readable)) {
      log_.line("cannot watch " + name_of(client) + ": " + error.message());
      static_cast<void>(write(client.socket, full_text));
      clients_.erase(token);
      return;
    }
    shortage_logged_ = false;
    client.cursor = lines_.join();
    client.heard_at = uptime();
    client.is_unix = accepted.peer.family() == AF_UNIX;
    if (options_.idle_timeout > 0s && !idle_check_at_)
      idle_check_at_ = now_ + to_duration(options_.idle_timeout);
    log_.line(name_of(client) + " connected from " + accepted.peer.to_string());
  }

  // A level-triggered listener with nothing to accept into would report itself
  // for ever. Who waits in its queue is served when a descriptor is free.
  void pause_accepting(int error) {
    set_accepting(Interest::none);
    accept_at_ = now_ + accept_pause;
    if (!std::exchange(shortage_logged_, true))
      log_.line("cannot accept more than " + plural(clients_.size(), "client") +
                ": " + std::strerror(error));
  }

  void resume_accepting() {
    if (!accept_at_) return;
    accept_at_.reset();
    set_accepting(Interest::readable);
  }

  void set_accepting(Interest interest) {
    if (listeners_.tcp) poller_.set(listeners_.tcp, tcp_token, interest);
    if (listeners_.unix) poller_.set(listeners_.unix, unix_token, interest);
  }

  void drop(Token token, const Client& client, const std::string& reason) {
    poller_.remove(client.socket);
    log_.line(name_of(client) + " left: " + reason);
    clients_.erase(token);
    resume_accepting();
  }

  // -------------------------------------------------------------------------
  // Clients speak
  // -------------------------------------------------------------------------

  void read_client(Token token, Client& client, const Event& event) {
    if (client.state == State::lingering) return throw_away(token, client);
    if (!is_read_from(client)) return;
    if (client.paused || !may_read())
      return pause_reading(token, client, event);
    const std::uint64_t lines_before = line_count_;
    IoResult result;
    std::size_t bytes = 0;
    do {
      result = work_of(client).lines.fill(client.socket);
      bytes += result.bytes;
      if (result.bytes > 0) client.heard_at = uptime();
      // The kernel tells of a reset once, and perhaps the log is full.
      if (is_final(result)) client.state = State::reset;
      if (!broadcast_lines(client)) return pause_reading(token, client, event);
    } while (goes_on(client, result, bytes));
    if (line_count_ != lines_before) ++talkers_;
    if (client.work->lines.overlong()) return reject(token, client);
    if (is_final(result))
      return drop(token, client, std::strerror(result.error));
    if (result.end_of_stream()) return finish(token, client, event);
    settle(client);
  }

  // A read that fills its block leaves more behind, and to send 512 KiB at once
  // costs 0.6 times what eight times 64 KiB do. But others are to have their
  // turn, and a mark that --high-water sets is not to be passed by far.
  bool goes_on(const Client& client, const IoResult& result,
               std::size_t bytes) {
    return result.bytes == LineBuffer::block_size && bytes < reading_share_ &&
           !client.work->lines.overlong() && lines_.size() <= read_mark();
  }

  // How much each of so many clients may be read in this turn, if one block is
  // not enough. To have more than a block for each receiver gains nothing.
  void share_reading(std::size_t clients) {
    const std::size_t receivers = std::max<std::size_t>(clients_.size(), 2) - 1;
    constexpr std::size_t block = LineBuffer::block_size;
    const std::size_t most =
        std::min(std::min(receivers, most_read_in_a_turn / block) * block,
                 most_sent_in_a_turn / receivers);
    reading_share_ = most / std::max<std::size_t>(clients, 1);
  }

  static bool is_read_from(const Client& client) {
    return client.state != State::finished && client.state != State::rejected;
  }

  bool may_read() {
    if (!reading_paused_ && lines_.size() > read_mark()) reading_paused_ = true;
    return !reading_paused_ && !stopping_;
  }

  // False if the log is full. Then the rest of the lines stays where it is
  // until there is room.
  bool broadcast_lines(Client& client) {
    if (client.work == nullptr) return true;
    Work& work = *client.work;
    if (!work.line) work.line = work.lines.next();
    for (; work.line; work.line = work.lines.next())
      if (!broadcast(client, *work.line)) return false;
    return true;
  }

  bool broadcast(const Client& sender, std::string_view line) {
    if (!lines_.append(line, options_.echo ? nullptr : &sender.cursor)) {
      reading_paused_ = true;
      return false;
    }
    news_ += line.size();
    ++line_count_;
    delivery_count_ += clients_.size() - (options_.echo ? 0 : 1);
    return true;
  }

  // The client will say nothing more, but may still be listening.
  void finish(Token token, Client& client, const Event& event) {
    if (client.state == State::reset)
      return drop(token, client, "connection reset");
    LineBuffer& lines = client.work->lines;
    if (!lines.rest().empty()) {
      const std::string line = std::string(lines.rest()) + '\n';
      // Its end is told again when it is read from again.
      if (!broadcast(client, line)) return pause_reading(token, client, event);
      lines = LineBuffer(options_.max_line);
    }
    see_off(token, client);
  }

  // Once it has been sent what was said so far, it is disconnected.
  void see_off(Token token, Client& client) {
    client.cursor.close();
    if (client.cursor.behind() == 0)
      return drop(token, client, "end of stream");
    client.state = State::finished;
    set_interest(token, client);
    if (!client.awaits_room) flush(token, client);
  }

  // Closing at once, with bytes of the line still unread, would send a reset
  // and could take the error line from the client before it has read it. So
  // only our half is closed, and for a while what comes is read and thrown
  // away.
  void reject(Token token, Client& client) {
    if (client.state != State::open)
      return drop(token, client, "line too long");
    client.cursor.close();
    client.state = State::rejected;
    set_interest(token, client);
    if (!client.awaits_room) flush(token, client);
  }

  // Called until all of it has been sent.
  void say_why(Token token, Client& client) {
    std::string& reason = work_of(client).last_words;
    if (reason.empty())
      reason = "error: a line may have at most " +
               std::to_string(options_.max_line) +
               " bytes, its newline included\n";
    const IoResult result = write(client.socket, reason);
    if (is_final(result))
      return drop(token, client, std::strerror(result.error));
    reason.erase(0, result.bytes);
    if (!reason.empty()) return await_room(token, client);
    client.awaits_room = false;
    client.work->acknowledged = 0;
    client.work->stalled = steady_clock::duration::zero();
    lingering_.emplace_back(now_ + linger_time, token);
    linger_on(token, client);
  }

  void linger_on(Token token, Client& client) {
    if (!client.watched) return drop(token, client, "hung up");
    client.state = State::lingering;
    client.paused = false;
    shutdown_write(client.socket);
    set_interest(token, client);
  }

  void throw_away(Token token, Client& client) {
    static std::array<char, 65536> room;
    if (const IoResult result = read(client.socket, room);
        result.end_of_stream() || is_final(result))
      drop(token, client, stopping_ ? "stopping" : "line too long");
  }

  // -------------------------------------------------------------------------
  // Clients listen
  // -------------------------------------------------------------------------

  void flush_all() {
    news_ = 0;
    talkers_ = 0;
    for (auto [token, client] : clients_)
      if (!client.awaits_room) flush(token, client);
  }

  void flush(Token token, Client& client) {
    if (client.state == State::lingering) return;
    const IoResult result = send_backlog(client);
    if (is_final(result)) return stop_writing(token, client, result.error);
    if (client.awaits_room)
      client.work->sent += static_cast<std::int64_t>(result.bytes);
    if (!result.ok()) return await_room(token, client);
    if (client.state == State::finished)
      return drop(token, client, "end of stream");
    if (client.state == State::rejected) return say_why(token, client);
    if (client.awaits_room) {
      client.awaits_room = false;
      set_interest(token, client);
      settle(client);
    }
  }

  // A Unix socket tells of what its peer reads only when it has read all that
  // one send brought. So there the sends are small, or a slow reader would seem
  // to be dead.
  IoResult send_backlog(const Client& client) {
    if (!client.is_unix) return lines_.flush(client.socket, client.cursor);
    IoResult total;
    do {
      const IoResult result =
          lines_.flush(client.socket, client.cursor, unix_send_size);
      total = {total.bytes + result.bytes, result.status, result.error};
    } while (total.ok() && client.cursor.behind() > 0);
    return total;
  }

  void await_room(Token token, Client& client) {
    if (client.awaits_room) return;
    client.awaits_room = true;
    set_interest(token, client);
    Work& work = work_of(client);
    work.sent = 0;
    work.acknowledged = -unacknowledged(client.socket);
    work.stalled = steady_clock::duration::zero();
    if (options_.stall_timeout <= 0s || std::exchange(client.in_waiting, true))
      return;
    if (waiting_.empty()) progress_checked_at_ = now_;
    waiting_.push_back(token);
  }

  // The client is gone, but lines that it sent before may still be unread. So
  // only reading ends it.
  void stop_writing(Token token, Client& client, int error) {
    if (!is_read_from(client)) return drop(token, client, std::strerror(error));
    client.state = error == ECONNRESET ? State::reset : State::deaf;
    client.cursor = BroadcastLog::Cursor();
    client.awaits_room = false;
    if (!client.paused) set_interest(token, client);
  }

  // -------------------------------------------------------------------------
  // Backpressure
  // -------------------------------------------------------------------------

  // Above so much of a backlog nobody is read from.
  //
  // One dead client can stop the room for the stall time-out. If then it came
  // back and stalled again and again, or others did so in turn, they could stop
  // it for ever. To drop them sooner would be unfair to those who only pause.
  // So for a minute after such an end the mark rises while somebody stalls,
  // from the high-water mark to all that the log can hold when his time is
  // over: the room is slow, but it is not stopped.
  std::size_t read_mark() const {
    if (!somebody_stalled_lately()) return options_.high_water;
    const double share =
        std::min(1.0, Seconds(longest_stall_) / options_.stall_timeout);
    const auto more = static_cast<double>(lines_.capacity()) -
                      static_cast<double>(options_.high_water);
    return options_.high_water + static_cast<std::size_t>(share * more);
  }

  bool somebody_stalled_lately() const {
    return last_stall_ && now_ < *last_stall_ + stall_memory;
  }

  // Until resume_reading, the client is not reported as readable.
  void pause_reading(Token token, Client& client, const Event& event) {
    if (!client.paused) paused_.push_back(token);
    client.paused = true;
    // Of a hang-up or an error the kernel tells whatever the interest. And who
    // takes nothing any more must not keep the log full.
    if (event.hang_up() || event.error()) {
      poller_.remove(client.socket);
      client.watched = false;
      client.cursor = BroadcastLog::Cursor();
      client.awaits_room = false;
    } else {
      set_interest(token, client);
    }
  }

  // In the order in which they were paused, so that all have their turn. True
  // if there is something to flush, and then perhaps more to resume.
  bool resume_reading() {
    const std::size_t mark = read_mark();
    const bool trickles = mark > options_.high_water;
    if (lines_.size() > (trickles ? mark : options_.high_water / 2))
      return false;
    const std::uint64_t lines_before = line_count_;
    reading_paused_ = false;
    while (!paused_.empty() && !reading_paused_) {
      const Token token = paused_.front();
      Client* const client = clients_.find(token);
      if (client != nullptr && client->paused) {
        if (!broadcast_lines(*client)) break;
        client->paused = false;
        client->heard_at = uptime();
        read_again(token, *client);
      }
      paused_.pop_front();
    }
    return line_count_ != lines_before;
  }

  void read_again(Token token, Client& client) {
    if (!client.watched) {
      client.watched = true;
      if (const auto error =
              poller_.try_add(client.socket, token, Interest::none))
        return drop(token, client, error.message());
    }
    if (client.work != nullptr && client.work->lines.overlong())
      return reject(token, client);
    set_interest(token, client);
  }

  void set_interest(Token token, const Client& client) {
    const bool reads = !client.paused &&
                       !(stopping_ && client.state != State::lingering) &&
                       is_read_from(client);
    const Interest reading = reads ? Interest::readable : Interest::none;
    const Interest writing =
        client.awaits_room ? Interest::writable : Interest::none;
    if (client.watched) poller_.modify(client.socket, token, reading | writing);
  }

  // Whether a peer has made progress since this was last asked. What a send has
  // put into our kernel says nothing: that may be megabytes. What counts is
  // what the peer's kernel has acknowledged, or the peer has read.
  bool has_progressed(Client& client) const {
    Work& work = *client.work;
    const auto acknowledged = work.sent - unacknowledged(client.socket);
    const auto unread = local_peers_.unread_by(client.socket).value_or(0);
    const bool has_read = unread < std::exchange(work.unread, unread);
    return acknowledged != std::exchange(work.acknowledged, acknowledged) ||
           has_read;
  }

  void check_progress() {
    // While this process itself was stopped, nobody could do anything.
    const auto elapsed =
        std::min(now_ - progress_checked_at_, longest_progress_interval());
    progress_checked_at_ = now_;
    longest_stall_ = steady_clock::duration::zero();
    std::vector<Token> stalled;
    std::erase_if(waiting_, [&](Token token) {
      Client* const client = clients_.find(token);
      if (client == nullptr) return true;
      if (!client->awaits_room) return !(client->in_waiting = false);
      Work& work = *client->work;
      work.stalled = has_progressed(*client) ? steady_clock::duration::zero()
                                             : work.stalled + elapsed;
      const bool is_over = work.stalled >= stall_timeout();
      if (is_over)
        stalled.push_back(token);
      else
        longest_stall_ = std::max(longest_stall_, work.stalled);
      return is_over;
    });
    // Of all of them, before the first is heard out: that takes room.
    for (const Token token : stalled)
      clients_.find(token)->cursor = BroadcastLog::Cursor();
    for (const Token token : stalled)
      if (Client* const client = clients_.find(token))
        drop_stalled(token, *client);
  }

  void drop_stalled(Token token, Client& client) {
    const std::string reason =
        "took nothing for " + to_text(client.work->stalled);
    last_stall_ = now_;
    ++drop_count_;
    hear_out(client);
    reset_when_closed(client.socket);
    drop(token, client, reason);
  }

  // What the client has said by now is not lost with it, if there is room.
  void hear_out(Client& client) {
    if (!is_read_from(client)) return;
    for (std::size_t bytes = 0; bytes < options_.high_water / 2;) {
      if (!broadcast_lines(client)) return;
      const IoResult result = work_of(client).lines.fill(client.socket);
      if (!result.ok() || client.work->lines.overlong()) break;
      bytes += result.bytes;
    }
    static_cast<void>(broadcast_lines(client));
  }

  steady_clock::duration longest_progress_interval() const {
    return std::clamp<steady_clock::duration>(stall_timeout() / 10, 1ms, 1s);
  }
  // So that a mark that rises does so in small steps.
  steady_clock::duration progress_interval() const {
    const bool trickles = reading_paused_ && somebody_stalled_lately();
    return std::max<steady_clock::duration>(
        longest_progress_interval() / (trickles ? 5 : 1), 1ms);
  }

  steady_clock::duration stall_timeout() const {
    return to_duration(options_.stall_timeout);
  }

  // -------------------------------------------------------------------------
  // Housekeeping
  // -------------------------------------------------------------------------

  static steady_clock::duration to_duration(Seconds time) {
    return std::chrono::ceil<steady_clock::duration>(time);
  }

  // In milliseconds, which is enough to say for how long somebody is silent.
  std::uint32_t uptime() const {
    using std::chrono::milliseconds;
    const auto time = std::chrono::floor<milliseconds>(now_ - started_at_);
    return static_cast<std::uint32_t>(time.count());
  }

  // Nothing: there is no reason to wake up before something happens.
  std::optional<steady_clock::time_point> next_deadline() const {
    std::optional<steady_clock::time_point> next;
    const auto consider = [&](std::optional<steady_clock::time_point> time) {
      if (time && (!next || *time < *next)) next = time;
    };
    consider(log_.deadline());
    consider(accept_at_);
    consider(stats_at_);
    consider(idle_check_at_);
    consider(stop_at_);
    if (!lingering_.empty()) consider(lingering_.front().first);
    if (!waiting_.empty()) consider(progress_checked_at_ + progress_interval());
    if (stopping_) consider(now_ + stop_check_interval);
    return next;
  }

  void keep_house() {
    const auto is_due = [&](std::optional<steady_clock::time_point> time) {
      return time && *time <= now_;
    };
    if (is_due(log_.deadline())) log_.summarize();
    if (is_due(accept_at_)) resume_accepting();
    if (is_due(stats_at_)) log_stats();
    if (is_due(idle_check_at_)) drop_idle();
    while (!lingering_.empty() && is_due(lingering_.front().first))
      drop_lingering();
    if (is_due(progress_checked_at_ + progress_interval())) check_progress();
  }

  // Not while the client is still being sent what was queued for it.
  void drop_lingering() {
    const Token token = lingering_.front().second;
    lingering_.pop_front();
    Client* const client = clients_.find(token);
    if (client == nullptr) return;
    Work& work = work_of(*client);
    const std::int64_t left = unacknowledged(client->socket);
    work.stalled += linger_time;
    if (has_progressed(*client)) work.stalled = steady_clock::duration::zero();
    const bool waits_for_ever = options_.stall_timeout <= 0s;
    if (left == 0 ||
        (!waits_for_ever && work.stalled >= std::max<steady_clock::duration>(
                                                stall_timeout(), linger_time)))
      return drop(token, *client, "line too long");
    lingering_.emplace_back(now_ + linger_time, token);
  }

  // Looks at all clients, but not before the first of them can be due.
  void drop_idle() {
    const auto limit =
        std::chrono::ceil<std::chrono::milliseconds>(options_.idle_timeout);
    std::chrono::milliseconds longest{0};
    for (auto [token, client] : clients_) {
      if (client.state != State::open || client.paused) continue;
      // This process may have been stopped, and then nobody was listened to.
      if (unread(client.socket) > 0) client.heard_at = uptime();
      const std::chrono::milliseconds silent{uptime() - client.heard_at};
      if (silent >= limit && client.cursor.behind() > 0) {
        see_off(token, client);
      } else if (silent >= limit) {
        drop(token, client, "said nothing for " + to_text(silent));
      } else {
        longest = std::max(longest, silent);
      }
    }
    idle_check_at_.reset();
    if (!clients_.empty()) idle_check_at_ = now_ + (limit - longest);
  }

  void log_stats() {
    const double seconds = Seconds(now_ - stats_since_).count();
    const auto per_second = [&](std::uint64_t count, std::uint64_t& before) {
      const auto since =
          static_cast<double>(count - std::exchange(before, count));
      return std::to_string(std::llround(since / seconds));
    };
    log_.line("stats: " + plural(clients_.size(), "client") + ", " +
              per_second(line_count_, line_count_before_) + " lines/s, " +
              per_second(delivery_count_, delivery_count_before_) +
              " deliveries/s, backlog " + plural(lines_.size(), "byte") + ", " +
              plural(drop_count_, "drop"));
    stats_since_ = now_;
    stats_at_ = now_ + std::max<steady_clock::duration>(
                           to_duration(options_.stats), 100ms);
  }

  // -------------------------------------------------------------------------
  // The end
  // -------------------------------------------------------------------------

  // Nobody is accepted or read from any more. A second signal ends it at once.
  void stop() {
    while (signals_.next()) {
      stop_at_ = now_ + (stopping_ ? 0s : shutdown_time);
      stopping_ = true;
    }
    for (Fd* const listener : {&listeners_.tcp, &listeners_.unix}) {
      if (*listener) poller_.remove(*listener);
      listener->reset();
    }
    for (auto [token, client] : clients_)
      if (!client.paused) set_interest(token, client);
    // Lines that were read and found the log full are still sent.
    reading_paused_ = true;
  }

  // Closing while a client goes on sending would reset the connection, and take
  // from it what it has not received yet. So it is first told the end, and what
  // it sends is thrown away until its kernel has everything.
  void drop_who_has_all() {
    const bool lines_wait =
        std::any_of(paused_.begin(), paused_.end(), [&](Token token) {
          const Client* const client = clients_.find(token);
          return client != nullptr && client->work != nullptr &&
                 client->work->line;
        });
    if (lines_wait) return;
    for (auto [token, client] : clients_) {
      if (client.state != State::lingering && client.cursor.behind() == 0)
        linger_on(token, client);
      if (client.state == State::lingering &&
          unacknowledged(client.socket) == 0)
        drop(token, client, "stopping");
    }
  }

  // -------------------------------------------------------------------------

  Work& work_of(Client& client) const {
    if (client.work == nullptr)
      client.work = std::make_unique<Work>(options_.max_line);
    return *client.work;
  }

  // An idle client has no more than it needs.
  static void settle(Client& client) {
    if (client.work == nullptr || client.awaits_room) return;
    if (!client.work->line && client.work->lines.rest().empty())
      client.work.reset();
  }

  Options options_;
  Log log_;
  steady_clock::time_point now_ = steady_clock::now();  // as of this turn
  steady_clock::time_point started_at_ = now_;
  Listeners listeners_;
  Signals signals_;
  Reserve reserve_;
  LocalPeers local_peers_;
  Poller poller_{1024};
  BroadcastLog lines_;
  Slab<Client> clients_;
  std::uint32_t last_number_ = 0;
  std::size_t news_ = 0;                     // bytes, since flush_all
  std::uint32_t talkers_ = 0;                // reads that brought them
  std::size_t reading_share_ = 0;            // of one client, in this turn
  bool reading_paused_ = false;              // the backlog is too high
  std::deque<Token> paused_;                 // who had something to say since
  std::vector<Token> waiting_;               // for room
  steady_clock::duration longest_stall_{0};  // as of check_progress
  std::optional<steady_clock::time_point> last_stall_;
  steady_clock::time_point progress_checked_at_;
  std::deque<std::pair<steady_clock::time_point, Token>> lingering_;
  std::optional<steady_clock::time_point> accept_at_;
  bool shortage_logged_ = false;
  std::optional<steady_clock::time_point> idle_check_at_;
  std::optional<steady_clock::time_point> stats_at_;
  steady_clock::time_point stats_since_ = now_;
  std::uint64_t line_count_ = 0;
  std::uint64_t line_count_before_ = 0;  // at the last stats_at_
  std::uint64_t delivery_count_ = 0;
  std::uint64_t delivery_count_before_ = 0;
  std::uint64_t drop_count_ = 0;
  bool stopping_ = false;
  std::optional<steady_clock::time_point> stop_at_;
};

// ---------------------------------------------------------------------------
// The command line
// ---------------------------------------------------------------------------

// One `--name VALUE` or `--name=VALUE`.
struct Setting {
  std::string_view name;
  std::string_view value;

  [[noreturn]] void refuse(const std::string& expected) const {
    throw UsageError{std::string(name) + " takes " + expected + ", not '" +
                     std::string(value) + "'"};
  }
};

template <class Number>
Number parse_number(const Setting& setting, Number smallest, Number largest,
                    int base = 10) {
  Number number{};
  const char* end = setting.value.data() + setting.value.size();
  const auto [rest, error] =
      std::from_chars(setting.value.data(), end, number, base);
  if (error == std::errc{} && rest == end && number >= smallest &&
      number <= largest)
    return number;
  if (base == 8) setting.refuse("an octal number such as 600 or 660");
  setting.refuse("a number from " + std::to_string(smallest) + " to " +
                 std::to_string(largest));
}

Seconds parse_seconds(const Setting& setting) {
  const std::string text(setting.value);
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  // Not "inf" or " 1", which strtod takes too.
  const bool plain = text.find_first_not_of("0123456789.") == text.npos;
  if (text.empty() || !plain || *end != '\0' || number > 1e6)
    setting.refuse("a number of seconds from 0 to 1000000");
  return Seconds(number);
}

// A longer line, or more of them, no log could be made for.
constexpr std::uint32_t longest_max_line = 1 << 24;
constexpr std::uint32_t largest_backlog = 1 << 30;

bool set_flag(Options& options, std::string_view argument) {
  if (argument == "--echo") return options.echo = true;
  if (argument == "--quiet") return options.quiet = true;
  if (argument == "--help") return options.help = true;
  if (argument == "--version") return options.version = true;
  return false;
}

constexpr std::string_view settings[] = {
    "--host",          "--port",         "--unix",       "--unix-mode",
    "--max-clients",   "--max-line",     "--high-water", "--max-backlog",
    "--stall-timeout", "--idle-timeout", "--stats"};

void set(Options& options, const Setting& setting) {
  const std::string_view name = setting.name;
  const auto number = [&](std::uint32_t most) {
    return parse_number<std::uint32_t>(setting, 1, most);
  };
  if (name == "--host") options.host = setting.value;
  if (name == "--port")
    options.port = parse_number<std::uint16_t>(setting, 0, 65535);
  if (name == "--host" || name == "--port") options.tcp = true;
  if (name == "--unix") {
    options.unix_path = setting.value;
    if (setting.value.empty() || !Address::from_path(setting.value))
      setting.refuse("a path of at most 107 bytes");
  }
  if (name == "--unix-mode")
    options.unix_mode = parse_number<std::uint32_t>(setting, 0, 0777, 8);
  if (name == "--max-clients") options.max_clients = number(UINT32_MAX);
  if (name == "--max-line") options.max_line = number(longest_max_line);
  if (name == "--high-water") options.high_water = number(largest_backlog);
  if (name == "--max-backlog") options.max_backlog = number(largest_backlog);
  if (name == "--stall-timeout") options.stall_timeout = parse_seconds(setting);
  if (name == "--idle-timeout") options.idle_timeout = parse_seconds(setting);
  if (name == "--stats") options.stats = parse_seconds(setting);
}

Options parse_options(std::span<char* const> arguments) {
  Options options;
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view argument = arguments[i];
    if (set_flag(options, argument)) continue;
    const std::string_view name = argument.substr(0, argument.find('='));
    if (std::find(std::begin(settings), std::end(settings), name) ==
        std::end(settings))
      throw UsageError{"unknown option '" + std::string(argument) + "'"};
    if (name.size() < argument.size()) {
      set(options, {name, argument.substr(name.size() + 1)});
    } else if (++i < arguments.size()) {
      set(options, {name, arguments[i]});
    } else {
      throw UsageError{std::string(name) + " needs a value"};
    }
  }
  // A line has to fit into the log, and the mark has to be reached before the
  // log is full.
  options.max_line = std::min(options.max_line, options.max_backlog);
  options.high_water = std::min(options.high_water, options.max_backlog / 2);
  return options;
}

// ---------------------------------------------------------------------------
// The process
// ---------------------------------------------------------------------------

// Started without standard streams, rat would take their numbers for sockets,
// and print into one of them.
void occupy_standard_streams() {
  int descriptor = 0;
  do {
    descriptor = ::open("/dev/null", O_RDWR);
  } while (descriptor >= 0 && descriptor <= STDERR_FILENO);
  if (descriptor > STDERR_FILENO) ::close(descriptor);
}

// A shell's usual limit of 1,024 descriptors is soft: up to the hard limit they
// are ours for the asking.
void raise_descriptor_limit() {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
}

// The file of the Unix socket that we listen on, removed at the end.
class SocketFile {
 public:
  explicit SocketFile(std::string path) : path_(std::move(path)) {}
  SocketFile(const SocketFile&) = delete;
  SocketFile& operator=(const SocketFile&) = delete;
  // Unless it is somebody else's by now.
  ~SocketFile() {
    struct stat now {};
    if (::lstat(path_.c_str(), &now) == 0 && now.st_dev == made_.st_dev &&
        now.st_ino == made_.st_ino)
      ::unlink(path_.c_str());
  }

  // One whose server is gone is in our way; a live one, and what is no socket,
  // is not ours to remove.
  [[nodiscard]] Fd listen_at(::mode_t mode) {
    const Address address = *Address::from_path(path_);
    struct stat found {};
    if (::lstat(path_.c_str(), &found) == 0) {
      if (!S_ISSOCK(found.st_mode))
        throw std::system_error(
            EEXIST, std::generic_category(),
            "listen on " + address.to_string() + ": it is no socket");
      if (connect(address).status == ConnectStatus::refused)
        ::unlink(path_.c_str());
    }
    ListenOptions options;
    options.permissions = mode;
    const ::mode_t umask_before = ::umask(0);
    Fd listener = listen(address, options);
    ::umask(umask_before);
    ::lstat(path_.c_str(), &made_);
    return listener;
  }

 private:
  std::string path_;
  struct stat made_ {};
};

bool is_loopback(const Address& address) {
  const std::string text = address.to_string();
  return text.starts_with("127.") || text.starts_with("[::1]") ||
         text.starts_with("[::ffff:127.");
}

int serve(const Options& options) {
  std::string_view host = options.host;
  if (host.starts_with('[') && host.ends_with(']'))
    host = host.substr(1, host.size() - 2);
  const auto address = Address::from(host, options.port);
  if (!address)
    throw UsageError{"--host takes an address such as 127.0.0.1 or ::1, not '" +
                     options.host + "'"};
  occupy_standard_streams();
  raise_descriptor_limit();
  std::signal(SIGPIPE, SIG_IGN);  // standard output and error may be pipes
  std::signal(SIGXFSZ, SIG_IGN);  // a limit for files is one for the log, too
  Signals signals{SIGINT, SIGTERM};
  std::optional<SocketFile> file;
  Listeners listeners;
  if (options.tcp || options.unix_path.empty())
    listeners.tcp = listen(*address);
  if (!options.unix_path.empty())
    listeners.unix =
        file.emplace(options.unix_path).listen_at(options.unix_mode);
  std::string where;
  for (const Fd* const listener : {&listeners.tcp, &listeners.unix})
    if (*listener)
      where += "listening on " + local_address(*listener).to_string() + '\n';
  const bool is_open = listeners.tcp && !is_loopback(*address);
  Server server(std::move(listeners), std::move(signals), options);
  std::cout << where << std::flush;
  if (is_open && !options.quiet)
    std::cerr << "anyone who can reach this machine at " << options.host
              << " can read and write here\n";
  server.run();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options(
        std::span(argv, static_cast<std::size_t>(argc)).subspan(1));
    if (options.help) {
      std::cout << help_text;
    } else if (options.version) {
      std::cout << "rat " << EDGEWISE_VERSION_MAJOR << '.'
                << EDGEWISE_VERSION_MINOR << '.' << EDGEWISE_VERSION_PATCH
                << '\n';
    } else {
      return serve(options);
    }
  } catch (UsageError& error) {
    // What was typed may hold a newline, and the answer is one line.
    std::replace_if(
        error.what.begin(), error.what.end(),
        [](unsigned char byte) { return byte < ' '; }, '?');
    std::cerr << "rat: " << error.what << " (see rat --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "rat: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
