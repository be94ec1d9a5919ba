// rat among clients that do anything: they talk in pieces, read or not, come,
// half-close, leave and reset, at random. A model says what each of them has to
// get, to the byte.
//
//   SOAK_SECONDS=3600 SOAK_SEED=7 soak_test     an hour for each room
//
// The model: an observer, who never speaks, hears all lines in one order.
// Everybody else has to hear a contiguous part of that, without what he said
// himself (unless with --echo). It begins no later than with the first line
// that he said, and it ends with the last line of all; or, of one who has
// half-closed, not before his own last line. Of each sender everybody hears all
// lines, in order; of one who has reset, the first so many.
#include <doctest/doctest.h>

#include <cstdint>
#include <iostream>
#include <map>

#include "rat.hpp"

using namespace peers;

namespace {

std::uint32_t number_from(const char* variable, std::uint32_t otherwise) {
  const char* const text = std::getenv(variable);
  return text != nullptr ? static_cast<std::uint32_t>(std::atoll(text))
                         : otherwise;
}

// One line: who said it, and which of his it was. Its text follows from that.
struct Said {
  std::uint32_t guest = 0;
  std::uint32_t number = 0;

  auto operator<=>(const Said&) const = default;

  std::string text() const {
    std::uint32_t hash = guest * 2654435761u + number * 40503u;
    hash ^= hash >> 15;
    const std::size_t length = hash % 8 == 0 ? hash % 1500 : hash % 60;
    return std::to_string(guest) + ' ' + std::to_string(number) + ' ' +
           std::string(length, static_cast<char>('a' + hash % 26)) + '\n';
  }

  static Said parse(const std::string& line) {
    Said said;
    char rest = 0;
    if (std::sscanf(line.c_str(), "%u %u%c", &said.guest, &said.number,
                    &rest) != 3 ||
        said.text() != line)
      fail("a line that somebody has said", shown(line));
    return said;
  }
};

enum class Fate {
  here,
  half_closed,  // is to be sent what was said before, and then the end
  gone,         // or reset: what is under way may be lost
};

struct Guest {
  std::uint32_t id = 0;
  Peer* peer = nullptr;  // none when it has ended
  Fate fate = Fate::here;
  std::uint32_t begun = 0;    // lines that were given to its socket, in part
  std::string piece;          // what remains of the last of them
  std::string half_heard;     // a line that has not come whole
  std::vector<Said> heard{};  // so far
  bool heard_last = false;    // the line that ends it all
  Clock::time_point deaf_until{};
};

class Party {
 public:
  Party(const Command& command, bool echoes, std::uint32_t seed)
      : room_(command), echoes_(echoes), random_(seed) {
    observer_ = arrive();
  }

  // Anything happens for so long, then all that was said arrives.
  void hold(std::chrono::seconds duration) {
    step("clients do anything");
    const auto end = Clock::now() + duration;
    // Room::wait has a limit, and an hour is longer.
    while (Clock::now() < end)
      go_on_until(std::min(end, Clock::now() + time_limit() / 4));
    settle();
    judge();
    leave();
  }

  std::size_t lines() const { return guests_.at(observer_).heard.size(); }
  std::size_t guests() const { return guests_.size(); }

 private:
  static constexpr std::size_t most_guests = 24;

  void go_on_until(Clock::time_point end) {
    room_.wait(
        [&] {
          act();
          listen();
          return Clock::now() > end;
        },
        "the party goes on");
  }

  std::uint32_t any(std::uint32_t count) {
    return std::uniform_int_distribution<std::uint32_t>(0, count - 1)(random_);
  }

  std::uint32_t arrive() {
    const std::uint32_t id = next_id_++;
    Guest& guest = guests_[id];
    guest.id = id;
    guest.peer = any(6) == 0 ? &room_.connect(4096, 1000) : &room_.connect();
    if (id == 0) return id;
    here_.push_back(id);
    say(guest, 1);  // so that it is known when it was there
    return id;
  }

  // Gives so many lines to its socket, perhaps all but a piece of the last.
  void say(Guest& guest, std::uint32_t lines) {
    begun_ += lines;
    std::string text = std::exchange(guest.piece, {});
    for (std::uint32_t i = 0; i < lines; ++i)
      text += Said{guest.id, guest.begun++}.text();
    if (guest.begun > 1 && any(3) == 0) {
      const std::size_t cut = any(static_cast<std::uint32_t>(text.size()));
      const std::size_t last = text.rfind('\n', text.size() - 2);
      const std::size_t least = last == text.npos ? 0 : last + 1;
      guest.piece = text.substr(std::max(cut, least));
      text.resize(std::max(cut, least));
    }
    guest.peer->say(text);
  }

