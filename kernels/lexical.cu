// Lexical representations of texts: the largest logit of every word over the rows of a text but its first, and the K largest of these.
//
//   m[s, v] = max over i in cu_seqlens[s] + 1 .. cu_seqlens[s + 1] of logits[i, v]     w[s, v] = m[s, v] + bias[v]
//   order: w descending, then v ascending                                               ids, weights [s, 0 .. K] = the first K of it
//
// T rows of S sequences (*rows, on the device, is the true T), none empty, come in chunks: a launch works on rows first .. first + chunk,
// whose logits are [chunk, V]. Sequence s keeps its maxima in slot s % chunk, so that a chunk's sequences, at most `chunk`, have a slot
// each, and one that goes on in the next chunk finds its own there. Memory is O(chunk V), whatever T and S.
//
// lexical_max    maxima [chunk, V] (=): of sequences that begin in the chunk; (max=): of the one that began before.
//                Grid (ceil(V / 1024), any), block 128; blocks of a column take every gridDim.y-th sequence.
// lexical_top_k  ids, weights [S, K] (=, the rows of sequences that end in the chunk): all bits set and -inf where a sequence has one row.
//                Grid: any number of blocks, each takes every gridDim.x-th sequence; block 512. Dynamic shared memory 8 `size` bytes;
//                `size` is a power of two, at least K and 32.
//
// V is a multiple of 8 and at most 2^24; padding has the bias -inf. K is at most V without the padding. Storage of logits and maxima f32 or
// bf16, exact as maxima are; bias and weights f32. NaN counts as nothing, -0 as 0. The same bits whatever the chunks.
//
// lexical_max is bound by bytes out of L2, where the product left the chunk: it reads a logit once. lexical_top_k selects by digits of
// eight bits, highest first: four passes over one row of maxima, five to seven where the K-th largest weight is not alone.
#include "common.cuh"

constexpr int LX_THREADS = 512;
constexpr int LX_ID_BITS = 24;
constexpr uint32_t LX_ID_MASK = (1u << LX_ID_BITS) - 1u;
constexpr uint32_t LX_NO_ID = 0xffffffffu;

#if !defined(RM_SIGNATURES)

