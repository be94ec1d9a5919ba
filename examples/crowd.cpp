// crowd: a swarm of clients that puts a broadcast server to the test.
//
// It connects thousands of clients, of which the first few send lines. Every
// client checks that it gets each line of each other sender: once, in order,
// byte for byte. Figures come at the end, and the verdict is the exit code.
//
//   rat --port 8080
//   crowd --port 8080 --clients 1000      in another terminal
//
// A line is numbered, and carries the time when it was made:
//
//   crowd 0003 0000000012 0000004711123456789 mnopqrstuvwxyzabcdefg
//
// One thread and one Poller drive them all, level-triggered: one read for each
// event, so that nobody gets more than 64 KiB before it is the others' turn. A
// latency is the time from before a line's send to after the read that brought
// it. So crowd's own share is in it, and the report tells its computing time.

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <deque>
#include <iomanip>
#include <iostream>
#include <stdexcept>
#include <unordered_set>
#include <variant>
#include <vector>

#include "edgewise.hpp"

using namespace edgewise;
using namespace std::chrono_literals;
using std::chrono::nanoseconds;
using std::chrono::seconds;
using std::chrono::steady_clock;
using Time = steady_clock::time_point;

namespace {

constexpr std::string_view help_text =
    R"(usage: crowd [OPTION]...

A swarm of clients for a broadcast server, which checks that every line reaches
everybody: once, in order, byte for byte.

  --host ADDRESS      the server's address (127.0.0.1)
  --port N            its port (8080)
  --unix PATH         a Unix socket instead; @NAME is an abstract one
  --clients N         how many to connect (100)
  --senders N         how many of them send lines (4)
  --seconds N         how long they send (10)
  --lines N           how many lines each sends at most (0: any number)
  --size BYTES        the length of a line, its newline included (64)
  --window N          a sender's lines that have not reached everybody yet (64)
  --rate N            lines a second of each sender (0: what the window allows)
  --patience SECONDS  give up when nothing has happened for so long (10)
  --echo              expect the server to send a line to its sender too
  --json              print the report as one JSON object
  --quiet             show no progress on a terminal
  --help              print this and exit
  --version           print the version and exit

Exit code: 0 if everything arrived, 1 if not, 2 for a bad command line.
CTRL-C ends the sending, a second one the waiting for what is under way.

What JSON calls differently from the report: expected (deliveries), elapsed_ns,
cpu_ns (crowd's own), histogram (a list of [below_ns, count]).
lost         lines that somebody did not get (or not yet: see interrupted)
corrupted    came, but nobody sent that; the line that was sent is lost
unconnected  clients who could not connect
unreached    clients whom no greeting reached before the first line
)";

struct Options {
  std::string host = "127.0.0.1";
  std::string unix_path;
  std::uint32_t port = 8080;
  std::uint32_t clients = 100;
  std::uint32_t senders = 4;
  std::uint32_t seconds = 10;
  std::uint32_t lines = 0;
  std::uint32_t size = 64;
  std::uint32_t window = 64;
  std::uint32_t rate = 0;
  std::uint32_t patience = 10;
  bool echo = false;
  bool json = false;
  bool quiet = false;
  bool help = false;
  bool version = false;
};

// What a bad command line is answered with.
struct UsageError {
  std::string what;
};

// A listener's queue may be short, and who finds it full is sent away or has to
// wait for a second. So not everybody comes at once.
constexpr std::uint32_t most_connecting = 64;
constexpr int most_attempts = 10;
constexpr auto attempt_pause = 100ms;

// From one address to another there are some 28,000 ports (ip(7),
// ip_local_port_range), so every 25,000 clients come from a loopback address of
// their own.
constexpr std::uint32_t clients_per_source = 25'000;

// Who is connected may not have been accepted yet, so not in the room. Before
// the first line, greetings are sent until everybody has heard one, after a
// pause that doubles each time.
constexpr std::string_view greeting_form = "crowd hello 0000000\n";
constexpr nanoseconds first_greeting_pause = 10ms;

// Lines that wait for room in a sender's own socket are not on their way.
constexpr std::size_t most_unsent = 65'536;

// When so many lines are lost, more would tell nothing new.
constexpr std::size_t most_missing = 1'000'000;

// How long to listen for what should not come, when all that should is here.
constexpr auto grace = 100ms;

constexpr auto progress_pause = 200ms;

// Counts of latencies, in 32 buckets to each power of two: exact to 3 percent.
class Histogram {
 public:
  using Row = std::pair<std::uint64_t, std::uint64_t>;  // below, how many

  void add(nanoseconds latency) {
    longest_ = std::max(longest_, latency);
    const auto value = static_cast<std::uint64_t>(latency.count());
    ++counts_[std::min(index_of(value), counts_.size() - 1)];
    ++total_;
  }

