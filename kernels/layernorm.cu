// LayerNorm of rows: y = (x - mean) / sqrt(var + eps) * gamma + beta.
//
// Writes (=): y [T, C], mean [T], rstd [T]. Storage f32 or bf16; statistics, gamma and beta f32. C is a multiple of 8.
// Grid: one block a row. Block: a multiple of 32 threads. Two passes over the row: the variance is that of the centred values, so a
// row with a large common offset loses no digits.
#include "common.cuh"

template <class T>
__device__ __forceinline__ void layernorm_forward(T* y, float* mean, float* rstd, const T* x, const float* gamma, const float* beta, int C,
                                                  float eps) {
  RM_SHARED(float, scratch, 32);
  const size_t row = blockIdx.x;
  const int first = int(threadIdx.x) * 8, step = int(blockDim.x) * 8;
  x += row * size_t(C);
  y += row * size_t(C);
  float v[8], sum = 0.f;
  for (int c = first; c < C; c += step) {
    load8(v, x + c);
    for (int i = 0; i < 8; i++) sum += v[i];
  }
  const float mu = block_sum(sum, scratch) / float(C);
  float squares = 0.f;
  for (int c = first; c < C; c += step) {
    load8(v, x + c);
    for (int i = 0; i < 8; i++) squares += (v[i] - mu) * (v[i] - mu);
  }
  const float rs = rsqrtf(block_sum(squares, scratch) / float(C) + eps);
  if (threadIdx.x == 0) {
    mean[row] = mu;
    rstd[row] = rs;
  }
  float g[8], b[8];
  for (int c = first; c < C; c += step) {
    load8(v, x + c);
    load8(g, gamma + c);
    load8(b, beta + c);
    for (int i = 0; i < 8; i++) v[i] = (v[i] - mu) * rs * g[i] + b[i];
    store8(y + c, v);
  }
}

extern "C" __global__ void __launch_bounds__(1024)
    layernorm_forward_f32(float* y, float* mean, float* rstd, const float* x, const float* gamma, const float* beta, int C, float eps) {
  layernorm_forward(y, mean, rstd, x, gamma, beta, C, eps);
}
RM_EXPORT_HOT(layernorm_forward_f32)

extern "C" __global__ void __launch_bounds__(1024)
    layernorm_forward_bf16(bf16* y, float* mean, float* rstd, const bf16* x, const float* gamma, const float* beta, int C, float eps) {
  layernorm_forward(y, mean, rstd, x, gamma, beta, C, eps);
}
RM_EXPORT_HOT(layernorm_forward_bf16)
