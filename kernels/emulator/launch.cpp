// From a launch to its blocks: validation, workers, the threads that run blocks, and the C entry points for launching.
#include <sys/mman.h>

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <cstdio>
#include <thread>

#include "runtime.h"

namespace emu {

std::mutex& launch_mutex() {
  static std::mutex* mutex = new std::mutex;   // never destroyed: helper threads outlive main
  return *mutex;
}

// ---- workers

static Worker* make_worker() {
  constexpr std::size_t ALIGN = ARENA_BYTES, GUARD = 64u << 20;
  unsigned char* arena = map_memory(ALIGN + ARENA_BYTES + GUARD);
  unsigned char* stacks = map_memory(STACK_SLOT * MAX_THREADS);
  if (!arena || !stacks) return nullptr;
  Worker* w = new Worker{};
  w->arena = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(arena) + ALIGN - 1) & ~std::uintptr_t(ALIGN - 1));
  mprotect(w->arena + ARENA_BYTES, GUARD - PAGE, PROT_NONE);
  w->stacks = stacks;
  for (int i = 0; i < MAX_THREADS; i++) mprotect(stacks + std::size_t(i) * STACK_SLOT, PAGE, PROT_NONE);
  return w;
}

// Workers are kept for ever and reused: their stacks and arena are warm, and a launch may come from any thread.
static std::vector<Worker*>& idle_workers() {
  static std::vector<Worker*>* idle = new std::vector<Worker*>;
  return *idle;
}
static std::mutex idle_mutex;

static Worker* take_worker() {
  {
    std::lock_guard<std::mutex> lock(idle_mutex);
    if (!idle_workers().empty()) {
      Worker* w = idle_workers().back();
      idle_workers().pop_back();
      return w;
    }
  }
  return make_worker();
}

static void give_back(Worker* w) {
  std::lock_guard<std::mutex> lock(idle_mutex);
  idle_workers().push_back(w);
}

// ---- one block

static void reset_stacks(Worker* k) {
  k->free_stacks.clear();
  for (int i = MAX_THREADS - 1; i >= 0; i--) k->free_stacks.push_back(k->stacks + std::size_t(i) * STACK_SLOT + PAGE);
}

static void reset_warps(Worker* k) {
  for (int i = 0; i < k->warp_count; i++) {
    Warp& w = k->warps[i];
    const int lanes = std::min(WARP_SIZE, k->threads - i * WARP_SIZE);
    w.id = i;
    w.alive = w.fresh = lanes == WARP_SIZE ? ~0u : (1u << lanes) - 1;
    w.ready = 0;
    w.pending_count = 0;
    std::memset(w.at_barrier, 0, sizeof w.at_barrier);
    w.wgmma_queue.clear();
    w.wgmma_groups.clear();
    w.accumulators.clear();
    w.wgmma_fenced = false;
    w.clock = Clock{};
    w.clock.epoch[i] = 1;
  }
}

static void shape_fibers(Worker* k, Dim shape) {
  k->shape = shape;
  for (int i = 0; i < k->threads; i++) {
    Fiber& f = k->fibers[i];
    const unsigned n = unsigned(i);
    f.id = i;
    f.lane = i % WARP_SIZE;
    f.block = &k->block;
    f.warp = &k->warps[i / WARP_SIZE];
    f.warp->lanes[f.lane] = &f;
    f.tid = {n % shape.x, n / shape.x % shape.y, n / (shape.x * shape.y)};
  }
}

static void discard_async_work(Worker* k) {
  k->mbarrier_waits.clear();
  k->mbarriers.clear();
  k->tma.clear();
  if (!k->failed) return;
  for (CopyQueue& q : k->copies) {
    q.ops.clear();
    q.groups.clear();
  }
}

static void run_block(Worker* k, Launch& launch, std::uint64_t b) {
  const Dim g = launch.grid, s = launch.block;
  k->failed = false;
  k->random = ((launch.options.seed + 1) * 0x9E3779B97F4A7C15ull) ^ ((b + 1) * 0xD1B54A32D192ED03ull);
  k->block = {{unsigned(b % g.x), unsigned(b / g.x % g.y), unsigned(b / g.x / g.y)}, s, g};
  k->threads = k->alive = int(s.x * s.y * s.z);
  k->warp_count = (k->threads + WARP_SIZE - 1) / WARP_SIZE;
  reset_shared(launch.shared_bytes);
  reset_warps(k);
  if (k->shape.x != s.x || k->shape.y != s.y || k->shape.z != s.z) shape_fibers(k, s);
  for (int i = 0; i < k->threads; i++) k->fibers[i].wait_op = nullptr;
  for (Barrier& barrier : k->barriers) barrier = Barrier{};
  check_block_start();
  run_fibers();
  if (!k->failed) {
    k->free_stacks.push_back(k->last_stack);
    if (!k->tma.empty()) {
      launch.set_error(std::string("kernel ") + launch.kernel->name + ": block ends with TMA still in flight");
    }
    const std::string damage = damaged_canary();
    if (!damage.empty()) launch.set_error(std::string("kernel ") + launch.kernel->name + ": " + damage);
  } else {
    reset_stacks(k);
  }
  discard_async_work(k);
}

