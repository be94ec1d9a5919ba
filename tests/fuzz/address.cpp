// Address, given any text and any bytes. What a text means is found out a
// second time, by hand, and both have to agree.
#include <arpa/inet.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/un.h>

#include <cstring>
#include <memory>
#include <optional>
#include <string>

#include "fuzz.hpp"

using edgewise::Address;
using fuzz::check;
using namespace std::string_view_literals;

namespace {

constexpr std::size_t path_offset = offsetof(::sockaddr_un, sun_path);

// A socket address as the kernel has it, in exactly as much memory.
class Native {
 public:
  explicit Native(std::string_view bytes)
      : size_(bytes.size()), bytes_(new char[bytes.size()]) {
    std::copy(bytes.begin(), bytes.end(), bytes_.get());
  }
  template <class Kind>
  explicit Native(const Kind& address, std::size_t size = sizeof(Kind))
      : Native({reinterpret_cast<const char*>(&address), size}) {}

  void set_family(::sa_family_t family) {
    if (size_ >= sizeof family)
      std::memcpy(bytes_.get(), &family, sizeof family);
  }
  const ::sockaddr* data() const {
    return reinterpret_cast<const ::sockaddr*>(bytes_.get());
  }
  ::socklen_t size() const { return static_cast<::socklen_t>(size_); }
  std::string_view bytes() const { return {bytes_.get(), size_}; }

 private:
  std::size_t size_;
  std::unique_ptr<char[]> bytes_;
};

std::optional<std::uint32_t> number(std::string_view digits,
                                    std::uint64_t most) {
  std::uint64_t value = 0;
  if (digits.empty()) return std::nullopt;
  for (const char digit : digits) {
    if (digit < '0' || digit > '9') return std::nullopt;
    value = value * 10 + static_cast<std::uint64_t>(digit - '0');
    if (value > most) return std::nullopt;
  }
  return static_cast<std::uint32_t>(value);
}

std::optional<Native> read_path(std::string_view path) {
  ::sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() > (path.starts_with('@') ? 108 : 107)) return std::nullopt;
  const bool is_file = !path.empty() && path.front() != '@';
  if (is_file && path.find('\0') != path.npos) return std::nullopt;
  for (std::size_t at = 0; at < path.size(); ++at)
    address.sun_path[at] = path[at];
  if (!path.empty() && !is_file) address.sun_path[0] = '\0';
  return Native(address, path_offset + path.size() + (is_file ? 1 : 0));
}

std::optional<Native> read_v4(const std::string& host, std::uint16_t port) {
  ::sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  if (::inet_pton(AF_INET, host.c_str(), &address.sin_addr) != 1)
    return std::nullopt;
  return Native(address);
}

std::optional<Native> read_v6(std::string host, std::uint16_t port) {
  ::sockaddr_in6 address{};
  address.sin6_family = AF_INET6;
  address.sin6_port = htons(port);
  if (const auto percent = host.find('%'); percent != host.npos) {
    const std::string zone = host.substr(percent + 1);
    host.resize(percent);
    address.sin6_scope_id = ::if_nametoindex(zone.c_str());
    if (address.sin6_scope_id == 0) {
      const auto index = number(zone, UINT32_MAX);
      if (!index) return std::nullopt;
      address.sin6_scope_id = *index;
    }
  }
  if (::inet_pton(AF_INET6, host.c_str(), &address.sin6_addr) != 1)
    return std::nullopt;
  return Native(address);
}

std::optional<Native> read_host(std::string_view host, std::uint16_t port) {
  // The longest address with the longest name of an interface. Only a number
  // with many zeros in front could be longer.
  if (host.size() > 62 || host.find('\0') != host.npos) return std::nullopt;
  const bool v6 = host.find(':') != host.npos;
  return v6 ? read_v6(std::string(host), port)
            : read_v4(std::string(host), port);
}

std::optional<Native> read(std::string_view text) {
  if (text.substr(0, 5) == "unix:") return read_path(text.substr(5));
  const std::size_t colon = text.find_last_of(':');
  if (colon == text.npos) return std::nullopt;
  const auto port = number(text.substr(colon + 1), 65535);
  if (!port) return std::nullopt;
  std::string_view host = text.substr(0, colon);
  if (host.find(':') != host.npos) {
    if (host.front() != '[' || host.back() != ']') return std::nullopt;
    host = host.substr(1, host.size() - 2);
    if (host.find(':') == host.npos) return std::nullopt;
  }
  return read_host(host, static_cast<std::uint16_t>(*port));
}

// What holds of every address, wherever it comes from.
void check_consistent(const Address& address) {
  check(address.size() >= sizeof(::sa_family_t) &&
            address.size() <= sizeof(::sockaddr_un),
        "an address is as long as one can be");
  check(address.data()->sa_family == address.family(),
        "the kernel is told the family");
  check(address == address, "an address is equal to itself");
  const Address copy = Address::from_native(address.data(), address.size());
  check(copy == address, "an address read back is the same");
  check(copy.to_string() == address.to_string(), "and looks the same");
}

void check_prints_and_parses(const Address& address) {
  const std::string text = address.to_string();
  const std::optional<Address> again = Address::parse(text);
  check(again.has_value(), "what is printed can be parsed");
  check(*again == address, "what is printed parses to an equal address");
  check(again->to_string() == text, "and prints the same again");
}

void check_same(const std::optional<Address>& address,
                const std::optional<Native>& expected) {
  check(address.has_value() == expected.has_value(),
        "an address is one, and nothing else is");
  if (!address) return;
  const char* data = reinterpret_cast<const char*>(address->data());
  check(std::string_view(data, address->size()) == expected->bytes(),
        "the address is the one that the text names");
  check_consistent(*address);
  check_prints_and_parses(*address);
}

void check_native(const Native& native) {
  const Address address = Address::from_native(native.data(), native.size());
  check_consistent(address);
  if (address.family() == AF_UNSPEC) return;
  // The kernel's own answer can be a byte longer than what it takes: unix(7).
  const char* data = reinterpret_cast<const char*>(address.data());
  check(native.bytes().starts_with(std::string_view(data, address.size())),
        "an address has the bytes that it was made of");
  if (address.family() == AF_INET || address.family() == AF_INET6)
    check_prints_and_parses(address);
}

void check_natives(std::string_view bytes) {
  check_native(Native(bytes));
  for (const int family : {AF_UNIX, AF_INET, AF_INET6}) {
    for (const std::size_t size :
         {bytes.size(), sizeof(::sockaddr_in), sizeof(::sockaddr_in6),
          sizeof(::sockaddr_un)}) {
      Native native(bytes.substr(0, size));
      native.set_family(static_cast<::sa_family_t>(family));
      check_native(native);
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  check_same(Address::parse(text), read(text));
  check_same(Address::from_path(text), read_path(text));
  const auto port = static_cast<std::uint16_t>(size * 257);
  check_same(Address::from(text, port), read_host(text, port));
  check_natives(text);
  return 0;
}
