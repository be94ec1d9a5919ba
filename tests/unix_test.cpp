// Unix sockets: their addresses, listeners, datagrams, pairs, and descriptors
// that are passed through them.
#include <doctest/doctest.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;
using namespace std::string_literals;

// bind(2), so that the mode of a socket's file can be looked at as soon as
// there is a file: whatever comes after bind comes too late.
namespace spy {
::mode_t mode_at_bind = 0;
}  // namespace spy

extern "C" int bind(int socket, const ::sockaddr* address,
                    ::socklen_t length) noexcept {
  using Function = int(int, const ::sockaddr*, ::socklen_t);
  static auto* const real = next_definition<Function>("bind");
  const int result = real(socket, address, length);
  if (result != 0 || address->sa_family != AF_UNIX) return result;
  struct ::stat status {};
  ::sockaddr_un path{};
  std::memcpy(&path, address, std::min<std::size_t>(length, sizeof path - 1));
  if (path.sun_path[0] != '\0' && ::stat(path.sun_path, &status) == 0)
    spy::mode_at_bind = status.st_mode & 0777;
  return 0;
}

namespace {

constexpr std::size_t path_offset = offsetof(::sockaddr_un, sun_path);

// A directory of this test's own, which everybody may enter, and which is gone
// at the end with the sockets in it.
class Directory {
 public:
  Directory() {
    REQUIRE(::mkdtemp(name_.data()) != nullptr);
    REQUIRE(::chmod(name_.c_str(), 0755) == 0);
  }
  ~Directory() {
    for (const std::string& file : files_) ::unlink(file.c_str());
    ::rmdir(name_.c_str());
  }
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  std::string path(const std::string& file) {
    files_.push_back(name_ + '/' + file);
    return files_.back();
  }
  Address address(const std::string& file) {
    const auto address = Address::from_path(path(file));
    REQUIRE(address);
    return *address;
  }

