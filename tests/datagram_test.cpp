// Datagrams through the loopback device: UDP over IPv4 and IPv6.
#include <doctest/doctest.h>

#include <string>
#include <string_view>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

const Address loopback = *Address::parse("127.0.0.1:0");
const Address loopback6 = *Address::parse("[::1]:0");

bool has_ipv6() {
  const Fd fd{::socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  return fd && ::bind(fd.get(), loopback6.data(), loopback6.size()) == 0;
}

std::vector<Address> loopbacks() {
  if (has_ipv6()) return {loopback, loopback6};
  MESSAGE("IPv4 only: there is no IPv6 here");
  return {loopback};
}

// A datagram and what came with it.
struct Datagram {
  Received received;
  std::string bytes;
};

// Waits for one, and takes it.
Datagram next(FdView socket, std::size_t room = 65536) {
  REQUIRE(becomes_readable(socket));
  std::string bytes(room, '\0');
  Received received = receive(socket, bytes);
  bytes.resize(received.bytes);
  return {std::move(received), bytes};
}

Connected connect_datagram(const Address& address) {
  return connect(address, {.type = SocketType::datagram});
}

Address with_host(std::string_view host, FdView socket) {
  return *Address::from(host, local_address(socket).port());
}

// An address of this machine where nobody receives datagrams.
Address nobody(const Address& host) {
  return local_address(bind_datagram(host));
}

int lowest_free_descriptor() {
  const Fd fd{::dup(0)};
  return fd.get();
}

}  // namespace

// ---------------------------------------------------------------------------
// Sending and receiving
// ---------------------------------------------------------------------------

TEST_CASE("a datagram arrives whole, and its sender can be answered") {
  for (const Address& host : loopbacks()) {
    CAPTURE(host.to_string());
    const Fd server = bind_datagram(host);
    const Fd client = bind_datagram(host);
    const Address address = local_address(server);
    CHECK(address.port() != 0);
    CHECK(send_to(client, "one", address).bytes == 3);
    CHECK(send_to(client, "two, longer", address).bytes == 11);

    const Datagram one = next(server);
    CHECK(one.received.ok());
    CHECK(one.bytes == "one");
    CHECK(one.received.from == local_address(client));
    CHECK_FALSE(one.received.truncated);
    CHECK_FALSE(static_cast<bool>(one.received.fd));
    CHECK(next(server).bytes == "two, longer");

    CHECK(send_to(server, "answer", one.received.from).ok());
    const Datagram answer = next(client);
    CHECK(answer.bytes == "answer");
    CHECK(answer.received.from == address);
  }
}

TEST_CASE("a datagram socket is close-on-exec, and never blocks") {
  for (const Address& host : loopbacks()) {
    const Fd server = bind_datagram(host);
    const Connected client = connect_datagram(local_address(server));
    for (const FdView socket : {FdView{server}, FdView{client.fd}}) {
      CHECK(option_of(socket, SOL_SOCKET, SO_TYPE) == SOCK_DGRAM);
      CHECK(is_close_on_exec(socket));
      REQUIRE(is_non_blocking(socket));
      char room[4];
      const Received nothing = receive(socket, room);
      CHECK(nothing.would_block());
      CHECK(nothing.bytes == 0);
      CHECK(nothing.from == Address());
    }
  }
}

TEST_CASE("an empty datagram is ok with no bytes, and the next one follows") {
  const Fd server = bind_datagram(loopback);
  const Fd client = bind_datagram(loopback);
  const IoResult sent = send_to(client, "", local_address(server));
  CHECK(sent.ok());
  CHECK(sent.bytes == 0);
  CHECK(send_to(client, "next", local_address(server)).ok());
  const Datagram empty = next(server);
  CHECK(empty.received.ok());
  CHECK(empty.received.bytes == 0);
  CHECK(empty.received.from == local_address(client));
  CHECK_FALSE(empty.received.truncated);
  CHECK(next(server).bytes == "next");
}

