// What the tests of the finished rat have in common.
//
// CMake says where the programs are, if they are built: EDGEWISE_RAT with
// sanitizers, EDGEWISE_RAT_PLAIN without, EDGEWISE_CROWD, and EDGEWISE_FAULTS,
// the library of tests/faults.cpp.
#ifndef TESTS_RAT_HPP
#define TESTS_RAT_HPP

#include <doctest/doctest.h>

#include "peers.hpp"

#ifndef EDGEWISE_RAT
  #define EDGEWISE_RAT ""
  #define EDGEWISE_RAT_PLAIN ""
  #define EDGEWISE_FAULTS ""
#endif
#ifndef EDGEWISE_CROWD
  #define EDGEWISE_CROWD ""
#endif

REGISTER_EXCEPTION_TRANSLATOR(const peers::Failure& failure) {
  return peers::failure_text(failure).c_str();
}

namespace peers {

inline const bool rat_is_built = std::string_view(EDGEWISE_RAT) != "";

inline RoomOptions broadcasting() {
  RoomOptions options;
  options.broadcasts = true;
  return options;
}

// With the library in front of AddressSanitizer's, which minds.
inline Command with_faults(const std::string& faults, const Command& command) {
  const char* const sanitizer = std::getenv("ASAN_OPTIONS");
  Command all{"env", "FAULTS=" + faults,
              std::string("LD_PRELOAD=") + EDGEWISE_FAULTS,
              std::string("ASAN_OPTIONS=verify_asan_link_order=0:") +
                  (sanitizer != nullptr ? sanitizer : "")};
  all.insert(all.end(), command.begin(), command.end());
  return all;
}

// What a program that is to end at once has printed on standard error.
inline std::string refusal(const Command& command, int code) {
  step("start it another time");
  Process process(command);
  process.wait_for_exit("it ends");
  expect(process.exited_with(code), "exit code " + std::to_string(code),
         process.fate());
  expect(is_one_line(process.error()), "one line on standard error",
         shown(process.error()));
  return process.error();
}

inline void end_decently(Room& room) {
  step("send SIGTERM");
  room.server().signal(SIGTERM);
  room.wait_for_exit("it ends");
  expect(room.server().exited_with(0), "exit code 0",
         room.server().fate() + '\n' + room.server().error());
}

}  // namespace peers

#endif  // TESTS_RAT_HPP
