// A WriteBuffer in front of a socket that is often full, against one string.
#include <memory>

#include "fuzz.hpp"

using edgewise::WriteBuffer;
using fuzz::check;

namespace {

class Comparison {
 public:
  Comparison(std::size_t high_water, std::size_t bound)
      : high_water_(high_water), bound_(bound), buffer_({high_water, bound}) {}

  void append(std::size_t count) {
    const std::string_view bytes = text_.next(count);
    const bool fits = queued_.size() + bytes.size() <= bound_;
    check(buffer_.append(bytes) == fits, "append takes all up to the bound");
    if (fits) queued_ += bytes;
  }

  void flush() {
    const edgewise::IoResult result = buffer_.flush(connection_.near());
    queued_.erase(0, connection_.flushed(result, queued_, SIZE_MAX));
  }

  bool receive(std::size_t most) { return connection_.receive(most); }
  void close_far() { connection_.close_far(); }

  void move() {
    WriteBuffer other(std::move(buffer_));
    // A new one, lest what was not moved be found where it was left.
    std::destroy_at(&buffer_);
    std::construct_at(&buffer_);
    buffer_ = std::move(other);
  }

  void compare() const {
    check(buffer_.size() == queued_.size(), "size is what is queued");
    check(buffer_.empty() == queued_.empty(), "empty is no size");
    check(buffer_.above_high_water() == (queued_.size() > high_water_),
          "above high water is a size above it");
  }

  void finish() {
    compare();
    while (connection_.open() && !queued_.empty()) {
      flush();
      while (receive(SIZE_MAX)) continue;
    }
    compare();
  }

 private:
  std::size_t high_water_;
  std::size_t bound_;
  WriteBuffer buffer_;
  std::string queued_;
  fuzz::Connection connection_;
  fuzz::Text text_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  fuzz::Input input(data, size);
  const std::size_t high_water = input.amount();
  Comparison comparison(high_water, input.amount());
  while (!input.empty()) {
    const std::size_t choice = input.byte();
    switch (choice % 8) {
      case 0:
      case 1:
      case 2: comparison.append(input.amount()); break;
      case 3:
      case 4: comparison.flush(); break;
      case 5: comparison.receive(input.amount()); break;
      case 6: comparison.compare(); break;
      case 7: choice == 255 ? comparison.close_far() : comparison.move(); break;
    }
  }
  comparison.finish();
  return 0;
}
