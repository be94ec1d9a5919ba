// LineBuffer, against a model that is too simple to be wrong, and against what
// it promises to cost. Linked with -Wl,--wrap=memchr, so that the bytes which
// are searched for newlines can be counted.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "allocation_count.hpp"
#include "support.hpp"

using namespace edgewise;
using namespace support;
using namespace std::string_literals;

namespace {
bool counting = false;
std::size_t scanned = 0;
}  // namespace

extern "C" void* __real_memchr(const void*, int, std::size_t) noexcept;
extern "C" void* __wrap_memchr(const void* bytes, int wanted,
                               std::size_t count) noexcept {
  void* const found = __real_memchr(bytes, wanted, count);
  if (counting) {
    scanned += found == nullptr
                   ? count
                   : static_cast<std::size_t>(static_cast<char*>(found) -
                                              static_cast<const char*>(bytes)) +
                         1;
  }
  return found;
}

namespace {

// Bytes searched for newlines while it lives.
class ScanCount {
 public:
  ScanCount() {
    scanned = 0;
    counting = true;
  }
  ~ScanCount() { counting = false; }
  ScanCount(const ScanCount&) = delete;
  ScanCount& operator=(const ScanCount&) = delete;
  std::size_t bytes() const { return scanned; }
};

using Lines = std::vector<std::string>;

// Puts in as much as there is room for, and returns how much that was.
std::size_t feed(LineBuffer& buffer, std::string_view bytes) {
  const auto room = buffer.prepare();
  const std::size_t count = std::min(bytes.size(), room.size());
  std::copy_n(bytes.begin(), count, room.begin());
  buffer.commit(count);
  return count;
}

Lines drain(LineBuffer& buffer) {
  Lines lines;
  while (const auto line = buffer.next()) lines.emplace_back(*line);
  return lines;
}

Lines feed_and_drain(LineBuffer& buffer, std::string_view bytes) {
  Lines lines;
  while (!bytes.empty()) {
    bytes.remove_prefix(feed(buffer, bytes));
    for (std::string& line : drain(buffer)) lines.push_back(std::move(line));
  }
  return lines;
}

// What a LineBuffer has to do, done in the plainest way.
struct Model {
  std::size_t max_line;
  std::string rest{};
  bool overlong = false;
  Lines lines{};

  void feed(std::string_view bytes) {
    if (overlong) return;
    for (const char byte : bytes) {
      rest += byte;
      const bool whole = byte == '\n';
      if (rest.size() > max_line || (!whole && rest.size() == max_line)) {
        overlong = true;
        rest.clear();
        return;
      }
      if (whole) lines.push_back(std::exchange(rest, {}));
    }
  }
};

using Random = std::mt19937;

std::size_t up_to(Random& random, std::size_t most) {
  return std::uniform_int_distribution<std::size_t>{0, most}(random);
}

// Any bytes, newlines more often than the others.
std::string random_text(Random& random, std::size_t size, std::size_t rarity) {
  std::string text(size, '\0');
  for (char& byte : text) {
    byte = up_to(random, rarity) == 0 ? '\n'
                                      : static_cast<char>(up_to(random, 255));
  }
  return text;
}

// A text of many lines of `length` bytes each.
std::string lines_of(std::size_t length, std::size_t count) {
  std::string text;
  for (std::size_t number = 0; number < count; ++number)
    text +=
        std::string(length - 1, static_cast<char>('a' + number % 26)) + '\n';
  return text;
}

}  // namespace

// ---------------------------------------------------------------------------
// Lines
// ---------------------------------------------------------------------------

TEST_CASE("lines come out whole, in order, newline included") {
  LineBuffer buffer;
  CHECK(feed_and_drain(buffer, "one\n\ntwo\r\nthree") ==
        Lines{"one\n", "\n", "two\r\n"});
  CHECK(buffer.rest() == "three");
  CHECK(feed_and_drain(buffer, "\n") == Lines{"three\n"});
  CHECK(buffer.rest().empty());
  CHECK_FALSE(buffer.overlong());
}

