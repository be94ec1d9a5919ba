// BroadcastLog: each peer is sent the bytes of all others, once and in order,
// of which there is one copy, within a bound.
#include <doctest/doctest.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cinttypes>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <deque>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "allocation_count.hpp"
#include "support.hpp"

using namespace edgewise;
using namespace support;
using Cursor = BroadcastLog::Cursor;

// ---------------------------------------------------------------------------
// The interposed calls: they count, and take fewer bytes where a test asks.
// ---------------------------------------------------------------------------

namespace spy {

int sends = 0;                // send
int messages = 0;             // sendmsg
std::size_t pieces = 0;       // of the last sendmsg
std::size_t most = SIZE_MAX;  // bytes that a call takes, as if full thereafter

void reset() {
  sends = messages = 0;
  pieces = 0;
  most = SIZE_MAX;
}

int calls() { return sends + messages; }

}  // namespace spy

extern "C" ::ssize_t send(int socket, const void* bytes, std::size_t count,
                          int flags) {
  static auto* const real =
      next_definition<::ssize_t(int, const void*, std::size_t, int)>("send");
  ++spy::sends;
  return real(socket, bytes, std::min(count, spy::most), flags);
}

extern "C" ::ssize_t sendmsg(int socket, const ::msghdr* message, int flags) {
  static auto* const real =
      next_definition<::ssize_t(int, const ::msghdr*, int)>("sendmsg");
  ++spy::messages;
  spy::pieces = message->msg_iovlen;
  static std::array<::iovec, IOV_MAX> pieces;
  std::copy_n(message->msg_iov, message->msg_iovlen, pieces.begin());
  std::size_t left = spy::most;
  for (std::size_t index = 0; index < message->msg_iovlen; ++index) {
    pieces[index].iov_len = std::min(pieces[index].iov_len, left);
    left -= pieces[index].iov_len;
  }
  ::msghdr shortened = *message;
  shortened.msg_iov = pieces.data();
  return real(socket, &shortened, flags);
}

namespace {

using Random = std::mt19937;

std::size_t up_to(Random& random, std::size_t most) {
  return std::uniform_int_distribution<std::size_t>{0, most}(random);
}

// Bytes that tell their place, so that a lost or swapped one shows.
std::string next_bytes(std::size_t count) {
  static unsigned place = 0;
  std::string text(count, '\0');
  for (char& byte : text) byte = static_cast<char>(place++ * 2654435761U >> 24);
  return text;
}

std::string repeat(std::string_view text, std::size_t times) {
  std::string all;
  while (times-- > 0) all += text;
  return all;
}

// Fills a socket up, so that whoever is flushed into it is stalled.
void fill(FdView socket) {
  const std::string bytes(65536, 'x');
  while (write(socket, bytes).ok()) {
  }
}

// What a range costs against the capacity: found out once, used everywhere.
std::size_t cost_of_range() {
  BroadcastLog log{1000};
  const Cursor cursor = log.join();
  REQUIRE(log.append("other"));
  REQUIRE(log.append("own", &cursor));
  return log.capacity() - log.size() - log.room();
}

}  // namespace

static_assert(std::is_nothrow_move_constructible_v<Cursor>);
static_assert(std::is_nothrow_move_assignable_v<Cursor>);
static_assert(!std::is_copy_constructible_v<Cursor>);
static_assert(!std::is_copy_assignable_v<Cursor>);
static_assert(!std::is_move_constructible_v<BroadcastLog>);
static_assert(!std::is_move_assignable_v<BroadcastLog>);
static_assert(!std::is_convertible_v<std::size_t, BroadcastLog>);

// ---------------------------------------------------------------------------
// Random operations against a model
// ---------------------------------------------------------------------------

namespace {

// A stretch of the log ahead of a peer, of bytes that all are its own or that
// all are others'.
struct Stretch {
  std::size_t size;
  bool own;
};

// A peer of the log, and in simple strings what it must be sent.
struct Peer {
  Ends ends;
  bool local;  // a Unix socket, whose state only we can change
  Cursor cursor;
  std::string due{};         // appended and not flushed
  std::string on_its_way{};  // flushed and not read
  std::deque<Stretch> ahead{};
  bool closed = false;
  std::size_t beyond = 0;  // bytes behind its end, from when it was closed on

  std::size_t behind() const {
    std::size_t sum = 0;
    for (const Stretch& each : ahead) sum += each.size;
    return sum;
  }
  // What the log cannot let go of because of this peer.
  std::size_t held() const { return ahead.empty() ? 0 : behind() + beyond; }
  std::size_t ranges() const {
    const auto own =
        std::count_if(ahead.begin(), ahead.end(),
                      [](const Stretch& each) { return each.own; });
    return static_cast<std::size_t>(own) + (closed && !ahead.empty() ? 1 : 0);
  }
  bool needs_range() const {
    return !closed && !ahead.empty() && !ahead.back().own;
  }

  void close() {
    cursor.close();
    if (std::exchange(closed, true) || ahead.empty() || !ahead.back().own)
      return;
    beyond = ahead.back().size;
    ahead.pop_back();
  }

  void appended(std::string_view text, bool own) {
    if (closed) {
      beyond += text.size();
      return;
    }
    if (!own) due += text;
    if (text.empty() || (own && ahead.empty())) return;
    if (ahead.empty() || ahead.back().own != own) ahead.push_back({0, own});
    ahead.back().size += text.size();
  }

