// What a kernel and the emulator's runtime share: the thread that is running, where a call was made, warp-wide calls.
//
// Everything a CUDA thread may block on goes through the functions declared here, so that the scheduler always knows who waits
// where. Kernels do not include this file themselves: `common.cuh` does when a host compiler reads it.
#pragma once
#include <cstddef>
#include <cstdint>

// 1: kernels are compiled with -fsanitize=thread and report their memory accesses to `checker.cpp`.
#ifndef EMU_CHECK
#define EMU_CHECK 0
#endif

namespace emu {

struct Dim {
  unsigned x, y, z;
};

struct Block {
  Dim index, dim, grid;
};

struct Warp;

// A source line of a kernel, for reports and to tell one barrier from another.
struct Site {
  const char* file;
  int line;
};

// One CUDA thread.
struct Fiber {
  Dim tid;
  const Block* block;
  Warp* warp;
  int lane, id;               // position in the warp and in the block
  void* sp;                   // saved stack pointer while another fiber runs
  unsigned char* stack;       // lowest usable byte
  std::size_t stack_size;
  void* asan_fake_stack;
  const char* wait_op;        // what it was last blocked in
  Site wait_site;
};

extern __thread Fiber* cur;

// A warp-wide call in which every lane of `mask` has arrived; `args[lane]` is what that lane passed.
struct WarpCall {
  Fiber* const* lanes;
  void* const* args;
  std::uint32_t mask;
  template <class T> T& arg(int lane) const { return *static_cast<T*>(args[lane]); }
};
using WarpFn = void (*)(const WarpCall&);

// Parks the lane until all lanes of `mask` have arrived with the same function at the same site; the last one runs it for all.
void warp_op(std::uint32_t mask, const char* name, WarpFn fn, void* arg, Site site);

// Ends the launch with an error that names kernel, block and thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Barriers. `threads` < 0 means the whole block.
void barrier_sync(int id, int threads, const char* name, Site site);
void barrier_arrive(int id, int threads, Site site);
void syncwarp(std::uint32_t mask, Site site);

enum class Shuffle { Xor, Index, Down, Up };
std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int operand, int width, Site site);
std::uint32_t ballot(std::uint32_t mask, bool predicate, const char* name, Site site);

// Shared memory. A shared address is an offset into the worker's 256 KB arena.
void* dynamic_shared();
void* static_shared(const void* tag, std::size_t bytes, std::size_t align);
std::uint32_t shared_address(const void* p);

// sm_80 primitives.
void cp_async(std::uint32_t dst, const void* src, int size, int src_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);      // negative: everything, committed or not
void ldmatrix(std::uint32_t* r, std::uint32_t address, int matrices, bool trans, Site site);
void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site);
void mma_f16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site);
void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site);

// sm_90 primitives.
void mbarrier_init(std::uint32_t barrier, std::uint32_t count);
void mbarrier_arrive(std::uint32_t barrier, std::uint32_t transaction_bytes);
void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, Site site);
void tma_load_2d(std::uint32_t dst, const void* map, int x, int y, std::uint32_t barrier);
struct Wgmma {
  float* d;
  int n;
  std::uint64_t a_desc, b_desc;
  const std::uint32_t* a_regs;            // null: A comes from shared memory
  bool accumulate, a_trans, b_trans;
};
void wgmma(const Wgmma& op, Site site);
void wgmma_fence(Site site);
void wgmma_commit(Site site);
void wgmma_wait(int groups_left, Site site);
void fence_proxy_async();

// Atomics live in the runtime because they must not be instrumented.
void thread_fence();
std::uint32_t atomic_add(std::uint32_t* p, std::uint32_t v);
std::uint64_t atomic_add(std::uint64_t* p, std::uint64_t v);
std::uint32_t atomic_or(std::uint32_t* p, std::uint32_t v);
std::int32_t atomic_max(std::int32_t* p, std::int32_t v);
std::uint32_t atomic_max(std::uint32_t* p, std::uint32_t v);
std::int32_t atomic_min(std::int32_t* p, std::int32_t v);
std::uint32_t atomic_exchange(std::uint32_t* p, std::uint32_t v);
std::uint32_t atomic_compare_exchange(std::uint32_t* p, std::uint32_t expected, std::uint32_t v);

}  // namespace emu
