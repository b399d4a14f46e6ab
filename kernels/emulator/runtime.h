// The emulator's inner state: a launch, the worker that runs its blocks, warps, barriers, queues of asynchronous work.
//
// A block never leaves the operating system thread it started on. `worker` is that thread's state and `cur` the CUDA thread that is
// running; both are null outside a launch. Only `fail` leaves a fiber early: it abandons the block, and whatever the fiber's stack
// held, so nothing on a fiber may own a lock across a call that can fail.
#pragma once
#include <pthread.h>

#include <atomic>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "api.h"
#include "checker.h"
#include "core.h"
#include "export.h"

#if defined(__SANITIZE_ADDRESS__)
#define EMU_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define EMU_ASAN 1
#endif
#endif
#ifndef EMU_ASAN
#define EMU_ASAN 0
#endif

namespace emu {

constexpr int WARP_SIZE = 32, MAX_WARPS = 32, MAX_THREADS = 1024, NAMED_BARRIERS = 16;
#if defined(__aarch64__)
constexpr std::size_t PAGE = 64 * 1024;   // the largest page an arm64 kernel may use
#else
constexpr std::size_t PAGE = 4 * 1024;
#endif
constexpr std::size_t STACK_BYTES = (EMU_ASAN ? 256 : 64) * 1024, STACK_SLOT = STACK_BYTES + PAGE;
constexpr std::size_t ARENA_BYTES = 256 * 1024;   // 18-bit shared addresses, as in wgmma descriptors
constexpr std::uint32_t STATIC_SHARED_MAX = 24 * 1024, DYNAMIC_SHARED_MAX = 227 * 1024, SHARED_ALIGN = 1024;
constexpr unsigned char CANARY = 0xA5, POISON = 0xFF;   // POISON reads as NaN in fp32, bf16 and f16

struct Launch {
  const Kernel* kernel;
  Dim grid, block;
  std::uint32_t shared_bytes;
  void** params;
  RmEmuOptions options;
  std::uint64_t blocks;
  std::uint32_t id;   // distinguishes launches in the checker's shadow of global memory
  std::atomic<std::uint64_t> next{0};
  std::atomic<bool> failed{false}, expired{false};
  std::mutex mutex;   // guards the two below
  std::string error;
  std::vector<pthread_t> running;

  void set_error(const std::string& text);
};

// A warp-wide call that some lanes have reached.
struct PendingCall {
  std::uint32_t mask, arrived;
  WarpFn fn;
  const char* name;
  Site site;
};

// One warp's share of an m64nNk16 product, and the accumulator it adds to. The registers read as NaN until the wait.
struct WgmmaOp {
  float* d[WARP_SIZE];
  Wgmma op;
  std::uint32_t a_regs[WARP_SIZE][4];
  bool done;
};
struct WgmmaAccumulator {
  float* d[WARP_SIZE];
  int count, users;
  float value[WARP_SIZE][128];
};

struct Warp {
  int id;
  std::uint32_t ready, fresh, alive;   // lanes that can run, have not started, have not ended
  Fiber* lanes[WARP_SIZE];
  void* args[WARP_SIZE];
  PendingCall pending[8];
  int pending_count;
  std::uint32_t at_barrier[NAMED_BARRIERS];
  std::vector<WgmmaOp> wgmma_queue;
  std::vector<std::size_t> wgmma_groups;   // end of each committed group in the queue
  std::vector<std::unique_ptr<WgmmaAccumulator>> accumulators;
  bool wgmma_fenced;
  Clock clock;
};

struct Barrier {
  int arrived, expected;
  Site site;
  Clock clock;
};

struct CopyOp {
  std::uint32_t dst;
  const void* src;
  int size, src_bytes;
};
struct CopyQueue {
  std::vector<CopyOp> ops;
  std::vector<std::size_t> groups;   // end of each committed group in `ops`
};

struct TmaOp {
  std::uint32_t dst, barrier;
  CUtensorMap map;
  int x, y, thread;
  Clock clock;
};
struct MbarrierState {
  std::int64_t transaction_bytes;
  Clock clock;
};
struct MbarrierWait {
  Fiber* fiber;
  std::uint32_t barrier, parity;
};

struct StaticShared {
  const void* tag;
  std::uint32_t offset, bytes;
};

struct Worker {
  Launch* launch;
  Block block;
  Fiber fibers[MAX_THREADS];
  Warp warps[MAX_WARPS];
  Barrier barriers[NAMED_BARRIERS];
  CopyQueue copies[MAX_THREADS];
  int threads, alive, warp_count;
  Dim shape;                 // block shape the fibers are set up for
  bool failed, in_runtime;   // in_runtime: the watchdog's signal must not unwind
  std::uint64_t random;

