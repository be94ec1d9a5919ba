// What LineBuffer costs beside the search for newlines that it cannot avoid,
// and whether a long line costs more than its length. Prints a Markdown table.
//
//   c++ -std=c++20 -O2 -Iinclude tests/bench/line_buffer.cpp -o line_buffer
//   ./line_buffer
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <edgewise.hpp>
#include <string>
#include <string_view>

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

constexpr std::size_t total = std::size_t{64} << 20;
constexpr std::size_t chunk = std::size_t{64} << 10;
constexpr int rounds = 5;  // of which the fastest counts

// Keeps the optimizer from leaving out what nobody looks at.
volatile std::size_t lines_seen = 0;

// The fastest of a few runs: the others were disturbed.
template <class Run>
double fastest(Run run) {
  double best = 1e9;
  for (int round = 0; round < rounds; ++round) {
    const auto start = Clock::now();
    lines_seen = run();
    best = std::min(best, Seconds(Clock::now() - start).count());
  }
  return best;
}

std::string text_of_lines(std::size_t length) {
  std::string text(total, 'x');
  for (std::size_t at = length - 1; at < total; at += length) text[at] = '\n';
  return text;
}

// Copies a chunk at a time, as a read does, then hands the lines out.
std::size_t count_with_line_buffer(std::string_view text) {
  edgewise::LineBuffer buffer;
  std::size_t lines = 0;
  while (!text.empty()) {
    const auto room = buffer.prepare();
    const std::size_t count = std::min({chunk, room.size(), text.size()});
    std::memcpy(room.data(), text.data(), count);
    buffer.commit(count);
    text.remove_prefix(count);
    while (buffer.next()) ++lines;
  }
  return lines;
}

// The same bytes, searched where they lie.
std::size_t count_with_memchr(std::string_view text) {
  std::size_t lines = 0;
  while (const void* found = std::memchr(text.data(), '\n', text.size())) {
    const char* const newline = static_cast<const char*>(found);
    text.remove_prefix(static_cast<std::size_t>(newline - text.data()) + 1);
    ++lines;
  }
  return lines;
}

// One line, a byte at a time.
std::size_t feed_byte_by_byte(std::size_t length) {
  edgewise::LineBuffer buffer{length};
  std::size_t lines = 0;
  for (std::size_t at = 1; at <= length; ++at) {
    buffer.prepare()[0] = at == length ? '\n' : 'x';
    buffer.commit(1);
    while (buffer.next()) ++lines;
  }
  return lines;
}

void print_row(const char* what, double value, const char* unit,
               double reference, const char* beside) {
  std::printf("| %s | %.2f %s | %.2f %s |\n", what, value, unit, reference,
              beside);
}

void measure_throughput(std::size_t length) {
  const std::string text = text_of_lines(length);
  constexpr double gigabytes = static_cast<double>(total) / 1e9;
  const double ours = fastest([&] { return count_with_line_buffer(text); });
  const double bare = fastest([&] { return count_with_memchr(text); });
  const std::string what = "lines of " + std::to_string(length) + " bytes";
  print_row(what.c_str(), gigabytes / ours, "GB/s", gigabytes / bare,
            "GB/s bare memchr");
}

double measure_long_line(std::size_t mebibytes, double before) {
  const double took =
      fastest([&] { return feed_byte_by_byte(mebibytes << 20); });
  const std::string what =
      "one line of " + std::to_string(mebibytes) + " MiB, byte by byte";
  if (before == 0) {
    std::printf("| %s | %.2f ms | |\n", what.c_str(), took * 1e3);
  } else {
    print_row(what.c_str(), took * 1e3, "ms", took / before,
              "times the line before (2 is linear)");
  }
  return took;
}

}  // namespace

int main() {
  std::printf("| what | LineBuffer | beside it |\n|---|---|---|\n");
  for (const std::size_t length : {16U, 64U, 512U, 4096U})
    measure_throughput(length);
  double before = 0;
  for (const std::size_t mebibytes : {1U, 2U, 4U})
    before = measure_long_line(mebibytes, before);
  return 0;
}
