// Attention by tiles with online softmax, forward and backward, for any mask and any source of queries.
//
// A block owns 64 or 128 rows of one head of one sequence and streams the other side past them, 64 rows at a time: queries own and
// keys stream in the forward and for dQ, keys own and queries stream for dK and dV. Each warp owns 16 M of the rows, so nothing is
// summed across warps or blocks and every result has one order of summation. Which sequence and tile a block works on stands in a table
// in device memory; a grid made for the largest batch serves every batch.
//
// A mask has
//   Rows<M>                         what a lane keeps of its own query rows; begin(rows, positions, count) fills it
//   cuts(key, n)                    whether any of keys key .. key + n is hidden from some query
//   word(rows, m, r, key)           bit i: the row sees key + i (key is a multiple of 16)
//   COLUMNS, column(position, key)  the word of the query at `position`, for blocks that own keys; not COLUMNS: all is seen
// and queries have load<ROWS>(tile, row, rows): fills ROWS rows of a tile with rows of the packed query matrix, the rest with zero.
#pragma once
#include "tile.cuh"

// ---- parameter structs

// A packed batch. Sequence s has query rows cu_rows[s] .. cu_rows[s + 1] and keys cu_seqlens[s] .. cu_seqlens[s + 1].
struct AttentionBatch {
  const uint32_t* cu_rows;      // [S + 1]
  const uint32_t* cu_seqlens;   // [S + 1]
  const uint32_t* position;     // [R] of each query row in its text
  const uint64_t* sample;       // [S] number of each sequence's sample, the name of its dropout
  const uint32_t* tiles;        // [tile_count, 2] sequence, and tile of 64 rows in it: of queries (forward, dq) or of keys (dkv)
  const int* tile_count;        // [1]
};

#if !defined(RM_SIGNATURES)

