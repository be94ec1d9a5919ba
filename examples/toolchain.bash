# shellcheck shell=bash
# What examples/run and tests/run have in common: on a machine with nothing but
# git, get a compiler and CMake, then build without a word unless it fails.
# Everything said here goes to standard error.

say() { echo "$0: $*" >&2; }

die() {
  say "$@"
  exit 1
}

# Runs a command, and shows what it says only if it fails.
quietly() {
  local output
  output=$("$@" 2>&1) && return
  echo "$output" >&2
  return 1
}

# Prints the command that makes apt-get run as root, or fails if nothing does.
as_root() {
  if [[ $EUID -eq 0 ]]; then
    echo env
  elif sudo -n true 2>/dev/null; then
    echo sudo -n env
  elif [[ -t 0 ]] && command -v sudo >/dev/null; then
    echo sudo env
  else
    return 1
  fi
}

# Whether apt knows all these packages. It must be asked: a name with a + that
# it doesn't know is a pattern to it, and it installs whatever fits.
are_known() {
  local package
  for package; do
    [[ $(apt-cache search --names-only "^${package//+/\\+}\$") ]] || return 1
  done
}

# Installs packages. Fails with one line if that is not allowed here.
install_packages() {
  local prefix apt
  if ! command -v apt-get >/dev/null; then
    say "please install what Debian calls: $*"
    return 1
  elif ! prefix=$(as_root); then
    say "please install as root: apt-get install $*"
    return 1
  fi
  say "installing $*"
  read -ra apt <<<"$prefix DEBIAN_FRONTEND=noninteractive apt-get \
    -o DPkg::Lock::Timeout=120 -qq"
  local install=("${apt[@]}" install -y --no-install-recommends "$@")
  # The package lists of a fresh machine are empty or old, else they'll do.
  are_known "$@" && "${install[@]}" >/dev/null 2>&1 && return
  quietly "${apt[@]}" update || return
  if ! are_known "$@"; then
    say "apt-get has no such packages: $*"
    return 1
  fi
  quietly "${install[@]}"
}

# Whether $1, which may be a command with arguments, makes C++20 programs: it
# makes build/probe. More arguments are further options.
makes_programs() {
  local compiler
  read -ra compiler <<<"$1"
  "${compiler[@]}" -std=c++20 "${@:2}" -x c++ - -o build/probe 2>&1 <<'END'
#include <span>
int main(int count, char** words) { return std::span(words, count).empty(); }
END
}

# The packages that bring the compiler $1.
compiler_packages() {
  local version=
  [[ $1 =~ (-[0-9]+)$ ]] && version=${BASH_REMATCH[1]}
  case $1 in
    *clang++*) echo "clang$version libclang-rt$version-dev" ;;
    *g++* | *c++*) echo "g++$version" ;;
    *) die "CXX=$1 cannot be found, nor is it known what to install for it" ;;
  esac
}

# Sets CXX to a compiler that works with the given options, and installs it, and
# CMake and make, if they are missing. $CXX decides if it is set.
need_toolchain() {
  local packages=() candidate make=make
  [[ ${CMAKE_GENERATOR:-} == Ninja* ]] && make=ninja
  for candidate in g++ c++ clang++; do
    [[ -n ${CXX:-} ]] && break
    makes_programs "$candidate" "$@" >/dev/null && CXX=$candidate
  done
  export CXX=${CXX:-g++}
  if ! makes_programs "$CXX" "$@" >/dev/null; then
    read -ra packages <<<"$(compiler_packages "$CXX")"
    [[ ${#packages[@]} -gt 0 ]] || exit 1
  fi
  command -v cmake >/dev/null || packages+=(cmake)
  command -v "$make" >/dev/null || packages+=("${make/ninja/ninja-build}")
  if [[ ${#packages[@]} -gt 0 ]]; then
    install_packages "${packages[@]}" || exit 1
  fi
  makes_programs "$CXX" "$@" >/dev/null ||
    die "$CXX ${*:+with $* }makes no C++20 program:" \
      "$(makes_programs "$CXX" "$@" | head -n 1)"
}

# Configures the build directory $1. A directory remembers its compiler, so if
# it is another one now, it starts afresh.
configure() {
  local directory=$1 compiler remembered
  compiler=$(command -v "${CXX%% *}")
  if [[ -f $directory/CMakeCache.txt ]]; then
    remembered=$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' \
      "$directory/CMakeCache.txt")
    [[ $(readlink -f "$remembered") == $(readlink -f "$compiler") ]] ||
      rm -rf "$directory/CMakeCache.txt" "$directory/CMakeFiles"
  fi
  quietly cmake -S . -B "$directory" "${@:2}"
}

# Builds targets, or everything, in the build directory $1, with all cores.
build() {
  local directory=$1
  shift
  quietly cmake --build "$directory" --parallel "$(nproc)" ${1+--target "$@"}
}
