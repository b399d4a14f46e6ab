// Scores of queries with their own groups of passages, and losses of groups of scores.
//
// B queries; query b has the passages b g .. (b + 1) g, the first its positive. *queries (on the device) is the true B.
//
// group_scores_forward_*   s [B, g] (=): s[b, j] = q_b . p_{b g + j} inverse_temperature. Grid ceil(B g / 8), block 256; a warp a passage.
// group_scores_backward_*  dq_acc [B, C] (+=): sum_j ds[b, j] p_{b g + j} inverse_temperature.
//                          dp_acc [B g, C] (+=): ds[b, j] q_b inverse_temperature. Grid (B, ceil(C / 256)), block 256.
//                          q, p and their gradients f32 or bf16, C a multiple of 8; s and ds f32. Nothing may overlap.
//
// group_loss  loss [B] (=), correct [B] (=): 1 where the positive's score is the largest; ds (=) unless null, weighted with *scale.
//             Score (b, j) is s = scores[(b g + j) stride] inverse_temperature; ds lies likewise, and its other stride - 1 columns become
//             0. Grid ceil(B / 8), block 256; a warp a query. `kind` is one of `GroupLoss`, with t = teacher[b g + j]:
//   CROSS_ENTROPY  loss = lse(s) - s_0                                    ds_j = (softmax(s)_j - [j = 0]) scale inverse_temperature
//   KL             loss = sum_j T_j (ln T_j - ln S_j), T = softmax(t), S = softmax(s); 0 for T_j = 0
//                                                                         ds_j = (S_j - T_j) scale inverse_temperature
//   MARGIN_MSE     loss = sum_j m_j^2, m_j = (s_0 - s_j) - (t_0 - t_j)    ds_j = -2 m_j ..., ds_0 = 2 sum_j m_j scale inverse_temperature
//             cross_entropy_sums adds up losses and correct queries.
//
// Sums f32 in a fixed order: each output belongs to one warp, dq to one block, which adds its warps' sums up in order. No dynamic shared
// memory. The scores are bound by bytes: p is read once forward; backward p and dp are read once and dp is written, 512 contiguous bytes
// a warp and load in bf16. The losses are a few numbers a passage.
#include "common.cuh"

enum GroupLoss { CROSS_ENTROPY = 0, KL = 1, MARGIN_MSE = 2 };

constexpr int GROUP_WARPS = 8;
constexpr int GROUP_COLUMNS = 256;

#if !defined(RM_SIGNATURES)

template <class T>
__device__ __forceinline__ void group_scores_forward(float* s, const T* q, const T* p, const int* queries, int g, int C,
                                                     float inverse_temperature) {
  const int row = int(blockIdx.x) * GROUP_WARPS + warp_id(), b = row / g;
  if (b >= *queries) return;
  q += size_t(b) * size_t(C);
  p += size_t(row) * size_t(C);
  float dot = 0.f;
#pragma unroll 4
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    float x[8], y[8];
    load8(x, q + c);
    load8(y, p + c);
#pragma unroll
    for (int i = 0; i < 8; i++) dot += x[i] * y[i];
  }
  dot = warp_sum(dot);
  if (lane_id() == 0) s[row] = dot * inverse_temperature;
}

