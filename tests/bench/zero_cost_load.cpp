// The load for zero_cost: it starts a server, gives it work that is the same
// every time, and checks every byte that comes back. KIND says what the server
// does: echo, line_echo or broadcast; or rat, which broadcasts, too, but ends
// only when it is told to.
//
//   zero_cost_load KIND CLIENTS ROUNDS BATCHES -- SERVER...
//
// In each round one client after the other sends a line, and in each batch 16
// lines at once; the next does so only when all that is due has arrived. So the
// server is woken, reads and sends the same number of times however busy the
// machine is.
//
//   zero_cost_load trials KIND -- SERVER...
//
// tries what costs nothing as long as it does not happen: lines in pieces and
// too long ones, a peer that reads nothing for a while, half-closes and resets.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

constexpr int patience = 20;  // seconds, for whatever is waited for

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "zero_cost_load: %s\n", what.c_str());
  std::exit(1);
}

// A server that was started here, which ends with its last client.
class Server {
 public:
  explicit Server(char** command) {
    int ends[2];
    if (pipe(ends) != 0 || (pid_ = fork()) < 0) die("cannot start a server");
    if (pid_ == 0) {
      dup2(ends[1], STDOUT_FILENO);
      close(ends[0]);
      close(ends[1]);
      execvp(*command, command);
      std::perror(*command);
      std::_Exit(127);
    }
    close(ends[1]);
    // The last number of its first line.
    std::FILE* const said = fdopen(ends[0], "r");
    for (int byte = 0; (byte = std::getc(said)) != EOF && byte != '\n';)
      port_ = byte < '0' || byte > '9' ? 0 : port_ * 10 + (byte - '0');
    if (port_ == 0) die("the server names no port");
    std::fclose(said);
  }

  std::uint16_t port() const { return static_cast<std::uint16_t>(port_); }

  void stop() const { kill(pid_, SIGTERM); }

  void join() const {
    int status = 0;
    if (waitpid(pid_, &status, 0) != pid_ || status != 0)
      die("the server failed");
  }

 private:
  pid_t pid_ = 0;
  int port_ = 0;
};

class Peer {
 public:
  explicit Peer(const Server& server) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(server.port());
    const timeval limit{patience, 0};
    const int one = 1;
    if (setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) != 0 ||
        setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) != 0 ||
        setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0 ||
        connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) !=
            0)
      die("cannot connect");
  }
  Peer(Peer&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  Peer& operator=(Peer&&) = delete;
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;
  ~Peer() {
    if (fd_ >= 0) close(fd_);
  }

  void say(std::string_view bytes) const {
    while (!bytes.empty()) {
      const ssize_t count = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (count <= 0) die("cannot send");
      bytes.remove_prefix(static_cast<std::size_t>(count));
    }
  }

  void hear(std::string_view expected) const {
    static char room[1 << 16];
    while (!expected.empty()) {
      const std::size_t most = std::min(expected.size(), sizeof room);
      const ssize_t count = recv(fd_, room, most, 0);
      if (count <= 0) die("too little comes back");
      const std::string_view got(room, static_cast<std::size_t>(count));
      if (!expected.starts_with(got)) die("something else comes back");
      expected.remove_prefix(got.size());
    }
  }

  // The server closes, in whatever way, without another byte.
  void hear_end() const {
    char byte;
    const ssize_t count = recv(fd_, &byte, 1, 0);
    if (count > 0) die("more comes back than was due");
    if (count < 0 && errno == EAGAIN) die("the server does not close");
  }

  void finish() const { shutdown(fd_, SHUT_WR); }
  void reset() const {
    const linger now{1, 0};
    setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
  }

 private:
  int fd_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
};

bool echoes(std::string_view kind) { return kind.ends_with("echo"); }

std::string lines(std::size_t count, std::size_t length) {
  std::string text;
  for (std::size_t line = 0; line < count; ++line) {
    std::string one(length - 1, static_cast<char>('a' + line % 26));
    text += one + '\n';
  }
  return text;
}