  nanoseconds longest() const { return longest_; }

  // No more than this for a share of all, such as 0.99.
  nanoseconds percentile(double share) const {
    const double rank = share * static_cast<double>(total_);
    std::uint64_t seen = 0;
    std::size_t index = 0;
    while (index < counts_.size() && static_cast<double>(seen) < rank)
      seen += counts_[index++];
    return std::min(longest_, nanoseconds(first_value(index)));
  }

  // Those below 1,000, 2,000, 5,000, 10,000 ... nanoseconds, each in one row.
  std::vector<Row> rows() const {
    std::vector<Row> rows;
    std::size_t index = 0;
    std::uint64_t below = 1'000;
    for (int step = 0; index < counts_.size(); ++step) {
      Row row{below, 0};
      while (index < counts_.size() && first_value(index) < below)
        row.second += counts_[index++];
      if (row.second > 0 || !rows.empty()) rows.push_back(row);
      below = step % 3 == 1 ? below / 2 * 5 : below * 2;
    }
    while (!rows.empty() && rows.back().second == 0) rows.pop_back();
    return rows;
  }

 private:
  // The five bits below the highest one choose among the 32.
  static std::size_t index_of(std::uint64_t value) {
    const auto bits = static_cast<std::size_t>(std::bit_width(value));
    const std::size_t shift = bits > 6 ? bits - 6 : 0;
    return shift * 32 + static_cast<std::size_t>(value >> shift);
  }

  static std::uint64_t first_value(std::size_t index) {
    if (index < 64) return index;
    return (std::uint64_t{32} + index % 32) << (index / 32 - 1);
  }

  std::array<std::uint64_t, 1152> counts_{};  // up to 18 minutes
  std::uint64_t total_ = 0;
  nanoseconds longest_{0};
};

void write_digits(std::span<char> digits, std::uint64_t number) {
  for (auto digit = digits.rbegin(); digit != digits.rend(); number /= 10)
    *digit++ = static_cast<char>('0' + number % 10);
}

std::optional<std::uint64_t> read_digits(std::string_view digits) {
  std::uint64_t number = 0;
  for (const char digit : digits) {
    if (digit < '0' || digit > '9') return std::nullopt;
    number = number * 10 + static_cast<std::uint64_t>(digit - '0');
  }
  return number;
}

// A line, whose fields all have a fixed place.
struct Line {
  static constexpr std::string_view form =
      "crowd 0000 0000000000 0000000000000000000 ";
  static constexpr std::size_t shortest = form.size() + 1;

  // The padding begins with another letter each time.
  void write_to(std::span<char> text) const {
    std::copy(form.begin(), form.end(), text.begin());
    write_digits(text.subspan(6, 4), sender);
    write_digits(text.subspan(11, 10), number);
    write_digits(text.subspan(22, 19),
                 static_cast<std::uint64_t>(sent.count()));
    auto letter = static_cast<char>('a' + number % 26);
    for (char& byte : text.subspan(form.size())) {
      byte = letter;
      letter = letter == 'z' ? 'a' : static_cast<char>(letter + 1);
    }
    text.back() = '\n';
  }

  // Nothing if any byte is not as write_to would have it.
  static std::optional<Line> parse(std::string_view text) {
    if (text.size() < shortest) return std::nullopt;
    const auto sender = read_digits(text.substr(6, 4));
    const auto number = read_digits(text.substr(11, 10));
    const auto sent = read_digits(text.substr(22, 19));
    if (!sender || !number || !sent) return std::nullopt;
    const Line line{*sender, *number, nanoseconds(*sent)};
    std::string same(text.size(), '\0');
    line.write_to(same);
    return text == same ? std::optional(line) : std::nullopt;
  }

  std::uint64_t sender;
  std::uint64_t number;
  nanoseconds sent;  // on the monotonic clock
};

// One who sends. Its lines that somebody still waits for are kept, so that what
// arrives is simply compared with what was sent.
struct Sender {
  struct Slot {
    Time sent;
    std::uint32_t awaited = 0;
  };

  Sender(std::uint32_t client, const Options& options)
      : number(client),
        size(options.size),
        slots(std::bit_ceil(options.window)),
        texts(slots.size() * size, '\0') {}

  // Makes the next line, for which so many clients will wait.
  std::string_view compose(Time now, std::uint32_t awaited) {
    slot(next) = {now, awaited};
    char* const place = texts.data() + index_of(next) * size;
    Line{number, next++, now.time_since_epoch()}.write_to({place, size});
    return {place, size};
  }

  // One client less waits for a line: it has it, or will never get it.
  void settle(std::uint32_t line) {
    --slot(line).awaited;
    while (oldest != next && slot(oldest).awaited == 0) ++oldest;
  }

