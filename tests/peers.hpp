// peers: what the checker plays the world with. Processes that it starts,
// sockets that it talks through, and one poll(2) loop that drives them all.
//
// Nothing here knows the server's language: it is seen from outside, through
// its sockets, its standard streams, its exit code and /proc.
#ifndef TESTS_PEERS_HPP
#define TESTS_PEERS_HPP

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace peers {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;
using Command = std::vector<std::string>;
using Condition = std::function<bool()>;

// ---------------------------------------------------------------------------
// Saying what went wrong
// ---------------------------------------------------------------------------

// Ends a check. What had been done by then is told by step().
struct Failure {
  std::string expected;
  std::string got;
};

// What the check is doing: the `did` of a failure from here on.
inline std::string& current_step() {
  static std::string text;
  return text;
}

inline void step(std::string text) { current_step() = std::move(text); }

[[noreturn]] inline void fail(std::string expected, std::string got) {
  throw Failure{std::move(expected), std::move(got)};
}

inline void expect(bool holds, const std::string& expected,
                   const std::string& got) {
  if (!holds) fail(expected, got);
}

inline void expect_equal(const std::string& what, std::size_t got,
                         std::size_t wanted) {
  expect(got == wanted, what + ": " + std::to_string(wanted),
         std::to_string(got));
}

inline std::string failure_text(const Failure& failure) {
  return "did:      " + current_step() + "\nexpected: " + failure.expected +
         "\ngot:      " + failure.got;
}

inline bool is_one_line(std::string_view text) {
  return text.size() > 1 && text.find('\n') == text.size() - 1;
}

// Bytes as a C string would be written, a long one cut in the middle.
inline std::string shown(std::string_view bytes) {
  constexpr std::size_t visible = 60;
  std::string text = "\"";
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    if (bytes.size() > 2 * visible && i == visible) {
      i = bytes.size() - visible;
      text += "\" ... \"";
    }
    const auto byte = static_cast<unsigned char>(bytes[i]);
    std::array<char, 8> escaped{};
    if (byte == '\n') {
      text += "\\n";
    } else if (byte == '"' || byte == '\\') {
      text += {'\\', bytes[i]};
    } else if (byte >= ' ' && byte < 0x7f) {
      text += bytes[i];
    } else {
      std::snprintf(escaped.data(), escaped.size(), "\\x%02x", byte);
      text += escaped.data();
    }
  }
  text += '"';
  if (bytes.size() > 2 * visible)
    text += " (" + std::to_string(bytes.size()) + " bytes)";
  return text;
}

// How long anything may take. Generous, since a sanitizer's build on a busy
// machine is slow; but a program that never answers should not cost an hour.
// The environment variable CHECK_SECONDS sets another limit.
inline int& timeouts_so_far() {
  static int count = 0;
  return count;
}

inline std::chrono::seconds time_limit() {
  static const std::chrono::seconds limit = [] {
    const char* wanted = std::getenv("CHECK_SECONDS");
    return std::chrono::seconds(wanted != nullptr ? std::atoi(wanted) : 20);
  }();
  return timeouts_so_far() < 3 ? limit : std::min(limit, 5s);
}

[[noreturn]] inline void fail_by_timeout(std::string expected,
                                         const std::string& state) {
  const auto limit = time_limit();
  ++timeouts_so_far();
  fail(std::move(expected), "not within " + std::to_string(limit.count()) +
                                " s" + (state.empty() ? "" : "; ") + state);
}

// ---------------------------------------------------------------------------
// Descriptors
// ---------------------------------------------------------------------------

class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int number) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept
      : number_(std::exchange(other.number_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor() { close(); }

  int get() const { return number_; }
  bool is_open() const { return number_ >= 0; }
  void close() {
    if (number_ >= 0) ::close(std::exchange(number_, -1));
  }

 private:
  int number_ = -1;
};

inline void set_nonblocking(int descriptor) {
  ::fcntl(descriptor, F_SETFL, ::fcntl(descriptor, F_GETFL) | O_NONBLOCK);
}

// A thousand clients need a thousand descriptors, here and in the server, which
// inherits the limit. Returns what the limit is then.
inline rlim_t raise_descriptor_limit(rlim_t wanted) {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = std::min<rlim_t>(limit.rlim_max, wanted);
  ::setrlimit(RLIMIT_NOFILE, &limit);
  return limit.rlim_cur;
}

// For what the kernel reports through /proc only, without an event.
inline void wait_by_looking(const Condition& holds, std::string expected,
                            const std::function<std::string()>& state) {
  const auto deadline = Clock::now() + time_limit();
  while (!holds()) {
    if (Clock::now() > deadline) fail_by_timeout(std::move(expected), state());
    ::poll(nullptr, 0, 2);
  }
}

// For a socket or another file that is not to be left behind.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    if (::mkdtemp(name_.data()) == nullptr)
      fail("a temporary folder", std::strerror(errno));
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { std::filesystem::remove_all(name_); }
  std::string path(const std::string& file) const { return name_ + '/' + file; }

 private:
  std::string name_ = std::filesystem::temp_directory_path() / "check.XXXXXX";
};