template <class T>
__device__ __forceinline__ void group_scores_backward(T* dq_acc, T* dp_acc, const float* ds, const T* q, const T* p, const int* queries,
                                                      int g, int C, float inverse_temperature) {
  RM_SHARED(float, sums, GROUP_WARPS* GROUP_COLUMNS);
  const int b = int(blockIdx.x);
  if (b >= *queries) return;
  const int first = int(blockIdx.y) * GROUP_COLUMNS, c = first + lane_id() * 8;
  float total[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  if (c < C) {
    float own[8];
    load8(own, q + size_t(b) * size_t(C) + c);
    for (int j = warp_id(); j < g; j += GROUP_WARPS) {
      const size_t row = size_t(b) * size_t(g) + size_t(j), at = row * size_t(C) + size_t(c);
      const float weight = ds[row] * inverse_temperature;
      float x[8], dx[8];
      load8(x, p + at);
      load8(dx, dp_acc + at);
#pragma unroll
      for (int i = 0; i < 8; i++) total[i] += weight * x[i], dx[i] += weight * own[i];
      store8(dp_acc + at, dx);
    }
  }
  store8(sums + warp_id() * GROUP_COLUMNS + lane_id() * 8, total);
  __syncthreads();
  const int column = int(threadIdx.x);
  if (first + column >= C) return;
  float sum = 0.f;
#pragma unroll
  for (int w = 0; w < GROUP_WARPS; w++) sum += sums[w * GROUP_COLUMNS + column];
  T* const dq = dq_acc + size_t(b) * size_t(C) + first + column;
  *dq = from_float<T>(to_float(*dq) + sum);
}

// One query's scores, or its teacher's.
struct GroupScores {
  const float* x;
  int stride;
  float factor;
  __device__ __forceinline__ float operator()(int j) const { return x[size_t(j) * size_t(stride)] * factor; }
};

// Softmax of a group, equal in every lane. The maximum starts from the lowest number, not -inf, so that a lane without a score subtracts
// no infinities; a group of nothing but -inf gives NaN, as a NaN does.
struct GroupSoftmax {
  GroupScores scores;
  float top, sum, log_sum;
  __device__ __forceinline__ GroupSoftmax(GroupScores scores, int g) : scores(scores), top(-3.4028234663852886e38f), sum(0.f) {
    for (int j = lane_id(); j < g; j += WARP) top = fmaxf(top, scores(j));
    top = warp_max(top);
    for (int j = lane_id(); j < g; j += WARP) sum += expf(scores(j) - top);
    sum = warp_sum(sum);
    log_sum = logf(sum);
  }
  __device__ __forceinline__ float probability(int j) const { return expf(scores(j) - top) / sum; }
  __device__ __forceinline__ float log_probability(int j) const { return (scores(j) - top) - log_sum; }
};

// Each loss: `value`, equal in every lane, and `slope` of one score.
struct GroupCrossEntropy {
  GroupSoftmax student;
  float value;
  __device__ __forceinline__ GroupCrossEntropy(const GroupScores& s, const GroupScores&, int g)
      : student(s, g), value(-student.log_probability(0)) {}
  __device__ __forceinline__ float slope(int j) const { return student.probability(j) - (j == 0 ? 1.f : 0.f); }
};

struct GroupKl {
  GroupSoftmax student, teacher;
  float value;
  __device__ __forceinline__ GroupKl(const GroupScores& s, const GroupScores& t, int g) : student(s, g), teacher(t, g) {
    float sum = 0.f;
    for (int j = lane_id(); j < g; j += WARP) {
      const float p = teacher.probability(j);
      if (p != 0.f) sum += p * (teacher.log_probability(j) - student.log_probability(j));
    }
    value = warp_sum(sum);
  }
  __device__ __forceinline__ float slope(int j) const { return student.probability(j) - teacher.probability(j); }
};

struct GroupMarginMse {
  GroupScores s, t;
  float value, sum;
  __device__ __forceinline__ GroupMarginMse(const GroupScores& s, const GroupScores& t, int g) : s(s), t(t) {
    float squares = 0.f, margins = 0.f;
    for (int j = lane_id(); j < g; j += WARP) {
      const float m = j == 0 ? 0.f : margin(j);
      squares += m * m;
      margins += m;
    }
    value = warp_sum(squares);
    sum = warp_sum(margins);
  }
  __device__ __forceinline__ float margin(int j) const { return (s(0) - s(j)) - (t(0) - t(j)); }
  __device__ __forceinline__ float slope(int j) const { return j == 0 ? 2.f * sum : -2.f * margin(j); }
};

template <class Loss>
__device__ __forceinline__ void group_loss_of(float* loss, uint32_t* correct, float* ds, const float* scores, const float* teacher,
                                              const int* queries, const float* scale, int g, int stride, float inverse_temperature) {
  const int b = int(blockIdx.x) * GROUP_WARPS + warp_id();
  if (b >= *queries) return;
  const size_t first = size_t(b) * size_t(g), at = first * size_t(stride);
  const GroupScores s = {scores + at, stride, inverse_temperature}, t = {teacher + first, 1, 1.f};
  const Loss l(s, t, g);
  float top = s(0);
  for (int j = lane_id(); j < g; j += WARP) top = fmaxf(top, s(j));
  top = warp_max(top);
  if (lane_id() == 0) {
    loss[b] = l.value;
    correct[b] = s(0) >= top ? 1u : 0u;
  }
  if (!ds) return;
  const float weight = *scale * inverse_temperature;
  ds += at;
  for (int e = lane_id(); e < g * stride; e += WARP) ds[e] = e % stride == 0 ? l.slope(e / stride) * weight : 0.f;
}

#endif

extern "C" __global__ void __launch_bounds__(256)
    group_loss(float* loss, uint32_t* correct, float* ds, const float* scores, const float* teacher, const int* queries,
               const float* scale, int kind, int g, int stride, float inverse_temperature) {
  switch (kind) {
    case CROSS_ENTROPY:
      return group_loss_of<GroupCrossEntropy>(loss, correct, ds, scores, scores, queries, scale, g, stride, inverse_temperature);
    case KL: return group_loss_of<GroupKl>(loss, correct, ds, scores, teacher, queries, scale, g, stride, inverse_temperature);
    default: return group_loss_of<GroupMarginMse>(loss, correct, ds, scores, teacher, queries, scale, g, stride, inverse_temperature);
  }
}
RM_EXPORT_HOT(group_loss)

#define RM_GROUP(suffix, T)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      group_scores_forward_##suffix(float* s, const T* q, const T* p, const int* queries, int g, int C, float inverse_temperature) {    \
    group_scores_forward(s, q, p, queries, g, C, inverse_temperature);                                                                  \
  }                                                                                                                                     \
  RM_EXPORT_HOT(group_scores_forward_##suffix)                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      group_scores_backward_##suffix(T* dq_acc, T* dp_acc, const float* ds, const T* q, const T* p, const int* queries, int g, int C,   \
                                     float inverse_temperature) {                                                                       \
    group_scores_backward(dq_acc, dp_acc, ds, q, p, queries, g, C, inverse_temperature);                                                \
  }                                                                                                                                     \
  RM_EXPORT_HOT(group_scores_backward_##suffix)

RM_GROUP(f32, float)
RM_GROUP(bf16, bf16)
