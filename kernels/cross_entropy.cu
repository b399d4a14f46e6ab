// Cross entropy of a chunk of logits: loss, correctness and gradient of each row, column sums of the gradient, sums of the losses.
//
//   x = logits + bias      loss = max + ln(sum) - x[label]      correct = x[label] >= max      g = (exp(x - max) / sum - onehot) scale
//
// R rows with a label (*rows, on the device), taken in chunks: a launch works on rows first .. first + chunk of them. V: vocabulary,
// padded to a multiple of 8; padding has bias -inf (or so low that its exponential is 0) and gets the gradient 0.
//
// cross_entropy_gradient  row_loss, row_correct [R] (=, the chunk's rows); logits [chunk, V] in, gradient out (=); rows of the chunk
//                         past the last label become 0, since products sum over all of the chunk.
// cross_entropy_loss      the same without the gradient; logits stay. Both: grid ceil(chunk / 4), block 512.
// cross_entropy_bias_sums partial [ceil(chunk / 64), V] (=, slabs that hold a row): sums over 64 rows each.
//                         Grid (ceil(V / 1024), ceil(chunk / 64)), block 128.
// cross_entropy_bias_add  db_acc [V] (+=): the slabs in ascending order. Grid ceil(V / 256), block 256.
// cross_entropy_sums      sums_acc [2] (+=): sum of row_loss and number of correct rows, in a fixed order in f64. Grid 1, block 512.
//
// Storage of logits f32 or bf16; bias, losses, statistics and sums across rows f32, their total f64. No dynamic shared memory.
//
// Bound by bytes out of L2, where the product left the chunk: an online softmax reads a logit once, the gradient pass reads it again and
// writes it. Four rows a block; rows past the end repeat the last one, unwritten.
#include "cross_entropy.cuh"

constexpr int CE_SLAB = 64;

#if !defined(RM_SIGNATURES)

// Loss and correctness. Returns in `top`, `sum` what the gradient needs.
template <class T>
__device__ __forceinline__ void ce_rows(float (&top)[CE_ROWS], float (&sum)[CE_ROWS], int (&label)[CE_ROWS], float* row_loss,
                                        uint32_t* row_correct, const T* const (&x)[CE_ROWS], const float* bias,
                                        const uint32_t* labels, int first, int live, int V) {
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) label[r] = int(labels[first + min(r, live - 1)]);
  float own[CE_ROWS];
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) own[r] = to_float(x[r][label[r]]) + bias[label[r]];
  ce_statistics(top, sum, x, bias, V);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) {
    if (r >= live) continue;
    row_loss[first + r] = (top[r] - own[r]) + logf(sum[r]);
    row_correct[first + r] = own[r] >= top[r] ? 1u : 0u;
  }
}

template <class T>
__device__ __forceinline__ void cross_entropy_loss(float* row_loss, uint32_t* row_correct, const T* logits, const float* bias,
                                                   const uint32_t* labels, const int* rows, int first, int chunk, int V) {
  const int begin = int(blockIdx.x) * CE_ROWS, live = min(min(*rows - first, chunk) - begin, CE_ROWS);
  if (live <= 0) return;
  const T* x[CE_ROWS];
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) x[r] = logits + size_t(begin + min(r, live - 1)) * size_t(V);
  float top[CE_ROWS], sum[CE_ROWS];
  int label[CE_ROWS];
  ce_rows(top, sum, label, row_loss, row_correct, x, bias, labels, first + begin, live, V);
}

template <class T>
__device__ __forceinline__ void cross_entropy_gradient(float* row_loss, uint32_t* row_correct, T* logits, const float* bias,
                                                       const uint32_t* labels, const int* rows, const float* scale, int first, int chunk,
                                                       int V) {
  const int begin = int(blockIdx.x) * CE_ROWS, live = min(min(*rows - first, chunk) - begin, CE_ROWS);
  const float zero[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  T* const end = logits + size_t(min(chunk, begin + CE_ROWS)) * size_t(V);
  // Unrolled, it would make the loop below spill.
#pragma unroll 1
  for (T* x = logits + size_t(begin + max(live, 0)) * size_t(V) + threadIdx.x * 8; x < end; x += CE_THREADS * 8) store8(x, zero);
  if (live <= 0) return;
  const T* x[CE_ROWS];
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) x[r] = logits + size_t(begin + min(r, live - 1)) * size_t(V);
  float top[CE_ROWS], sum[CE_ROWS];
  int label[CE_ROWS];
  // The barrier in there also keeps the writes below behind every thread's reading of the label's logit.
  ce_rows(top, sum, label, row_loss, row_correct, x, bias, labels, first + begin, live, V);
  const float weight = *scale;
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) sum[r] = weight / sum[r];
  for (int c = int(threadIdx.x) * 8; c < V; c += CE_THREADS * 8) {
    float b[8], v[CE_ROWS][8];
    load8(b, bias + c);
#pragma unroll
    for (int r = 0; r < CE_ROWS; r++) load8(v[r], x[r] + c);
#pragma unroll
    for (int r = 0; r < CE_ROWS; r++) {
#pragma unroll
      for (int i = 0; i < 8; i++) v[r][i] = ce_exp(v[r][i] + b[i] - top[r]) * sum[r] - (label[r] == c + i ? weight : 0.f);
      if (r < live) store8(logits + size_t(begin + r) * size_t(V) + c, v[r]);
    }
  }
}

