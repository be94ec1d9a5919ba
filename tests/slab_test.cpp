// Slab: a token finds its own value or nothing, and a value lives exactly from
// emplace to erase.
#include <doctest/doctest.h>
#include <sys/mman.h>
#include <sys/prctl.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "allocation_count.hpp"
#include "support.hpp"

using namespace edgewise;
using namespace support;

namespace {

constexpr std::uint64_t first_token = std::uint64_t{1} << 32;

std::uint64_t number_of(Token token) {
  return static_cast<std::uint64_t>(token);
}
// What the Slab's comment says a token is made of.
std::uint32_t slot_of(Token token) {
  return static_cast<std::uint32_t>(number_of(token));
}
std::uint32_t generation_of(Token token) {
  return static_cast<std::uint32_t>(number_of(token) >> 32);
}
Token token_of(std::uint32_t generation, std::uint32_t slot) {
  return Token{std::uint64_t{generation} << 32 | slot};
}

template <class S>
std::vector<Token> tokens_of(S& slab) {
  std::vector<Token> tokens;
  for (auto [token, value] : slab) tokens.push_back(token);
  return tokens;
}

// Counts the values that are alive, and notes those destroyed that were not.
struct Counted {
  explicit Counted(int number_) : number(number_) {
    if (number < 0) throw std::invalid_argument("below zero");
    if (!alive().insert(this).second) ++mistakes();
  }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  ~Counted() {
    if (alive().erase(this) != 1) ++mistakes();
  }

  static std::set<const Counted*>& alive() {
    static std::set<const Counted*> all;
    return all;
  }
  static int& mistakes() {
    static int count = 0;
    return count;
  }

  int number;
};

struct Point {
  int x = 0;
  int y = 0;
};

}  // namespace

static_assert(!std::is_copy_constructible_v<Slab<int>>);
static_assert(!std::is_move_constructible_v<Slab<int>>);
static_assert(!std::is_copy_assignable_v<Slab<int>>);
static_assert(!std::is_move_assignable_v<Slab<int>>);
static_assert(std::is_nothrow_default_constructible_v<Slab<int>>);
static_assert(
    std::is_same_v<int*, decltype(std::declval<Slab<int>&>().find(Token{}))>);
static_assert(
    std::is_same_v<const int*,
                   decltype(std::declval<const Slab<int>&>().find(Token{}))>);

// ---------------------------------------------------------------------------
// Tokens
// ---------------------------------------------------------------------------

namespace {

struct Client {
  Fd socket;
  std::string name;
};

}  // namespace

TEST_CASE(
    "P06 a stale event of the same batch finds nothing, though a new "
    "client has the descriptor's number and the slot") {
  Slab<Client> clients;
  Poller poller;
  const auto join = [&](Fd socket, const char* name) {
    auto [token, client] = clients.emplace(std::move(socket), name);
    poller.add(client.socket, token, Interest::readable);
    return token;
  };

  auto one = make_socketpair();
  auto two = make_socketpair();
  const Token tokens[]{join(std::move(one.near), "one"),
                       join(std::move(two.near), "two")};
  send_all(one.far, "a");
  send_all(two.far, "a");
  const Events batch = poller.wait(patience);
  REQUIRE(batch.size() == 2);

  // The first event's handler closes the second event's client.
  const Token gone = batch[0].token() == tokens[0] ? tokens[1] : tokens[0];
  REQUIRE(batch[1].token() == gone);
  Client* const place = clients.find(gone);
  REQUIRE(place != nullptr);
  const int descriptor = place->socket.get();
  CHECK(poller.remove(place->socket));
  CHECK(clients.erase(gone));

  // A new client comes in its place, in every respect.
  auto three = make_socketpair();
  REQUIRE(three.near.get() == descriptor);
  const Token token = join(std::move(three.near), "three");
  CHECK(slot_of(token) == slot_of(gone));
  CHECK(clients.find(token) == place);

  CHECK(clients.find(batch[0].token()) != nullptr);
  CHECK(clients.find(batch[1].token()) == nullptr);
  CHECK_FALSE(clients.erase(batch[1].token()));
  REQUIRE(clients.find(token) != nullptr);
  CHECK(clients.find(token)->name == "three");
  CHECK(clients.size() == 2);
}

