// Rows in registers: who holds which elements, sums over a row, LayerNorm of a row, its backward, and sums over many rows. Shared by
// layernorm.cu, embed.cu, gather.cu and activation.cu.
//
// A row of C elements, C a multiple of 16 and at most 4096, lies in the registers of W warps: one warp up to 1024 elements, so that
// sums need no barrier, and the block's four warps above. Thread t of those 32 W holds vectors t, t + 32 W, ... of eight elements.
#pragma once
#include "common.cuh"

// Which text and position each row belongs to: the names under which its dropout is drawn. Read only with dropout on.
struct RowNames {
  const uint64_t* samples;    // [S] number of each sequence's sample in the run
  const uint32_t* sequence;   // [rows]
  const uint32_t* position;   // [rows] in its text
};

#if !defined(RM_SIGNATURES)

constexpr int ROW_WARPS = 4;            // of a block that works on rows
constexpr int ROW_SHARED = 2 * 1024;    // floats of shared memory that the backward of rows needs, first for one thing, then another

template <int VECTORS, int WARPS> struct RowLayout {
  static constexpr int V = VECTORS, W = WARPS;
  static constexpr int ROWS = ROW_WARPS / WARPS;   // that a block works on at a time
  static __device__ __forceinline__ int row() { return W == 1 ? warp_id() : 0; }
  static __device__ __forceinline__ int thread() { return W == 1 ? lane_id() : int(threadIdx.x); }
  static __device__ __forceinline__ int column(int v) { return (v * W * WARP + thread()) * 8; }
};

// The rows that a block works on at a time, by width; what launchers divide by.
__device__ __forceinline__ int rows_of_block(int C) { return C <= 1024 ? ROW_WARPS : 1; }

// Calls `work` with the layout for width C. One branch a kernel, the same for all threads.
template <class Work> __device__ __forceinline__ void by_width(int C, Work work) {
  if (C <= 512) {
    work(RowLayout<2, 1>());
  } else if (C <= 768) {
    work(RowLayout<3, 1>());
  } else if (C <= 1024) {
    work(RowLayout<4, 1>());
  } else {
    work(RowLayout<4, 4>());
  }
}

// ---- eight elements as they are stored: half the registers in bf16

template <class T> struct Held8;
template <> struct Held8<float> {
  float v[8];
};
template <> struct Held8<bf16> {
  uint4 w;
};
__device__ __forceinline__ void hold8(Held8<float>& held, const float* p) { load8(held.v, p); }
__device__ __forceinline__ void hold8(Held8<bf16>& held, const bf16* p) { held.w = *reinterpret_cast<const uint4*>(p); }
__device__ __forceinline__ void unpack8(float (&v)[8], const Held8<float>& held) {
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = held.v[i];
}
__device__ __forceinline__ void unpack8(float (&v)[8], const Held8<bf16>& held) {
  const float2 a = unpack_bf16(held.w.x), b = unpack_bf16(held.w.y), c = unpack_bf16(held.w.z), d = unpack_bf16(held.w.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}

// What storing to T and loading again leaves of a value.
template <class T> __device__ __forceinline__ float rounded(float v) { return to_float(from_float<T>(v)); }

// ---- the dropout of one row

struct RowDropout {
  uint64_t sample;
  uint32_t position;
  __device__ __forceinline__ RowDropout(const Dropout& d, const RowNames& names, int row) : sample(0), position(0) {
    if (d.threshold == 0) return;
    sample = names.samples[names.sequence[row]];
    position = names.position[row];
  }
  __device__ __forceinline__ void apply(float (&v)[8], const Dropout& d, uint32_t site, int column) const {
    dropout8(v, d, site, sample, position, uint32_t(column) / 8);
  }
};

// ---- sums over a row, equal in all its threads; `scratch` holds 32 floats and is used when the row takes the whole block

template <class L> __device__ __forceinline__ float row_sum(float v, float* scratch) {
  if constexpr (L::W == 1) return warp_sum(v);
  return block_sum(v, scratch);
}

template <class L> __device__ __forceinline__ float2 row_sums(float a, float b, float* scratch) {
  a = warp_sum(a);
  b = warp_sum(b);
  if constexpr (L::W > 1) {
    __syncthreads();
    if (lane_id() == 0) {
      scratch[warp_id()] = a;
      scratch[L::W + warp_id()] = b;
    }
    __syncthreads();
    a = b = 0.f;
#pragma unroll
    for (int w = 0; w < L::W; w++) {
      a += scratch[w];
      b += scratch[L::W + w];
    }
  }
  return make_float2(a, b);
}

// ---- LayerNorm of one row

// Statistics of z (zero past C) in two passes, so that a large common offset costs no digits; calls store(column, y) for each vector.
template <class L, class Store>
__device__ __forceinline__ void normalize_row(const float (&z)[L::V][8], float* mean, float* rstd, const float* gamma, const float* beta,
                                              int C, float eps, float* scratch, Store store) {
  float sum = 0.f, squares = 0.f;
#pragma unroll
  for (int v = 0; v < L::V; v++) {
#pragma unroll
    for (int i = 0; i < 8; i++) sum += z[v][i];
  }
  const float mu = row_sum<L>(sum, scratch) / float(C);
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    if (L::column(v) >= C) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) squares += (z[v][i] - mu) * (z[v][i] - mu);
  }
  const float rs = rsqrtf(row_sum<L>(squares, scratch) / float(C) + eps);
  if (L::thread() == 0) {
    *mean = mu;
    *rstd = rs;
  }
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    const int c = L::column(v);
    if (c >= C) continue;
    float g[8], b[8], y[8];
    load8(g, gamma + c);
    load8(b, beta + c);
