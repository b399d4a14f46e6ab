// Sentence embeddings: CLS or mean pooling over packed sequences, and L2 normalisation of rows.
//
// S sequences of T tokens in all: sequence s holds rows cu_seqlens[s] .. cu_seqlens[s + 1], at least one. C is a multiple of 8.
//
// pool_forward        y [S, C] (=): the first row of each sequence, or the mean of its rows (`mean` != 0).
// pool_backward       dx [T, C] (=, all rows of the sequences): dy to the first row and 0 to the others, or dy / length to all.
//                     Both: grid (S, ceil(C / 256)), block 256.
// normalize_forward   y [S, C] (=) = x / max(|x|, 1e-12); norm [S] (=) = |x|.
// normalize_backward  dx [S, C] (=) = (dy - y (y . dy)) / |x|, and dy / 1e-12 where |x| < 1e-12 (the forward did not divide by |x|).
//                     Both: grid ceil(S / 8), block 256; a warp a row. dx may be dy, y may be x.
//
// *sequences (on the device) is the true S. Storage f32 or bf16; sums and norm f32; order fixed. No dynamic shared memory.
// Bound by bytes: mean pooling reads all hidden states once, 512 contiguous bytes a warp and load.
#include "common.cuh"

constexpr int POOL_WARPS = 8;
constexpr int POOL_COLUMNS = 256;
constexpr float NORMALIZE_LEAST = 1e-12f;

#if !defined(RM_SIGNATURES)

template <class T>
__device__ __forceinline__ void pool_forward(T* y, const T* x, const uint32_t* cu_seqlens, const int* sequences, int C, int mean) {
  RM_SHARED(float, sums, POOL_WARPS* POOL_COLUMNS);
  const int s = int(blockIdx.x);
  if (s >= *sequences) return;
  const int begin = int(cu_seqlens[s]), end = mean ? int(cu_seqlens[s + 1]) : begin + 1;
  const int first = int(blockIdx.y) * POOL_COLUMNS, c = first + lane_id() * 8;
  float total[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  if (c < C) {
#pragma unroll 4
    for (int row = begin + warp_id(); row < end; row += POOL_WARPS) {
      float v[8];
      load8(v, x + size_t(row) * size_t(C) + c);
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += v[i];
    }
  }
  store8(sums + warp_id() * POOL_COLUMNS + lane_id() * 8, total);
  __syncthreads();
  const int column = int(threadIdx.x);
  if (first + column >= C) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < POOL_WARPS; w++) sum += sums[w * POOL_COLUMNS + column];
  y[size_t(s) * size_t(C) + first + column] = from_float<T>(sum / float(end - begin));
}

template <class T>
__device__ __forceinline__ void pool_backward(T* dx, const T* dy, const uint32_t* cu_seqlens, const int* sequences, int C, int mean) {
  const int s = int(blockIdx.x), c = int(blockIdx.y) * POOL_COLUMNS + lane_id() * 8;
  if (s >= *sequences || c >= C) return;
  const int begin = int(cu_seqlens[s]), end = int(cu_seqlens[s + 1]);
  float v[8], zero[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  load8(v, dy + size_t(s) * size_t(C) + c);
  if (mean) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] /= float(end - begin);
  }
  for (int row = begin + warp_id(); row < end; row += POOL_WARPS) {
    if (mean || row == begin) store8(dx + size_t(row) * size_t(C) + c, v);
    else store8(dx + size_t(row) * size_t(C) + c, zero);
  }
}

template <class T> __device__ __forceinline__ void normalize_forward(T* y, float* norm, const T* x, const int* sequences, int C) {
  const int row = int(blockIdx.x) * POOL_WARPS + warp_id();
  if (row >= *sequences) return;
  x += size_t(row) * size_t(C);
  y += size_t(row) * size_t(C);
  float v[8], squares = 0.f;
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    load8(v, x + c);
#pragma unroll
    for (int i = 0; i < 8; i++) squares += v[i] * v[i];
  }
  const float length = sqrtf(warp_sum(squares)), divisor = fmaxf(length, NORMALIZE_LEAST);
  if (lane_id() == 0) norm[row] = length;
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    load8(v, x + c);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] /= divisor;
    store8(y + c, v);
  }
}

template <class T>
__device__ __forceinline__ void normalize_backward(T* dx, const T* dy, const T* y, const float* norm, const int* sequences, int C) {
  const int row = int(blockIdx.x) * POOL_WARPS + warp_id();
  if (row >= *sequences) return;
  dx += size_t(row) * size_t(C);
  dy += size_t(row) * size_t(C);
  y += size_t(row) * size_t(C);
  float g[8], v[8], dot = 0.f;
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    load8(g, dy + c);
    load8(v, y + c);
#pragma unroll
    for (int i = 0; i < 8; i++) dot += g[i] * v[i];
  }
  const float length = norm[row];
  dot = warp_sum(dot);
  if (length < NORMALIZE_LEAST) dot = 0.f;
  const float divisor = fmaxf(length, NORMALIZE_LEAST);
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    load8(g, dy + c);
    load8(v, y + c);
#pragma unroll
    for (int i = 0; i < 8; i++) g[i] = (g[i] - v[i] * dot) / divisor;
    store8(dx + c, g);
  }
}

#endif

#define RM_POOL(suffix, T)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      pool_forward_##suffix(T* y, const T* x, const uint32_t* cu_seqlens, const int* sequences, int C, int mean) {                      \
    pool_forward(y, x, cu_seqlens, sequences, C, mean);                                                                                 \
  }                                                                                                                                     \
  RM_EXPORT_HOT(pool_forward_##suffix)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      pool_backward_##suffix(T* dx, const T* dy, const uint32_t* cu_seqlens, const int* sequences, int C, int mean) {                   \
    pool_backward(dx, dy, cu_seqlens, sequences, C, mean);                                                                              \
  }                                                                                                                                     \
  RM_EXPORT_HOT(pool_backward_##suffix)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      normalize_forward_##suffix(T* y, float* norm, const T* x, const int* sequences, int C) {                                          \
    normalize_forward(y, norm, x, sequences, C);                                                                                        \
  }                                                                                                                                     \
  RM_EXPORT_HOT(normalize_forward_##suffix)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      normalize_backward_##suffix(T* dx, const T* dy, const T* y, const float* norm, const int* sequences, int C) {                     \
    normalize_backward(dx, dy, y, norm, sequences, C);                                                                                  \
  }                                                                                                                                     \
  RM_EXPORT_HOT(normalize_backward_##suffix)

RM_POOL(f32, float)
RM_POOL(bf16, bf16)
