// The softmax of rows of logits, four a block: what cross_entropy.cu and bag_of_words.cu share.
//
// A block takes four rows so that the f32 bias, wider than the bf16 logits, is read once for four of them, and so that every thread has
// four independent loads in flight.
#pragma once
#include "mma.cuh"

constexpr int CE_ROWS = 4;
constexpr int CE_THREADS = 512;
constexpr float CE_LOG2E = 1.44269504088896341f;
constexpr float CE_LOWEST = -3.4028234663852886e38f;

#if !defined(RM_SIGNATURES)

// exp(x) for x <= 0.
__device__ __forceinline__ float ce_exp(float x) { return ex2(x * CE_LOG2E); }

// Maximum and sum of the block's rows, equal in every thread. A thread starts from CE_LOWEST, not -inf, so that it never subtracts
// infinities when all its columns are padding.
template <class T>
__device__ __forceinline__ void ce_statistics(float (&top)[CE_ROWS], float (&sum)[CE_ROWS], const T* const (&x)[CE_ROWS],
                                              const float* bias, int V) {
  RM_SHARED(float, tops, CE_ROWS* WARP);
  RM_SHARED(float, sums, CE_ROWS* WARP);
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) top[r] = CE_LOWEST, sum[r] = 0.f;
  for (int c = int(threadIdx.x) * 8; c < V; c += CE_THREADS * 8) {
    float b[8], v[CE_ROWS][8];
    load8(b, bias + c);
#pragma unroll
    for (int r = 0; r < CE_ROWS; r++) load8(v[r], x[r] + c);
#pragma unroll
    for (int r = 0; r < CE_ROWS; r++) {
      float most = top[r], add = 0.f;
#pragma unroll
      for (int i = 0; i < 8; i++) v[r][i] += b[i], most = fmaxf(most, v[r][i]);
#pragma unroll
      for (int i = 0; i < 8; i++) add += ce_exp(v[r][i] - most);
      sum[r] = sum[r] * ce_exp(top[r] - most) + add;
      top[r] = most;
    }
  }
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) {
    const float most = warp_max(top[r]), total = warp_sum(sum[r] * ce_exp(top[r] - most));
    if (lane_id() == 0) tops[r * WARP + warp_id()] = most, sums[r * WARP + warp_id()] = total;
  }
  __syncthreads();
  const bool holds = lane_id() < CE_THREADS / WARP;
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) {
    const float part = holds ? tops[r * WARP + lane_id()] : CE_LOWEST, add = holds ? sums[r * WARP + lane_id()] : 0.f;
    top[r] = warp_max(part);
    sum[r] = warp_sum(add * ce_exp(part - top[r]));
  }
}

#endif