  std::string_view text(std::uint32_t line) const {
    return {texts.data() + index_of(line) * size, size};
  }
  Slot& slot(std::uint32_t line) { return slots[index_of(line)]; }
  std::size_t index_of(std::uint32_t line) const {
    return line & (slots.size() - 1);
  }

  std::uint32_t number;      // the client's
  std::uint32_t next = 0;    // the line to send next
  std::uint32_t oldest = 0;  // the first one that somebody still waits for
  std::size_t size;          // of a line
  std::vector<Slot> slots;   // a ring, like the texts
  std::string texts;
  WriteBuffer output;
  bool awaits_room = false;  // its socket is full: Interest::writable is set
};

struct Client {
  enum class State : std::uint8_t { absent, connecting, connected };

  Fd socket;
  LineBuffer lines;
  State state = State::absent;
  bool greeted = false;
  std::uint8_t attempts = 0;
};

enum Trouble : std::uint8_t {
  lost,
  duplicated,
  out_of_order,
  corrupted,
  disconnected,
  unconnected,
  unreached
};
constexpr std::array trouble_names{"lost",      "duplicated",   "out_of_order",
                                   "corrupted", "disconnected", "unconnected",
                                   "unreached"};

// What is reported at the end.
struct Result {
  std::uint64_t lines = 0;
  std::uint64_t expected = 0;    // deliveries of these lines, to all together
  std::uint64_t deliveries = 0;  // of them, those that came to pass
  Histogram latencies;
  nanoseconds elapsed{0};  // from the first line to the last delivery
  nanoseconds cpu{0};
  std::array<std::uint64_t, trouble_names.size()> troubles{};
  std::string first_trouble;
  bool interrupted = false;

  bool ok() const {
    return lines > 0 && deliveries == expected &&
           std::all_of(troubles.begin(), troubles.end(),
                       [](std::uint64_t count) { return count == 0; });
  }
};

std::string reason_of(int error) {
  return std::generic_category().message(error);
}

std::string grouped(std::uint64_t number) {
  std::string digits = std::to_string(number);
  for (std::size_t at = digits.size(); at > 3;) digits.insert(at -= 3, ",");
  return digits;
}

std::uint64_t per_second(std::uint64_t count, nanoseconds time) {
  if (time <= 0s) return 0;
  return static_cast<std::uint64_t>(
      static_cast<double>(count) / std::chrono::duration<double>(time).count());
}

// Bytes that anybody may have sent, cut short and printable.
std::string shown(std::string_view bytes) {
  std::string text(bytes.substr(0, 72));
  std::replace_if(
      text.begin(), text.end(),
      [](unsigned char byte) { return byte < ' ' || byte > '~'; }, '?');
  return text;
}

nanoseconds cpu_time() {
  timespec time{};
  ::clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return seconds(time.tv_sec) + nanoseconds(time.tv_nsec);
}

// The header's connect, but from an address of our choice.
Connected connect_from(std::uint32_t source, const Address& address) {
  sockaddr_in from{};
  from.sin_family = AF_INET;
  from.sin_addr.s_addr = htonl(source);
  constexpr int yes = 1;
  Fd fd{::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
  ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  // Else bind would choose a port, and one that is free towards all servers.
  ::setsockopt(fd.get(), IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &yes, sizeof yes);
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&from), sizeof from) ==
          0 &&
      ::connect(fd.get(), address.data(), address.size()) == 0)
    return {{}, std::move(fd)};
  if (errno == EINPROGRESS || errno == EINTR)
    return {{ConnectStatus::in_progress, 0}, std::move(fd)};
  return {{ConnectStatus::failed, errno}, Fd()};
}

class Swarm {
 public:
  Swarm(const Options& options, const Address& address)
      : options_(options),
        address_(address),
        is_loopback_(address.to_string().starts_with("127.")),
        shows_progress_(!options.quiet && ::isatty(STDERR_FILENO) == 1),
        clients_(options.clients),
        next_lines_(std::size_t{options.clients} * options.senders) {
    poller_.add(signals_, signals_token, Interest::readable);
    for (std::uint32_t index = 0; index < options.senders; ++index)
      senders_.emplace_back(index, options);
    for (std::uint32_t index = 0; index < options.clients; ++index)
      to_connect_.emplace_back(Time(), index);
  }

  Result run() {
    enter(Phase::connecting);
    while (phase_ != Phase::done) {
      for (const Event& event : poller_.wait_until(wake_at_)) handle(event);
      now_ = steady_clock::now();
      wake_at_ = now_ + 100ms;
      if (phase_ == Phase::connecting) connect_clients();
      if (phase_ == Phase::greeting) greet();
      if (phase_ == Phase::sending) send_lines();
      if (phase_ == Phase::draining) drain();
      if (shows_progress_ && now_ >= progress_at_) show_progress();
    }
    if (shows_progress_) std::cerr << "\r\033[K";
    sum_up();
    return std::move(result_);
  }