TEST_CASE("a line may hold any bytes, NUL too") {
  LineBuffer buffer;
  CHECK(feed_and_drain(buffer, "a\0b\377\n\0\n"s) ==
        Lines{"a\0b\377\n"s, "\0\n"s});
}

TEST_CASE("however a text is split, the same lines come out") {
  const std::string text = "a\n\nbc\r\ndef\ng\n\nhi"s;
  const Lines expected{"a\n", "\n", "bc\r\n", "def\n", "g\n", "\n"};
  const unsigned splits = 1U << (text.size() - 1);
  unsigned wrong = 0;
  for (unsigned cuts = 0; cuts < splits; ++cuts) {
    LineBuffer buffer;
    Lines lines;
    std::string piece;
    for (std::size_t at = 0; at < text.size(); ++at) {
      piece += text[at];
      const bool cut = at + 1 == text.size() || (cuts >> at & 1) != 0;
      if (!cut) continue;
      for (const std::string& line : feed_and_drain(buffer, piece))
        lines.push_back(line);
      piece.clear();
    }
    if (lines != expected || buffer.rest() != "hi") ++wrong;
  }
  CHECK(wrong == 0);
}

namespace {

// One random stream through both. False at the first difference.
bool agrees_with_model(Random& random, std::size_t largest_line,
                       std::size_t largest_cut) {
  const std::size_t max_line = 1 + up_to(random, largest_line);
  const std::size_t rarity = 1 + up_to(random, 2 * max_line);
  LineBuffer buffer{max_line};
  Model model{max_line};
  Lines lines;
  for (int turn = 0; turn < 40; ++turn) {
    const std::string text =
        random_text(random, up_to(random, largest_cut), rarity);
    model.feed(std::string_view(text).substr(0, feed(buffer, text)));
    // Now and then lines stay in the buffer while more comes in.
    const bool all = up_to(random, 3) != 0;
    for (std::size_t most = all ? SIZE_MAX : up_to(random, 3); most > 0;
         --most) {
      const auto line = buffer.next();
      if (!line) break;
      lines.emplace_back(*line);
    }
    if (all && (lines != model.lines || buffer.rest() != model.rest ||
                buffer.overlong() != model.overlong))
      return false;
  }
  return true;
}

}  // namespace

TEST_CASE(
    "random bytes, cuts and limits: the same lines, rest and over-long "
    "state as the model") {
  Random random{20240607};
  int wrong = 0;
  for (int round = 0; round < 2000; ++round)
    if (!agrees_with_model(random, 30, 20)) ++wrong;
  for (int round = 0; round < 200; ++round)
    if (!agrees_with_model(random, 400, 300)) ++wrong;
  for (int round = 0; round < 4; ++round)
    if (!agrees_with_model(random, 100'000, 70'000)) ++wrong;
  CHECK(wrong == 0);
}