// ---------------------------------------------------------------------------
// Addresses
// ---------------------------------------------------------------------------

struct Address {
  sockaddr_storage native{};
  socklen_t size = 0;

  const sockaddr* data() const {
    return reinterpret_cast<const sockaddr*>(&native);
  }
  sockaddr* data() { return reinterpret_cast<sockaddr*>(&native); }
};

inline Address ipv4_loopback(std::uint16_t port) {
  sockaddr_in in{};
  in.sin_family = AF_INET;
  in.sin_port = htons(port);
  in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  Address address;
  std::memcpy(&address.native, &in, sizeof in);
  address.size = sizeof in;
  return address;
}

inline Address ipv6_loopback(std::uint16_t port) {
  sockaddr_in6 in{};
  in.sin6_family = AF_INET6;
  in.sin6_port = htons(port);
  in.sin6_addr = in6addr_loopback;
  Address address;
  std::memcpy(&address.native, &in, sizeof in);
  address.size = sizeof in;
  return address;
}

inline Address unix_address(std::string_view path) {
  sockaddr_un un{};
  un.sun_family = AF_UNIX;
  path.copy(un.sun_path, sizeof un.sun_path - 1);
  Address address;
  std::memcpy(&address.native, &un, sizeof un);
  address.size = sizeof un;
  return address;
}

inline std::uint16_t local_port(int socket) {
  Address address;
  address.size = sizeof address.native;
  ::getsockname(socket, address.data(), &address.size);
  sockaddr_in in;  // the port lies at the same place in both families
  std::memcpy(&in, &address.native, sizeof in);
  return ntohs(in.sin_port);
}