 private:
  std::string name_ = "/tmp/edgewise-XXXXXX";
  std::vector<std::string> files_;
};

const Address any_name = *Address::parse("unix:");

// While it lives, relative paths begin in another directory.
class Inside {
 public:
  explicit Inside(const std::string& directory) {
    REQUIRE(before_);
    REQUIRE(::chdir(directory.c_str()) == 0);
  }
  ~Inside() {
    if (::fchdir(before_.get()) != 0) std::abort();
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;

 private:
  Fd before_{::open(".", O_RDONLY | O_DIRECTORY | O_CLOEXEC)};
};

Address parsed(std::string_view text) {
  const auto address = Address::parse(text);
  REQUIRE(address);
  return *address;
}

// Nobody else's: they have this process's number in them. The longest has 107
// bytes behind the @.
std::string abstract_name(std::string_view rest) {
  return "unix:@edgewise-" + std::to_string(::getpid()) + std::string(rest);
}
std::string longest_abstract_name() {
  std::string name = abstract_name("");
  name.resize(sizeof "unix:@" - 1 + 107, 'x');
  return name;
}

bool is_socket(const std::string& path) {
  struct ::stat status {};
  return ::lstat(path.c_str(), &status) == 0 && S_ISSOCK(status.st_mode);
}

int open_descriptors() {
  int count = 0;
  for (int number = 0; number < 1024; ++number) count += is_open(number);
  return count;
}

std::string_view text_of(const Received& received, std::string_view room) {
  return room.substr(0, received.bytes);
}

}  // namespace

// ---------------------------------------------------------------------------
// Addresses
// ---------------------------------------------------------------------------

TEST_CASE("a Unix address reads what it prints, and prints what it reads") {
  for (const std::string& text :
       {"unix:/run/rat.sock"s, "unix:relative"s, "unix:./a b:80"s,
        "unix:127.0.0.1:80"s, "unix:[::1]:80"s, "unix:a@b"s, "unix:"s,
        "unix:@rat"s, "unix:@"s, "unix:@@"s, "unix:@a/b:c"s, "unix:@\0\0"s,
        "unix:@a\0b\0"s, "unix:@\xff\n\x01"s, "unix:\xc3\xa9\xff"s}) {
    CAPTURE(text);
    const Address address = parsed(text);
    CHECK(address.family() == AF_UNIX);
    CHECK(address.data()->sa_family == AF_UNIX);
    CHECK(address.port() == 0);
    CHECK(address.to_string() == text);
    CHECK(Address::from_path(std::string_view(text).substr(5)) == address);
  }
}

TEST_CASE("a path is handed to the kernel with its NUL, a name without") {
  const auto size_of = [](std::string_view text) {
    return parsed(text).size() - path_offset;
  };
  CHECK(size_of("unix:/a") == 3);
  CHECK(size_of("unix:@a") == 2);
  CHECK(size_of("unix:@") == 1);
  CHECK(size_of("unix:") == 0);

  ::sockaddr_un native;
  std::memcpy(&native, parsed("unix:@a").data(), path_offset + 2);
  CHECK(native.sun_path[0] == '\0');
  CHECK(native.sun_path[1] == 'a');
}

TEST_CASE("a Unix address has at most 107 bytes, of a path or behind its @") {
  for (const char first : {'/', '@'}) {
    const std::string most = first + std::string(first == '@' ? 107 : 106, 'x');
    CHECK(parsed("unix:" + most).to_string() == "unix:" + most);
    CHECK(Address::from_path(most));
    for (const std::size_t more : {1U, 2U, 1000U}) {
      CHECK_FALSE(Address::from_path(most + std::string(more, 'x')));
      CHECK_FALSE(Address::parse("unix:" + most + std::string(more, 'x')));
    }
  }
}

TEST_CASE("a path with a NUL in it is refused, wherever the NUL is") {
  for (const std::string& path : {"/a\0b"s, "\0a"s, "/a\0"s, "\0"s, "a\0@"s}) {
    CHECK_FALSE(Address::from_path(path));
    CHECK_FALSE(Address::parse("unix:" + path));
  }
}

TEST_CASE("what only resembles a Unix address is none") {
  for (const char* text : {"unix", "Unix:/a", " unix:/a", "unix /a", "/a"})
    CHECK_FALSE(Address::parse(text));
}

TEST_CASE("Unix addresses are equal if every byte of their names is") {
  CHECK(parsed("unix:/a") == parsed("unix:/a"));
  CHECK(parsed("unix:/a") != parsed("unix:/b"));
  CHECK(parsed("unix:/a") != parsed("unix:/a/"));
  CHECK(parsed("unix:/aa") != parsed("unix:/a"));
  CHECK(parsed("unix:a") != parsed("unix:@a"));
  CHECK(parsed("unix:") == parsed("unix:"));
  CHECK(parsed("unix:") != parsed("unix:@"));
  CHECK(parsed("unix:@a") == parsed("unix:@a"));
  CHECK(parsed("unix:@a") != parsed("unix:@b"));
  CHECK(parsed("unix:@a\0"s) != parsed("unix:@a"));
  CHECK(parsed("unix:@a\0b"s) != parsed("unix:@a\0c"s));
  CHECK(parsed("unix:") != Address());
  CHECK(parsed("unix:") != parsed("0.0.0.0:0"));
}

TEST_CASE("what a system call has written becomes a Unix address") {
  for (const std::string& text :
       {"unix:/run/rat.sock"s, "unix:@rat\0"s, "unix:"s, "unix:@"s}) {
    CAPTURE(text);
    const Address address = parsed(text);
    ::sockaddr_storage storage{};
    std::memcpy(&storage, address.data(), address.size());
    const Address copy = Address::from_native(
        reinterpret_cast<::sockaddr*>(&storage), address.size());
    CHECK(copy == address);
    CHECK(copy.size() == address.size());
    CHECK(copy.to_string() == text);
  }
}

TEST_CASE("a path that fills its room to the last byte is printed whole") {
  // Only other programs bind to such: there is no room for the path's NUL.
  Directory directory;
  ::sockaddr_un native{};
  native.sun_family = AF_UNIX;
  const std::string start = directory.path("");
  const std::string path =
      directory.path(std::string(sizeof native.sun_path - start.size(), 'x'));
  REQUIRE(path.size() == sizeof native.sun_path);
  std::memcpy(native.sun_path, path.data(), path.size());
  const Fd socket{::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)};
  REQUIRE(::bind(socket.get(), reinterpret_cast<::sockaddr*>(&native),
                 sizeof native) == 0);
  CHECK(local_address(socket).to_string() == "unix:" + path);
}

