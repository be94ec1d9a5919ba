// The other of the two source files: see odr_one.cpp.
#include <edgewise.hpp>
#include <edgewise.hpp>  // twice is as good as once
#include <string>
#include <utility>

bool other_file_works();
const char* other_file_block();
const void* other_file_address_of_listen();

namespace {

bool sockets_work() {
  const edgewise::Fd listener =
      edgewise::listen(*edgewise::Address::from("127.0.0.1", 0));
  const edgewise::Connected client =
      edgewise::connect(edgewise::local_address(listener));
  edgewise::Poller poller{1};
  poller.add(listener, edgewise::Token{1}, edgewise::Interest::readable);
  if (client.failed() || poller.wait().size() != 1) return false;
  edgewise::Accepted accepted = edgewise::accept(listener);
  if (!accepted.ok()) return false;
  const edgewise::Fd socket = std::move(accepted.fd);

  edgewise::WriteBuffer output;
  if (!output.append("hello\n") || !output.flush(socket).ok()) return false;
  poller.set(client.fd, edgewise::Token{2}, edgewise::Interest::readable);
  if (poller.wait(std::chrono::seconds{5}).size() != 1) return false;
  edgewise::LineBuffer lines;
  return lines.fill(client.fd).ok() && lines.next() == "hello\n" &&
         !lines.next();
}

bool errors_work() {
  edgewise::Poller poller;
  if (!poller.try_add(edgewise::FdView{-1}, edgewise::Token{1},
                      edgewise::Interest::readable))
    return false;
  return edgewise::detail::classify_accept_error(EMFILE) ==
             edgewise::AcceptStatus::exhausted &&
         edgewise::write(edgewise::FdView{-1}, "a").error == EBADF &&
         edgewise::Address().to_string() == "unspecified";
}

}  // namespace

bool other_file_works() { return sockets_work() && errors_work(); }

const char* other_file_block() {
  edgewise::LineBuffer lines;
  const char* const address = lines.prepare().data();
  lines.commit(0);
  return address;
}

const void* other_file_address_of_listen() {
  return reinterpret_cast<const void*>(&edgewise::listen);
}