static void work(Launch& launch) {
  Worker* k = take_worker();
  if (!k) {
    launch.set_error("the emulator cannot map memory for a block");
    return;
  }
  if (k->free_stacks.empty()) reset_stacks(k);
  use_alternate_signal_stack();
  {
    std::lock_guard<std::mutex> lock(launch.mutex);
    launch.running.push_back(pthread_self());
  }
  worker = k;
  k->launch = &launch;
  for (;;) {
    const std::uint64_t b = launch.next.fetch_add(1);
    if (b >= launch.blocks || launch.failed) break;
    run_block(k, launch, b);
  }
  {
    std::lock_guard<std::mutex> lock(launch.mutex);
    launch.running.erase(std::find(launch.running.begin(), launch.running.end(), pthread_self()));
  }
  worker = nullptr;
  give_back(k);
}

// ---- helper threads

// Threads besides the caller's that run blocks. They start when first needed and stay.
class Helpers {
 public:
  void run(Launch& launch, int extra) {
    while (started_ < extra) {
      const int id = started_++;
      std::thread([this, id] { serve(id); }).detach();
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &launch;
      wanted_ = active_ = extra;
      generation_++;
    }
    wake_.notify_all();
    work(launch);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return active_ == 0; });
  }

 private:
  void serve(int id) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (id >= wanted_) continue;
      Launch* job = job_;
      lock.unlock();
      work(*job);
      lock.lock();
      if (--active_ == 0) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  Launch* job_ = nullptr;
  std::uint64_t generation_ = 0;
  int active_ = 0, wanted_ = 0, started_ = 0;
};

static Helpers& helpers() {
  static Helpers* h = new Helpers;
  return *h;
}

// ---- validation

static std::string refuse(const char* format, ...) {
  char text[300];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  return text;
}

static std::string validate(const Kernel& k, const RmEmuLaunch& l) {
  if (l.param_count != k.count) return refuse("kernel %s: %u parameters given, it takes %u", k.name, l.param_count, k.count);
  for (std::uint32_t i = 0; i < k.count; i++)
    if (l.param_sizes[i] != k.sizes[i])
      return refuse("kernel %s: parameter %u has %u bytes, the kernel expects %u", k.name, i, l.param_sizes[i], k.sizes[i]);
  const std::uint64_t threads = std::uint64_t(l.block[0]) * l.block[1] * l.block[2];
  if (threads == 0 || threads > MAX_THREADS || l.block[2] > 64)
    return refuse("kernel %s: invalid block (%u, %u, %u)", k.name, l.block[0], l.block[1], l.block[2]);
  if (l.grid[0] == 0 || l.grid[0] > 0x7fffffffu || l.grid[1] == 0 || l.grid[1] > 65535 || l.grid[2] == 0 || l.grid[2] > 65535)
    return refuse("kernel %s: invalid grid (%u, %u, %u)", k.name, l.grid[0], l.grid[1], l.grid[2]);
  if (l.shared_bytes > DYNAMIC_SHARED_MAX)
    return refuse("kernel %s: %u bytes of dynamic shared memory, the limit is %u", k.name, l.shared_bytes, DYNAMIC_SHARED_MAX);
  return {};
}

}  // namespace emu

using namespace emu;

int rm_emu_launch(const void* kernel, const RmEmuLaunch* l, const RmEmuOptions* options, char* error, std::size_t error_size) {
  const Kernel& k = *static_cast<const Kernel*>(kernel);
  std::string text = validate(k, *l);
  if (text.empty()) {
    std::lock_guard<std::mutex> lock(launch_mutex());
    static std::uint32_t launches = 0;
    Launch launch{};
    launch.kernel = &k;
    launch.grid = {l->grid[0], l->grid[1], l->grid[2]};
    launch.block = {l->block[0], l->block[1], l->block[2]};
    launch.shared_bytes = l->shared_bytes;
    launch.params = l->params;
    launch.options = *options;
    launch.blocks = std::uint64_t(l->grid[0]) * l->grid[1] * l->grid[2];
    launch.id = ++launches;
    // The checker's shadow has no locks: its blocks run one after the other.
    const std::uint64_t threads = CHECKING ? 1 : std::max<std::uint64_t>(1, std::min<std::uint64_t>(options->threads, launch.blocks));
    install_fault_handlers();
    Watch watch(launch);
    if (threads == 1) {
      work(launch);
    } else {
      helpers().run(launch, int(threads) - 1);
    }
    text = launch.error;
  }
  if (text.empty()) return 0;
  std::snprintf(error, error_size, "%s", text.c_str());
  return 1;
}

const char* rm_emu_variant(void) { return CHECKING ? "check" : EMU_ASAN ? "asan" : "plain"; }