 private:
  enum class Phase { connecting, greeting, sending, draining, done };

  static constexpr Token signals_token{UINT64_MAX};

  void enter(Phase phase) {
    phase_ = phase;
    now_ = last_progress_ = steady_clock::now();
  }

  bool stalled() const {
    return now_ - last_progress_ > seconds(options_.patience);
  }

  void handle(const Event& event) {
    if (event.token() == signals_token) return interrupt();
    const auto index = static_cast<std::uint32_t>(event.token());
    const Client::State state = clients_[index].state;
    if (state == Client::State::connecting) return settle_connection(index);
    if (state == Client::State::connected && event.readable())
      read_client(index);
    if (index < senders_.size() && senders_[index].awaits_room &&
        event.writable())
      flush(senders_[index]);
  }

  // Once: no more is sent. Twice, or before anything was sent: that is all.
  void interrupt() {
    while (signals_.next()) result_.interrupted = true;
    enter(phase_ == Phase::sending ? Phase::draining : Phase::done);
  }

  void note(std::uint32_t index, const std::string& what) {
    if (result_.first_trouble.empty())
      result_.first_trouble = "client " + std::to_string(index) + ' ' + what;
  }

  void count(Trouble trouble, std::uint32_t index, const std::string& what) {
    ++result_.troubles[trouble];
    note(index, what);
  }

  void connect_clients() {
    for (std::uint32_t started = 0;
         !to_connect_.empty() && to_connect_.front().first <= now_ &&
         std::max(connecting_, started) < most_connecting;
         ++started) {
      const std::uint32_t index = to_connect_.front().second;
      to_connect_.pop_front();
      start_connecting(index);
    }
    if ((to_connect_.empty() && connecting_ == 0) || stalled())
      return finish_connecting();
    if (!to_connect_.empty() && connecting_ < most_connecting)
      wake_at_ = std::min(wake_at_, to_connect_.front().first);
  }

  void start_connecting(std::uint32_t index) {
    const std::uint32_t source = index / clients_per_source;
    Connected attempt = source == 0 || !is_loopback_
                            ? connect(address_)
                            : connect_from(INADDR_LOOPBACK + source, address_);
    if (attempt.failed()) return retry_later(index, attempt.error);
    Client& client = clients_[index];
    client.socket = std::move(attempt.fd);
    client.state = Client::State::connecting;
    ++connecting_;
    poller_.add(client.socket, Token{index}, Interest::writable);
    if (attempt.ok()) settle_connection(index);
  }

  void settle_connection(std::uint32_t index) {
    Client& client = clients_[index];
    const ConnectResult result = finish_connect(client.socket);
    if (result.in_progress()) return;
    --connecting_;
    if (result.failed()) {
      disconnect(client);
      return retry_later(index, result.error);
    }
    client.state = Client::State::connected;
    poller_.modify(client.socket, Token{index}, Interest::readable);
    ++members_;
    last_progress_ = steady_clock::now();
  }

  void retry_later(std::uint32_t index, int error) {
    // EAGAIN: a Unix listener's queue is full, so the server is only busy.
    if (error == EAGAIN || ++clients_[index].attempts < most_attempts) {
      to_connect_.emplace_back(steady_clock::now() + attempt_pause, index);
    } else if (members_ + result_.troubles[disconnected] == 0) {
      throw std::runtime_error("cannot connect to " + address_.to_string() +
                               ": " + reason_of(error));
    } else {
      note(index, "could not connect: " + reason_of(error));
    }
  }

  // Who is not there by now does not take part.
  void finish_connecting() {
    for (std::uint32_t index = 0; index < clients_.size(); ++index) {
      if (clients_[index].state != Client::State::connecting) continue;
      note(index, "could not connect in time");
      disconnect(clients_[index]);
    }
    ungreeted_ = members_;
    const std::uint64_t seen = members_ + result_.troubles[disconnected];
    result_.troubles[unconnected] = clients_.size() - seen;
    enter(Phase::greeting);
  }

  void disconnect(Client& client) {
    poller_.remove(client.socket);
    client.socket.reset();
    client.state = Client::State::absent;
  }

  static std::string greeting_of(std::uint32_t index) {
    std::string greeting(greeting_form);
    write_digits(std::span(greeting).subspan(12, 7), index);
    return greeting;
  }

