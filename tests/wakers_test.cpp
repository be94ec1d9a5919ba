// Waker, Timer, Signals and Child: with real threads, signals and processes,
// and the monotonic clock. What a kernel does not do on demand, which is to
// interrupt a call that never waits, is made by interposing three calls.
#include <doctest/doctest.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <climits>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <optional>
#include <ratio>
#include <thread>
#include <type_traits>
#include <vector>

#include "support.hpp"

using namespace edgewise;
using namespace support;
using std::chrono::nanoseconds;

// ---------------------------------------------------------------------------
// The interposed calls
// ---------------------------------------------------------------------------

namespace spy {

// So many of this thread's next calls say that a signal has interrupted them.
thread_local int interruptions = 0;

bool interrupted() {
  if (interruptions == 0) return false;
  --interruptions;
  errno = EINTR;
  return true;
}

}  // namespace spy

extern "C" ::ssize_t read(int descriptor, void* room, std::size_t size) {
  static auto* const real =
      next_definition<::ssize_t(int, void*, std::size_t)>("read");
  return spy::interrupted() ? -1 : real(descriptor, room, size);
}

extern "C" ::ssize_t write(int descriptor, const void* bytes,
                           std::size_t size) {
  static auto* const real =
      next_definition<::ssize_t(int, const void*, std::size_t)>("write");
  return spy::interrupted() ? -1 : real(descriptor, bytes, size);
}

extern "C" int waitid(::idtype_t type, ::id_t id, ::siginfo_t* info,
                      int options) {
  static auto* const real =
      next_definition<int(::idtype_t, ::id_t, ::siginfo_t*, int)>("waitid");
  return spy::interrupted() ? -1 : real(type, id, info, options);
}