  void flushed(std::size_t count) {
    on_its_way += due.substr(0, count);
    due.erase(0, count);
    while (count > 0) {
      const std::size_t part = std::min(count, ahead.front().size);
      count -= part;
      ahead.front().size -= part;
      if (ahead.front().size == 0) ahead.pop_front();
      if (!ahead.empty() && ahead.front().own) ahead.pop_front();
    }
  }
};

Peer make_peer(BroadcastLog& log, Random& random) {
  const bool local = random() % 4 != 0;
  Ends ends = local ? make_socketpair() : make_tcp(2048, 2048);
  if (local) set_buffer(ends.near, SO_SNDBUF, random() % 2 == 0 ? 1 : 20'000);
  return {std::move(ends), local, log.join()};
}

class World {
 public:
  World(std::size_t capacity, Random::result_type seed)
      : random_(seed), log_(capacity) {
    // Looking at the size makes the log look for its slowest peer: so some
    // worlds look after each step, and others rarely.
    curious_ = seed % 2 == 0;
  }

  void run(int turns) {
    for (int turn = 0; turn < turns; ++turn) {
      if (turn % 60 == 0) mood_ = up_to(random_, 3);
      step();
      check_cursors();
      if (curious_ || random_() % 10 == 0) check_log();
    }
    finish();
  }

 private:
  void step() {
    // Mood 0 fills the log and 1 empties it; in 2 and 3 peers come and go.
    const std::size_t choice = up_to(random_, 99);
    const std::size_t appends = mood_ == 0 ? 70 : mood_ == 1 ? 10 : 35;
    if (choice < appends) return append();
    if (choice < 80) return flush();
    if (choice < 92) return read();
    if (choice < 95) return move();
    if (choice < 96 && mood_ >= 2 && !peers_.empty())
      return any_peer()->close();
    if (mood_ >= 2 || random_() % 4 == 0) return come_or_go();
  }

  Peer* any_peer() {
    if (peers_.empty()) return nullptr;
    return &peers_[up_to(random_, peers_.size() - 1)];
  }

  std::size_t size() const {
    std::size_t slowest = 0;
    for (const Peer& peer : peers_) slowest = std::max(slowest, peer.held());
    return slowest;
  }
  std::size_t room() const {
    std::size_t taken = size();
    for (const Peer& peer : peers_) taken += peer.ranges() * range_;
    // The end of a closed peer is noted whether or not there is room.
    return log_.capacity() - std::min(taken, log_.capacity());
  }

  std::size_t length_of_next() {
    const std::size_t capacity = log_.capacity();
    switch (up_to(random_, 9)) {
      case 0: return 0;
      case 1: return up_to(random_, capacity + 1);
      case 2: return room();
      case 3: return room() + 1;
      case 4: return up_to(random_, capacity / 3);
      default: return 1 + up_to(random_, 20);
    }
  }

  void append() {
    Peer* const sender = random_() % 3 == 0 ? nullptr : any_peer();
    const std::string text = next_bytes(length_of_next());
    const std::size_t note =
        sender != nullptr && sender->needs_range() ? range_ : 0;
    const bool fits = text.empty() || text.size() + note <= room();
    const bool done =
        log_.append(text, sender != nullptr ? &sender->cursor : nullptr);
    REQUIRE(done == fits);
    if (!done) return;
    for (Peer& peer : peers_) peer.appended(text, &peer == sender);
  }

  void flush() {
    Peer* const peer = any_peer();
    if (peer == nullptr) return;
    constexpr std::size_t budgets[]{0, 1, 2, 7, 100, 4096, SIZE_MAX, SIZE_MAX};
    flush(*peer, budgets[up_to(random_, std::size(budgets) - 1)]);
  }

  void flush(Peer& peer, std::size_t budget) {
    const std::size_t all = std::min(budget, peer.due.size());
    const IoResult result = log_.flush(peer.ends.near, peer.cursor, budget);
    CAPTURE(to_string(result));
    CAPTURE(all);
    if (result.ok()) {
      REQUIRE(result.bytes == all);
    } else {
      REQUIRE(result.would_block());
      REQUIRE(result.bytes < all);
      ::pollfd state{peer.ends.near.get(), POLLOUT, 0};
      if (peer.local) REQUIRE(::poll(&state, 1, 0) == 0);
    }
    peer.flushed(result.bytes);
  }

  void read() {
    Peer* const peer = any_peer();
    // Some do not read for long.
    if (peer != nullptr && random_() % 2 == 0)
      read(*peer, 1 + up_to(random_, 10'000));
  }

  static bool read(Peer& peer, std::size_t most) {
    std::string room(most, '\0');
    const IoResult result = edgewise::read(peer.ends.far, room);
    REQUIRE_FALSE(result.ended());
    REQUIRE(peer.on_its_way.compare(0, result.bytes, room, 0, result.bytes) ==
            0);
    peer.on_its_way.erase(0, result.bytes);
    return result.bytes > 0;
  }

  void move() {
    Peer* const one = any_peer();
    Peer* const other = any_peer();
    if (one == nullptr) return;
    Cursor elsewhere{std::move(one->cursor)};
    REQUIRE(elsewhere.behind() == one->behind());
    one->cursor = std::move(elsewhere);
    if (one != other) std::swap(*one, *other);
  }

  void come_or_go() {
    if (peers_.size() < 2 || (peers_.size() < 9 && random_() % 2 == 0)) {
      peers_.push_back(make_peer(log_, random_));
      return;
    }
    const auto gone =
        static_cast<std::ptrdiff_t>(up_to(random_, peers_.size() - 1));
    peers_.erase(peers_.begin() + gone);
  }

  void check_cursors() const {
    for (const Peer& peer : peers_)
      REQUIRE(peer.cursor.behind() == peer.behind());
  }

  void check_log() {
    REQUIRE(log_.size() == size());
    REQUIRE(log_.empty() == (size() == 0));
    REQUIRE(log_.room() == room());
    REQUIRE(log_.size() + log_.room() <= log_.capacity());
  }

  // Everybody reads to the end, and then nothing is left of anything.
  void finish() {
    for (Peer& peer : peers_) {
      while (!peer.due.empty() || !peer.on_its_way.empty()) {
        flush(peer, SIZE_MAX);
        if (!read(peer, 65536)) REQUIRE(becomes_readable(peer.ends.far));
      }
      REQUIRE(peer.cursor.behind() == 0);
    }
    check_log();
    REQUIRE(log_.empty());
    REQUIRE(log_.room() == log_.capacity());
  }

  Random random_;
  std::size_t range_ = cost_of_range();
  std::size_t mood_ = 0;
  bool curious_ = false;
  BroadcastLog log_;
  std::vector<Peer> peers_;  // behind the log, which outlives the cursors
};

}  // namespace

TEST_CASE(
    "P24 whatever happens in whatever order, each peer is sent the others' "
    "bytes, once and in order") {
  for (const std::size_t capacity :
       {1U, 100U, 4095U, 4096U, 4097U, 10'000U, 70'001U}) {
    for (const Random::result_type seed : {1U, 2U, 3U, 4U}) {
      CAPTURE(capacity);
      CAPTURE(seed);
      World(capacity, seed).run(2'000);
    }
  }
}

// ---------------------------------------------------------------------------
// Who is sent what
// ---------------------------------------------------------------------------

namespace {

// A peer at the other end of a Unix socket.
struct Client {
  Ends ends = make_socketpair();
  Cursor cursor;

  explicit Client(BroadcastLog& log) : cursor(log.join()) {}

  IoResult flush(BroadcastLog& log, std::size_t budget = SIZE_MAX) const {
    return log.flush(ends.near, cursor, budget);
  }
  // What it is sent now, if that is all.
  std::string hear(BroadcastLog& log) const {
    if (!flush(log).ok() || cursor.behind() != 0) return "not all was sent";
    return receive_some(ends.far);
  }
};

}  // namespace

TEST_CASE("all but the sender are sent a line, when they are flushed") {
  BroadcastLog log{1000};
  const Client one{log};
  const Client two{log};
  const Client three{log};
  CHECK(log.append("first\n", &one.cursor));
  CHECK(log.append("second\n", &two.cursor));
  CHECK(log.append("for all\n"));
  CHECK(receive_some(three.ends.far).empty());
  CHECK(log.size() == 21);
  CHECK(one.cursor.behind() == 15);
  CHECK(two.cursor.behind() == 21);
  CHECK(three.cursor.behind() == 21);
  CHECK(one.hear(log) == "second\nfor all\n");
  CHECK(two.hear(log) == "first\nfor all\n");
  CHECK_FALSE(log.empty());
  CHECK(three.hear(log) == "first\nsecond\nfor all\n");
  CHECK(log.empty());
  CHECK(log.room() == 1000);
}

TEST_CASE("a late joiner hears only what comes after") {
  BroadcastLog log{1000};
  const Client early{log};
  CHECK(log.append("before "));
  const Client late{log};
  CHECK(late.cursor.behind() == 0);
  CHECK(log.size() == 7);
  CHECK(log.append("after"));
  CHECK(late.cursor.behind() == 5);
  CHECK(late.hear(log) == "after");
  CHECK(early.hear(log) == "before after");
  CHECK(log.empty());
}

TEST_CASE("with no peers nothing is kept, but nothing too large taken") {
  BroadcastLog log{100};
  for (int turn = 0; turn < 1'000; ++turn) {
    CHECK(log.append(std::string(70, 'x')));
    CHECK(log.empty());
    CHECK(log.room() == 100);
  }
  CHECK(log.append(std::string(100, 'x')));
  CHECK_FALSE(log.append(std::string(101, 'x')));
  const Client client{log};
  CHECK(client.cursor.behind() == 0);
  CHECK(log.append("now"));
  CHECK(client.hear(log) == "now");
}

TEST_CASE("when the last peer has gone, nothing is kept any more") {
  BroadcastLog log{100};
  for (int turn = 0; turn < 100; ++turn) {
    auto client = std::make_unique<Client>(log);
    CHECK(log.append(std::string(60, 'x')));
    CHECK(log.size() == 60);
    client.reset();
    for (int piece = 0; piece < 50; ++piece) {
      REQUIRE(log.append("abc"));
      REQUIRE(log.size() == 0);
    }
  }
  CHECK(log.room() == 100);
}

TEST_CASE("own bytes are skipped at once by a peer that is caught up") {
  BroadcastLog log{1000};
  const Client sender{log};
  const Client other{log};
  CHECK(log.append("one ", &sender.cursor));
  CHECK(log.append("two", &sender.cursor));
  CHECK(sender.cursor.behind() == 0);
  CHECK(log.room() == 1000 - 7);  // no range
  spy::reset();
  CHECK(sender.hear(log).empty());
  CHECK(spy::calls() == 0);
  CHECK(other.hear(log) == "one two");
}

TEST_CASE(
    "own bytes are skipped at the end, in the middle and in many places") {
  BroadcastLog log{1000};
  const Client sender{log};
  const Client other{log};
  std::string others;
  std::string own;
  const auto hear_both = [&] {
    CHECK(sender.hear(log) == std::exchange(others, ""));
    CHECK(other.hear(log) == std::exchange(own, ""));
    CHECK(log.room() == 1000);
  };
  const auto append = [&](std::string_view text, const Client& from) {
    CHECK(log.append(text, &from.cursor));
    (&from == &sender ? own : others) += text;
  };
  append("abc", other);
  append("OWN", sender);
  hear_both();
  append("abc", other);
  append("OWN", sender);
  append("def", other);
  hear_both();
  append("OWN", sender);
  for (int count = 0; count < 10; ++count) {
    append("abc", other);
    append("OWN", sender);
    append("AND MORE", sender);
  }
  hear_both();
}

TEST_CASE("own bytes right behind own bytes cost no further range") {
  BroadcastLog log{1000};
  const Client sender{log};
  CHECK(log.append("other"));
  CHECK(log.append("a", &sender.cursor));
  const std::size_t room = log.room();
  CHECK(log.append("bcd", &sender.cursor));
  CHECK(log.room() == room - 3);
  CHECK(log.append("other"));
  CHECK(log.append("e", &sender.cursor));
  CHECK(log.room() == room - 3 - 5 - 1 - cost_of_range());
  CHECK(sender.hear(log) == "otherother");
  CHECK(log.room() == 1000);
}

TEST_CASE("what a peer has been sent of others' bytes brings it past its own") {
  BroadcastLog log{1000};
  const Client sender{log};
  const Client other{log};
  CHECK(log.append("abc", &other.cursor));
  CHECK(log.append("OWN", &sender.cursor));
  CHECK(log.append("def", &other.cursor));
  CHECK(log.append("OWN", &sender.cursor));
  CHECK(sender.cursor.behind() == 12);
  CHECK(sender.flush(log, 2).bytes == 2);
  CHECK(sender.cursor.behind() == 10);
  CHECK(sender.flush(log, 1).bytes == 1);
  CHECK(sender.cursor.behind() == 6);
  CHECK(sender.flush(log, 3).bytes == 3);
  CHECK(sender.cursor.behind() == 0);
  CHECK(receive_some(sender.ends.far) == "abcdef");
  CHECK(other.hear(log) == "OWNOWN");
}

// ---------------------------------------------------------------------------
// System calls
// ---------------------------------------------------------------------------

TEST_CASE("a flush is one send, across the seam of the ring too") {
  BroadcastLog log{4096};
  const Client quick{log};
  const Client slow{log};
  spy::reset();
  for (int turn = 0; turn < 100; ++turn) {
    const std::string text = next_bytes(100);
    for (int count = 0; count < 29; ++count) CHECK(log.append(text));
    CHECK(spy::calls() == 0);
    // One byte is left for the slow one, so the ring never starts afresh.
    CHECK(quick.hear(log) == repeat(text, 29));
    CHECK(spy::sends == 1);
    CHECK(slow.flush(log, slow.cursor.behind() - 1).ok());
    CHECK(spy::sends == 2);
    CHECK(spy::messages == 0);
    receive_some(slow.ends.far);
    spy::reset();
  }
}

TEST_CASE("a flush that leaves own bytes out is one sendmsg, up to 16 pieces") {
  BroadcastLog log{100'000};
  const Client sender{log};
  for (std::size_t pieces = 1; pieces <= 50; ++pieces) {
    CAPTURE(pieces);
    spy::reset();
    for (std::size_t count = 0; count < pieces; ++count) {
      REQUIRE(log.append("other "));
      REQUIRE(log.append("own", &sender.cursor));
    }
    REQUIRE(spy::calls() == 0);
    REQUIRE(sender.hear(log) == repeat("other ", pieces));
    // A last piece that is alone goes by send.
    const auto calls = static_cast<int>((pieces + 15) / 16);
    REQUIRE(spy::sends == (pieces % 16 == 1 ? 1 : 0));
    REQUIRE(spy::calls() == calls);
    if (pieces == 16) REQUIRE(spy::pieces == 16);
  }
}

TEST_CASE("a peer that has been sent everything costs no system call") {
  BroadcastLog log{1000};
  const Client client{log};
  spy::reset();
  CHECK(log.flush(FdView{-1}, client.cursor).ok());
  CHECK(log.append("own", &client.cursor));
  CHECK(log.flush(FdView{-1}, client.cursor).ok());
  CHECK(spy::calls() == 0);
}

namespace {

// From here on, whatever asks anything of the kernel but to end is killed.
bool forbid_system_calls() {
  ::sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_exit_group, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)};
  const ::sock_fprog filter{4, program};
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter, 0, 0) == 0;
}

int append_without_the_kernel() {
  BroadcastLog log{100'000};
  Cursor one = log.join();
  const Cursor two = log.join();
  const auto talk = [&] {
    for (int turn = 0; turn < 20; ++turn)
      if (!log.append("one", &one) || !log.append("two", &two)) return false;
    const Cursor late = log.join();
    return late.behind() == 0 && one.behind() > 0 && log.size() > 0 &&
           log.room() > 0;
  };
  if (!talk()) return 1;  // memory for the ranges is there after this
  one = Cursor();
  one = log.join();
  if (!forbid_system_calls()) return 77;
  // At once, since the log's destructor asks the kernel to unmap.
  ::syscall(SYS_exit_group, talk() ? 0 : 2);
  return 3;
}

}  // namespace

TEST_CASE("append, join and leaving make no system call at all") {
  const int code = run_in_child(append_without_the_kernel);
  if (code == 77) {
    MESSAGE("skipped: no seccomp filter can be installed here");
  } else {
    CHECK(code == 0);
  }
}

// ---------------------------------------------------------------------------
// Partial sends, budgets and failures
// ---------------------------------------------------------------------------

TEST_CASE("P29 a budget is spent to the byte, and then ok is not all") {
  BroadcastLog log{10'000};
  const Client client{log};
  std::string text;
  for (int count = 0; count < 40; ++count) {
    const std::string line = next_bytes(50);
    CHECK(log.append(line));
    text += line;
    CHECK(log.append("own bytes", &client.cursor));
  }
  std::string heard;
  for (const std::size_t budget : {0U, 1U, 49U, 50U, 51U, 99U, 850U, 1U}) {
    const IoResult result = client.flush(log, budget);
    CHECK(result.ok());
    CHECK(result.bytes == budget);
    CHECK(client.cursor.behind() > 0);
    heard += receive_some(client.ends.far);
    CHECK(heard == text.substr(0, heard.size()));
  }
  const IoResult rest = client.flush(log, text.size() - heard.size());
  CHECK(rest.ok());
  CHECK(client.cursor.behind() == 0);
  CHECK(heard + receive_some(client.ends.far) == text);
  CHECK(client.flush(log, 100).bytes == 0);
}

TEST_CASE("P24 a flush cut short anywhere goes on from there") {
  for (const bool with_own : {false, true}) {
    for (std::size_t most = 1; most <= 200; ++most) {
      CAPTURE(with_own);
      CAPTURE(most);
      BroadcastLog log{1000};
      const Client client{log};
      std::string text;
      for (std::size_t count = 0; count < 20; ++count) {
        const std::string line = next_bytes(1 + count % 13);
        REQUIRE(log.append(line));
        text += line;
        if (with_own) REQUIRE(log.append("own", &client.cursor));
      }
      spy::reset();
      spy::most = most;
      IoResult result = client.flush(log);
      // A call that took less than it was offered is the last.
      if (!with_own) {
        REQUIRE(result.bytes == std::min(most, text.size()));
        REQUIRE(spy::calls() == 1);
      }
      while (result.would_block()) {
        REQUIRE(result.bytes > 0);
        REQUIRE(client.cursor.behind() > 0);
        REQUIRE(log.size() == client.cursor.behind());
        result = client.flush(log);
      }
      spy::reset();
      REQUIRE(result.ok());
      REQUIRE(client.cursor.behind() == 0);
      REQUIRE(receive_some(client.ends.far) == text);
      REQUIRE(log.room() == 1000);
    }
  }
}

TEST_CASE("P24 a peer whose socket is full is sent the rest when it reads") {
  BroadcastLog log{1 << 20};
  for (const bool tcp : {false, true}) {
    const Ends ends = tcp ? make_tcp(4096, 4096) : make_socketpair();
    if (!tcp) set_buffer(ends.near, SO_SNDBUF, 1);
    const Cursor cursor = log.join();
    std::string text;
    while (log.append("own", &cursor)) {
      const std::string line = next_bytes(3'000);
      if (!log.append(line)) break;
      text += line;
    }
    IoResult result = log.flush(ends.near, cursor);
    CHECK(result.would_block());
    CHECK(result.bytes > 0);
    CHECK(result.bytes < text.size());
    std::string heard;
    while (result.would_block()) {
      REQUIRE(becomes_readable(ends.far));
      heard += receive_some(ends.far);
      result = log.flush(ends.near, cursor);
    }
    CHECK(result.ok());
    heard += receive(ends.far, text.size() - heard.size());
    CHECK(heard == text);
    CHECK(log.empty());
  }
}

TEST_CASE("would_block without a byte is not a step forward") {
  BroadcastLog log{1000};
  const Client client{log};
  fill(client.ends.near);
  CHECK(log.append("abc"));
  CHECK(log.append("own", &client.cursor));
  CHECK(log.append("def"));
  for (int turn = 0; turn < 3; ++turn) {
    const IoResult result = client.flush(log);
    CHECK(result.would_block());
    CHECK(result.bytes == 0);
    CHECK(client.cursor.behind() == 9);
    CHECK(log.size() == 9);
  }
  receive_some(client.ends.far);
  CHECK(client.hear(log) == "abcdef");
}

TEST_CASE("P25 a peer that is gone is failed, and kills nobody") {
  BroadcastLog log{1000};
  for (const bool with_own : {false, true}) {
    Client gone{log};
    const Client other{log};
    CHECK(log.append("abc"));
    if (with_own) CHECK(log.append("own", &gone.cursor));
    CHECK(log.append("def"));
    gone.ends.far.reset();
    const std::size_t behind = gone.cursor.behind();
    for (int turn = 0; turn < 2; ++turn) {
      const IoResult result = gone.flush(log);
      CHECK(result.failed());
      CHECK(result.error == EPIPE);
      CHECK(result.bytes == 0);
      CHECK(gone.cursor.behind() == behind);
    }
    // The log waits for it until its cursor is destroyed.
    CHECK(other.hear(log) == (with_own ? "abcowndef" : "abcdef"));
    CHECK(log.size() == behind);
    gone.cursor = Cursor();
    CHECK(log.room() == 1000);
  }
}

TEST_CASE("a pipe takes it as well") {
  const Ends ends = make_pipe();
  BroadcastLog log{1000};
  const Cursor cursor = log.join();
  CHECK(log.append("through "));
  CHECK(log.flush(ends.near, cursor).bytes == 8);
  CHECK(log.append("a "));
  CHECK(log.append("own", &cursor));
  CHECK(log.append("pipe"));
  CHECK(log.flush(ends.near, cursor).ok());
  CHECK(receive_some(ends.far) == "through a pipe");
}

// ---------------------------------------------------------------------------
// The bound
// ---------------------------------------------------------------------------

TEST_CASE("append takes all or nothing, up to the last byte of the capacity") {
  for (const std::size_t capacity :
       {std::size_t{1}, std::size_t{100}, std::size_t{4095}, std::size_t{4096},
        std::size_t{4097}, std::size_t{10'000}}) {
    CAPTURE(capacity);
    BroadcastLog log{capacity};
    CHECK(log.capacity() == capacity);
    const Client client{log};
    CHECK_FALSE(log.append(std::string(capacity + 1, 'x')));
    CHECK(log.empty());
    const std::string text = next_bytes(capacity);
    CHECK(log.append(std::string_view(text).substr(0, capacity / 2)));
    const std::size_t rest = log.room();
    CHECK(rest == capacity - capacity / 2);
    CHECK_FALSE(log.append(std::string(rest + 1, 'x')));
    CHECK(log.room() == rest);
    CHECK(client.cursor.behind() == capacity / 2);
    CHECK(log.append(std::string_view(text).substr(capacity / 2)));
    CHECK(log.room() == 0);
    CHECK(log.size() == capacity);
    CHECK_FALSE(log.append("x"));
    CHECK(log.append(""));
    CHECK(client.hear(log) == text);
    CHECK(log.room() == capacity);
  }
}

TEST_CASE("full to the last byte, a ring holds it wherever it begins") {
  for (const std::size_t capacity : {std::size_t{4096}, std::size_t{5000}}) {
    BroadcastLog log{capacity};
    const Client client{log};
    std::string due;
    for (std::size_t turn = 0; turn < 300; ++turn) {
      const std::string text = next_bytes(log.room());
      REQUIRE(log.append(text));
      due += text;
      REQUIRE(log.size() == capacity);
      // All but some, so that the ring does not start afresh.
      const std::size_t part = capacity - 1 - turn;
      REQUIRE(client.flush(log, part).bytes == part);
      REQUIRE(receive_some(client.ends.far) == due.substr(0, part));
      due.erase(0, part);
    }
    CHECK(client.hear(log) == due);
  }
}

TEST_CASE("nothing always finds room, and costs none") {
  BroadcastLog log{cost_of_range()};
  const Client sender{log};
  CHECK(log.append("other"));
  const std::size_t room = log.room();
  CHECK(log.append("", &sender.cursor));  // where there is none for a note
  CHECK(log.room() == room);
  CHECK(log.append(std::string(room, 'x')));
  CHECK(log.append("", &sender.cursor));
  CHECK(log.append(""));
  CHECK(log.room() == 0);
  CHECK(sender.hear(log) == "other" + std::string(room, 'x'));
}

TEST_CASE("a range that finds no room is a line that finds none") {
  const std::size_t range = cost_of_range();
  BroadcastLog log{range + 10};
  const Client sender{log};
  CHECK(log.append("other"));
  CHECK(log.room() == range + 5);
  CHECK_FALSE(log.append("123456", &sender.cursor));
  CHECK(sender.cursor.behind() == 5);
  CHECK(log.room() == range + 5);
  CHECK(log.append("12345", &sender.cursor));
  CHECK(log.room() == 0);
  CHECK_FALSE(log.append("1", &sender.cursor));
  CHECK(sender.hear(log) == "other");
  CHECK(log.room() == range + 10);
}

TEST_CASE("two stalled senders of single bytes use no more than the capacity") {
  constexpr std::size_t capacity = 1'000'000;
  BroadcastLog log{capacity};
  const Client one{log};
  const Client two{log};
  const allocation_count::Since start;
  std::size_t lines = 0;
  while (log.append("1", &one.cursor) && log.append("2", &two.cursor)) ++lines;
  CHECK(log.size() + log.room() <= capacity);
  CHECK(lines > 10'000);
  // The last chunk of slots is half of all.
  CHECK(start.bytes() < static_cast<long>(3 * capacity));
  // The next line of either, had there been room, costs a range.
  const std::size_t all = lines * 2 * (1 + cost_of_range());
  CHECK(all > capacity - 100);
  CHECK(all < capacity + 100);

  spy::reset();
  const std::size_t ones = log.size() - lines;
  std::string heard;
  while (one.flush(log).would_block()) heard += receive_some(one.ends.far);
  CHECK(heard + receive_some(one.ends.far) == std::string(lines, '2'));
  heard.clear();
  while (two.flush(log).would_block()) heard += receive_some(two.ends.far);
  CHECK(heard + receive_some(two.ends.far) == std::string(ones, '1'));
  CHECK(log.room() == capacity);
  CHECK(start.bytes() < static_cast<long>(3 * capacity));
}

TEST_CASE("who leaves frees what only it held up, ranges included") {
  BroadcastLog log{1000};
  const Client quick{log};
  auto slow = std::make_unique<Client>(log);
  auto slowest = std::make_unique<Client>(log);
  CHECK(log.append("123"));
  CHECK(slow->flush(log).ok());
  CHECK(log.append("4567"));
  CHECK(log.append("89", &slow->cursor));
  CHECK(log.append("0"));
  CHECK(quick.hear(log) == "1234567890");
  CHECK(log.size() == 10);
  slowest.reset();
  CHECK(log.size() == 7);
  CHECK(log.room() == 1000 - 7 - cost_of_range());
  slow.reset();
  CHECK(log.empty());
  CHECK(log.room() == 1000);
  CHECK(log.append("again"));
  CHECK(quick.hear(log) == "again");
}

TEST_CASE("the slowest of many counts, whoever moves, comes and goes") {
  BroadcastLog log{1000};
  std::deque<Client> clients;
  for (std::size_t count = 0; count < 10; ++count) {
    clients.emplace_back(log);
    CHECK(log.append("x"));
  }
  CHECK(log.size() == 10);
  for (std::size_t count = 9; count > 0; --count) {
    if (count % 2 == 0) {
      clients.pop_front();
    } else {
      CHECK(clients.front().flush(log).ok());
      clients.push_back(std::move(clients.front()));
      clients.pop_front();
    }
    CHECK(log.size() == count);
  }
  clients.clear();
  CHECK(log.empty());
}

namespace {

// Processor time, of which others on the machine take nothing.
template <class Work>
std::clock_t processor_time_of(Work work) {
  const std::clock_t before = std::clock();
  work();
  return std::clock() - before;
}

}  // namespace

TEST_CASE("what is free is known without a look at every cursor each time") {
  BroadcastLog log{1 << 20};
  const Ends full = make_socketpair();
  fill(full.near);
  const Cursor slowest = log.join();
  CHECK(log.append("x"));
  std::vector<Cursor> others(100'000);
  for (Cursor& cursor : others) cursor = log.join();
  CHECK(log.append("x"));
  const Cursor sender = log.join();

  const auto looks = processor_time_of([&] {
    std::size_t sum = 0;
    for (int turn = 0; turn < 100; ++turn)
      for (const Cursor& cursor : others) sum += cursor.behind();
    CHECK(sum == 100 * others.size());
  });
  const auto turns = processor_time_of([&] {
    std::size_t stalled = 0;
    for (std::size_t turn = 0; turn < 500; ++turn) {
      const bool appended = log.append("x", &sender);
      const bool blocked = log.flush(full.near, slowest).would_block();
      if (appended && blocked && log.size() == turn + 3) ++stalled;
    }
    CHECK(stalled == 500);
  });
  // With a look at all in each turn, they would take several times as long.
  CHECK(turns < looks);
}

TEST_CASE("more than 4 GiB go through a log") {
  BroadcastLog log{8 << 20};
  const Client sender{log};
  const std::string text(8 << 20, 'x');
  for (std::uint64_t sent = 0; sent < (std::uint64_t{33} << 27);
       sent += text.size())
    REQUIRE(log.append(text, &sender.cursor));
  const Client other{log};
  CHECK(log.append("after it", &sender.cursor));
  CHECK(log.append("all", &other.cursor));
  CHECK(sender.hear(log) == "all");
  CHECK(other.hear(log) == "after it");
}

// ---------------------------------------------------------------------------
// Cursors
// ---------------------------------------------------------------------------

TEST_CASE("an empty cursor is nobody's") {
  BroadcastLog log{100};
  const Client client{log};
  const Cursor empty;
  CHECK(empty.behind() == 0);
  CHECK(log.append("to all", &empty));
  CHECK(empty.behind() == 0);
  const IoResult result = log.flush(FdView{-1}, empty);
  CHECK(result.ok());
  CHECK(result.bytes == 0);
  CHECK(client.hear(log) == "to all");
}

TEST_CASE("a cursor moves with its place, and is empty when moved from") {
  BroadcastLog log{100};
  Client client{log};
  CHECK(log.append("abc"));
  Cursor moved{std::move(client.cursor)};
  CHECK(client.cursor.behind() == 0);
  CHECK(client.flush(log).bytes == 0);
  CHECK(moved.behind() == 3);
  CHECK(log.size() == 3);
  client.cursor = std::move(moved);
  CHECK(moved.behind() == 0);
  CHECK(client.cursor.behind() == 3);
  CHECK(log.size() == 3);
  CHECK(client.hear(log) == "abc");
}

TEST_CASE("a cursor moved to itself stays what it is") {
  BroadcastLog log{100};
  Client client{log};
  CHECK(log.append("abc"));
  Cursor& same = client.cursor;
  client.cursor = std::move(same);
  CHECK(client.cursor.behind() == 3);
  CHECK(client.hear(log) == "abc");
  Cursor empty;
  Cursor& nobody = empty;
  empty = std::move(nobody);
  CHECK(empty.behind() == 0);
}

TEST_CASE("a place that another is moved onto is given up at once") {
  BroadcastLog log{100};
  Cursor one = log.join();
  CHECK(log.append("abc"));
  Cursor two = log.join();
  CHECK(log.append("de"));
  one = std::move(two);
  CHECK(one.behind() == 2);
  CHECK(two.behind() == 0);
  CHECK(log.size() == 2);
  // What was moved from is nobody, but may be somebody again.
  CHECK(log.append("f", &two));
  CHECK(one.behind() == 3);
  two = log.join();
  CHECK(log.append("g", &two));
  CHECK(one.behind() == 4);
  CHECK(two.behind() == 0);
  one = Cursor();
  CHECK(log.empty());
}

TEST_CASE("a cursor moved onto another log's leaves that log at once") {
  BroadcastLog left{100};
  BroadcastLog right{100};
  const Ends ends = make_socketpair();
  Cursor one = left.join();
  Cursor two = right.join();
  CHECK(left.append("abc"));
  CHECK(right.append("de"));
  one = std::move(two);
  CHECK(left.empty());
  CHECK(two.behind() == 0);
  CHECK(one.behind() == 2);
  CHECK(right.size() == 2);
  CHECK(right.flush(ends.near, one).ok());
  CHECK(receive_some(ends.far) == "de");
  CHECK(right.empty());
}

TEST_CASE("a sender whose cursor was moved from is nobody") {
  BroadcastLog log{100};
  Cursor before = log.join();
  Client client{log};
  client.cursor = std::move(before);
  CHECK(log.append("abc", &before));
  CHECK(client.cursor.behind() == 3);
  Cursor elsewhere{std::move(client.cursor)};
  CHECK(log.append("de", &client.cursor));
  client.cursor = std::move(elsewhere);
  CHECK(client.hear(log) == "abcde");
}

TEST_CASE("a sender of another log is nobody, whatever its place there") {
  BroadcastLog log{1000};
  BroadcastLog other_log{1000};
  // A first peer of either log: the same slot of each, the same generation.
  const Client peer{log};
  const Client stranger{other_log};
  CHECK(log.append("abc", &stranger.cursor));
  CHECK(peer.cursor.behind() == 3);
  CHECK(log.append("de", &stranger.cursor));
  CHECK(log.room() == 1000 - 5);  // no range
  CHECK(stranger.cursor.behind() == 0);
  CHECK(other_log.empty());
  CHECK(stranger.flush(log).bytes == 0);  // nor does it hear for that peer
  CHECK(peer.hear(log) == "abcde");
}

TEST_CASE("a closed cursor's peer is sent what came before, and no more") {
  BroadcastLog log{1000};
  Client one{log};
  const Client two{log};
  CHECK(log.append("before\n"));
  one.cursor.close();
  CHECK(one.cursor.behind() == 7);
  CHECK(log.append("after\n"));
  one.cursor.close();
  CHECK(one.cursor.behind() == 7);
  CHECK(one.hear(log) == "before\n");
  CHECK(log.append("much later\n"));
  CHECK(one.cursor.behind() == 0);
  CHECK(one.hear(log).empty());
  CHECK(two.hear(log) == "before\nafter\nmuch later\n");
  CHECK(log.empty());
  CHECK(log.room() == 1000);
}

TEST_CASE("a closed cursor's peer has had its say, and holds nothing up") {
  BroadcastLog log{1000};
  Client one{log};
  Client two{log};
  one.cursor.close();  // with nothing in the log at all
  CHECK(log.append("one\n", &one.cursor));
  CHECK(two.hear(log) == "one\n");
  CHECK(log.empty());
  CHECK(log.append("others\n"));
  CHECK(log.append("own\n", &two.cursor));
  two.cursor.close();
  CHECK(two.cursor.behind() == 7);
  CHECK(log.append("late\n", &two.cursor));
  CHECK(two.hear(log) == "others\n");
  CHECK(log.empty());
  CHECK(log.room() == 1000);
  Cursor nobody;
  nobody.close();
  CHECK(nobody.behind() == 0);
}

TEST_CASE("a destroyed cursor's peer is waited for no more") {
  BroadcastLog log{100};
  for (int turn = 0; turn < 1'000; ++turn) {
    const Cursor cursor = log.join();
    CHECK(log.append(std::string(100, 'x')));
    CHECK(log.room() == 0);
  }
  CHECK(log.empty());
  Cursor cursor = log.join();
  CHECK(log.append("abc"));
  cursor = Cursor();
  CHECK(log.empty());
}

// ---------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------

namespace {

struct Mapping {
  std::uintptr_t begin;
  std::uintptr_t end;
};

// The mappings of all logs' rings, two in a row for each.
std::vector<Mapping> ring_mappings() {
  std::vector<Mapping> mappings;
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    if (!contains(line, "memfd:edgewise")) continue;
    Mapping mapping{};
    REQUIRE(std::sscanf(line.c_str(), "%" SCNxPTR "-%" SCNxPTR, &mapping.begin,
                        &mapping.end) == 2);
    mappings.push_back(mapping);
  }
  return mappings;
}

// A huge page would come as a whole, whatever of it is touched.
class NoHugePages {
 public:
  NoHugePages() { REQUIRE(::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0); }
  NoHugePages(const NoHugePages&) = delete;
  NoHugePages& operator=(const NoHugePages&) = delete;
  ~NoHugePages() { ::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0); }
};

// How much memory the ring of the only log has.
std::size_t resident_bytes() {
  const std::vector<Mapping> mappings = ring_mappings();
  REQUIRE(mappings.size() == 2);
  const std::size_t size = mappings[0].end - mappings[0].begin;
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::vector<unsigned char> pages(size / page);
  // NOLINTNEXTLINE(performance-no-int-to-ptr)
  void* const begin = reinterpret_cast<void*>(mappings[0].begin);
  REQUIRE(::mincore(begin, size, pages.data()) == 0);
  const auto resident =
      std::count_if(pages.begin(), pages.end(),
                    [](unsigned char bits) { return (bits & 1) != 0; });
  return static_cast<std::size_t>(resident) * page;
}

}  // namespace

TEST_CASE(
    "an empty log starts again at the front, so a large one stays small") {
  const NoHugePages small;
  BroadcastLog log{8 << 20};
  CHECK(resident_bytes() == 0);
  const Client client{log};
  const Client sender{log};
  for (int turn = 0; turn < 1'000; ++turn) {
    const std::string text = next_bytes(1024);
    REQUIRE(log.append(text));
    REQUIRE(log.append("own", &sender.cursor));
    REQUIRE(client.hear(log) == text + "own");
    REQUIRE(sender.hear(log) == text);
  }
  CHECK(resident_bytes() > 0);
  CHECK(resident_bytes() <= 65536);
}

TEST_CASE("what a backlog has touched is used again by the next") {
  const NoHugePages small;
  BroadcastLog log{8 << 20};
  const Client client{log};
  for (int turn = 0; turn < 50; ++turn) {
    std::string due;
    while (due.size() < 300'000) {
      const std::string text = next_bytes(10'000);
      REQUIRE(log.append(text));
      due += text;
    }
    std::string heard;
    while (client.flush(log).would_block())
      heard += receive_some(client.ends.far);
    REQUIRE(heard + receive_some(client.ends.far) == due);
  }
  CHECK(resident_bytes() >= 300'000);
  CHECK(resident_bytes() <= 400'000);
}

TEST_CASE("a thousand stalled peers share one copy of a megabyte") {
  const NoHugePages small;
  BroadcastLog log{8 << 20};
  const Ends full = make_socketpair();
  fill(full.near);
  const allocation_count::Since start;
  std::vector<Cursor> cursors;
  for (int count = 0; count < 1'000; ++count) cursors.push_back(log.join());
  for (std::size_t line = 0; line < 1024; ++line) {
    REQUIRE(log.append(next_bytes(1024), &cursors[line % cursors.size()]));
    if (line % 128 != 0) continue;
    for (const Cursor& cursor : cursors)
      CHECK_FALSE(log.flush(full.near, cursor).failed());
  }
  for (const Cursor& cursor : cursors) CHECK(cursor.behind() > 1'000'000);
  CHECK(log.size() == 1 << 20);
  CHECK(resident_bytes() <= (1 << 20) + 65536);
  CHECK(start.bytes() <= 256 * 1024);
}

TEST_CASE("in the steady state, nothing is allocated") {
  BroadcastLog log{65536};
  std::deque<Client> clients;
  for (int count = 0; count < 5; ++count) clients.emplace_back(log);
  const std::string line(100, 'x');
  std::size_t sent = 0;
  std::string room(65536, '\0');
  const auto round = [&] {
    for (int count = 0; count < 20; ++count)
      for (const Client& client : clients)
        if (!log.append(line, &client.cursor)) return;
    const Cursor visitor = log.join();
    for (const Client& client : clients) {
      while (client.cursor.behind() > 0)
        sent += log.flush(client.ends.near, client.cursor, 3'333).bytes;
      static_cast<void>(read(client.ends.far, room));
    }
  };
  round();
  const std::size_t in_a_round = std::exchange(sent, 0);
  const allocation_count::Since start;
  for (int turn = 0; turn < 100; ++turn) round();
  CHECK(start.allocations() == 0);
  CHECK(start.bytes() == 0);
  CHECK(sent == 100 * in_a_round);
  CHECK(in_a_round == 5 * 4 * 20 * 100);
}

// ---------------------------------------------------------------------------
// Making one
// ---------------------------------------------------------------------------

TEST_CASE("a log costs no descriptor, and takes its mapping with it") {
  CHECK(ring_mappings().empty());
  const auto lowest_free = [] {
    const Fd probe{::open("/dev/null", O_RDONLY | O_CLOEXEC)};
    return probe.get();
  };
  const int before = lowest_free();
  {
    const BroadcastLog log{5000};
    CHECK(lowest_free() == before);
    const std::vector<Mapping> mappings = ring_mappings();
    REQUIRE(mappings.size() == 2);
    CHECK(mappings[0].end == mappings[1].begin);
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t size = mappings[0].end - mappings[0].begin;
    CHECK(size >= 5000);
    CHECK(size < 5000 + page);
    CHECK(mappings[1].end - mappings[1].begin == size);
  }
  CHECK(ring_mappings().empty());
}

TEST_CASE("a capacity that no memory can hold is refused by name") {
  std::vector<std::size_t> capacities{SIZE_MAX, SIZE_MAX - 1, SIZE_MAX / 2,
                                      SIZE_MAX / 2 + 1, SIZE_MAX / 4 + 1};
  // On 32-bit machines, half a gigabyte is no more than large.
  if (sizeof(std::size_t) > 4) {
    capacities.push_back(SIZE_MAX / 8);
    capacities.push_back(SIZE_MAX >> 17);  // all of the address space
  }
  for (const std::size_t capacity : capacities) {
    CAPTURE(capacity);
    const Thrown thrown = thrown_by([&] { const BroadcastLog log{capacity}; });
    CHECK(thrown.error != 0);
    CHECK(thrown.text.starts_with("make a broadcast log of " +
                                  std::to_string(capacity) + " bytes: "));
  }
  CHECK(ring_mappings().empty());
}

TEST_CASE("a capacity of nothing takes nothing, with and without peers") {
  BroadcastLog log{0};
  CHECK(log.capacity() == 0);
  CHECK(log.room() == 0);
  CHECK_FALSE(log.append("x"));
  CHECK(log.append(""));
  const Client client{log};
  const Client sender{log};
  CHECK_FALSE(log.append("x"));
  CHECK_FALSE(log.append("x", &sender.cursor));
  CHECK(log.append("", &sender.cursor));
  CHECK(log.empty());
  CHECK(client.hear(log).empty());
}

namespace {

// Takes all mappings that a process may have, gives them back one by one, and
// tries to make a log after each.
int make_logs_with_few_mappings() {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  constexpr std::size_t most = 100'000;
  char* const pages = static_cast<char*>(
      ::mmap(nullptr, most * page, PROT_NONE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  // Every other page differs from its neighbours, so it is a mapping.
  std::size_t next = 0;
  while (next < most && ::mprotect(pages + next * page, page, PROT_READ) == 0)
    next += 2;
  if (next >= most) return 77;
  int refused = 0;
  for (int turn = 0; turn < 5; ++turn) {
    const Thrown thrown = thrown_by([] {
      BroadcastLog log{100};
      const Cursor cursor = log.join();
      if (!log.append("it works")) std::abort();
    });
    if (thrown.error == ENOMEM) ++refused;
    ::munmap(pages + (next -= 2) * page, page);
  }
  const bool left = !ring_mappings().empty();
  return refused > 1 && refused < 5 && !left ? 0 : 1;
}

}  // namespace

TEST_CASE("a log for which there are too few mappings leaves none behind") {
  const int code = run_in_child(make_logs_with_few_mappings);
  if (code == 77) {
    MESSAGE("skipped: there is no limit of mappings here");
  } else {
    CHECK(code == 0);
  }
}

TEST_CASE("a log for which there is no descriptor says so") {
  const int code = run_in_child([] {
    const ::rlimit none{0, 0};
    ::setrlimit(RLIMIT_NOFILE, &none);
    const Thrown thrown = thrown_by([] { const BroadcastLog log{100}; });
    return thrown.text ==
                   "make a broadcast log of 100 bytes: Too many open files"
               ? 0
               : 1;
  });
  CHECK(code == 0);
}
