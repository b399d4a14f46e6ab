// Race and initialisation checks on shared and global memory, active only in the `check` build (EMU_CHECK).
//
// Happens-before is a vector clock a warp: barriers join clocks, `__syncwarp` advances the warp's own. Each byte of shared memory
// remembers its last writer and the readers since; each byte of a global buffer the last block that wrote or read it in this launch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "core.h"

namespace emu {

constexpr bool CHECKING = EMU_CHECK != 0;

struct Clock {
  std::uint32_t epoch[32];
  void join(const Clock& other) {
    for (int i = 0; i < 32; i++)
      if (epoch[i] < other.epoch[i]) epoch[i] = other.epoch[i];
  }
};

struct Cell;   // shadow of one byte of shared memory

struct Shadow {
  Cell* cells;
  std::uint32_t generation;             // cells of an earlier block count as untouched
  std::uint32_t proxy_fence[1024];      // the thread's epoch at its last fence.proxy.async
};

#if EMU_CHECK
void check_block_start();
void check_access(const void* p, std::size_t bytes, bool write);   // by the current thread, at the current instrumented instruction
void check_async_begin(std::uint32_t shared, std::uint32_t bytes);
void check_async_end(std::uint32_t shared, std::uint32_t bytes, int thread, std::uint32_t epoch);
void check_proxy_fence();
void check_proxy_read(std::uint32_t shared, const char* what);
void check_global_alloc(const void* p, std::size_t bytes);
void check_global_free(const void* p);
void check_global_written_by_host(const void* p, std::size_t bytes);
#else
inline void check_block_start() {}
inline void check_access(const void*, std::size_t, bool) {}
inline void check_async_begin(std::uint32_t, std::uint32_t) {}
inline void check_async_end(std::uint32_t, std::uint32_t, int, std::uint32_t) {}
inline void check_proxy_fence() {}
inline void check_proxy_read(std::uint32_t, const char*) {}
inline void check_global_alloc(const void*, std::size_t) {}
inline void check_global_free(const void*) {}
inline void check_global_written_by_host(const void*, std::size_t) {}
#endif

}  // namespace emu
