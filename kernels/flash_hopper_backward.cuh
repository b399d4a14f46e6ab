// The backward of flash_hopper.cuh in one pass: a block owns a head of a sequence. Keys stay in blocks of 64 a warpgroup, whose dK and
// dV are its accumulators, and all queries stream past each; five products, scores and dropout once. dQ is summed over the blocks of
// keys in shared memory, every element by the one thread that adds to it: no atomics, one order of summation.
#pragma once

namespace flash {
namespace hopper {

// Shared memory, for sequences of up to 64 * `tiles` rows:
//   K, V          64 * GROUPS rows each
//   Q, dO         a tile each, two stages
//   dS            64 * GROUPS keys x 64 queries
//   random bits   512 bytes a warp
//   lse, delta, position of each query, and which of the block's keys it sees (2 * GROUPS words)
//   dQ            a tile of f32 for each 64 queries, where keys take more than one block
template <int GROUPS> struct BackwardLayout {
  static constexpr int THREADS = GROUP * GROUPS, KEYS = TILE * GROUPS, WORDS = 2 * GROUPS, OWN = GROUPS * int(TILE_BYTES);
  static constexpr int STREAMED = 2 * OWN, GRADIENTS = STREAMED + 4 * int(TILE_BYTES), RANDOM = GRADIENTS + OWN;
  static constexpr int QUERIES = RANDOM + 512 * 4 * GROUPS, QUERY = 12 + 4 * WORDS;
  unsigned char* smem;
  int tiles;
  __device__ __forceinline__ unsigned char* keys() const { return smem; }
  __device__ __forceinline__ unsigned char* values() const { return smem + OWN; }
  __device__ __forceinline__ unsigned char* queries(int stage) const { return smem + STREAMED + 2 * stage * int(TILE_BYTES); }
  __device__ __forceinline__ unsigned char* dout(int stage) const { return queries(stage) + TILE_BYTES; }
  __device__ __forceinline__ unsigned char* gradients() const { return smem + GRADIENTS; }
  __device__ __forceinline__ unsigned char* random() const { return smem + RANDOM + warp_id() * 512; }
  __device__ __forceinline__ float* lse() const { return smem_at<float>(smem, uint32_t(QUERIES)); }
  __device__ __forceinline__ float* delta() const { return lse() + TILE * tiles; }
  __device__ __forceinline__ uint32_t* position() const { return smem_at<uint32_t>(smem, uint32_t(QUERIES + 8 * TILE * tiles)); }
  __device__ __forceinline__ uint32_t* visible(int word) const { return position() + TILE * tiles * (1 + word); }
  // The thread's own elements of dQ of a tile.
  __device__ __forceinline__ float4* sum(int tile) const {
    return smem_at<float4>(smem, uint32_t(QUERIES + QUERY * TILE * tiles + tile * TILE * D * 4)) + threadIdx.x;
  }
};

// lse in units of log2, delta = rowsum(dout * out) and position of every query; zero and +inf past the last.
template <class Shared>
__device__ __forceinline__ void load_queries(const Shared& shared, const bf16* out, const Saved<bf16>& saved, const Item& item,
                                             const uint32_t* position, int heads) {
  const int lane = lane_id() & 3, count = tiles_of(item.rows) * TILE;
  const size_t stride = size_t(heads) * D, corner = size_t(item.first_row) * stride + size_t(item.head) * D;
  for (int row = int(threadIdx.x) / 4; row < count; row += Shared::THREADS / 4) {
    const bool inside = row < item.rows;
    float sum = 0.f;
#pragma unroll
    for (int c = 8 * lane; c < D; c += 32) {
      float x[8] = {}, y[8] = {};
      if (inside) {
        load8(x, out + corner + size_t(row) * stride + c);
        load8(y, saved.dout + corner + size_t(row) * stride + c);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
    }
    sum += __shfl_xor_sync(FULL_MASK, sum, 1);
    sum += __shfl_xor_sync(FULL_MASK, sum, 2);
    if (lane != 0) continue;
    const size_t at = size_t(item.first_row + row) * size_t(heads) + size_t(item.head);
    shared.lse()[row] = inside ? saved.lse[at] * LOG2E : INFINITY;
    shared.delta()[row] = sum;
    shared.position()[row] = inside ? position[item.first_row + row] : 0;
  }
}

// dq [R, C], dk and dv [T, C] (rows of their strides) of one head of one sequence. `k`, `v`, `dk` and `dv` begin at the sequence's
// first key, `dq` at its first query.
template <int GROUPS, class Queries, class Mask>
__device__ __forceinline__ void backward(bf16* dq, int dq_stride, bf16* dk, bf16* dv, int dkv_stride, const bf16* out,
                                         const Saved<bf16>& saved, const Queries& queries, const View<bf16>& k, const View<bf16>& v,
                                         const Mask& mask, const Item& item, const AttentionBatch& batch, const Drop& drop, int heads,
                                         unsigned char* smem, int tiles) {
  using Shared = BackwardLayout<GROUPS>;
  constexpr int KEYS = Shared::KEYS, WIDTH = D / GROUPS / 8;   // a warpgroup makes 8 WIDTH columns of dQ
  const Shared shared{smem, tiles};
  const int lane = lane_id(), g = lane >> 2, t = lane & 3, group = warp_id() / 4, warp_row = warp_id() * 16;
  const int query_tiles = tiles_of(item.rows), key_blocks = (item.keys + KEYS - 1) / KEYS;
  const View<bf16> dout{saved.dout + size_t(item.head) * D, heads * D};
  const auto load = [&](int tile, int stage) {
    queries.template load<TILE>(shared.queries(stage), item.first_row + tile * TILE, item.rows - tile * TILE);
    load_tile<bf16, D>(shared.dout(stage), dout, item.first_row + tile * TILE, item.rows - tile * TILE);
  };
  const auto load_keys = [&](int first) {
    load_tile<bf16, D, KEYS>(shared.keys(), k, first, item.keys - first);
    load_tile<bf16, D, KEYS>(shared.values(), v, first, item.keys - first);
  };
  load_keys(0);
  if (query_tiles > 0) load(0, 0);
  load_queries(shared, out, saved, item, batch.position, heads);

  const uint32_t own_keys = smem_u32(shared.keys()) + uint32_t(group) * TILE_BYTES;
  const uint32_t own_values = smem_u32(shared.values()) + uint32_t(group) * TILE_BYTES;
  unsigned char* const own_gradients = shared.gradients() + warp_row * 128;
  for (int block = 0; block < key_blocks; block++) {
    const int first = block * KEYS, keys = min(KEYS, item.keys - first), own = keys - warp_row;
    const bool works = keys > group * TILE;
    if (Mask::COLUMNS) {
      __syncthreads();   // positions are there
      for (int i = int(threadIdx.x); i < query_tiles * TILE * Shared::WORDS; i += Shared::THREADS) {
        const int row = i / Shared::WORDS, word = i % Shared::WORDS;
        shared.visible(word)[row] = row < item.rows ? mask.column(int(shared.position()[row]), first + 32 * word) : 0;
      }
    }
    if (!works)   // no gradients of keys that are not there
      for (int i = lane; i < 16 * 8; i += WARP) *reinterpret_cast<uint4*>(own_gradients + 16 * i) = make_uint4(0, 0, 0, 0);
    float sum_k[1][D / 8][4], sum_v[1][D / 8][4];
    zero(sum_k);
    zero(sum_v);
    hand_over();
    __syncthreads();
    for (int tile = 0; tile < query_tiles; tile++) {
      const int stage = tile & 1;
      if (tile + 1 < query_tiles) load(tile + 1, stage ^ 1);
      const uint32_t q = smem_u32(shared.queries(stage)), d_out = smem_u32(shared.dout(stage));
      // Of a tile with at most 32 queries the other columns are left out.
      const auto work = [&](auto number) {
        constexpr int N = decltype(number)::VALUE;
        float p[1][N][4], ds[1][N][4];
        wgmma_fence();
        begin_scores(p, own_keys, q);
        begin_scores(ds, own_values, d_out);
        wgmma_wait<1>();
        const float* const lse = shared.lse() + tile * TILE + 2 * t;
        const float* const delta = shared.delta() + tile * TILE + 2 * t;
        const uint32_t* const visible = shared.visible(warp_row >> 5) + tile * TILE + 2 * t;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const uint32_t sees = Mask::COLUMNS ? visible[8 * n + j] >> ((warp_row & 31) + g) : 0;
#pragma unroll
            for (int r = 0; r < 2; r++) {
              const float exponential = ex2(p[0][n][2 * r + j] * Scale<D>::LOG2 - lse[8 * n + j]);
              const bool seen = Mask::COLUMNS ? sees >> (8 * r) & 1 : 8 * r + g < own;
              p[0][n][2 * r + j] = seen ? exponential : 0.f;
            }
          }
        wgmma_wait<0>();
        const auto gradient = [&](int m, int n, int e, bool kept) {
          undrop(p[m][n][e], ds[m][n][e], delta[8 * n + (e & 1)], kept, drop.scale);
        };
        if (drop.threshold) {
          const uint32_t* const position = shared.position() + tile * TILE;
          each_kept<1, N, true>(
              drop, shared.random(), first + warp_row, [&](int query) { return position[query]; }, gradient);
        } else {
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) gradient(0, n, e, true);
        }
        Fragments<N> left, left_gradients;
        pack(left, p);
        pack(left_gradients, ds);
        wgmma_fence();
        begin_sum(sum_v, left, d_out);
        begin_sum(sum_k, left_gradients, q);
        wgmma_commit();
        // dS by rows of keys; the product that makes dQ of it reads columns.
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
          for (int r = 0; r < 2; r++)
            *reinterpret_cast<uint32_t*>(own_gradients + Tile<bf16, D>::at(8 * r + g, n) + 4 * t) =
                n < N ? left_gradients.k[n % N / 2][2 * (n & 1) + r] : 0;
      };
      if (works) {
        if (item.rows - tile * TILE > 32) work(Number<8>());
        else work(Number<4>());
      }
      fence_async_shared();
      __syncthreads();

      float sum[1][WIDTH][4];
      wgmma_fence();
      const uint32_t gradients = smem_u32(shared.gradients()), columns = smem_u32(shared.keys()) + uint32_t(16 * WIDTH * group);
#pragma unroll
      for (int i = 0; i < KEYS / 16; i++) add<1, 1>(sum, across_rows(gradients, i), across_rows(columns, i), i > 0);
      wgmma_commit();
      wgmma_wait<0>();
      float4* const partial = shared.sum(tile);
#pragma unroll
      for (int n = 0; n < WIDTH; n++) {
        float(&x)[4] = sum[0][n];
        if (block > 0) {
          const float4 before = partial[n * Shared::THREADS];
          x[0] += before.x, x[1] += before.y, x[2] += before.z, x[3] += before.w;
        }
        if (block + 1 < key_blocks) partial[n * Shared::THREADS] = make_float4(x[0], x[1], x[2], x[3]);
      }
      if (block + 1 == key_blocks) {
        const int row = tile * TILE + (warp_row & 63);
        const float factor[2] = {Scale<D>::SCORE, Scale<D>::SCORE};
        store_rows(dq + size_t(row) * size_t(dq_stride) + 8 * WIDTH * group, size_t(dq_stride), item.rows - row, sum, factor);
      }
      hand_over();
      __syncthreads();
    }
    if (block + 1 < key_blocks) {
      load_keys(first + KEYS);
      if (query_tiles > 0) load(0, 0);
    }
    const float factor_k[2] = {Scale<D>::SCORE, Scale<D>::SCORE}, factor_v[2] = {drop.scale, drop.scale};
    const size_t corner = size_t(first + warp_row) * size_t(dkv_stride);
    if (own > 0) {
      store_rows(dk + corner, size_t(dkv_stride), own, sum_k, factor_k);
      store_rows(dv + corner, size_t(dkv_stride), own, sum_v, factor_v);
    }
  }
}

}  // namespace hopper
}  // namespace flash