  // Two of them greet, since nobody can count on hearing himself.
  void greet() {
    if (members_ < 2 || stalled()) {
      result_.troubles[unreached] = ungreeted_;
      return enter(Phase::done);
    }
    if (ungreeted_ == 0) {
      enter(Phase::sending);
      started_at_ = now_;
      cpu_before_ = cpu_time();
    } else if (now_ >= greeting_at_) {
      greeting_at_ = now_ + greeting_pause_;
      greeting_pause_ *= 2;
      std::uint32_t index = 0;
      for (int greetings = 0; greetings < 2; ++index) {
        if (clients_[index].state != Client::State::connected) continue;
        // A greeting that goes astray is followed by another.
        static_cast<void>(write(clients_[index].socket, greeting_of(index)));
        ++greetings;
      }
    }
    wake_at_ = std::min(wake_at_, greeting_at_);
  }

  void hear_greeting(std::uint32_t index, std::string_view greeting) {
    Client& client = clients_[index];
    if (phase_ != Phase::greeting || client.greeted ||
        greeting == greeting_of(index))
      return;
    client.greeted = true;
    --ungreeted_;
    last_progress_ = now_;
  }

  void send_lines() {
    bool finished = missing_.size() > most_missing ||
                    now_ - started_at_ >= seconds(options_.seconds);
    for (Sender& sender : senders_) {
      if (finished) break;
      compose_lines(sender);
      if (!sender.awaits_room && !sender.output.empty()) flush(sender);
    }
    finished = finished || std::none_of(senders_.begin(), senders_.end(),
                                        [&](const Sender& sender) {
                                          return has_more_to_send(sender);
                                        });
    if (finished) enter(Phase::draining);
  }

  bool has_more_to_send(const Sender& sender) const {
    const std::uint32_t most = options_.lines > 0 ? options_.lines : UINT32_MAX;
    return clients_[sender.number].state == Client::State::connected &&
           members_ > 1 && sender.next < most;
  }

  // The senders take turns, so that their lines do not all come at once.
  Time time_of_next_line(const Sender& sender) const {
    if (options_.rate == 0) return started_at_;
    const double turn = static_cast<double>(sender.number) / options_.senders;
    return started_at_ +
           std::chrono::ceil<nanoseconds>(std::chrono::duration<double>(
               (sender.next + turn) / options_.rate));
  }

  void compose_lines(Sender& sender) {
    const std::uint32_t awaited = members_ - (options_.echo ? 0 : 1);
    while (has_more_to_send(sender) &&
           sender.next - sender.oldest < options_.window &&
           sender.output.size() < most_unsent) {
      const Time now = steady_clock::now();
      const Time time = time_of_next_line(sender);
      if (time > now) {
        wake_at_ = std::min(wake_at_, time);
        return;
      }
      if (!sender.output.append(sender.compose(now, awaited)))
        throw std::bad_alloc();
      ++result_.lines;
      result_.expected += awaited;
    }
  }

  void flush(Sender& sender) {
    const Client& client = clients_[sender.number];
    const IoResult result = sender.output.flush(client.socket);
    if (result.failed()) return drop(sender.number, reason_of(result.error));
    if (sender.awaits_room == result.would_block()) return;
    sender.awaits_room = result.would_block();
    const Interest writing =
        sender.awaits_room ? Interest::writable : Interest::none;
    poller_.modify(client.socket, Token{sender.number},
                   Interest::readable | writing);
  }

  void drain() {
    const bool complete = std::all_of(
        senders_.begin(), senders_.end(),
        [](const Sender& sender) { return sender.oldest == sender.next; });
    if (members_ == 0 || stalled() ||
        (complete && now_ - last_progress_ > grace))
      enter(Phase::done);
  }

  void read_client(std::uint32_t index) {
    LineBuffer& lines = clients_[index].lines;
    const IoResult result = lines.fill(clients_[index].socket);
    const Time now = steady_clock::now();
    while (const auto line = lines.next()) take(index, *line, now);
    if (lines.overlong()) {
      report_corrupted(index, "a line without an end");
      drop(index, "its lines cannot be told apart");
    } else if (result.ended()) {
      drop(index, to_string(result));
    }
  }

  bool expects(std::uint32_t index, std::uint64_t sender) const {
    return options_.echo || index != sender;
  }

  // The number of the line that a client is to get next from a sender.
  std::uint32_t& next_line(std::uint32_t index, const Sender& sender) {
    return next_lines_[std::size_t{index} * options_.senders + sender.number];
  }

  // The next line of its sender, with not a byte changed: that is the one case
  // that there should be, so it is the one that is fast.
  void take(std::uint32_t index, std::string_view text, Time now) {
    const auto number = text.size() == options_.size
                            ? read_digits(text.substr(6, 4))
                            : std::nullopt;
    if (!number || *number >= senders_.size() || !expects(index, *number))
      return examine(index, text, now);
    Sender& sender = senders_[static_cast<std::size_t>(*number)];
    std::uint32_t& next = next_line(index, sender);
    if (next == sender.next || text != sender.text(next))
      return examine(index, text, now);
    deliver(now - sender.slot(next).sent, now);
    sender.settle(next++);
  }

