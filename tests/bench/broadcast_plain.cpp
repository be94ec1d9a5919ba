// A chat server in plain epoll: what one client says, all others hear. The
// same, and as much of it, as broadcast_edgewise.cpp. It ends with its last
// client.

#include "plain.hpp"

using namespace plain;

namespace {

// The tokens of clients whose output was empty before this turn.
std::uint64_t* unsent;
std::size_t unsent_count;
std::size_t unsent_capacity;

void note_unsent(int fd) {
  if (unsent_count == unsent_capacity) {
    unsent_capacity = unsent_capacity == 0 ? 64 : 2 * unsent_capacity;
    unsent = static_cast<std::uint64_t*>(
        std::realloc(unsent, unsent_capacity * sizeof *unsent));
    if (unsent == nullptr) die("out of memory");
  }
  unsent[unsent_count++] = token_of(fd);
}

void broadcast(int sender, const char* line, std::size_t length) {
  for (int fd = 0; fd <= last_client; ++fd) {
    Client* const client = &clients[fd];
    if (client->generation % 2 == 0 || fd == sender || client->too_slow)
      continue;
    if (client->output.begin == client->output.end) note_unsent(fd);
    if (append(&client->output, line, length)) continue;
    client->too_slow = true;
    note_unsent(fd);
  }
}

// False if the line is too long.
bool take_line(Client* client, int fd, const char* line, std::size_t length) {
  Partial* const partial = &client->partial;
  if (partial->size + length > longest_line) return false;
  if (partial->size == 0) {
    broadcast(fd, line, length);
  } else {
    keep(partial, line, length);
    broadcast(fd, partial->data, partial->size);
    forget(partial);
  }
  return true;
}

bool take_lines(Client* client, int fd, std::size_t count) {
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
    if (!take_line(client, fd, line, static_cast<std::size_t>(next - line)))
      return false;
    line = next;
  }
  return true;
}

// The client says nothing more: it is sent what is queued, then closed.
bool finish(Client* client, int fd) {
  if (client->partial.size > 0 && !take_line(client, fd, "\n", 1)) return false;
  client->finished = true;
  if (client->output.begin == client->output.end) return false;
  set_interest(fd, client->awaits_room ? EPOLLOUT : 0U);
  return true;
}

// False if the client is of no more use.
bool read_client(Client* client, int fd) {
  const ssize_t count = read_once(fd);
  if (count > 0) return take_lines(client, fd, static_cast<std::size_t>(count));
  return count < 0 ? errno == EAGAIN : finish(client, fd);
}

void flush_client(Client* client, int fd) {
  if (client->too_slow) return drop(client, fd);
  const Flushed flushed = flush(&client->output, fd);
  const bool blocked = flushed == flush_blocked;
  if (flushed == flush_failed || (client->finished && !blocked))
    return drop(client, fd);
  if (client->awaits_room == blocked) return;
  client->awaits_room = blocked;
  const std::uint32_t reading = client->finished ? 0U : EPOLLIN | EPOLLRDHUP;
  set_interest(fd, reading | (blocked ? EPOLLOUT : 0U));
}

void serve(Client* client, int fd, std::uint32_t events) {
  const bool readable =
      (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
  if (readable && !client->finished && !read_client(client, fd))
    return drop(client, fd);
  if ((events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0)
    flush_client(client, fd);
}

void flush_unsent() {
  for (std::size_t each = 0; each < unsent_count; ++each)
    if (Client* const client = find(unsent[each]))
      flush_client(client, static_cast<int>(client - clients));
  unsent_count = 0;
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
    flush_unsent();
  } while (client_count > 0);
  return 0;
}