  // What some of them do next. Nobody speaks while much is under way.
  void act() {
    const bool quiet = begun_ < guests_.at(observer_).heard.size() + 3000;
    if (here_.size() < most_guests && any(4) == 0) arrive();
    for (int i = 0; i < 4 && !here_.empty(); ++i) {
      const std::size_t place = any(static_cast<std::uint32_t>(here_.size()));
      Guest& guest = guests_.at(here_[place]);
      const std::uint32_t what = any(1000);
      if (what < 600) {
        if (quiet) say(guest, 1 + any(8));
      } else if (what < 650) {
        if (quiet) say(guest, 300);
      } else if (what < 700) {
        guest.peer->reads = false;
        guest.deaf_until = Clock::now() + std::chrono::milliseconds(any(400));
      } else if (what < 750) {
        guest.peer->portion = any(4) == 0 ? 1 + any(50) : 1 + any(100'000);
      } else if (what < 765) {
        end(place, Fate::half_closed);
      } else if (what < 775) {
        end(place, Fate::gone);
      }
    }
    for (const std::uint32_t id : here_) {
      Guest& guest = guests_.at(id);
      if (!guest.peer->reads && Clock::now() > guest.deaf_until)
        guest.peer->reads = true;
    }
  }

  void end(std::size_t place, Fate fate) {
    Guest& guest = guests_.at(here_[place]);
    // A close may be a FIN, and then half a line would count as a whole one. On
    // a Unix socket it always may.
    const bool between_lines = guest.piece.empty() && guest.peer->unsent() == 0;
    if (!between_lines && room_.first_line().find("unix:") != std::string::npos)
      fate = Fate::half_closed;
    here_.erase(here_.begin() + static_cast<std::ptrdiff_t>(place));
    guest.fate = fate;
    if (fate == Fate::half_closed) {
      // Without the newline, which the server has to add.
      if (guest.piece.empty())
        guest.piece = Said{guest.id, guest.begun++}.text();
      guest.piece.pop_back();
      guest.peer->say(std::exchange(guest.piece, {}));
      guest.peer->finish();
      guest.peer->reads = true;
      guest.peer->portion = 262144;
      ending_.push_back(guest.id);
      return;
    }
    take_in(guest);
    if (between_lines && any(2) == 0)
      guest.peer->leave();
    else
      guest.peer->reset();
    room_.forget(*std::exchange(guest.peer, nullptr));
  }

  void take_in(Guest& guest) {
    const std::string heard = std::exchange(guest.peer->inbox, {});
    for (const std::string_view line : lines_of(heard)) {
      guest.half_heard += line;
      if (!guest.half_heard.ends_with('\n')) continue;
      guest.heard.push_back(Said::parse(std::exchange(guest.half_heard, {})));
      guest.heard_last = guest.heard_last || guest.heard.back() == last_;
    }
  }

  void listen() {
    for (const std::uint32_t id : here_) {
      Guest& guest = guests_.at(id);
      take_in(guest);
      expect(!guest.peer->ended(), "who is here stays connected",
             room_.describe_peer(*guest.peer) + "\n" + room_.server().error());
    }
    take_in(guests_.at(observer_));
    std::erase_if(ending_, [&](std::uint32_t id) {
      Guest& guest = guests_.at(id);
      take_in(guest);
      if (!guest.peer->ended()) return false;
      room_.expect_end_of_stream(*guest.peer);
      room_.forget(*std::exchange(guest.peer, nullptr));
      return true;
    });
  }

  // All end their lines and read; then everybody has to hear a last one.
  void settle() {
    step("all read, and end what they were saying");
    for (const std::uint32_t id : here_) {
      Guest& guest = guests_.at(id);
      guest.peer->reads = true;
      guest.peer->portion = 262144;
      guest.peer->say(std::exchange(guest.piece, {}));
    }
    std::map<std::uint32_t, std::uint32_t> heard_of;
    std::size_t counted = 0;
    room_.wait(
        [&] {
          listen();
          const auto& all = guests_.at(observer_).heard;
          for (; counted < all.size(); ++counted)
            ++heard_of[all[counted].guest];
          return ending_.empty() &&
                 std::ranges::all_of(here_, [&](std::uint32_t id) {
                   return heard_of[id] == guests_.at(id).begun;
                 });
        },
        "all that was said reaches the observer, and who half-closed has "
        "ended");
    step("one more comes and says a line");
    last_ = {arrive(), 0};
    // Its first line may have been cut.
    Guest& speaker = guests_.at(last_.guest);
    speaker.peer->say(std::exchange(speaker.piece, {}));
    room_.wait(
        [&] {
          listen();
          return std::ranges::all_of(guests_, [&](const auto& entry) {
            const Guest& guest = entry.second;
            return guest.peer == nullptr || guest.id == last_.guest ||
                   guest.heard_last;
          });
        },
        "the last line reaches everybody who is here");
  }

  void judge() const {
    const std::vector<Said>& all = guests_.at(observer_).heard;
    std::map<Said, std::size_t> place;
    std::map<std::uint32_t, std::uint32_t> next;
    for (const Said& said : all) {
      expect_equal("the next line of guest " + std::to_string(said.guest),
                   said.number, next[said.guest]++);
      place[said] = place.size();
    }
    for (const auto& [id, guest] : guests_) {
      if (id == observer_) continue;
      if (guest.fate != Fate::gone)
        expect_equal("lines of guest " + std::to_string(id), next[id],
                     guest.begun);
      judge(guest, all, place);
    }
  }

  void judge(const Guest& guest, const std::vector<Said>& all,
             const std::map<Said, std::size_t>& place) const {
    const std::string who = "guest " + std::to_string(guest.id);
    const auto found = place.find(Said{guest.id, 0});
    // Who was gone before he was heard has nothing to expect.
    const std::size_t first_own =
        found == place.end() ? all.size() : found->second;
    std::size_t at = first_own;
    if (!guest.heard.empty()) at = std::min(at, place.at(guest.heard.front()));
    for (const Said& said : guest.heard) {
      if (!echoes_)
        while (at < all.size() && all[at].guest == guest.id) ++at;
      expect(at < all.size() && all[at] == said,
             who + " hears " +
                 (at < all.size() ? shown(all[at].text()) : "nothing more"),
             shown(said.text()));
      ++at;
    }
    if (guest.fate == Fate::gone) return;
    // What is left is his own at the most.
    const Said own_last{guest.id, guest.begun - 1};
    // What one who has reset said before may have come even later.
    const std::size_t end =
        place.at(guest.fate == Fate::here ? last_ : own_last);
    while (at < end && all[at].guest == guest.id) ++at;
    expect(at >= end, who + " hears all lines up to the end",
           at < end ? "not " + shown(all[at].text()) : "");
    expect(guest.fate == Fate::here || guest.half_heard.empty(),
           who + " hears whole lines", shown(guest.half_heard));
  }

  void leave() {
    step("all leave");
    for (const std::uint32_t id : here_) guests_.at(id).peer->leave();
    room_.wait_for_descriptors(room_.idle_descriptors() + 1);  // the observer
    end_decently(room_);
  }

  Room room_;
  bool echoes_;
  std::mt19937 random_;
  std::uint32_t next_id_ = 0;
  std::uint32_t observer_ = 0;
  std::size_t begun_ = 0;  // lines, by all of them
  std::map<std::uint32_t, Guest> guests_;
  std::vector<std::uint32_t> here_;    // who may still do something
  std::vector<std::uint32_t> ending_;  // who has half-closed
  Said last_{UINT32_MAX, 0};
};

void soak(Command command, const Command& options = {}) {
  const std::uint32_t seed = number_from("SOAK_SEED", std::random_device{}());
  const std::chrono::seconds duration(number_from("SOAK_SECONDS", 3));
  command.insert(command.end(), options.begin(), options.end());
  const bool echoes = std::ranges::find(options, "--echo") != options.end();
  INFO("SOAK_SEED=", seed);
  try {
    Party party(command, echoes, seed);
    party.hold(duration);
    MESSAGE(party.guests(), " guests, ", party.lines(), " lines");
    CHECK(party.guests() > 8);
    CHECK(party.lines() > 100);
  } catch (const Failure& failure) {
    FAIL_CHECK(failure_text(failure));
  }
}

const Command rat{EDGEWISE_RAT, "--port", "0", "--stall-timeout", "60"};

}  // namespace

TEST_SUITE_BEGIN("soak" * doctest::skip(!rat_is_built));

TEST_CASE("a room as it comes") { soak(rat); }

TEST_CASE("a room with an echo") { soak(rat, {"--echo"}); }

TEST_CASE("a room whose log is always full") {
  soak(rat,
       {"--high-water", "4000", "--max-backlog", "9000", "--max-line", "2000"});
}

TEST_CASE("a room on a Unix socket") {
  const TemporaryFolder folder;
  soak(
      {EDGEWISE_RAT, "--unix", folder.path("socket"), "--stall-timeout", "60"});
}

TEST_CASE("a room on a kernel that fails now and then") {
  const Command command = with_faults(
      "recv:short=20,recv:EINTR=5,recv:EAGAIN=5,send:short=20,"
      "send:EINTR=5,send:EAGAIN=5,send:ENOBUFS=5,accept:EINTR=20,"
      "accept:ECONNABORTED=10,accept:EMFILE=5,wait:EINTR=5",
      rat);
  soak(command, {"--high-water", "20000", "--max-backlog", "70000"});
}

TEST_SUITE_END();
