// Tiles of the score matrix of the contrastive loss, and products with them: what its forward and backward share.
//
// A block keeps ROWS rows of one side (x) in shared memory and streams rows of the other side (y) through a ring. All tiles are chunks
// of 128 bytes a row (64 bf16 or 32 f32 columns), columns past C filled with zeros, 16-byte units swizzled by row against bank conflicts.
#pragma once
#include "mma.cuh"

// What all kernels of the loss take. B queries, P passages.
struct Contrastive {
  const uint32_t* targets;    // [B] each query's own passage
  const uint32_t* hidden;     // [B, words] bit p of row b: passage p is no candidate of query b (its own always is); or null
  const int* queries;         // true B
  const int* passages;        // true P
  int words;                  // 32-bit words of a row of `hidden`
  int C;                      // a multiple of 8
  float inverse_temperature;
};

#if !defined(RM_SIGNATURES)

constexpr int CL_THREADS = 256;
constexpr int CL_STAGES = 4;
constexpr float CL_LOG2E = 1.44269504088896341f;

template <class T> constexpr int CL_CHUNK = 128 / int(sizeof(T));   // columns of a chunk

// Offset of a 16-byte unit in a chunk of a tile.
__device__ __forceinline__ uint32_t cl_unit(int row, int unit) { return uint32_t(row * 128 + ((unit ^ (row & 7)) << 4)); }

// The address `units` units further in a row, where the bits of `units` are clear in the number of the unit at `at`: chunks begin at
// multiples of 1,024, so the swizzle stays an exclusive or. One address instead of an offset for each unit saves registers.
__device__ __forceinline__ uint32_t cl_further(uint32_t at, int units) { return at ^ uint32_t(units << 4); }

// Starts the copy of a chunk of rows first .. first + ROWS, zeros past the last row and column.
template <int ROWS, class T>
__device__ __forceinline__ void cl_load(unsigned char* to, const T* from, int first, int rows, int chunk, int C) {
  constexpr int UNIT = 16 / int(sizeof(T));
#pragma unroll
  for (int i = 0; i < ROWS * 8 / CL_THREADS; i++) {
    const int at = int(threadIdx.x) + i * CL_THREADS, row = at / 8, unit = at % 8, column = chunk * CL_CHUNK<T> + unit * UNIT;
    const bool inside = first + row < rows && column < C;
    cp_async_16(smem_u32(to) + cl_unit(row, unit), inside ? from + size_t(first + row) * size_t(C) + column : from, inside ? 16 : 0);
  }
}

// A tile of scores, ROWS x COLUMNS over the block; a thread holds R x N of them. SLOTS threads share a row, this one is number `slot`.
template <class T, bool WIDE> struct ClScores;

// bf16: warps of 32 (WIDE) or 16 rows by 32 columns, in mma fragments.
template <bool WIDE> struct ClScores<bf16, WIDE> {
  static constexpr int ROWS = 64, COLUMNS = WIDE ? 128 : 64, MT = WIDE ? 2 : 1, R = 2 * MT, N = 8, SLOTS = COLUMNS / N;
  float acc[MT][4][4];
  int first_row, first_column;   // of the warp

  __device__ __forceinline__ ClScores() {
    constexpr int ACROSS = COLUMNS / 32;
    first_row = warp_id() / ACROSS * 16 * MT;
    first_column = warp_id() % ACROSS * 32;
  }
  __device__ __forceinline__ int row(int r) const { return first_row + r / 2 * 16 + r % 2 * 8 + lane_id() / 4; }
  __device__ __forceinline__ int column(int n) const { return first_column + n / 2 * 8 + lane_id() % 4 * 2 + n % 2; }
  __device__ __forceinline__ int slot() const { return first_column / 8 + lane_id() % 4; }
  __device__ __forceinline__ float at(int r, int n) const { return acc[r / 2][n / 2][r % 2 * 2 + n % 2]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < MT * 16; i++) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
  // += x yᵀ over one chunk.
  __device__ __forceinline__ void multiply(const unsigned char* x, const unsigned char* y) {
    const int lane = lane_id();
    const uint32_t x_at = smem_u32(x) + cl_unit(first_row + lane % 16, lane / 16);
    const uint32_t y_at = smem_u32(y) + cl_unit(first_column + lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint32_t a[MT][4];
#pragma unroll
      for (int m = 0; m < MT; m++) ldmatrix_x4(a[m], cl_further(x_at, 2 * k) + m * 2048);
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        uint32_t b[4];
        ldmatrix_x4(b, cl_further(y_at, 2 * k) + pair * 2048);
#pragma unroll
        for (int m = 0; m < MT; m++) {
          mma_bf16(acc[m][2 * pair], a[m], b[0], b[1]);
          mma_bf16(acc[m][2 * pair + 1], a[m], b[2], b[3]);
        }
      }
    }
  }
};

