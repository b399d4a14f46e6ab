// Asynchronous warpgroup products of sm_90. Each warp computes its own 16 rows of the m64nNk16 product.
//
// In flight, the accumulator lives here and the kernel's registers read as NaN. Products run in the order of issue, at the latest in
// the wait, which is when operands that were overwritten too early show.
#include "runtime.h"

namespace emu {

struct MatrixDescriptor {
  std::uint32_t start, leading_bytes, stride_bytes, layout;
};
constexpr std::uint32_t LAYOUT_SWIZZLE_128B = 1;

static MatrixDescriptor decode(std::uint64_t d) {
  return {std::uint32_t(d & 0x3fff) << 4, std::uint32_t(d >> 16 & 0x3fff) << 4, std::uint32_t(d >> 32 & 0x3fff) << 4,
          std::uint32_t(d >> 62)};
}

// Shared address of element (mn, k) of a bf16 operand. The swizzle is an XOR of address bits, as in the hardware.
static std::uint32_t element_address(const MatrixDescriptor& d, int mn, int k, bool trans) {
  if (d.layout != LAYOUT_SWIZZLE_128B) fail("wgmma: only the 128-byte swizzle is emulated (layout type %u)", d.layout);
  const std::uint32_t row = std::uint32_t(mn), col = std::uint32_t(k);
  const std::uint32_t linear = trans ? d.start + row / 64 * d.leading_bytes + col / 8 * d.stride_bytes + col % 8 * 128 + row % 64 * 2
                                     : d.start + row / 8 * d.stride_bytes + row % 8 * 128 + col * 2;
  return swizzle_128b(linear);
}

static float load_element(const MatrixDescriptor& d, int mn, int k, bool trans, const char* operand) {
  const std::uint32_t address = element_address(d, mn, k, trans);
  if (!shared_valid(address, 2)) fail("wgmma operand %s: element (%d, %d) at shared 0x%x is out of bounds", operand, mn, k, address);
  const unsigned char* p = worker->arena + address;
  check_access(p, 2, false);
  check_proxy_read(address, operand);
  std::uint16_t h;
  std::memcpy(&h, p, 2);
  return bf16_to_float(h);
}

struct Operands {
  alignas(32) float a[16][16];
  alignas(32) float b[16][128];
};

static void load_operands(const Warp& w, const WgmmaOp& o, Operands& x) {
  const MatrixDescriptor a = decode(o.op.a_desc), b = decode(o.op.b_desc);
  for (int n = 0; n < o.op.n; n++)
    for (int k = 0; k < 16; k++) x.b[k][n] = load_element(b, n, k, o.op.b_trans, "B");
  if (!o.op.a_regs) {
    const int first_row = (w.id & 3) * 16;
    for (int r = 0; r < 16; r++)
      for (int k = 0; k < 16; k++) x.a[r][k] = load_element(a, first_row + r, k, o.op.a_trans, "A");
    return;
  }
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int i = 0; i < 4; i++) {
      const int row = g + (i & 1) * 8, k = t + (i >> 1) * 8;
      x.a[row][k] = bf16_to_float(std::uint16_t(o.a_regs[lane][i]));
      x.a[row][k + 1] = bf16_to_float(std::uint16_t(o.a_regs[lane][i] >> 16));
    }
  }
}

static WgmmaAccumulator* find_accumulator(Warp& w, const float* key) {
  for (auto& acc : w.accumulators)
    if (acc->d[0] == key) return acc.get();
  return nullptr;
}

static void execute(Warp& w, WgmmaOp& o) {
  typedef float Row8 __attribute__((vector_size(32)));
  Operands x;
  load_operands(w, o, x);
  WgmmaAccumulator& acc = *find_accumulator(w, o.d[0]);
  for (int tile = 0; tile < o.op.n / 8; tile++) {
    alignas(32) float c[16][8];
    for (int lane = 0; lane < WARP_SIZE; lane++) {
      const int g = lane >> 2, t = (lane & 3) * 2;
      for (int i = 0; i < 4; i++) c[g + (i >> 1) * 8][t + (i & 1)] = o.op.accumulate ? acc.value[lane][tile * 4 + i] : 0.f;
    }
    for (auto& row : c) {
      Row8 sum, column;
      std::memcpy(&sum, row, sizeof sum);
      for (int k = 0; k < 16; k++) {
        std::memcpy(&column, &x.b[k][tile * 8], sizeof column);
        sum += column * x.a[&row - c][k];
      }
      std::memcpy(row, &sum, sizeof sum);
    }
    for (int lane = 0; lane < WARP_SIZE; lane++) {
      const int g = lane >> 2, t = (lane & 3) * 2;
      for (int i = 0; i < 4; i++) acc.value[lane][tile * 4 + i] = c[g + (i >> 1) * 8][t + (i & 1)];
    }
  }
  o.done = true;
}

