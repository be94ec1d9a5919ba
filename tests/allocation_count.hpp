// Counts what the program asks of the heap, by replacing every global operator
// new and delete. Include it in one source file of a program, no more: the
// replacements are ordinary functions.
#ifndef TESTS_ALLOCATION_COUNT_HPP
#define TESTS_ALLOCATION_COUNT_HPP

#include <malloc.h>

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

namespace allocation_count {

inline std::atomic<long> calls{0};       // of operator new, so far
inline std::atomic<long> live_bytes{0};  // allocated and not freed
inline std::atomic<bool> refuse{false};  // the nothrow forms find no memory

inline void* allocate(std::size_t size, std::size_t alignment) noexcept {
  void* memory = nullptr;
  if (alignment <= alignof(std::max_align_t)) {
    memory = std::malloc(size == 0 ? 1 : size);
  } else if (::posix_memalign(&memory, alignment, size) != 0) {
    return nullptr;
  }
  if (memory == nullptr) return nullptr;
  ++calls;
  live_bytes += static_cast<long>(::malloc_usable_size(memory));
  return memory;
}

inline void* allocate_or_throw(std::size_t size, std::size_t alignment) {
  void* const memory = allocate(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

inline void release(void* memory) noexcept {
  if (memory == nullptr) return;
  live_bytes -= static_cast<long>(::malloc_usable_size(memory));
  std::free(memory);
}

// What a stretch of the program has allocated since this was made.
class Since {
 public:
  long allocations() const { return calls - calls_; }
  long bytes() const { return live_bytes - live_bytes_; }

 private:
  long calls_ = calls;
  long live_bytes_ = live_bytes;
};

}  // namespace allocation_count

// Out of line, or the compiler sees malloc's memory meet delete and warns.
#define TESTS_REPLACED [[gnu::noinline]]

TESTS_REPLACED void* operator new(std::size_t size) {
  return allocation_count::allocate_or_throw(size, 1);
}
TESTS_REPLACED void* operator new[](std::size_t size) {
  return allocation_count::allocate_or_throw(size, 1);
}
TESTS_REPLACED void* operator new(std::size_t size,
                                  const std::nothrow_t&) noexcept {
  if (allocation_count::refuse) return nullptr;
  return allocation_count::allocate(size, 1);
}
TESTS_REPLACED void* operator new[](std::size_t size,
                                    const std::nothrow_t&) noexcept {
  if (allocation_count::refuse) return nullptr;
  return allocation_count::allocate(size, 1);
}
TESTS_REPLACED void* operator new(std::size_t size, std::align_val_t align) {
  return allocation_count::allocate_or_throw(size,
                                             static_cast<std::size_t>(align));
}
TESTS_REPLACED void* operator new[](std::size_t size, std::align_val_t align) {
  return allocation_count::allocate_or_throw(size,
                                             static_cast<std::size_t>(align));
}
TESTS_REPLACED void* operator new(std::size_t size, std::align_val_t align,
                                  const std::nothrow_t&) noexcept {
  if (allocation_count::refuse) return nullptr;
  return allocation_count::allocate(size, static_cast<std::size_t>(align));
}
TESTS_REPLACED void* operator new[](std::size_t size, std::align_val_t align,
                                    const std::nothrow_t&) noexcept {
  if (allocation_count::refuse) return nullptr;
  return allocation_count::allocate(size, static_cast<std::size_t>(align));
}

TESTS_REPLACED void operator delete(void* memory) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete(void* memory, std::size_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory, std::size_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete(void* memory,
                                    const std::nothrow_t&) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory,
                                      const std::nothrow_t&) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete(void* memory, std::align_val_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory, std::align_val_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete(void* memory, std::size_t,
                                    std::align_val_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory, std::size_t,
                                      std::align_val_t) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete(void* memory, std::align_val_t,
                                    const std::nothrow_t&) noexcept {
  allocation_count::release(memory);
}
TESTS_REPLACED void operator delete[](void* memory, std::align_val_t,
                                      const std::nothrow_t&) noexcept {
  allocation_count::release(memory);
}

#undef TESTS_REPLACED

#endif  // TESTS_ALLOCATION_COUNT_HPP
