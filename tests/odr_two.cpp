// The other of the two source files: see odr_one.cpp.
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <edgewise.hpp>
#include <edgewise.hpp>  // twice is as good as once
#include <string>
#include <utility>

bool other_file_works();
bool other_file_changes(edgewise::Slab<std::string>& slab,
                        edgewise::Token token);
const char* other_file_block();
const void* other_file_address_of_listen();

namespace {

constexpr std::chrono::seconds patience{10};

bool becomes_readable(edgewise::FdView fd) {
  edgewise::Poller poller{1};
  poller.add(fd, edgewise::Token{1}, edgewise::Interest::readable);
  return poller.wait(patience).size() == 1;
}

bool addresses_work() {
  for (const std::string text :
       {"127.0.0.1:80", "[::1]:80", "[fe80::1%1]:80", "unix:/run/socket"}) {
    const auto address = edgewise::Address::parse(text);
    if (!address) return false;
    const auto same =
        edgewise::Address::from_native(address->data(), address->size());
    if (same != *address || (same.port() == 80) != (same.family() != AF_UNIX))
      return false;
    // The kernel may know interface 1 by a name.
    if (text[1] != 'f' && same.to_string() != text) return false;
  }
  return edgewise::Address().to_string() == "unspecified";
}

bool sockets_work() {
  const edgewise::Fd listener = edgewise::listen(
      *edgewise::Address::from("127.0.0.1", 0), edgewise::ListenOptions{});
  const edgewise::Connected client = edgewise::connect(
      edgewise::local_address(listener), edgewise::ConnectOptions{});
  if (client.failed() || !becomes_readable(listener)) return false;
  edgewise::Accepted accepted = edgewise::accept(listener);
  if (!accepted.ok()) return false;
  const edgewise::Fd socket = std::move(accepted.fd);

  edgewise::WriteBuffer output;
  if (!output.append("hello\n") || !output.flush(socket).ok()) return false;
  edgewise::Poller poller;
  poller.set(client.fd, edgewise::Token{2}, edgewise::Interest::readable);
  if (poller.wait(patience).size() != 1) return false;
  edgewise::LineBuffer lines;
  return lines.fill(client.fd).ok() && lines.next() == "hello\n" &&
         !lines.next();
}

bool reserve_works() {
  const edgewise::Fd listener =
      edgewise::listen(*edgewise::Address::from_path(""));
  const edgewise::Connected client =
      edgewise::connect(edgewise::local_address(listener));
  edgewise::Reserve reserve;
  if (!client.ok() || !reserve.shed(listener, "full\n")) return false;
  char room[8];
  return edgewise::drain(client.fd, room).end_of_stream() &&
         !reserve.shed(listener, "full\n");
}

bool datagrams_work() {
  const auto any = *edgewise::Address::parse("127.0.0.1:0");
  const edgewise::Fd first = edgewise::bind_datagram(any);
  const edgewise::Fd second = edgewise::bind_datagram(any);
  const edgewise::Address to = edgewise::local_address(second);
  if (!edgewise::send_to(first, "hello", to).ok()) return false;
  if (!becomes_readable(second)) return false;
  char room[8];
  const edgewise::Received got = edgewise::receive(second, room);
  return got.ok() && got.bytes == 5 && !got.truncated &&
         got.from == edgewise::local_address(first);
}

bool descriptors_pass() {
  const edgewise::SocketPair pair =
      edgewise::open_socket_pair(edgewise::SocketType::datagram);
  edgewise::Pipe pipe = edgewise::open_pipe();
  if (!edgewise::send_fd(pair.first, "a", pipe.writer).ok()) return false;
  pipe.writer.reset();
  char room[8];
  const edgewise::Received got = edgewise::receive(pair.second, room);
  return got.fd && edgewise::write(got.fd, "through").ok() &&
         edgewise::read(pipe.reader, room).bytes == 7;
}

bool frames_work() {
  edgewise::FrameBuffer frames;
  constexpr auto prefix = edgewise::frame_prefix(5);
  const std::string bytes = std::string(prefix.data(), prefix.size()) + "frame";
  bytes.copy(frames.prepare().data(), bytes.size());
  frames.commit(bytes.size());
  return frames.next() == "frame" && !frames.next() && frames.rest().empty();
}

bool wakers_and_timers_work() {
  edgewise::Waker waker;
  waker.wake();
  if (!becomes_readable(waker) || !waker.clear() || waker.clear()) return false;
  edgewise::Timer timer;
  timer.expire_at(std::chrono::steady_clock::time_point{});
  if (!becomes_readable(timer) || timer.expirations() != 1) return false;
  timer.expire_every(std::chrono::hours{1});
  timer.expire_after(std::chrono::microseconds{1});
  if (!becomes_readable(timer)) return false;
  timer.stop();
  return timer.expirations() == 0;
}

bool signals_work() {
  edgewise::Signals signals{SIGUSR1, SIGUSR2};
  if (signals.next() || ::raise(SIGUSR2) != 0) return false;
  if (!becomes_readable(signals)) return false;
  const auto info = signals.next();
  return info && info->ssi_signo == SIGUSR2;
}

// Sandboxes and emulators may lack the system calls that Child needs, and its
// constructor would end this program.
bool has_pidfd() {
  return bool{
      edgewise::Fd{static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0))}};
}