#pragma unroll
    for (int i = 0; i < 8; i++) y[i] = (z[v][i] - mu) * rs * g[i] + b[i];
    store(c, y);
  }
}

// Sums of dgamma and dbeta over the rows that a thread has seen, for the columns it holds.
template <class L> struct AffineSums {
  float dgamma[L::V][8], dbeta[L::V][8];
  __device__ __forceinline__ AffineSums() {
#pragma unroll
    for (int v = 0; v < L::V; v++) {
#pragma unroll
      for (int i = 0; i < 8; i++) dgamma[v][i] = dbeta[v][i] = 0.f;
    }
  }
};

// dz of one row from dy and z; adds to the sums and calls store(column, dz) for each vector.
template <class L, class H, class Store>
__device__ __forceinline__ void backward_row(AffineSums<L>& sums, const Held8<H> (&z)[L::V], const Held8<H> (&dy)[L::V], float mu, float rs,
                                             const float* gamma, int C, float* scratch, Store store) {
  float sum = 0.f, product = 0.f;
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    const int c = L::column(v);
    if (c >= C) continue;
    float x[8], d[8], g[8];
    unpack8(x, z[v]);
    unpack8(d, dy[v]);
    load8(g, gamma + c);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const float normal = (x[i] - mu) * rs;
      sums.dgamma[v][i] += d[i] * normal;
      sums.dbeta[v][i] += d[i];
      sum += d[i] * g[i];
      product += d[i] * g[i] * normal;
    }
  }
  const float2 total = row_sums<L>(sum, product, scratch);
  const float mean_g = total.x / float(C), mean_gx = total.y / float(C);
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    const int c = L::column(v);
    if (c >= C) continue;
    float x[8], d[8], g[8];
    unpack8(x, z[v]);
    unpack8(d, dy[v]);
    load8(g, gamma + c);
#pragma unroll
    for (int i = 0; i < 8; i++) d[i] = rs * (d[i] * g[i] - mean_g - (x[i] - mu) * rs * mean_gx);
    store(c, d);
  }
}

