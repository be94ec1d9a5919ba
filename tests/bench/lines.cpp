// How fast a stream is cut into lines: LineBuffer, the search for newlines that
// nothing can avoid, and what others offer. Prints Markdown; tests/bench/lines
// builds and runs it.
//
// WITH_LIBEVENT and WITH_ASIO say that those are here.
#ifdef WITH_LIBEVENT
  #include <event2/buffer.h>
#endif
#ifdef WITH_ASIO
  #include <asio/buffer.hpp>
  #include <asio/read_until.hpp>
  #include <asio/streambuf.hpp>
#endif

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "edgewise.hpp"

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;
using edgewise::LineBuffer;

constexpr std::size_t total = std::size_t{64} << 20;
constexpr std::size_t chunk_size = LineBuffer::block_size;
constexpr int rounds = 5;

std::string text_of_lines(std::size_t length, std::size_t size) {
  std::string text(size, 'x');
  for (std::size_t at = length - 1; at < size; at += length) text[at] = '\n';
  return text;
}

std::size_t count_by_memchr(std::string_view text) {
  std::size_t lines = 0;
  while (const void* found = std::memchr(text.data(), '\n', text.size())) {
    const char* const newline = static_cast<const char*>(found);
    text.remove_prefix(static_cast<std::size_t>(newline - text.data()) + 1);
    ++lines;
  }
  return lines;
}

// ---------------------------------------------------------------------------
// Each way: the number of lines in a text that comes in pieces
// ---------------------------------------------------------------------------

using Way = std::size_t (*)(std::string_view text, std::size_t piece);

// The limit: no copy, and no piece to be looked after.
std::size_t memchr_in_place(std::string_view text, std::size_t) {
  return count_by_memchr(text);
}

// What a read does, and then the limit. The copy goes where LineBuffer's goes:
// how fast it is depends on the alignment.
std::size_t memchr_of_a_copy(std::string_view text, std::size_t piece) {
  LineBuffer owner;
  const auto room = owner.prepare();
  std::size_t lines = 0;
  for (; !text.empty(); text.remove_prefix(std::min(piece, text.size()))) {
    const std::size_t count = text.copy(room.data(), piece);
    lines += count_by_memchr({room.data(), count});
  }
  owner.commit(0);
  return lines;
}

std::size_t line_buffer(std::string_view text, std::size_t piece) {
  LineBuffer buffer{text.size()};
  std::size_t lines = 0;
  while (!text.empty()) {
    const auto room = buffer.prepare();
    const std::size_t count =
        text.copy(room.data(), std::min(piece, room.size()));
    buffer.commit(count);
    text.remove_prefix(count);
    while (buffer.next()) ++lines;
  }
  return lines;
}

std::size_t getline(std::string_view text, std::size_t piece) {
  std::string pending;
  std::string line;
  std::size_t lines = 0;
  for (; !text.empty(); text.remove_prefix(std::min(piece, text.size()))) {
    pending += text.substr(0, piece);
    std::istringstream in(std::exchange(pending, {}));
    while (std::getline(in, line) && !in.eof()) ++lines;
    pending = std::exchange(line, {});
  }
  return lines;
}

std::size_t find_and_erase(std::string_view text, std::size_t piece) {
  std::string pending;
  std::size_t lines = 0;
  for (; !text.empty(); text.remove_prefix(std::min(piece, text.size()))) {
    pending += text.substr(0, piece);
    for (std::size_t end = pending.find('\n'); end != pending.npos;
         end = pending.find('\n')) {
      lines += pending.substr(0, end + 1).empty() ? 0 : 1;
      pending.erase(0, end + 1);
    }
  }
  return lines;
}

#ifdef WITH_LIBEVENT
std::size_t evbuffer_lines(std::string_view text, std::size_t piece) {
  ::evbuffer* const buffer = evbuffer_new();
  std::size_t lines = 0;
  for (; !text.empty(); text.remove_prefix(std::min(piece, text.size()))) {
    evbuffer_add(buffer, text.data(), std::min(piece, text.size()));
    while (char* line = evbuffer_readln(buffer, nullptr, EVBUFFER_EOL_LF)) {
      ++lines;
      std::free(line);
    }
  }
  evbuffer_free(buffer);
  return lines;
}
#endif

#ifdef WITH_ASIO
// A stream that has so many bytes for each read.
struct Pieces {
  std::string_view text;
  std::size_t piece;

  template <class Buffers>
  std::size_t read_some(const Buffers& buffers, asio::error_code& error) {
    error = text.empty() ? asio::error::eof : asio::error_code();
    const std::size_t count =
        asio::buffer_copy(buffers, asio::buffer(text.substr(0, piece)));
    text.remove_prefix(count);
    return count;
  }
  template <class Buffers>
  std::size_t read_some(const Buffers& buffers) {
    asio::error_code ignored;
    return read_some(buffers, ignored);
  }
};

std::size_t read_until(std::string_view text, std::size_t piece) {
  Pieces stream{text, piece};
  asio::streambuf buffer;
  asio::error_code error;
  std::size_t lines = 0;
  while (const std::size_t size =
             asio::read_until(stream, buffer, '\n', error)) {
    ++lines;
    buffer.consume(size);
  }
  return lines;
}
#endif

