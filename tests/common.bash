# shellcheck shell=bash
# What tests/compile_alone, tests/portability and tests/coverage have in common:
# which compilers are here, how a unit test is compiled without CMake, and jobs
# of which two run at a time.

# shellcheck disable=SC2034 # for those who include this
strict=(-std=c++20 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror)

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# Prints the newest clang++-N that is here, else clang++.
newest_clang() {
  local found
  found=$(compgen -c clang++ | grep -E '^clang\+\+-[0-9]+$' | sort -V | tail -n 1)
  echo "${found:-clang++}"
}

# Whether a compiler, $@, is here and finds a standard library. If not, says so.
is_here() {
  if ! command -v "$1" >/dev/null; then
    echo "skipped  $*: it is not here"
  elif ! echo '#include <string>' |
    "$@" -std=c++20 -x c++ -fsyntax-only - 2>/dev/null; then
    echo "skipped  $*: its standard library is not here"
  else
    return 0
  fi
  return 1
}

# Makes $scratch/include/doctest, for compilers that do not look where it is.
find_doctest() {
  local header
  mkdir -p "$scratch/include"
  for header in {/usr,/usr/local}/include/doctest/doctest.h \
    build/tests/tests/doctest/doctest/doctest.h; do
    [[ -f $header ]] || continue
    ln -s "$(dirname "$(readlink -f "$header")")" "$scratch/include/doctest"
    return
  done
  echo "skipped  the unit tests: doctest is not here"
  return 1
}

# Prints the names of the header's unit tests: the others are for the tutorial's
# text and for a finished program.
unit_tests() {
  local source
  for source in tests/*_test.cpp; do
    source=${source#tests/}
    [[ $source =~ ^(tutorial|crowd|rat|faults|soak|thousands|loops)_test ]] || echo "${source%.cpp}"
  done
}

# What else a unit test is compiled with. CMakeLists.txt compiles doctest's own
# part once for all of them.
with_main=-DDOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
extra_options() {
  case $1 in
    no_exceptions_test) echo -fno-exceptions -fno-rtti ;;
    line_buffer_test) echo "$with_main" -Wl,--wrap=memchr ;;
    *) echo "$with_main" ;;
  esac
}

# Prints the file $1, but no more than its first and last 30 lines.
ends_of() {
  awk -v most=30 '
    NR <= most { print; next }
    { last[NR % most] = $0 }
    END {
      if (NR > 2 * most) print "... (" NR - 2 * most " lines left out) ..."
      for (line = (NR > 2 * most ? NR - most : most) + 1; line <= NR; ++line)
        print last[line % most]
    }' "$1"
}

# Starts a job, $2 and its arguments, once fewer than two run, and says how it
# ended. $1 names it.
jobs_started=0
start() {
  local job=$scratch/job$((++jobs_started)) name=$1
  shift
  if [[ $jobs_started -gt 2 ]]; then wait -n || true; fi
  {
    set +e
    # Not in a condition: there a failure would not end it.
    (set -e; "$@") >"$job.output" 2>&1
    # shellcheck disable=SC2181
    if [[ $? -eq 0 ]]; then
      echo "ok       $name"
      touch "$job.ok"
    else
      echo "FAILED   $name"$'\n'"$(ends_of "$job.output")"
    fi
  } &
}

# Waits for all jobs. False if one failed.
all_succeed() {
  wait
  [[ $(find "$scratch" -name 'job*.ok' | wc -l) -eq $jobs_started ]]
}
