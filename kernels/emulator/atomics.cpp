// Atomics on global and shared memory. Blocks run on several operating system threads, so they are real ones.
#include "core.h"

namespace emu {

template <class T, class F> static T update(T* p, F next) {
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, next(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

void thread_fence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
std::uint64_t atomic_add(std::uint64_t* p, std::uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
std::uint32_t atomic_or(std::uint32_t* p, std::uint32_t v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
std::int32_t atomic_max(std::int32_t* p, std::int32_t v) {
  return update(p, [v](std::int32_t old) { return old < v ? v : old; });
}
std::uint32_t atomic_max(std::uint32_t* p, std::uint32_t v) {
  return update(p, [v](std::uint32_t old) { return old < v ? v : old; });
}
std::int32_t atomic_min(std::int32_t* p, std::int32_t v) {
  return update(p, [v](std::int32_t old) { return v < old ? v : old; });
}
std::uint32_t atomic_exchange(std::uint32_t* p, std::uint32_t v) { return __atomic_exchange_n(p, v, __ATOMIC_RELAXED); }
std::uint32_t atomic_compare_exchange(std::uint32_t* p, std::uint32_t expected, std::uint32_t v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

}  // namespace emu