template <class T>
__device__ __forceinline__ void cross_entropy_bias_sums(float* partial, const T* g, const int* rows, int first, int chunk, int V) {
  const int begin = int(blockIdx.y) * CE_SLAB, live = min(min(*rows - first, chunk) - begin, CE_SLAB);
  const int c = (int(blockIdx.x) * 128 + int(threadIdx.x)) * 8;
  if (live <= 0 || c >= V) return;
  g += size_t(begin) * size_t(V) + c;
  float total[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
#pragma unroll 8
  for (int r = 0; r < live; r++) {
    float v[8];
    load8(v, g + size_t(r) * size_t(V));
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] += v[i];
  }
  store8(partial + size_t(blockIdx.y) * size_t(V) + c, total);
}

#endif

extern "C" __global__ void __launch_bounds__(256)
    cross_entropy_bias_add(float* db_acc, const float* partial, const int* rows, int first, int chunk, int V) {
  const int c = int(blockIdx.x) * 256 + int(threadIdx.x), live = min(*rows - first, chunk);
  if (live <= 0 || c >= V) return;
  float total = 0.f;
  for (int slab = 0; slab * CE_SLAB < live; slab++) total += partial[size_t(slab) * size_t(V) + c];
  db_acc[c] += total;
}
RM_EXPORT(cross_entropy_bias_add)

extern "C" __global__ void __launch_bounds__(512)
    cross_entropy_sums(double* sums_acc, const float* row_loss, const uint32_t* row_correct, const int* rows) {
  RM_SHARED(double, losses, CE_THREADS);
  RM_SHARED(int, counts, CE_THREADS);
  const int me = int(threadIdx.x), live = *rows;
  double loss = 0.0;
  int count = 0;
  for (int r = me; r < live; r += CE_THREADS) loss += double(row_loss[r]), count += int(row_correct[r]);
  losses[me] = loss;
  counts[me] = count;
  for (int half = CE_THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (me < half) losses[me] += losses[me + half], counts[me] += counts[me + half];
  }
  if (me == 0) sums_acc[0] += losses[0], sums_acc[1] += double(counts[0]);
}
RM_EXPORT(cross_entropy_sums)

#define RM_CROSS_ENTROPY(suffix, T, BLOCKS) \
  extern "C" __global__ void __launch_bounds__(512, BLOCKS)                                                                              \
      cross_entropy_loss_##suffix(float* row_loss, uint32_t* row_correct, const T* logits, const float* bias, const uint32_t* labels,    \
                                  const int* rows, int first, int chunk, int V) {                                                        \
    cross_entropy_loss(row_loss, row_correct, logits, bias, labels, rows, first, chunk, V);                                              \
  }                                                                                                                                      \
  RM_EXPORT_HOT(cross_entropy_loss_##suffix)                                                                                             \
  extern "C" __global__ void __launch_bounds__(512, BLOCKS)                                                                              \
      cross_entropy_gradient_##suffix(float* row_loss, uint32_t* row_correct, T* logits, const float* bias, const uint32_t* labels,      \
                                      const int* rows, const float* scale, int first, int chunk, int V) {                                \
    cross_entropy_gradient(row_loss, row_correct, logits, bias, labels, rows, scale, first, chunk, V);                                   \
  }                                                                                                                                      \
  RM_EXPORT_HOT(cross_entropy_gradient_##suffix)                                                                                         \
  extern "C" __global__ void __launch_bounds__(128)                                                                                      \
      cross_entropy_bias_sums_##suffix(float* partial, const T* g, const int* rows, int first, int chunk, int V) {                       \
    cross_entropy_bias_sums(partial, g, rows, first, chunk, V);                                                                          \
  }                                                                                                                                      \
  RM_EXPORT_HOT(cross_entropy_bias_sums_##suffix)

// Two blocks an SM, but for f32 registers.
RM_CROSS_ENTROPY(f32, float, 1)
RM_CROSS_ENTROPY(bf16, bf16, 2)