  void deliver(nanoseconds latency, Time now) {
    result_.latencies.add(latency);
    ++result_.deliveries;
    last_progress_ = last_delivery_ = now;
  }

  // There is one.
  Sender& sender_of(const Line& line) {
    return senders_[static_cast<std::size_t>(line.sender)];
  }

  // What else can come: a greeting, a wrong line, or a line out of turn.
  void examine(std::uint32_t index, std::string_view text, Time now) {
    if (text.size() == greeting_form.size() &&
        text.starts_with(greeting_form.substr(0, 12)))
      return hear_greeting(index, text);
    const auto line = Line::parse(text);
    if (!line || text.size() != options_.size ||
        line->sender >= senders_.size() ||
        line->number >= sender_of(*line).next ||
        line->sent > now.time_since_epoch())
      return report_corrupted(index, text);
    Sender& sender = sender_of(*line);
    const auto number = static_cast<std::uint32_t>(line->number);
    if (number >= sender.oldest && text != sender.text(number))
      return report_corrupted(index, text);
    if (!expects(index, line->sender))
      return count(duplicated, index, "got its own line, without --echo");
    if (take_out_of_turn(index, sender, number))
      deliver(now.time_since_epoch() - line->sent, now);
  }

  static std::string name_of(const Sender& sender, std::uint32_t line) {
    return "line " + std::to_string(line) + " of sender " +
           std::to_string(sender.number);
  }

  bool take_out_of_turn(std::uint32_t index, Sender& sender,
                        std::uint32_t number) {
    std::uint32_t& next = next_line(index, sender);
    const auto key = [&](std::uint32_t line) {
      return (std::uint64_t{index} * options_.senders + sender.number) << 32 |
             line;
    };
    const std::string name = name_of(sender, number);
    if (number >= next) {
      note(index, "missed the lines before " + name);
      // The sender does not wait for those, perhaps for ever.
      for (; next < number; sender.settle(next++)) missing_.insert(key(next));
      sender.settle(next++);
    } else if (missing_.erase(key(number)) == 1) {
      count(out_of_order, index, "got " + name + " late");
    } else {
      count(duplicated, index, "got " + name + " again");
      return false;
    }
    return true;
  }

  void report_corrupted(std::uint32_t index, std::string_view text) {
    count(corrupted, index, "got what nobody sent: " + shown(text));
  }

  // Nobody waits any more for the lines that this client will not get.
  void drop(std::uint32_t index, const std::string& reason) {
    count(disconnected, index, "was disconnected: " + reason);
    disconnect(clients_[index]);
    --members_;
    if (phase_ == Phase::greeting && !clients_[index].greeted) --ungreeted_;
    for (Sender& sender : senders_) {
      if (!expects(index, sender.number)) continue;
      std::uint32_t& next = next_line(index, sender);
      while (next < sender.next) sender.settle(next++);
    }
    if (index < senders_.size()) senders_[index].awaits_room = false;
  }

  void show_progress() {
    const nanoseconds time = now_ - (progress_at_ - progress_pause);
    std::cerr << "\r\033[K" + grouped(members_) + " clients, " +
                     grouped(per_second(result_.lines - shown_lines_, time)) +
                     " lines/s, " +
                     grouped(per_second(result_.deliveries - shown_deliveries_,
                                        time)) +
                     " deliveries/s, " + grouped(missing_.size()) + " lost"
              << std::flush;
    shown_lines_ = result_.lines;
    shown_deliveries_ = result_.deliveries;
    progress_at_ = now_ + progress_pause;
  }

  void sum_up() {
    result_.troubles[lost] = result_.expected - result_.deliveries;
    for (std::uint32_t index = 0; index < clients_.size(); ++index) {
      for (const Sender& sender : senders_) {
        const std::uint32_t next = next_line(index, sender);
        if (next != sender.next && expects(index, sender.number))
          note(index, "did not get " + name_of(sender, next));
      }
    }
    if (result_.deliveries == 0) return;
    result_.elapsed = last_delivery_ - started_at_;
    result_.cpu = cpu_time() - cpu_before_;
  }

  Options options_;
  Address address_;
  bool is_loopback_;
  bool shows_progress_;
  Signals signals_{SIGINT, SIGTERM};
  Poller poller_{1024};
  Phase phase_ = Phase::connecting;
  std::vector<Client> clients_;  // a client's token is its index
  std::vector<Sender> senders_;
  std::vector<std::uint32_t> next_lines_;
  std::unordered_set<std::uint64_t>
      missing_;  // passed over, and not seen since
  std::deque<std::pair<Time, std::uint32_t>> to_connect_;  // when, and who
  std::uint32_t connecting_ = 0;
  std::uint32_t members_ = 0;  // are connected
  std::uint32_t ungreeted_ = 0;
  Time now_;
  Time wake_at_;
  Time last_progress_;
  Time greeting_at_;
  nanoseconds greeting_pause_ = first_greeting_pause;
  Time started_at_;
  Time last_delivery_;
  Time progress_at_;
  nanoseconds cpu_before_{0};
  std::uint64_t shown_lines_ = 0;
  std::uint64_t shown_deliveries_ = 0;
  Result result_;
};

