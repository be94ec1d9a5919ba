// Address: what it reads, what it prints, what it refuses.
#include <doctest/doctest.h>
#include <net/if.h>
#include <netdb.h>
#include <sys/un.h>

#include <cstring>
#include <string>
#include <string_view>
#include <type_traits>

#include "support.hpp"

using namespace edgewise;
using namespace support;
using namespace std::string_literals;

static_assert(std::is_trivially_copyable_v<Address>);
static_assert(sizeof(Address) == 116);
static_assert(noexcept(Address::parse(std::string_view())));

namespace {

struct Reading {
  std::string_view text;
  std::string_view printed;
  int family;
  int port;
};

constexpr Reading readings[] = {
    {"127.0.0.1:8080", "127.0.0.1:8080", AF_INET, 8080},
    {"0.0.0.0:0", "0.0.0.0:0", AF_INET, 0},
    {"255.255.255.255:65535", "255.255.255.255:65535", AF_INET, 65535},
    {"1.2.3.4:00080", "1.2.3.4:80", AF_INET, 80},
    {"[::1]:9000", "[::1]:9000", AF_INET6, 9000},
    {"[::]:0", "[::]:0", AF_INET6, 0},
    {"[2001:DB8:0:0:0:0:0:1]:80", "[2001:db8::1]:80", AF_INET6, 80},
    {"[::ffff:1.2.3.4]:80", "[::ffff:1.2.3.4]:80", AF_INET6, 80},
    {"[ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255]:65535",
     "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535", AF_INET6, 65535},
};

const std::string refused[] = {
    "",
    ":",
    ":80",
    "127.0.0.1",
    "127.0.0.1:",
    "127.0.0.1:65536",
    "127.0.0.1:99999999999999999999",
    "127.0.0.1:-1",
    "127.0.0.1:+80",
    "127.0.0.1: 80",
    "127.0.0.1:80 ",
    " 127.0.0.1:80",
    "127.0.0.1 :80",
    "127.0.0.1:80x",
    "127.0.0.1:0x50",
    "127.0.0.1:http",
    "127.0.0.1:80:80",
    "127.0.0.1.:80",
    "127.0.0:80",
    "256.0.0.1:80",
    "1.2.3.4.5:80",
    "localhost:80",
    "::1",
    "::1:80",
    "2001:db8::1:80",
    "::ffff:1.2.3.4:80",
    "[::1]",
    "[::1]:",
    "[::1]80",
    "[::1:80",
    "::1]:80",
    "[::1]x:80",
    "x[::1]:80",
    "x::1]:80",
    "[]:80",
    "[:]:80",
    "[[::1]]:80",
    "[127.0.0.1]:80",
    "[:::1]:80",
    "[1:2:3:4:5:6:7:8:9]:80",
    "[12345::]:80",
    "[::1%]:80",
    "[::1%no-such-zone]:80",
    "[::1%a-zone-whose-name-is-longer-than-interfaces-have]:80",
    "127.0.0.1%lo:80",
    "127.0.0.1:80\0"s,
    "127.0.0.1:8\0000"s,
    "127.0.0.1\0:80"s,
    "\000127.0.0.1:80"s,
    "[::1\0]:80"s,
    "[::1%lo\0]:80"s,
};

Address parsed(std::string_view text) {
  const auto address = Address::parse(text);
  REQUIRE(address);
  return *address;
}

}  // namespace

TEST_CASE("an address reads what it prints, and prints what it reads") {
  for (const Reading& reading : readings) {
    CAPTURE(reading.text);
    const Address address = parsed(reading.text);
    CHECK(address.to_string() == reading.printed);
    CHECK(address.family() == reading.family);
    CHECK(address.port() == reading.port);
    CHECK(address.data()->sa_family == reading.family);
    CHECK(parsed(address.to_string()) == address);
  }
}

TEST_CASE(
    "an address refuses what is not exactly a numeric address and a "
    "port") {
  for (const std::string& text : refused) {
    CAPTURE(text);
    CHECK_FALSE(Address::parse(text));
  }
}

TEST_CASE("an address reads a part of a text that goes on") {
  const std::string_view text = "127.0.0.1:8080";
  CHECK(parsed(text.substr(0, 12)).port() == 80);
}

TEST_CASE("a host of any length is read or refused, never overrun") {
  for (std::size_t length = 0; length < 200; ++length) {
    const std::string host(length, 'x');
    CHECK_FALSE(Address::from(host, 80));
    CHECK_FALSE(Address::parse(host + ":80"));
    CHECK_FALSE(Address::parse("[::1%" + host + "]:80"));
  }
}

