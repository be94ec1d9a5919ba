// One of two source files that include the header and between them use all of
// it. They link into one program: what the header defines, it defines once.
//
// tests/compile_alone also compiles both with every compiler that it finds, and
// tests/portability runs the program on other machines' processors.
#include <chrono>
#include <cstdio>
#include <edgewise.hpp>
#include <string>
#include <utility>

using namespace edgewise;

// In the other file; the same by another name.
bool other_file_works();
bool other_file_changes(Slab<std::string>& slab, Token token);
const char* other_file_block();
const void* other_file_address_of_listen();

namespace {

constexpr std::chrono::seconds patience{10};

bool poller_works() {
  Poller poller;
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  poller.add(listener, Token{1}, Interest::readable, Mode::edge);
  poller.modify(listener, Token{2}, Interest::readable | Interest::priority,
                Mode::edge | Mode::oneshot);
  poller.set(listener, Token{3}, Interest::readable);
  const Connected client = connect(local_address(listener));
  if (client.failed() || client.refused() || client.timed_out()) return false;
  for (const Event& event : poller.wait(patience))
    if (event.token() != Token{3} || !event.readable() || event.writable() ||
        event.priority() || event.error() || event.hang_up() ||
        event.read_closed() || to_string(event) != "token 3: readable")
      return false;
  const Accepted accepted = accept(listener);
  if (!accepted.ok() || !poller.remove(listener)) return false;
  if (poller.try_add(client.fd, Token{4}, Interest::writable)) return false;
  const Events events =
      poller.wait_until(std::chrono::steady_clock::time_point{});
  if (events.empty() || (events[0].bits() & EPOLLOUT) == 0) return false;
  return finish_connect(client.fd).ok() &&
         accepted.peer == local_address(client.fd);
}

// A poller may watch another; an exclusive listener is one that it shares.
bool pollers_nest() {
  Poller inner{1};
  Poller outer;
  const Pipe pipe = open_pipe();
  inner.add(pipe.reader, Token{1}, Interest::readable, Mode::exclusive);
  outer.add(inner, Token{2}, Interest::readable);
  if (!outer.wait(std::chrono::nanoseconds{1}).empty()) return false;
  return write(pipe.writer, "a").ok() && outer.wait().size() == 1 &&
         inner.wait_until(std::chrono::steady_clock::now() + patience).size() ==
             1;
}

bool bytes_work() {
  const Pipe pipe = open_pipe();
  WriteBuffer output{WriteLimits{}};
  if (!output.append("one line\nand ") || output.size() != 13) return false;
  if (output.above_high_water() || !output.flush(pipe.writer).ok())
    return false;
  std::string text = "another\n";
  const ::iovec piece{text.data(), text.size()};
  if (!writev(pipe.writer, {&piece, 1}).ok()) return false;
  if (!write(pipe.writer, "rest").ok() || !output.empty()) return false;
  LineBuffer lines;
  shutdown_write(pipe.writer);  // no socket: nothing happens
  if (lines.fill(pipe.reader).bytes != 25) return false;
  if (lines.next() != "one line\n" || lines.next() != "and another\n")
    return false;
  char room[1];
  return !lines.next() && lines.rest() == "rest" && !lines.overlong() &&
         read(pipe.reader, room).would_block();
}

// In both states of the destroyed queue: with bytes in it, and moved from.
bool buffers_move() {
  LineBuffer lines;
  lines.prepare()[0] = 'a';
  lines.commit(1);
  LineBuffer moved = std::move(lines);
  lines = std::move(moved);
  return !lines.next() && lines.rest() == "a";
}

bool slab_works() {
  Slab<std::string> slab;
  const auto [token, value] = slab.emplace("value");
  if (!other_file_changes(slab, token) || value != "changed") return false;
  for (auto entry : slab)
    if (entry.token != token) return false;
  const Slab<std::string>& view = slab;
  for (auto entry : view)
    if (&entry.value != view.find(token)) return false;
  if (slab.size() != 1 || !slab.erase(token) || slab.find(token)) return false;
  static_cast<void>(slab.emplace(3U, 'a'));
  slab.clear();
  return slab.empty();
}

bool log_works() {
  const SocketPair first = open_socket_pair();
  const SocketPair second = open_socket_pair();
  BroadcastLog log{4096};
  BroadcastLog::Cursor sender = log.join();
  BroadcastLog::Cursor other;
  other = log.join();
  if (!log.append("to all\n") || !log.append("to one\n", &sender) ||
      !log.append("to all\n"))
    return false;
  if (log.size() != 21 || log.room() >= log.capacity()) return false;
  if (log.flush(first.first, sender).bytes != 14 || sender.behind() != 0)
    return false;
  const BroadcastLog::Cursor moved = std::move(other);
  if (log.flush(second.first, moved, 8).bytes != 8 || moved.behind() != 13)
    return false;
  char room[32];
  return log.flush(second.first, moved).ok() && log.empty() &&
         drain(first.second, room).bytes == 14 &&
         drain(second.second, room).bytes == 21;
}

bool words_work() {
  return to_string(IoResult{5, IoStatus::would_block, 0}) ==
             "5 bytes, would block" &&
         to_string(Interest::readable | Interest::writable) ==
             "readable, writable" &&
         to_string(Mode::edge | Mode::oneshot) == "edge-triggered, one-shot" &&
         to_string(accept(FdView{-1})) == "failed: Bad file descriptor" &&
         to_string(ConnectResult{}) == "connected";
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

bool this_file_works() {
  if (!poller_works()) return fails("the poller, in the first file");
  if (!pollers_nest()) return fails("nested pollers, in the first file");
  if (!bytes_work()) return fails("the buffers, in the first file");
  if (!buffers_move()) return fails("moving buffers, in the first file");
  if (!slab_works()) return fails("the slab, in the first file");
  if (!log_works()) return fails("the broadcast log, in the first file");
  if (!words_work()) return fails("the words, in the first file");
  return true;
}

bool all_works() {
  if (!this_file_works()) return false;
  if (!other_file_works()) return fails("something in the second file");
  if (block() != other_file_block()) return fails("two sets of spare blocks");
  const auto address = reinterpret_cast<const void*>(&edgewise::listen);
  if (address != other_file_address_of_listen())
    return fails("two functions listen");
  return true;
}

}  // namespace

int main() { return all_works() ? 0 : 1; }
