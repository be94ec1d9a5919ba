// What the peers of rat have in common, so that only their bases differ: lines
// are cut out of what a client sends and queued once for each other client, and
// each queue is written at most once in a turn of the loop.
#ifndef EDGEWISE_BENCH_ROOM_HPP
#define EDGEWISE_BENCH_ROOM_HPP

#include <cstddef>
#include <iostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

// What a peer's client adds its socket to.
struct Member {
  std::string half_line;
  std::string queue;
  std::size_t written = 0;  // of the queue
  std::size_t seat = 0;     // in the room
  bool waits = false;       // for its socket to have room: not to be flushed

  std::string_view unwritten() const {
    return std::string_view(queue).substr(written);
  }
  // Costs a copy of each byte once at the most, however small the steps.
  void consume(std::size_t count) {
    written += count;
    if (written * 2 < queue.size()) return;
    queue.erase(0, written);
    written = 0;
  }
};

template <class Client>  // derived from Member
class Room {
 public:
  void join(Client& client) {
    client.seat = members_.size();
    members_.push_back(&client);
  }

  void leave(Client& client) {
    members_[client.seat] = members_.back();
    members_[client.seat]->seat = client.seat;
    members_.pop_back();
  }

  // Queues all whole lines for everybody else.
  void hear(Client& speaker, std::string_view bytes) {
    const std::size_t end = bytes.rfind('\n') + 1;  // 0: there is none
    if (end == 0) {
      speaker.half_line += bytes;
      return;
    }
    if (!speaker.half_line.empty()) {
      say(speaker, speaker.half_line);
      speaker.half_line.clear();
    }
    for (std::string_view rest = bytes.substr(0, end); !rest.empty();) {
      const std::size_t length = rest.find('\n') + 1;
      say(speaker, rest.substr(0, length));
      rest.remove_prefix(length);
    }
    speaker.half_line = bytes.substr(end);
  }

  // Enough for one write: to queue more first would cost more, as it leaves the
  // cache. Only a base that reads on and on without a turn of the loop asks.
  bool has_enough_news() const { return news_ >= 131072; }

  // Calls write for each client who has something in its queue and does not
  // wait. It may let that client leave.
  template <class Write>
  void flush(Write write) {
    if (std::exchange(news_, 0) == 0) return;
    for (std::size_t i = members_.size(); i-- > 0;)
      if (!members_[i]->waits && !members_[i]->queue.empty())
        write(*members_[i]);
  }

 private:
  void say(const Client& speaker, std::string_view text) {
    news_ += text.size();
    for (Client* const member : members_)
      if (member != &speaker) member->queue += text;
  }

  std::vector<Client*> members_;
  std::size_t news_ = 0;  // bytes, since flush
};

inline void announce(int port) {
  std::cout << "listening on 127.0.0.1:" << port << std::endl;
}

#endif  // EDGEWISE_BENCH_ROOM_HPP