// Three digits, and a unit: "1.23 ms".
std::string duration_text(nanoseconds time) {
  auto value = static_cast<double>(time.count());
  const char* unit = "ns";
  for (const char* larger : {"us", "ms", "s"}) {
    if (value < 999.5) break;
    value /= 1000;
    unit = larger;
  }
  std::array<char, 32> text{};
  std::snprintf(text.data(), text.size(), "%.*f %s",
                value < 9.995 ? 2 : (value < 99.95 ? 1 : 0), value, unit);
  return text.data();
}

void print_histogram(const std::vector<Histogram::Row>& rows) {
  double most = 1;
  for (const auto& [below, count] : rows)
    most = std::max(most, static_cast<double>(count));
  for (const auto& [below, count] : rows) {
    // Rounded up: what is there at all is to be seen.
    const double marks = std::ceil(44 * static_cast<double>(count) / most);
    std::cout << std::setw(16) << "below " + duration_text(nanoseconds(below))
              << std::setw(16) << grouped(count) << "  "
              << std::string(static_cast<std::size_t>(marks), '#') << '\n';
  }
}

void print_report(const Options& options, const Result& result) {
  const Histogram& latencies = result.latencies;
  const auto print = [&](std::string_view name, std::uint64_t number) {
    std::cout << std::left << std::setw(13) << name << std::right
              << std::setw(19) << grouped(number) << '\n';
  };
  print("clients", options.clients);
  print("senders", options.senders);
  print("lines sent", result.lines);
  print("deliveries", result.deliveries);
  print("a second", per_second(result.deliveries, result.elapsed));
  std::cout << "in " << duration_text(result.elapsed)
            << ", of which crowd was computing for "
            << duration_text(result.cpu) << "\nlatency p50 "
            << duration_text(latencies.percentile(0.5)) << ", p99 "
            << duration_text(latencies.percentile(0.99)) << ", p99.9 "
            << duration_text(latencies.percentile(0.999)) << ", max "
            << duration_text(latencies.longest()) << '\n';
  print_histogram(latencies.rows());
  for (std::size_t i = 0; i < trouble_names.size(); ++i)
    if (result.troubles[i] > 0) print(trouble_names[i], result.troubles[i]);
  if (!result.first_trouble.empty())
    std::cout << "the first trouble: " << result.first_trouble << '\n';
  if (result.interrupted) std::cout << "interrupted\n";
  std::cout << (result.ok() ? "OK: every line reached everybody, once, in "
                              "order, byte for byte\n"
                            : "FAILED: not every line reached everybody as it "
                              "should\n");
}

void print_json(const Options& options, const Result& result) {
  const Histogram& latencies = result.latencies;
  const auto as_number = [](nanoseconds time) {
    return static_cast<std::uint64_t>(time.count());
  };
  const std::pair<const char*, std::uint64_t> figures[]{
      {"clients", options.clients},
      {"senders", options.senders},
      {"size", options.size},
      {"window", options.window},
      {"rate", options.rate},
      {"lines_sent", result.lines},
      {"expected", result.expected},
      {"deliveries", result.deliveries},
      {"deliveries_per_second", per_second(result.deliveries, result.elapsed)},
      {"elapsed_ns", as_number(result.elapsed)},
      {"cpu_ns", as_number(result.cpu)},
      {"latency_p50_ns", as_number(latencies.percentile(0.5))},
      {"latency_p99_ns", as_number(latencies.percentile(0.99))},
      {"latency_p999_ns", as_number(latencies.percentile(0.999))},
      {"latency_max_ns", as_number(latencies.longest())}};
  std::cout << std::boolalpha << "{\"ok\":" << result.ok()
            << ",\"interrupted\":" << result.interrupted;
  for (const auto& [name, number] : figures)
    std::cout << ",\"" << name << "\":" << number;
  for (std::size_t i = 0; i < trouble_names.size(); ++i)
    std::cout << ",\"" << trouble_names[i] << "\":" << result.troubles[i];
  std::cout << R"(,"first_trouble":")";
  for (const char byte : result.first_trouble)
    std::cout << (byte == '"' || byte == '\\' ? "\\" : "") << byte;
  std::cout << R"(","histogram":[)";
  const char* separator = "";
  for (const auto& [below, count] : latencies.rows())
    std::cout << std::exchange(separator, ",") << '[' << below << ',' << count
              << ']';
  std::cout << "]}\n";
}

