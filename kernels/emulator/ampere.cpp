// The tensor-core and copy primitives of sm_80: cp.async, ldmatrix, mma.
#include <algorithm>

#include "runtime.h"

namespace emu {

// ---- cp.async: queued a thread, performed at the wait or at issue; the destination reads as NaN meanwhile

static void perform(const CopyOp& op) {
  unsigned char* d = worker->arena + op.dst;
  check_access(op.src, std::size_t(op.src_bytes), false);
  std::memcpy(d, op.src, std::size_t(op.src_bytes));
  std::memset(d + op.src_bytes, 0, std::size_t(op.size - op.src_bytes));
  check_async_end(op.dst, std::uint32_t(op.size), cur->id, cur->warp->clock.epoch[cur->warp->id]);
}

void cp_async(std::uint32_t dst, const void* src, int size, int src_bytes) {
  RuntimeScope scope;
  unsigned char* d = shared_pointer(dst, std::uint32_t(size), std::uint32_t(size), "cp.async");
  if (std::uintptr_t(src) & std::uintptr_t(size - 1)) fail("cp.async: global address %p is not %d-byte aligned", src, size);
  if (src_bytes < 0 || src_bytes > size) fail("cp.async: source size %d of a %d-byte copy", src_bytes, size);
  check_access(d, std::size_t(size), true);
  const CopyOp op{dst, src, size, src_bytes};
  if (perform_at_issue()) {
    perform(op);
    return;
  }
  std::memset(d, POISON, std::size_t(size));
  check_async_begin(dst, std::uint32_t(size));
  worker->copies[cur->id].ops.push_back(op);
}

void cp_async_commit() {
  CopyQueue& q = worker->copies[cur->id];
  q.groups.push_back(q.ops.size());
}

void cp_async_wait(int groups_left) {
  RuntimeScope scope;
  CopyQueue& q = worker->copies[cur->id];
  if (groups_left < 0) {
    groups_left = 0;
    q.groups.push_back(q.ops.size());
  }
  if (int(q.groups.size()) <= groups_left) return;
  const std::size_t done = q.groups.size() - std::size_t(groups_left), upto = q.groups[done - 1];
  for (std::size_t i = 0; i < upto; i++) perform(q.ops[i]);
  q.ops.erase(q.ops.begin(), q.ops.begin() + std::ptrdiff_t(upto));
  q.groups.erase(q.groups.begin(), q.groups.begin() + std::ptrdiff_t(done));
  for (std::size_t& end : q.groups) end -= upto;
}

void check_copies_drained() {
  CopyQueue& q = worker->copies[cur->id];
  if (!q.ops.empty()) fail("thread ends with cp.async still in flight");
  q.groups.clear();
}

// ---- ldmatrix

static std::atomic<std::uint64_t> ldmatrix_phases, ldmatrix_replays;

struct LdmatrixArg {
  std::uint32_t *r, address;
  int matrices;
};

template <bool Trans> static void run_ldmatrix(const WarpCall& call) {
  const int matrices = call.arg<LdmatrixArg>(0).matrices;
  Fiber* caller = cur;
  for (int m = 0; m < matrices; m++) {
    std::uint16_t tile[8][8];
    unsigned bank_group[8] = {}, worst = 0;
    for (int row = 0; row < 8; row++) {
      cur = call.lanes[m * 8 + row];   // an error is that lane's
      const std::uint32_t address = call.arg<LdmatrixArg>(m * 8 + row).address;
      const unsigned char* p = shared_pointer(address, 16, 16, "ldmatrix");
      check_access(p, 16, false);
      std::memcpy(tile[row], p, 16);
      worst = std::max(worst, ++bank_group[address >> 4 & 7]);
    }
    for (int lane = 0; lane < WARP_SIZE; lane++) {
      const int g = lane >> 2, t = (lane & 3) * 2;
      const std::uint16_t low = Trans ? tile[t][g] : tile[g][t], high = Trans ? tile[t + 1][g] : tile[g][t + 1];
      call.arg<LdmatrixArg>(lane).r[m] = std::uint32_t(low) | std::uint32_t(high) << 16;
    }
    ldmatrix_phases.fetch_add(1, std::memory_order_relaxed);
    ldmatrix_replays.fetch_add(worst - 1, std::memory_order_relaxed);
  }
  cur = caller;
}

void ldmatrix(std::uint32_t* r, std::uint32_t address, int matrices, bool trans, Site site) {
  LdmatrixArg arg{r, address, matrices};
  warp_op(~0u, trans ? "ldmatrix.trans" : "ldmatrix", trans ? &run_ldmatrix<true> : &run_ldmatrix<false>, &arg, site);
}

// ---- mma. Products and sums are fp32, k ascending; the hardware's order and rounding differ.

struct MmaArg {
  float* d;
  const std::uint32_t *a, *b;
};
typedef float Row8 __attribute__((vector_size(32)));

// d (16 x 8) += a (16 x K) b (K x 8), fragments in the layout all mma.m16n8 instructions share for C and D.
template <int K> static void multiply(const WarpCall& call, const float (&a)[16][K], const float (&b)[K][8]) {
  alignas(32) float c[16][8];
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const float* d = call.arg<MmaArg>(lane).d;
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int i = 0; i < 4; i++) c[g + (i >> 1) * 8][t + (i & 1)] = d[i];
  }
  for (int row = 0; row < 16; row++) {
    Row8 sum, column;
    std::memcpy(&sum, c[row], sizeof sum);
    for (int k = 0; k < K; k++) {
      std::memcpy(&column, b[k], sizeof column);
      sum += column * a[row][k];
    }
    std::memcpy(c[row], &sum, sizeof sum);
  }
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    float* d = call.arg<MmaArg>(lane).d;
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int i = 0; i < 4; i++) d[i] = c[g + (i >> 1) * 8][t + (i & 1)];
  }
}