static void take_accumulator(Warp& w, const WgmmaOp& o) {
  if (WgmmaAccumulator* acc = find_accumulator(w, o.d[0])) {
    acc->users++;
    return;
  }
  auto acc = std::make_unique<WgmmaAccumulator>();
  acc->count = o.op.n / 2;
  acc->users = 1;
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const std::size_t bytes = std::size_t(acc->count) * sizeof(float);
    acc->d[lane] = o.d[lane];
    std::memcpy(acc->value[lane], o.d[lane], bytes);
    std::memset(o.d[lane], POISON, bytes);
  }
  w.accumulators.push_back(std::move(acc));
}

static void give_back_accumulator(Warp& w, const WgmmaOp& o) {
  WgmmaAccumulator* acc = find_accumulator(w, o.d[0]);
  if (--acc->users > 0) return;
  for (int lane = 0; lane < WARP_SIZE; lane++) std::memcpy(acc->d[lane], acc->value[lane], std::size_t(acc->count) * sizeof(float));
  for (std::size_t i = 0; i < w.accumulators.size(); i++) {
    if (w.accumulators[i].get() != acc) continue;
    w.accumulators.erase(w.accumulators.begin() + std::ptrdiff_t(i));
    return;
  }
}

static void run_issue(const WarpCall& call) {
  const Wgmma& first = call.arg<Wgmma>(0);
  Warp& w = *call.lanes[0]->warp;
  if (!w.wgmma_fenced) fail("wgmma.mma_async without a wgmma.fence before it");
  WgmmaOp o{};
  o.op = first;
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const Wgmma& x = call.arg<Wgmma>(lane);
    if (x.a_desc != first.a_desc || x.b_desc != first.b_desc || x.accumulate != first.accumulate)
      fail("wgmma: operands differ between lanes");
    o.d[lane] = x.d;
    if (x.a_regs) std::memcpy(o.a_regs[lane], x.a_regs, sizeof o.a_regs[lane]);
  }
  take_accumulator(w, o);
  if (perform_at_issue()) {
    for (WgmmaOp& earlier : w.wgmma_queue)
      if (!earlier.done) execute(w, earlier);
    execute(w, o);
  } else if (CHECKING) {
    Operands must_be_readable_now;
    load_operands(w, o, must_be_readable_now);
  }
  w.wgmma_queue.push_back(o);
}

static void run_commit(const WarpCall& call) {
  Warp& w = *call.lanes[0]->warp;
  w.wgmma_groups.push_back(w.wgmma_queue.size());
}

static void run_wait(const WarpCall& call) {
  Warp& w = *call.lanes[0]->warp;
  const int left = call.arg<int>(0);
  if (int(w.wgmma_groups.size()) <= left) return;
  const std::size_t done = w.wgmma_groups.size() - std::size_t(left), upto = w.wgmma_groups[done - 1];
  for (std::size_t i = 0; i < upto; i++) {
    WgmmaOp& o = w.wgmma_queue[i];
    if (!o.done) execute(w, o);
    give_back_accumulator(w, o);
  }
  w.wgmma_queue.erase(w.wgmma_queue.begin(), w.wgmma_queue.begin() + std::ptrdiff_t(upto));
  w.wgmma_groups.erase(w.wgmma_groups.begin(), w.wgmma_groups.begin() + std::ptrdiff_t(done));
  for (std::size_t& end : w.wgmma_groups) end -= upto;
  if (w.wgmma_queue.empty()) w.wgmma_fenced = false;
}

void wgmma(const Wgmma& op, Site site) {
  Wgmma arg = op;
  warp_op(~0u, "wgmma.mma_async", &run_issue, &arg, site);
}
void wgmma_fence(Site site) {
  warp_op(~0u, "wgmma.fence", [](const WarpCall& call) { call.lanes[0]->warp->wgmma_fenced = true; }, nullptr, site);
}
void wgmma_commit(Site site) { warp_op(~0u, "wgmma.commit_group", &run_commit, nullptr, site); }
void wgmma_wait(int groups_left, Site site) { warp_op(~0u, "wgmma.wait_group", &run_wait, &groups_left, site); }
void fence_proxy_async() { check_proxy_fence(); }

}  // namespace emu