namespace flash {

constexpr float LOG2E = 1.4426950408889634f;
// 1 / sqrt(D), and the same in units of log2.
template <int D> struct Scale {
  static constexpr float SCORE = D == 32 ? 0.17677669529663687f : D == 64 ? 0.125f : 0.08838834764831843f;
  static constexpr float LOG2 = SCORE * LOG2E;
};

template <class T> struct Stages { static constexpr int COUNT = 2; };
// f32 tiles are large: with two stages, D = 128 would not fit the shared memory of sm_80.
template <> struct Stages<float> { static constexpr int COUNT = 1; };

// How a kernel cuts its work: warps of 16 M rows, left operands kept in registers or not, and how many streamed rows are worked on at
// once; STEP on whole tiles, REST (at most STEP) on what is left of a sequence, so that short ones waste little.
template <class T_, int D_, int WARPS_, int M_, bool KEPT_, int STEP_, int REST_> struct Plan {
  using T = T_;
  static constexpr int D = D_, WARPS = WARPS_, M = M_, STEP = STEP_, REST = REST_, STAGES = Stages<T>::COUNT, OWN = 16 * M * WARPS;
  static constexpr bool KEPT = KEPT_;
};

// Of the streamed queries; OWN keys may see each or not.
template <int OWN> struct Columns {
  static constexpr int WORDS = OWN / 32;
  float lse[TILE], delta[TILE];
  uint32_t position[TILE], visible[WORDS * TILE];
};

// Shared memory: COUNT blocks of the rows that are owned, then a pair of tiles a stage, then scratch.
template <class P, int COUNT> struct Layout {
  using L = Tile<typename P::T, P::D>;
  static constexpr int STREAMED = COUNT * P::OWN * L::ROW;
  static constexpr int RANDOM = STREAMED + 2 * P::STAGES * L::BYTES;   // 512 bytes a warp
  static constexpr int PRODUCT = RANDOM + 512 * P::WARPS;              // f32 only: 16 M rows a warp
  static constexpr int ROWS = P::M * 16 * (P::STEP + 4) * 4;
  static constexpr int COLUMNS = PRODUCT + (sizeof(typename P::T) == 4 ? P::WARPS * ROWS : 0);
  unsigned char* smem;
  __device__ __forceinline__ unsigned char* own(int i) const { return smem + i * P::OWN * L::ROW; }
  __device__ __forceinline__ unsigned char* streamed(int stage, int i) const { return smem + STREAMED + (2 * stage + i) * L::BYTES; }
  __device__ __forceinline__ unsigned char* random() const { return smem + RANDOM + warp_id() * 512; }
  __device__ __forceinline__ float* product() const { return smem_at<float>(smem, uint32_t(PRODUCT + warp_id() * ROWS)); }
  __device__ __forceinline__ Columns<P::OWN>* columns(int stage) const {
    return smem_at<Columns<P::OWN>>(smem, uint32_t(COLUMNS) + uint32_t(stage) * uint32_t(sizeof(Columns<P::OWN>)));
  }
};

// What a block works on.
struct Item {
  int sequence, head, tile;
  int first_row, rows;    // queries of the sequence: its first in the packed matrix, and how many
  int first_key, keys;
};

template <class P> __device__ __forceinline__ bool find(Item& item, const AttentionBatch& batch) {
  const int i = int(blockIdx.x);
  if (i >= *batch.tile_count) return false;
  const int s = int(batch.tiles[2 * i]);
  item.sequence = s;
  item.tile = int(batch.tiles[2 * i + 1]);
  if (item.tile % (P::OWN / TILE) != 0) return false;   // the block of an earlier tile owns this one too
  item.head = int(blockIdx.y);
  item.first_row = int(batch.cu_rows[s]);
  item.rows = int(batch.cu_rows[s + 1]) - item.first_row;
  item.first_key = int(batch.cu_seqlens[s]);
  item.keys = int(batch.cu_seqlens[s + 1]) - item.first_key;
  return true;
}

// ---- dropout

// Of the probabilities of one head of one sequence (`Dropout` in src/rng.rs: element head << 16 | key, eight keys a call).
struct Drop {
  uint32_t key0, key1, threshold, site, sample0, sample1, group;
  float scale;
  __device__ __forceinline__ Drop(const Dropout& d, uint32_t at, const AttentionBatch& batch, const Item& item)
      : key0(0), key1(0), threshold(d.threshold), site(at << 16), sample0(0), sample1(0), group(uint32_t(item.head) << 13),
        scale(threshold ? d.scale : 1.f) {
    if (threshold == 0) return;
    const uint64_t sample = batch.sample[item.sequence];
    key0 = d.key[0], key1 = d.key[1], sample0 = uint32_t(sample), sample1 = uint32_t(sample >> 32);
  }
  __device__ __forceinline__ uint4 bits(uint32_t position, uint32_t keys) const {
    return philox4x32(key0, key1, make_uint4(group + keys, position | site, sample0, sample1));
  }
};

// Calls f(m, n, e, kept) for the lane's elements x[m][n][e] of a product [16 M, 8 N]. `key` is the first key of its columns, or of its
// rows if OWN_KEYS; query(i) is the position of query i, counted along the other side.
//
// One Philox call makes the sixteen-bit randoms of eight keys and one query: a row of an 8x8 matrix. Each lane makes one row, and
// ldmatrix deals the four matrices out in the layout of the accumulators, transposed where keys are rows.
template <int M, int N, bool OWN_KEYS, class Query, class F>
__device__ __forceinline__ void each_kept(const Drop& drop, unsigned char* scratch, int key, Query query, F f) {
  constexpr int STEP = 2 / M;
  const int lane = lane_id(), i = lane & 7, r = lane >> 3 & 1, high = lane >> 4;
#pragma unroll
  for (int n = 0; n < N; n += STEP) {
    const int m = M == 2 ? high : 0, column = M == 2 ? n : n + high;
    const uint32_t position = OWN_KEYS ? query(8 * column + i) : query(16 * m + 8 * r + i);
    const uint32_t group = uint32_t(key >> 3) + uint32_t(OWN_KEYS ? 2 * m + r : column);
    *reinterpret_cast<uint4*>(scratch + 16 * lane) = drop.bits(position, group);
    __syncwarp();
    uint32_t words[4];
    if (OWN_KEYS) ldmatrix_x4_trans(words, smem_u32(scratch + 16 * lane));
    else ldmatrix_x4(words, smem_u32(scratch + 16 * lane));
    __syncwarp();
#pragma unroll
    for (int b = 0; b < 4; b++) {
      const int at_m = M == 2 ? b >> 1 : 0, at_n = M == 2 ? n : n + (b >> 1), e = 2 * (b & 1);
      f(at_m, at_n, e, (words[b] & 0xffffu) >= drop.threshold);
      f(at_m, at_n, e + 1, words[b] >> 16 >= drop.threshold);
    }
  }
}

// ---- the tile loop

template <int N> struct Number { static constexpr int VALUE = N; };

// load(tile, stage) begins to fill a stage; begin() runs once when the first has arrived; work(tile, stage) runs on each in turn, with
// the next on its way.
template <int STAGES, class Load, class Begin, class Work>
__device__ __forceinline__ void stream(int tiles, Load load, Begin begin, Work work) {
  if (tiles > 0) load(0, 0);
  cp_async_wait_all();
  __syncthreads();
  begin();
  for (int tile = 0; tile < tiles; tile++) {
    if (STAGES == 2) {
      if (tile + 1 < tiles) load(tile + 1, (tile + 1) & 1);
      work(tile, tile & 1);
    } else {
      work(tile, 0);
      __syncthreads();
      if (tile + 1 < tiles) load(tile + 1, 0);
    }
    cp_async_wait_all();
    __syncthreads();
  }
}

// Calls f(Number<N>, column) on eight times N of `columns` streamed rows at a time.
template <class P, class F> __device__ __forceinline__ void steps(int columns, F f) {
#pragma unroll 1
  for (int column = 0; column < columns;) {
    if (P::STEP == P::REST || columns - column >= P::STEP) {
      f(Number<P::STEP / 8>(), column);
      column += P::STEP;
    } else {
      f(Number<P::REST / 8>(), column);
      column += P::REST;
    }
  }
}

__device__ __forceinline__ int tiles_of(int rows) { return (rows + TILE - 1) / TILE; }

// ---- masks and queries

// Bits 0 .. n of a word.
__device__ __forceinline__ uint32_t first_bits(int n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u; }

// Every query sees every key of its sequence.
struct AllKeys {
  static constexpr bool COLUMNS = false;
  template <int M> struct Rows {};
  int keys;
  template <int M> __device__ __forceinline__ void begin(Rows<M>&, const uint32_t*, int) const {}
  __device__ __forceinline__ bool cuts(int key, int n) const { return key + n > keys; }
  template <int M> __device__ __forceinline__ uint32_t word(const Rows<M>&, int, int, int key) const { return first_bits(keys - key); }
  __device__ __forceinline__ uint32_t column(int, int) const { return 0xffffffffu; }
};

template <class T, int D> struct GivenQueries {
  View<T> view;   // row 0 is the first of the packed matrix
  template <int ROWS> __device__ __forceinline__ void load(unsigned char* tile, int row, int rows) const {
    load_tile<T, D, ROWS>(tile, view, row, rows);
  }
};

// Calls f(m, n, e, sees) for the lane's elements; `key` is the key of column 0.
template <int M, int N, class Mask, class F>
__device__ __forceinline__ void each_seen(const Mask& mask, const typename Mask::template Rows<M>& rows, int key, F f) {
  const int t = lane_id() & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
      for (int n = 0; n < N; n += 4) {
        const uint32_t word = mask.word(rows, m, r, key + 8 * n) >> (2 * t);
#pragma unroll
        for (int i = n; i < (n + 4 < N ? n + 4 : N); i++) {
          f(m, i, 2 * r, word >> (8 * (i - n)) & 1);
          f(m, i, 2 * r + 1, word >> (8 * (i - n) + 1) & 1);
        }
      }
}

}  // namespace flash

#include "flash_backward.cuh"
#include "flash_forward.cuh"

#endif