// m16n8k16 of 16-bit elements that `to_float` reads, two in a register.
template <float (*to_float)(std::uint16_t)> static void run_mma_16(const WarpCall& call) {
  const auto low = [](std::uint32_t pair) { return to_float(std::uint16_t(pair)); };
  const auto high = [](std::uint32_t pair) { return to_float(std::uint16_t(pair >> 16)); };
  alignas(32) float a[16][16], b[16][8];
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const MmaArg& m = call.arg<MmaArg>(lane);
    const int g = lane >> 2, t = (lane & 3) * 2;
    for (int i = 0; i < 4; i++) {
      const int row = g + (i & 1) * 8, k = t + (i >> 1) * 8;
      a[row][k] = low(m.a[i]);
      a[row][k + 1] = high(m.a[i]);
    }
    for (int i = 0; i < 2; i++) {
      b[t + i * 8][g] = low(m.b[i]);
      b[t + i * 8 + 1][g] = high(m.b[i]);
    }
  }
  multiply<16>(call, a, b);
}

static void run_mma_tf32(const WarpCall& call) {
  const auto tf32 = [](std::uint32_t bits) {   // the hardware ignores the low 13 bits
    bits &= 0xffffe000u;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  };
  alignas(32) float a[16][8], b[8][8];
  for (int lane = 0; lane < WARP_SIZE; lane++) {
    const MmaArg& m = call.arg<MmaArg>(lane);
    const int g = lane >> 2, t = lane & 3;
    for (int i = 0; i < 4; i++) a[g + (i & 1) * 8][t + (i >> 1) * 4] = tf32(m.a[i]);
    for (int i = 0; i < 2; i++) b[t + i * 4][g] = tf32(m.b[i]);
  }
  multiply<8>(call, a, b);
}

void mma_bf16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  MmaArg arg{d, a, b};
  warp_op(~0u, "mma.m16n8k16.bf16", &run_mma_16<bf16_to_float>, &arg, site);
}

void mma_f16(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  MmaArg arg{d, a, b};
  warp_op(~0u, "mma.m16n8k16.f16", &run_mma_16<f16_to_float>, &arg, site);
}

void mma_tf32(float* d, const std::uint32_t* a, const std::uint32_t* b, Site site) {
  MmaArg arg{d, a, b};
  warp_op(~0u, "mma.m16n8k8.tf32", &run_mma_tf32, &arg, site);
}

}  // namespace emu

extern "C" void rm_emu_ldmatrix_stats(std::uint64_t* phases, std::uint64_t* replays) {
  *phases = emu::ldmatrix_phases.exchange(0);
  *replays = emu::ldmatrix_replays.exchange(0);
}
