// A library for LD_PRELOAD that makes system calls fail now and then, as a busy
// or exhausted kernel would: what a test cannot bring about otherwise.
//
//   FAULTS=recv:short=50,send:EINTR=20,watch:ENOSPC=60 LD_PRELOAD=... PROGRAM
//
// Each entry is CALL:FAULT=PERCENT. CALL is recv (and read, from a socket),
// send (and sendmsg), accept, watch (EPOLL_CTL_ADD of a client) or wait. FAULT
// is `short`, for a part of the bytes only, or an error's name. The sequence is
// always the same.
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <string>

namespace {

unsigned random_percent() {
  static std::uint32_t state = 12345;
  state = state * 1103515245 + 12345;
  return (state >> 16) % 100;
}

bool happens(const std::string& call, const std::string& fault) {
  static const std::string faults =
      ',' + std::string(std::getenv("FAULTS") != nullptr ? std::getenv("FAULTS")
                                                         : "");
  const std::string key = ',' + call + ':' + fault + '=';
  const auto place = faults.find(key);
  return place != faults.npos &&
         random_percent() <
             std::strtoul(faults.c_str() + place + key.size(), nullptr, 10);
}

// Sets errno, or returns false.
bool fails(const std::string& call) {
  struct Error {
    const char* name;
    int number;
  };
  constexpr Error errors[] = {
      {"EINTR", EINTR},   {"EAGAIN", EAGAIN}, {"ENOBUFS", ENOBUFS},
      {"ENOMEM", ENOMEM}, {"EMFILE", EMFILE}, {"ECONNABORTED", ECONNABORTED},
      {"ENOSPC", ENOSPC}};
  for (const Error& error : errors) {
    if (!happens(call, error.name)) continue;
    errno = error.number;
    return true;
  }
  return false;
}

// At least one byte, and often few.
std::size_t cut(const std::string& call, std::size_t size) {
  if (size < 2 || !happens(call, "short")) return size;
  return 1 + (random_percent() * 37) % std::min<std::size_t>(size, 3000);
}

bool is_socket(int fd) {
  int type = 0;
  ::socklen_t length = sizeof type;
  const int before = errno;
  const bool yes = ::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &length) == 0;
  errno = before;
  return yes;
}

// A listener is not.
bool is_connected(int fd) {
  ::sockaddr_storage peer;
  ::socklen_t length = sizeof peer;
  const int before = errno;
  const bool yes =
      ::getpeername(fd, reinterpret_cast<::sockaddr*>(&peer), &length) == 0;
  errno = before;
  return yes;
}

}  // namespace

extern "C" {

::ssize_t recv(int fd, void* buffer, std::size_t size, int flags) {
  if (fails("recv")) return -1;
  return ::syscall(SYS_recvfrom, fd, buffer, cut("recv", size), flags, nullptr,
                   nullptr);
}

::ssize_t read(int fd, void* buffer, std::size_t size) {
  if (!is_socket(fd)) return ::syscall(SYS_read, fd, buffer, size);
  if (fails("recv")) return -1;
  return ::syscall(SYS_read, fd, buffer, cut("recv", size));
}

::ssize_t send(int fd, const void* buffer, std::size_t size, int flags) {
  if (fails("send")) return -1;
  return ::syscall(SYS_sendto, fd, buffer, cut("send", size), flags, nullptr,
                   0);
}

::ssize_t sendmsg(int fd, const ::msghdr* message, int flags) {
  if (fails("send")) return -1;
  if (message->msg_iovlen == 0 || !happens("send", "short"))
    return ::syscall(SYS_sendmsg, fd, message, flags);
  const ::iovec& first = message->msg_iov[0];
  return ::syscall(SYS_sendto, fd, first.iov_base, cut("send", first.iov_len),
                   flags, nullptr, 0);
}

int accept4(int fd, ::sockaddr* address, ::socklen_t* length, int flags) {
  if (fails("accept")) return -1;
  return static_cast<int>(::syscall(SYS_accept4, fd, address, length, flags));
}

int epoll_ctl(int epoll, int operation, int fd, ::epoll_event* event) noexcept {
  if (operation == EPOLL_CTL_ADD && is_connected(fd) && fails("watch"))
    return -1;
  return static_cast<int>(
      ::syscall(SYS_epoll_ctl, epoll, operation, fd, event));
}

int epoll_wait(int epoll, ::epoll_event* events, int most, int limit) {
  if (fails("wait")) return -1;
  return static_cast<int>(::syscall(SYS_epoll_pwait, epoll, events, most, limit,
                                    nullptr, std::size_t{8}));
}

}  // extern "C"