TEST_CASE("an address comes from a host and a port as well") {
  CHECK(Address::from("127.0.0.1", 80) == parsed("127.0.0.1:80"));
  CHECK(Address::from("::1", 80) == parsed("[::1]:80"));
  CHECK(Address::from("::1", 0)->port() == 0);
  CHECK_FALSE(Address::from("[::1]", 80));
  CHECK_FALSE(Address::from("", 80));
  CHECK_FALSE(Address::from("localhost", 80));
  CHECK_FALSE(Address::from("127.0.0.1:80", 80));
  CHECK_FALSE(Address::from("127.0.0.1\0"s, 80));
  CHECK_FALSE(Address::from("::1%", 80));
  CHECK_FALSE(Address::from("::1%no-such-zone", 80));
}

TEST_CASE("a zone is read and printed by the name of its interface") {
  const unsigned loopback = ::if_nametoindex("lo");
  if (loopback == 0) {
    MESSAGE("skipped: there is no interface lo");
    return;
  }
  const Address address = parsed("[fe80::1%lo]:80");
  ::sockaddr_in6 native;
  REQUIRE(address.size() == sizeof native);
  std::memcpy(&native, address.data(), sizeof native);
  CHECK(native.sin6_scope_id == loopback);
  CHECK(address.to_string() == "[fe80::1%lo]:80");
  CHECK(parsed("[::1%lo]:80").to_string() == "[::1%lo]:80");
  CHECK(Address::from("fe80::1%lo", 80) == address);
  CHECK_FALSE(address == parsed("[fe80::1]:80"));
}

TEST_CASE(
    "a zone may be a number, and is printed as one if no interface has "
    "it") {
  const Address nowhere = parsed("[fe80::1%2147483647]:80");
  ::sockaddr_in6 native;
  std::memcpy(&native, nowhere.data(), sizeof native);
  CHECK(native.sin6_scope_id == 2147483647);
  CHECK(nowhere.to_string() == "[fe80::1%2147483647]:80");
  CHECK(nowhere != parsed("[fe80::1%2147483646]:80"));
  CHECK_FALSE(Address::parse("[fe80::1%4294967296]:80"));
  CHECK_FALSE(Address::parse("[fe80::1%-1]:80"));
  CHECK_FALSE(Address::parse("[fe80::1%2147483647x]:80"));

  const unsigned loopback = ::if_nametoindex("lo");
  if (loopback == 0) return;
  CHECK(parsed("[fe80::1%" + std::to_string(loopback) + "]:80").to_string() ==
        "[fe80::1%lo]:80");
}

TEST_CASE("addresses are equal if family, host, port and zone are") {
  CHECK(parsed("127.0.0.1:80") == parsed("127.0.0.1:80"));
  CHECK(parsed("127.0.0.1:80") != parsed("127.0.0.1:81"));
  CHECK(parsed("127.0.0.1:80") != parsed("127.0.0.2:80"));
  CHECK(parsed("[::1]:80") == parsed("[0:0::1]:80"));
  CHECK(parsed("[::1]:80") != parsed("[::1]:81"));
  CHECK(parsed("[::1]:80") != parsed("[::2]:80"));
  CHECK(parsed("0.0.0.0:80") != parsed("[::]:80"));
  CHECK(parsed("1.2.3.4:80") != parsed("[::ffff:1.2.3.4]:80"));
  CHECK(Address() == Address());
  CHECK(Address() != parsed("0.0.0.0:0"));
}

TEST_CASE("an address of no family is unspecified") {
  const Address address{};
  CHECK(address.family() == AF_UNSPEC);
  CHECK(address.port() == 0);
  CHECK(address.to_string() == "unspecified");
}

TEST_CASE("what a system call has written becomes an address") {
  ::sockaddr_storage storage{};
  auto* const native = reinterpret_cast<::sockaddr*>(&storage);
  const Address four = parsed("127.0.0.1:8080");
  std::memcpy(&storage, four.data(), four.size());
  CHECK(Address::from_native(native, four.size()) == four);
  CHECK(Address::from_native(native, four.size()).size() ==
        sizeof(::sockaddr_in));

  const Address six = parsed("[2001:db8::1]:443");
  std::memcpy(&storage, six.data(), six.size());
  CHECK(Address::from_native(native, six.size()) == six);
  CHECK(Address::from_native(native, six.size()).size() ==
        sizeof(::sockaddr_in6));
}