TEST_CASE("a file whose name begins with an @ is not an abstract name") {
  // Only other programs bind to such.
  Directory directory;
  const std::string file = directory.path("@foo");
  const Inside inside{directory.path("")};
  ::sockaddr_un native{};
  native.sun_family = AF_UNIX;
  std::strcpy(native.sun_path, "@foo");
  const Fd listener{::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)};
  REQUIRE(::bind(listener.get(), reinterpret_cast<::sockaddr*>(&native),
                 sizeof native) == 0);
  REQUIRE(::listen(listener.get(), 1) == 0);
  REQUIRE(is_socket(file));

  const Address address = local_address(listener);
  CHECK(address.to_string() == "unix:./@foo");
  CHECK(connect(address).ok());
  CHECK(connect(parsed(address.to_string())).ok());
  CHECK(connect(parsed("unix:@foo")).refused());
}

// ---------------------------------------------------------------------------
// listen, accept, connect
// ---------------------------------------------------------------------------

TEST_CASE("a Unix client is connected at once, by path or by name") {
  Directory directory;
  for (const Address& address :
       {directory.address("socket"), parsed(abstract_name("")),
        parsed(abstract_name("\0\xff:\n\0"s)),
        parsed(longest_abstract_name())}) {
    CAPTURE(address.to_string());
    const Fd listener = listen(address);
    CHECK(local_address(listener) == address);
    CHECK(is_close_on_exec(listener));
    CHECK(is_non_blocking(listener));
    CHECK(accept(listener).would_block());

    const Connected client = connect(address);
    REQUIRE(client.ok());
    CHECK(finish_connect(client.fd).ok());
    const Accepted accepted = accept(listener);
    REQUIRE(accepted.ok());
    CHECK(accepted.peer == any_name);  // a client has no name of its own
    CHECK(is_close_on_exec(client.fd));
    CHECK(is_close_on_exec(accepted.fd));
    CHECK(is_non_blocking(client.fd));
    CHECK(is_non_blocking(accepted.fd));
    CHECK(write(client.fd, "hello").ok());
    CHECK(receive(accepted.fd, 5) == "hello");
  }
}

TEST_CASE("a name that goes on after a NUL is not its beginning") {
  const Fd listener = listen(parsed(abstract_name("")));
  CHECK(connect(parsed(abstract_name("\0"s))).refused());
  CHECK(connect(parsed(abstract_name(""))).ok());
}

TEST_CASE("a path of 107 bytes can be listened on") {
  Directory directory;
  const std::size_t start = directory.path("").size();
  const Address address = directory.address(std::string(107 - start, 'x'));
  const Fd listener = listen(address);
  CHECK(local_address(listener) == address);
  CHECK(connect(address).ok());
}

TEST_CASE("without a name, the kernel chooses an abstract one") {
  const Fd first = listen(any_name);
  const Fd second = listen(any_name);
  const Address address = local_address(first);
  CHECK(address.to_string().starts_with("unix:@"));
  CHECK(address.to_string().size() > 6);
  CHECK(address != local_address(second));
  REQUIRE(connect(address).ok());
  CHECK(accept(first).ok());
  CHECK(accept(second).would_block());
}

TEST_CASE("P23 where nobody listens, a Unix client is refused at once") {
  Directory directory;
  const Address address = directory.address("socket");
  const Connected no_file = connect(address);
  CHECK(no_file.refused());
  CHECK(no_file.failed());
  CHECK(no_file.error == ENOENT);
  CHECK_FALSE(static_cast<bool>(no_file.fd));

  { const Fd listener = listen(address); }
  const Connected left_behind = connect(address);
  CHECK(left_behind.refused());
  CHECK(left_behind.error == ECONNREFUSED);
  CHECK(connect(parsed(abstract_name(""))).error == ECONNREFUSED);
}

TEST_CASE("P23 a Unix listener whose queue is full is failed with EAGAIN") {
  const Fd listener = listen(any_name, {.backlog = 2});
  const Address address = local_address(listener);
  std::vector<Fd> clients;
  Connected client;
  while ((client = connect(address)).ok() && clients.size() < 10)
    clients.push_back(std::move(client.fd));
  CHECK(clients.size() == 3);  // Linux queues one more than the backlog
  CHECK(client.failed());
  CHECK_FALSE(client.refused());
  CHECK_FALSE(client.in_progress());
  CHECK(client.error == EAGAIN);
  CHECK_FALSE(static_cast<bool>(client.fd));
  CHECK(accept(listener).ok());
  CHECK(connect(address).ok());
}

