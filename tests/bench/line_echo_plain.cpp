// An echo server in plain epoll, line by line: each line goes back to whoever
// sent it, and one that is too long ends its client. The same, and as much of
// it, as line_echo_edgewise.cpp. It ends with its last client.

#include "plain.hpp"

using namespace plain;

namespace {

// False if the line is too long, or too much is queued.
bool echo_line(Client* client, const char* line, std::size_t length) {
  Partial* const partial = &client->partial;
  if (partial->size + length > longest_line) return false;
  if (partial->size == 0) return append(&client->output, line, length);
  keep(partial, line, length);
  const bool queued = append(&client->output, partial->data, partial->size);
  forget(partial);
  return queued;
}

bool echo_lines(Client* client, std::size_t count) {
  const char* line = input;
  const char* const end = line + count;
  while (line != end) {
    const std::size_t left = static_cast<std::size_t>(end - line);
    const void* const newline = std::memchr(line, '\n', left);
    if (newline == nullptr) {
      if (client->partial.size + left >= longest_line) return false;
      keep(&client->partial, line, left);
      return true;
    }
    const char* const next = static_cast<const char*>(newline) + 1;
    if (!echo_line(client, line, static_cast<std::size_t>(next - line)))
      return false;
    line = next;
  }
  return true;
}

// False if the client is of no more use.
bool read_client(Client* client, int fd) {
  const ssize_t count = read_once(fd);
  if (count > 0) return echo_lines(client, static_cast<std::size_t>(count));
  if (count < 0) return errno == EAGAIN;
  client->finished = true;
  return client->partial.size == 0 ||
         append(&client->output, client->partial.data, client->partial.size);
}

void serve(Client* client, int fd, std::uint32_t events) {
  const bool readable =
      (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
  if (readable && !client->awaits_room && !read_client(client, fd))
    return drop(client, fd);
  const Flushed flushed = flush(&client->output, fd);
  if (flushed == flush_failed) return drop(client, fd);
  const bool blocked = flushed == flush_blocked;
  if (client->finished && !blocked) return drop(client, fd);
  if (client->awaits_room == blocked) return;
  client->awaits_room = blocked;
  // While its socket is full, a client is not read from.
  set_interest(fd, blocked ? EPOLLOUT : EPOLLIN | EPOLLRDHUP);
}

}  // namespace

int main() {
  start();
  static epoll_event events[batch];
  do {
    const int ready = wait_for_events(events);
    for (int i = 0; i < ready; ++i) {
      const std::uint64_t token = events[i].data.u64;
      if (token == listener_token) {
        accept_clients();
      } else if (Client* const client = find(token)) {
        serve(client, static_cast<int>(client - clients), events[i].events);
      }
    }
  } while (client_count > 0);
  return 0;
}