TEST_CASE("a token is 2^32 or more, and is never given out again") {
  std::mt19937 random{20250301};
  Slab<int> slab;
  std::set<Token> ever;
  std::vector<Token> alive;
  for (int turn = 0; turn < 20'000; ++turn) {
    // More comes than goes at first, and then the reverse.
    const auto sixth = random() % 6;
    if (alive.empty() || (turn / 5'000 % 2 == 0 ? sixth < 4 : sixth < 2)) {
      alive.push_back(slab.emplace(turn).token);
      REQUIRE(number_of(alive.back()) >= first_token);
      REQUIRE(ever.insert(alive.back()).second);
    } else {
      std::swap(alive[random() % alive.size()], alive.back());
      REQUIRE(slab.erase(alive.back()));
      alive.pop_back();
    }
    REQUIRE(slab.size() == alive.size());
  }
  std::size_t found = 0;
  for (const Token token : ever)
    if (slab.find(token) != nullptr) ++found;
  CHECK(found == alive.size());
}

TEST_CASE("a token of the user's own finds nothing") {
  Slab<int> slab;
  const auto finds_nothing = [&](std::uint64_t number) {
    const Slab<int>& constant = slab;
    return slab.find(Token{number}) == nullptr &&
           constant.find(Token{number}) == nullptr &&
           !slab.erase(Token{number});
  };
  const std::uint64_t numbers[]{0,
                                1,
                                63,
                                64,
                                99,
                                100,
                                UINT32_MAX,
                                first_token + 99,
                                first_token + 100,
                                UINT64_MAX,
                                UINT64_MAX - UINT32_MAX};
  for (const std::uint64_t number : numbers) CHECK(finds_nothing(number));
  for (int count = 0; count < 99; ++count) slab.emplace(count);
  for (const std::uint64_t number : numbers) CHECK(finds_nothing(number));
  for (std::uint64_t number = 0; number < 1'000; ++number)
    REQUIRE(finds_nothing(number));
  CHECK(slab.size() == 99);
}

TEST_CASE("of all generations of a slot, only the tenant's finds it") {
  Slab<int> slab;
  std::optional<Token> tenant;
  const auto check_generations = [&] {
    for (std::uint32_t generation = 0; generation < 20; ++generation) {
      const Token token = token_of(generation, 0);
      CHECK((slab.find(token) != nullptr) == (tenant == token));
    }
  };
  check_generations();
  for (int turn = 0; turn < 5; ++turn) {
    tenant = slab.emplace(turn).token;
    CHECK(slot_of(*tenant) == 0);
    check_generations();
    CHECK(slab.erase(*tenant));
    tenant.reset();
    check_generations();
    // Nor can a guess at a vacant slot's generation free it once more.
    for (std::uint32_t generation = 0; generation < 20; ++generation)
      CHECK_FALSE(slab.erase(token_of(generation, 0)));
    CHECK(slab.empty());
  }
}

TEST_CASE("a token of one Slab may be another's too: each finds its own") {
  Slab<int> left;
  Slab<int> right;
  const Token token = left.emplace(1).token;
  CHECK(right.find(token) == nullptr);
  CHECK(right.emplace(2).token == token);
  CHECK(*left.find(token) == 1);
  CHECK(*right.find(token) == 2);
}

TEST_CASE("erasing twice is erasing once") {
  Slab<int> slab;
  const Token token = slab.emplace(1).token;
  const Token other = slab.emplace(2).token;
  CHECK(slab.erase(token));
  CHECK_FALSE(slab.erase(token));
  CHECK(slab.size() == 1);
  CHECK(slot_of(slab.emplace(3).token) == 0);
  CHECK(slot_of(slab.emplace(4).token) == 2);
  CHECK(*slab.find(other) == 2);
}

TEST_CASE("the slot that was free last is used first") {
  Slab<int> slab;
  std::vector<Token> tokens;
  for (int count = 0; count < 200; ++count)
    tokens.push_back(slab.emplace(count).token);
  const std::uint32_t order[]{7, 199, 0, 64, 63, 100};
  for (const std::uint32_t slot : order) CHECK(slab.erase(tokens[slot]));
  for (std::size_t index = std::size(order); index-- > 0;) {
    const Token token = slab.emplace(0).token;
    CHECK(slot_of(token) == order[index]);
    CHECK(generation_of(token) > generation_of(tokens[order[index]]));
  }
  CHECK(slot_of(slab.emplace(0).token) == 200);
}

// ---------------------------------------------------------------------------
// A slot whose generations are used up
// ---------------------------------------------------------------------------

namespace {

// To wear a slot out takes 2^31 tenants: half a minute with sanitizers. Here
// the generation is set forward instead. The arguments of an explicit
// instantiation may name private members, so this is ordinary C++.
Token& token_of_first_slot(Slab<int>& slab);

template <auto Chunks, auto OwnToken>
struct Reach {
  friend Token& token_of_first_slot(Slab<int>& slab) {
    return (slab.*Chunks)[0][0].*OwnToken;
  }
};
template struct Reach<&Slab<int>::chunks_, &Slab<int>::Slot::token>;

}  // namespace

TEST_CASE("a slot whose generations are used up is retired") {
  Slab<int> slab;
  slab.erase(slab.emplace(1).token);
  const Token other = slab.emplace(2).token;
  slab.erase(slab.emplace(3).token);  // slot 1: slot 0 has a tenant
  slab.erase(other);
  // The lower half is the next free slot's index.
  REQUIRE(token_of_first_slot(slab) == token_of(4, 1));
  token_of_first_slot(slab) = token_of(UINT32_MAX - 3, 1);

  const Token last_but_one = slab.emplace(4).token;
  CHECK(last_but_one == token_of(UINT32_MAX - 2, 0));
  CHECK(slab.erase(last_but_one));
  const Token last = slab.emplace(5).token;
  CHECK(last == token_of(UINT32_MAX, 0));
  CHECK(*slab.find(last) == 5);
  CHECK(slab.erase(last));

  // Nobody finds it, no walk visits it, and nobody moves in.
  CHECK(slab.empty());
  CHECK(slab.find(last) == nullptr);
  CHECK(slab.find(Token{0}) == nullptr);
  CHECK_FALSE(slab.erase(Token{0}));
  CHECK(tokens_of(slab).empty());
  for (std::uint32_t slot = 1; slot < 100; ++slot)
    CHECK(slot_of(slab.emplace(6).token) == slot);
  CHECK(tokens_of(slab).size() == 99);
  slab.clear();
  CHECK(slot_of(slab.emplace(7).token) != 0);
}

// ---------------------------------------------------------------------------
// Values
// ---------------------------------------------------------------------------

TEST_CASE("emplace tells the token and the value") {
  Slab<std::string> slab;
  auto [token, value] = slab.emplace(std::size_t{3}, 'x');
  CHECK(value == "xxx");
  CHECK(slab.find(token) == &value);
  value = "changed";
  const Slab<std::string>& constant = slab;
  CHECK(*constant.find(token) == "changed");
}

TEST_CASE("pointers stay good while the Slab grows, and while others go") {
  Slab<std::string> slab;
  std::vector<std::pair<Token, const std::string*>> values;
  const allocation_count::Since start;
  for (std::size_t count = 0; count < 2'000; ++count) {
    // Long enough for heap memory of its own, which a stray move would take.
    auto [token, value] =
        slab.emplace(std::to_string(count) + " of a thousand");
    CHECK(slot_of(token) == count);
    values.emplace_back(token, &value);
  }
  for (std::size_t index = 0; index < values.size(); index += 3)
    CHECK(slab.erase(values[index].first));
  for (int count = 0; count < 300; ++count) slab.emplace("another");
  for (std::size_t index = 0; index < values.size(); ++index) {
    if (index % 3 == 0) continue;
    const auto& [token, value] = values[index];
    REQUIRE(slab.find(token) == value);
    REQUIRE(*value == std::to_string(index) + " of a thousand");
  }
}

TEST_CASE("a value may be made from one that is in the Slab already") {
  Slab<std::string> slab;
  const std::string text = "long enough for heap memory of its own";
  const Token first = slab.emplace(text).token;
  for (int count = 0; count < 500; ++count) slab.emplace(*slab.find(first));
  for (auto [token, value] : slab) REQUIRE(value == text);
}

TEST_CASE("slots are allocated 64 at a time, and kept") {
  Slab<int> slab;
  const allocation_count::Since start;
  const auto allocations_for = [&](std::size_t size) {
    while (slab.size() < size) slab.emplace(0);
    return start.allocations();
  };
  // The table of chunks grows to 1, 2, 4 and 8 places.
  CHECK(allocations_for(0) == 0);
  CHECK(allocations_for(1) == 1 + 1);
  CHECK(allocations_for(64) == 1 + 1);
  CHECK(allocations_for(65) == 2 + 2);
  CHECK(allocations_for(128) == 2 + 2);
  CHECK(allocations_for(129) == 3 + 3);
  CHECK(allocations_for(256) == 4 + 3);
  CHECK(allocations_for(257) == 5 + 4);
  // 16 bytes, or 12 where 64-bit numbers are aligned to 4.
  constexpr long slot = sizeof(std::pair<int, Token>);
  CHECK(start.bytes() >= 320 * slot);
  CHECK(start.bytes() <= 320 * slot + 15 * long{sizeof(void*)} + 9 * 16);
  slab.clear();
  CHECK(allocations_for(320) == 5 + 4);
}

TEST_CASE("once it has the slots, a Slab allocates nothing") {
  Slab<std::array<char, 100>> slab;
  std::vector<Token> tokens(300);
  for (Token& token : tokens) token = slab.emplace().token;
  const allocation_count::Since start;
  for (std::size_t turn = 0; turn < 10'000; ++turn) {
    Token& token = tokens[turn * 7 % tokens.size()];
    slab.erase(token);
    token = slab.emplace().token;
  }
  std::size_t visited = 0;
  for (auto [token, value] : slab) visited += value.size();
  slab.clear();
  CHECK(start.allocations() == 0);
  CHECK(start.bytes() == 0);
  CHECK(visited == 300 * 100);
}

TEST_CASE("every value is destroyed exactly once") {
  {
    Slab<Counted> slab;
    std::vector<Token> tokens;
    for (int count = 0; count < 300; ++count)
      tokens.push_back(slab.emplace(count).token);
    CHECK(Counted::alive().size() == 300);
    for (std::size_t index = 0; index < 300; index += 2) {
      CHECK(slab.erase(tokens[index]));
      CHECK_FALSE(slab.erase(tokens[index]));
    }
    CHECK(Counted::alive().size() == 150);
    for (int count = 0; count < 10; ++count) slab.emplace(count);
    CHECK(Counted::alive().size() == 160);
    slab.clear();
    CHECK(Counted::alive().empty());
    for (int count = 0; count < 100; ++count) slab.emplace(count);
    slab.erase((*slab.begin()).token);
    CHECK(Counted::alive().size() == 99);
  }
  CHECK(Counted::alive().empty());
  CHECK(Counted::mistakes() == 0);
}

TEST_CASE("a constructor that throws leaves everything as it was") {
  const allocation_count::Since start;
  {
    Slab<Counted> slab;
    const auto fails = [&] {
      const std::size_t size = slab.size();
      const std::vector<Token> before = tokens_of(slab);
      CHECK_THROWS_AS(slab.emplace(-1), std::invalid_argument);
      return slab.size() == size && tokens_of(slab) == before;
    };
    CHECK(fails());  // with no chunk yet
    CHECK(slab.empty());
    CHECK(slab.emplace(0).token == token_of(1, 0));
    while (slab.size() < 64) slab.emplace(0);
    CHECK(fails());  // at the end of a chunk
    CHECK(fails());
    const Token next = slab.emplace(0).token;
    CHECK(next == token_of(1, 64));
    CHECK(fails());  // within a chunk
    CHECK(slab.erase(token_of(1, 5)));
    CHECK(slab.erase(token_of(1, 9)));
    CHECK(fails());  // in a slot that is used again
    CHECK(slab.find(token_of(1, 9)) == nullptr);
    CHECK(slab.find(token_of(3, 9)) == nullptr);
    CHECK(slab.emplace(0).token == token_of(3, 9));
    CHECK(slab.emplace(0).token == token_of(3, 5));
    CHECK(slab.emplace(0).token == token_of(1, 65));
    CHECK(Counted::alive().size() == slab.size());
  }
  CHECK(Counted::alive().empty());
  CHECK(Counted::mistakes() == 0);
  CHECK(start.bytes() == 0);
}

namespace {

// 64 of them are more than any address space has.
struct Vast {
  Vast() noexcept {}
  char bytes[std::size_t{1} << (sizeof(std::size_t) * 8 - 7)];
};

}  // namespace

TEST_CASE("no memory for a chunk: bad_alloc, and everything as it was") {
  Slab<Vast> slab;
  CHECK_THROWS_AS(slab.emplace(), std::bad_alloc);
  CHECK_THROWS_AS(slab.emplace(), std::bad_alloc);
  CHECK(slab.empty());
  CHECK(tokens_of(slab).empty());
  CHECK(slab.find(token_of(1, 0)) == nullptr);
  slab.clear();
}

namespace {

// What a server keeps of its clients, made of nothing but the socket.
struct Talker {
  Fd socket;
  LineBuffer lines;
};
struct Peer {
  Fd socket;
  LineBuffer lines;
  FrameBuffer frames;
  WriteBuffer out;
  BroadcastLog::Cursor cursor;
};

}  // namespace

TEST_CASE("an aggregate of a socket and buffers is made of the socket") {
  auto ends = make_socketpair();
  Slab<Talker> talkers;
  auto [token, talker] = talkers.emplace(std::move(ends.near));
  send_all(ends.far, "hello\n");
  CHECK(talker.lines.fill(talker.socket).bytes == 6);
  CHECK(talker.lines.next() == "hello\n");

  Slab<Peer> peers;
  Peer& peer = peers.emplace(std::move(talker.socket)).value;
  CHECK(peer.out.append("and back"));
  CHECK(peer.out.flush(peer.socket).ok());
  CHECK(receive_some(ends.far) == "and back");
  send_all(ends.far, {"\0\0\0\2hi", 6});
  CHECK(peer.frames.fill(peer.socket).bytes == 6);
  CHECK(peer.frames.next() == "hi");
  CHECK_FALSE(peer.lines.next());
  CHECK(peer.cursor.behind() == 0);
}

TEST_CASE("aggregates are made as well, and constructors go first") {
  Slab<Point> points;
  Point& point = points.emplace(3, 4).value;
  CHECK(point.x == 3);
  CHECK(point.y == 4);
  CHECK(points.emplace(5).value.y == 0);
  const Point& zero = points.emplace().value;
  CHECK(zero.x == 0);
  CHECK(points.emplace(point).value.y == 4);

  Slab<std::pair<std::unique_ptr<int>, Point>> pairs;
  CHECK(pairs.emplace(std::make_unique<int>(1), Point{1, 2}).value.second.y ==
        2);

  Slab<std::vector<int>> vectors;
  CHECK(vectors.emplace(std::size_t{3}, 7).value == std::vector<int>{7, 7, 7});
}

namespace {

// Not to be found by its &.
struct Hidden {
  explicit Hidden(int start) : number(start) {}
  Hidden* operator&() { return nullptr; }
  const Hidden* operator&() const { return nullptr; }
  int number;
};
struct HiddenPoint {
  HiddenPoint* operator&() { return nullptr; }
  const HiddenPoint* operator&() const { return nullptr; }
  int x;
  int y;
};

}  // namespace

TEST_CASE("a value whose operator& tells something else lives in a Slab") {
  Slab<Hidden> slab;
  const Token one = slab.emplace(1).token;
  const Token two = slab.emplace(2).token;
  REQUIRE(slab.find(one) != nullptr);
  REQUIRE(std::as_const(slab).find(two) != nullptr);
  CHECK(slab.find(one)->number == 1);
  CHECK(std::as_const(slab).find(two)->number == 2);
  CHECK(slab.find(one) == std::as_const(slab).find(one));
  CHECK(slab.erase(one));
  CHECK(slab.find(one) == nullptr);
  CHECK(tokens_of(slab) == std::vector<Token>{two});
  slab.clear();
  CHECK(slab.find(two) == nullptr);

  Slab<HiddenPoint> points;
  const Token point = points.emplace(3, 4).token;
  REQUIRE(points.find(point) != nullptr);
  CHECK(points.find(point)->y == 4);
}

namespace {

// The kernel's page, which malloc alone would not give.
struct alignas(4096) Page {
  char first;
};

}  // namespace

TEST_CASE("move-only, immovable and over-aligned values live in a Slab") {
  Slab<std::unique_ptr<int>> pointers;
  const Token token = pointers.emplace(std::make_unique<int>(7)).token;
  CHECK(**pointers.find(token) == 7);
  const std::unique_ptr<int> out = std::move(*pointers.find(token));
  CHECK(pointers.erase(token));
  CHECK(*out == 7);

  struct Immovable {
    explicit Immovable(int start) : count(start) {}
    std::atomic<int> count;
    std::mutex mutex;
  };
  Slab<Immovable> immovables;
  for (int count = 0; count < 100; ++count) immovables.emplace(count);
  const std::lock_guard lock(immovables.find(token_of(1, 99))->mutex);
  CHECK(immovables.find(token_of(1, 99))->count == 99);

  Slab<Page> pages;
  for (int count = 0; count < 70; ++count) {
    const Page& page = pages.emplace().value;
    CHECK(reinterpret_cast<std::uintptr_t>(&page) % alignof(Page) == 0);
  }
}

namespace {

// A huge page would come as a whole, whatever of it is touched.
class NoHugePages {
 public:
  NoHugePages() { REQUIRE(::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0); }
  NoHugePages(const NoHugePages&) = delete;
  NoHugePages& operator=(const NoHugePages&) = delete;
  ~NoHugePages() { ::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0); }
};

struct Large {
  std::array<char, 65536> bytes;
  explicit Large(char byte) { bytes.fill(byte); }
};

const auto page_size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));