TEST_CASE("what has no room is lost and told, and the next one is whole") {
  const Fd server = bind_datagram(loopback);
  const Fd client = bind_datagram(loopback);
  const auto send = [&] {
    REQUIRE(send_to(client, "0123456789", local_address(server)).ok());
  };
  for (int turn = 0; turn < 4; ++turn) send();
  const Datagram cut = next(server, 4);
  CHECK(cut.received.ok());
  CHECK(cut.received.truncated);
  CHECK(cut.bytes == "0123");
  CHECK(cut.received.from == local_address(client));
  const Datagram fits = next(server, 10);
  CHECK_FALSE(fits.received.truncated);
  CHECK(fits.bytes == "0123456789");
  const Datagram no_room = next(server, 0);
  CHECK(no_room.received.ok());
  CHECK(no_room.received.truncated);
  CHECK_FALSE(next(server, 11).received.truncated);
  char room[4];
  CHECK(receive(server, room).would_block());
}

TEST_CASE("a datagram that is too long is failed, and nothing is sent") {
  for (const Address& host : loopbacks()) {
    const Fd server = bind_datagram(host);
    const Fd client = bind_datagram(host);
    const bool v6 = host.family() == AF_INET6;
    const std::string most(65535 - 8 - (v6 ? 0 : 20), 'x');
    const IoResult result = send_to(client, most + 'x', local_address(server));
    CHECK(result.failed());
    CHECK(result.error == EMSGSIZE);
    CHECK(result.bytes == 0);
    CHECK(send_to(client, most, local_address(server)).bytes == most.size());
    CHECK(next(server).bytes == most);
  }
}

TEST_CASE("a datagram is sent to an address of the socket's family only") {
  const Fd client = bind_datagram(loopback);
  CHECK(send_to(client, "a", loopback6).error == EAFNOSUPPORT);
  CHECK(send_to(client, "a", *Address::parse("unix:/a")).failed());
  CHECK(send_to(client, "a", Address()).failed());
  CHECK(send_to(FdView{-1}, "a", loopback).error == EBADF);
}

TEST_CASE("a poller reports datagrams, and room for more") {
  const Fd server = bind_datagram(loopback);
  const Fd client = bind_datagram(loopback);
  Poller poller;
  poller.add(server, Token{1}, Interest::readable);
  CHECK(poller.wait(0ms).empty());
  CHECK(send_to(client, "hello", local_address(server)).ok());
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  CHECK(events[0].readable());
  CHECK_FALSE(events[0].read_closed());
  CHECK(next(server).bytes == "hello");
  CHECK(poller.wait(0ms).empty());
  poller.modify(server, Token{1}, Interest::writable);
  CHECK(poller.wait(patience).size() == 1);
}

// ---------------------------------------------------------------------------
// Connected sockets
// ---------------------------------------------------------------------------

TEST_CASE("a datagram socket is connected at once, and reads and writes") {
  for (const Address& host : loopbacks()) {
    const Fd server = bind_datagram(host);
    const Connected client = connect_datagram(local_address(server));
    REQUIRE(client.ok());
    CHECK(client.error == 0);
    CHECK(finish_connect(client.fd).ok());
    CHECK(write(client.fd, "question").bytes == 8);
    const Datagram question = next(server);
    CHECK(question.bytes == "question");
    CHECK(question.received.from == local_address(client.fd));
    CHECK(send_to(server, "answer", question.received.from).ok());
    CHECK(receive(client.fd, 6) == "answer");
  }
}

TEST_CASE("a connected datagram socket hears nobody but its peer") {
  const Fd server = bind_datagram(loopback);
  const Fd stranger = bind_datagram(loopback);
  const Connected client = connect_datagram(local_address(server));
  const Address address = local_address(client.fd);
  // Loopback keeps the order: had the first got through, it would be first.
  CHECK(send_to(stranger, "stranger", address).ok());
  CHECK(send_to(server, "peer", address).ok());
  CHECK(next(client.fd).bytes == "peer");
}

TEST_CASE("that an earlier datagram found nobody, the next call is told") {
  for (const Address& host : loopbacks()) {
    const Connected client = connect_datagram(nobody(host));
    REQUIRE(client.ok());
    char room[4];
    for (int turn = 0; turn < 3; ++turn) {
      CHECK(write(client.fd, "anybody?").ok());
      REQUIRE(becomes(client.fd, POLLERR));
      const IoResult result =
          turn == 0   ? write(client.fd, "anybody?")
          : turn == 1 ? static_cast<IoResult>(receive(client.fd, room))
                      : read(client.fd, room);
      CHECK(result.failed());
      CHECK(result.error == ECONNREFUSED);
      CHECK(receive(client.fd, room).would_block());  // told once
    }
  }
}

TEST_CASE("a datagram socket that is not connected is not told") {
  const Fd client = bind_datagram(loopback);
  const Address address = nobody(loopback);
  for (int turn = 0; turn < 3; ++turn)
    CHECK(send_to(client, "anybody?", address).ok());
}