TEST_CASE("options that only TCP has leave Unix sockets as they are") {
  const Fd listener = listen(any_name, {.reuse_address = false,
                                        .reuse_port = true,
                                        .dual_stack = false,
                                        .no_delay = false,
                                        .keep_alive = 5s});
  const Connected client = connect(local_address(listener), {.keep_alive = 5s});
  CHECK(client.ok());
  CHECK(option_of(client.fd, SOL_SOCKET, SO_KEEPALIVE) == 0);
}

TEST_CASE(
    "a socket's file stays when the socket is closed, and the second who "
    "listens there is told so") {
  Directory directory;
  const std::string path = directory.path("socket");
  const Address address = parsed("unix:" + path);
  const int descriptors = open_descriptors();
  const auto check_that_it_is_taken = [&] {
    const Thrown thrown = thrown_by([&] { const Fd fd = listen(address); });
    CHECK(thrown.error == EADDRINUSE);
    CHECK(thrown.text == "listen on unix:" + path + ": Address already in use");
  };
  {
    const Fd listener = listen(address);
    check_that_it_is_taken();
  }
  CHECK(is_socket(path));
  check_that_it_is_taken();
  CHECK(open_descriptors() == descriptors);
  REQUIRE(::unlink(path.c_str()) == 0);
  CHECK(static_cast<bool>(listen(address)));
}

TEST_CASE("an abstract name is free again when its socket is closed") {
  const Address address = parsed(abstract_name("-again"));
  {
    const Fd listener = listen(address);
    CHECK(thrown_by([&] { const Fd fd = listen(address); }).error ==
          EADDRINUSE);
  }
  CHECK(static_cast<bool>(listen(address)));
}

TEST_CASE("a path whose directory is missing is refused by name") {
  const Thrown thrown = thrown_by(
      [] { const Fd fd = listen(*Address::parse("unix:/no/such/socket")); });
  CHECK(thrown.text ==
        "listen on unix:/no/such/socket: No such file or directory");
}

// ---------------------------------------------------------------------------
// Permissions
// ---------------------------------------------------------------------------

namespace {

// What a new file is not permitted, while this lives.
class Umask {
 public:
  explicit Umask(::mode_t mask) : before_(::umask(mask)) {}
  ~Umask() { ::umask(before_); }
  Umask(const Umask&) = delete;
  Umask& operator=(const Umask&) = delete;

 private:
  ::mode_t before_;
};

// The mode of the file that the call makes: as soon as there is a file, if
// that does not change any more.
template <class Bind>
::mode_t mode_of_file(::mode_t mask, Bind bind) {
  Directory directory;
  const std::string path = directory.path("socket");
  const Umask umask{mask};
  const Fd fd = bind(*Address::from_path(path));
  struct ::stat status {};
  REQUIRE(::stat(path.c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == spy::mode_at_bind);
  return spy::mode_at_bind;
}

::mode_t mode_of_listener(::mode_t mask, const ListenOptions& options) {
  return mode_of_file(
      mask, [&](const Address& address) { return listen(address, options); });
}

}  // namespace

TEST_CASE("from the first moment, only its owner can connect to a socket") {
  CHECK(mode_of_listener(0, {}) == 0600);
  CHECK(mode_of_listener(022, {}) == 0600);
  CHECK(mode_of_file(0, [](const Address& address) {
          return bind_datagram(address);
        }) == 0600);
}

TEST_CASE("other permissions are given from the first moment, less the umask") {
  CHECK(mode_of_listener(0, {.permissions = 0666}) == 0666);
  CHECK(mode_of_listener(022, {.permissions = 0666}) == 0644);
  CHECK(mode_of_listener(022, {.permissions = 0660}) == 0640);
  CHECK(mode_of_listener(0200, {}) == 0400);
  CHECK(mode_of_listener(0, {.permissions = 0}) == 0);
  CHECK(mode_of_file(0, [](const Address& address) {
          return bind_datagram(address, {.permissions = 0622});
        }) == 0622);
}

TEST_CASE("another user may connect if the permissions say so, else fails") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: only root can become another user");
    return;
  }
  Directory directory;
  const Umask none{0};
  const Fd closed = listen(directory.address("closed"));
  const Fd open = listen(directory.address("open"), {.permissions = 0666});
  const int code = run_in_child([&] {
    constexpr ::uid_t somebody = 65534;
    if (::setuid(somebody) != 0) return 1;
    const Connected kept_out = connect(local_address(closed));
    if (!kept_out.failed() || kept_out.error != EACCES) return 2;
    if (kept_out.refused()) return 3;
    return connect(local_address(open)).ok() ? 0 : 4;
  });
  CHECK(code == 0);
}

