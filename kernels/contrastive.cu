// In-batch-negative contrastive loss. Scores exist only as tiles in registers: memory grows with the rows, not with their product.
//
//   s[b, p] = q[b] . p[p] / temperature      lse[b] = ln sum_p exp(s[b, p])      loss[b] = lse[b] - s[b, targets[b]]
//   g[b, p] = (exp(s[b, p] - lse[b]) - [p = targets[b]]) scale / temperature     dq = g p      dp = gᵀ q
//
// q [B, C], p [P, C], f32 or bf16; every passage is a candidate of every query unless `hidden` says otherwise (duplicates of the
// target). True B and P come from device memory; `capacity` is the rows that buffers of partial results are made for.
//
// contrastive_forward_*            part_max, part_sum [splits, capacity], target_score [B] (=): online log-sum-exp in units of log 2.
//                                  Grid (ceil(B / ROWS), splits).
// contrastive_loss                 from those, loss [B] (=), correct [B] (=): 1 where no candidate scores higher, lse [B] (=) in units of
//                                  ln 2, and parts [B, 2] (=) whose sum it is: the largest score, and what the others add. As one number
//                                  it loses digits of large scores, and with it the probabilities. Grid ceil(B / 256), block 256.
//                                  The backward takes `parts` in f32 and `lse` in bf16.
// contrastive_backward_queries_*   dq [B, C] (=). Grid (ceil(B / ROWS), splits, ceil(C / window)).
// contrastive_backward_passages_*  dp [P, C] (=). Grid (ceil(P / ROWS), splits, ceil(C / window)).
//                                  With one split dq or dp are written and partial may be null; with more, partial
//                                  [splits, capacity, C] f32 (=) is, and contrastive_gradient_* adds it up.
// contrastive_gradient_*           dx [rows, C] (=): partial results, split after split. Grid ceil(capacity C / 2048), block 256.
//
// ROWS: 64 for bf16, 32 for f32. Window: 768 columns, 384 in `narrow`. Splits share out the other side's rows, for few rows of this one.
// Block 256. Dynamic shared memory, with K = ceil(C / 64) for bf16, ceil(C / 32) for f32: forward ROWS 128 K + 65536 bytes, backward
// ROWS 128 K + 40960 bytes: C = 768 asks for 139,264, which sm_80 has; C up to 1,024 in bf16 fits sm_90 (the forward: 196,608).
//
// The backward recomputes a tile of scores, rounds g to the storage type as a plain bf16 implementation does, and multiplies it with the
// rows that are still near; sums stay in registers. Each output row belongs to one block (and window), so the order of sums is fixed.
// Bound, in bf16, by shared-memory reads of the tensor cores (2 to 3 cycles an mma) and by L2: 64 FLOP a byte of the streamed side. A C
// above the window recomputes the scores once more a window. f32 is the exact path for comparisons, on ordinary FMA.
#include "contrastive.cuh"

#if !defined(RM_SIGNATURES)

template <class T> __device__ __forceinline__ int cl_chunks(int C) { return (C + CL_CHUNK<T> - 1) / CL_CHUNK<T>; }

// The tiles of a split.
__device__ __forceinline__ void cl_split(int& first, int& last, int rows, int tile_rows) {
  const int tiles = (rows + tile_rows - 1) / tile_rows, splits = int(gridDim.y), each = (tiles + splits - 1) / splits;
  first = min(int(blockIdx.y) * each, tiles);
  last = min(first + each, tiles);
}