TEST_CASE("TCP's options leave a datagram socket as it is") {
  const Fd server = bind_datagram(loopback, {.backlog = 0,
                                             .reuse_address = true,
                                             .no_delay = true,
                                             .keep_alive = 5s});
  CHECK(option_of(server, SOL_SOCKET, SO_REUSEADDR) == 0);
  CHECK(option_of(server, SOL_SOCKET, SO_KEEPALIVE) == 0);
  const Connected client = connect(
      local_address(server), {.type = SocketType::datagram, .keep_alive = 5s});
  CHECK(client.ok());
  CHECK(option_of(client.fd, SOL_SOCKET, SO_KEEPALIVE) == 0);
}

// ---------------------------------------------------------------------------
// bind_datagram
// ---------------------------------------------------------------------------

TEST_CASE("a busy datagram port is refused by name, and no descriptor lost") {
  for (const Address& host : loopbacks()) {
    const Fd first = bind_datagram(host);
    const Address address = local_address(first);
    const int free_before = lowest_free_descriptor();
    const Thrown thrown =
        thrown_by([&] { const Fd second = bind_datagram(address); });
    CHECK(thrown.error == EADDRINUSE);
    CHECK(thrown.text ==
          "bind to " + address.to_string() + ": Address already in use");
    CHECK(lowest_free_descriptor() == free_before);
  }
}

TEST_CASE("what a datagram socket cannot be bound to is refused by name") {
  const auto refusal = [](const Address& address) {
    return thrown_by([&] { const Fd fd = bind_datagram(address); }).text;
  };
  CHECK(refusal(*Address::parse("203.0.113.1:8080")) ==
        "bind to 203.0.113.1:8080: Cannot assign requested address");
  CHECK(refusal(Address()) ==
        "bind to unspecified: Address family not supported by protocol");
}

TEST_CASE("TCP and UDP ports are not each other's") {
  const Fd listener = listen(loopback);
  const Fd server = bind_datagram(local_address(listener));
  CHECK(local_address(server) == local_address(listener));
}

TEST_CASE("reuse_port lets two receive on one port, if both say so") {
  for (const Address& host : loopbacks()) {
    const Fd first = bind_datagram(host, {.reuse_port = true});
    const Address address = local_address(first);
    const Fd second = bind_datagram(address, {.reuse_port = true});
    CHECK(local_address(second) == address);
    CHECK(thrown_by([&] { const Fd third = bind_datagram(address); }).error ==
          EADDRINUSE);

    // What one sender sends goes to one of them.
    const Connected client = connect_datagram(address);
    for (int turn = 0; turn < 3; ++turn) CHECK(write(client.fd, "a").ok());
    ::pollfd waiting[]{{first.get(), POLLIN, 0}, {second.get(), POLLIN, 0}};
    REQUIRE(::poll(waiting, 2, static_cast<int>(patience.count())) == 1);
    const Fd& chosen = waiting[0].revents != 0 ? first : second;
    for (int turn = 0; turn < 3; ++turn) CHECK(next(chosen).bytes == "a");
  }
}

TEST_CASE("a datagram socket on [::] takes IPv4 too, unless told not to") {
  if (!has_ipv6()) {
    MESSAGE("skipped: there is no IPv6 here");
    return;
  }
  const Address everywhere = *Address::parse("[::]:0");
  const Fd dual = bind_datagram(everywhere);
  const Connected client = connect_datagram(with_host("127.0.0.1", dual));
  CHECK(write(client.fd, "four").ok());
  const Datagram four = next(dual);
  CHECK(four.bytes == "four");
  CHECK(four.received.from == with_host("::ffff:127.0.0.1", client.fd));
  CHECK(send_to(dual, "answer", four.received.from).ok());
  CHECK(receive(client.fd, 6) == "answer");

  const Fd single = bind_datagram(everywhere, {.dual_stack = false});
  const Connected refused = connect_datagram(with_host("127.0.0.1", single));
  CHECK(write(refused.fd, "four").ok());
  REQUIRE(becomes(refused.fd, POLLERR));
  CHECK(write(refused.fd, "four").error == ECONNREFUSED);
  const Connected six = connect_datagram(with_host("::1", single));
  CHECK(write(six.fd, "six").ok());
  CHECK(next(single).bytes == "six");
}
