// Dropout + residual + LayerNorm: z = dropout(x) + residual, y = (z - mean) * rstd * gamma + beta.
//
// Storage f32 or bf16; statistics, gamma, beta and their gradients f32. C: a multiple of 16, at most 4096. `rows` is the true number of
// rows, read from device memory: grids are made for the capacity, and blocks without rows leave at once.
//
// layernorm_forward_*: writes (=) y [rows, C], mean [rows], rstd [rows], and z over x unless z is x (no residual, dropout off).
//   `residual` may be null. Statistics are those of z as stored, so that the backward differentiates exactly what was computed.
//   Grid: a block for every 4 rows of the capacity (every row above C = 1024). Block: 128 threads.
// layernorm_backward_*: writes (=) dz over dy, dx = dropout(dz) unless dx is null, and partials [blocks, 2, C] of dgamma and dbeta.
//   Grid: any number of blocks, each works through its share of the rows: as many as are resident at once (3 an SM in bf16, 2 in f32).
//   Block: 128 threads. The sums' rounding depends on the number of blocks, nothing else.
// layernorm_backward_sums: adds (+=) the partials to dgamma_acc and dbeta_acc [C]. `blocks` is the backward's grid.
//   Grid: 2 C / 32 blocks. Block: 1024 threads.
//
// Bound by memory: bf16 moves 8 bytes an element forward (x, residual, z, y) and 8 backward (z, dy, dz, dx); gamma and beta come from
// the first-level cache.
#include "rows.cuh"

template <class L, class T>
__device__ __forceinline__ void layernorm_forward(T* y, T* x, float* mean, float* rstd, const T* residual, const float* gamma,
                                                  const float* beta, const RowNames& names, const Dropout& dropout, uint32_t site, int rows,
                                                  int C, float eps, float* scratch) {
  const int row = int(blockIdx.x) * L::ROWS + L::row();
  if (row >= rows) return;   // with several rows a block there is no barrier
  const size_t start = size_t(row) * size_t(C);
  Held8<T> from[L::V], skip[L::V];
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    if (L::column(v) < C) hold8(from[v], x + start + L::column(v));
  }
  if (residual) {
#pragma unroll
    for (int v = 0; v < L::V; v++) {
      if (L::column(v) < C) hold8(skip[v], residual + start + L::column(v));
    }
  }
  const RowDropout drop(dropout, names, row);
  const bool changed = residual || dropout.threshold != 0;
  float z[L::V][8];
#pragma unroll
  for (int v = 0; v < L::V; v++) {
    const int c = L::column(v);
    if (c >= C) {
#pragma unroll
      for (int i = 0; i < 8; i++) z[v][i] = 0.f;
      continue;
    }
    unpack8(z[v], from[v]);
    drop.apply(z[v], dropout, site, c);
    if (residual) {
      float r[8];
      unpack8(r, skip[v]);
#pragma unroll
      for (int i = 0; i < 8; i++) z[v][i] += r[i];
    }
    if (!changed) continue;
#pragma unroll
    for (int i = 0; i < 8; i++) z[v][i] = rounded<T>(z[v][i]);
    store8(x + start + c, z[v]);
  }
  normalize_row<L>(z, mean + row, rstd + row, gamma, beta, C, eps, scratch,
                   [&](int c, const float (&out)[8]) { store8(y + start + c, out); });
}

template <class L, class T>
__device__ __forceinline__ void layernorm_backward(T* dy, T* dx, float* partials, const T* z, const float* mean, const float* rstd,
                                                   const float* gamma, const RowNames& names, const Dropout& dropout, uint32_t site,
                                                   int rows, int C, float* shared) {
  if (int(blockIdx.x) * L::ROWS >= rows) return;
  AffineSums<L> sums;
  for (int row = int(blockIdx.x) * L::ROWS + L::row(); row < rows; row += int(gridDim.x) * L::ROWS) {
    const size_t start = size_t(row) * size_t(C);
    Held8<T> held_z[L::V], held_dy[L::V];
#pragma unroll
    for (int v = 0; v < L::V; v++) {
      if (L::column(v) >= C) continue;
      hold8(held_z[v], z + start + L::column(v));
      hold8(held_dy[v], dy + start + L::column(v));
    }
    backward_row<L>(sums, held_z, held_dy, mean[row], rstd[row], gamma, C, shared, [&](int c, float (&dz)[8]) {
      store8(dy + start + c, dz);
      if (!dx) return;
      const RowDropout drop(dropout, names, row);
      drop.apply(dz, dropout, site, c);
      store8(dx + start + c, dz);
    });
  }
  write_sums<L>(partials + size_t(blockIdx.x) * 2 * size_t(C), sums, C, shared);
}

#define LAYERNORM(T, name, resident)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(128)                                                                                    \
      layernorm_forward_##name(T* y, T* x, float* mean, float* rstd, const T* residual, const float* gamma, const float* beta,         \
                               const RowNames names, const Dropout dropout, uint32_t site, const int* rows, int C, float eps) {        \
    RM_SHARED(float, scratch, 32);                                                                                                     \
    by_width(C, [&](auto layout) {                                                                                                     \
      layernorm_forward<decltype(layout)>(y, x, mean, rstd, residual, gamma, beta, names, dropout, site, *rows, C, eps, scratch);      \
    });                                                                                                                                \
  }                                                                                                                                    \
  RM_EXPORT_HOT(layernorm_forward_##name)                                                                                              \
  extern "C" __global__ void __launch_bounds__(128, resident)                                                                          \
      layernorm_backward_##name(T* dy, T* dx, float* partials, const T* z, const float* mean, const float* rstd,                       \
                                const float* gamma, const RowNames names, const Dropout dropout, uint32_t site, const int* rows,       \
                                int C) {                                                                                               \
    RM_SHARED(float, shared, ROW_SHARED);                                                                                              \
    by_width(C, [&](auto layout) {                                                                                                     \
      layernorm_backward<decltype(layout)>(dy, dx, partials, z, mean, rstd, gamma, names, dropout, site, *rows, C, shared);            \
    });                                                                                                                                \
  }                                                                                                                                    \
  RM_EXPORT_HOT(layernorm_backward_##name)

LAYERNORM(float, f32, 2)
LAYERNORM(bf16, bf16, 3)

extern "C" __global__ void __launch_bounds__(1024)
    layernorm_backward_sums(float* dgamma_acc, float* dbeta_acc, const float* partials, const int* rows, int blocks, int C) {
  const int each = rows_of_block(C), used = (*rows + each - 1) / each;
  add_partials(partials, used < blocks ? used : blocks, 2 * C, [&](int i) { return i < C ? dgamma_acc + i : dbeta_acc + (i - C); });
}
RM_EXPORT(layernorm_backward_sums)