// f32: threads of 2 rows by 4 or 8 columns, 16 apart.
template <bool WIDE> struct ClScores<float, WIDE> {
  static constexpr int ROWS = 32, COLUMNS = WIDE ? 128 : 64, R = 2, N = COLUMNS / 16, SLOTS = 16;
  float acc[R][N];

  __device__ __forceinline__ ClScores() {}
  __device__ __forceinline__ int row(int r) const { return int(threadIdx.x) / 16 + 16 * r; }
  __device__ __forceinline__ int column(int n) const { return slot() + 16 * n; }
  __device__ __forceinline__ int slot() const { return int(threadIdx.x) % 16; }
  __device__ __forceinline__ float at(int r, int n) const { return acc[r][n]; }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < R * N; i++) acc[i / N][i % N] = 0.f;
  }
  __device__ __forceinline__ void multiply(const unsigned char* x, const unsigned char* y) {
#pragma unroll
    for (int unit = 0; unit < 8; unit++) {
      float4 a[R];
#pragma unroll
      for (int r = 0; r < R; r++) a[r] = *reinterpret_cast<const float4*>(x + cl_unit(row(r), unit));
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float4 b = *reinterpret_cast<const float4*>(y + cl_unit(column(n), unit));
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

// Sums of y's rows weighted by a tile of factors: ROWS rows by up to CHUNKS chunks of columns, f32 in registers.
template <class T, int CHUNKS> struct ClSums;

// bf16: warps of 16 rows by 32 columns of every chunk. Factors lie in shared memory like any bf16 tile.
template <int CHUNKS> struct ClSums<bf16, CHUNKS> {
  float acc[CHUNKS][4][4];
  uint32_t factors[4][4];

  __device__ __forceinline__ ClSums() {
#pragma unroll
    for (int i = 0; i < CHUNKS * 16; i++) acc[i / 16][i / 4 % 4][i % 4] = 0.f;
  }
  __device__ static __forceinline__ int first_row() { return warp_id() / 2 * 16; }
  __device__ static __forceinline__ int first_column() { return warp_id() % 2 * 32; }
  // Puts a thread's N factors of row r in place, neighbours in pairs.
  template <class S> __device__ static __forceinline__ void put(unsigned char* to, const S& s, int r, const float (&g)[S::N]) {
#pragma unroll
    for (int n = 0; n < S::N; n += 2) {
      const int column = s.column(n);
      *reinterpret_cast<uint32_t*>(to + cl_unit(s.row(r), column / 8) + column % 8 * 2) = pack_bf16(g[n], g[n + 1]);
    }
  }
  __device__ __forceinline__ void take(const unsigned char* from) {
#pragma unroll
    for (int k = 0; k < 4; k++) {
      ldmatrix_x4(factors[k], cl_further(smem_u32(from) + cl_unit(first_row() + lane_id() % 16, lane_id() / 16), 2 * k));
    }
  }
  __device__ __forceinline__ void add(int chunk, const unsigned char*, const unsigned char* y) {
    const int lane = lane_id();
    const uint32_t y_at = smem_u32(y) + cl_unit(lane % 16, first_column() / 8 + lane / 16);
#pragma unroll
    for (int k = 0; k < 4; k++) {
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, cl_further(y_at, 2 * pair) + k * 2048);
        mma_bf16(acc[chunk][2 * pair], factors[k], b[0], b[1]);
        mma_bf16(acc[chunk][2 * pair + 1], factors[k], b[2], b[3]);
      }
    }
  }
  // Calls f(row, column, a, b) for neighbouring columns of a chunk.
  template <class F> __device__ __forceinline__ void each(int chunk, F f) const {
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const int row = first_row() + i % 2 * 8 + lane_id() / 4, column = first_column() + i / 2 * 8 + lane_id() % 4 * 2;
      f(row, column, acc[chunk][i / 2][i % 2 * 2], acc[chunk][i / 2][i % 2 * 2 + 1]);
    }
  }
};