// A socket bound to a free loopback port, and listening if that is wanted.
inline Descriptor bind_free_port(bool listening) {
  Descriptor socket{::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const Address any = ipv4_loopback(0);
  if (::bind(socket.get(), any.data(), any.size) != 0 ||
      (listening && ::listen(socket.get(), 1) != 0))
    fail("a free port on 127.0.0.1", std::strerror(errno));
  return socket;
}

inline std::uint16_t free_port() {
  return local_port(bind_free_port(false).get());
}

inline bool has_ipv6_loopback() {
  const Descriptor socket{::socket(AF_INET6, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  const Address any = ipv6_loopback(0);
  return socket.is_open() && ::bind(socket.get(), any.data(), any.size) == 0;
}

// ---------------------------------------------------------------------------
// Processes
// ---------------------------------------------------------------------------

// What a process has for standard output or standard error.
enum class Stream {
  captured,  // a pipe that is read all the time
  closed,    // nothing: the descriptor is closed
  stuffed,   // a small pipe that nobody ever reads
  broken,    // a pipe whose reading end is closed
};

struct Streams {
  bool closed_input = false;  // otherwise /dev/null
  Stream output = Stream::captured;
  Stream error = Stream::captured;
};

// A child process. Killed and reaped at the latest when this object goes.
class Process {
 public:
  explicit Process(const Command& command, Streams streams = {})
      : closed_input_(streams.closed_input),
        output_(streams.output),
        error_(streams.error) {
    std::vector<char*> arguments;
    for (const std::string& argument : command)
      arguments.push_back(const_cast<char*>(argument.c_str()));
    arguments.push_back(nullptr);
    const pid_t parent = ::getpid();
    pid_ = ::fork();
    if (pid_ < 0) fail("a new process", std::strerror(errno));
    if (pid_ == 0) become(arguments.data(), parent);
    output_.writing.close();
    error_.writing.close();
#ifdef SYS_pidfd_open
    exit_event_ =
        Descriptor(static_cast<int>(::syscall(SYS_pidfd_open, pid_, 0)));
#endif
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;
  ~Process() {
    if (exited_) return;
    ::kill(pid_, SIGKILL);
    reap();
  }

  pid_t pid() const { return pid_; }
  const std::string& output() const { return output_.text; }
  const std::string& error() const { return error_.text; }
  void signal(int number) const { ::kill(pid_, number); }

  bool running() {
    if (exited_) return false;
    siginfo_t exited{};
    ::waitid(P_PID, static_cast<id_t>(pid_), &exited,
             WEXITED | WNOHANG | WNOWAIT);
    if (exited.si_pid == pid_) reap();
    return !exited_;
  }
  bool exited_with(int code) {
    return !running() && WIFEXITED(status_) && WEXITSTATUS(status_) == code;
  }

  // What became of it, in words.
  std::string fate() {
    if (running()) return "it is still running";
    if (WIFEXITED(status_))
      return "it exited with code " + std::to_string(WEXITSTATUS(status_));
    const int number = WTERMSIG(status_);
    return "it was killed by signal " + std::to_string(number) + " (" +
           ::strsignal(number) + ")";
  }

  // SIGSTOP, and waits until it has stopped.
  void stop() {
    signal(SIGSTOP);
    wait_by_looking([&] { return stat_field(0) == "T" || !running(); },
                    "the server stops on SIGSTOP", [&] { return fate(); });
  }
  void resume() const { signal(SIGCONT); }

  // Waits until it sleeps in a system call.
  void wait_until_asleep() {
    wait_by_looking([&] { return stat_field(0) == "S" || !running(); },
                    "the server waits for what comes", [&] { return fate(); });
  }

  // Waits until it has exited and all that it printed is read.
  void wait_for_exit(const std::string& expected) {
    const auto deadline = Clock::now() + time_limit();
    while (running() || output_.reading.is_open() || error_.reading.is_open()) {
      if (Clock::now() > deadline) fail_by_timeout(expected, fate());
      std::vector<pollfd> waiting;
      add_to(waiting);
      ::poll(waiting.data(), waiting.size(), 50);
      drain();
    }
  }

  // For the loop of a Room: what to wait for, and what to do then.
  void add_to(std::vector<pollfd>& waiting) const {
    for (const Descriptor* descriptor :
         {&output_.reading, &error_.reading, &exit_event_}) {
      // poll(2) passes negative ones over.
      const bool useful = descriptor != &exit_event_ || !exited_;
      waiting.push_back({useful ? descriptor->get() : -1, POLLIN, 0});
    }
  }
  void drain() {
    output_.drain();
    error_.drain();
  }

  std::size_t descriptors() const {
    std::error_code error;
    const std::filesystem::directory_iterator entries(proc("fd"), error);
    return static_cast<std::size_t>(
        std::distance(begin(entries), end(entries)));
  }

  // User and system time so far.
  std::chrono::duration<double> cpu_time() const {
    const double ticks = std::strtod(stat_field(11).c_str(), nullptr) +
                         std::strtod(stat_field(12).c_str(), nullptr);
    return std::chrono::duration<double>(
        ticks / static_cast<double>(::sysconf(_SC_CLK_TCK)));
  }

  // VmRSS, VmSize and the like, in bytes.
  std::size_t memory(const std::string& name) const {
    return status_number(name) << 10;
  }

  // A sanitizer's build reserves terabytes, and is slow to give memory back.
  bool sanitized() const { return memory("VmSize") > (std::size_t{1} << 40); }

  // How often it has gone to sleep: each wait that an event has ended.
  std::size_t sleeps() const {
    return status_number("voluntary_ctxt_switches");
  }

  // Leaves it so many free numbers for descriptors.
  void limit_descriptors(std::size_t free) const {
    rlimit limit{};
    ::prlimit(pid_, RLIMIT_NOFILE, nullptr, &limit);
    limit.rlim_cur = 0;
    for (; free > 0; ++limit.rlim_cur)
      if (!std::filesystem::is_symlink(
              proc("fd/" + std::to_string(limit.rlim_cur))))
        --free;
    ::prlimit(pid_, RLIMIT_NOFILE, &limit, nullptr);
  }

 private:
  struct Pipe {
    explicit Pipe(Stream wanted) : kind(wanted) {
      std::array<int, 2> ends{-1, -1};
      if (kind == Stream::closed) return;
      if (::pipe2(ends.data(), O_CLOEXEC) != 0)
        fail("a pipe", std::strerror(errno));
      reading = Descriptor(ends[0]);
      writing = Descriptor(ends[1]);
      if (kind == Stream::captured) set_nonblocking(reading.get());
      if (kind == Stream::stuffed) ::fcntl(ends[1], F_SETPIPE_SZ, 4096);
      if (kind == Stream::stuffed) unread = std::move(reading);
      if (kind == Stream::broken) reading.close();
    }

    void drain() {
      std::array<char, 65536> bytes;
      while (reading.is_open()) {
        const ssize_t got = ::read(reading.get(), bytes.data(), bytes.size());
        if (got < 0) return;
        if (got == 0) reading.close();
        text.append(bytes.data(), static_cast<std::size_t>(got));
      }
    }

    Stream kind;
    Descriptor reading;
    Descriptor writing;
    Descriptor unread;
    std::string text;
  };

  [[noreturn]] void become(char** arguments, pid_t parent) const {
    ::setpgid(0, 0);
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(127);
    // The program must not profit from what our own caller ignores.
    for (const int number : {SIGPIPE, SIGINT, SIGTERM, SIGHUP})
      ::signal(number, SIG_DFL);
    sigset_t nothing;
    ::sigemptyset(&nothing);
    ::sigprocmask(SIG_SETMASK, &nothing, nullptr);
    connect_stream(STDERR_FILENO, error_);
    connect_stream(STDOUT_FILENO, output_);
    const int input = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
    ::dup2(input, STDIN_FILENO);
    if (closed_input_) ::close(STDIN_FILENO);
    ::execvp(arguments[0], arguments);
    std::fprintf(stderr, "%s: %s\n", arguments[0], std::strerror(errno));
    ::_exit(127);
  }

  // Ends whatever the program has started itself, too. That has to come first:
  // once the program is reaped, its number may be somebody else's.
  void reap() {
    ::kill(-pid_, SIGKILL);
    ::waitpid(pid_, &status_, 0);
    exited_ = true;
  }

  static void connect_stream(int number, const Pipe& pipe) {
    if (pipe.kind == Stream::closed) ::close(number);
    if (pipe.writing.is_open()) ::dup2(pipe.writing.get(), number);
  }

  std::string proc(const std::string& name) const {
    return "/proc/" + std::to_string(pid_) + '/' + name;
  }

  std::size_t status_number(const std::string& name) const {
    std::ifstream file(proc("status"));
    std::string line;
    while (std::getline(file, line)) {
      if (line.starts_with(name + ':'))
        return std::strtoull(line.c_str() + name.size() + 1, nullptr, 10);
    }
    return 0;
  }

  // Fields are counted from behind the program's name, which may hold spaces.
  std::string stat_field(int index) const {
    std::ifstream file(proc("stat"));
    std::string text((std::istreambuf_iterator<char>(file)), {});
    text.erase(0, text.rfind(')') + 1);
    std::istringstream fields(text);
    std::string field;
    for (int i = 0; i <= index; ++i) fields >> field;
    return field;
  }

  bool closed_input_;
  Pipe output_;
  Pipe error_;
  pid_t pid_ = -1;
  Descriptor exit_event_;
  int status_ = 0;
  bool exited_ = false;
};

// ---------------------------------------------------------------------------
// Peers
// ---------------------------------------------------------------------------

enum class End {
  none,           // the stream goes on
  end_of_stream,  // the server sent FIN
  reset,          // the server sent RST
};

// One client of the server. Its socket is driven by the loop of its Room.
class Peer {
 public:
  Peer(std::string name, Descriptor socket)
      : name_(std::move(name)), socket_(std::move(socket)) {}

  std::string inbox;             // what was received and not yet looked at
  bool reads = true;             // takes in what comes
  std::size_t portion = 262144;  // at most so much at a time

  const std::string& name() const { return name_; }
  std::uint16_t port() const { return local_port(socket_.get()); }
  bool connected() const { return socket_.is_open(); }
  End end() const { return end_; }
  bool ended() const { return end_ != End::none; }
  std::size_t unsent() const { return outbox_.size() - sent_; }
  int socket() const { return socket_.get(); }

  // Sends at once what the socket takes, and the rest as it can.
  void say(std::string_view bytes) {
    outbox_ += bytes;
    flush();
  }

  // Half-closes when all is sent: says that no more will come.
  void finish() {
    finishing_ = true;
    flush();
  }

  void leave() { socket_.close(); }

  // Closes by RST instead of FIN.
  void reset() {
    const linger abruptly{1, 0};
    ::setsockopt(socket_.get(), SOL_SOCKET, SO_LINGER, &abruptly,
                 sizeof abruptly);
    socket_.close();
  }

  pollfd waits_for() const {
    const bool wants_to_read = reads && !ended();
    const int events =
        (wants_to_read ? POLLIN : 0) | (unsent() > 0 ? POLLOUT : 0);
    // One with no wish would still be told of hang-ups, over and over.
    return {events != 0 ? socket_.get() : -1, static_cast<short>(events), 0};
  }

  void handle(short ready) {
    if ((ready & (POLLOUT | POLLERR | POLLHUP)) != 0) flush();
    if ((ready & (POLLIN | POLLERR | POLLHUP)) != 0) receive();
  }

  void receive() {
    static std::vector<char> room(262144);
    if (!reads || ended() || !connected()) return;
    const ssize_t got =
        ::recv(socket_.get(), room.data(), std::min(portion, room.size()), 0);
    if (got > 0) {
      inbox.append(room.data(), static_cast<std::size_t>(got));
    } else if (got == 0) {
      end_ = send_failed_ ? End::reset : End::end_of_stream;
    } else if (errno != EAGAIN && errno != EINTR) {
      end_ = End::reset;
    }
  }

  // Takes in all that the kernel has, and is about to get without the server's
  // help.
  void drain_kernel() {
    const bool normally = std::exchange(reads, true);
    pollfd waiting{socket_.get(), POLLIN, 0};
    while (!ended() && ::poll(&waiting, 1, 20) > 0) receive();
    reads = normally;
  }

 private:
  void flush() {
    while (unsent() > 0 && connected()) {
      const ssize_t moved =
          ::send(socket_.get(), outbox_.data() + sent_, unsent(), MSG_NOSIGNAL);
      if (moved < 0 && (errno == EAGAIN || errno == EINTR)) return;
      // A reset, which the kernel tells once only: either here or to receive.
      send_failed_ = send_failed_ || moved < 0;
      sent_ =
          moved < 0 ? outbox_.size() : sent_ + static_cast<std::size_t>(moved);
    }
    outbox_.clear();
    sent_ = 0;
    if (std::exchange(finishing_, false)) ::shutdown(socket_.get(), SHUT_WR);
  }

  std::string name_;
  Descriptor socket_;
  std::string outbox_;
  std::size_t sent_ = 0;
  bool finishing_ = false;
  bool send_failed_ = false;
  End end_ = End::none;
};

inline std::string describe(End end) {
  if (end == End::end_of_stream) return "then end of stream";
  if (end == End::reset) return "then a reset";
  return "and is connected";
}

// ---------------------------------------------------------------------------
// A server and its peers
// ---------------------------------------------------------------------------

// The address in "listening on ADDRESS:PORT" or "listening on unix:PATH", or
// one of size 0.
inline Address parse_listening_line(std::string_view line) {
  constexpr std::string_view start = "listening on ";
  constexpr std::string_view unix_start = "listening on unix:";
  if (line.starts_with(unix_start))
    return unix_address(line.substr(unix_start.size()));
  const auto colon = line.rfind(':');
  if (!line.starts_with(start) || colon == line.npos) return {};
  const std::string host(line.substr(start.size(), colon - start.size()));
  const std::string_view digits = line.substr(colon + 1);
  std::uint16_t port = 0;
  const char* end = digits.data() + digits.size();
  const auto [rest, error] = std::from_chars(digits.data(), end, port);
  if (error != std::errc{} || rest != end || port == 0) return {};
  in_addr ignored;
  if (::inet_pton(AF_INET, host.c_str(), &ignored) == 1)
    return ipv4_loopback(port);
  const bool bracketed = host.starts_with('[') && host.ends_with(']');
  return bracketed ? ipv6_loopback(port) : Address{};
}

struct RoomOptions {
  Streams streams;
  bool broadcasts = false;  // a line reaches the other peers
  bool echoes = false;      // and its sender
  bool many_loops = false;  // what reaches one peer reaches others later
  std::uint16_t port = 0;   // known beforehand: no first line is waited for
};

// A running server and the peers around it.
class Room {
 public:
  explicit Room(const Command& command, RoomOptions options = {})
      : options_(options), server_(command, options.streams) {
    step("start " + command.front());
    if (options_.port != 0) {
      address_ = ipv4_loopback(options_.port);
      wait_until_it_listens();
    } else {
      read_first_line();
    }
    idle_descriptors_ = server_.descriptors();
  }

  Process& server() { return server_; }
  const std::string& first_line() const { return first_line_; }
  std::uint16_t port() const {
    sockaddr_in in;
    std::memcpy(&in, &address_.native, sizeof in);
    return ntohs(in.sin_port);
  }
  std::size_t idle_descriptors() const { return idle_descriptors_; }

  // What the server has printed since its first line.
  std::string_view output() const {
    const std::size_t start = first_line_.empty() ? 0 : first_line_.size() + 1;
    return std::string_view(server_.output()).substr(start);
  }

  // Connects, and no more: the server may not know of it yet. With small
  // segments the server's socket takes 100 KB for it, and not megabytes.
  Peer& connect(int receive_buffer = 0, int segment = 0) {
    Descriptor socket = open_socket(receive_buffer, segment);
    peers_.push_back(std::make_unique<Peer>(next_name(), std::move(socket)));
    return *peers_.back();
  }

  // Connects peers and makes sure that the server counts all of them among
  // those who get lines. Connections are accepted in their order, so it is
  // enough that the last one's greeting reaches everybody else.
  std::vector<Peer*> join(std::size_t count, int receive_buffer = 0,
                          int segment = 0) {
    std::vector<Peer*> joined;
    for (std::size_t i = 0; i < count; ++i)
      joined.push_back(&connect(receive_buffer, segment));
    if (options_.broadcasts) greet(*joined.back());
    return joined;
  }
  Peer& join() { return *join(1).front(); }

  // Ends a peer's part; nobody looks at it any more.
  void forget(const Peer& gone) {
    std::erase_if(peers_,
                  [&](const auto& peer) { return peer.get() == &gone; });
  }

  // Drives all peers until the condition holds. The one way to wait.
  void wait(const Condition& holds, const std::string& expected) {
    const auto deadline = Clock::now() + time_limit();
    while (!holds()) {
      if (!server_.running()) {
        server_.drain();
        fail(expected, server_.fate() + last_words());
      }
      if (Clock::now() > deadline) fail_by_timeout(expected, describe_peers());
      turn(50);
    }
  }

  // Drives all peers for a while: to see what a server does with its time.
  void watch_for(std::chrono::milliseconds duration) {
    const auto deadline = Clock::now() + duration;
    wait([&] { return Clock::now() > deadline; }, "the server goes on");
  }

  void wait_for_output(std::string_view expected) {
    wait([&] { return output().size() >= expected.size(); },
         "it prints " + shown(expected));
    if (output() != expected)
      fail("it prints " + shown(expected), shown(output()));
  }

  // Waits until a peer has received this, and fails on anything else.
  void wait_for_inbox(Peer& peer, std::string_view expected) {
    const std::string what = peer.name() + " gets " + shown(expected);
    wait(
        [&] {
          return peer.inbox.size() >= expected.size() || peer.ended() ||
                 !expected.starts_with(peer.inbox);
        },
        what);
    if (peer.inbox != expected) fail(what, describe_peer(peer));
    peer.inbox.clear();
  }

  void wait_for_end(Peer& peer) {
    wait([&] { return peer.ended(); },
         peer.name() + " is disconnected by the server");
  }

  void wait_for_end_of_stream(Peer& peer) {
    wait_for_end(peer);
    expect_end_of_stream(peer);
  }

  void expect_end_of_stream(const Peer& peer) const {
    if (peer.end() != End::end_of_stream)
      fail(peer.name() + " reads end of stream", describe_peer(peer));
  }

  // Drives all peers until the server has exited, and they know.
  void wait_for_exit(const std::string& expected) {
    const auto deadline = Clock::now() + time_limit();
    const auto knows = [](const auto& peer) {
      return !peer->connected() || !peer->reads || peer->ended();
    };
    while (server_.running() || !std::ranges::all_of(peers_, knows)) {
      if (Clock::now() > deadline)
        fail_by_timeout(expected, server_.fate() + "; " + describe_peers());
      turn(50);
    }
  }

  void reset_all() {
    for (const auto& peer : peers_) peer->reset();
    peers_.clear();
  }

  void wait_for_descriptors(std::size_t most) {
    wait_by_looking(
        [&] {
          turn(0);
          return server_.descriptors() <= most || !server_.running();
        },
        "the server has " + std::to_string(most) + " descriptors open again",
        [&] { return "it has " + std::to_string(server_.descriptors()); });
    if (!server_.running()) fail("the server goes on", server_.fate());
  }

  // Another process whose output is to be read meanwhile.
  void accompany(Process* companion) { companion_ = companion; }

  std::string describe_peer(const Peer& peer) const {
    return peer.name() + " has " + shown(peer.inbox) + ' ' +
           describe(peer.end());
  }

 private:
  void read_first_line() {
    const std::string expected =
        "\"listening on ADDRESS:PORT\" as the first line on standard output";
    const auto deadline = Clock::now() + time_limit();
    while (server_.output().find('\n') == std::string::npos) {
      if (!server_.running()) {
        server_.drain();
        fail(expected, server_.fate() + last_words());
      }
      if (Clock::now() > deadline)
        fail_by_timeout(expected,
                        "standard output has " + shown(server_.output()));
      turn(50);
    }
    first_line_ = server_.output().substr(0, server_.output().find('\n'));
    address_ = parse_listening_line(first_line_);
    if (address_.size == 0) fail(expected, shown(first_line_));
  }

  void wait_until_it_listens() {
    wait_by_looking(
        [&] {
          const Descriptor socket{
              ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)};
          turn(0);
          return !server_.running() ||
                 ::connect(socket.get(), address_.data(), address_.size) == 0;
        },
        "it listens on port " + std::to_string(options_.port),
        [&] { return server_.fate() + last_words(); });
    if (!server_.running())
      fail("it listens on port " + std::to_string(options_.port),
           server_.fate() + last_words());
  }

  Descriptor open_socket(int receive_buffer, int segment) {
    Descriptor socket{::socket(address_.native.ss_family,
                               SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0)};
    if (!socket.is_open()) fail("a socket", std::strerror(errno));
    // Must be set before: it decides the window that is offered.
    if (receive_buffer > 0)
      ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer,
                   sizeof receive_buffer);
    if (segment > 0)
      ::setsockopt(socket.get(), IPPROTO_TCP, TCP_MAXSEG, &segment,
                   sizeof segment);
    const int yes = 1;
    ::setsockopt(socket.get(), IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    const std::string expected = "a peer can connect";
    if (::connect(socket.get(), address_.data(), address_.size) != 0 &&
        errno != EINPROGRESS)
      fail(expected, std::strerror(errno) + ("; " + server_.fate()));
    pollfd waiting{socket.get(), POLLOUT, 0};
    wait([&] { return ::poll(&waiting, 1, 0) == 1; }, expected);
    int error = 0;
    socklen_t size = sizeof error;
    ::getsockopt(socket.get(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error != 0)
      fail(expected, std::strerror(error) + ("; " + server_.fate()));
    return socket;
  }

  // A, B, C ... Z, peer 27 ...
  std::string next_name() {
    const std::size_t number = peers_named_++;
    if (number < 26) return {static_cast<char>('A' + number)};
    return "peer " + std::to_string(number + 1);
  }

  void greet(Peer& newcomer) {
    const std::string greeting = "here is " + newcomer.name() + '\n';
    std::vector<Peer*> witnesses;
    for (const auto& peer : peers_) {
      const bool listens = peer->connected() && peer->reads && !peer->ended();
      if (listens && (options_.echoes || peer.get() != &newcomer))
        witnesses.push_back(peer.get());
    }
    // The first one in the room has nobody to hear it.
    if (witnesses.empty()) return;
    if (options_.many_loops) return greet_again_and_again(newcomer, witnesses);
    newcomer.say(greeting);
    wait(
        [&] {
          return std::ranges::all_of(witnesses, [&](const Peer* peer) {
            return peer->inbox.ends_with(greeting);
          });
        },
        "everybody gets " + shown(greeting));
    for (Peer* peer : witnesses)
      peer->inbox.resize(peer->inbox.size() - greeting.size());
  }

  // Another loop may not have accepted those who came before; and what was said
  // before a newcomer came may reach the newcomer's loop later. So only what is
  // said when all are in is sure to be the last to come.
  void greet_again_and_again(Peer& newcomer,
                             const std::vector<Peer*>& witnesses) {
    const auto everybody_got = [&](const std::string& greeting) {
      return std::ranges::all_of(witnesses, [&](const Peer* peer) {
        return peer->inbox.find(greeting) != std::string::npos;
      });
    };
    const auto deadline = Clock::now() + time_limit();
    for (int attempt = 1;; ++attempt) {
      const std::string greeting = "here is " + newcomer.name() + ", said " +
                                   std::to_string(attempt) + " times\n";
      newcomer.say(greeting);
      const auto pause = Clock::now() + attempt * 50ms;
      wait([&] { return everybody_got(greeting) || Clock::now() > pause; },
           "everybody gets " + shown(greeting));
      if (everybody_got(greeting)) break;
      if (Clock::now() > deadline)
        fail_by_timeout("everybody gets " + shown(greeting), describe_peers());
    }
    watch_for(20ms);
    for (const auto& peer : peers_)
      if (peer->reads) forget_greetings(peer->inbox);
  }

  static void forget_greetings(std::string& inbox) {
    for (auto at = inbox.find("here is "); at != inbox.npos;
         at = inbox.find("here is ", at))
      inbox.erase(at, inbox.find('\n', at) + 1 - at);
  }

  void turn(int milliseconds) {
    waiting_.clear();
    for (const auto& peer : peers_) waiting_.push_back(peer->waits_for());
    server_.add_to(waiting_);
    if (companion_ != nullptr) companion_->add_to(waiting_);
    const auto count = static_cast<nfds_t>(waiting_.size());
    if (::poll(waiting_.data(), count, milliseconds) > 0) {
      for (std::size_t i = 0; i < peers_.size(); ++i) {
        if (waiting_[i].revents != 0) peers_[i]->handle(waiting_[i].revents);
      }
    }
    server_.drain();
    if (companion_ != nullptr) companion_->drain();
  }

  std::string last_words() const {
    if (server_.error().empty()) return "";
    return ", having printed on standard error:\n" + server_.error();
  }

  // The first few stand for all.
  std::string describe_peers() const {
    std::string text;
    int described = 0;
    for (const auto& peer : peers_) {
      if (!peer->connected() || described++ >= 4) continue;
      text += (text.empty() ? "" : "; ") + describe_peer(*peer);
    }
    return text;
  }

  RoomOptions options_;
  Process server_;
  std::string first_line_;
  Address address_;
  std::size_t idle_descriptors_ = 0;
  std::size_t peers_named_ = 0;
  std::vector<std::unique_ptr<Peer>> peers_;
  std::vector<pollfd> waiting_;
  Process* companion_ = nullptr;
};

// A peer sends a line, and everybody named gets it next, and nothing else.
inline void expect_delivery(Room& room, Peer& sender, const std::string& line,
                            const std::vector<Peer*>& receivers) {
  sender.say(line);
  for (Peer* receiver : receivers) room.wait_for_inbox(*receiver, line);
}

// ---------------------------------------------------------------------------
// Many who talk at once
// ---------------------------------------------------------------------------

inline std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const std::size_t length = std::min(text.find('\n'), text.size() - 1) + 1;
    lines.push_back(text.substr(0, length));
    text.remove_prefix(length);
  }
  return lines;
}

// So many lines for each of `count` talkers, each with its letter and a number.
inline std::vector<std::string> make_talk(std::size_t count,
                                          std::size_t lines_each) {
  std::mt19937 random(2024);
  std::uniform_int_distribution<std::size_t> lengths(0, 300);
  std::vector<std::string> talk(count);
  for (std::size_t i = 0; i < count; ++i) {
    const char letter = static_cast<char>('A' + i);
    for (std::size_t k = 0; k < lines_each; ++k)
      talk[i] += letter + std::to_string(k) + ' ' +
                 std::string(lengths(random), letter) + '\n';
  }
  return talk;
}

// Waits until each has all that the others have said, in each one's order.
inline void expect_all_talk(Room& room, const std::vector<Peer*>& peers,
                            const std::vector<std::string>& sent) {
  const std::size_t count = peers.size();
  std::size_t total = 0;
  for (const std::string& text : sent) total += text.size();
  // All of them first: who is not driven meanwhile would seem to be dead.
  for (std::size_t i = 0; i < count; ++i)
    room.wait([&] { return peers[i]->inbox.size() >= total - sent[i].size(); },
              peers[i]->name() + " gets all lines of the others");
  for (std::size_t i = 0; i < count; ++i) {
    // What begins with a letter, put together, must be what that one sent.
    std::vector<std::string> heard(count);
    for (const std::string_view line : lines_of(peers[i]->inbox)) {
      const auto from = static_cast<std::size_t>(line[0] - 'A');
      expect(from < count && from != i,
             peers[i]->name() + " gets lines of the others", shown(line));
      const std::string_view next =
          std::string_view(sent[from]).substr(heard[from].size());
      if (!next.starts_with(line))
        fail("the next line from " + peers[from]->name() + " is " +
                 shown(next.substr(0, next.find('\n') + 1)),
             shown(line));
      heard[from] += line;
    }
    for (std::size_t from = 0; from < count; ++from)
      expect_equal("bytes from " + peers[from]->name(), heard[from].size(),
                   from == i ? 0 : sent[from].size());
  }
}

// ---------------------------------------------------------------------------
// Many megabytes
// ---------------------------------------------------------------------------

// Lines without end, which need no memory to compare with: 1 MiB of numbered
// lines of 1,024 bytes, again and again.
constexpr std::size_t mebibyte = std::size_t{1} << 20;

inline const std::string& block_of_lines() {
  static const std::string block = [] {
    std::string text;
    for (int i = 0; i < 1024; ++i) {
      std::string line = "line " + std::to_string(i) + ' ';
      for (char c = 'a'; line.size() < 1023; c = c == 'z' ? 'a' : char(c + 1))
        line += c;
      text += line + '\n';
    }
    return text;
  }();
  return block;
}

// Checks what one peer gets of them.
class BlockReader {
 public:
  explicit BlockReader(Peer& peer) : peer_(&peer) {}

  std::size_t received() const { return received_; }

  void expect_not_ended(std::size_t total) const {
    if (received_ < total && peer_->ended())
      fail(peer_->name() + " gets " + std::to_string(total) + " bytes",
           std::to_string(received_) + " bytes, " + describe(peer_->end()));
  }

  // Takes in what has come, up to `total` bytes of blocks altogether.
  void take(std::size_t total) {
    const std::string& block = block_of_lines();
    std::string_view inbox = peer_->inbox;
    inbox = inbox.substr(0, total - received_);
    while (!inbox.empty()) {
      const std::size_t place = received_ % block.size();
      const std::string_view expected =
          std::string_view(block).substr(place, inbox.size());
      if (!inbox.starts_with(expected)) report_difference(inbox, expected);
      inbox.remove_prefix(expected.size());
      received_ += expected.size();
      taken_ += expected.size();
    }
    peer_->inbox.erase(0, std::exchange(taken_, 0));
  }

 private:
  [[noreturn]] void report_difference(std::string_view got,
                                      std::string_view expected) const {
    const auto [here, there] = std::ranges::mismatch(got, expected);
    const auto at = static_cast<std::size_t>(here - got.begin());
    fail(peer_->name() + " gets " + shown(expected.substr(at, 40)) + " after " +
             std::to_string(received_ + at) + " bytes",
         shown(got.substr(at, 40)));
  }

  Peer* peer_;
  std::size_t received_ = 0;
  std::size_t taken_ = 0;
};

// Sends so many blocks and waits until the readers have all of them. The
// sender never runs far ahead of them: a peer that reads is never so late that
// a server may drop it.
inline void send_blocks(Room& room, Peer& sender, std::vector<Peer*> readers,
                        std::size_t blocks) {
  constexpr std::size_t window = 16 * mebibyte;
  const std::size_t total = blocks * mebibyte;
  std::vector<BlockReader> received;
  for (Peer* reader : readers) received.emplace_back(*reader);
  std::size_t sent = 0;
  room.wait(
      [&] {
        std::size_t least = total;
        for (BlockReader& reader : received) {
          reader.take(total);
          reader.expect_not_ended(total);
          least = std::min(least, reader.received());
        }
        while (sent < total && sent - least < window && sender.unsent() == 0) {
          sender.say(block_of_lines());
          sent += mebibyte;
        }
        return least == total;
      },
      std::to_string(blocks) + " MiB reach those who read");
}

}  // namespace peers

#endif  // TESTS_PEERS_HPP
