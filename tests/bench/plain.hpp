// What the plain servers have in common: epoll by hand, as C programmers write
// it, with the features and the safety of edgewise's parts and nothing of
// edgewise. zero_cost counts what the servers on the header execute beyond it.
#ifndef EDGEWISE_BENCH_PLAIN_HPP
#define EDGEWISE_BENCH_PLAIN_HPP

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace plain {

constexpr std::size_t read_size = 65536;
constexpr std::size_t longest_line = 65536;
constexpr std::size_t output_bound = std::size_t{64} << 20;
constexpr std::size_t first_block = 4096;
constexpr std::size_t most_spares = 1024;
constexpr int batch = 256;
constexpr std::uint64_t listener_token = 0;

[[noreturn]] inline void die(const char* what) {
  std::perror(what);
  std::exit(1);
}

// The piece of a line whose end has not come. Idle, it owns nothing.
struct Partial {
  char* data;
  std::size_t size;
  std::size_t capacity;
};

// What the socket has not taken yet. Idle, it owns nothing.
struct Output {
  char* data;
  std::size_t begin;
  std::size_t end;
  std::size_t capacity;
};

// Every read goes here: one client's bytes are all handled before the next
// client is read, and what is left of them is a piece of a line.
inline char input[read_size];

// Blocks of outputs that are empty now, in a list through their first bytes.
inline char* spares = nullptr;
inline std::size_t spare_count = 0;

inline ssize_t read_once(int fd) {
  ssize_t count;
  do {
    count = read(fd, input, sizeof input);
  } while (count < 0 && errno == EINTR);
  return count;
}

inline ssize_t send_once(int fd, const char* bytes, std::size_t size) {
  ssize_t count;
  do {
    count = send(fd, bytes, size, MSG_NOSIGNAL);
  } while (count < 0 && errno == EINTR);
  return count;
}

// Adds to a piece of a line. The greatest length is the caller's to check.
inline void keep(Partial* partial, const char* bytes, std::size_t count) {
  if (count > partial->capacity - partial->size) {
    std::size_t capacity = 2 * partial->capacity;
    if (capacity < partial->size + count) capacity = partial->size + count;
    partial->data = static_cast<char*>(std::realloc(partial->data, capacity));
    if (partial->data == nullptr) die("out of memory");
    partial->capacity = capacity;
  }
  std::memcpy(partial->data + partial->size, bytes, count);
  partial->size += count;
}

inline void forget(Partial* partial) {
  std::free(partial->data);
  *partial = Partial{};
}

// Sees to room at the end, which was too small. False: out of memory.
inline bool make_room(Output* output, std::size_t count) {
  if (output->capacity == 0 && count <= first_block && spares != nullptr) {
    output->data = spares;
    std::memcpy(&spares, output->data, sizeof spares);
    --spare_count;
    output->capacity = first_block;
    return true;
  }
  const std::size_t size = output->end - output->begin;
  if (size + count <= output->capacity && size <= 4 * output->begin) {
    std::memmove(output->data, output->data + output->begin, size);
  } else {
    std::size_t capacity = first_block;
    while (capacity < size + count + size / 4) capacity *= 2;
    char* const data = static_cast<char*>(std::malloc(capacity));
    if (data == nullptr) return false;
    if (size > 0) std::memcpy(data, output->data + output->begin, size);
    std::free(output->data);
    output->data = data;
    output->capacity = capacity;
  }
  output->begin = 0;
  output->end = size;
  return true;
}

// Queues all of it, or nothing: false if the bound would be passed.
inline bool append(Output* output, const char* bytes, std::size_t count) {
  if (count > output_bound - (output->end - output->begin)) return false;
  if (count > output->capacity - output->end && !make_room(output, count))
    return false;
  std::memcpy(output->data + output->end, bytes, count);
  output->end += count;
  return true;
}

inline void discard(Output* output) {
  if (output->capacity == first_block && spare_count < most_spares) {
    std::memcpy(output->data, &spares, sizeof spares);
    spares = output->data;
    ++spare_count;
  } else {
    std::free(output->data);
  }
  *output = Output{};
}

enum Flushed { flush_done, flush_blocked, flush_failed };

// Sends once. A partial write is proof enough that the socket is full.
inline Flushed flush(Output* output, int fd) {
  const std::size_t size = output->end - output->begin;
  if (size == 0) return flush_done;
  ssize_t count;
  do {
    count = send(fd, output->data + output->begin, size, MSG_NOSIGNAL);
  } while (count < 0 && errno == EINTR);
  if (count < 0) return errno == EAGAIN ? flush_blocked : flush_failed;
  output->begin += static_cast<std::size_t>(count);
  if (output->begin != output->end) return flush_blocked;
  discard(output);
  return flush_done;
}

struct Client {
  std::uint32_t generation;  // odd while there is a client
  bool awaits_room;
  bool finished;
  bool too_slow;
  Partial partial;
  Output output;
};

inline int epoll;
inline int listener;
inline Client* clients;  // by descriptor
inline std::size_t table_size;
inline int last_client;  // the greatest descriptor that a client ever had
inline std::size_t client_count;

inline std::uint64_t token_of(int fd) {
  return std::uint64_t{clients[fd].generation} << 32 |
         static_cast<std::uint32_t>(fd);
}

// The client whom a token means, or nullptr if he is gone.
inline Client* find(std::uint64_t token) {
  const std::uint32_t fd = static_cast<std::uint32_t>(token);
  if (fd >= table_size || clients[fd].generation != token >> 32) return nullptr;
  return &clients[fd];
}

inline bool control(int operation, int fd, std::uint64_t token,
                    std::uint32_t interest) {
  epoll_event event{};
  event.events = interest;
  event.data.u64 = token;
  return epoll_ctl(epoll, operation, fd, &event) == 0;
}

inline void make_place(int fd) {
  if (fd > last_client) last_client = fd;
  const std::size_t needed = static_cast<std::size_t>(fd) + 1;
  if (needed <= table_size) return;
  const std::size_t size = needed < 64 ? 64 : 2 * needed;
  void* const table = std::realloc(clients, size * sizeof *clients);
  if (table == nullptr) die("out of memory");
  clients = static_cast<Client*>(table);
  for (; table_size < size; ++table_size) clients[table_size] = Client{};
}

inline void accept_clients() {
  for (;;) {
    const int fd =
        accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0 && (errno == EINTR || errno == ECONNABORTED)) continue;
    if (fd < 0) return;
    make_place(fd);
    ++clients[fd].generation;
    if (control(EPOLL_CTL_ADD, fd, token_of(fd), EPOLLIN | EPOLLRDHUP)) {
      ++client_count;
    } else {
      ++clients[fd].generation;
      close(fd);
    }
  }
}

