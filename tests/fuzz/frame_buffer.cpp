// However a stream is cut, FrameBuffer makes the same of it as a walk from
// prefix to prefix through the whole of it.
#include "message_buffer.hpp"

namespace {

struct Frames {
  using Buffer = edgewise::FrameBuffer;

  static std::size_t length_at_front(std::string_view stream) {
    std::size_t length = 0;
    for (const char byte : stream.substr(0, 4))
      length = length * 256 + static_cast<unsigned char>(byte);
    return length;
  }

  static fuzz::Split split(std::string_view stream, std::size_t max_frame) {
    fuzz::Split result;
    while (stream.size() >= 4) {
      const std::size_t length = length_at_front(stream);
      result.overlong = length > max_frame;
      if (result.overlong) return result;
      if (stream.size() < 4 + length) break;
      result.messages.add(stream.substr(4, length));
      stream.remove_prefix(4 + length);
    }
    result.rest = stream;
    return result;
  }

  static std::string message(std::size_t length, fuzz::Text& text) {
    const std::string_view body = text.next(length);
    const auto prefix =
        edgewise::frame_prefix(static_cast<std::uint32_t>(body.size()));
    fuzz::check(length_at_front({prefix.data(), prefix.size()}) == body.size(),
                "a prefix is the length, the highest byte first");
    return std::string(prefix.data(), prefix.size()).append(body);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  fuzz::compare_messages<Frames>(data, size);
  return 0;
}
