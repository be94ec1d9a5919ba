// What two threads may touch at the same time, and what they may not know of
// each other. It is built twice: threads_tsan is the same under
// ThreadSanitizer, which reports a race even where it does no harm.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

// doctest's CHECK may be used in one thread only, so the others count what goes
// wrong there.
using Failures = std::atomic<int>;

// Runs a function on several threads at once, which begin together, and waits
// for their end. It is given its thread's number, from 0 on.
template <class Function>
void on_threads(int count, Function function) {
  std::atomic<int> missing{count};
  std::vector<std::thread> threads;
  for (int number = 0; number < count; ++number) {
    threads.emplace_back([&, number] {
      --missing;
      while (missing > 0) std::this_thread::yield();
      function(number);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Looks again and again until something is so. False: it is not to be.
template <class Condition>
bool eventually(Condition condition) {
  const auto limit = Clock::now() + patience;
  while (!condition()) {
    if (Clock::now() > limit) return false;
    std::this_thread::yield();
  }
  return true;
}

Poller watch(FdView fd, Token token, Mode mode = Mode::level) {
  Poller poller;
  poller.add(fd, token, Interest::readable, mode);
  return poller;
}

bool put(FdView fd, std::string_view bytes) {
  return write(fd, bytes).bytes == bytes.size();
}

}  // namespace

// ---------------------------------------------------------------------------
// Waker
// ---------------------------------------------------------------------------

namespace {

// What the comment of Waker shows.
class Mailbox {
 public:
  void post(int letter) {
    {
      const std::lock_guard lock(mutex_);
      letters_.push_back(letter);
    }
    waker_.wake();
  }
  std::vector<int> take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(letters_, {});
  }
  Waker& waker() { return waker_; }

 private:
  std::mutex mutex_{};
  std::vector<int> letters_{};
  Waker waker_{};
};

// Several producers post at will, this thread takes what there is at each
// event. Returns how many letters came before a wait ended without an event,
// which means that a wake was lost, or all have come. Those of one producer
// have to come in order.
int letters_received(Mode mode, int producers, int letters_each) {
  Mailbox mailbox;
  Poller poller = watch(mailbox.waker(), Token{1}, mode);
  std::thread all([&] {
    on_threads(producers, [&](int producer) {
      for (int letter = 0; letter < letters_each; ++letter) {
        mailbox.post(producer * letters_each + letter);
        if (letter % 8 == 0) std::this_thread::yield();
      }
    });
  });
  std::vector<int> next(static_cast<std::size_t>(producers), 0);
  int received = 0;
  bool in_order = true;
  while (received < producers * letters_each) {
    if (poller.wait(patience).empty()) break;
    // An edge needs no clear, so both ways of use are tried.
    if (mode == Mode::level && !mailbox.waker().clear()) break;
    for (const int letter : mailbox.take()) {
      int& expected = next[static_cast<std::size_t>(letter / letters_each)];
      in_order &= letter % letters_each == expected++;
      ++received;
    }
  }
  all.join();
  CHECK(in_order);
  return received;
}

}  // namespace

TEST_CASE("no letter is left in a mailbox whose waker was woken") {
  for (const Mode mode : {Mode::level, Mode::edge}) {
    CAPTURE(to_string(mode));
    CHECK(letters_received(mode, 4, 2000) == 8000);
  }
}

// Each letter is waited for, so each wake meets a loop that sleeps, or is just
// about to.
TEST_CASE("two loops that wake each other never both sleep") {
  constexpr int rounds = 3000;
  Mailbox there;
  Mailbox back;
  const auto pass_on = [](Mailbox& in, Mailbox& out, int count) {
    Poller poller = watch(in.waker(), Token{1});
    for (int number = 0; number < count;) {
      if (poller.wait(patience).empty() || !in.waker().clear()) return number;
      for (const int letter : in.take()) {
        if (letter != number) return number;
        out.post(number++);
      }
    }
    return count;
  };
  int echoed = 0;
  std::thread echo([&] { echoed = pass_on(there, back, rounds); });
  there.post(0);
  Poller poller = watch(back.waker(), Token{1});
  int returned = 0;
  while (returned < rounds) {
    if (poller.wait(patience).empty() || !back.waker().clear()) break;
    for (const int letter : back.take()) {
      CHECK(letter == returned);
      if (++returned < rounds) there.post(returned);
    }
  }
  echo.join();
  CHECK(returned == rounds);
  CHECK(echoed == rounds);
}

// ---------------------------------------------------------------------------
// Poller
// ---------------------------------------------------------------------------

namespace {

// A loop on a thread of its own that answers each event with a wake of whoever
// its token names: the number in its low byte. The token is put on record
// first.
class Loop {
 public:
  static constexpr std::size_t most = 4;

  Loop() {
    poller.add(stop_, stop, Interest::readable);
    thread_ = std::thread([this] { run(); });
  }
  ~Loop() {
    stop_.wake();
    thread_.join();
  }
  Loop(const Loop&) = delete;
  Loop& operator=(const Loop&) = delete;

  // Waits until the loop has been told something of this client, and returns
  // the token.
  Token told(std::size_t client) {
    Client& each = clients_.at(client);
    if (each.poller.wait(patience).empty()) return stop;
    each.reply.clear();
    return Token{each.token.load()};
  }

  Poller poller{};

 private:
  static constexpr Token stop{UINT64_MAX};
  struct Client {
    Waker reply{};
    std::atomic<std::uint64_t> token{0};
    Poller poller = watch(reply, Token{1});
  };

  void run() {
    for (;;) {
      for (const Event& event : poller.wait()) {
        if (event.token() == stop) return;
        const auto number = static_cast<std::uint64_t>(event.token());
        Client& client = clients_.at(number % 256);
        client.token = number;
        client.reply.wake();
      }
    }
  }

  std::array<Client, most> clients_{};
  Waker stop_{};
  std::thread thread_{};
};

// One client's descriptor through all changes, each of which has to take effect
// in the wait that is on. One-shot, so that each is one event.
void change_and_be_told(Loop& loop, int number, Failures& failures) {
  constexpr Interest reading = Interest::readable;
  const auto client = static_cast<std::size_t>(number);
  const SocketPair ends = open_socket_pair();
  std::uint64_t turn = 0;
  const auto token = [&] { return Token{256 * turn + client}; };
  const auto expect = [&](bool good) {
    if (!good) ++failures;
  };
  for (int round = 0; round < 100 && failures == 0; ++round) {
    ++turn;
    loop.poller.add(ends.second, token(), reading, Mode::oneshot);
    expect(put(ends.first, "a"));
    expect(loop.told(client) == token());
    ++turn;
    loop.poller.modify(ends.second, token(), reading, Mode::oneshot);
    expect(loop.told(client) == token());
    ++turn;
    loop.poller.set(ends.second, token(), reading, Mode::oneshot);
    expect(loop.told(client) == token());
    expect(loop.poller.remove(ends.second));
    expect(!loop.poller.remove(ends.second));
    // Were it still known, this token would come again.
    expect(put(ends.first, "b"));
    ++turn;
    loop.poller.set(ends.second, token(), Interest::writable, Mode::oneshot);
    expect(loop.told(client) == token());
    expect(loop.poller.remove(ends.second));
    std::array<char, 8> room{};
    expect(read(ends.second, room).bytes == 2);
  }
}

}  // namespace

TEST_CASE("several threads add, modify, set and remove while another waits") {
  Failures failures{0};
  Loop loop;
  on_threads(static_cast<int>(Loop::most),
             [&](int number) { change_and_be_told(loop, number, failures); });
  CHECK(failures == 0);
}

// Neither finds it there, and one of them comes too late to add it.
TEST_CASE("two threads may set one new descriptor at once") {
  constexpr int rounds = 2000;
  Poller poller;
  const Waker waker;
  waker.wake();
  Failures failures{0};
  std::atomic<int> arrived{0};
  on_threads(2, [&](int number) {
    int meetings = 0;
    const auto meet = [&] {
      ++arrived;
      ++meetings;
      const auto both = [&] { return arrived >= 2 * meetings; };
      // To yield takes longer than what is to coincide.
      for (int spins = 0; spins < 10'000 && !both(); ++spins) continue;
      return eventually(both);
    };
    const Token own{static_cast<std::uint64_t>(number)};
    for (int round = 0; round < rounds; ++round) {
      if (!meet()) ++failures;
      const Thrown thrown =
          thrown_by([&] { poller.set(waker, own, Interest::readable); });
      if (thrown.error != 0) ++failures;
      if (!meet()) ++failures;
      if (number != 0) continue;
      const Events events = poller.wait(0ms);
      if (events.size() != 1 || events[0].token() > Token{1}) ++failures;
      if (!poller.remove(waker)) ++failures;
    }
  });
  CHECK(failures == 0);
}

TEST_CASE("threads may take turns in waiting on a poller") {
  constexpr int turns_each = 200;
  Waker waker;
  Poller poller = watch(waker, Token{7});
  std::mutex mutex;
  Failures failures{0};
  on_threads(3, [&](int) {
    for (int turn = 0; turn < turns_each; ++turn) {
      const std::lock_guard lock(mutex);
      waker.wake();
      const Events events = poller.wait(patience);
      if (events.size() != 1 || events[0].token() != Token{7}) ++failures;
      waker.clear();
    }
  });
  CHECK(failures == 0);
}

namespace {

constexpr Token data{1};
constexpr Token stop{2};

// Two threads wait on one epoll instance, each until it has been told of the
// data, and main writes up to `writes` times: the next time when somebody has
// been told. Nobody reads. Returns how many threads were told.
//
// One of them waits through the Poller, whose one array of events is why a
// second one may not: that one has an array of its own.
int threads_told(Mode mode, int writes, int expected) {
  const SocketPair ends = open_socket_pair();
  const Waker end;
  Poller poller = watch(end, stop);
  poller.add(ends.second, data, Interest::readable, mode);
  std::atomic<int> told{0};

  std::thread first([&] {
    for (const Event& event : poller.wait(patience))
      if (event.token() == data) ++told;
  });
  std::thread second([&] {
    std::array<::epoll_event, 4> events{};
    const auto limit = static_cast<int>(patience.count());
    const int count =
        ::epoll_wait(FdView(poller).get(), events.data(), 4, limit);
    for (int index = 0; index < count; ++index)
      if (Token{events.at(static_cast<std::size_t>(index)).data.u64} == data)
        ++told;
  });
  for (int write = 0; write < writes; ++write) {
    CHECK(put(ends.first, "a"));
    CHECK(eventually([&] { return told >= std::min(write + 1, expected); }));
  }
  // Whoever is to be told more has to be told without the end's help.
  CHECK(eventually([&] { return told >= expected; }));
  end.wake();
  first.join();
  second.join();
  return told;
}

}  // namespace

TEST_CASE("P19 of two threads on one epoll both are told of one descriptor") {
  SUBCASE("level-triggered: of the same byte") {
    CHECK(threads_told(Mode::level, 1, 2) == 2);
  }
  SUBCASE("edge-triggered: of one byte each, while the first is at work") {
    CHECK(threads_told(Mode::edge, 1, 1) == 1);
    CHECK(threads_told(Mode::edge, 2, 2) == 2);
  }
  SUBCASE("edge-triggered and one-shot: only one of them, whatever comes") {
    CHECK(threads_told(Mode::edge | Mode::oneshot, 3, 1) == 1);
    CHECK(threads_told(Mode::oneshot, 3, 1) == 1);
  }
}

// ---------------------------------------------------------------------------
// P18: several pollers on one listener
// ---------------------------------------------------------------------------

namespace {

// True if this process's thread sleeps in the kernel.
bool is_asleep(::pid_t thread) {
  std::ifstream file("/proc/self/task/" + std::to_string(thread) + "/stat");
  std::string line;
  std::getline(file, line);
  const auto name_end = line.rfind(')');
  return name_end != std::string::npos && line.substr(name_end, 3) == ") S";
}

// A thread that waits once on a poller of its own, for a listener, until it is
// told of a connection or to stop.
class Acceptor {
 public:
  Acceptor(FdView listener, Mode mode, std::atomic<int>& told)
      : poller_(watch(stop_, stop)) {
    poller_.add(listener, data, Interest::readable, mode);
    thread_ = std::thread([this, &told] {
      id_ = static_cast<::pid_t>(::syscall(SYS_gettid));
      for (const Event& event : poller_.wait(patience))
        if (event.token() == data) ++told;
    });
  }
  ~Acceptor() {
    stop_.wake();
    thread_.join();
  }
  Acceptor(const Acceptor&) = delete;
  Acceptor& operator=(const Acceptor&) = delete;

  bool waits() const { return id_ != 0 && is_asleep(id_); }

 private:
  Waker stop_{};
  Poller poller_;
  std::atomic<::pid_t> id_{0};
  std::thread thread_{};
};

constexpr int acceptors = 4;

// How many of four threads are woken by one connection, which nobody accepts.
int woken_by_a_connection(Mode mode, int at_least) {
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  std::atomic<int> told{0};
  {
    std::vector<std::unique_ptr<Acceptor>> all;
    for (int number = 0; number < acceptors; ++number)
      all.push_back(std::make_unique<Acceptor>(listener, mode, told));
    CHECK(eventually([&] {
      return std::all_of(all.begin(), all.end(),
                         [](const auto& each) { return each->waits(); });
    }));
    const Connected client = connect(local_address(listener));
    CHECK_FALSE(client.failed());
    CHECK(eventually([&] { return told >= at_least; }));
  }
  return told;
}

}  // namespace

// A thread that was not quite asleep when the connection came finds it all the
// same. Hence several rounds, and a bound instead of a number.
TEST_CASE("P18 a connection wakes every poller, but only one exclusive one") {
  constexpr int rounds = 10;
  int plain = 0;
  int exclusive = 0;
  for (int round = 0; round < rounds; ++round) {
    plain += woken_by_a_connection(Mode::level, acceptors);
    exclusive += woken_by_a_connection(Mode::exclusive, 1);
  }
  CHECK(plain == rounds * acceptors);
  CHECK(exclusive >= rounds);
  CHECK(exclusive <= plain / 2);
}

namespace {

// Accepts until all connections have been accepted by somebody.
void serve(FdView listener, Mode mode, int connections,
           std::atomic<int>& accepted, const Waker& all_done) {
  Poller poller = watch(listener, data, mode);
  poller.add(all_done, stop, Interest::readable);
  for (;;) {
    const Events events = poller.wait(patience);
    if (events.empty()) return;
    for (const Event& event : events) {
      if (event.token() == stop) return;
      while (accept(listener).ok())
        if (++accepted == connections) all_done.wake();
    }
  }
}

}  // namespace

TEST_CASE("P18 no connection is lost between several pollers") {
  constexpr int connections = 100;
  for (const Mode mode :
       {Mode::level, Mode::exclusive, Mode::exclusive | Mode::edge}) {
    CAPTURE(to_string(mode));
    const Fd listener = listen(*Address::parse("127.0.0.1:0"));
    const Waker all_done;
    std::atomic<int> accepted{0};
    on_threads(acceptors + 1, [&](int number) {
      if (number < acceptors) {
        serve(listener, mode, connections, accepted, all_done);
        return;
      }
      std::vector<Connected> clients;
      for (int count = 0; count < connections; ++count)
        clients.push_back(connect(local_address(listener)));
      static_cast<void>(becomes_readable(all_done));
    });
    CHECK(accepted == connections);
  }
}

// ---------------------------------------------------------------------------
// Objects of the same type on different threads
// ---------------------------------------------------------------------------

namespace {

std::string line_of(int thread, int number) {
  return "thread " + std::to_string(thread) + ", line " +
         std::to_string(number) + '\n';
}

// Sends a line through a WriteBuffer and a socket into a LineBuffer. Both are
// empty before and after, so each turn borrows this thread's spare blocks and
// gives them back.
bool passes(const SocketPair& ends, WriteBuffer& out, LineBuffer& in,
            const std::string& line) {
  if (!out.append(line) || !out.flush(ends.first).ok()) return false;
  if (!in.fill(ends.second).ok()) return false;
  const auto received = in.next();
  return received && *received == line && !in.next();
}

}  // namespace

TEST_CASE("each thread has spare blocks of its own") {
  Failures failures{0};
  for (int round = 0; round < 3; ++round) {
    on_threads(4, [&](int thread) {
      const SocketPair ends = open_socket_pair();
      std::array<WriteBuffer, 3> out;
      std::array<LineBuffer, 3> in;
      for (int number = 0; number < 300; ++number) {
        const auto each = static_cast<std::size_t>(number % 3);
        if (!passes(ends, out.at(each), in.at(each), line_of(thread, number)))
          ++failures;
      }
    });
  }
  CHECK(failures == 0);
}

// Filled here, emptied there: the block becomes a spare one of the thread that
// empties it.
TEST_CASE("buffers go from thread to thread, blocks and all") {
  constexpr int count = 500;
  std::mutex mutex;
  std::vector<std::pair<WriteBuffer, int>> queue;
  std::atomic<int> received{0};
  Failures failures{0};
  const auto send = [&](int thread) {
    for (int number = 0; number < count; ++number) {
      WriteBuffer buffer;
      if (!buffer.append(line_of(thread, number))) ++failures;
      const std::lock_guard lock(mutex);
      queue.emplace_back(std::move(buffer), thread * count + number);
    }
  };
  const auto receive = [&] {
    const SocketPair ends = open_socket_pair();
    LineBuffer lines;
    while (received < 2 * count && failures == 0) {
      std::vector<std::pair<WriteBuffer, int>> some;
      {
        const std::lock_guard lock(mutex);
        const auto last = std::min<std::ptrdiff_t>(std::ssize(queue), 8);
        some.assign(std::make_move_iterator(queue.begin()),
                    std::make_move_iterator(queue.begin() + last));
        queue.erase(queue.begin(), queue.begin() + last);
      }
      if (some.empty()) std::this_thread::yield();
      for (auto& [buffer, number] : some) {
        if (!buffer.flush(ends.first).ok()) ++failures;
        if (!lines.fill(ends.second).ok()) ++failures;
        const auto line = lines.next();
        if (!line || *line != line_of(number / count, number % count))
          ++failures;
        if (lines.next()) ++failures;
        ++received;
      }
    }
  };
  on_threads(4, [&](int thread) {
    if (thread < 2) {
      send(thread);
    } else {
      receive();
    }
  });
  CHECK(failures == 0);
  CHECK(received == 2 * count);
}

namespace {

// A log with three peers, the second of which is the sender, and the third of
// which reads at the end only. Each hears what the others said, in order. The
// log is small enough for its ring to be gone round several times.
bool broadcasts_well(int thread) {
  BroadcastLog log{4096};
  std::array<SocketPair, 3> peers;
  std::array<BroadcastLog::Cursor, 3> cursors;
  for (std::size_t peer = 0; peer < 3; ++peer) {
    peers.at(peer) = open_socket_pair();
    cursors.at(peer) = log.join();
  }
  std::string all;
  std::array<std::string, 3> heard;
  for (int number = 0; number < 1000; ++number) {
    const std::string line = line_of(thread, number);
    all += line;
    if (!log.append(line, &cursors[1])) return false;
    for (std::size_t peer = 0; peer < 3; ++peer) {
      if (peer == 2 && number % 50 != 49) continue;
      if (log.flush(peers.at(peer).first, cursors.at(peer)).failed())
        return false;
      std::array<char, 8192> room{};
      heard.at(peer) += {room.data(), read(peers.at(peer).second, room).bytes};
    }
  }
  return heard[0] == all && heard[1].empty() && heard[2] == all && log.empty();
}

}  // namespace

TEST_CASE("BroadcastLogs on different threads know nothing of each other") {
  Failures failures{0};
  on_threads(3, [&](int thread) {
    if (!broadcasts_well(thread)) ++failures;
  });
  CHECK(failures == 0);
}

namespace {

// A loop with a bit of everything: clients in a Slab, a timer that sends, and a
// line that comes back.
bool runs_a_loop(int thread) {
  struct Client {
    Fd socket;
    LineBuffer lines{};
  };
  constexpr Token tick{1};
  const Fd listener = listen(*Address::parse("127.0.0.1:0"));
  Connected there = connect(local_address(listener));
  if (there.failed() || !becomes_readable(listener)) return false;
  Slab<Client> clients;
  auto [token, client] = clients.emplace(accept(listener).fd);
  Poller poller;
  poller.add(client.socket, token, Interest::readable);
  Timer timer;
  timer.expire_every(std::chrono::microseconds{100});
  poller.add(timer, tick, Interest::readable);
  int sent = 0;
  int received = 0;
  while (received < 200) {
    const Events events = poller.wait(patience);
    if (events.empty()) return false;
    for (const Event& event : events) {
      if (event.token() == tick && timer.expirations() > 0)
        if (!put(there.fd, line_of(thread, sent++))) return false;
      Client* const found = clients.find(event.token());
      if (found == nullptr) continue;
      if (found->lines.fill(found->socket).ended()) return false;
      while (const auto line = found->lines.next())
        if (*line != line_of(thread, received++)) return false;
    }
  }
  return poller.remove(client.socket) && clients.erase(token);
}

}  // namespace

TEST_CASE("whole loops on different threads know nothing of each other") {
  Failures failures{0};
  on_threads(3, [&](int thread) {
    if (!runs_a_loop(thread)) ++failures;
  });
  CHECK(failures == 0);
}

// The signal is the process's to die of, and is kept off thread by thread.
TEST_CASE("P25 threads that write to pipes which nobody reads live on") {
  Failures failures{0};
  on_threads(4, [&](int) {
    Pipe pipe = open_pipe();
    pipe.reader.reset();
    for (int count = 0; count < 300; ++count)
      if (write(pipe.writer, "a").error != EPIPE) ++failures;
    ::sigset_t pending;
    ::sigpending(&pending);
    if (::sigismember(&pending, SIGPIPE) != 0) ++failures;
  });
  CHECK(failures == 0);
}
