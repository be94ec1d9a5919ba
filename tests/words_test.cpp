// What results, events and addresses are in words, for a log.
#include <doctest/doctest.h>

#include <string>

#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

std::string words(std::size_t bytes, IoStatus status, int error = 0) {
  return to_string(IoResult{bytes, status, error});
}

std::string words(AcceptStatus status, int error = 0) {
  Accepted accepted;
  accepted.peer = *Address::parse("192.0.2.1:51234");
  accepted.status = status;
  accepted.error = error;
  return to_string(accepted);
}

std::string words(ConnectStatus status, int error = 0) {
  return to_string(ConnectResult{status, error});
}

// The first event of a descriptor.
std::string words(FdView fd, Token token, Interest interest) {
  Poller poller;
  poller.add(fd, token, interest);
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  return to_string(events[0]);
}

const Address loopback = *Address::parse("127.0.0.1:0");

}  // namespace

TEST_CASE("a result is its bytes and how it ended") {
  CHECK(words(5000, IoStatus::ok) == "5000 bytes");
  CHECK(words(0, IoStatus::ok) == "0 bytes");
  CHECK(words(1, IoStatus::ok) == "1 byte");
  CHECK(words(2, IoStatus::ok) == "2 bytes");
  CHECK(words(1, IoStatus::would_block) == "1 byte, would block");
  CHECK(words(5000, IoStatus::would_block) == "5000 bytes, would block");
  CHECK(words(0, IoStatus::would_block) == "would block");
  CHECK(words(7, IoStatus::end_of_stream) == "7 bytes, end of stream");
  CHECK(words(0, IoStatus::end_of_stream) == "end of stream");
  CHECK(words(7, IoStatus::failed, EPIPE) == "7 bytes, failed: Broken pipe");
  CHECK(words(0, IoStatus::failed, ECONNRESET) ==
        "failed: Connection reset by peer");
}

TEST_CASE("what a call returned is in words at once") {
  auto ends = make_socketpair();
  char room[8];
  CHECK(to_string(read(ends.far, room)) == "would block");
  CHECK(to_string(write(ends.near, "hello")) == "5 bytes");
  CHECK(to_string(edgewise::receive(ends.far, room)) == "5 bytes");
  ends.near.reset();
  CHECK(to_string(read(ends.far, room)) == "end of stream");
  CHECK(to_string(write(ends.far, "hello")) == "failed: Broken pipe");
}

TEST_CASE("an interest is its parts") {
  CHECK(to_string(Interest::none) == "nothing");
  CHECK(to_string(Interest::readable) == "readable");
  CHECK(to_string(Interest::writable) == "writable");
  CHECK(to_string(Interest::priority) == "priority");
  CHECK(to_string(Interest::readable | Interest::writable) ==
        "readable, writable");
  CHECK(to_string(Interest::priority | Interest::writable |
                  Interest::readable) == "readable, writable, priority");
}

TEST_CASE("a mode is its trigger, and how else") {
  CHECK(to_string(Mode::level) == "level-triggered");
  CHECK(to_string(Mode::edge) == "edge-triggered");
  CHECK(to_string(Mode::oneshot) == "level-triggered, one-shot");
  CHECK(to_string(Mode::edge | Mode::oneshot) == "edge-triggered, one-shot");
  CHECK(to_string(Mode::exclusive) == "level-triggered, exclusive");
  CHECK(to_string(Mode::edge | Mode::exclusive) == "edge-triggered, exclusive");
}

TEST_CASE("an event is its token and all that the kernel said") {
  auto ends = make_socketpair();
  const auto both = Interest::readable | Interest::writable;
  CHECK(words(ends.near, Token{7}, both) == "token 7: writable");
  send_all(ends.far, "a");
  CHECK(words(ends.near, Token{0}, Interest::readable) == "token 0: readable");
  shutdown_write(ends.far);
  CHECK(words(ends.near, Token{UINT64_MAX}, Interest::readable) ==
        "token 18446744073709551615: readable, read closed");
  ends.far.reset();
  CHECK(words(ends.near, Token{7}, both) ==
        "token 7: readable, writable, read closed, hang-up");

  auto pipe = make_pipe();
  pipe.far.reset();
  CHECK(words(pipe.near, Token{7}, Interest::writable) ==
        "token 7: writable, error");
}

TEST_CASE("an event of urgent data is told as such") {
  const auto ends = make_tcp();
  REQUIRE(::send(ends.near.get(), "!", 1, MSG_OOB) == 1);
  CHECK(words(ends.far, Token{7}, Interest::priority) == "token 7: priority");
}

TEST_CASE("an event that nothing has written to is nothing") {
  CHECK(to_string(Event{}) == "token 0: nothing");
}

TEST_CASE("an attempt to accept is whom it got, or why none") {
  CHECK(words(AcceptStatus::accepted) == "accepted 192.0.2.1:51234");
  CHECK(words(AcceptStatus::would_block, EAGAIN) == "would block");
  CHECK(words(AcceptStatus::retry, ECONNABORTED) ==
        "retry: Software caused connection abort");
  CHECK(words(AcceptStatus::exhausted, EMFILE) ==
        "exhausted: Too many open files");
  CHECK(words(AcceptStatus::failed, EBADF) == "failed: Bad file descriptor");

  const Fd listener = listen(loopback);
  CHECK(to_string(accept(listener)) == "would block");
  const Connected client = connect(local_address(listener));
  REQUIRE(becomes_readable(listener));
  CHECK(to_string(accept(listener)) ==
        "accepted " + local_address(client.fd).to_string());
  CHECK(to_string(Accepted{}) == "accepted unspecified");
}

TEST_CASE("an attempt to connect is how it stands, and why it failed") {
  CHECK(words(ConnectStatus::connected) == "connected");
  CHECK(words(ConnectStatus::in_progress) == "in progress");
  CHECK(words(ConnectStatus::refused, ECONNREFUSED) ==
        "refused: Connection refused");
  CHECK(words(ConnectStatus::refused, ENOENT) ==
        "refused: No such file or directory");
  CHECK(words(ConnectStatus::timed_out, ETIMEDOUT) ==
        "timed out: Connection timed out");
  CHECK(words(ConnectStatus::failed, ENETUNREACH) ==
        "failed: Network is unreachable");

  const Fd listener = listen(loopback);
  const Connected connected = connect(local_address(listener));
  CHECK(to_string(connected) == "in progress");
  REQUIRE(becomes_writable(connected.fd));
  CHECK(to_string(finish_connect(connected.fd)) == "connected");
}

TEST_CASE("an address is the text that it is parsed from") {
  for (const char* text :
       {"127.0.0.1:8080", "[::1]:9000", "unix:/run/rat.sock", "unix:@rat"})
    CHECK(Address::parse(text)->to_string() == text);
  CHECK(Address().to_string() == "unspecified");
}
