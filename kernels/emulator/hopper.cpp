// The copy and barrier primitives of sm_90: mbarrier and TMA.
#include "runtime.h"

namespace emu {

// What lies in shared memory where the kernel keeps an mbarrier. The tag tells an initialised one from poison.
struct Mbarrier {
  std::uint16_t phase, count;
  std::int16_t pending;
  std::uint16_t tag;
};
static_assert(sizeof(Mbarrier) == 8, "an mbarrier is 8 bytes");
constexpr std::uint16_t MBARRIER_TAG = 0x4d42;
constexpr std::uint64_t MAP_TAG = 0x544d4150;

static Mbarrier* mbarrier_at(std::uint32_t address, const char* op) {
  auto* m = reinterpret_cast<Mbarrier*>(shared_pointer(address, 8, 8, op));
  if (m->tag != MBARRIER_TAG) fail("%s: the mbarrier at shared 0x%x is not initialised", op, address);
  return m;
}

// Completes the phase when all arrivals and all bytes are in, and wakes who waited for it.
static void complete_if_done(std::uint32_t address, Mbarrier* m) {
  if (m->pending < 0) fail("mbarrier at shared 0x%x: more arrivals than its count %u", address, m->count);
  if (m->pending != 0 || worker->mbarriers[address].transaction_bytes != 0) return;
  m->phase ^= 1;
  m->pending = std::int16_t(m->count);
  std::vector<MbarrierWait>& waits = worker->mbarrier_waits;
  for (std::size_t i = 0; i < waits.size();) {
    if (waits[i].barrier == address && m->phase != waits[i].parity) {
      waits[i].fiber->warp->ready |= 1u << waits[i].fiber->lane;
      waits.erase(waits.begin() + std::ptrdiff_t(i));
    } else {
      i++;
    }
  }
}

void mbarrier_init(std::uint32_t barrier, std::uint32_t count) {
  RuntimeScope scope;
  if (count == 0 || count > 32767) fail("mbarrier.init: count %u", count);
  auto* m = reinterpret_cast<Mbarrier*>(shared_pointer(barrier, 8, 8, "mbarrier.init"));
  *m = {0, std::uint16_t(count), std::int16_t(count), MBARRIER_TAG};
  worker->mbarriers[barrier] = MbarrierState{};
}

void mbarrier_arrive(std::uint32_t barrier, std::uint32_t transaction_bytes) {
  RuntimeScope scope;
  Mbarrier* m = mbarrier_at(barrier, "mbarrier.arrive");
  MbarrierState& state = worker->mbarriers[barrier];
  if (CHECKING) {
    state.clock.join(cur->warp->clock);
    cur->warp->clock.epoch[cur->warp->id]++;
  }
  state.transaction_bytes += transaction_bytes;
  m->pending--;
  complete_if_done(barrier, m);
}

void mbarrier_wait(std::uint32_t barrier, std::uint32_t parity, Site site) {
  RuntimeScope scope;
  Fiber* f = cur;
  if (mbarrier_at(barrier, "mbarrier.try_wait")->phase == (parity & 1)) {
    worker->mbarrier_waits.push_back({f, barrier, parity & 1});
    f->warp->ready &= ~(1u << f->lane);
    block_here("mbarrier wait", site);
  }
  if (CHECKING) f->warp->clock.join(worker->mbarriers[barrier].clock);
}

// ---- TMA

struct TensorMap {
  const unsigned char* base;
  std::int64_t width, height;
  std::uint64_t row_bytes;
  std::uint32_t box_width, box_height, element_bytes;
  bool swizzle;
  std::uint32_t box_bytes() const { return box_width * box_height * element_bytes; }
};

static TensorMap decode(const CUtensorMap& m) {
  if (m.q[0] != MAP_TAG) fail("TMA: the tensor map was never encoded");
  return {reinterpret_cast<const unsigned char*>(m.q[1]), std::int64_t(m.q[2]), std::int64_t(m.q[3]), m.q[4],
          std::uint32_t(m.q[5]), std::uint32_t(m.q[6]), std::uint32_t(m.q[7]), m.q[8] != 0};
}

std::uint32_t swizzle_128b(std::uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

static void copy_box(const TmaOp& op, const TensorMap& map) {
  for (std::uint32_t row = 0; row < map.box_height; row++) {
    for (std::uint32_t column = 0; column < map.box_width; column++) {
      const std::uint32_t linear = op.dst + (row * map.box_width + column) * map.element_bytes;
      unsigned char* d = worker->arena + (map.swizzle ? swizzle_128b(linear) : linear);
      const std::int64_t x = op.x + std::int64_t(column), y = op.y + std::int64_t(row);
      if (x >= 0 && x < map.width && y >= 0 && y < map.height) {
        const unsigned char* s = map.base + std::uint64_t(y) * map.row_bytes + std::uint64_t(x) * map.element_bytes;
        check_access(s, map.element_bytes, false);
        std::memcpy(d, s, map.element_bytes);
      } else {
        std::memset(d, 0, map.element_bytes);
      }
    }
  }
}

static void perform(const TmaOp& op) {
  const TensorMap map = decode(op.map);
  copy_box(op, map);
  check_async_end(op.dst, map.box_bytes(), op.thread, op.clock.epoch[op.thread / WARP_SIZE]);
  Mbarrier* m = mbarrier_at(op.barrier, "TMA completion");
  MbarrierState& state = worker->mbarriers[op.barrier];
  state.transaction_bytes -= map.box_bytes();
  if (CHECKING) state.clock.join(op.clock);
  complete_if_done(op.barrier, m);
}

bool perform_pending_tma() {
  std::vector<TmaOp>& queue = worker->tma;
  if (queue.empty()) return false;
  const std::size_t i = worker->launch->options.seed ? random_below(std::uint32_t(queue.size())) : 0;
  const TmaOp op = queue[i];
  queue.erase(queue.begin() + std::ptrdiff_t(i));
  perform(op);
  return true;
}

void tma_load_2d(std::uint32_t dst, const void* map, int x, int y, std::uint32_t barrier) {
  RuntimeScope scope;
  TmaOp op{dst, barrier, *static_cast<const CUtensorMap*>(map), x, y, cur->id, cur->warp->clock};
  const TensorMap layout = decode(op.map);
  const std::uint32_t bytes = layout.box_bytes();
  unsigned char* d = shared_pointer(dst, bytes, layout.swizzle ? 1024 : 128, "TMA");
  check_access(d, bytes, true);
  mbarrier_at(barrier, "TMA");
  if (perform_at_issue()) {
    perform(op);
    return;
  }
  std::memset(d, POISON, bytes);
  check_async_begin(dst, bytes);
  worker->tma.push_back(op);
}

}  // namespace emu

extern "C" int rm_emu_tensor_map_2d(CUtensorMap* map, const RmEmuTensorMap2D* l) {
  const std::uint64_t box_row = std::uint64_t(l->box_width) * l->element_bytes;
  const bool element = l->element_bytes == 1 || l->element_bytes == 2 || l->element_bytes == 4;
  const bool box = l->box_width >= 1 && l->box_width <= 256 && l->box_height >= 1 && l->box_height <= 256;
  if (!element || !box || l->width == 0 || l->height == 0) return 1;
  if (std::uintptr_t(l->base) % 16 != 0 || l->row_bytes % 16 != 0 || l->row_bytes < l->width * l->element_bytes) return 1;
  if (box_row % 16 != 0 || (l->swizzle_128b && box_row > 128)) return 1;
  *map = {};
  map->q[0] = emu::MAP_TAG;
  map->q[1] = std::uint64_t(reinterpret_cast<std::uintptr_t>(l->base));
  map->q[2] = l->width;
  map->q[3] = l->height;
  map->q[4] = l->row_bytes;
  map->q[5] = l->box_width;
  map->q[6] = l->box_height;
  map->q[7] = l->element_bytes;
  map->q[8] = l->swizzle_128b;
  return 0;
}