template <class T>
__device__ __forceinline__ void contrastive_forward(float* part_max, float* part_sum, float* target_score, const T* q, const T* p,
                                                    const Contrastive& a, int capacity) {
  using Scores = ClScores<T, true>;
  constexpr int ROWS = Scores::ROWS, COLUMNS = Scores::COLUMNS, R = Scores::R, N = Scores::N, SLOTS = Scores::SLOTS;
  RM_DYN_SMEM(smem);
  const int queries = *a.queries, passages = *a.passages, first_row = int(blockIdx.x) * ROWS;
  if (first_row >= queries) return;
  const int chunks = cl_chunks<T>(a.C);
  int first, last;
  cl_split(first, last, passages, COLUMNS);
  unsigned char* ring = smem + chunks * ROWS * 128;
  for (int chunk = 0; chunk < chunks; chunk++) cl_load<ROWS>(smem + chunk * ROWS * 128, q, first_row, queries, chunk, a.C);
  ClStream<T, COLUMNS> stream{p, ring, passages, a.C, chunks, 0, 0, first, last, 0, 0};
  stream.start();

  Scores scores;
  const float unit = a.inverse_temperature * CL_LOG2E;
  int target[R];
  float top[R], sum[R];
#pragma unroll
  for (int r = 0; r < R; r++) {
    const int row = first_row + scores.row(r);
    target[r] = row < queries ? int(a.targets[row]) : -1;
    // Not -inf: a thread whose columns are all hidden would subtract infinities.
    top[r] = -3.4028234663852886e38f;
    sum[r] = 0.f;
  }
  for (int tile = first; tile < last; tile++) {
    scores.clear();
    for (int chunk = 0; chunk < chunks; chunk++) scores.multiply(smem + chunk * ROWS * 128, stream.next());
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int row = first_row + scores.row(r);
      if (row >= queries) continue;
      float v[N], most = top[r], add = 0.f;
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int column = tile * COLUMNS + scores.column(n);
        const bool own = column == target[r], out = column >= passages || (!own && cl_hidden(a, row, column));
        v[n] = out ? -INFINITY : scores.at(r, n) * unit;
        if (own) target_score[row] = v[n];
        most = fmaxf(most, v[n]);
      }
#pragma unroll
      for (int n = 0; n < N; n++) add += ex2(v[n] - most);
      sum[r] = sum[r] * ex2(top[r] - most) + add;
      top[r] = most;
    }
  }
  cp_async_wait_all();
  __syncthreads();
  // The threads of a row meet where the ring was.
  float2* meet = reinterpret_cast<float2*>(ring);
#pragma unroll
  for (int r = 0; r < R; r++) meet[scores.row(r) * (SLOTS + 1) + scores.slot()] = make_float2(top[r], sum[r]);
  __syncthreads();
  const int row = int(threadIdx.x);
  if (row >= ROWS || first_row + row >= queries) return;
  float most = -3.4028234663852886e38f, total = 0.f;
  for (int slot = 0; slot < SLOTS; slot++) most = fmaxf(most, meet[row * (SLOTS + 1) + slot].x);
  for (int slot = 0; slot < SLOTS; slot++) {
    const float2 part = meet[row * (SLOTS + 1) + slot];
    total += part.y * ex2(part.x - most);
  }
  const size_t at = size_t(blockIdx.y) * size_t(capacity) + size_t(first_row + row);
  part_max[at] = most;
  part_sum[at] = total;
}

template <class T, bool BY_QUERY, int CHUNKS>
__device__ __forceinline__ void contrastive_backward(T* dx, float* partial, const T* q, const T* p, const float* lse, const float* scale,
                                                     const Contrastive& a, int capacity) {
  using Scores = ClScores<T, false>;
  constexpr int ROWS = Scores::ROWS, COLUMNS = Scores::COLUMNS, R = Scores::R, N = Scores::N, CHUNK = CL_CHUNK<T>;
  RM_DYN_SMEM(smem);
  const int rows = BY_QUERY ? *a.queries : *a.passages, columns = BY_QUERY ? *a.passages : *a.queries;
  const T* const x = BY_QUERY ? q : p;
  const int first_row = int(blockIdx.x) * ROWS;
  if (first_row >= rows) return;
  const int chunks = cl_chunks<T>(a.C), from = int(blockIdx.z) * CHUNKS, window = min(CHUNKS, chunks - from);
  int first, last;
  cl_split(first, last, columns, COLUMNS);
  unsigned char* const factors = smem + chunks * ROWS * 128;
  for (int chunk = 0; chunk < chunks; chunk++) cl_load<ROWS>(smem + chunk * ROWS * 128, x, first_row, rows, chunk, a.C);
  ClStream<T, COLUMNS> stream{BY_QUERY ? p : q, factors + 8192, columns, a.C, chunks, from, window, first, last, 0, 0};
  stream.start();

  ClSums<T, CHUNKS> sums;
  const float unit = a.inverse_temperature * CL_LOG2E;
  for (int tile = first; tile < last; tile++) {
    Scores scores;
    scores.clear();
    for (int chunk = 0; chunk < chunks; chunk++) scores.multiply(smem + chunk * ROWS * 128, stream.next());
#pragma unroll
    for (int r = 0; r < R; r++) {
      const int row = first_row + scores.row(r);
      float g[N];
#pragma unroll
      for (int n = 0; n < N; n++) {
        const int column = tile * COLUMNS + scores.column(n), query = BY_QUERY ? row : column, passage = BY_QUERY ? column : row;
        g[n] = 0.f;
        if (row >= rows || column >= columns) continue;
        const bool own = passage == int(a.targets[query]);
        if (!own && cl_hidden(a, query, passage)) continue;
        const float score = scores.at(r, n) * unit;
        // bf16 scores are not exact enough for two parts, and registers are scarce there.
        g[n] = ex2(sizeof(T) == 4 ? (score - lse[2 * query]) - lse[2 * query + 1] : score - lse[query]) - (own ? 1.f : 0.f);
      }
      sums.put(factors, scores, r, g);
    }
    __syncthreads();
    sums.take(factors);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
      if (chunk < window) sums.add(chunk, factors, stream.next());
    }
  }
  cp_async_wait_all();

  const float weight = *scale * a.inverse_temperature;
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; chunk++) {
    sums.each(chunk, [&](int r, int c, float g0, float g1) {
      const int row = first_row + r, column = (from + chunk) * CHUNK + c;
      if (chunk >= window || row >= rows || column >= a.C) return;
      const size_t at = size_t(row) * size_t(a.C) + size_t(column);
      if (gridDim.y == 1) {
        dx[at] = from_float<T>(g0 * weight);
        dx[at + 1] = from_float<T>(g1 * weight);
      } else {
        float* const to = partial + size_t(blockIdx.y) * size_t(capacity) * size_t(a.C) + at;
        *reinterpret_cast<float2*>(to) = make_float2(g0 * weight, g1 * weight);
      }
    });
  }
}