// ---------------------------------------------------------------------------
// Datagrams
// ---------------------------------------------------------------------------

TEST_CASE("a Unix datagram arrives whole, and its sender can be answered") {
  Directory directory;
  for (const Address& address :
       {directory.address("server"), parsed(abstract_name("-server"))}) {
    CAPTURE(address.to_string());
    const Fd server = bind_datagram(address);
    const Fd client = bind_datagram(any_name);
    CHECK(local_address(server) == address);
    CHECK(is_close_on_exec(server));
    CHECK(is_non_blocking(server));
    CHECK(send_to(client, "one", address).bytes == 3);
    CHECK(send_to(client, "two, longer", address).bytes == 11);

    std::string room(64, '\0');
    Received received = receive(server, room);
    CHECK(received.ok());
    CHECK(text_of(received, room) == "one");
    CHECK(received.from == local_address(client));
    CHECK_FALSE(received.truncated);
    received = receive(server, room);
    CHECK(text_of(received, room) == "two, longer");
    CHECK(receive(server, room).would_block());

    CHECK(send_to(server, "answer", received.from).ok());
    received = receive(client, room);
    CHECK(text_of(received, room) == "answer");
    CHECK(received.from == address);
  }
}

TEST_CASE("a Unix datagram's sender without a name is unspecified") {
  const Fd server = bind_datagram(any_name);
  const Connected client =
      connect(local_address(server), {.type = SocketType::datagram});
  REQUIRE(client.ok());
  CHECK(write(client.fd, "hello").bytes == 5);
  std::string room(64, '\0');
  const Received received = receive(server, room);
  CHECK(text_of(received, room) == "hello");
  CHECK(received.from == Address());
}