TEST_CASE("filling from a descriptor loses nothing, whatever is available") {
  const auto ends = make_socketpair();
  Random random{7};
  std::string sent;
  std::string received;
  LineBuffer buffer{1 << 20};
  const std::string text = random_text(random, 600'000, 5000) + '\n';
  while (received.size() < text.size()) {
    if (sent.size() < text.size()) {
      const IoResult result =
          write(ends.near, std::string_view(text).substr(sent.size()));
      sent.append(text, sent.size(), result.bytes);
    }
    const IoResult result = buffer.fill(ends.far);
    REQUIRE_FALSE(result.ended());
    // Lines that stay are not lost by the next fill.
    std::size_t most = up_to(random, 20) == 0 ? SIZE_MAX : up_to(random, 4);
    if (result.bytes == 0) most = SIZE_MAX;
    for (; most > 0; --most) {
      const auto line = buffer.next();
      if (!line) break;
      received += *line;
    }
  }
  CHECK(received == text);
}

TEST_CASE("fill reads once: at most a block, whatever is available") {
  const auto ends = make_socketpair();
  send_all(ends.near, lines_of(100, 1000));
  LineBuffer buffer;
  const IoResult result = buffer.fill(ends.far);
  CHECK(result.ok());
  CHECK(result.bytes == LineBuffer::block_size);
  CHECK(drain(buffer).size() == LineBuffer::block_size / 100);
  CHECK(buffer.fill(ends.far).bytes == 100'000 - LineBuffer::block_size);
  CHECK(drain(buffer).size() == 1000 - LineBuffer::block_size / 100);
  CHECK(buffer.fill(ends.far).would_block());
}

TEST_CASE("while lines are left, fill reads only what has room behind them") {
  const auto ends = make_socketpair();
  const std::string text = lines_of(64, 1024);
  REQUIRE(text.size() == LineBuffer::block_size);
  send_all(ends.near, text.substr(0, text.size() - 10));
  LineBuffer buffer;
  CHECK(buffer.fill(ends.far).bytes == text.size() - 10);
  send_all(ends.near, text.substr(text.size() - 10) + "more\n");
  CHECK(buffer.fill(ends.far).bytes == 10);
  const IoResult full = buffer.fill(ends.far);
  CHECK(full.ok());
  CHECK(full.bytes == 0);
  CHECK(drain(buffer).size() == 1024);
  CHECK(buffer.fill(ends.far).bytes == 5);
  CHECK(drain(buffer) == Lines{"more\n"});
}

TEST_CASE("fill tells would-block, the end of the stream and failure") {
  auto ends = make_socketpair();
  LineBuffer buffer;
  CHECK(buffer.fill(ends.far).would_block());
  send_all(ends.near, "whole\nunfinished");
  ends.near.reset();
  CHECK(buffer.fill(ends.far).bytes == 16);
  CHECK(drain(buffer) == Lines{"whole\n"});
  CHECK(buffer.fill(ends.far).end_of_stream());
  CHECK(drain(buffer).empty());
  CHECK(buffer.rest() == "unfinished");
  CHECK(buffer.fill(FdView{-1}).error == EBADF);
  CHECK(buffer.rest() == "unfinished");
}

TEST_CASE("rest is empty while a line that was put together is handed out") {
  LineBuffer buffer;
  feed_and_drain(buffer, "begin");
  feed(buffer, "ning\nend");
  CHECK(buffer.next() == "beginning\n");
  CHECK(buffer.rest().empty());
  CHECK_FALSE(buffer.next());
  CHECK(buffer.rest() == "end");
}

// ---------------------------------------------------------------------------
// Over-long lines
// ---------------------------------------------------------------------------

namespace {

// Feeds a text in pieces of `step` bytes to a buffer and tells if it is too
// long for it.
bool is_too_long(std::size_t max_line, std::string_view text,
                 std::size_t step) {
  LineBuffer buffer{max_line};
  for (; !text.empty(); text.remove_prefix(std::min(step, text.size())))
    feed_and_drain(buffer, text.substr(0, step));
  return buffer.overlong();
}

}  // namespace

TEST_CASE(
    "a line of max_line bytes with its newline is fine, one more is not; "
    "without newline, max_line is one too many") {
  for (const std::size_t max_line : {1U, 2U, 3U, 10U, 65535U, 65536U, 65537U}) {
    for (const std::size_t step : {std::size_t{1}, max_line, max_line + 1}) {
      if (step == 1 && max_line > 100) continue;
      CAPTURE(max_line);
      CAPTURE(step);
      const std::string fits(max_line - 1, 'x');
      CHECK_FALSE(is_too_long(max_line, fits, step));
      CHECK_FALSE(is_too_long(max_line, fits + '\n', step));
      CHECK_FALSE(is_too_long(max_line, fits + '\n' + fits + '\n', step));
      CHECK(is_too_long(max_line, fits + 'x', step));
      CHECK(is_too_long(max_line, fits + "x\n", step));
      CHECK(is_too_long(max_line, fits + '\n' + fits + "x\n", step));
    }
  }
}

TEST_CASE("the default limit is 65,536 bytes, and a limit of none is one") {
  LineBuffer buffer;
  feed_and_drain(buffer, std::string(65535, 'x') + '\n');
  CHECK_FALSE(buffer.overlong());
  feed_and_drain(buffer, std::string(65536, 'x') + '\n');
  CHECK(buffer.overlong());

  LineBuffer smallest{0};
  CHECK(feed_and_drain(smallest, "\n\n") == Lines{"\n", "\n"});
  CHECK_FALSE(smallest.overlong());
  feed_and_drain(smallest, "x");
  CHECK(smallest.overlong());
}

TEST_CASE(
    "lines before an over-long one come out, it and all that follows "
    "don't") {
  for (const std::size_t step : {1U, 3U, 7U, 100U}) {
    CAPTURE(step);
    std::string_view text = "one\ntwo\nmuch too long\nfour\n";
    LineBuffer buffer{8};
    Lines lines;
    for (; !text.empty(); text.remove_prefix(std::min(step, text.size())))
      for (const auto& line : feed_and_drain(buffer, text.substr(0, step)))
        lines.push_back(line);
    CHECK(lines == Lines{"one\n", "two\n"});
    CHECK(buffer.overlong());
    CHECK(buffer.rest().empty());
    CHECK(feed_and_drain(buffer, "more\n").empty());
    CHECK(buffer.overlong());
  }
}

TEST_CASE(
    "an over-long buffer goes on reading, and throws away what it reads") {
  const auto ends = make_socketpair();
  LineBuffer buffer{4};
  feed_and_drain(buffer, "12345");
  REQUIRE(buffer.overlong());
  for (int turn = 0; turn < 20; ++turn) {
    send_all(ends.near, std::string(20'000, 'x'));
    CHECK(buffer.fill(ends.far).bytes == 20'000);
  }
  CHECK(buffer.fill(ends.far).would_block());
  CHECK_FALSE(buffer.next());
}

TEST_CASE("assigning ends the over-long state") {
  LineBuffer buffer{4};
  feed_and_drain(buffer, "12345");
  REQUIRE(buffer.overlong());
  buffer = LineBuffer{4};
  CHECK_FALSE(buffer.overlong());
  CHECK(feed_and_drain(buffer, "abc\n") == Lines{"abc\n"});
}

// ---------------------------------------------------------------------------
// Costs
// ---------------------------------------------------------------------------

TEST_CASE(
    "a line of 1 MiB that comes byte by byte: each byte is looked at "
    "once") {
  const std::size_t length = std::size_t{1} << 20;
  LineBuffer buffer{2 * length};
  const allocation_count::Since start;
  std::size_t size = 0;
  std::size_t looked_at = 0;
  {
    const ScanCount count;
    for (std::size_t at = 0; at < length; ++at) {
      const bool last = at + 1 == length;
      buffer.prepare()[0] = last ? '\n' : 'x';
      buffer.commit(1);
      const auto line = buffer.next();
      if (line) size = line->size();
      if (line.has_value() != last) break;
    }
    looked_at = count.bytes();
  }
  CHECK(size == length);
  CHECK(looked_at == length);
  CHECK(start.allocations() < 40);  // doubling, not adding
}

namespace {

// The bytes that memchr looks at while a random text comes in pieces.
std::size_t looked_at(Random& random, std::string_view text,
                      std::size_t largest_cut, bool leaves_lines) {
  LineBuffer buffer{1 << 20};
  const ScanCount count;
  while (!text.empty()) {
    text.remove_prefix(
        feed(buffer, text.substr(0, up_to(random, largest_cut))));
    while (buffer.next() && !(leaves_lines && up_to(random, 9) == 0)) continue;
  }
  while (buffer.next()) continue;
  static_cast<void>(!buffer.next());
  return count.bytes();
}

}  // namespace

// In pieces of 64 bytes and more, short lines are found without memchr.
TEST_CASE("however a stream is cut, memchr looks at no byte twice") {
  Random random{99};
  for (int round = 0; round < 30; ++round) {
    const std::string text = random_text(random, 100'000, 1 << round % 15);
    CHECK(looked_at(random, text, 63, false) == text.size());
    CHECK(looked_at(random, text, 999, true) <= text.size());
  }
}

TEST_CASE("memchr goes on where the search in blocks has found nothing") {
#ifdef __SSE2__
  constexpr std::size_t block = 64;
#else
  constexpr std::size_t block = 0;
#endif
  LineBuffer buffer;
  std::size_t expected = 0;
  std::string text;
  for (std::size_t length = 65; length < 300; ++length) {
    text += std::string(length - 1, 'x') + '\n';
    expected += length - block;
  }
  feed(buffer, text);
  const ScanCount count;
  while (buffer.next()) continue;
  CHECK(count.bytes() == expected);
}

TEST_CASE("lines of each length come out of one read, whatever comes before") {
  std::string text;
  Lines expected;
  for (std::size_t length = 1; length <= 200; ++length) {
    expected.push_back(
        std::string(length - 1, static_cast<char>('a' + length % 26)) + '\n');
    text += expected.back();
  }
  for (std::size_t offset = 0; offset < 130; ++offset) {
    LineBuffer buffer;
    Lines lines = feed_and_drain(buffer, std::string(offset, '.') + text);
    REQUIRE(lines.size() == expected.size());
    CHECK(lines[0] == std::string(offset, '.') + '\n');
    lines[0] = expected[0];
    CHECK(lines == expected);
  }
}

TEST_CASE("lines are views of the block that was read, side by side") {
  LineBuffer buffer;
  const auto room = buffer.prepare();
  const std::string_view text = "first\nsecond\nthird\n";
  std::copy(text.begin(), text.end(), room.begin());
  buffer.commit(text.size());
  const auto first = buffer.next();
  const auto second = buffer.next();
  const auto third = buffer.next();
  REQUIRE(first);
  REQUIRE(second);
  REQUIRE(third);
  CHECK(first->data() == room.data());
  CHECK(second->data() == first->data() + first->size());
  CHECK(third->data() == second->data() + second->size());
  CHECK(*third == "third\n");
}

TEST_CASE("only the line that a read cuts is copied") {
  LineBuffer buffer;
  feed_and_drain(buffer, "cut ");
  const auto room = buffer.prepare();
  const std::string_view text = "off\nwhole\n";
  std::copy(text.begin(), text.end(), room.begin());
  buffer.commit(text.size());
  CHECK(buffer.next() == "cut off\n");
  const auto whole = buffer.next();
  REQUIRE(whole);
  CHECK(whole->data() == room.data() + 4);
}

// What a cut line costs where strings grow to a little more than double, as in
// libc++: that is more than the next piece may keep, so it is given up.
#ifdef _LIBCPP_VERSION
constexpr long allocations_for_a_cut_line = 2;
#else
constexpr long allocations_for_a_cut_line = 0;
#endif

TEST_CASE("in the steady state nothing is allocated") {
  LineBuffer buffer;
  const std::string whole_lines = lines_of(100, 50);
  const auto turn = [&](std::string_view text) {
    feed(buffer, text);
    std::size_t bytes = 0;
    while (const auto line = buffer.next()) bytes += line->size();
    return bytes;
  };
  std::size_t bytes = turn(whole_lines);  // warms up
  allocation_count::Since start;
  for (int round = 0; round < 100; ++round) bytes += turn(whole_lines);
  CHECK(start.allocations() == 0);

  // Every read ends in the middle of a line, that the next one completes.
  bytes += turn(std::string_view(whole_lines).substr(0, 150));
  const std::string_view rotated =
      std::string_view(whole_lines).substr(50, 4900);
  bytes += turn(rotated);
  start = {};
  for (int round = 0; round < 100; ++round) bytes += turn(rotated);
  CHECK(start.allocations() <= 100 * allocations_for_a_cut_line);
  CHECK(bytes == 101 * 5000 + 100 + 101 * 4900);
}

TEST_CASE("10,000 idle buffers own no memory") {
  {
    LineBuffer warm;  // leaves this thread its spare block
    feed_and_drain(warm, "warm\n");
  }
  std::vector<LineBuffer> buffers(10'000);
  const allocation_count::Since start;
  for (LineBuffer& buffer : buffers) {
    feed(buffer, "a line that comes in two pieces, ");
    while (buffer.next()) continue;
    feed(buffer, "neither of them short\n");
    while (buffer.next()) continue;
  }
  CHECK(start.bytes() == 0);

  const auto ends = make_socketpair();
  const allocation_count::Since again;
  for (LineBuffer& buffer : buffers)
    static_cast<void>(buffer.fill(ends.far).would_block());
  CHECK(again.bytes() == 0);
  CHECK(again.allocations() == 0);
}

TEST_CASE("a buffer that holds a piece of a line holds little more") {
  LineBuffer buffer{1 << 20};
  LineBuffer other;
  feed_and_drain(other, "warm\n");
  const allocation_count::Since start;
  feed_and_drain(buffer, std::string(1000, 'x'));
  CHECK(buffer.rest().size() == 1000);
  CHECK(start.bytes() > 1000);
  CHECK(start.bytes() < 2100);
}

TEST_CASE(
    "what a long line needed is given back when a short piece comes "
    "after it") {
  LineBuffer buffer;
  feed_and_drain(buffer, "warm\n");
  const allocation_count::Since start;
  feed_and_drain(buffer, std::string(20'000, 'x'));
  feed_and_drain(buffer, "\nshort piece of about forty bytes, no more");
  CHECK(buffer.rest().size() == 41);
  CHECK(start.bytes() > 0);
  CHECK(start.bytes() < 100);
}

TEST_CASE("an over-long buffer owns no memory") {
  LineBuffer buffer{1000};
  feed_and_drain(buffer, "warm\n");
  const std::string piece(999, 'x');
  const allocation_count::Since start;
  feed_and_drain(buffer, piece);
  CHECK(start.bytes() > 0);
  feed_and_drain(buffer, piece);
  CHECK(buffer.overlong());
  LineBuffer other;  // gets this thread's one spare block
  const allocation_count::Since given_up;
  static_cast<void>(other.prepare());
  other.commit(0);
  CHECK(given_up.allocations() == 0);
  feed(buffer, piece);  // and next is not even asked
  CHECK(start.bytes() == 0);
}

TEST_CASE("prepare without bytes gives the block back") {
  LineBuffer first;
  LineBuffer second;
  feed_and_drain(first, "warm\n");
  const char* const block = first.prepare().data();
  first.commit(0);
  const allocation_count::Since start;
  CHECK(second.prepare().data() == block);
  second.commit(0);
  CHECK(start.allocations() == 0);
}

TEST_CASE("a thread keeps one spare block, and none when it has ended") {
  const allocation_count::Since start;
  std::thread([] {
    std::vector<LineBuffer> buffers(3);
    for (LineBuffer& buffer : buffers) feed(buffer, "pending\n");
    const allocation_count::Since full;
    for (LineBuffer& buffer : buffers) drain(buffer);
    CHECK(full.bytes() < -static_cast<long>(LineBuffer::block_size) * 3 / 2);
    CHECK(full.bytes() > -static_cast<long>(LineBuffer::block_size) * 5 / 2);
  }).join();
  CHECK(start.bytes() < static_cast<long>(LineBuffer::block_size));
}

TEST_CASE("out of memory ends the program") {
  const int code = run_in_child([] {
    std::set_terminate([] { ::_exit(42); });
    std::thread([] {  // a new thread has no spare block
      LineBuffer buffer;
      allocation_count::refuse = true;
      static_cast<void>(buffer.prepare());
    })
        .join();
    return 1;
  });
  CHECK(code == 42);
}

// ---------------------------------------------------------------------------
// Life
// ---------------------------------------------------------------------------

TEST_CASE("a buffer moves with its lines, its piece of a line and its limit") {
  LineBuffer first{10};
  feed_and_drain(first, "begin");
  feed(first, "ning\nsecond\nthi");
  LineBuffer second{std::move(first)};
  CHECK(second.next() == "beginning\n");
  LineBuffer third{99};
  feed(third, "forgotten\n");
  third = std::move(second);
  CHECK(third.next() == "second\n");
  CHECK_FALSE(third.next());
  CHECK(third.rest() == "thi");
  feed_and_drain(third, "rd is too long");
  CHECK(third.overlong());
}

namespace {
// So that { socket } makes a struct of a socket and a LineBuffer.
LineBuffer make_of_nothing() { return {}; }
}  // namespace

static_assert(!std::is_convertible_v<std::size_t, LineBuffer>);
static_assert(!std::is_convertible_v<int, LineBuffer>);
static_assert(std::is_constructible_v<LineBuffer, std::size_t>);
static_assert(std::is_nothrow_default_constructible_v<LineBuffer>);

TEST_CASE("a buffer is made of nothing where one is wanted") {
  LineBuffer lines = {};
  CHECK(feed_and_drain(lines, "a\nb\n") == Lines{"a\n", "b\n"});
  lines = make_of_nothing();
  CHECK(feed_and_drain(lines, std::string(65'535, 'x') + '\n').size() == 1);
  CHECK_FALSE(lines.overlong());
  feed_and_drain(lines, std::string(65'536, 'x') + '\n');
  CHECK(lines.overlong());
}

TEST_CASE("a moved-from buffer is empty and works on") {
  LineBuffer first;
  feed_and_drain(first, "piece of a line that is not short");
  feed(first, "pending\n");
  const LineBuffer second{std::move(first)};
  // NOLINTNEXTLINE(bugprone-use-after-move): that is the point
  CHECK(first.rest().empty());
  CHECK_FALSE(first.next());
  CHECK(feed_and_drain(first, "again\n") == Lines{"again\n"});
}

TEST_CASE("a moved-from buffer has forgotten where lines ended") {
  const std::string others = std::string(99, 'x') + '\n';
  LineBuffer first;
  feed(first, "one\ntwo\nthree\n" + std::string(99, '.'));
  REQUIRE(first.next() == "one\n");
  LineBuffer second{std::move(first)};
  // NOLINTNEXTLINE(bugprone-use-after-move): that is the point
  CHECK(feed_and_drain(first, others) == Lines{others});
  CHECK(second.next() == "two\n");
  first = std::move(second);
  CHECK(first.next() == "three\n");
  CHECK(feed_and_drain(second, others) == Lines{others});
}

TEST_CASE("a buffer that is destroyed with bytes pending frees them") {
  const allocation_count::Since start;
  std::thread([] {
    LineBuffer lines;
    feed(lines, "pending\n");
    LineBuffer piece;
    feed_and_drain(piece, std::string(5000, 'x'));
    LineBuffer both;
    feed_and_drain(both, std::string(5000, 'x'));
    feed(both, "pending\n");
  }).join();
  CHECK(start.bytes() < 5000);
}

TEST_CASE("a buffer may be filled on one thread and emptied on another") {
  LineBuffer buffer;
  std::thread([&] { feed(buffer, "from afar\n"); }).join();
  CHECK(drain(buffer) == Lines{"from afar\n"});
}

namespace {
// Destroyed after this thread's spare blocks are. The sanitizers watch.
LineBuffer at_exit_with_lines;
LineBuffer at_exit_with_a_piece;
}  // namespace

TEST_CASE("a static buffer may hold bytes when the program ends") {
  feed(at_exit_with_lines, "one\ntwo\n");
  CHECK(at_exit_with_lines.next() == "one\n");
  feed_and_drain(at_exit_with_a_piece, std::string(1000, 'x'));
  CHECK(at_exit_with_a_piece.rest().size() == 1000);
}
