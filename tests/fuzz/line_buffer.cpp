// However a stream is cut, LineBuffer makes the same of it as a search for
// newlines in the whole of it.
#include "message_buffer.hpp"

namespace {

struct Lines {
  using Buffer = edgewise::LineBuffer;

  static fuzz::Split split(std::string_view stream, std::size_t max_line) {
    fuzz::Split result;
    for (;;) {
      const std::size_t newline = stream.find('\n');
      const bool whole = newline != std::string_view::npos;
      // A line that has not ended will have one byte more at least.
      const std::size_t length = (whole ? newline : stream.size()) + 1;
      result.overlong = length > std::max<std::size_t>(max_line, 1);
      if (result.overlong) return result;
      if (!whole) {
        result.rest = stream;
        return result;
      }
      result.messages.add(stream.substr(0, length));
      stream.remove_prefix(length);
    }
  }

  static std::string message(std::size_t length, fuzz::Text& text) {
    std::string line(text.next(length));
    std::replace(line.begin(), line.end(), '\n', ' ');
    if (!line.empty()) line.back() = '\n';
    return line;
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  fuzz::compare_messages<Lines>(data, size);
  return 0;
}