// How much of the first chunk is in memory.
std::size_t resident_bytes(Slab<Large>& slab) {
  char* const first = (*slab.begin()).value.bytes.data();
  char* const begin =
      first + page_size - reinterpret_cast<std::uintptr_t>(first) % page_size;
  std::vector<unsigned char> pages(63 * sizeof(Large) / page_size);
  REQUIRE(::mincore(begin, pages.size() * page_size, pages.data()) == 0);
  const auto resident =
      std::count_if(pages.begin(), pages.end(),
                    [](unsigned char bits) { return (bits & 1) != 0; });
  return static_cast<std::size_t>(resident) * page_size;
}

}  // namespace

TEST_CASE("the memory of slots that never were in use is not touched") {
  const NoHugePages small;
  Slab<Large> slab;
  for (std::size_t count = 1; count <= 3; ++count) {
    slab.emplace('x');
    CHECK(resident_bytes(slab) >= count * sizeof(Large) - page_size);
    CHECK(resident_bytes(slab) <= count * sizeof(Large) + 4 * page_size);
  }
}

// ---------------------------------------------------------------------------
// Destructors that come back to the Slab
// ---------------------------------------------------------------------------

namespace {

struct Reentrant;
using Reentrants = Slab<Reentrant>;

struct Reentrant {
  Reentrants* slab = nullptr;
  Token itself{};
  Token victim{};         // erased along with it
  Token* heir = nullptr;  // takes the token of a value that it emplaces
  int* found = nullptr;   // counts what it finds of itself

