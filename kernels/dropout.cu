// Dropout of rows, in place and its own backward: x = keep ? x / (1 - p) : 0, drawn as everywhere.
//
// dropout_rows_*: x [rows, C] (=), C a multiple of 8. `rows` is the true number, read from device memory.
//   Grid: a block for every 8 rows of the capacity. Block: 256 threads. Bound by memory.
#include "rows.cuh"

#if !defined(RM_SIGNATURES)

constexpr int DROPOUT_WARPS = 8;

template <class T>
__device__ __forceinline__ void dropout_rows(T* x, const RowNames& names, const Dropout& dropout, uint32_t site, int rows, int C) {
  const int row = int(blockIdx.x) * DROPOUT_WARPS + warp_id();
  if (row >= rows || dropout.threshold == 0) return;
  const RowDropout drop(dropout, names, row);
  x += size_t(row) * size_t(C);
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    float v[8];
    load8(v, x + c);
    drop.apply(v, dropout, site, c);
    store8(x + c, v);
  }
}

#endif

#define DROPOUT(T, name)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                                          \
      dropout_rows_##name(T* x, const RowNames names, const Dropout dropout, uint32_t site, const int* rows, int C) {        \
    dropout_rows(x, names, dropout, site, *rows, C);                                                                         \
  }                                                                                                                          \
  RM_EXPORT(dropout_rows_##name)

DROPOUT(float, f32)
DROPOUT(bf16, bf16)