// ---------------------------------------------------------------------------
// A text as long as one read, many times, without copying it: next by itself
// ---------------------------------------------------------------------------

std::size_t memchr_in_place_again(std::string_view text, std::size_t) {
  std::size_t lines = 0;
  for (std::size_t at = 0; at < total; at += text.size())
    lines += count_by_memchr(text);
  return lines;
}

// The thread's spare block has what was read into it last, but for its first
// bytes, which were of use meanwhile.
std::size_t line_buffer_again(std::string_view text, std::size_t) {
  LineBuffer buffer;
  std::size_t lines = 0;
  for (std::size_t at = 0; at < total; at += text.size()) {
    text.copy(buffer.prepare().data(), at == 0 ? text.size() : 8);
    buffer.commit(text.size());
    while (buffer.next()) ++lines;
  }
  return lines;
}

// ---------------------------------------------------------------------------

struct Row {
  const char* name;
  Way way;
};

double seconds_of(const Way way, std::string_view text, std::size_t piece,
                  std::size_t expected) {
  const auto start = Clock::now();
  if (way(text, piece) != expected) {
    std::fprintf(stderr, "lines: a way that loses lines has no figure\n");
    std::exit(1);
  }
  return Seconds(Clock::now() - start).count();
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// In each round each way has its turn, so that what disturbs one is likely to
// disturb the others.
std::vector<double> measure(const std::vector<Row>& rows, std::string_view text,
                            std::size_t piece, std::size_t lines) {
  std::vector<std::vector<double>> seconds(rows.size());
  for (int round = 0; round < rounds; ++round)
    for (std::size_t row = 0; row < rows.size(); ++row)
      seconds[row].push_back(seconds_of(rows[row].way, text, piece, lines));
  std::vector<double> medians;
  for (const auto& each : seconds) medians.push_back(median(each));
  return medians;
}

// The first row is the limit that all are compared with.
void print_throughput(const std::vector<Row>& rows, std::size_t text_size) {
  constexpr std::size_t lengths[]{16, 64, 512, 4096};
  std::vector<std::vector<double>> columns;
  std::printf("|  |");
  for (const std::size_t length : lengths) {
    std::printf(" lines of %zu bytes |", length);
    const std::string text = text_of_lines(length, text_size);
    columns.push_back(measure(rows, text, chunk_size, total / length));
  }
  std::printf("\n|---|---|---|---|---|\n");
  for (std::size_t row = 0; row < rows.size(); ++row) {
    std::printf("| %s |", rows[row].name);
    for (const auto& column : columns)
      std::printf(" %.2f (%.2f) |",
                  static_cast<double>(total) / 1e9 / column[row],
                  column[row] / column[0]);
    std::printf("\n");
  }
}

// ---------------------------------------------------------------------------
// A line byte by byte
// ---------------------------------------------------------------------------

void print_long_lines(const std::vector<Row>& rows) {
  constexpr std::size_t kibibyte = 1024;
  const std::string text = text_of_lines(64 * kibibyte, 64 * kibibyte);
  std::printf("\nOne line of 64 KiB, byte by byte:\n\n|  | ms |\n|---|---|\n");
  const std::vector<double> took = measure(rows, text, 1, 1);
  for (std::size_t row = 0; row < rows.size(); ++row)
    std::printf("| %s | %.2f |\n", rows[row].name, took[row] * 1e3);
  std::printf(
      "\nLonger ones, through LineBuffer:\n\n|  | ms | times the one "
      "above |\n|---|---|---|\n");
  double before = 0;
  for (const std::size_t mebibytes : {1U, 2U, 4U, 8U}) {
    const std::size_t size = mebibytes * kibibyte * kibibyte;
    const std::string line = text_of_lines(size, size);
    const double took = measure({{"", line_buffer}}, line, 1, 1).front();
    std::printf("| %zu MiB | %.2f |", mebibytes, took * 1e3);
    if (before > 0) std::printf(" %.2f", took / before);
    std::printf(" |\n");
    before = took;
  }
}

}  // namespace

int main() {
  const std::vector<Row> ways{
      {"memchr in place: the limit", memchr_in_place},
      {"memchr of a copy", memchr_of_a_copy},
      {"LineBuffer", line_buffer},
#ifdef WITH_LIBEVENT
      {"libevent, evbuffer_readln", evbuffer_lines},
#endif
#ifdef WITH_ASIO
      {"asio::read_until, streambuf", read_until},
#endif
      {"std::getline, istringstream", getline},
      {"std::string, find and erase", find_and_erase},
  };
  std::printf(
      "64 MiB, 64 KiB at a time: GB/s, and in brackets the time beside "
      "the limit\n\n");
  print_throughput(ways, total);
  std::printf(
      "\nThe same 64 KiB again and again, where the cache has them:\n\n");
  print_throughput({{"memchr in place: the limit", memchr_in_place_again},
                    {"LineBuffer, without a copy", line_buffer_again}},
                   chunk_size);
  print_long_lines({ways.begin() + 2, ways.end()});
  return 0;
}