// f32: threads of two neighbouring columns and two rows, 16 apart, of every chunk. Factors lie in rows of 64.
template <int CHUNKS> struct ClSums<float, CHUNKS> {
  float acc[CHUNKS][2][2];

  __device__ __forceinline__ ClSums() {
#pragma unroll
    for (int i = 0; i < CHUNKS * 4; i++) acc[i / 4][i / 2 % 2][i % 2] = 0.f;
  }
  __device__ static __forceinline__ int row(int r) { return int(threadIdx.x) / 16 + 16 * r; }
  __device__ static __forceinline__ int column() { return int(threadIdx.x) % 16 * 2; }
  template <class S> __device__ static __forceinline__ void put(unsigned char* to, const S& s, int r, const float (&g)[S::N]) {
#pragma unroll
    for (int n = 0; n < S::N; n++) reinterpret_cast<float*>(to)[s.row(r) * 64 + s.column(n)] = g[n];
  }
  __device__ __forceinline__ void take(const unsigned char*) {}
  __device__ __forceinline__ void add(int chunk, const unsigned char* from, const unsigned char* y) {
    const float* g = reinterpret_cast<const float*>(from);
#pragma unroll 4
    for (int j = 0; j < 64; j += 4) {
      float factor[2][4];
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const float4 f = *reinterpret_cast<const float4*>(g + row(r) * 64 + j);
        factor[r][0] = f.x, factor[r][1] = f.y, factor[r][2] = f.z, factor[r][3] = f.w;
      }
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float2 v = *reinterpret_cast<const float2*>(y + cl_unit(j + i, column() / 4) + column() % 4 * 4);
#pragma unroll
        for (int r = 0; r < 2; r++) acc[chunk][r][0] += factor[r][i] * v.x, acc[chunk][r][1] += factor[r][i] * v.y;
      }
    }
  }
  template <class F> __device__ __forceinline__ void each(int chunk, F f) const {
#pragma unroll
    for (int r = 0; r < 2; r++) f(row(r), column(), acc[chunk][r][0], acc[chunk][r][1]);
  }
};

// Rows of y in the order of their use: `chunks` chunks of a tile from chunk 0 on, then `again` chunks from `from` on, tile after tile.
template <class T, int ROWS> struct ClStream {
  const T* y;
  unsigned char* ring;
  int rows, C, chunks, from, again;
  int tile, last, step, issued;   // what is copied next

  __device__ __forceinline__ void issue() {
    if (tile < last) {
      cl_load<ROWS>(ring + issued % CL_STAGES * ROWS * 128, y, tile * ROWS, rows, step < chunks ? step : from + step - chunks, C);
      step++;
      if (step == chunks + again) step = 0, tile++;
    }
    issued++;
    cp_async_commit();
  }
  __device__ __forceinline__ void start() {
#pragma unroll
    for (int i = 0; i < CL_STAGES - 1; i++) issue();
  }
  // The next chunk, when all threads are done with the one before.
  __device__ __forceinline__ const unsigned char* next() {
    cp_async_wait<CL_STAGES - 2>();
    __syncthreads();
    issue();
    return ring + issued % CL_STAGES * ROWS * 128;
  }
};

// Whether passage p is hidden from query b, as its own passage never is: the caller treats that apart.
__device__ __forceinline__ bool cl_hidden(const Contrastive& a, int b, int p) {
  return a.hidden != nullptr && (a.hidden[size_t(b) * size_t(a.words) + p / 32] >> (p % 32) & 1u) != 0;
}

#endif
