// A BroadcastLog with peers that come, speak, read, lag, are closed and go,
// against one string for each peer.
#include <vector>

#include "fuzz.hpp"

using edgewise::BroadcastLog;
using fuzz::check;

namespace {

constexpr std::size_t most_peers = 6;

// One peer's part of the log, from its cursor on. A mark says of each byte
// whether it is the peer's own: '1', or '0' for somebody else's.
struct Queue {
  std::string bytes{};
  std::string marks{};
  std::size_t notes = 0;  // pieces of own bytes: counting them takes a while
  bool closed = false;
  std::size_t beyond = 0;  // bytes behind the end, from when it was closed on

  // What is beyond the end is noted as if it were own bytes, with those that
  // are just before it.
  void close() {
    if (std::exchange(closed, true) || bytes.empty()) return;
    if (marks.back() == '0') ++notes;
    const std::size_t end = marks.rfind('0') + 1;
    beyond = bytes.size() - end;
    bytes.resize(end);
    marks.resize(end);
  }

  void append(std::string_view more, bool own) {
    if (closed) {
      beyond += more.size();
      return;
    }
    if (own && bytes.empty()) return;  // the cursor steps over it at once
    if (own && needs_note()) ++notes;
    bytes += more;
    marks.append(more.size(), own ? '1' : '0');
  }

  std::string to_send() const {
    std::string others;
    for (std::size_t at = 0, end = 0; at < bytes.size(); at = end) {
      end =
          std::min(marks.find(marks[at] == '0' ? '1' : '0', at), marks.size());
      if (marks[at] == '0') others.append(bytes, at, end - at);
    }
    return others;
  }

  // So many bytes of others were sent, and own ones are stepped over.
  void sent(std::size_t count) {
    std::size_t at = 0;
    for (; at < marks.size() && (count > 0 || marks[at] == '1'); ++at) {
      if (marks[at] == '0') --count;
      if (marks[at] == '1' && marks[at - 1] == '0') --notes;
    }
    bytes.erase(0, at);
    marks.erase(0, at);
    if (closed && bytes.empty()) notes = 0;
  }

  bool needs_note() const {
    return !closed && !marks.empty() && marks.back() == '0';
  }
  // What the log has to keep for this peer's sake.
  std::size_t held() const { return bytes.empty() ? 0 : bytes.size() + beyond; }
};

struct Peer {
  BroadcastLog::Cursor cursor{};
  Queue queue{};
  fuzz::Connection connection{};
};

// What a note of own bytes counts for is the log's business: it is measured.
std::size_t cost_of_note() {
  BroadcastLog log(4096);
  const BroadcastLog::Cursor one = log.join();
  const BroadcastLog::Cursor other = log.join();
  check(log.append("from nobody") && log.append("from one", &one),
        "what fits is taken");
  return log.capacity() - log.size() - log.room();
}

class Comparison {
 public:
  explicit Comparison(std::size_t capacity)
      : capacity_(capacity), log_(capacity) {}

  void join() {
    if (peers_.size() == most_peers) return;
    peers_.emplace_back();
    peers_.back().cursor = log_.join();
  }

  // `who` is taken modulo the number of those that there are: for a sender the
  // peers, nullptr, and a cursor that is nobody's.
  void append(std::size_t count, std::size_t who) {
    static const std::size_t note = cost_of_note();
    const std::string_view bytes = text_.next(count);
    const BroadcastLog::Cursor nobody;
    who %= peers_.size() + 2;
    const BroadcastLog::Cursor* sender = nullptr;
    if (who < peers_.size()) sender = &peers_[who].cursor;
    if (who > peers_.size()) sender = &nobody;
    const bool notes = who < peers_.size() && peers_[who].queue.needs_note();
    const bool fits = bytes.size() + (notes ? note : 0) <= room();
    const bool taken = log_.append(bytes, sender);
    if (bytes.empty()) return;
    check(taken == fits, "append takes what fits, and nothing else");
    for (std::size_t at = 0; taken && at < peers_.size(); ++at)
      peers_[at].queue.append(bytes, at == who);
  }

  // As much as fits, and `more` bytes.
  void fill_up(std::size_t more, std::size_t who) {
    append(room() + more, who);
  }

  // Own and others' bytes in turn, so that there are many pieces.
  void alternate(std::size_t times, std::size_t who) {
    for (std::size_t time = 0; time < times; ++time)
      append(1 + time % 3, time % 2 == 0 ? who : peers_.size());
  }