TEST_CASE("a Unix datagram that nobody can take is failed or would block") {
  Directory directory;
  const Fd client = bind_datagram(any_name);
  const IoResult no_file = send_to(client, "a", directory.address("nobody"));
  CHECK(no_file.failed());
  CHECK(no_file.error == ENOENT);
  CHECK(send_to(client, "a", parsed(abstract_name("-nobody"))).error ==
        ECONNREFUSED);
  CHECK(connect(directory.address("nobody"), {.type = SocketType::datagram})
            .refused());

  const Fd server = bind_datagram(any_name);
  const Address address = local_address(server);
  IoResult result;
  int sent = 0;
  while ((result = send_to(client, "a", address)).ok() && sent < 100'000)
    ++sent;
  CHECK(sent > 0);
  CHECK(result.would_block());
  CHECK(
      send_to(client, std::string(std::size_t{64} << 20, 'x'), address).error ==
      EMSGSIZE);
}

TEST_CASE("a datagram socket's file that is there already is refused by name") {
  Directory directory;
  const Address address = directory.address("socket");
  { const Fd first = bind_datagram(address); }
  const int descriptors = open_descriptors();
  const Thrown thrown =
      thrown_by([&] { const Fd second = bind_datagram(address); });
  CHECK(thrown.text ==
        "bind to " + address.to_string() + ": Address already in use");
  CHECK(open_descriptors() == descriptors);
}

TEST_CASE("streams and datagrams do not connect to each other") {
  Directory directory;
  const Address address = directory.address("socket");
  const Fd listener = listen(address);
  const Connected client = connect(address, {.type = SocketType::datagram});
  CHECK(client.failed());
  CHECK_FALSE(client.refused());
  CHECK(client.error == EPROTOTYPE);
}

// ---------------------------------------------------------------------------
// Pairs
// ---------------------------------------------------------------------------

TEST_CASE("a socket pair is a pipe in both directions, of either type") {
  for (const SocketType type : {SocketType::stream, SocketType::datagram}) {
    const SocketPair pair = open_socket_pair(type);
    CHECK(option_of(pair.first, SOL_SOCKET, SO_TYPE) == static_cast<int>(type));
    for (const FdView end : {FdView{pair.first}, FdView{pair.second}}) {
      CHECK(is_close_on_exec(end));
      REQUIRE(is_non_blocking(end));
    }
    CHECK(write(pair.first, "there").ok());
    CHECK(receive(pair.second, 5) == "there");
    CHECK(write(pair.second, "back").ok());
    CHECK(receive(pair.first, 4) == "back");
  }
}

TEST_CASE("a pair of streams joins what is sent, one of datagrams does not") {
  std::string room(64, '\0');
  const SocketPair streams = open_socket_pair();
  CHECK(write(streams.first, "one").ok());
  CHECK(write(streams.first, "two").ok());
  CHECK(text_of(receive(streams.second, room), room) == "onetwo");

  const SocketPair datagrams = open_socket_pair(SocketType::datagram);
  CHECK(write(datagrams.first, "one").ok());
  CHECK(write(datagrams.first, "two").ok());
  CHECK(text_of(receive(datagrams.second, room), room) == "one");
  CHECK(text_of(receive(datagrams.second, room), room) == "two");
}

TEST_CASE("a socket pair that cannot be had is refused by name") {
  const Thrown thrown = thrown_by([] {
    const NoDescriptors none;
    const SocketPair pair = open_socket_pair();
  });
  CHECK(thrown.text == "open a socket pair: Too many open files");
}

// ---------------------------------------------------------------------------
// Ends
// ---------------------------------------------------------------------------

TEST_CASE("receive on a stream tells its end, after the last byte") {
  for (const bool tcp : {false, true}) {
    Ends ends = tcp ? make_tcp() : make_socketpair();
    std::string room(64, '\0');
    CHECK(receive(ends.far, room).would_block());
    send_all(ends.near, "last");
    ends.near.reset();
    REQUIRE(becomes_readable(ends.far));
    const Received last = receive(ends.far, room);
    CHECK(last.ok());
    CHECK(text_of(last, room) == "last");
    CHECK(last.from == Address());
    REQUIRE(becomes(ends.far, POLLRDHUP));
    for (int turn = 0; turn < 2; ++turn) {
      const Received end = receive(ends.far, room);
      CHECK(end.end_of_stream());
      CHECK(end.bytes == 0);
    }
  }
}

TEST_CASE("on a stream nobody is named, though the peer has an address") {
  Directory directory;
  for (const Address& address :
       {directory.address("socket"), parsed(abstract_name("")),
        Address(*Address::parse("127.0.0.1:0"))}) {
    CAPTURE(address.to_string());
    const Fd listener = listen(address);
    const Connected client = connect(local_address(listener));
    REQUIRE_FALSE(client.failed());
    REQUIRE(becomes_readable(listener));
    const Accepted accepted = accept(listener);
    REQUIRE(accepted.ok());
    std::string room(64, '\0');

    // The accepted socket has the listener's address, which the kernel tells.
    CHECK(write(accepted.fd, "hello").ok());
    REQUIRE(becomes_readable(client.fd));
    Received received = receive(client.fd, room);
    CHECK(text_of(received, room) == "hello");
    CHECK(received.from == Address());
    CHECK(received.from.to_string() == "unspecified");

    CHECK(write(client.fd, "and back").ok());
    REQUIRE(becomes_readable(accepted.fd));
    received = receive(accepted.fd, room);
    CHECK(text_of(received, room) == "and back");
    CHECK(received.from == Address());
  }
}

TEST_CASE("a descriptor that comes through a stream names nobody either") {
  const Fd listener = listen(any_name);
  const Connected client = connect(local_address(listener));
  REQUIRE(client.ok());
  const Accepted accepted = accept(listener);
  REQUIRE(accepted.ok());
  CHECK(send_fd(accepted.fd, "take this", listener).ok());
  std::string room(64, '\0');
  const Received received = receive(client.fd, room);
  CHECK(text_of(received, room) == "take this");
  CHECK(static_cast<bool>(received.fd));
  CHECK(received.from == Address());
}

TEST_CASE("receive into no room is ok, and the stream has not ended") {
  const auto ends = make_socketpair();
  send_all(ends.near, "hello");
  const Received received = receive(ends.far, std::span<char>{});
  CHECK(received.ok());
  CHECK(received.bytes == 0);
  CHECK(receive(ends.far, 5) == "hello");
}

TEST_CASE("an empty datagram is no end of anything") {
  const SocketPair pair = open_socket_pair(SocketType::datagram);
  REQUIRE(::send(pair.first.get(), "", 0, 0) == 0);
  REQUIRE(::send(pair.first.get(), "next", 4, 0) == 4);
  std::string room(64, '\0');
  const Received empty = receive(pair.second, room);
  CHECK(empty.ok());
  CHECK(empty.bytes == 0);
  CHECK_FALSE(empty.truncated);
  CHECK(text_of(receive(pair.second, room), room) == "next");
}

TEST_CASE("receive on a reset or closed descriptor is failed") {
  auto ends = make_tcp();
  reset_connection(ends.far);
  REQUIRE(becomes(ends.near, POLLHUP));
  char room[4];
  CHECK(receive(ends.near, room).error == ECONNRESET);
  const Received closed = receive(FdView{-1}, room);
  CHECK(closed.failed());
  CHECK(closed.error == EBADF);
  CHECK(receive(make_pipe().far, room).error == ENOTSOCK);
}

// ---------------------------------------------------------------------------
// Descriptors
// ---------------------------------------------------------------------------

namespace {

// Any number of descriptors in one message, as another program may send them.
void send_descriptors(FdView socket, std::string_view bytes,
                      const std::vector<int>& numbers) {
  ::iovec piece{const_cast<char*>(bytes.data()), bytes.size()};
  const std::size_t size = numbers.size() * sizeof(int);
  alignas(::cmsghdr) std::array<char, 256> control{};
  REQUIRE(CMSG_SPACE(size) <= control.size());
  ::msghdr message{};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = CMSG_SPACE(size);
  ::cmsghdr* const header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(size);
  std::memcpy(CMSG_DATA(header), numbers.data(), size);
  REQUIRE(::sendmsg(socket.get(), &message, 0) ==
          static_cast<::ssize_t>(bytes.size()));
}

}  // namespace

TEST_CASE("a descriptor that is sent can be used, and is close-on-exec") {
  for (const SocketType type : {SocketType::stream, SocketType::datagram}) {
    const SocketPair pair = open_socket_pair(type);
    Pipe pipe = open_pipe();
    make_blocking(pipe.writer);
    const int number = pipe.writer.get();
    const IoResult sent = send_fd(pair.first, "take this", pipe.writer);
    CHECK(sent.ok());
    CHECK(sent.bytes == 9);
    CHECK(is_open(number));  // ours stays ours
    pipe.writer.reset();

    std::string room(64, '\0');
    Received received = receive(pair.second, room);
    CHECK(text_of(received, room) == "take this");
    CHECK_FALSE(received.truncated);
    REQUIRE(static_cast<bool>(received.fd));
    CHECK(is_close_on_exec(received.fd));
    CHECK_FALSE(is_non_blocking(received.fd));  // as the sender had it
    CHECK(write(received.fd, "through").ok());
    CHECK(receive(pipe.reader, 7) == "through");
    received.fd.reset();
    char end[1];
    CHECK(read(pipe.reader, end).end_of_stream());
  }
}

TEST_CASE("a descriptor comes with the first of its bytes, and only once") {
  const SocketPair pair = open_socket_pair();
  const Pipe pipe = open_pipe();
  CHECK(write(pair.first, "before ").ok());
  CHECK(send_fd(pair.first, "with it", pipe.writer).ok());
  CHECK(write(pair.first, " after").ok());
  std::string all;
  std::vector<std::size_t> places;
  std::string room(5, '\0');
  while (all.size() < 20) {
    const Received received = receive(pair.second, room);
    REQUIRE(received.bytes > 0);
    CHECK_FALSE(received.truncated);
    all += text_of(received, room);
    if (received.fd) places.push_back(all.size());
  }
  CHECK(all == "before with it after");
  REQUIRE(places.size() == 1);
  CHECK(places[0] > 7);
  CHECK(places[0] <= 12);
}

TEST_CASE("without a descriptor there is none") {
  const SocketPair pair = open_socket_pair();
  CHECK(write(pair.first, "just bytes").ok());
  std::string room(64, '\0');
  const Received received = receive(pair.second, room);
  CHECK(received.bytes == 10);
  CHECK_FALSE(static_cast<bool>(received.fd));
  CHECK_FALSE(received.truncated);
}

TEST_CASE("of several descriptors one is taken, and no other leaks") {
  for (const std::size_t count : {2U, 3U, 20U}) {
    CAPTURE(count);
    const SocketPair pair = open_socket_pair();
    std::vector<Pipe> pipes(count);
    std::vector<int> numbers;
    for (Pipe& pipe : pipes) {
      pipe = open_pipe();
      numbers.push_back(pipe.writer.get());
    }
    send_descriptors(pair.first, "several", numbers);
    for (Pipe& pipe : pipes) pipe.writer.reset();
    const int descriptors = open_descriptors();

    std::string room(64, '\0');
    Received received = receive(pair.second, room);
    CHECK(received.ok());
    CHECK(text_of(received, room) == "several");
    CHECK(received.truncated);
    REQUIRE(static_cast<bool>(received.fd));
    CHECK(open_descriptors() == descriptors + 1);
    CHECK(write(received.fd, "first").ok());
    CHECK(receive(pipes[0].reader, 5) == "first");
    // The others' readers meet the end: no writer is left anywhere.
    char end[1];
    for (std::size_t other = 1; other < count; ++other)
      CHECK(read(pipes[other].reader, end).end_of_stream());
  }
}

TEST_CASE("a descriptor that nobody takes is closed with what it came with") {
  const SocketPair pair = open_socket_pair();
  Pipe pipe = open_pipe();
  CHECK(send_fd(pair.first, "a", pipe.writer).ok());
  pipe.writer.reset();
  const int descriptors = open_descriptors();
  char room[4];
  CHECK(receive(pair.second, room).bytes == 1);  // the result is thrown away
  CHECK(open_descriptors() == descriptors);
  CHECK(read(pipe.reader, room).end_of_stream());
}

TEST_CASE("out of descriptors the bytes come without theirs, truncated") {
  const SocketPair pair = open_socket_pair();
  const Pipe pipe = open_pipe();
  CHECK(send_fd(pair.first, "bytes", pipe.writer).ok());
  std::string room(64, '\0');
  Received received;
  {
    const NoDescriptors none;
    received = receive(pair.second, room);
  }
  CHECK(received.ok());
  CHECK(text_of(received, room) == "bytes");
  CHECK_FALSE(static_cast<bool>(received.fd));
  CHECK(received.truncated);
}

TEST_CASE("a descriptor cannot be sent without a byte") {
  const SocketPair pair = open_socket_pair();
  const IoResult result = send_fd(pair.first, "", pair.first);
  CHECK(result.failed());
  CHECK(result.error == EINVAL);
  char room[4];
  CHECK(receive(pair.second, room).would_block());
}

TEST_CASE("send_fd fails for what is not open, and would block when full") {
  SocketPair pair = open_socket_pair();
  CHECK(send_fd(pair.first, "a", FdView{-1}).error == EBADF);
  CHECK(send_fd(FdView{-1}, "a", pair.first).error == EBADF);
  // TCP would take the byte and lose the descriptor.
  const auto tcp = make_tcp();
  CHECK(send_fd(tcp.near, "a", pair.first).error == EOPNOTSUPP);
  CHECK(receive_some(tcp.far).empty());
  const std::string kilobyte(1024, 'x');
  while (write(pair.first, kilobyte).ok()) continue;
  CHECK(send_fd(pair.first, kilobyte, pair.first).would_block());
}

TEST_CASE("P25 SIGPIPE kills nobody who sends to a socket that is gone") {
  const int code = run_in_child([] {
    std::signal(SIGPIPE, SIG_DFL);
    SocketPair streams = open_socket_pair();
    streams.second.reset();
    const IoResult passed = send_fd(streams.first, "a", streams.first);
    if (!passed.failed() || passed.error != EPIPE) return 1;
    // Only a stream would raise it for a send_to, as for any other send.
    const Ends tcp = make_tcp();
    shutdown_write(tcp.near);
    const IoResult sent = send_to(tcp.near, "a", local_address(tcp.far));
    return sent.failed() && sent.error == EPIPE ? 0 : 2;
  });
  CHECK(code == 0);
}