template <class T>
__device__ __forceinline__ void contrastive_gradient(T* dx, const float* partial, const int* rows, int C, int capacity, int splits) {
  const size_t at = (size_t(blockIdx.x) * 256 + threadIdx.x) * 8;
  if (at >= size_t(*rows) * size_t(C)) return;
  float total[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  for (int split = 0; split < splits; split++) {
    float v[8];
    load8(v, partial + size_t(split) * size_t(capacity) * size_t(C) + at);
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] += v[i];
  }
  store8(dx + at, total);
}

#endif

extern "C" __global__ void __launch_bounds__(256)
    contrastive_loss(float* loss, float* lse, float* parts, uint32_t* correct, const float* part_max, const float* part_sum,
                     const float* target_score, const int* queries, int capacity, int splits) {
  constexpr float LN2 = 0.693147180559945309f;
  const int row = int(blockIdx.x) * 256 + int(threadIdx.x);
  if (row >= *queries) return;
  float most = part_max[row], total = 0.f;
  for (int split = 1; split < splits; split++) most = fmaxf(most, part_max[size_t(split) * size_t(capacity) + row]);
  for (int split = 0; split < splits; split++) {
    const size_t at = size_t(split) * size_t(capacity) + row;
    total += part_sum[at] * ex2(part_max[at] - most);
  }
  const float rest = logf(total) * CL_LOG2E;
  lse[row] = most + rest;
  parts[2 * row] = most;
  parts[2 * row + 1] = rest;
  loss[row] = (most - target_score[row]) * LN2 + logf(total);
  correct[row] = target_score[row] >= most ? 1u : 0u;
}
RM_EXPORT(contrastive_loss)

#define RM_CONTRASTIVE_BACKWARD(name, T, BY_QUERY, CHUNKS)                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                                 \
      name(T* dx, float* partial, const T* q, const T* p, const float* lse, const float* scale, const Contrastive a, int capacity) { \
    contrastive_backward<T, BY_QUERY, CHUNKS>(dx, partial, q, p, lse, scale, a, capacity);                                          \
  }                                                                                                                                 \
  RM_EXPORT_HOT(name)

#define RM_CONTRASTIVE(suffix, T)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                                                 \
      contrastive_forward_##suffix(float* part_max, float* part_sum, float* target_score, const T* q, const T* p,                   \
                                   const Contrastive a, int capacity) {                                                             \
    contrastive_forward(part_max, part_sum, target_score, q, p, a, capacity);                                                       \
  }                                                                                                                                 \
  RM_EXPORT_HOT(contrastive_forward_##suffix)                                                                                       \
  RM_CONTRASTIVE_BACKWARD(contrastive_backward_queries_##suffix, T, true, 6 * int(sizeof(T)))                                       \
  RM_CONTRASTIVE_BACKWARD(contrastive_backward_passages_##suffix, T, false, 6 * int(sizeof(T)))                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                                                 \
      contrastive_gradient_##suffix(T* dx, const float* partial, const int* rows, int C, int capacity, int splits) {                \
    contrastive_gradient(dx, partial, rows, C, capacity, splits);                                                                   \
  }                                                                                                                                 \
  RM_EXPORT_HOT(contrastive_gradient_##suffix)

RM_CONTRASTIVE(f32, float)
RM_CONTRASTIVE(bf16, bf16)
RM_CONTRASTIVE_BACKWARD(contrastive_backward_queries_narrow_bf16, bf16, true, 6)
RM_CONTRASTIVE_BACKWARD(contrastive_backward_passages_narrow_bf16, bf16, false, 6)