// Each says something, and those who are due to hear it do.
void converse(bool echo, const std::vector<Peer>& peers,
              const std::string& text) {
  for (const Peer& sender : peers) {
    sender.say(text);
    for (const Peer& peer : peers)
      if (echo == (&peer == &sender)) peer.hear(text);
  }
}

void work(bool echo, const Server& server, std::size_t clients,
          std::size_t rounds, std::size_t batches) {
  std::vector<Peer> peers;
  for (std::size_t each = 0; each < clients; ++each) {
    peers.emplace_back(server);
    // What comes back shows that the server has accepted it, and all before it.
    if (echo || each > 0) peers.back().say("me\n");
    if (echo) peers.back().hear("me\n");
    if (!echo)
      for (std::size_t other = 0; other < each; ++other)
        peers[other].hear("me\n");
  }
  for (; rounds > 0; --rounds) converse(echo, peers, lines(1, 64));
  for (; batches > 0; --batches) converse(echo, peers, lines(16, 64));
  // One after the other too, so that each end is an event by itself.
  for (const Peer& peer : peers) {
    peer.finish();
    peer.hear_end();
  }
}

// Who does not read is waited for, and misses nothing.
void try_slow_reader(const Peer& from, const Peer& to) {
  const std::string text = lines(1 << 18, 64);
  constexpr std::size_t piece = 1 << 16;
  std::atomic<std::size_t> sent = 0;
  std::thread sender([&] {
    while (sent < text.size()) {
      from.say(std::string_view(text).substr(sent, piece));
      sent += piece;
    }
  });
  // Begins to read when nothing moves any more.
  for (std::size_t before = 1; before != sent; usleep(900'000)) before = sent;
  to.hear(text);
  sender.join();
}

void try_pieces(const Peer& from, const Peer& to) {
  for (const char byte : std::string_view("in pieces\n")) {
    from.say({&byte, 1});
    usleep(1000);
  }
  to.hear("in pieces\n");
  from.say("one\ntwo\nthr");
  to.hear("one\ntwo\n");
  from.say("ee\n");
  to.hear("three\n");
  const std::string longest = lines(1, 65536);
  from.say(longest);
  to.hear(longest);
}

void trials(std::string_view kind, const Server& server) {
  const bool echo = echoes(kind);
  const Peer one(server);
  const Peer two(server);
  const Peer& to = echo ? one : two;
  // What comes back shows that the server has accepted both.
  two.say("from two\n");
  (echo ? two : one).hear("from two\n");
  try_pieces(one, to);
  try_slow_reader(one, to);
  for (int times = 0; times < 3; ++times) {
    if (kind != "echo") {
      const Peer too_long(server);
      too_long.say(std::string(65536, 'x'));
      too_long.hear_end();
    }
    Peer gone(server);
    gone.reset();
  }
  try_pieces(one, to);
  if (echo) {
    one.say("the end");
    one.finish();
    one.hear("the end");
    one.hear_end();
    return;
  }
  one.say("the end");
  one.finish();
  two.hear("the end\n");
  one.hear_end();
}

}  // namespace

int main(int argc, char** argv) {
  const std::vector<std::string_view> words(argv + 1, argv + argc);
  const auto dashes = std::find(words.begin(), words.end(), "--");
  const auto count = static_cast<std::size_t>(dashes - words.begin());
  if (dashes == words.end() || dashes + 1 == words.end() ||
      (count != 2 && count != 4))
    die("see the comment at the top of its source");
  const Server server(argv + 2 + count);
  if (count == 2) {
    trials(words[1], server);
  } else {
    work(echoes(words[0]), server, std::stoul(argv[2]), std::stoul(argv[3]),
         std::stoul(argv[4]));
  }
  if (words[0] == "rat") server.stop();
  server.join();
  return 0;
}