  Reentrant() = default;
  Reentrant(const Reentrant&) = delete;
  Reentrant& operator=(const Reentrant&) = delete;
  ~Reentrant();
};

Reentrant::~Reentrant() {
  if (slab == nullptr) return;
  if (found != nullptr) {
    if (slab->find(itself) != nullptr || slab->erase(itself)) ++*found;
    for (auto [token, value] : *slab)
      if (&value == this) ++*found;
  }
  slab->erase(victim);
  if (heir != nullptr) *heir = slab->emplace().token;
}

}  // namespace

TEST_CASE("a value that is being destroyed is in the Slab no more") {
  int found = 0;
  {
    Reentrants slab;
    const auto emplace = [&] {
      auto [token, value] = slab.emplace();
      value.slab = &slab;
      value.itself = token;
      value.found = &found;
      return token;
    };
    const Token token = emplace();
    CHECK(slab.erase(token));
    CHECK(slab.empty());
    emplace();
    slab.clear();
    emplace();
  }
  CHECK(found == 0);
}

TEST_CASE("a destructor may erase and emplace other values") {
  Reentrants slab;
  const Token first = slab.emplace().token;
  const Token second = slab.emplace().token;
  Token heir{};
  Reentrant& value = *slab.find(first);
  value.slab = &slab;
  value.victim = second;
  value.heir = &heir;
  CHECK(slab.erase(first));
  CHECK(slab.find(second) == nullptr);
  CHECK(slab.find(heir) != nullptr);
  CHECK(slot_of(heir) == 1);
  CHECK(slab.size() == 1);
  CHECK(slot_of(slab.emplace().token) == 0);
  CHECK(slot_of(slab.emplace().token) == 2);
}

