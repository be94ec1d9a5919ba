// LineBuffer and FrameBuffer, each against a model that is given the whole
// stream at once and is too plain to be wrong.
#ifndef TESTS_FUZZ_MESSAGE_BUFFER_HPP
#define TESTS_FUZZ_MESSAGE_BUFFER_HPP

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "fuzz.hpp"

namespace fuzz {

// The messages, one after the other, and where each ends: many short strings
// would take longer than what is under test.
struct Messages {
  std::string bytes{};
  std::vector<std::size_t> ends{};

  void add(std::string_view message) {
    bytes += message;
    ends.push_back(bytes.size());
  }
  bool operator==(const Messages&) const = default;
};

// What a whole stream comes to.
struct Split {
  Messages messages{};
  std::string_view rest{};
  bool overlong = false;
};

// A Format has a Buffer, split(stream, longest) and message(length).
template <class Format>
class Comparison {
 public:
  explicit Comparison(std::size_t longest)
      : longest_(longest), buffer_(longest) {}

  std::size_t fed() const { return stream_.size(); }

  // Puts the bytes in, in pieces of a size, and takes all messages out after
  // each piece, or only when there is no more room.
  void put(std::string_view bytes, std::size_t piece, bool take_at_once) {
    stream_ += bytes;
    while (!bytes.empty()) {
      const std::size_t count = put_once(bytes.substr(0, piece));
      bytes.remove_prefix(count);
      if (take_at_once || count == 0) take_all();
    }
  }
  void put_nothing() { put_once({}); }

  bool take() {
    const std::optional<std::string_view> message = next();
    if (message) taken_.add(*message);
    check(taken_.ends.size() <= stream_.size(),
          "there are no more messages than bytes");
    drained_ = !message;
    return !drained_;
  }
  void take_all() {
    while (take()) continue;
  }

  void move() {
    forget_view();
    typename Format::Buffer other(std::move(buffer_));
    // A new one, lest what was not moved be found where it was left.
    std::destroy_at(&buffer_);
    std::construct_at(&buffer_, 1);
    buffer_ = std::move(other);
  }

  void compare() {
    take_all();
    const Split expected = Format::split(stream_, longest_);
    check(taken_ == expected.messages, "all messages, and no others, come out");
    check(buffer_.overlong() == expected.overlong,
          "the message that is too long is found, and no other");
    check(buffer_.rest() == expected.rest,
          "the rest is the beginning of the message that has not ended");
  }

 private:
  std::size_t put_once(std::string_view bytes) {
    forget_view();
    const auto room = buffer_.prepare();
    check(!drained_ || !room.empty(), "a drained buffer has room");
    const std::size_t count = std::min(bytes.size(), room.size());
    std::copy_n(bytes.begin(), count, room.begin());
    // What lies behind is none of the stream's, whatever it looks like.
    const auto behind = room.subspan(count);
    std::fill_n(behind.begin(), std::min<std::size_t>(behind.size(), 8), '\n');
    buffer_.commit(count);
    if (count > 0) drained_ = false;
    return count;
  }

  std::optional<std::string_view> next() {
    forget_view();
    const auto message = buffer_.next();
    // Comparing a long one again and again would take most of the time.
    if (message && message->size() < 1024) {
      view_ = *message;
      copy_ = *message;
    }
    return message;
  }

  // A view is good until now.
  void forget_view() {
    check(view_ == copy_, "a view is good until the next call");
    view_ = {};
    copy_.clear();
  }

  std::size_t longest_;
  typename Format::Buffer buffer_;
  std::string stream_;
  Messages taken_;
  bool drained_ = true;
  std::string_view view_;
  std::string copy_;
};

inline std::string repeat(std::string_view unit, std::size_t size) {
  std::string text(unit);
  while (text.size() < size) text += std::string(text);
  text.resize(size);
  return text;
}

template <class Format>
void compare_messages(const std::uint8_t* data, std::size_t size) {
  constexpr std::size_t most_fed = 200'000;
  constexpr std::size_t shortest_piece = 1;
  Input input(data, size);
  const bool bounded = input.byte() % 8 != 0;
  Comparison<Format> comparison(bounded ? input.amount() : SIZE_MAX);
  Text text;

  while (!input.empty() && comparison.fed() < most_fed) {
    const std::size_t choice = input.byte();
    const bool take_at_once = choice % 2 == 0;
    switch (choice / 2 % 8) {
      case 0:
      case 1: {
        const std::size_t piece = std::max(input.byte(), shortest_piece);
        comparison.put(input.bytes(input.byte()), piece, take_at_once);
        break;
      }
      case 2: {
        const std::string_view unit = input.bytes(1 + input.byte() % 8);
        const std::size_t amount = unit.empty() ? 0 : input.amount();
        // A long stream byte by byte would be slow and teach nothing.
        const std::size_t piece = std::max(input.amount(), 1 + amount / 64);
        comparison.put(repeat(unit, amount), piece, take_at_once);
        break;
      }
      case 3: {
        const std::string message = Format::message(input.amount(), text);
        const std::size_t piece =
            std::max(input.amount(), 1 + message.size() / 64);
        comparison.put(message, piece, take_at_once);
        break;
      }
      case 4: comparison.take(); break;
      case 5: comparison.take_all(); break;
      case 6: comparison.move(); break;
      case 7: comparison.put_nothing(); break;
    }
  }
  comparison.compare();
  comparison.move();
  comparison.compare();
}

}  // namespace fuzz

#endif  // TESTS_FUZZ_MESSAGE_BUFFER_HPP
