// Attention of flash.cuh with the warpgroup products of sm_90, for bf16 and heads of 64: four warps work on 64 rows at a time, and no
// operand passes through registers but probabilities. Masks, queries, dropout and the order of the softmax are those of flash.cuh.
//
// A tile of 64 rows is 64 x 128 bytes, and flash's permutation of its chunks is exactly the 128-byte swizzle of wgmma: cp.async fills
// tiles as before (TMA would save two instructions in a hundred, and could neither form queries nor end at a sequence), a proxy fence
// hands them over. An operand is K-major where sums run along a row, else MN-major.
#pragma once
#include "flash.cuh"

#if !defined(RM_SIGNATURES)

namespace flash {
namespace hopper {

constexpr int D = 64, GROUP = 128;            // threads of a warpgroup
constexpr uint32_t TILE_BYTES = TILE * 128;   // 8 KB

// ---- products. `x` are accumulators as everywhere in flash.cuh, M = 1.

template <int N> using Flat = float (&)[4 * N];
template <int N> __device__ __forceinline__ Flat<N> flat(float (&x)[1][N][4]) { return reinterpret_cast<Flat<N>>(x); }

__device__ __forceinline__ uint64_t along_rows(uint32_t tile, int k) { return wgmma_descriptor_128b(tile + uint32_t(k) * 32, 16, 1024); }
__device__ __forceinline__ uint64_t across_rows(uint32_t tile, int k) {
  return wgmma_descriptor_128b(tile + uint32_t(k) * 2048, TILE_BYTES, 1024);
}

// x [64, 8 N] (=) a . b [+ x], 16 of the sum at a time.
template <int TA, int TB> __device__ __forceinline__ void add(float (&x)[1][8][4], uint64_t a, uint64_t b, int accumulate) {
  wgmma_m64n64k16<TA, TB>(flat(x), a, b, accumulate);
}
template <int TA, int TB> __device__ __forceinline__ void add(float (&x)[1][4][4], uint64_t a, uint64_t b, int accumulate) {
  wgmma_m64n32k16<TA, TB>(flat(x), a, b, accumulate);
}

// Begins x = rows . columns^T over D: 64 rows and 8 N columns at 1024-byte and 4096-byte aligned addresses.
template <int N> __device__ __forceinline__ void begin_scores(float (&x)[1][N][4], uint32_t rows, uint32_t columns) {
#pragma unroll
  for (int k = 0; k < D / 16; k++) add<0, 0>(x, along_rows(rows, k), along_rows(columns, k), k > 0);
  wgmma_commit();
}

// Probabilities or their gradients [64, 8 N], rounded, as left operands.
template <int N> struct Fragments { uint32_t k[N / 2][4]; };
template <int N> __device__ __forceinline__ void pack(Fragments<N>& a, const float (&x)[1][N][4]) {
#pragma unroll
  for (int k = 0; k < N / 2; k++)
#pragma unroll
    for (int i = 0; i < 4; i++) a.k[k][i] = pack_bf16(x[0][2 * k + (i >> 1)][2 * (i & 1)], x[0][2 * k + (i >> 1)][2 * (i & 1) + 1]);
}

// Begins sum [64, D] += a . the 8 N rows at `rows`.
template <int N> __device__ __forceinline__ void begin_sum(float (&sum)[1][D / 8][4], const Fragments<N>& a, uint32_t rows) {
#pragma unroll
  for (int k = 0; k < N / 2; k++) wgmma_m64n64k16_ra<1>(flat(sum), a.k[k], across_rows(rows, k), 1);
}

// ---- accumulators to memory

// Of words w[n] in each of the four lanes of a row, lane t gets w[t] of lanes 0, 1, 2, 3.
__device__ __forceinline__ uint4 exchange(const uint32_t (&w)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  const uint32_t r0 = __shfl_xor_sync(FULL_MASK, odd ? w[0] : w[1], 1);
  const uint32_t r1 = __shfl_xor_sync(FULL_MASK, odd ? w[2] : w[3], 1);
  const uint32_t a0 = odd ? r0 : w[0], a1 = odd ? w[1] : r0, a2 = odd ? r1 : w[2], a3 = odd ? w[3] : r1;
  const uint32_t s0 = __shfl_xor_sync(FULL_MASK, high ? a0 : a2, 2);
  const uint32_t s1 = __shfl_xor_sync(FULL_MASK, high ? a1 : a3, 2);
  return high ? make_uint4(s0, s1, a2, a3) : make_uint4(a0, a1, s0, s1);
}

// Writes (=) x [16 of a warp, 8 N], rows times their factors, to the first `rows` rows at `to`: 16 bytes a lane.
template <int N>
__device__ __forceinline__ void store_rows(bf16* to, size_t stride, int rows, const float (&x)[1][N][4], const float (&factor)[2]) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int n = 0; n < N; n += 4) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) words[i] = pack_bf16(x[0][n + i][2 * r] * factor[r], x[0][n + i][2 * r + 1] * factor[r]);
      const uint4 chunk = exchange(words);
      if (8 * r + g < rows) *reinterpret_cast<uint4*>(to + size_t(8 * r + g) * stride + 8 * (n + t)) = chunk;
    }
}