  void* scheduler_sp;
  unsigned char *stacks, *last_stack;
  std::vector<unsigned char*> free_stacks;

  unsigned char* arena;
  std::uint32_t dynamic_offset, dynamic_bytes, static_used;
  std::vector<StaticShared> statics;

  std::vector<MbarrierWait> mbarrier_waits;
  std::map<std::uint32_t, MbarrierState> mbarriers;
  std::vector<TmaOp> tma;
  Shadow shadow;
};
extern __thread Worker* worker;

// Marks the time a fiber spends in the runtime, where the watchdog's signal must not throw it out; also the place where a fiber
// that blocks for ever through runtime calls learns that its time is up.
class RuntimeScope {
 public:
  RuntimeScope() : before_(worker->in_runtime) {
    worker->in_runtime = true;
    if (__builtin_expect(worker->launch->expired.load(std::memory_order_relaxed), 0)) expire();
  }
  ~RuntimeScope() { worker->in_runtime = before_; }
  RuntimeScope(const RuntimeScope&) = delete;

 private:
  [[noreturn]] static void expire();
  bool before_;
};

inline std::uint32_t next_random(std::uint64_t& s) {
  s ^= s << 13;
  s ^= s >> 7;
  s ^= s << 17;
  return std::uint32_t(s >> 16);
}
inline std::uint32_t random_below(std::uint32_t n) { return next_random(worker->random) % n; }

// Whether an asynchronous operation is performed when it is issued rather than as late as allowed.
inline bool perform_at_issue() {
  const std::uint32_t mode = worker->launch->options.async_mode;
  return mode == 2 ? (next_random(worker->random) & 1) != 0 : mode == 1;
}

inline float bf16_to_float(std::uint16_t h) {
  const std::uint32_t u = std::uint32_t(h) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
// Exact: exponents of f16 are moved to those of f32 by a product, which makes its denormals normal numbers.
inline float f16_to_float(std::uint16_t h) {
  std::uint32_t u = std::uint32_t(h & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &u, 4);
  f *= 0x1p112f;
  std::memcpy(&u, &f, 4);
  if ((h & 0x7c00) == 0x7c00) u |= 0x7f800000u;
  u |= std::uint32_t(h & 0x8000) << 16;
  std::memcpy(&f, &u, 4);
  return f;
}

// context.cpp
void prepare_stack(Fiber* f, void (*entry)());
void switch_fiber(Fiber* from, Fiber* to);
[[noreturn]] void leave_fiber_for(Fiber* to);
[[noreturn]] void leave_to_scheduler();
void enter_first_fiber(Fiber* f);
void fiber_started();
unsigned char* map_memory(std::size_t bytes);

// scheduler.cpp
void block_here(const char* op, Site site);   // the caller has cleared its ready bit
void run_fibers();

// shared.cpp
void reset_shared(std::uint32_t dynamic_bytes);
bool shared_valid(std::uint32_t offset, std::uint32_t bytes);
unsigned char* shared_pointer(std::uint32_t address, std::uint32_t bytes, std::uint32_t align, const char* op);
std::string damaged_canary();

// ampere.cpp
void check_copies_drained();

// hopper.cpp
bool perform_pending_tma();   // false: none was pending
std::uint32_t swizzle_128b(std::uint32_t address);

// faults.cpp
void install_fault_handlers();
void use_alternate_signal_stack();
class Watch {   // while it lives, the watchdog looks after the launch
 public:
  explicit Watch(Launch& launch);
  ~Watch();
  Watch(const Watch&) = delete;
};

// launch.cpp
std::mutex& launch_mutex();

}  // namespace emu
