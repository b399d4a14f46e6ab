// Shared memory: one arena a worker. Statics lie at the bottom, dynamic memory ends at the guard region at the top, so that both an
// overrun and a shared address in a matrix descriptor behave as on the device.
#include <algorithm>

#include "runtime.h"
#if EMU_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace emu {

constexpr std::uint32_t STATIC_GAP = 16, CANARY_BYTES = 1024;

static std::uint32_t rounded(std::uint32_t bytes) { return (bytes + SHARED_ALIGN - 1) & ~(SHARED_ALIGN - 1); }

void reset_shared(std::uint32_t bytes) {
  Worker& w = *worker;
  w.dynamic_offset = std::uint32_t(ARENA_BYTES) - rounded(bytes);
  w.dynamic_bytes = bytes;
  w.statics.clear();
  w.static_used = 0;
  unsigned char* dynamic = w.arena + w.dynamic_offset;
#if EMU_ASAN
  __asan_poison_memory_region(w.arena, ARENA_BYTES);
  __asan_unpoison_memory_region(dynamic, bytes);
  std::memset(dynamic, POISON, bytes);
#else
  std::memset(dynamic, POISON, bytes);
  std::memset(dynamic + bytes, CANARY, rounded(bytes) - bytes);
  std::memset(dynamic - CANARY_BYTES, CANARY, CANARY_BYTES);
#endif
}

void* dynamic_shared() { return worker->arena + worker->dynamic_offset; }

void* static_shared(const void* tag, std::size_t bytes, std::size_t align) {
  Worker& w = *worker;
  for (const StaticShared& s : w.statics)
    if (s.tag == tag) return w.arena + s.offset;
  RuntimeScope scope;
  const std::uint32_t a = std::uint32_t(std::max<std::size_t>(align, STATIC_GAP));
  const std::uint32_t offset = (w.static_used + STATIC_GAP + a - 1) & ~(a - 1);
  if (offset + bytes + STATIC_GAP > STATIC_SHARED_MAX) fail("static shared memory exceeds %u bytes", STATIC_SHARED_MAX);
  w.static_used = offset + std::uint32_t(bytes);
  w.statics.push_back({tag, offset, std::uint32_t(bytes)});
  unsigned char* p = w.arena + offset;
#if EMU_ASAN
  __asan_unpoison_memory_region(p, bytes);
  std::memset(p, POISON, bytes);
#else
  std::memset(p, POISON, bytes);
  std::memset(p + bytes, CANARY, STATIC_GAP);
#endif
  return p;
}

bool shared_valid(std::uint32_t offset, std::uint32_t bytes) {
  const Worker& w = *worker;
  const std::uint64_t end = std::uint64_t(offset) + bytes;
  if (offset >= w.dynamic_offset && end <= w.dynamic_offset + w.dynamic_bytes) return true;
  for (const StaticShared& s : w.statics)
    if (offset >= s.offset && end <= s.offset + s.bytes) return true;
  return false;
}

unsigned char* shared_pointer(std::uint32_t address, std::uint32_t bytes, std::uint32_t align, const char* op) {
  if (address & (align - 1)) fail("%s: shared address 0x%x is not %u-byte aligned", op, address, align);
  if (!shared_valid(address, bytes))
    fail("%s: shared access [0x%x, +%u) outside shared memory (dynamic: 0x%x, +%u)", op, address, bytes,
          worker->dynamic_offset, worker->dynamic_bytes);
  return worker->arena + address;
}

std::uint32_t shared_address(const void* p) {
  const std::size_t offset = std::size_t(static_cast<const unsigned char*>(p) - worker->arena);
  if (offset > ARENA_BYTES) fail("address %p is not in shared memory", p);
  return std::uint32_t(offset);
}

// What a finished block wrote beside its shared memory; empty if nothing.
std::string damaged_canary() {
#if !EMU_ASAN
  const auto damaged = [](const unsigned char* p, std::size_t n) {
    return std::any_of(p, p + n, [](unsigned char c) { return c != CANARY; });
  };
  const Worker& w = *worker;
  const unsigned char* dynamic = w.arena + w.dynamic_offset;
  if (damaged(dynamic + w.dynamic_bytes, rounded(w.dynamic_bytes) - w.dynamic_bytes)) return "write past the end of dynamic shared memory";
  if (damaged(dynamic - CANARY_BYTES, CANARY_BYTES)) return "write before the start of dynamic shared memory";
  for (const StaticShared& s : w.statics)
    if (damaged(w.arena + s.offset + s.bytes, STATIC_GAP)) return "write past the end of a static shared array";
#endif
  return {};
}

}  // namespace emu
