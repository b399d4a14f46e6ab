// Exact top-k search: for each query the k best of all rows seen so far, over any number of blocks of rows. Scores exist only as tiles in
// registers; what may belong to the best is written to a bounded list, and merged now and then.
//
//   s[b, i] = q[b] . x[i]      order: s descending, then number of the row ascending      best[b, 0 .. k] = the first k of that order
//
// q [Q, W], x [N, W], f32 or f16, W a multiple of 8, 16-byte aligned, no NaN. A score is one sum in f32 whose order depends on W alone,
// and (score, number) orders rows strictly: results are the same bits whatever blocks the rows came in and however threads were scheduled.
//
// topk_clear     scores [Q, k] (=): -inf, rows [Q, k] (=): all bits set, counts [Q] (=): 0. Grid ceil(Q k / 256), block 256.
// topk_scan_*    candidates [Q, capacity] (+): the rows of x that come before the k-th best of `scores` and `rows`, as keys, behind the
//                counts[b] (+=) that are there, in any order. counts[b] + N <= capacity must hold before: then nothing can overflow.
//                Grid: any number of blocks, block 256; each takes every gridDim.x-th tile, queries fastest, so that one piece of x is
//                read from memory once. Dynamic shared memory `stages` (ROWS + COLUMNS) 128 bytes: with 2 stages 98,304 for f16 and 32,768
//                for f32, which fits the 99 KB of sm_86 and sm_89; with 3 stages 147,456 and 49,152. Scores do not depend on the stages.
// topk_merge     where counts[b] > trigger: scores, rows [Q, k] (=) sorted, the best of themselves and the candidates; counts[b] (=): 0.
//                Grid Q, block 512. Dynamic shared memory 16 `size` bytes; `size` is a power of two, at least k and 32.
//
// A tile is 128 queries by 256 rows for f16, 64 by 64 for f32: 85 FLOP a byte of L2, and one cycle of shared memory an mma. 2 Q N W FLOP.
// After s rows in any random order a window of n more brings about k n / s candidates of 8 bytes: nothing beside reading x.
// Products of two f16 are exact in f32; tensor cores add them up. f32 is the exact path for what f16 would round, on ordinary FMA.
#include "contrastive.cuh"

// The best so far, and what may join them.
struct TopKState {
  float* scores;           // [Q, k] descending; -inf where fewer rows were seen
  uint32_t* rows;          // [Q, k] their numbers; all bits set where fewer rows were seen
  uint64_t* candidates;    // [Q, capacity] keys
  uint32_t* counts;        // [Q] candidates of each query
  int k;
  int capacity;
};

#if !defined(RM_SIGNATURES)

constexpr int TK_MERGE_THREADS = 512;
constexpr uint32_t TK_NO_ROW = 0xffffffffu;