TEST_CASE("a slot is not free before its value's destructor has ended") {
  Reentrants slab;
  Token heir{};
  auto [token, value] = slab.emplace();
  value.slab = &slab;
  value.heir = &heir;
  CHECK(slab.erase(token));
  CHECK(slot_of(heir) == 1);
  CHECK(slab.size() == 1);
  CHECK(slot_of(slab.emplace().token) == 0);
}

namespace {

// Emplaces heirs into its Slab when it is destroyed, each of which does the
// same for one generation less.
struct Testator {
  Testator(Slab<Testator>& slab_, int heirs_, int generations_)
      : slab(slab_), heirs(heirs_), generations(generations_) {
    ++made();
  }
  Testator(const Testator&) = delete;
  Testator& operator=(const Testator&) = delete;
  ~Testator() {
    ++destroyed();
    if (generations == 0) return;
    for (int heir = 0; heir < heirs; ++heir)
      slab.emplace(slab, heirs, generations - 1);
  }

  static int& made() {
    static int count = 0;
    return count;
  }
  static int& destroyed() {
    static int count = 0;
    return count;
  }

  Slab<Testator>& slab;
  int heirs;
  int generations;
  // Heap memory, which a value that is forgotten would leak.
  std::string name = "long enough for heap memory of its own";
};

// Of a Slab of so many values, with their slots, and one vacant slot at the
// front, into which heirs go first: behind every walk.
void fill(Slab<Testator>& slab, int count, int heirs, int generations) {
  Testator::made() = Testator::destroyed() = 0;
  const Token first = slab.emplace(slab, 0, 0).token;
  for (int number = 0; number < count; ++number)
    slab.emplace(slab, heirs, generations);
  slab.erase(first);
}

}  // namespace