// The block's sums, to partial [2, C]: dgamma, then dbeta. Warps that hold the same columns add in the order of their numbers.
// `shared` holds ROW_SHARED floats and is used when a row takes one warp. The whole block must call it.
template <class L> __device__ __forceinline__ void write_sums(float* partial, const AffineSums<L>& sums, int C, float* shared) {
  float* to = L::W == 1 ? shared : partial;
  for (int turn = 0; turn < L::ROWS; turn++) {
    if (L::row() == turn) {
#pragma unroll
      for (int v = 0; v < L::V; v++) {
        const int c = L::column(v);
        if (c >= C) continue;
        float a[8], b[8];
        if (turn > 0) {
          load8(a, to + c);
          load8(b, to + C + c);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
          a[i] = turn > 0 ? a[i] + sums.dgamma[v][i] : sums.dgamma[v][i];
          b[i] = turn > 0 ? b[i] + sums.dbeta[v][i] : sums.dbeta[v][i];
        }
        store8(to + c, a);
        store8(to + C + c, b);
      }
    }
    __syncthreads();
  }
  if constexpr (L::W == 1) {
    for (int c = int(threadIdx.x) * 8; c < 2 * C; c += int(blockDim.x) * 8) {
      float v[8];
      load8(v, shared + c);
      store8(partial + c, v);
    }
  }
}

// ---- the first pass of column sums: partials [grid.y, N] of the sums over rows, 256 columns a block

constexpr int SUM_COLUMNS = 256;    // columns of a warp
constexpr int COLUMN_WARPS = 8;     // rows that a block reads at a time
constexpr int COLUMN_SHARED = COLUMN_WARPS * SUM_COLUMNS;

// Block: 256 threads. A lane has eight columns: `load(held, row, column)` fetches what it needs of a row, AHEAD of them at a time, and
// `value(v, held, row, column)` gives the terms. Rows are added from the first to the last of each warp, then the warps in the order
// of their numbers. The whole block must call it.
template <class Held, int AHEAD, class Load, class Value>
__device__ __forceinline__ void column_partials(float* partials, int rows, int N, float* shared, Load load, Value value) {
  if (int(blockIdx.y) * COLUMN_WARPS >= rows) return;
  const int column = int(blockIdx.x) * SUM_COLUMNS + lane_id() * 8, step = int(gridDim.y) * COLUMN_WARPS;
  float sum[8] = {};
  if (column < N) {
    for (int row = int(blockIdx.y) * COLUMN_WARPS + warp_id(); row < rows; row += AHEAD * step) {
      Held held[AHEAD];
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        if (row + j * step < rows) load(held[j], row + j * step, column);
      }
#pragma unroll
      for (int j = 0; j < AHEAD; j++) {
        if (row + j * step >= rows) break;
        float v[8];
        value(v, held[j], row + j * step, column);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += v[i];
      }
    }
  }
  store8(shared + warp_id() * SUM_COLUMNS + lane_id() * 8, sum);
  __syncthreads();
  const int mine = int(blockIdx.x) * SUM_COLUMNS + int(threadIdx.x);
  if (mine >= N) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < COLUMN_WARPS; w++) total += shared[w * SUM_COLUMNS + int(threadIdx.x)];
  partials[size_t(blockIdx.y) * size_t(N) + size_t(mine)] = total;
}

// ---- the second pass of column sums: acc[i] += sum over b < count of partials[b][i], for the 32 columns of this block

// Block: 1024 threads; warp w adds rows w, w + 32, ..., then the warps' sums are added in the order of their numbers. `place(i)` says
// where column i goes. The whole block must call it.
template <class Place> __device__ __forceinline__ void add_partials(const float* partials, int count, int columns, Place place) {
  RM_SHARED(float, slices, 32 * 33);
  const int column = int(blockIdx.x) * WARP + lane_id();
  float sum = 0.f;
  if (column < columns) {
#pragma unroll 4
    for (int b = warp_id(); b < count; b += 32) sum += partials[size_t(b) * size_t(columns) + size_t(column)];
  }
  slices[warp_id() * 33 + lane_id()] = sum;
  __syncthreads();
  if (warp_id() > 0 || column >= columns) return;
  float total = 0.f;
#pragma unroll
  for (int w = 0; w < 32; w++) total += slices[w * 33 + lane_id()];
  *place(column) += total;
}

#endif