// All copies of the thread have arrived, where products may read them after the barrier that follows.
__device__ __forceinline__ void hand_over() {
  cp_async_wait_all();
  fence_async_shared();
}

// ---- forward

template <int GROUPS> using ForwardPlan = Plan<bf16, D, 4 * GROUPS, 1, false, 64, 32>;

// As flash::forward. A warpgroup owns 64 queries; the block's share keys and values.
template <int GROUPS, class Queries, class Mask>
__device__ __forceinline__ void forward(bf16* out, float* lse, const Queries& queries, const View<bf16>& k, const View<bf16>& v,
                                        const Mask& mask, const Item& item, const AttentionBatch& batch, const Drop& drop, int heads,
                                        unsigned char* smem) {
  using P = ForwardPlan<GROUPS>;
  const Layout<P, 1> shared{smem};
  const int first = item.first_row + item.tile * TILE, rows = min(P::OWN, item.rows - item.tile * TILE);
  const int lane = lane_id(), group = warp_id() / 4, warp_row = warp_id() * 16, warp_rows = rows - warp_row;
  const bool works = rows > group * TILE;   // the whole warpgroup or none of it: products are its common work
  queries.template load<P::OWN>(shared.own(0), first, rows);

  const uint32_t* positions = batch.position + first + warp_row;
  typename Mask::template Rows<1> seen;
  mask.begin(seen, positions, warp_rows);
  const int drop_row = lane & 15;
  const uint32_t drop_position = drop.threshold && drop_row < warp_rows ? positions[drop_row] : 0;

  const uint32_t q = smem_u32(shared.own(0)) + uint32_t(group) * TILE_BYTES;
  Softmax<1> softmax;
  float o[1][D / 8][4];
  zero(o);
  const int tiles = tiles_of(item.keys);
  const auto load = [&](int tile, int stage) {
    load_tile<bf16, D>(shared.streamed(stage, 0), k, tile * TILE, item.keys - tile * TILE);
    load_tile<bf16, D>(shared.streamed(stage, 1), v, tile * TILE, item.keys - tile * TILE);
  };
  if (tiles > 0) load(0, 0);
  hand_over();
  __syncthreads();
  for (int tile = 0; tile < tiles; tile++) {
    const int stage = tile & 1;
    if (tile + 1 < tiles) load(tile + 1, stage ^ 1);
    if (works) {
      steps<P>(min(TILE, item.keys - tile * TILE), [&](auto number, int column) {
        constexpr int N = decltype(number)::VALUE;
        const int key = tile * TILE + column;
        const uint32_t at = uint32_t(column) * 128;
        float s[1][N][4];
        wgmma_fence();
        begin_scores(s, q, smem_u32(shared.streamed(stage, 0)) + at);
        wgmma_wait<0>();
        if (mask.cuts(key, 8 * N))
          each_seen<1, N>(mask, seen, key, [&](int m, int n, int e, bool sees) { s[m][n][e] = sees ? s[m][n][e] : -INFINITY; });
        softmax.add(s, o, Scale<D>::LOG2);
        if (drop.threshold)
          each_kept<1, N, false>(
              drop, shared.random(), key, [&](int) { return drop_position; },
              [&](int m, int n, int e, bool kept) { s[m][n][e] = kept ? s[m][n][e] : 0.f; });
        Fragments<N> p;
        pack(p, s);
        wgmma_fence();
        begin_sum(o, p, smem_u32(shared.streamed(stage, 1)) + at);
        wgmma_commit();
        wgmma_wait<0>();
      });
    }
    hand_over();
    __syncthreads();
  }
  if (warp_rows <= 0) return;

  softmax.finish();
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const float sum = softmax.sum[0][r];
    const int row = 8 * r + (lane >> 2);
    factor[r] = sum > 0.f ? drop.scale / sum : 0.f;
    if ((lane & 3) == 0 && row < warp_rows)
      lse[size_t(first + warp_row + row) * size_t(heads) + size_t(item.head)] =
          sum > 0.f ? softmax.top[0][r] * Scale<D>::SCORE + logf(sum) : INFINITY;
  }
  const size_t stride = size_t(heads) * D;
  store_rows(out + size_t(first + warp_row) * stride + size_t(item.head) * D, stride, warp_rows, o, factor);
}

}  // namespace hopper
}  // namespace flash

#include "flash_hopper_backward.cuh"

#endif
