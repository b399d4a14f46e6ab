// Which CUDA thread runs next, what a thread does from its first to its last instruction, and how a block ends with an error.
//
// Round robin with seed 0, else a random order that is a function of (seed, block). Fibers start lazily, and one that ends without
// ever blocking turns into the next on the same stack, so an elementwise kernel never switches.
#include <cstdarg>
#include <cstdio>

#include "runtime.h"

namespace emu {

void Launch::set_error(const std::string& text) {
  std::lock_guard<std::mutex> lock(mutex);
  if (error.empty()) error = text;
  failed = true;
}

void fail(const char* format, ...) {
  worker->in_runtime = true;
  char text[2048];
  int n = std::snprintf(text, sizeof text, "kernel %s: ", worker->launch->kernel->name);
  if (cur) {
    const Dim b = worker->block.index, t = cur->tid;
    n += std::snprintf(text + n, sizeof text - std::size_t(n), "block (%u,%u,%u) thread (%u,%u,%u): ", b.x, b.y, b.z, t.x, t.y, t.z);
  }
  va_list args;
  va_start(args, format);
  std::vsnprintf(text + n, sizeof text - std::size_t(n), format, args);
  va_end(args);
  worker->launch->set_error(text);
  worker->failed = true;
  leave_to_scheduler();
}

void RuntimeScope::expire() {
  fail("the watchdog stopped it: still running after %u ms (raise the limit, or look for an endless loop)",
       worker->launch->options.watchdog_ms);
}

// Nobody can run: says who waits where.
[[noreturn]] static void report_deadlock() {
  struct Group {
    int count = 0, first = 0;
  };
  std::map<std::string, Group> groups;
  int ended = 0;
  for (int i = 0; i < worker->threads; i++) {
    const Fiber& f = worker->fibers[i];
    if (!(f.warp->alive >> f.lane & 1)) {
      ended++;
      continue;
    }
    char where[400];
    std::snprintf(where, sizeof where, "%s at %s:%d", f.wait_op ? f.wait_op : "?", f.wait_site.file, f.wait_site.line);
    Group& g = groups[where];
    if (g.count++ == 0) g.first = i;
  }
  char text[1800];
  int n = std::snprintf(text, sizeof text, "deadlock:");
  for (const auto& [where, g] : groups) {
    if (n > 1200) break;
    n += std::snprintf(text + n, sizeof text - std::size_t(n), " %d thread(s) (first: %d) wait in %s,", g.count, g.first, where.c_str());
  }
  std::snprintf(text + n, sizeof text - std::size_t(n), " %d thread(s) ended", ended);
  groups.clear();
  cur = nullptr;
  fail("%s", text);
}

static Warp* pick_warp(Warp* after) {
  const std::uint32_t n = std::uint32_t(worker->warp_count);
  const std::uint32_t start = worker->launch->options.seed ? random_below(n) : (after ? std::uint32_t(after->id) + 1 : 0);
  for (std::uint32_t i = 0; i < n; i++) {
    Warp& w = worker->warps[(start + i) % n];
    if (w.ready | w.fresh) return &w;
  }
  return nullptr;
}

// The next fiber to run, the caller only if it is ready again; null when the block is complete.
static Fiber* pick(Warp* warp, int lane) {
  const bool random = worker->launch->options.seed != 0;
  for (;;) {
    if (random && worker->launch->options.async_mode == 2 && !worker->tma.empty() && random_below(8) == 0) perform_pending_tma();
    std::uint32_t lanes = warp ? (warp->ready | warp->fresh) : 0;
    if (!lanes) {
      warp = pick_warp(warp);
      if (!warp) {
        if (perform_pending_tma()) continue;   // as late as allowed: only when nothing else can run
        if (worker->alive == 0) return nullptr;
        report_deadlock();
      }
      lanes = warp->ready | warp->fresh;
      lane = WARP_SIZE - 1;
    }
    if (random) {
      for (std::uint32_t skip = random_below(std::uint32_t(__builtin_popcount(lanes))); skip > 0; skip--) lanes &= lanes - 1;
      return warp->lanes[__builtin_ctz(lanes)];
    }
    const std::uint32_t later = lane < WARP_SIZE - 1 ? lanes >> (lane + 1) << (lane + 1) : 0;
    return warp->lanes[__builtin_ctz(later ? later : lanes)];
  }
}

static void fiber_main();

static void start_if_fresh(Fiber* f) {
  const std::uint32_t bit = 1u << f->lane;
  if (!(f->warp->fresh & bit)) return;
  f->warp->fresh &= ~bit;
  f->warp->ready |= bit;
  prepare_stack(f, &fiber_main);
}

void block_here(const char* op, Site site) {
  Fiber* f = cur;
  f->wait_op = op;
  f->wait_site = site;
  Fiber* next = pick(f->warp, f->lane);
  if (next == f) return;
  start_if_fresh(next);
  cur = next;
  switch_fiber(f, next);
}

// Ends the current fiber; returns when the stack goes on with another fresh fiber.
static void end_fiber() {
  Fiber* f = cur;
  Warp* w = f->warp;
  const std::uint32_t bit = 1u << f->lane;
  check_copies_drained();
  w->alive &= ~bit;
  w->ready &= ~bit;
  worker->alive--;
  for (int i = 0; i < w->pending_count; i++) {
    const PendingCall& c = w->pending[i];
    if (c.mask & bit) fail("thread ends while its warp waits for it in %s at %s:%d", c.name, c.site.file, c.site.line);
  }
  if (w->alive == 0 && !w->wgmma_queue.empty()) fail("warp ends with wgmma still in flight");
  Fiber* next = pick(w, f->lane);
  if (!next) {
    worker->last_stack = f->stack;
    leave_to_scheduler();
  }
  const std::uint32_t next_bit = 1u << next->lane;
  cur = next;
  if (next->warp->fresh & next_bit) {
    next->warp->fresh &= ~next_bit;
    next->warp->ready |= next_bit;
    next->stack = f->stack;
    next->stack_size = f->stack_size;
    return;
  }
  worker->free_stacks.push_back(f->stack);
  leave_fiber_for(next);
}

static void fiber_main() {
  fiber_started();
  for (;;) {
    worker->in_runtime = false;
    worker->launch->kernel->invoke(worker->launch->params);
    worker->in_runtime = true;
    if (worker->launch->expired.load(std::memory_order_relaxed)) RuntimeScope();
    end_fiber();
  }
}

void run_fibers() {
  worker->in_runtime = true;
  Fiber* first = pick(nullptr, WARP_SIZE - 1);
  start_if_fresh(first);
  cur = first;
  enter_first_fiber(first);
  cur = nullptr;
}

}  // namespace emu