TEST_CASE("what destructors emplace during clear is destroyed by it, too") {
  for (const int generations : {0, 1, 3}) {
    CAPTURE(generations);
    Slab<Testator> slab;
    fill(slab, 70, 2, generations);
    slab.clear();
    CHECK(slab.empty());
    CHECK(slab.size() == 0);
    CHECK(tokens_of(slab).empty());
    // Each of 70 has 2 heirs, these have 2 each, and so on.
    const int family = (2 << generations) - 1;
    CHECK(Testator::made() == 1 + 70 * family);
    CHECK(Testator::destroyed() == Testator::made());
    CHECK(slab.emplace(slab, 0, 0).value.heirs == 0);
    CHECK(slab.size() == 1);
  }
}

TEST_CASE("what destructors emplace while a Slab is destroyed is, too") {
  for (const int generations : {0, 1, 3}) {
    CAPTURE(generations);
    {
      Slab<Testator> slab;
      fill(slab, 70, 2, generations);
    }
    CHECK(Testator::made() == 1 + 70 * ((2 << generations) - 1));
    CHECK(Testator::destroyed() == Testator::made());
  }
}

TEST_CASE("one value's only heir, in a Slab of one, is destroyed too") {
  {
    Slab<Testator> slab;
    fill(slab, 1, 1, 1);
  }
  CHECK(Testator::made() == 3);
  CHECK(Testator::destroyed() == 3);
}

// ---------------------------------------------------------------------------
// Constructors that come back to the Slab
// ---------------------------------------------------------------------------

namespace {

// Its constructor does with its Slab, which is `slab` meanwhile, what `script`
// says, a letter at a time: "e" emplaces one whose script is empty, "x" erases
// the one that was emplaced last, "t" throws.
struct Maker {
  Maker(Slab<Maker>& slab_, std::string_view script) : name(script) {
    if (!alive().insert(this).second) ++mistakes();
    try {
      run(slab_, script);
    } catch (...) {
      alive().erase(this);
      throw;
    }
  }
  Maker(const Maker&) = delete;
  Maker& operator=(const Maker&) = delete;
  ~Maker() {
    if (alive().erase(this) != 1) ++mistakes();
  }

