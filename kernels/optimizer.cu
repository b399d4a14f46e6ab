// Gradient norm and AdamW over the flat parameter arena, without the host: the norm, the clipping and the decision to skip a step stay
// on the device, and what changes from step to step is read from device memory, so that a captured graph can be replayed.
//
// squared_norm_partials: writes (=) partials [blocks] f64, the sum of squares of 16384 gradients each, in f64: no square overflows, and
//   the sum does not depend on the machine. n: a multiple of 8. Grid: n / 16384 blocks, rounded up. Block: 256 threads.
// squared_norm: writes (=) norm[0] f64, the sum of the partials. Grid: one block. Block: 1024 threads.
// adamw_*: with g scaled by min(1, max_norm / (sqrt(norm[0]) + 1e-6)):
//   m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2,
//   w = w - decay w - rate m / (sqrt(v) root + eps), decay only for elements before `decayed`.
//   Updates (=) master, m, v [n], all f32, and writes (=) copy [n] in the storage type, unless copy is null (f32 works on the master
//   weights). Changes nothing when the norm is not finite. schedule [3] f32, made by the host for each step:
//   rate = lr / (1 - beta1^t), root = 1 / sqrt(1 - beta2^t), decay = lr * weight_decay (so small that 1 - decay would round it off).
//   n: a multiple of 8. Grid: n / 2048 blocks, rounded up. Block: 256 threads.
//
// Bound by memory: the norm reads 4 bytes a parameter, AdamW moves 30 (bf16 copy).
#include "common.cuh"

// Constants of a run.
struct AdamWConstants {
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
  double max_norm;   // infinity: no clipping
};

#if !defined(RM_SIGNATURES)

constexpr int NORM_ELEMENTS = 16384;   // of a block

__device__ __forceinline__ double warp_sum(double v) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(FULL_MASK, v, lanes);
  return v;
}

// Sum over the block, in thread 0.
__device__ __forceinline__ double block_sum(double v, double* scratch) {
  v = warp_sum(v);
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  if (warp_id() > 0) return 0.;
  const int warps = int(blockDim.x) / WARP;
  return warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.);
}

// What gradients are multiplied by; NaN when the step must be skipped. The comparison fails for NaN.
__device__ __forceinline__ float clip_factor(double squared_norm, double max_norm) {
  const double norm = sqrt(squared_norm);
  if (!(norm < double(INFINITY))) return NAN;
  const double factor = max_norm / (norm + 1e-6);
  return factor < 1. ? float(factor) : 1.f;
}

template <class T>
__device__ __forceinline__ void adamw(float* master, T* copy, float* m, float* v, const float* g, const double* norm,
                                      const float* schedule, const AdamWConstants& k, int64_t decayed, int64_t n) {
  RM_SHARED(float, shared, 1);
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  const bool active = first < n;
  float w8[8], g8[8], m8[8], v8[8];
  // Under way while one thread works out the factor.
  if (active) {
    load8(g8, g + first);
    load8(m8, m + first);
    load8(v8, v + first);
    load8(w8, master + first);
  }
  if (threadIdx.x == 0) shared[0] = clip_factor(norm[0], k.max_norm);
  __syncthreads();
  const float clip = shared[0];
  if (!active || !(clip <= 1.f)) return;
  const float rate = schedule[0], root = schedule[1], decay = schedule[2];
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const float d = g8[i] * clip;
    m8[i] = k.beta1 * m8[i] + k.one_minus_beta1 * d;
    v8[i] = k.beta2 * v8[i] + k.one_minus_beta2 * d * d;
    if (first + i < decayed) w8[i] -= decay * w8[i];
    w8[i] -= rate * m8[i] / (sqrtf(v8[i]) * root + k.eps);
  }
  store8(m + first, m8);
  store8(v + first, v8);
  store8(master + first, w8);
  if (copy) store8(copy + first, w8);
}

#endif

extern "C" __global__ void __launch_bounds__(256) squared_norm_partials(double* partials, const float* g, int64_t n) {
  RM_SHARED(double, scratch, 32);
  const int64_t begin = int64_t(blockIdx.x) * NORM_ELEMENTS;
  double sum = 0.;
#pragma unroll 4
  for (int i = int(threadIdx.x) * 8; i < NORM_ELEMENTS; i += 256 * 8) {
    if (begin + i >= n) break;
    float v[8];
    load8(v, g + begin + i);
#pragma unroll
    for (int j = 0; j < 8; j++) sum += double(v[j]) * double(v[j]);
  }
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
RM_EXPORT_HOT(squared_norm_partials)

extern "C" __global__ void __launch_bounds__(1024) squared_norm(double* norm, const double* partials, int blocks) {
  RM_SHARED(double, scratch, 32);
  double sum = 0.;
  for (int i = int(threadIdx.x); i < blocks; i += int(blockDim.x)) sum += partials[i];
  sum = block_sum(sum, scratch);
  if (threadIdx.x == 0) norm[0] = sum;
}
RM_EXPORT(squared_norm)

#define ADAMW(T, name)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      adamw_##name(float* master, T* copy, float* m, float* v, const float* g, const double* norm, const float* schedule,              \
                   const AdamWConstants constants, int64_t decayed, int64_t n) {                                                       \
    adamw(master, copy, m, v, g, norm, schedule, constants, decayed, n);                                                               \
  }                                                                                                                                    \
  RM_EXPORT_HOT(adamw_##name)

ADAMW(float, f32)
ADAMW(bf16, bf16)
