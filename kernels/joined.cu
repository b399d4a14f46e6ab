// Joined embeddings of texts, dense and lexical: [dense, W | a column a word, V]. A text has K words at most, the rest of its row is zero.
//
//   all[p, 0 .. W] = dense[s]     all[p, W + ids[s, k]] = weights[s, k]     p = places[s]; an id of all bits set is no word
//
// joined_put       all [N, W + V] (=, rows of the places). Grid S, block 256.
// joined_take      d_dense [S, W], d_weights [S, K] (=): what a gradient of `all` is for both; 0 for no word. Grid S, block 256.
// joined_winners   winners [S, K] (=): the first row i of text s, but its first, with the largest h_i . w[ids[s, k]]; all bits set for no
//                  word. Grid (S, ceil(K / 8)), block 256.
// joined_scatter   g [chunk, V], zeros before: d_weights[s, k] at (winners[s, k] - first, ids[s, k]) where that row is in the chunk.
//                  Grid S, block 128.
//
// *texts, on the device, is the true S. Rows of text s are cu_seqlens[s] .. cu_seqlens[s + 1]. W, V and C are multiples of 8; pointers
// are 16-byte aligned. all, dense, h, w, g f32 or bf16; weights and sums f32. Bound by bytes; joined_winners by those out of L2.
#include "common.cuh"

#if !defined(RM_SIGNATURES)

constexpr uint32_t JOINED_NONE = 0xffffffffu;

template <class T>
__device__ __forceinline__ void joined_put(T* all, const T* dense, const uint32_t* ids, const float* weights, const uint32_t* places,
                                           const int* texts, int W, int V, int K) {
  const int s = int(blockIdx.x), me = int(threadIdx.x);
  if (s >= *texts) return;
  T* const to = all + size_t(places[s]) * size_t(W + V);
  const int vectors = W * int(sizeof(T)) / 16, end = (W + V) * int(sizeof(T)) / 16;
  const uint4* const from = reinterpret_cast<const uint4*>(dense + size_t(s) * size_t(W));
  for (int v = me; v < end; v += 256) reinterpret_cast<uint4*>(to)[v] = v < vectors ? from[v] : make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int k = me; k < K; k += 256) {
    const uint32_t id = ids[size_t(s) * size_t(K) + k];
    if (id != JOINED_NONE) to[W + int(id)] = from_float<T>(weights[size_t(s) * size_t(K) + k]);
  }
}

template <class T>
__device__ __forceinline__ void joined_take(T* d_dense, float* d_weights, const T* d_all, const uint32_t* ids, const uint32_t* places,
                                            const int* texts, int W, int V, int K) {
  const int s = int(blockIdx.x), me = int(threadIdx.x);
  if (s >= *texts) return;
  const T* const from = d_all + size_t(places[s]) * size_t(W + V);
  const int vectors = W * int(sizeof(T)) / 16;
  uint4* const to = reinterpret_cast<uint4*>(d_dense + size_t(s) * size_t(W));
  for (int v = me; v < vectors; v += 256) to[v] = reinterpret_cast<const uint4*>(from)[v];
  for (int k = me; k < K; k += 256) {
    const size_t at = size_t(s) * size_t(K) + k;
    d_weights[at] = ids[at] == JOINED_NONE ? 0.f : to_float(from[W + int(ids[at])]);
  }
}

template <class T>
__device__ __forceinline__ void joined_winners(uint32_t* winners, const T* h, const T* w, const uint32_t* ids, const uint32_t* cu_seqlens,
                                               const int* texts, int C, int K) {
  const int s = int(blockIdx.x), k = int(blockIdx.y) * 8 + warp_id();
  if (s >= *texts || k >= K) return;
  const size_t at = size_t(s) * size_t(K) + k;
  const uint32_t id = ids[at];
  if (id == JOINED_NONE) {
    if (lane_id() == 0) winners[at] = JOINED_NONE;
    return;
  }
  const T* const word = w + size_t(id) * size_t(C);
  float most = -INFINITY;
  uint32_t winner = JOINED_NONE;
#pragma unroll 1
  for (uint32_t row = cu_seqlens[s] + 1; row < cu_seqlens[s + 1]; row++) {
    const T* const x = h + size_t(row) * size_t(C);
    float sum = 0.f;
#pragma unroll 2
    for (int c = lane_id() * 8; c < C; c += WARP * 8) {
      float a[8], b[8];
      load8(a, x + c);
      load8(b, word + c);
#pragma unroll
      for (int i = 0; i < 8; i++) sum = fmaf(a[i], b[i], sum);
    }
    sum = warp_sum(sum);
    if (winner == JOINED_NONE || sum > most) most = sum, winner = row;
  }
  if (lane_id() == 0) winners[at] = winner;
}

template <class T>
__device__ __forceinline__ void joined_scatter(T* g, const float* d_weights, const uint32_t* ids, const uint32_t* winners,
                                               const int* texts, int first, int chunk, int V, int K) {
  const int s = int(blockIdx.x);
  if (s >= *texts) return;
  for (int k = int(threadIdx.x); k < K; k += 128) {
    const size_t at = size_t(s) * size_t(K) + k;
    // No word has no row in any chunk.
    const uint32_t row = winners[at] - uint32_t(first);
    if (winners[at] != JOINED_NONE && row < uint32_t(chunk)) g[size_t(row) * size_t(V) + ids[at]] = from_float<T>(d_weights[at]);
  }
}

#endif

#define RM_JOINED(suffix, T)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      joined_put_##suffix(T* all, const T* dense, const uint32_t* ids, const float* weights, const uint32_t* places, const int* texts,  \
                          int W, int V, int K) {                                                                                        \
    joined_put(all, dense, ids, weights, places, texts, W, V, K);                                                                       \
  }                                                                                                                                     \
  RM_EXPORT_HOT(joined_put_##suffix)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      joined_take_##suffix(T* d_dense, float* d_weights, const T* d_all, const uint32_t* ids, const uint32_t* places, const int* texts, \
                           int W, int V, int K) {                                                                                       \
    joined_take(d_dense, d_weights, d_all, ids, places, texts, W, V, K);                                                                \
  }                                                                                                                                     \
  RM_EXPORT_HOT(joined_take_##suffix)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256)                                                                                     \
      joined_winners_##suffix(uint32_t* winners, const T* h, const T* w, const uint32_t* ids, const uint32_t* cu_seqlens,               \
                              const int* texts, int C, int K) {                                                                         \
    joined_winners(winners, h, w, ids, cu_seqlens, texts, C, K);                                                                        \
  }                                                                                                                                     \
  RM_EXPORT_HOT(joined_winners_##suffix)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128)                                                                                     \
      joined_scatter_##suffix(T* g, const float* d_weights, const uint32_t* ids, const uint32_t* winners, const int* texts, int first,  \
                              int chunk, int V, int K) {                                                                                \
    joined_scatter(g, d_weights, ids, winners, texts, first, chunk, V, K);                                                              \
  }                                                                                                                                     \
  RM_EXPORT_HOT(joined_scatter_##suffix)

RM_JOINED(f32, float)
RM_JOINED(bf16, bf16)