  void run(Slab<Maker>& slab, std::string_view script) {
    for (const char letter : script) {
      switch (letter) {
        case 'e':
          emplaced.push_back(slab.emplace(slab, "").token);
          // Whoever is being made is in the Slab not yet.
          for (const auto& entry : slab)
            if (&entry.value == this) ++mistakes();
          break;
        case 'x':
          if (!slab.erase(emplaced.back())) ++mistakes();
          emplaced.pop_back();
          break;
        default:
          last_words() = emplaced;
          throw std::invalid_argument("told to");
      }
    }
  }

  static std::set<const Maker*>& alive() {
    static std::set<const Maker*> all;
    return all;
  }
  static int& mistakes() {
    static int count = 0;
    return count;
  }
  // Whom one that threw had emplaced.
  static std::vector<Token>& last_words() {
    static std::vector<Token> tokens;
    return tokens;
  }

  std::string name;
  std::vector<Token> emplaced{};
};

// All that a Slab tells of its values fits together.
void check_consistent(Slab<Maker>& slab, std::size_t size) {
  CHECK(slab.size() == size);
  CHECK(Maker::alive().size() == size);
  CHECK(Maker::mistakes() == 0);
  std::set<Token> tokens;
  std::set<const Maker*> values;
  for (auto [token, value] : slab) {
    CHECK(tokens.insert(token).second);
    CHECK(values.insert(&value).second);
    CHECK(slab.find(token) == &value);
    CHECK(number_of(token) >= first_token);
  }
  CHECK(values == Maker::alive());
}

// Slabs in which the next value goes into a new slot, at the very beginning, in
// the middle and at the end of a chunk, and into one that is used again, of
// which there are one or more.
struct Before {
  int values;
  int erased;
};
constexpr Before befores[]{{0, 0},  {5, 0},  {63, 0}, {64, 0},
                           {10, 1}, {10, 2}, {10, 9}, {1, 1}};

void prepare(Slab<Maker>& slab, const Before& before) {
  std::vector<Token> tokens;
  for (int count = 0; count < before.values; ++count)
    tokens.push_back(slab.emplace(slab, "").token);
  for (int count = 0; count < before.erased; ++count)
    CHECK(slab.erase(tokens[static_cast<std::size_t>(count)]));
}

}  // namespace

TEST_CASE("a constructor may emplace and erase other values") {
  for (const Before& before : befores) {
    CAPTURE(before.values);
    CAPTURE(before.erased);
    for (const std::string_view script :
         {"e", "ee", "ex", "exe", "eexe", "exexexe", "eeexxx"}) {
      CAPTURE(script);
      {
        Slab<Maker> slab;
        prepare(slab, before);
        const std::size_t size = slab.size();
        auto [token, value] = slab.emplace(slab, script);
        CHECK(slab.find(token) == &value);
        CHECK(value.name == script);
        check_consistent(slab, size + 1 + value.emplaced.size());
        for (const Token inner : value.emplaced) {
          CHECK(inner != token);
          REQUIRE(slab.find(inner) != nullptr);
          CHECK(slab.find(inner) != &value);
        }

        // And the Slab goes on as any other.
        const std::vector<Token> left = value.emplaced;
        CHECK(slab.erase(token));
        CHECK(slab.find(token) == nullptr);
        for (int count = 0; count < 10; ++count) {
          const Token next = slab.emplace(slab, "").token;
          CHECK(next != token);
          CHECK(std::count(left.begin(), left.end(), next) == 0);
        }
        check_consistent(slab, size + left.size() + 10);
        for (const Token inner : left) CHECK(slab.erase(inner));
        check_consistent(slab, size + 10);
      }
      CHECK(Maker::alive().empty());
      CHECK(Maker::mistakes() == 0);
    }
  }
}

TEST_CASE("a constructor that throws leaves what it emplaced before") {
  for (const Before& before : befores) {
    CAPTURE(before.values);
    CAPTURE(before.erased);
    for (const std::string_view script : {"et", "eet", "ext", "eexet", "t"}) {
      CAPTURE(script);
      {
        Slab<Maker> slab;
        prepare(slab, before);
        const std::size_t size = slab.size();
        CHECK_THROWS_AS(slab.emplace(slab, script), std::invalid_argument);
        const std::vector<Token> left = Maker::last_words();
        check_consistent(slab, size + left.size());
        for (const Token inner : left) CHECK(slab.find(inner) != nullptr);

        // The slot that it was to have is free again, and used.
        auto [token, value] = slab.emplace(slab, "");
        CHECK(value.name.empty());
        CHECK(slab.find(token) == &value);
        CHECK(std::count(left.begin(), left.end(), token) == 0);
        check_consistent(slab, size + left.size() + 1);
        CHECK(slot_of(token) <=
              static_cast<std::size_t>(before.values) + left.size());
        for (const Token inner : left) CHECK(slab.erase(inner));
        check_consistent(slab, size + 1);
        slab.clear();
        check_consistent(slab, 0);
      }
      CHECK(Maker::alive().empty());
      CHECK(Maker::mistakes() == 0);
    }
  }
}

// ---------------------------------------------------------------------------
// Walks
// ---------------------------------------------------------------------------