// Where the value of an option goes; of numbers, the limits.
struct Target {
  std::string_view name;
  std::variant<bool*, std::string*, std::uint32_t*> place;
  std::uint32_t smallest = 0;
  std::uint32_t largest = 0;
};

void set_number(const Target& target, std::string_view text) {
  std::uint32_t number = 0;
  const char* end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc{} || rest != end || number < target.smallest ||
      number > target.largest)
    throw UsageError{std::string(target.name) + " takes a number from " +
                     std::to_string(target.smallest) + " to " +
                     std::to_string(target.largest) + ", not '" +
                     std::string(text) + "'"};
  *std::get<std::uint32_t*>(target.place) = number;
}

// Takes `--name VALUE` and `--name=VALUE`.
Options parse_options(std::span<char* const> arguments) {
  Options options;
  const Target targets[]{{"--host", &options.host},
                         {"--port", &options.port, 1, 65'535},
                         {"--unix", &options.unix_path},
                         {"--clients", &options.clients, 2, 1'000'000},
                         {"--senders", &options.senders, 1, 1'000},
                         {"--seconds", &options.seconds, 1, 86'400},
                         {"--lines", &options.lines, 0, 1'000'000'000},
                         {"--size", &options.size, Line::shortest, 65'536},
                         {"--window", &options.window, 1, 65'536},
                         {"--rate", &options.rate, 0, 10'000'000},
                         {"--patience", &options.patience, 1, 3'600},
                         {"--echo", &options.echo},
                         {"--json", &options.json},
                         {"--quiet", &options.quiet},
                         {"--help", &options.help},
                         {"--version", &options.version}};
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string_view argument = arguments[i];
    const std::string_view name = argument.substr(0, argument.find('='));
    const auto* const target =
        std::find_if(std::begin(targets), std::end(targets),
                     [&](const Target& each) { return each.name == name; });
    const bool attached = name.size() < argument.size();
    if (target == std::end(targets) || (target->place.index() == 0 && attached))
      throw UsageError{"unknown option '" + std::string(argument) + "'"};
    if (bool* const* flag = std::get_if<bool*>(&target->place)) {
      **flag = true;
      continue;
    }
    if (!attached && ++i == arguments.size())
      throw UsageError{std::string(name) + " needs a value"};
    const std::string_view value =
        attached ? argument.substr(name.size() + 1) : arguments[i];
    if (std::string* const* text = std::get_if<std::string*>(&target->place)) {
      **text = value;
    } else {
      set_number(*target, value);
    }
  }
  if (options.senders > options.clients)
    throw UsageError{"--senders cannot be more than --clients, which is " +
                     std::to_string(options.clients)};
  return options;
}

Address address_of(const Options& options) {
  const auto path = Address::from_path(options.unix_path);
  const auto address =
      Address::from(options.host, static_cast<std::uint16_t>(options.port));
  if (!path) throw UsageError{"--unix takes a path of 107 bytes at most"};
  if (!address)
    throw UsageError{"--host takes an address such as 127.0.0.1 or ::1, not '" +
                     options.host + "'"};
  return options.unix_path.empty() ? *address : *path;
}

// A shell's usual limit of 1,024 descriptors is soft: up to the hard limit they
// are ours for the asking.
void raise_descriptor_limit(const Options& options) {
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  // And standard streams, poller, signals, and what may have been inherited.
  const rlim_t needed = options.clients + 16;
  if (needed > limit.rlim_max)
    throw std::runtime_error(
        std::to_string(options.clients) + " clients need " +
        std::to_string(needed) + " descriptors, but the hard limit is " +
        std::to_string(limit.rlim_max) + ": raise it, see ulimit -Hn");
}

int run(const Options& options) {
  const Address address = address_of(options);
  raise_descriptor_limit(options);
  std::signal(SIGPIPE, SIG_IGN);  // standard output and error may be pipes
  const Result result = Swarm(options, address).run();
  (options.json ? print_json : print_report)(options, result);
  if (!std::cout.flush()) throw std::runtime_error("cannot print the report");
  return result.ok() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse_options(
        std::span(argv, static_cast<std::size_t>(argc)).subspan(1));
    if (options.help) {
      std::cout << help_text;
    } else if (options.version) {
      std::cout << "crowd " << EDGEWISE_VERSION_MAJOR << '.'
                << EDGEWISE_VERSION_MINOR << '.' << EDGEWISE_VERSION_PATCH
                << '\n';
    } else {
      return run(options);
    }
  } catch (UsageError& error) {
    // What was typed may hold a newline, and the answer is one line.
    std::replace_if(
        error.what.begin(), error.what.end(),
        [](unsigned char byte) { return byte < ' '; }, '?');
    std::cerr << "crowd: " << error.what << " (see crowd --help)\n";
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "crowd: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