// Larger for what comes earlier in the order: the score's bits, monotonic as an unsigned number, then the row's complement.
__device__ __forceinline__ uint64_t tk_key(float score, uint32_t row) {
  const uint32_t bits = __float_as_uint(score == 0.f ? 0.f : score), sign = bits >> 31;
  return uint64_t(bits ^ (sign ? 0xffffffffu : 0x80000000u)) << 32 | uint64_t(~row);
}
__device__ __forceinline__ float tk_score(uint64_t key) {
  const uint32_t bits = uint32_t(key >> 32);
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ uint32_t tk_row(uint64_t key) { return ~uint32_t(key); }

// A tile of scores, ROWS x COLUMNS over the block; a thread holds R x N of them. GROUP neighbouring lanes share a row.
template <class T> struct TkTile;

// f16: warps of 64 rows by 64 columns, in mma fragments.
template <> struct TkTile<f16> {
  static constexpr int ROWS = 128, COLUMNS = 256, R = 8, N = 16, GROUP = 4;
  float acc[4][8][4];

  __device__ static __forceinline__ int first_row() { return warp_id() / 4 * 64; }
  __device__ static __forceinline__ int first_column() { return warp_id() % 4 * 64; }
  __device__ static __forceinline__ int row(int r) { return first_row() + r / 2 * 16 + r % 2 * 8 + lane_id() / 4; }
  __device__ static __forceinline__ int column(int n) { return first_column() + n / 2 * 8 + lane_id() % 4 * 2 + n % 2; }
  __device__ __forceinline__ float at(int r, int n) const { return acc[r / 2][n / 2][r % 2 * 2 + n % 2]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < 128; i++) acc[i / 32][i / 4 % 8][i % 4] = 0.f;
  }
  // += q xᵀ over one chunk.
  __device__ __forceinline__ void multiply(const unsigned char* q, const unsigned char* x) {
    const int lane = lane_id();
    const uint32_t q_at = smem_u32(q) + cl_unit(first_row() + lane % 16, lane / 16);
    const uint32_t x_at = smem_u32(x) + cl_unit(first_column() + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint32_t a[4][4];
#pragma unroll
      for (int m = 0; m < 4; m++) ldmatrix_x4(a[m], cl_further(q_at, 2 * k) + m * 2048);
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        uint32_t b[4];
        ldmatrix_x4(b, cl_further(x_at, 2 * k) + pair * 2048);
#pragma unroll
        for (int m = 0; m < 4; m++) {
          mma_f16(acc[m][2 * pair], a[m], b[0], b[1]);
          mma_f16(acc[m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// f32: threads of 4 rows by 4 columns, 16 apart; columns of the sum in ascending order.
template <> struct TkTile<float> {
  static constexpr int ROWS = 64, COLUMNS = 64, R = 4, N = 4, GROUP = 16;
  float acc[R][N];

  __device__ static __forceinline__ int row(int r) { return int(threadIdx.x) / 16 + 16 * r; }
  __device__ static __forceinline__ int column(int n) { return int(threadIdx.x) % 16 + 16 * n; }
  __device__ __forceinline__ float at(int r, int n) const { return acc[r][n]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < R * N; i++) acc[i / N][i % N] = 0.f;
  }
  __device__ __forceinline__ void multiply(const unsigned char* q, const unsigned char* x) {
#pragma unroll
    for (int unit = 0; unit < 8; unit++) {
      float4 a[R];
#pragma unroll
      for (int r = 0; r < R; r++) a[r] = *reinterpret_cast<const float4*>(q + cl_unit(row(r), unit));
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float4 b = *reinterpret_cast<const float4*>(x + cl_unit(column(n), unit));
#pragma unroll
        for (int r = 0; r < R; r++) {
          acc[r][n] += a[r].x * b.x;
          acc[r][n] += a[r].y * b.y;
          acc[r][n] += a[r].z * b.z;
          acc[r][n] += a[r].w * b.w;
        }
      }
    }
  }
};

// The chunks of a block's tiles in the order of their use, a ring of pairs: queries, then rows.
template <class T> struct TkStream {
  using Tile = TkTile<T>;
  static constexpr int STAGE = (Tile::ROWS + Tile::COLUMNS) * 128;
  const T* q;
  const T* x;
  unsigned char* ring;
  int Q, N, W, stages, chunks, query_tiles, tiles;   // stages: 2 or 3
  int tile, chunk, stage;   // what is copied next, and where

  __device__ __forceinline__ void issue() {
    if (tile < tiles) {
      unsigned char* const to = ring + stage * STAGE;
      cl_load<Tile::ROWS>(to, q, tile % query_tiles * Tile::ROWS, Q, chunk, W);
      cl_load<Tile::COLUMNS>(to + Tile::ROWS * 128, x, tile / query_tiles * Tile::COLUMNS, N, chunk, W);
      chunk++;
      if (chunk == chunks) chunk = 0, tile += int(gridDim.x);
    }
    stage = stage + 1 == stages ? 0 : stage + 1;
    cp_async_commit();
  }
  __device__ __forceinline__ void start() {
    for (int i = 0; i < stages - 1; i++) issue();
  }
  // The next chunk, when all threads are done with the one before.
  __device__ __forceinline__ const unsigned char* next() {
    if (stages == 2) {
      cp_async_wait<0>();
    } else {
      cp_async_wait<1>();
    }
    __syncthreads();
    issue();
    return ring + stage * STAGE;
  }
};

// Appends what of a tile comes before its query's k-th best. Whole warps call it: the lanes of a row share one atomic.
template <class T>
__device__ __forceinline__ void tk_filter(const TopKState& state, const TkTile<T>& tile, int first_query, int first_column, int Q, int N,
                                          uint32_t first_row) {
  using Tile = TkTile<T>;
  float worst[Tile::R];
#pragma unroll
  for (int r = 0; r < Tile::R; r++) {
    const int query = first_query + Tile::row(r);
    worst[r] = query < Q ? state.scores[size_t(query) * size_t(state.k) + size_t(state.k - 1)] : INFINITY;
  }
#pragma unroll
  for (int r = 0; r < Tile::R; r++) {
    uint32_t hits = 0;
#pragma unroll
    for (int n = 0; n < Tile::N; n++) hits |= (tile.at(r, n) >= worst[r] ? 1u : 0u) << n;
    if (!__any_sync(FULL_MASK, hits != 0)) continue;
    const int query = first_query + Tile::row(r), lane = lane_id() % Tile::GROUP;
    if (hits != 0) {
      // Past the last query nothing counts; equal scores are decided by the number of the row.
      const uint32_t worst_row = query < Q ? state.rows[size_t(query) * size_t(state.k) + size_t(state.k - 1)] : 0u;
#pragma unroll
      for (int n = 0; n < Tile::N; n++) {
        const int column = first_column + Tile::column(n);
        const bool before = tile.at(r, n) > worst[r] || first_row + uint32_t(column) < worst_row;
        if (query >= Q || column >= N || !before) hits &= ~(1u << n);
      }
    }
    const int own = __popc(hits);
    int end = own;
#pragma unroll
    for (int lanes = 1; lanes < Tile::GROUP; lanes *= 2) {
      const int below = __shfl_up_sync(FULL_MASK, end, lanes, Tile::GROUP);
      if (lane >= lanes) end += below;
    }
    uint32_t base = 0;
    if (lane == Tile::GROUP - 1 && end > 0) base = atomicAdd(state.counts + query, uint32_t(end));
    base = __shfl_sync(FULL_MASK, base, Tile::GROUP - 1, Tile::GROUP);
    if (hits == 0) continue;
    uint64_t* to = state.candidates + size_t(query) * size_t(state.capacity) + size_t(base) + size_t(end - own);
#pragma unroll
    for (int n = 0; n < Tile::N; n++) {
      if (hits >> n & 1u) *to++ = tk_key(tile.at(r, n), first_row + uint32_t(first_column + Tile::column(n)));
    }
  }
}

template <class T>
__device__ __forceinline__ void topk_scan(const TopKState& state, const T* q, const T* x, int Q, int N, int W, uint32_t first_row,
                                          int stages) {
  using Tile = TkTile<T>;
  RM_DYN_SMEM(smem);
  const int chunks = (W + CL_CHUNK<T> - 1) / CL_CHUNK<T>, query_tiles = (Q + Tile::ROWS - 1) / Tile::ROWS;
  const int tiles = query_tiles * ((N + Tile::COLUMNS - 1) / Tile::COLUMNS);
  TkStream<T> stream{q, x, smem, Q, N, W, stages, chunks, query_tiles, tiles, int(blockIdx.x), 0, 0};
  stream.start();
  for (int t = int(blockIdx.x); t < tiles; t += int(gridDim.x)) {
    Tile tile;
    tile.clear();
    for (int chunk = 0; chunk < chunks; chunk++) {
      const unsigned char* const both = stream.next();
      tile.multiply(both, both + Tile::ROWS * 128);
    }
    tk_filter<T>(state, tile, t % query_tiles * Tile::ROWS, t / query_tiles * Tile::COLUMNS, Q, N, first_row);
  }
  cp_async_wait_all();
}

// Compares and exchanges pairs `apart` from each other of keys[0 .. size]; runs of `run` keys alternate between ascending and descending,
// the first ascending unless `flip`.
__device__ __forceinline__ void tk_exchange(uint64_t* keys, int size, int apart, int run, bool flip) {
  __syncthreads();
  for (int pair = int(threadIdx.x); pair < size / 2; pair += TK_MERGE_THREADS) {
    const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
    const uint64_t a = keys[low], b = keys[high];
    if ((a > b) == (((low & run) == 0) != flip)) keys[low] = b, keys[high] = a;
  }
}

#endif

extern "C" __global__ void __launch_bounds__(256) topk_clear(const TopKState state, int Q) {
  const size_t at = size_t(blockIdx.x) * 256 + threadIdx.x;
  if (at < size_t(Q)) state.counts[at] = 0;
  if (at >= size_t(Q) * size_t(state.k)) return;
  state.scores[at] = -INFINITY;
  state.rows[at] = TK_NO_ROW;
}
RM_EXPORT(topk_clear)

extern "C" __global__ void __launch_bounds__(512) topk_merge(const TopKState state, int size, uint32_t trigger) {
  RM_DYN_SMEM(lists);
  uint64_t* const best = smem_at<uint64_t>(lists, 0);
  uint64_t* const chunk = best + size;
  const int query = int(blockIdx.x), tid = int(threadIdx.x);
  const uint32_t count = state.counts[query];
  if (count <= trigger) return;
  const uint64_t nothing = tk_key(-INFINITY, TK_NO_ROW);
  const size_t first = size_t(query) * size_t(state.k);
  const uint64_t* const from = state.candidates + size_t(query) * size_t(state.capacity);
  for (int i = tid; i < size; i += TK_MERGE_THREADS) {
    best[i] = i < state.k ? tk_key(state.scores[first + size_t(i)], state.rows[first + size_t(i)]) : nothing;
  }
  for (uint32_t start = 0; start < count; start += uint32_t(size)) {
    // Few candidates are sorted in the last `part` places only.
    const int here = int(min(count - start, uint32_t(size)));
    int part = 32;
    while (part < here) part *= 2;
    for (int i = tid; i < size; i += TK_MERGE_THREADS) {
      const int at = i - (size - part);
      chunk[i] = at >= 0 && at < here ? from[start + uint32_t(at)] : nothing;
    }
    uint64_t* const sorted = chunk + (size - part);
    for (int run = 2; run <= part; run *= 2) {
      for (int apart = run / 2; apart > 0; apart /= 2) tk_exchange(sorted, part, apart, run, false);
    }
    __syncthreads();
    // The larger of a descending and an ascending list, place by place, are the best of both, and bitonic.
    for (int i = tid; i < size; i += TK_MERGE_THREADS) best[i] = max(best[i], chunk[i]);
    for (int apart = size / 2; apart > 0; apart /= 2) tk_exchange(best, size, apart, size, true);
  }
  __syncthreads();
  for (int i = tid; i < state.k; i += TK_MERGE_THREADS) {
    state.scores[first + size_t(i)] = tk_score(best[i]);
    state.rows[first + size_t(i)] = tk_row(best[i]);
  }
  if (tid == 0) state.counts[query] = 0;
}
RM_EXPORT_HOT(topk_merge)

#define RM_TOPK_SCAN(name, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(256)                                                                  \
      name(const TopKState state, const T* q, const T* x, int Q, int N, int W, uint32_t first_row, int stages) {     \
    topk_scan<T>(state, q, x, Q, N, W, first_row, stages);                                                           \
  }                                                                                                                  \
  RM_EXPORT_HOT(name)

RM_TOPK_SCAN(topk_scan_f32, float)
RM_TOPK_SCAN(topk_scan_f16, f16)
