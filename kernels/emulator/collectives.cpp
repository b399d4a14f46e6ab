// Warp-wide calls and barriers: the rules under which threads meet, and the errors when they do not.
#include "runtime.h"

namespace emu {

void warp_op(std::uint32_t mask, const char* name, WarpFn fn, void* arg, Site site) {
  RuntimeScope scope;
  Warp* w = cur->warp;
  const std::uint32_t bit = 1u << cur->lane;
  if (!(mask & bit)) fail("%s at %s:%d: the calling lane is not in mask %08x", name, site.file, site.line, mask);
  PendingCall* call = nullptr;
  for (int i = 0; i < w->pending_count && !call; i++)
    if (w->pending[i].mask & bit) call = &w->pending[i];
  if (call && (call->mask != mask || call->fn != fn || call->name != name || call->site.line != site.line || call->site.file != site.file))
    fail("divergent warp: %s at %s:%d (mask %08x) while lanes %08x wait in %s at %s:%d (mask %08x)", name, site.file, site.line, mask,
         call->arrived, call->name, call->site.file, call->site.line, call->mask);
  w->args[cur->lane] = arg;
  if (!call) {
    if (mask & ~w->alive)
      fail("%s at %s:%d: mask %08x names lanes %08x that have ended", name, site.file, site.line, mask, mask & ~w->alive);
    if (w->pending_count == int(sizeof w->pending / sizeof w->pending[0])) fail("too many warp-wide calls under way in one warp");
    call = &w->pending[w->pending_count++];
    *call = {mask, 0, fn, name, site};
  }
  call->arrived |= bit;
  if (call->arrived == mask) {
    *call = w->pending[--w->pending_count];
    fn({w->lanes, w->args, mask});
    w->ready |= mask;
    return;
  }
  w->ready &= ~bit;
  block_here(name, site);
}

void syncwarp(std::uint32_t mask, Site site) {
  warp_op(mask, "__syncwarp", [](const WarpCall&) { cur->warp->clock.epoch[cur->warp->id]++; }, nullptr, site);
}

struct ShuffleArg {
  std::uint64_t in, out;
  int operand, width;
};

template <Shuffle K> static void run_shuffle(const WarpCall& call) {
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    if (!(call.mask >> lane & 1)) continue;
    ShuffleArg& a = call.arg<ShuffleArg>(lane);
    const int base = lane & ~(a.width - 1), inside = lane - base;
    int source = lane;
    if (K == Shuffle::Xor && (lane ^ a.operand) < base + a.width) source = lane ^ a.operand;
    if (K == Shuffle::Index) source = base | (a.operand & (a.width - 1));
    if (K == Shuffle::Down && inside + a.operand < a.width) source = lane + a.operand;
    if (K == Shuffle::Up && inside >= a.operand) source = lane - a.operand;
    if (source < 0 || source >= WARP_SIZE || !(call.mask >> source & 1))
      fail("shuffle: lane %d reads lane %d, which is not in mask %08x", lane, source, call.mask);
    a.out = call.arg<ShuffleArg>(source).in;
  }
}

std::uint64_t shuffle(Shuffle kind, std::uint32_t mask, std::uint64_t value, int operand, int width, Site site) {
  ShuffleArg arg{value, value, operand, width};
  switch (kind) {
    case Shuffle::Xor: warp_op(mask, "__shfl_xor_sync", &run_shuffle<Shuffle::Xor>, &arg, site); break;
    case Shuffle::Index: warp_op(mask, "__shfl_sync", &run_shuffle<Shuffle::Index>, &arg, site); break;
    case Shuffle::Down: warp_op(mask, "__shfl_down_sync", &run_shuffle<Shuffle::Down>, &arg, site); break;
    case Shuffle::Up: warp_op(mask, "__shfl_up_sync", &run_shuffle<Shuffle::Up>, &arg, site); break;
  }
  return arg.out;
}

struct BallotArg {
  bool predicate;
  std::uint32_t out;
};

std::uint32_t ballot(std::uint32_t mask, bool predicate, const char* name, Site site) {
  BallotArg arg{predicate, 0};
  const WarpFn run = [](const WarpCall& call) {
    std::uint32_t bits = 0;
    for (int i = 0; i < WARP_SIZE; i++)
      if (call.mask >> i & 1) bits |= std::uint32_t(call.arg<BallotArg>(i).predicate) << i;
    for (int i = 0; i < WARP_SIZE; i++)
      if (call.mask >> i & 1) call.arg<BallotArg>(i).out = bits;
  };
  warp_op(mask, name, run, &arg, site);
  return arg.out;
}

// ---- barriers

static void release(int id) {
  Barrier& b = worker->barriers[id];
  if (CHECKING) {
    for (int i = 0; i < worker->warp_count; i++)
      if (worker->warps[i].at_barrier[id]) b.clock.join(worker->warps[i].clock);
    for (int i = 0; i < worker->warp_count; i++) {
      Warp& w = worker->warps[i];
      if (!w.at_barrier[id]) continue;
      w.clock.join(b.clock);
      w.clock.epoch[i]++;
    }
    b.clock = Clock{};
  }
  for (int i = 0; i < worker->warp_count; i++) {
    Warp& w = worker->warps[i];
    w.ready |= w.at_barrier[id];
    w.at_barrier[id] = 0;
  }
  b.arrived = 0;
}

// Counts the caller in; true when it is the last.
static bool arrive(int id, int threads, const char* name, Site site) {
  if (id < 0 || id >= NAMED_BARRIERS) fail("%s at %s:%d: there is no barrier %d", name, site.file, site.line, id);
  Barrier& b = worker->barriers[id];
  const bool whole_block = threads < 0;
  const int expected = whole_block ? worker->threads : threads;
  if (!whole_block && (expected <= 0 || expected % WARP_SIZE != 0))
    fail("%s at %s:%d: %d threads is not a positive multiple of 32", name, site.file, site.line, expected);
  if (b.arrived == 0) {
    b.expected = expected;
    b.site = site;
  } else if (b.expected != expected) {
    fail("barrier %d: %s at %s:%d expects %d threads, %d wait for %d", id, name, site.file, site.line, expected, b.arrived, b.expected);
  } else if (whole_block && (b.site.line != site.line || b.site.file != site.file)) {
    fail("divergent barrier: %s at %s:%d while %d thread(s) wait at %s:%d", name, site.file, site.line,
         b.arrived, b.site.file, b.site.line);
  }
  if (whole_block && worker->alive != worker->threads)
    fail("%s at %s:%d after %d thread(s) have ended", name, site.file, site.line, worker->threads - worker->alive);
  return ++b.arrived == b.expected;
}

void barrier_sync(int id, int threads, const char* name, Site site) {
  RuntimeScope scope;
  Warp* w = cur->warp;
  const bool last = arrive(id, threads, name, site);
  w->at_barrier[id] |= 1u << cur->lane;
  w->ready &= ~(1u << cur->lane);
  if (last) release(id);
  if (last && worker->launch->options.seed == 0) return;
  block_here(name, site);
}

void barrier_arrive(int id, int threads, Site site) {
  RuntimeScope scope;
  const bool last = arrive(id, threads, "bar.arrive", site);
  if (CHECKING) {
    Warp* w = cur->warp;
    worker->barriers[id].clock.join(w->clock);
    w->clock.epoch[w->id]++;
  }
  if (last) release(id);
}

}  // namespace emu
