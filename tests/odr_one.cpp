// One of two source files that include the header and use all of it. They link
// into one program: what the header defines, it defines once.
#include <fcntl.h>

#include <cstdio>
#include <edgewise.hpp>
#include <string>

using namespace edgewise;

// In the other file; the same by another name.
bool other_file_works();
const char* other_file_block();
const void* other_file_address_of_listen();

namespace {

bool poller_works() {
  Poller poller;
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  poller.add(listener, Token{1}, Interest::readable, Mode::edge);
  poller.modify(listener, Token{2}, Interest::readable | Interest::priority);
  poller.set(listener, Token{3}, Interest::readable);
  const Connected client = connect(local_address(listener));
  if (client.failed()) return false;
  for (const Event& event : poller.wait(std::chrono::seconds{5}))
    if (event.token() != Token{3} || !event.readable()) return false;
  const Accepted accepted = accept(listener);
  if (!accepted.ok() || !poller.remove(listener)) return false;
  if (poller.try_add(client.fd, Token{4}, Interest::writable)) return false;
  if (poller.wait_until(std::chrono::steady_clock::time_point{}).empty())
    return false;
  return finish_connect(client.fd).ok() &&
         accepted.peer == local_address(client.fd);
}

bool bytes_work() {
  int ends[2];
  if (::pipe2(ends, O_NONBLOCK | O_CLOEXEC) != 0) return false;
  const Fd from{ends[0]};
  const Fd to{ends[1]};
  WriteBuffer output;
  if (!output.append("one line\nand ") || !output.flush(to).ok()) return false;
  std::string text = "another\n";
  const ::iovec piece{text.data(), text.size()};
  if (!writev(to, {&piece, 1}).ok() || !write(to, "rest").ok()) return false;
  LineBuffer lines;
  shutdown_write(to);  // no socket: nothing happens
  if (lines.fill(from).bytes != 25) return false;
  if (lines.next() != "one line\n" || lines.next() != "and another\n")
    return false;
  char room[1];
  return !lines.next() && lines.rest() == "rest" &&
         read(from, room).would_block();
}

// The spare block that this thread gives to whoever asks.
const char* block() {
  LineBuffer lines;
  const char* const address = lines.prepare().data();
  lines.commit(0);
  return address;
}

bool fails(const char* what) {
  std::fprintf(stderr, "odr: %s\n", what);
  return false;
}

bool all_works() {
  if (!poller_works()) return fails("the poller, in the first file");
  if (!bytes_work()) return fails("the buffers, in the first file");
  if (!other_file_works()) return fails("something in the second file");
  if (block() != other_file_block()) return fails("two sets of spare blocks");
  const auto address = reinterpret_cast<const void*>(&edgewise::listen);
  if (address != other_file_address_of_listen())
    return fails("two functions listen");
  return true;
}

}  // namespace

int main() { return all_works() ? 0 : 1; }
