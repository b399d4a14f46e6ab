// The emulator's C interface, the counterpart of the part of the CUDA driver that the engine uses. `src/device/emulator.rs` mirrors it.
//
// Nothing here is process-wide state: schedule, asynchronous mode and watchdog belong to a launch, and the error text goes to the
// caller's buffer, so tests with different settings run side by side.
#pragma once
#include <cstddef>
#include <cstdint>

#define EMU_API __attribute__((visibility("default")))

struct alignas(64) CUtensorMap {
  std::uint64_t q[16];
};

extern "C" {

struct RmEmuOptions {
  std::uint64_t seed;          // 0: round robin; else a random schedule
  std::uint32_t async_mode;    // 0: as late as allowed, 1: at issue, 2: random
  std::uint32_t threads;       // operating system threads that run blocks
  std::uint32_t watchdog_ms;   // a launch that takes longer fails
};

struct RmEmuLaunch {
  std::uint32_t grid[3], block[3], shared_bytes, param_count;
  const std::uint32_t* param_sizes;
  void** params;
};

// 0, or 1 with one line of text in `error`.
EMU_API int rm_emu_launch(const void* kernel, const RmEmuLaunch* launch, const RmEmuOptions* options, char* error, std::size_t error_size);

// Memory that begins and ends at a guard page (as far as 16-byte alignment allows), filled with 0xFF. Null when there is none.
EMU_API void* rm_emu_alloc(std::size_t bytes);
EMU_API void rm_emu_free(void* p);
EMU_API void rm_emu_write(void* device, const void* host, std::size_t bytes);
EMU_API void rm_emu_read(void* host, const void* device, std::size_t bytes);
EMU_API void rm_emu_fill(void* device, int byte, std::size_t bytes);

struct RmEmuTensorMap2D {
  void* base;
  std::uint64_t width, height, row_bytes;   // width and height in elements
  std::uint32_t box_width, box_height, element_bytes, swizzle_128b;
};
// 0, or 1 where cuTensorMapEncodeTiled would refuse.
EMU_API int rm_emu_tensor_map_2d(CUtensorMap* map, const RmEmuTensorMap2D* layout);

// "plain", "check" or "asan".
EMU_API const char* rm_emu_variant(void);

// ldmatrix phases since the last call, and how many of them a bank conflict would have replayed.
EMU_API void rm_emu_ldmatrix_stats(std::uint64_t* phases, std::uint64_t* replays);
}