inline void drop(Client* client, int fd) {
  epoll_ctl(epoll, EPOLL_CTL_DEL, fd, nullptr);
  close(fd);
  forget(&client->partial);
  discard(&client->output);
  const std::uint32_t generation = client->generation + 1;
  *client = Client{};
  client->generation = generation;
  --client_count;
}

inline void set_interest(int fd, std::uint32_t interest) {
  if (!control(EPOLL_CTL_MOD, fd, token_of(fd), interest)) die("epoll_ctl");
}

inline int wait_for_events(epoll_event* events) {
  int ready;
  do {
    ready = epoll_wait(epoll, events, batch, -1);
  } while (ready < 0 && errno == EINTR);
  if (ready < 0) die("epoll_wait");
  return ready;
}

// Listens on 127.0.0.1 and says on standard output at which port.
inline void start() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  const int one = 1;
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  if (fd < 0 ||
      setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) != 0 ||
      setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) != 0 ||
      bind(fd, reinterpret_cast<sockaddr*>(&address), size) != 0 ||
      listen(fd, SOMAXCONN) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0)
    die("listen");
  listener = fd;
  epoll = epoll_create1(EPOLL_CLOEXEC);
  if (!control(EPOLL_CTL_ADD, fd, listener_token, EPOLLIN)) die("epoll");
  std::printf("%d\n", ntohs(address.sin_port));
  std::fflush(stdout);
}

}  // namespace plain

#endif