namespace {

constexpr Token any{1};

// Events that have come already, without waiting.
bool silent(Poller& poller) { return poller.wait(0ns).empty(); }

// Waits for one event and copies it.
Event one_event(Poller& poller) {
  const Events events = poller.wait(patience);
  REQUIRE(events.size() == 1);
  return events[0];
}

// A poller that watches one descriptor, as the section's essay adds them.
Poller watch(FdView fd, Mode mode = Mode::level) {
  Poller poller;
  poller.add(fd, any, Interest::readable, mode);
  return poller;
}

bool readable_now(FdView fd) {
  ::pollfd looking{fd.get(), POLLIN, 0};
  return ::poll(&looking, 1, 0) > 0;
}

// Waits, on a timer of its own, until at least so much time has gone by.
void let_pass(nanoseconds time) {
  Timer timer;
  timer.expire_after(time);
  REQUIRE(becomes_readable(timer));
}

// A process that lives until it is let go, and then does as it was told.
class Process {
 public:
  template <class Function>
  explicit Process(Function function) : pid_(::fork()) {
    REQUIRE(pid_ >= 0);
    if (pid_ == 0) live(function);
    leash_.far.reset();
    REQUIRE(becomes_readable(leash_.near));
  }
  Process() : Process([] { return 0; }) {}
  // By now a test has reaped it, unless that test failed.
  ~Process() {
    let_go();
    ::waitpid(pid_, nullptr, WNOHANG);
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  ::pid_t pid() const { return pid_; }
  void let_go() { leash_.near.reset(); }

 private:
  // doctest's own handlers would report a death as a failed test case. So say
  // first that they are gone.
  template <class Function>
  [[noreturn]] void live(Function function) {
    for (const int number : {SIGABRT, SIGTERM}) std::signal(number, SIG_DFL);
    ::alarm(60);
    leash_.near.reset();
    send_all(leash_.far, "a");
    static_cast<void>(becomes_readable(leash_.far));
    ::_exit(function());
  }

  Ends leash_ = make_socketpair();
  ::pid_t pid_;
};

// The status that waitpid(2) gives, once the process has ended.
int wait_for(::pid_t pid) {
  int status = -1;
  while (::waitpid(pid, &status, 0) < 0) REQUIRE(errno == EINTR);
  return status;
}

}  // namespace

// ---------------------------------------------------------------------------
// What the four have in common
// ---------------------------------------------------------------------------

template <class T>
constexpr bool only_moves =
    std::is_nothrow_move_constructible_v<T>&&
        std::is_nothrow_move_assignable_v<T> &&
    !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> &&
    std::is_convertible_v<const T&, FdView>;
static_assert(only_moves<Waker> && only_moves<Timer>);
static_assert(only_moves<Signals> && only_moves<Child>);

static_assert(noexcept(std::declval<const Waker&>().wake()));
static_assert(noexcept(std::declval<Waker&>().clear()));
static_assert(noexcept(std::declval<Timer&>().expire_after(patience)));
static_assert(noexcept(std::declval<Timer&>().expire_every(patience)));
static_assert(noexcept(std::declval<Timer&>().expire_at(Clock::now())));
static_assert(noexcept(std::declval<Timer&>().stop()));
static_assert(noexcept(std::declval<Timer&>().expirations()));
static_assert(noexcept(std::declval<Signals&>().next()));
static_assert(noexcept(std::declval<Child&>().reap()));
static_assert(noexcept(std::declval<Child&>().kill(SIGTERM)));

TEST_CASE("all four are closed on exec, and none waits when it is read") {
  const Waker waker;
  const Timer timer;
  const Signals none{};
  const Child self{::getpid()};
  for (const FdView fd : {FdView(waker), FdView(timer), FdView(none)}) {
    CHECK(is_close_on_exec(fd));
    CHECK(is_non_blocking(fd));
  }
  CHECK(is_close_on_exec(self));
}

TEST_CASE("each says by name that there is no descriptor for it") {
  const auto says = [](auto make) {
    const Thrown thrown = thrown_by([&] {
      const NoDescriptors none;
      make();
    });
    CHECK(thrown.error == EMFILE);
    return thrown.text;
  };
  CHECK(says([] { const Waker waker; }) ==
        "create a waker: Too many open files");
  CHECK(says([] { const Timer timer; }) ==
        "create a timer: Too many open files");
  CHECK(says([] { const Signals bell{SIGWINCH}; }) ==
        "watch signals: Too many open files");
  CHECK(says([] { const Child self{::getpid()}; }) ==
        "watch process " + std::to_string(::getpid()) +
            ": Too many open files");
}

TEST_CASE("they move, with what they stand for, and leave nothing behind") {
  Waker waker;
  const int number = FdView(waker).get();
  Poller poller = watch(waker);
  Waker moved{std::move(waker)};
  CHECK(FdView(moved).get() == number);
  CHECK(FdView(waker).get() == -1);
  waker.wake();
  CHECK_FALSE(waker.clear());
  CHECK(silent(poller));
  moved.wake();
  CHECK(one_event(poller).readable());
  waker = std::move(moved);
  CHECK(waker.clear());
  waker = Waker();
  CHECK_FALSE(is_open(number));

  Timer timer;
  timer.expire_after(0ns);
  Timer moved_timer{std::move(timer)};
  REQUIRE(becomes_readable(moved_timer));
  timer.expire_after(0ns);
  timer.stop();
  CHECK(timer.expirations() == 0);
  CHECK(moved_timer.expirations() == 1);

  Process process;
  Child child{process.pid()};
  Child moved_child{std::move(child)};
  CHECK(moved_child.pid() == process.pid());
  CHECK_FALSE(child.kill(0));
  CHECK_FALSE(child.reap());
  process.let_go();
  REQUIRE(becomes_readable(moved_child));
  CHECK(moved_child.reap());
}

TEST_CASE("P21 a call that a signal interrupts is made again") {
  Waker waker;
  spy::interruptions = 2;
  waker.wake();
  CHECK(readable_now(waker));
  spy::interruptions = 2;
  CHECK(waker.clear());

  Timer timer;
  timer.expire_after(0ns);
  REQUIRE(becomes_readable(timer));
  spy::interruptions = 2;
  CHECK(timer.expirations() == 1);

  Process process;
  Child child{process.pid()};
  process.let_go();
  REQUIRE(becomes_readable(child));
  spy::interruptions = 2;
  CHECK(child.reap());
  CHECK(spy::interruptions == 0);
}

// ---------------------------------------------------------------------------
// Waker
// ---------------------------------------------------------------------------

TEST_CASE("a waker is readable from a wake until it is cleared") {
  Waker waker;
  Poller poller = watch(waker);
  CHECK(silent(poller));
  CHECK_FALSE(waker.clear());
  for (int round = 0; round < 3; ++round) {
    waker.wake();
    for (int look = 0; look < 3; ++look) {
      CHECK(one_event(poller).token() == any);
      CHECK(one_event(poller).readable());
    }
    CHECK(waker.clear());
    CHECK(silent(poller));
    CHECK_FALSE(waker.clear());
  }
}

TEST_CASE("P22 any number of wakes before a clear are one event") {
  for (const Mode mode : {Mode::level, Mode::edge}) {
    CAPTURE(to_string(mode));
    Waker waker;
    Poller poller = watch(waker, mode);
    for (int count = 0; count < 1000; ++count) waker.wake();
    CHECK(one_event(poller).readable());
    CHECK(waker.clear());
    CHECK(silent(poller));
    CHECK_FALSE(waker.clear());
  }
}

TEST_CASE("P22 an edge-triggered waker reports each wake, cleared or not") {
  Waker waker;
  Poller poller = watch(waker, Mode::edge);
  for (int round = 0; round < 5; ++round) {
    waker.wake();
    CHECK(one_event(poller).readable());
    CHECK(silent(poller));
  }
  CHECK(waker.clear());
  waker.wake();
  CHECK(one_event(poller).readable());
}

namespace {

// No number of wakes gets there within a lifetime.
void fill_counter(const Waker& waker) {
  constexpr std::uint64_t most = UINT64_MAX - 1;
  REQUIRE(::eventfd_write(FdView(waker).get(), most) == 0);
  REQUIRE(::eventfd_write(FdView(waker).get(), 1) == -1);
  REQUIRE(errno == EAGAIN);
}

}  // namespace

TEST_CASE("P22 a waker whose counter is full is awake, and does not block") {
  for (const Mode mode : {Mode::level, Mode::edge}) {
    CAPTURE(to_string(mode));
    Waker waker;
    Poller poller = watch(waker, mode);
    fill_counter(waker);
    waker.wake();
    CHECK(one_event(poller).readable());
    CHECK(waker.clear());
    CHECK(silent(poller));
    waker.wake();
    CHECK(one_event(poller).readable());
  }
}

// A write that is refused is no edge. Whoever never clears would have to know,
// were there time for 2^64 wakes.
TEST_CASE("P22 a full counter goes on being reported by level, not by edge") {
  Waker waker;
  Poller level = watch(waker);
  Poller edge = watch(waker, Mode::edge);
  fill_counter(waker);
  CHECK(one_event(level).readable());
  CHECK(one_event(edge).readable());
  waker.wake();
  CHECK(one_event(level).readable());
  CHECK(silent(edge));
  CHECK(waker.clear());
  waker.wake();
  CHECK(one_event(edge).readable());
}

TEST_CASE("a waker ends a wait from another thread") {
  const Waker waker;
  Poller poller = watch(waker);
  std::thread other([&] { waker.wake(); });
  const std::size_t events = poller.wait(patience).size();
  other.join();
  CHECK(events == 1);
}

// What the comment shows: each step of a post may come between any two of the
// loop's, and nothing stays in the mailbox without an event for it.
TEST_CASE("clear first, then look: nothing that is put in goes unseen") {
  for (int step = 0; step < 4; ++step) {
    CAPTURE(step);
    Waker waker;
    Poller poller = watch(waker);
    int mailbox = 1;
    waker.wake();
    int seen = 0;
    const auto post_at = [&](int now) {
      if (now != step) return;
      ++mailbox;
      waker.wake();
    };
    post_at(0);
    REQUIRE(one_event(poller).readable());
    post_at(1);
    waker.clear();
    post_at(2);
    seen += std::exchange(mailbox, 0);
    post_at(3);
    if (mailbox != 0) CHECK(one_event(poller).readable());
    CHECK(seen + mailbox == 2);
  }
}

namespace {

// What signal handlers get at.
const Waker* handlers_waker = nullptr;
std::atomic<int> handled{0};

// Handles a signal, unblocked, for as long as this lives.
class Handler {
 public:
  Handler(int number, void (*handler)(int)) : number_(number) {
    handled = 0;
    struct sigaction action {};
    action.sa_handler = handler;
    REQUIRE(::sigaction(number, &action, &before_) == 0);
  }
  ~Handler() { ::sigaction(number_, &before_, nullptr); }
  Handler(const Handler&) = delete;
  Handler& operator=(const Handler&) = delete;