// Larger for what comes earlier in the order: the weight's bits, monotonic as an unsigned number, then the id's complement.
__device__ __forceinline__ uint64_t lx_key(float weight, int id) {
  const uint32_t bits = __float_as_uint(weight == 0.f ? 0.f : weight), sign = bits >> 31;
  return uint64_t(bits ^ (sign ? 0xffffffffu : 0x80000000u)) << LX_ID_BITS | uint64_t(~uint32_t(id) & LX_ID_MASK);
}
__device__ __forceinline__ float lx_weight(uint64_t key) {
  const uint32_t bits = uint32_t(key >> LX_ID_BITS);
  return __uint_as_float(bits ^ (bits >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ uint32_t lx_id(uint64_t key) { return ~uint32_t(key) & LX_ID_MASK; }

// The sequences that have rows in a chunk: first .. last, none when last < first.
struct LxSequences {
  int first, last, end;   // end: of the chunk's rows
  __device__ __forceinline__ LxSequences(const uint32_t* sequence, const int* rows, int first_row, int chunk) {
    end = min(*rows, first_row + chunk);
    first = 0, last = -1;
    if (first_row < end) first = int(sequence[first_row]), last = int(sequence[end - 1]);
  }
};

template <class T>
__device__ __forceinline__ void lexical_max(T* maxima, const T* logits, const uint32_t* cu_seqlens, const uint32_t* sequence,
                                            const int* rows, int first, int chunk, int V) {
  const LxSequences live(sequence, rows, first, chunk);
  const int c = (int(blockIdx.x) * 128 + int(threadIdx.x)) * 8;
  if (c >= V) return;
  for (int s = live.first + int(blockIdx.y); s <= live.last; s += int(gridDim.y)) {
    const int start = int(cu_seqlens[s]), begin = max(start + 1, first), end = min(int(cu_seqlens[s + 1]), live.end);
    T* const to = maxima + size_t(s % chunk) * size_t(V) + c;
    float most[8] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY, -INFINITY};
    if (start < first) load8(most, to);
#pragma unroll 4
    for (int row = begin; row < end; row++) {
      float v[8];
      load8(v, logits + size_t(row - first) * size_t(V) + c);
#pragma unroll
      for (int i = 0; i < 8; i++) most[i] = fmaxf(most[i], v[i]);
    }
    store8(to, most);
  }
}

// The digit below which fewer than `need` keys lie above: the first bin, from the highest down, at which the counts reach `need`. Leaves
// the digit and what is still needed of its bin in found[0 .. 2]. One warp calls it.
__device__ __forceinline__ void lx_digit(int* found, const int* counts, int need) {
  const int top = 255 - 8 * lane_id();
  int bins[8], own = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) bins[i] = counts[top - i], own += bins[i];
  int sum = own;
#pragma unroll
  for (int lanes = 1; lanes < WARP; lanes *= 2) {
    const int before = __shfl_up_sync(FULL_MASK, sum, lanes);
    if (lane_id() >= lanes) sum += before;
  }
  int above = sum - own;
#pragma unroll
  for (int i = 0; i < 8; i++) {
    // True for one bin of one lane.
    if (above < need && above + bins[i] >= need) found[0] = top - i, found[1] = need - above;
    above += bins[i];
  }
}

// Compares and exchanges pairs `apart` from each other of keys[0 .. size]; runs of `run` keys alternate, the first descending.
__device__ __forceinline__ void lx_exchange(uint64_t* keys, int size, int apart, int run) {
  __syncthreads();
  for (int pair = int(threadIdx.x); pair < size / 2; pair += LX_THREADS) {
    const int low = 2 * pair - (pair & (apart - 1)), high = low + apart;
    const uint64_t a = keys[low], b = keys[high];
    if ((a < b) == ((low & run) == 0)) keys[low] = b, keys[high] = a;
  }
}

// The K largest keys of a sequence, sorted, to its row of ids and weights. The whole block calls it.
template <class T>
__device__ __forceinline__ void lx_select(uint32_t* ids, float* weights, const T* maxima, const float* bias, int V, int K, int size,
                                          uint64_t* keys, int* counts, int* found) {
  const int me = int(threadIdx.x);
  uint64_t bound = 0;
  int need = K;
  // Unrolled, it would make the compiler spill.
#pragma unroll 1
  for (int shift = LX_ID_BITS + 24; shift >= 0; shift -= 8) {
    __syncthreads();
    if (me < 256) counts[me] = 0;
    __syncthreads();
    for (int v = me; v < V; v += LX_THREADS) {
      const uint64_t key = lx_key(to_float(maxima[v]) + bias[v], v);
      if ((key ^ bound) >> (shift + 8) == 0) atomicAdd(counts + int(key >> shift & 255u), 1);
    }
    __syncthreads();
    if (warp_id() == 0) lx_digit(found, counts, need);
    __syncthreads();
    bound |= uint64_t(found[0]) << shift;
    need = found[1];
    // All of the bin are taken: what is below the digit does not matter.
    if (counts[found[0]] == need) break;
  }
  __syncthreads();
  if (me == 0) found[0] = 0;
  for (int i = me; i < size; i += LX_THREADS) keys[i] = 0;
  __syncthreads();
  for (int v = me; v < V; v += LX_THREADS) {
    const uint64_t key = lx_key(to_float(maxima[v]) + bias[v], v);
    if (key >= bound) keys[atomicAdd(found, 1)] = key;
  }
  for (int run = 2; run <= size; run *= 2) {
    for (int apart = run / 2; apart > 0; apart /= 2) lx_exchange(keys, size, apart, run);
  }
  __syncthreads();
  for (int i = me; i < K; i += LX_THREADS) {
    const float weight = lx_weight(keys[i]);
    ids[i] = weight == -INFINITY ? LX_NO_ID : lx_id(keys[i]);
    weights[i] = weight;
  }
}

template <class T>
__device__ __forceinline__ void lexical_top_k(uint32_t* ids, float* weights, const T* maxima, const float* bias,
                                              const uint32_t* cu_seqlens, const uint32_t* sequence, const int* rows, int first, int chunk,
                                              int V, int K, int size) {
  RM_DYN_SMEM(smem);
  RM_SHARED(int, counts, 256);
  RM_SHARED(int, found, 2);
  const LxSequences live(sequence, rows, first, chunk);
  for (int s = live.first + int(blockIdx.x); s <= live.last; s += int(gridDim.x)) {
    if (int(cu_seqlens[s + 1]) > live.end) continue;
    const size_t at = size_t(s) * size_t(K);
    lx_select(ids + at, weights + at, maxima + size_t(s % chunk) * size_t(V), bias, V, K, size, smem_at<uint64_t>(smem, 0), counts, found);
  }
}

#endif

#define RM_LEXICAL(suffix, T)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(128)                                                                                      \
      lexical_max_##suffix(T* maxima, const T* logits, const uint32_t* cu_seqlens, const uint32_t* sequence, const int* rows, int first, \
                           int chunk, int V) {                                                                                           \
    lexical_max(maxima, logits, cu_seqlens, sequence, rows, first, chunk, V);                                                            \
  }                                                                                                                                      \
  RM_EXPORT_HOT(lexical_max_##suffix)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(512)                                                                                      \
      lexical_top_k_##suffix(uint32_t* ids, float* weights, const T* maxima, const float* bias, const uint32_t* cu_seqlens,              \
                             const uint32_t* sequence, const int* rows, int first, int chunk, int V, int K, int size) {                  \
    lexical_top_k(ids, weights, maxima, bias, cu_seqlens, sequence, rows, first, chunk, V, K, size);                                     \
  }                                                                                                                                      \
  RM_EXPORT_HOT(lexical_top_k_##suffix)

RM_LEXICAL(f32, float)
RM_LEXICAL(bf16, bf16)