bool children_work() {
  const ::pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(60);
    for (;;) ::pause();
  }
  edgewise::Child child{pid};
  if (child.pid() != pid || child.reap()) return false;
  if (!child.kill(SIGKILL) || !becomes_readable(child)) return false;
  const auto status = child.reap();
  return status && !status->ok() && status->signal == SIGKILL;
}

bool standard_input_works() {
  const edgewise::Pipe pipe = edgewise::open_pipe();
  if (::dup2(pipe.reader.get(), STDIN_FILENO) != STDIN_FILENO) return false;
  const edgewise::Fd input = edgewise::open_standard_input();
  char room[8];
  return edgewise::pollable(input) &&
         edgewise::write(pipe.writer, "typed").ok() &&
         edgewise::read(input, room).bytes == 5;
}

bool errors_work() {
  edgewise::Poller poller;
  if (!poller.try_add(edgewise::FdView{-1}, edgewise::Token{1},
                      edgewise::Interest::readable))
    return false;
  return edgewise::detail::classify_accept_error(EMFILE) ==
             edgewise::AcceptStatus::exhausted &&
         edgewise::write(edgewise::FdView{-1}, "a").error == EBADF;
}

bool fails(const char* what) {
  std::fprintf(stderr, "odr: %s\n", what);
  return false;
}

}  // namespace

bool other_file_works() {
  if (!addresses_work()) return fails("addresses");
  if (!sockets_work()) return fails("sockets");
  if (!reserve_works()) return fails("the reserve");
  if (!datagrams_work()) return fails("datagrams");
  if (!descriptors_pass()) return fails("passing a descriptor");
  if (!frames_work()) return fails("frames");
  if (!wakers_and_timers_work()) return fails("wakers and timers");
  if (!signals_work()) return fails("signals");
  if (!has_pidfd()) std::puts("skipped  Child: there is no pidfd_open here");
  if (has_pidfd() && !children_work()) return fails("children");
  if (!standard_input_works()) return fails("standard input");
  return errors_work() || fails("errors");
}

bool other_file_changes(edgewise::Slab<std::string>& slab,
                        edgewise::Token token) {
  std::string* const value = slab.find(token);
  if (value == nullptr || *value != "value") return false;
  *value = "changed";
  const auto other = slab.emplace("other").token;
  return slab.erase(other) && !slab.erase(other);
}

const char* other_file_block() {
  edgewise::LineBuffer lines;
  const char* const address = lines.prepare().data();
  lines.commit(0);
  return address;
}

const void* other_file_address_of_listen() {
  return reinterpret_cast<const void*>(&edgewise::listen);
}
