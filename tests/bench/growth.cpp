// growth: what one wait costs, with few and with many who are idle. Prints a
// Markdown table.
//
// Two pollers, of which one watches a single idle socket and the other one as
// many as its argument says (10,000). In turn, each is asked again and again
// for one more socket, which stays readable: so nothing but the wait is timed.
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "edgewise.hpp"

namespace {

using namespace edgewise;
using Clock = std::chrono::steady_clock;

constexpr int rounds = 41;
constexpr int waits = 10'000;  // in each round

struct Crowd {
  Poller poller;
  std::vector<SocketPair> idle;
  SocketPair active = open_socket_pair();

  explicit Crowd(std::size_t count) {
    while (idle.size() < count) {
      idle.push_back(open_socket_pair());
      poller.add(idle.back().first, Token{idle.size()}, Interest::readable);
    }
    poller.add(active.first, Token{0}, Interest::readable);
    static_cast<void>(write(active.second, "x"));
  }

  // Nanoseconds for a wait that finds one event.
  double measure() {
    const auto start = Clock::now();
    for (int i = 0; i < waits; ++i)
      if (poller.wait().size() != 1) std::abort();
    const std::chrono::duration<double, std::nano> took = Clock::now() - start;
    return took.count() / waits;
  }
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  const std::size_t wanted =
      argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 10'000;
  const std::size_t most = limit.rlim_cur / 2 - 16;
  Crowd few(1);
  Crowd many(std::min(wanted, most));
  std::vector<double> alone;
  std::vector<double> among_many;
  std::vector<double> ratios;
  for (int round = 0; round < rounds; ++round) {
    alone.push_back(few.measure());
    among_many.push_back(many.measure());
    ratios.push_back(among_many.back() / alone.back());
  }
  std::printf(
      "| who is idle | ns for a wait |\n|---|---|\n"
      "| 1 | %.0f |\n| %zu | %.0f |\n| **ratio, round by round** | %.3f |\n",
      median(alone), many.idle.size(), median(among_many), median(ratios));
  return 0;
}