 private:
  int number_;
  struct sigaction before_ {};
};

void wake_in_handler(int) {
  handlers_waker->wake();
  ++handled;
}

}  // namespace

TEST_CASE("wake in a signal handler leaves the interrupted code its errno") {
  Waker waker;
  handlers_waker = &waker;
  waker.wake();  // the first one looks write up, which no handler may
  CHECK(waker.clear());
  const Handler handler{SIGUSR1, wake_in_handler};
  errno = ENOENT;
  std::raise(SIGUSR1);
  CHECK(errno == ENOENT);
  CHECK(handled == 1);
  CHECK(waker.clear());

  // Here the write fails.
  fill_counter(waker);
  errno = ENOENT;
  std::raise(SIGUSR1);
  CHECK(errno == ENOENT);
  CHECK(handled == 2);
}

TEST_CASE("wake in a signal handler ends the wait that the signal met") {
  Waker waker;
  handlers_waker = &waker;
  Poller poller = watch(waker);
  waker.wake();
  CHECK(waker.clear());
  const Handler handler{SIGALRM, wake_in_handler};
  const ::itimerval soon{{0, 0}, {0, 5000}};
  REQUIRE(::setitimer(ITIMER_REAL, &soon, nullptr) == 0);
  CHECK(one_event(poller).readable());
  CHECK(handled == 1);
}

// ---------------------------------------------------------------------------
// Timer
// ---------------------------------------------------------------------------

namespace {

nanoseconds duration_of(const ::timespec& time) {
  return std::chrono::seconds{time.tv_sec} + nanoseconds{time.tv_nsec};
}

// What the kernel has noted: zero where a timer is stopped, or tells once.
struct Setting {
  nanoseconds left;
  nanoseconds period;
};

Setting setting_of(const Timer& timer) {
  ::itimerspec times{};
  REQUIRE(::timerfd_gettime(FdView(timer).get(), &times) == 0);
  return {duration_of(times.it_value), duration_of(times.it_interval)};
}

constexpr nanoseconds century = std::chrono::hours{24} * 36525;
// Where time_t has 32 bits, it ends sooner.
constexpr nanoseconds longest = std::chrono::seconds{std::min<std::int64_t>(
    std::numeric_limits<::time_t>::max(), century / std::chrono::seconds{1})};

}  // namespace

TEST_CASE("a new timer is not running") {
  Timer timer;
  Poller poller = watch(timer);
  CHECK(silent(poller));
  CHECK(timer.expirations() == 0);
  CHECK(setting_of(timer).left == 0ns);
}

TEST_CASE("a timer is readable when time is up, until it is asked, and once") {
  Timer timer;
  Poller poller = watch(timer);
  timer.expire_after(1ms);
  for (int look = 0; look < 3; ++look) CHECK(one_event(poller).readable());
  CHECK(timer.expirations() == 1);
  CHECK(timer.expirations() == 0);
  let_pass(5ms);
  CHECK(silent(poller));
  CHECK(setting_of(timer).left == 0ns);
}

TEST_CASE("P26 a timer is never early") {
  Timer timer;
  Poller poller = watch(timer);
  for (const nanoseconds delay : {1ns, 999ns, 300'000ns, 1'000'001ns,
                                  nanoseconds{2ms}, nanoseconds{7ms}}) {
    CAPTURE(delay.count());
    for (int turn = 0; turn < 10; ++turn) {
      auto start = Clock::now();
      timer.expire_after(delay);
      REQUIRE(one_event(poller).readable());
      CHECK(Clock::now() - start >= delay);
      CHECK(timer.expirations() == 1);

      start = Clock::now();
      timer.expire_at(start + delay);
      REQUIRE(one_event(poller).readable());
      CHECK(Clock::now() - start >= delay);
      CHECK(timer.expirations() == 1);

      start = Clock::now();
      timer.expire_every(delay);
      REQUIRE(one_event(poller).readable());
      CHECK(Clock::now() - start >= delay);
      CHECK(timer.expirations() >= 1);
    }
  }
}

TEST_CASE("a time of any unit is taken, and rounded up to a nanosecond") {
  Timer timer;
  const auto period = [&](auto time) {
    timer.expire_every(time);
    return setting_of(timer).period;
  };
  CHECK(period(std::chrono::duration<std::int64_t, std::pico>{1}) == 1ns);
  CHECK(period(std::chrono::duration<int, std::pico>{1500}) == 2ns);
  CHECK(period(std::chrono::duration<double>{0.25}) == 250ms);
  CHECK(period(std::chrono::duration<float, std::milli>{0.5F}) == 500us);
  CHECK(period(std::chrono::duration<unsigned>{3}) == 3s);
  CHECK(period(std::chrono::hours{24}) == 24h);
  CHECK(period(1'999'999'999ns) == 1'999'999'999ns);
}

TEST_CASE("P26 zero, negative and past times are up at once, not never") {
  Timer timer;
  Poller poller = watch(timer);
  const auto is_up = [&] {
    REQUIRE(one_event(poller).readable());
    return timer.expirations();
  };
  for (const nanoseconds time :
       {0ns, -1ns, nanoseconds{-1h}, nanoseconds::min(), -2 * century / 3}) {
    CAPTURE(time.count());
    timer.expire_after(time);
    CHECK(is_up() == 1);
    CHECK(silent(poller));
    timer.expire_every(time);
    CHECK(is_up() >= 1);
    CHECK(is_up() >= 1);
    CHECK(setting_of(timer).period == 1ns);
  }
  timer.expire_after(std::chrono::hours::min());
  CHECK(is_up() == 1);
  for (const Clock::time_point deadline :
       {Clock::now(), Clock::now() - 1h, Clock::time_point{},
        Clock::time_point{} - 1ns, Clock::time_point::min()}) {
    CAPTURE(deadline.time_since_epoch().count());
    timer.expire_at(deadline);
    CHECK(is_up() == 1);
    CHECK(silent(poller));
  }
}

TEST_CASE("more than a century counts as a century, and overflows nowhere") {
  Timer timer;
  const auto is_a_century = [&](auto time) {
    CAPTURE(std::chrono::duration<double>(time).count());
    timer.expire_after(time);
    Setting setting = setting_of(timer);
    CHECK(setting.left <= longest);
    CHECK(setting.left > longest - 1h);
    CHECK(setting.period == 0ns);
    timer.expire_every(time);
    setting = setting_of(timer);
    CHECK(setting.left > longest - 1h);
    CHECK(setting.period == longest);
    CHECK_FALSE(readable_now(timer));
    CHECK(timer.expirations() == 0);
  };
  is_a_century(std::chrono::milliseconds::max());
  is_a_century(nanoseconds::max());
  is_a_century(std::chrono::seconds::max());
  is_a_century(std::chrono::hours::max());
  is_a_century(std::chrono::duration<double>{1e300});
  is_a_century(century);
  is_a_century(century + 1s);

  timer.expire_at(Clock::time_point::max());
  CHECK(setting_of(timer).left >
        longest - 1h - Clock::now().time_since_epoch());
  CHECK_FALSE(readable_now(timer));
}

TEST_CASE("expire_at keeps to the clock's time, not to a delay from now") {
  Timer timer;
  const auto deadline = Clock::now() + 1h;
  timer.expire_at(deadline);
  const nanoseconds left = setting_of(timer).left;
  CHECK(left <= 1h);
  CHECK(left >= deadline - Clock::now());
  CHECK(setting_of(timer).period == 0ns);
  CHECK_FALSE(readable_now(timer));
}

TEST_CASE("a period comes again and again, and never early") {
  constexpr auto period = 2ms;
  Timer timer;
  Poller poller = watch(timer);
  const auto start = Clock::now();
  timer.expire_every(period);
  std::uint64_t total = 0;
  while (total < 10) {
    REQUIRE(one_event(poller).readable());
    const std::uint64_t count = timer.expirations();
    REQUIRE(count >= 1);
    total += count;
    CHECK(Clock::now() - start >= total * period);
  }
}

TEST_CASE("P26 a loop that was busy is told how many periods it missed") {
  constexpr auto period = 1ms;
  Timer timer;
  const auto before = Clock::now();
  timer.expire_every(period);
  const auto set = Clock::now();
  let_pass(20ms);
  const auto at_least = (Clock::now() - set) / period;
  const auto missed = static_cast<std::int64_t>(timer.expirations());
  const auto at_most = (Clock::now() - before) / period;
  CHECK(missed >= 20);
  CHECK(missed >= at_least);
  CHECK(missed <= at_most);
}

TEST_CASE("a stopped timer tells nothing, not even what came before") {
  Timer timer;
  timer.expire_after(0ns);
  REQUIRE(becomes_readable(timer));
  timer.stop();
  CHECK_FALSE(readable_now(timer));
  CHECK(timer.expirations() == 0);

  timer.expire_every(1ms);
  timer.stop();
  let_pass(5ms);
  CHECK_FALSE(readable_now(timer));
  CHECK(timer.expirations() == 0);
  CHECK(setting_of(timer).left == 0ns);
  CHECK(setting_of(timer).period == 0ns);

  timer.expire_after(1ms);
  CHECK(becomes_readable(timer));
}

TEST_CASE("each setting of a timer replaces the one before") {
  Timer timer;
  timer.expire_after(1ms);
  timer.expire_after(1h);
  let_pass(5ms);
  CHECK_FALSE(readable_now(timer));
  CHECK(setting_of(timer).left > 50min);

  timer.expire_every(1h);
  CHECK(setting_of(timer).period == 1h);
  timer.expire_after(1ms);
  CHECK(setting_of(timer).period == 0ns);
  CHECK(becomes_readable(timer));

  // This time has been up, and is forgotten all the same.
  timer.expire_at(Clock::now() + 1h);
  CHECK_FALSE(readable_now(timer));
  CHECK(timer.expirations() == 0);
}

// ---------------------------------------------------------------------------
// Signals
// ---------------------------------------------------------------------------

namespace {

// Puts the thread's signal mask back when it goes. What is pending by then is
// swallowed, lest it kill this process.
class MaskKept {
 public:
  MaskKept() { REQUIRE(::pthread_sigmask(SIG_SETMASK, nullptr, &mask_) == 0); }
  ~MaskKept() {
    ::sigset_t all;
    ::sigfillset(&all);
    constexpr ::timespec now{};
    while (::sigtimedwait(&all, nullptr, &now) > 0) continue;
    ::pthread_sigmask(SIG_SETMASK, &mask_, nullptr);
  }
  MaskKept(const MaskKept&) = delete;
  MaskKept& operator=(const MaskKept&) = delete;

 private:
  ::sigset_t mask_{};
};

bool is_blocked(int number) {
  ::sigset_t mask;
  ::sigemptyset(&mask);
  ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  return ::sigismember(&mask, number) == 1;
}

bool is_pending(int number) {
  ::sigset_t pending;
  ::sigpending(&pending);
  return ::sigismember(&pending, number) == 1;
}

void send_to_self(int number) { REQUIRE(::kill(::getpid(), number) == 0); }

}  // namespace

TEST_CASE("a signal is something to read, with its number and its sender") {
  const MaskKept kept;
  Signals signals{SIGUSR1, SIGTERM};
  Poller poller = watch(signals);
  CHECK(silent(poller));
  CHECK_FALSE(signals.next());

  send_to_self(SIGUSR1);
  for (int look = 0; look < 2; ++look) CHECK(one_event(poller).readable());
  std::optional<::signalfd_siginfo> info = signals.next();
  REQUIRE(info);
  CHECK(info->ssi_signo == SIGUSR1);
  CHECK(info->ssi_pid == static_cast<std::uint32_t>(::getpid()));
  CHECK_FALSE(signals.next());
  CHECK(silent(poller));

  Process sender([] { return ::kill(::getppid(), SIGTERM); });
  sender.let_go();
  CHECK(one_event(poller).readable());
  info = signals.next();
  REQUIRE(info);
  CHECK(info->ssi_signo == SIGTERM);
  CHECK(info->ssi_pid == static_cast<std::uint32_t>(sender.pid()));
  CHECK_FALSE(signals.next());
  CHECK(wait_for(sender.pid()) == 0);
}

TEST_CASE("signals of several numbers all come out, and no others") {
  const MaskKept kept;
  Signals signals{SIGUSR1, SIGUSR2};
  const Signals other{SIGWINCH};
  for (const int number : {SIGUSR2, SIGWINCH, SIGUSR1}) send_to_self(number);
  bool first = false;
  bool second = false;
  while (const auto info = signals.next()) {
    first |= info->ssi_signo == SIGUSR1;
    second |= info->ssi_signo == SIGUSR2;
    CHECK(info->ssi_signo != SIGWINCH);
  }
  CHECK(first);
  CHECK(second);
  CHECK(readable_now(other));
}

TEST_CASE("P27 signals of the same number that come before a look are one") {
  const MaskKept kept;
  Signals signals{SIGUSR1};
  Poller poller = watch(signals);
  for (int count = 0; count < 3; ++count) send_to_self(SIGUSR1);
  CHECK(one_event(poller).readable());
  CHECK(signals.next());
  CHECK_FALSE(signals.next());
  CHECK(silent(poller));
}

TEST_CASE("P27 real-time signals queue, and come out one by one") {
  const MaskKept kept;
  Signals signals{SIGRTMIN};
  for (int count = 0; count < 3; ++count)
    REQUIRE(::sigqueue(::getpid(), SIGRTMIN, ::sigval{.sival_int = count}) ==
            0);
  for (int count = 0; count < 3; ++count) {
    const auto info = signals.next();
    REQUIRE(info);
    CHECK(info->ssi_int == count);
  }
  CHECK_FALSE(signals.next());
}

TEST_CASE("signals are blocked here, and in threads and processes to come") {
  const MaskKept kept;
  REQUIRE_FALSE(is_blocked(SIGUSR1));
  const Signals signals{SIGUSR1};
  CHECK(is_blocked(SIGUSR1));
  CHECK_FALSE(is_blocked(SIGUSR2));

  bool blocked = false;
  std::thread([&] { blocked = is_blocked(SIGUSR1); }).join();
  CHECK(blocked);
  CHECK(run_in_child([] { return is_blocked(SIGUSR1) ? 0 : 1; }) == 0);

  // So it is in a program that is executed: the mask's bit 9 is SIGUSR1's.
  CHECK(run_in_child([] {
          ::execlp("grep", "grep", "-q", "^SigBlk:.*[2367abef]..$",
                   "/proc/self/status", nullptr);
          return 98;
        }) == 0);
}

TEST_CASE("P27 a thread that was started before takes the signal itself") {
  const MaskKept kept;
  const Handler handler{SIGUSR1, [](int) { ++handled; }};
  std::thread early([] {
    const auto limit = Clock::now() + patience;
    while (handled == 0 && Clock::now() < limit)
      std::this_thread::sleep_for(1ms);
  });
  Signals signals{SIGUSR1};
  send_to_self(SIGUSR1);
  early.join();
  CHECK(handled == 1);
  CHECK_FALSE(signals.next());
}

TEST_CASE("signals stay blocked when their Signals is gone, and can be had") {
  const MaskKept kept;
  { const Signals signals{SIGTERM}; }
  CHECK(is_blocked(SIGTERM));
  send_to_self(SIGTERM);  // or this would be the end
  CHECK(is_pending(SIGTERM));
  Signals again{SIGTERM};
  CHECK(readable_now(again));
  const auto info = again.next();
  REQUIRE(info);
  CHECK(info->ssi_signo == SIGTERM);
}

TEST_CASE("a Signals moves, with what has come") {
  const MaskKept kept;
  Signals signals{SIGUSR1};
  Poller poller = watch(signals);
  send_to_self(SIGUSR1);
  Signals moved{std::move(signals)};
  CHECK_FALSE(signals.next());
  CHECK(one_event(poller).readable());
  CHECK(moved.next());
  CHECK(silent(poller));
}

TEST_CASE("P21 looking for a signal is repeated when a signal interrupts it") {
  const MaskKept kept;
  Signals signals{SIGUSR1};
  send_to_self(SIGUSR1);
  spy::interruptions = 2;
  CHECK(signals.next());
}

TEST_CASE("what cannot be watched is refused by number, and blocks nothing") {
  const MaskKept kept;
  for (const int number : {SIGKILL, SIGSTOP, 0, -1, SIGRTMAX + 1, INT_MAX}) {
    CAPTURE(number);
    const Thrown thrown = thrown_by([&] {
      const Signals signals{SIGUSR1, number, SIGUSR2};
    });
    CHECK(thrown.error == EINVAL);
    CHECK(thrown.text ==
          "watch signal " + std::to_string(number) + ": Invalid argument");
    CHECK_FALSE(is_blocked(SIGUSR1));
    CHECK_FALSE(is_blocked(SIGUSR2));
  }
  const Thrown thrown = thrown_by([] {
    const NoDescriptors none;
    const Signals signals{SIGUSR1};
  });
  CHECK(thrown.error == EMFILE);
  CHECK_FALSE(is_blocked(SIGUSR1));
}

TEST_CASE(
    "P27 a child is told nothing of its own signal by an inherited Poller, "
    "but by a Signals and a Poller of its own") {
  const MaskKept kept;
  Signals signals{SIGUSR1};
  Poller poller = watch(signals);
  const int code = run_in_child([&] {
    send_to_self(SIGUSR1);
    if (!silent(poller)) return 1;
    Signals own{SIGUSR1};
    Poller own_poller = watch(own);
    if (!one_event(own_poller).readable()) return 2;
    const auto info = own.next();
    if (!info) return 3;
    return info->ssi_pid == static_cast<std::uint32_t>(::getpid()) ? 0 : 4;
  });
  CHECK(code == 0);
  CHECK(silent(poller));
  CHECK_FALSE(signals.next());
  send_to_self(SIGUSR1);
  CHECK(one_event(poller).readable());
}

// Whether a signalfd is readable depends on who asks. What is not, to the one
// who waits, epoll strikes off its list of ready ones.
TEST_CASE("P27 a child that waits on an inherited Poller robs its parent") {
  const MaskKept kept;
  Signals signals{SIGUSR1};
  Poller poller = watch(signals);
  send_to_self(SIGUSR1);
  CHECK(run_in_child([&] { return silent(poller) ? 0 : 1; }) == 0);
  CHECK(silent(poller));
  CHECK(signals.next());
  send_to_self(SIGUSR1);
  CHECK(one_event(poller).readable());
}

// ---------------------------------------------------------------------------
// Child
// ---------------------------------------------------------------------------

TEST_CASE("an ExitStatus is ok with exit code 0 and no signal") {
  CHECK(ExitStatus{}.ok());
  CHECK(ExitStatus{0, 0}.ok());
  CHECK_FALSE(ExitStatus{1, 0}.ok());
  CHECK_FALSE(ExitStatus{0, SIGKILL}.ok());
}

TEST_CASE("a child is readable once it has ended, and reaped with its code") {
  for (const int code : {0, 7, 255}) {
    CAPTURE(code);
    Process process([code] { return code; });
    Child child{process.pid()};
    CHECK(child.pid() == process.pid());
    Poller poller = watch(child);
    CHECK(silent(poller));
    CHECK_FALSE(child.reap());

    process.let_go();
    CHECK(one_event(poller).readable());
    const std::optional<ExitStatus> status = child.reap();
    REQUIRE(status);
    CHECK(status->code == code);
    CHECK(status->signal == 0);
    CHECK(status->ok() == (code == 0));
    CHECK(::waitpid(child.pid(), nullptr, WNOHANG) == -1);
    CHECK(errno == ECHILD);
  }
}

TEST_CASE("a child that had ended before is readable from the beginning") {
  Process process([] { return 3; });
  process.let_go();
  ::siginfo_t info{};
  REQUIRE(::waitid(P_PID, static_cast<::id_t>(process.pid()), &info,
                   WEXITED | WNOWAIT) == 0);
  Child child{process.pid()};
  Poller poller = watch(child);
  CHECK(one_event(poller).readable());
  CHECK(child.reap()->code == 3);
}

TEST_CASE("a child that was killed is reaped with the signal") {
  for (const int number : {SIGKILL, SIGTERM, SIGUSR1}) {
    CAPTURE(number);
    Process process;
    Child child{process.pid()};
    CHECK(child.kill(number));
    REQUIRE(becomes_readable(child));
    const std::optional<ExitStatus> status = child.reap();
    REQUIRE(status);
    CHECK(status->signal == number);
    CHECK(status->code == 0);
    CHECK_FALSE(status->ok());
  }
}

TEST_CASE("a stopped child has not ended") {
  Process process;
  Child child{process.pid()};
  CHECK(child.kill(SIGSTOP));
  ::siginfo_t info{};
  REQUIRE(::waitid(P_PID, static_cast<::id_t>(process.pid()), &info,
                   WSTOPPED | WNOWAIT) == 0);
  CHECK_FALSE(readable_now(child));
  CHECK_FALSE(child.reap());
  CHECK(child.kill(SIGKILL));
  REQUIRE(becomes_readable(child));
  CHECK(child.reap()->signal == SIGKILL);
}

TEST_CASE("a child is reaped once, by whoever comes first") {
  Process process;
  Child child{process.pid()};
  Child same{process.pid()};
  process.let_go();
  REQUIRE(becomes_readable(child));
  CHECK(child.reap());
  CHECK_FALSE(child.reap());
  CHECK_FALSE(same.reap());

  Process other;
  Child late{other.pid()};
  other.let_go();
  CHECK(wait_for(other.pid()) == 0);
  CHECK(readable_now(late));
  CHECK_FALSE(late.reap());
}

// A program can inherit this from whoever started it.
TEST_CASE("where SIGCHLD is ignored, the kernel reaps first") {
  const Handler ignored{SIGCHLD, SIG_IGN};
  Process process;
  Child child{process.pid()};
  process.let_go();
  REQUIRE(becomes_readable(child));
  // It is readable a moment before it is gone, so ask until it is.
  const auto limit = Clock::now() + patience;
  while (child.kill(0) && Clock::now() < limit) std::this_thread::yield();
  CHECK_FALSE(child.kill(0));
  CHECK_FALSE(child.reap());
}

TEST_CASE("kill works until the process is reaped, on a zombie too") {
  Process process;
  Child child{process.pid()};
  CHECK(child.kill(0));
  process.let_go();
  REQUIRE(becomes_readable(child));
  CHECK(child.kill(SIGTERM));
  const std::optional<ExitStatus> status = child.reap();
  REQUIRE(status);
  CHECK(status->ok());
  CHECK_FALSE(child.kill(0));
  CHECK_FALSE(child.kill(SIGTERM));
}

TEST_CASE("kill is false for a process that is not ours to signal") {
  if (::geteuid() != 0) {
    MESSAGE("skipped: only root can become somebody else");
    return;
  }
  const int code = run_in_child([] {
    constexpr ::uid_t nobody = 65534;
    Child parent{::getppid()};
    if (!parent.kill(0)) return 1;
    if (::setuid(nobody) != 0) return 2;
    return parent.kill(0) ? 3 : 0;
  });
  CHECK(code == 0);
}

TEST_CASE("P28 a child is readable before and after it is reaped: remove it") {
  Process process;
  Child child{process.pid()};
  Poller poller = watch(child);
  process.let_go();
  for (int look = 0; look < 3; ++look)
    CHECK(one_event(poller).bits() == EPOLLIN);
  CHECK(child.reap());
  for (int look = 0; look < 3; ++look) {
    const Event event = one_event(poller);
    CHECK(event.readable());
    // Linux 6.9 and later say that the process is gone.
    CHECK((event.bits() & ~std::uint32_t{EPOLLHUP}) == EPOLLIN);
  }
  CHECK(poller.remove(child));
  CHECK(silent(poller));
}

TEST_CASE("a process that is not our child is watched, and never reaped") {
  Child self{::getpid()};
  CHECK_FALSE(self.reap());
  CHECK_FALSE(readable_now(self));

  // A grandchild, whose parent tells its number and reaps it.
  const Pipe leash = open_pipe();
  const auto report = make_pipe();
  Process parent([&] {
    Process grandchild([] { return 5; });
    const ::pid_t pid = grandchild.pid();
    if (::write(report.near.get(), &pid, sizeof pid) < 0) return 1;
    if (!becomes_readable(leash.reader)) return 2;
    grandchild.let_go();
    return WEXITSTATUS(wait_for(pid));
  });
  parent.let_go();
  REQUIRE(becomes_readable(report.far));
  ::pid_t pid = -1;
  REQUIRE(::read(report.far.get(), &pid, sizeof pid) == sizeof pid);
  Child grandchild{pid};
  Poller poller = watch(grandchild);
  CHECK(silent(poller));
  CHECK_FALSE(grandchild.reap());
  send_all(leash.writer, "go");
  CHECK(one_event(poller).readable());
  CHECK_FALSE(grandchild.reap());
  CHECK(WEXITSTATUS(wait_for(parent.pid())) == 5);
  CHECK_FALSE(grandchild.reap());
}

TEST_CASE("a process that does not exist is refused by number") {
  // Greater than any process number that Linux gives.
  Thrown thrown = thrown_by([] { const Child nobody{INT_MAX}; });
  CHECK(thrown.error == ESRCH);
  CHECK(thrown.text == "watch process 2147483647: No such process");
  // What a fork that failed has returned.
  thrown = thrown_by([] { const Child nobody{-1}; });
  CHECK(thrown.error == EINVAL);
  CHECK(thrown.text == "watch process -1: Invalid argument");

  Process process;
  process.let_go();
  REQUIRE(wait_for(process.pid()) == 0);
  thrown = thrown_by([&] { const Child gone{process.pid()}; });
  CHECK(thrown.error == ESRCH);
}

TEST_CASE("destroying a Child neither ends nor reaps the process") {
  Process process([] { return 9; });
  { const Child child{process.pid()}; }
  CHECK(::kill(process.pid(), 0) == 0);
  CHECK(::waitpid(process.pid(), nullptr, WNOHANG) == 0);
  process.let_go();
  {
    const Child child{process.pid()};
    REQUIRE(becomes_readable(child));
  }
  CHECK(WEXITSTATUS(wait_for(process.pid())) == 9);
}