namespace {

std::vector<Token> fill(Slab<int>& slab, int count) {
  std::vector<Token> tokens;
  for (int number = 0; number < count; ++number)
    tokens.push_back(slab.emplace(number).token);
  return tokens;
}

}  // namespace

TEST_CASE("a walk visits every value once, slot by slot") {
  Slab<int> slab;
  CHECK(tokens_of(slab).empty());
  const std::vector<Token> tokens = fill(slab, 500);
  CHECK(tokens_of(slab) == tokens);
  int expected = 0;
  for (auto [token, value] : slab) {
    CHECK(value == expected++);
    value *= 2;
  }
  CHECK(*slab.find(tokens[100]) == 200);

  for (const int gone : {0, 1, 63, 64, 300, 499})
    slab.erase(tokens[static_cast<std::size_t>(gone)]);
  std::vector<Token> rest;
  for (const Token token : tokens)
    if (slab.find(token) != nullptr) rest.push_back(token);
  CHECK(rest.size() == 494);
  CHECK(tokens_of(slab) == rest);
}

TEST_CASE("a walk over a const Slab reads") {
  Slab<int> slab;
  const std::vector<Token> tokens = fill(slab, 100);
  slab.erase(tokens[0]);
  const Slab<int>& constant = slab;
  int sum = 0;
  for (auto [token, value] : constant) {
    static_assert(std::is_same_v<decltype(value), const int&>);
    sum += value;
    CHECK(constant.find(token) == &value);
  }
  CHECK(sum == 99 * 50);
  CHECK(constant.size() == 99);
}

TEST_CASE("what is erased during a walk is not visited, and the rest is") {
  Slab<int> slab;
  const std::vector<Token> tokens = fill(slab, 200);
  std::vector<int> visited;
  for (auto [token, value] : slab) {
    visited.push_back(value);
    const auto here = static_cast<std::size_t>(value);
    // Itself, its predecessor and its next but one, which is odd as well.
    if (here % 2 == 0) continue;
    slab.erase(tokens[here - 1]);
    if (here + 2 < tokens.size()) slab.erase(tokens[here + 2]);
    slab.erase(token);
  }
  std::vector<int> expected;
  for (int number = 0; number < 200; ++number)
    if (number % 4 != 3) expected.push_back(number);
  CHECK(visited == expected);

  const auto end_of_walk = [&](std::size_t first) {
    Slab<int> other;
    const std::vector<Token> all = fill(other, 130);
    int count = 0;
    for (const auto& entry : other) {
      count += entry.value >= 0 ? 1 : 0;
      for (std::size_t index = first; index < all.size(); ++index)
        other.erase(all[index]);
    }
    return count;
  };
  CHECK(end_of_walk(0) == 1);
  CHECK(end_of_walk(1) == 1);
  CHECK(end_of_walk(64) == 64);
}

TEST_CASE("emplacing during a walk does it no harm, over new chunks too") {
  Slab<int> slab;
  fill(slab, 60);
  std::set<Token> visited;
  int emplaced = 0;
  for (auto [token, value] : slab) {
    CHECK(visited.insert(token).second);
    // From within the first chunk into the third.
    while (emplaced < 200 && slab.size() < 60 + 10 * visited.size()) {
      slab.emplace(1'000 + emplaced++);
      CHECK(slab.find(token) == &value);
    }
  }
  CHECK(emplaced == 200);
  CHECK(slab.size() == 260);
  // All that were there at the beginning, and no stranger.
  for (std::uint32_t slot = 0; slot < 60; ++slot)
    CHECK(visited.count(token_of(1, slot)) == 1);
  for (const Token token : visited) CHECK(slab.find(token) != nullptr);
}

TEST_CASE("a walk in which every value makes room for a new one ends") {
  Slab<int> slab;
  fill(slab, 100);
  int turns = 0;
  for (auto [token, value] : slab) {
    REQUIRE(++turns <= 100);
    slab.erase(token);
    slab.emplace(turns);  // in the slot just left, which is behind the walk
  }
  CHECK(turns == 100);
  CHECK(slab.size() == 100);
}

TEST_CASE("clear empties a Slab, which goes on, and during a walk ends it") {
  Slab<int> slab;
  slab.clear();
  CHECK(slab.empty());
  CHECK(slab.size() == 0);
  const std::vector<Token> tokens = fill(slab, 70);
  CHECK_FALSE(slab.empty());
  CHECK(slab.size() == 70);
  int turns = 0;
  for (const auto& entry : slab) {
    turns += entry.value >= 0 ? 1 : 0;
    slab.clear();
  }
  CHECK(turns == 1);
  CHECK(slab.empty());
  for (const Token token : tokens) CHECK(slab.find(token) == nullptr);
  CHECK(tokens_of(slab).empty());
  const Token again = slab.emplace(1).token;
  CHECK(std::count(tokens.begin(), tokens.end(), again) == 0);
  CHECK(slot_of(again) < 70);
  CHECK(slab.size() == 1);
}