  // As much goes in as goes out, so that the log goes round and round and, if
  // anything is in it already, is never empty.
  void roll(std::size_t times, std::size_t count) {
    for (std::size_t time = 0; time < times; ++time) {
      append(count, peers_.size());
      for (std::size_t who = 0; who < peers_.size(); ++who) {
        flush(who, count);
        while (receive(who, SIZE_MAX)) continue;
      }
    }
  }

  void flush(std::size_t who, std::size_t budget) {
    if (peers_.empty()) return;
    Peer& peer = peers_[who % peers_.size()];
    const edgewise::IoResult result =
        log_.flush(peer.connection.near(), peer.cursor, budget);
    const std::string queued = peer.queue.to_send();
    peer.queue.sent(peer.connection.flushed(result, queued, budget));
  }

  bool receive(std::size_t who, std::size_t most) {
    return !peers_.empty() &&
           peers_[who % peers_.size()].connection.receive(most);
  }
  void close_far(std::size_t who) {
    if (!peers_.empty()) peers_[who % peers_.size()].connection.close_far();
  }

  void close(std::size_t who) {
    if (peers_.empty()) return;
    Peer& peer = peers_[who % peers_.size()];
    peer.cursor.close();
    peer.queue.close();
  }

  void leave(std::size_t who) {
    if (peers_.empty()) return;
    const std::size_t place = who % peers_.size();
    peers_.erase(peers_.begin() + static_cast<std::ptrdiff_t>(place));
  }

  // The log finds out how full it is when it has to. So this is not called
  // after each step, lest the log know it always.
  void compare() {
    check(log_.size() == size(), "size is what the slowest peer waits for");
    check(log_.empty() == (size() == 0), "empty is no size");
    check(log_.room() == room(), "room is what size and notes leave");
    for (const Peer& peer : peers_)
      check(peer.cursor.behind() == peer.queue.bytes.size(),
            "behind is what lies ahead of the cursor");
  }

  void finish() {
    compare();
    for (std::size_t who = 0; who < peers_.size(); ++who) {
      const Peer& peer = peers_[who];
      while (peer.connection.open() && !peer.queue.bytes.empty()) {
        flush(who, SIZE_MAX);
        while (receive(who, SIZE_MAX)) continue;
      }
      while (receive(who, SIZE_MAX)) continue;
    }
    compare();
  }

 private:
  std::size_t size() const {
    std::size_t most = 0;
    for (const Peer& peer : peers_) most = std::max(most, peer.queue.held());
    return most;
  }
  std::size_t room() const {
    static const std::size_t note = cost_of_note();
    std::size_t taken = size();
    for (const Peer& peer : peers_) taken += note * peer.queue.notes;
    return taken < capacity_ ? capacity_ - taken : 0;
  }

  std::size_t capacity_;
  BroadcastLog log_;
  std::vector<Peer> peers_;
  fuzz::Text text_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data,
                                      std::size_t size) {
  fuzz::Input input(data, size);
  Comparison comparison(input.number(2) % 20'000);
  comparison.join();
  while (!input.empty()) {
    const std::size_t choice = input.byte();
    const std::size_t who = choice / 16;
    switch (choice % 16) {
      case 0: comparison.join(); break;
      case 1: comparison.leave(who); break;
      case 2:
      case 3: comparison.append(input.amount(), who); break;
      case 4: comparison.append(1 + input.byte() % 8, who); break;
      case 5: comparison.fill_up(input.byte() % 2, who); break;
      case 6: comparison.alternate(input.byte() % 64, who); break;
      case 7:
      case 8: comparison.flush(who, SIZE_MAX); break;
      case 9: comparison.flush(who, input.amount()); break;
      case 10: comparison.receive(who, input.amount()); break;
      case 11: comparison.receive(who, SIZE_MAX); break;
      case 12: comparison.compare(); break;
      case 13:
        if (const std::size_t rare = input.byte(); rare == 0)
          comparison.close_far(who);
        else if (rare % 8 == 1)
          comparison.close(who);
        break;
      case 14: comparison.flush(who, input.byte() % 32); break;
      case 15: comparison.roll(1 + who, input.amount() % 4096); break;
    }
  }
  comparison.finish();
  return 0;
}
