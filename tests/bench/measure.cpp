// measure: what a server costs under a load, for tests/bench/run.
//
//   measure load SERVER_CPU LOAD_CPU SERVER... -- LOAD...
//   measure idle COUNT SERVER...
//   measure connect COUNT SERVER...
//
// Starts the server, on the one processor, and waits for a first line that ends
// with its port. Then `load` runs the load on the other one, with {port}
// replaced, which has to be crowd --json, and prints, with tabs between:
//
//   deliveries, server's ns of processor time, p50 and p99 latency in ns,
//   the server's peak of resident memory in KiB
//
// `idle` connects so many clients that say nothing, and prints by how many
// bytes the server's resident memory has grown for each of them; `connect`, how
// many ns of processor time the server took for all of them. Exit code 1: the
// server or the load has failed, and no figure counts.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using Command = std::vector<std::string>;

[[noreturn]] void die(const std::string& what) {
  std::fprintf(stderr, "measure: %s\n", what.c_str());
  std::exit(1);
}

void pin(int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(static_cast<std::size_t>(processor), &set);
  // One that is not there: then it is not pinned.
  static_cast<void>(::sched_setaffinity(0, sizeof set, &set));
}

// A child whose standard output can be read.
struct Process {
  pid_t pid = -1;
  int output = -1;

  Process(const Command& command, int processor) {
    std::array<int, 2> ends{};
    if (::pipe(ends.data()) != 0) die("cannot make a pipe");
    pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (processor >= 0) pin(processor);
      ::dup2(ends[1], STDOUT_FILENO);
      ::close(ends[0]);
      ::close(ends[1]);
      std::vector<char*> arguments;
      for (const std::string& word : command)
        arguments.push_back(const_cast<char*>(word.c_str()));
      arguments.push_back(nullptr);
      ::execvp(arguments[0], arguments.data());
      std::_Exit(127);
    }
    ::close(ends[1]);
    output = ends[0];
  }

  // Until `stop` says so, or the end.
  template <class Stop>
  std::string read_until(Stop stop) const {
    std::string text;
    std::array<char, 65536> part;
    pollfd waiting{output, POLLIN, 0};
    while (!stop(text)) {
      if (::poll(&waiting, 1, 180'000) != 1) die("nothing for three minutes");
      const ssize_t count = ::read(output, part.data(), part.size());
      if (count <= 0) break;
      text.append(part.data(), static_cast<std::size_t>(count));
    }
    return text;
  }

  int port() const {
    const std::string line = read_until(
        [](const std::string& text) { return text.ends_with('\n'); });
    const auto digits = line.find_last_not_of("0123456789\n") + 1;
    const int number = std::atoi(line.c_str() + digits);
    if (number == 0) die("no port in the server's first line: " + line);
    return number;
  }

  long memory(const std::string& name) const {  // in KiB
    std::ifstream status("/proc/" + std::to_string(pid) + "/status");
    for (std::string line; std::getline(status, line);)
      if (line.starts_with(name)) return std::atol(line.c_str() + name.size());
    die("the server is gone");
  }

  // In ns, when it does nothing any more. (The kernel counts what has run up to
  // its last tick, or up to the last sleep.)
  long long cpu_time() const {
    for (long long before = -1;;) {
      std::ifstream statistics("/proc/" + std::to_string(pid) + "/schedstat");
      long long time = 0;
      statistics >> time;
      if (time == std::exchange(before, time)) return time;
      ::poll(nullptr, 0, 50);
    }
  }
};

long long number_in(const std::string& json, const std::string& name) {
  const auto place = json.find('"' + name + "\":");
  if (place == json.npos) die("the load printed no " + name + ": " + json);
  return std::atoll(json.c_str() + place + name.size() + 3);
}

void measure_load(int server_cpu, int load_cpu, const Command& server_command,
                  Command load_command) {
  const Process server(server_command, server_cpu);
  const std::string port = std::to_string(server.port());
  for (std::string& word : load_command)
    if (word == "{port}") word = port;
  const Process load(load_command, load_cpu);
  const std::string json =
      load.read_until([](const std::string&) { return false; });
  int status = 0;
  ::waitpid(load.pid, &status, 0);
  if (status != 0) die("the load failed: " + json);
  const long peak = server.memory("VmHWM:");
  ::kill(server.pid, SIGKILL);
  rusage used{};
  ::wait4(server.pid, &status, 0, &used);
  const auto ns = [](const timeval& time) {
    return 1'000'000'000LL * time.tv_sec + 1000LL * time.tv_usec;
  };
  std::printf("%lld\t%lld\t%lld\t%lld\t%ld\n", number_in(json, "deliveries"),
              ns(used.ru_utime) + ns(used.ru_stime),
              number_in(json, "latency_p50_ns"),
              number_in(json, "latency_p99_ns"), peak);
}

// A server and clients that say nothing.
class Idlers {
 public:
  explicit Idlers(const Command& server_command) : server(server_command, -1) {
    address_.sin_family = AF_INET;
    address_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address_.sin_port = htons(static_cast<std::uint16_t>(server.port()));
    first_ = connect_one();
    settle(connect_one());
  }
  Idlers(const Idlers&) = delete;
  Idlers& operator=(const Idlers&) = delete;
  ~Idlers() { ::kill(server.pid, SIGKILL); }

  // Until the server has accepted all of them.
  void connect(int count) const {
    for (int i = 1; i < count; ++i) connect_one();
    settle(connect_one());
  }

  const Process server;

 private:
  int connect_one() const {
    const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
    if (::connect(fd, reinterpret_cast<const sockaddr*>(&address_),
                  sizeof address_) != 0)
      die(std::string("cannot connect: ") + std::strerror(errno));
    return fd;
  }

  // What the last one says shows that all who came before have been accepted.
  void settle(int last) const {
    char byte = 0;
    pollfd waiting{first_, POLLIN, 0};
    if (::send(last, "\n", 1, MSG_NOSIGNAL) != 1 ||
        ::poll(&waiting, 1, 60'000) != 1 || ::recv(first_, &byte, 1, 0) != 1)
      die("the server does not pass a line on");
  }

  sockaddr_in address_{};
  int first_ = -1;
};

void measure_idle(int count, const Command& server_command) {
  const Idlers idlers(server_command);
  const long before = idlers.server.memory("VmRSS:");
  idlers.connect(count);
  const long after = idlers.server.memory("VmRSS:");
  std::printf("%.0f\n", 1024.0 * static_cast<double>(after - before) / count);
}

void measure_connect(int count, const Command& server_command) {
  const Idlers idlers(server_command);
  const long long before = idlers.server.cpu_time();
  idlers.connect(count);
  std::printf("%lld\n", idlers.server.cpu_time() - before);
}

}  // namespace

int main(int argc, char** argv) {
  ::signal(SIGPIPE, SIG_IGN);
  const Command words(argv + 1, argv + argc);
  const auto dashes = std::find(words.begin(), words.end(), "--");
  if (words.size() > 4 && words[0] == "load" && dashes != words.end()) {
    measure_load(std::atoi(words[1].c_str()), std::atoi(words[2].c_str()),
                 {words.begin() + 3, dashes}, {dashes + 1, words.end()});
  } else if (words.size() > 2 && words[0] == "idle") {
    measure_idle(std::atoi(words[1].c_str()), {words.begin() + 2, words.end()});
  } else if (words.size() > 2 && words[0] == "connect") {
    measure_connect(std::atoi(words[1].c_str()),
                    {words.begin() + 2, words.end()});
  } else {
    die("see its first lines for its arguments");
  }
}