TEST_CASE("what is of another family or too short becomes unspecified") {
  ::sockaddr_un path{};
  path.sun_family = AF_UNIX;
  std::strcpy(path.sun_path, "/a/path/that/is/longer/than/any/address");
  auto* const native = reinterpret_cast<::sockaddr*>(&path);
  const auto family_of = [&](::socklen_t size) {
    return Address::from_native(native, size).family();
  };
  CHECK(family_of(sizeof path) == AF_UNIX);
  CHECK(family_of(2) == AF_UNIX);
  CHECK(family_of(1) == AF_UNSPEC);
  CHECK(family_of(0) == AF_UNSPEC);
  path.sun_family = AF_INET6;
  CHECK(family_of(sizeof path) == AF_INET6);
  CHECK(family_of(sizeof(::sockaddr_in6) - 1) == AF_UNSPEC);
  path.sun_family = AF_NETLINK;
  CHECK(family_of(12) == AF_UNSPEC);
}

TEST_CASE("of an IPv4 or IPv6 address, no less is one, and no more is needed") {
  for (const char* text : {"127.0.0.1:8080", "[2001:db8::1]:443"}) {
    CAPTURE(text);
    const Address address = parsed(text);
    ::sockaddr_storage storage{};
    std::memset(&storage, 'x', sizeof storage);
    std::memcpy(&storage, address.data(), address.size());
    for (::socklen_t size = 0; size <= sizeof storage; ++size) {
      const Address copy =
          Address::from_native(reinterpret_cast<::sockaddr*>(&storage), size);
      const bool whole = size >= address.size();
      REQUIRE(copy == (whole ? address : Address()));
      REQUIRE(copy.size() == (whole ? address : Address()).size());
      REQUIRE(copy.to_string() == (whole ? text : "unspecified"));
    }
  }
}

namespace {

// A path as many programs hand it to system calls: the whole struct, or a
// sockaddr_storage that it lies in, zeros to the end.
Address from_padded(std::string_view path,
                    std::size_t size = sizeof(::sockaddr_un)) {
  ::sockaddr_un native{};
  REQUIRE(path.size() <= sizeof native.sun_path);
  native.sun_family = AF_UNIX;
  std::memcpy(native.sun_path, path.data(), path.size());
  ::sockaddr_storage storage{};
  std::memcpy(&storage, &native, sizeof native);
  return Address::from_native(reinterpret_cast<::sockaddr*>(&storage),
                              static_cast<::socklen_t>(size));
}

}  // namespace

TEST_CASE("a path padded with zeros is the path, of whatever length") {
  for (std::size_t length = 1; length <= 107; ++length) {
    CAPTURE(length);
    const std::string path = '/' + std::string(length - 1, 'x');
    for (const std::size_t size :
         {sizeof(::sockaddr_un), sizeof(::sockaddr_storage)}) {
      const Address padded = from_padded(path, size);
      REQUIRE(padded == parsed("unix:" + path));
      REQUIRE(padded.size() == parsed("unix:" + path).size());
      REQUIRE(padded.to_string() == "unix:" + path);
      REQUIRE(parsed(padded.to_string()) == padded);
    }
  }
  CHECK(from_padded("/a") != from_padded("/b"));
}

TEST_CASE(
    "an abstract name keeps its zeros, since each of them is the name's") {
  const Address padded = from_padded("\0rat"s);
  CHECK(padded.size() == sizeof(::sockaddr_un));
  CHECK(padded != parsed("unix:@rat"));
  CHECK(padded.to_string() == "unix:@rat" + std::string(104, '\0'));
  CHECK(parsed(padded.to_string()) == padded);
  CHECK(from_padded("\0rat"s, sizeof(::sockaddr_storage)) == padded);
}

TEST_CASE("a path that leaves no room for a NUL is printed whole") {
  const std::string path = '/' + std::string(107, 'x');
  const Address address = from_padded(path);
  CHECK(address.family() == AF_UNIX);
  CHECK(address.to_string() == "unix:" + path);
  // The kernel counts a NUL behind it, but takes none.
  CHECK(address.size() == sizeof(::sockaddr_un));
  CHECK(from_padded(path, sizeof(::sockaddr_un) + 1) == address);
  CHECK(from_padded(path, sizeof(::sockaddr_storage)) == address);
  CHECK(address != from_padded(path.substr(0, 107)));
  CHECK_FALSE(Address::parse(address.to_string()));
}

TEST_CASE("what getaddrinfo finds becomes an address") {
  ::addrinfo hints{};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV;
  hints.ai_socktype = SOCK_STREAM;
  ::addrinfo* found = nullptr;
  REQUIRE(::getaddrinfo("127.0.0.1", "80", &hints, &found) == 0);
  CHECK(Address::from_native(found->ai_addr, found->ai_addrlen) ==
        parsed("127.0.0.1:80"));
  ::freeaddrinfo(found);
}
