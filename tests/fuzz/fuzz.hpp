// What the fuzz targets have in common: the fuzzer's bytes as a source of
// decisions, text that no two places of a stream share, and a connection that
// is soon full.
#ifndef TESTS_FUZZ_FUZZ_HPP
#define TESTS_FUZZ_FUZZ_HPP

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <edgewise.hpp>
#include <string>
#include <string_view>
#include <utility>

namespace fuzz {

// The fuzzer takes an abort for a finding and keeps the input that led to it.
inline void check(bool truth, const char* sentence) {
  if (truth) return;
  std::fprintf(stderr, "\nNOT SO: %s\n", sentence);
  std::abort();
}

// The fuzzer's bytes, from front to back. When they are used up, all is zero.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size)
      : bytes_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const { return bytes_.empty(); }

  std::string_view bytes(std::size_t most) {
    const std::string_view front = bytes_.substr(0, most);
    bytes_.remove_prefix(front.size());
    return front;
  }

  std::size_t number(std::size_t count_of_bytes) {
    std::size_t value = 0;
    for (const char byte : bytes(count_of_bytes))
      value = value << 8 | static_cast<unsigned char>(byte);
    return value;
  }
  std::size_t byte() { return number(1); }

  // A number of bytes: small, or about as large as some block, where mistakes
  // gather. What is large must not take as many bytes of the input.
  std::size_t amount() {
    const std::size_t kind = byte();
    switch (kind % 8) {
      case 0:
      case 1: return byte();
      case 2: return number(2);
      case 3: return number(3) % (2 << 16);
      case 4: return 4096 - 128 + byte();
      case 5: return 65536 - 128 + byte();
      default: return kind / 8;
    }
  }

 private:
  std::string_view bytes_;
};

// Bytes of which one that is lost, doubled or moved is noticed.
class Text {
 public:
  std::string_view next(std::size_t count) {
    const std::string_view all = noise();
    count = std::min(count, all.size() / 2);
    if (all.size() - place_ < count) place_ = place_ % 251;
    const std::string_view piece = all.substr(place_, count);
    place_ += count;
    return piece;
  }

 private:
  static std::string_view noise() {
    static const std::string text = [] {
      std::string made(std::size_t{1} << 19, '\0');
      std::uint32_t state = 1;
      for (char& byte : made) {
        state = state * 1664525 + 1013904223;
        byte = static_cast<char>(state >> 24);
      }
      return made;
    }();
    return text;
  }

  std::size_t place_ = 0;
};

// Two connected sockets, and what is on the way from `near` to `far`.
class Connection {
 public:
  Connection() {
    edgewise::SocketPair pair = edgewise::open_socket_pair();
    near_ = std::move(pair.first);
    far_ = std::move(pair.second);
    // The kernel makes it a few thousand bytes.
    const int least = 1;
    ::setsockopt(near_.get(), SOL_SOCKET, SO_SNDBUF, &least, sizeof least);
  }

  edgewise::FdView near() const { return near_; }
  bool open() const { return static_cast<bool>(far_); }

  // The peer goes away, perhaps with bytes unread.
  void close_far() { far_.reset(); }

  // True if something came, and then it is what had been sent.
  bool receive(std::size_t most) {
    most = std::min(most, room.size());
    if (most == 0 || !open()) return false;
    const edgewise::IoResult result = edgewise::read(far_, {room.data(), most});
    check(result.bytes == std::min(most, on_the_way_.size()),
          "what was sent arrives");
    check(on_the_way_.starts_with(std::string_view(room.data(), result.bytes)),
          "what arrives is what was queued, in order");
    on_the_way_.erase(0, result.bytes);
    return result.bytes > 0;
  }

  // Of a flush that had so many bytes of `queued` to send. Returns how many it
  // did send.
  std::size_t flushed(const edgewise::IoResult& result, std::string_view queued,
                      std::size_t budget) {
    const std::size_t wanted = std::min(queued.size(), budget);
    check(result.bytes <= wanted, "a flush sends no more than it may");
    check((result.error != 0) == result.failed(),
          "only a failure has an errno");
    check(!result.end_of_stream(), "a flush meets no end of stream");
    check(open() || wanted == 0 || result.failed(),
          "a flush to a peer that is gone fails");
    check(!result.failed() || (!open() && result.bytes == 0),
          "a flush fails only if the peer is gone");
    if (open())
      check(result.ok() == (result.bytes == wanted),
            "a flush is ok when it has sent what it may, and only then");
    check(!result.would_block() || !writable(),
          "a flush that would block has filled the socket");
    if (open()) on_the_way_ += queued.substr(0, result.bytes);
    return result.bytes;
  }

 private:
  bool writable() const {
    ::pollfd asked{near_.get(), POLLOUT, 0};
    return ::poll(&asked, 1, 0) > 0;  // -1: a signal came
  }

  static inline std::string room = std::string(65536, '\0');

  edgewise::Fd near_;
  edgewise::Fd far_;
  std::string on_the_way_;
};

}  // namespace fuzz

#endif  // TESTS_FUZZ_FUZZ_HPP
