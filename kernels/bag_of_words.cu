// Two losses of one chunk of logits: masked-LM cross entropy of the rows with a label, and a bag-of-words loss of each sequence.
//
//   x_r = logits_r + bias       u_v = max over the rows r of the sequence, its first left out, of x_rv       (ties: the lowest row)
//   row loss = lse(x_r) - x_r[label]                        bag loss = weight sum over the bag's words j of (lse(u) - u_j)
//   g_rv = label_scale (softmax(x_r)_v - onehot_v)   +   [r is the row of u_v] bag_scale weight (n softmax(u)_v - [v in the bag])
//
// A chunk holds whole sequences, so its logits exist once: they become their gradient in place. n: words of the bag, distinct; a sequence
// of one row, or of an empty bag, has no bag loss. Tables of the chunk in `HeadChunk`; slots are rows of the chunk. V: vocabulary, padded
// to a multiple of 8; padding has bias -inf, so it gets the gradient 0. Columns are taken eight a thread, 1024 a block; rows by slabs of
// at most 64 of one sequence. Slots past the last sequence are slabs of no sequence, whose gradient is 0, since products sum over all.
//
// bag_of_words_rows      stats [chunk, 2] (=, slots with a label: max, label_scale / sum), row_loss, row_correct (=, the chunk's labels)
//                        Grid ceil(most labels / 4), block 512.
// bag_of_words_slabs     top, place [slabs, V] (=): largest logit of a slab's rows and its slot; a row even where no logit is a number.
//                        Grid (ceil(V / 1024), most slabs), block 128.
// bag_of_words_places    place [sequences, V] (=) over the slabs of each sequence, partial [sequences, ceil(V / 1024), 2] (=): max and
//                        sum of exponentials of u. Grid (ceil(V / 1024), most sequences), block 128.
// bag_of_words_loss      bag_loss [all sequences of the batch] (=, the chunk's), bags [sequences, 2] (=: max, bag_scale weight n / sum).
//                        Grid most sequences, block 128.
// bag_of_words_gradient  logits [chunk, V] in, gradient out (=); sums [slabs, V] (=): over the rows of each slab. Grid as of slabs.
// bag_of_words_bias      db_acc [V] (+=): the slabs' sums in ascending order. Grid ceil(V / 256), block 256.
//
// Storage of logits and of their maxima f32 or bf16, everything else f32. No dynamic shared memory. Bound by bytes out of L2, where the
// product left the chunk: every logit is read for the maxima and for the gradient, and again where its row has a label.
#include "cross_entropy.cuh"

// ---- parameter structs

struct HeadChunk {
  const uint32_t* counts;        // [6] rows, sequences, slabs of them, slabs in all, labels, first label of the chunk
  const uint32_t* sequence;      // [sequences] its number in the batch
  const uint32_t* cu_rows;       // [sequences + 1] first slot of each
  const uint32_t* cu_slabs;      // [sequences + 1] first slab of each
  const uint32_t* slabs;         // [slabs, 3] sequence of the chunk, first slot, end
  const uint32_t* label_slots;   // [labels] ascending
  const uint32_t* labels;        // [chunk] label of each slot, or NONE
  const uint32_t* cu_bags;       // [sequences + 1] first word of each bag
  const uint32_t* words;         // the bags, each ascending
  const float* weights;          // [sequences] of every word of a bag
};

constexpr uint32_t BOW_NONE = 0xffffffffu;
constexpr int BOW_THREADS = 128;
constexpr uint16_t BOW_NOWHERE = 0xffffu;

#if !defined(RM_SIGNATURES)

struct alignas(16) Places8 {
  uint16_t at[8];
};

__device__ __forceinline__ int bow_column() { return (int(blockIdx.x) * BOW_THREADS + int(threadIdx.x)) * 8; }

template <class T>
__device__ __forceinline__ void bag_of_words_rows(float* stats, float* row_loss, uint32_t* row_correct, const T* logits, const float* bias,
                                                  const HeadChunk& chunk, const float* label_scale, int V) {
  const int begin = int(blockIdx.x) * CE_ROWS, live = min(int(chunk.counts[4]) - begin, CE_ROWS);
  if (live <= 0) return;
  const int first = int(chunk.counts[5]);
  int slot[CE_ROWS];
  const T* x[CE_ROWS];
  float own[CE_ROWS], top[CE_ROWS], sum[CE_ROWS];
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) {
    slot[r] = int(chunk.label_slots[begin + min(r, live - 1)]);
    const int label = int(chunk.labels[slot[r]]);
    x[r] = logits + size_t(slot[r]) * size_t(V);
    own[r] = to_float(x[r][label]) + bias[label];
  }
  ce_statistics(top, sum, x, bias, V);
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int r = 0; r < CE_ROWS; r++) {
    if (r >= live) continue;
    row_loss[first + begin + r] = (top[r] - own[r]) + logf(sum[r]);
    row_correct[first + begin + r] = own[r] >= top[r] ? 1u : 0u;
    if (label_scale == nullptr) continue;
    stats[2 * slot[r]] = top[r];
    stats[2 * slot[r] + 1] = *label_scale / sum[r];
  }
}

template <class T>
__device__ __forceinline__ void bag_of_words_slabs(T* top, uint16_t* place, const T* logits, const HeadChunk& chunk, int V) {
  const int slab = int(blockIdx.y), c = bow_column();
  if (slab >= int(chunk.counts[2]) || c >= V) return;
  const int sequence = int(chunk.slabs[3 * slab]), end = int(chunk.slabs[3 * slab + 2]);
  const int first = max(int(chunk.slabs[3 * slab + 1]), int(chunk.cu_rows[sequence]) + 1);
  float best[8];
  Places8 places;
#pragma unroll
  for (int i = 0; i < 8; i++) best[i] = -INFINITY, places.at[i] = first < end ? uint16_t(first) : BOW_NOWHERE;
  const T* x = logits + size_t(first) * size_t(V) + c;
#pragma unroll 4
  for (int r = first; r < end; r++, x += V) {
    float v[8];
    load8(v, x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      const bool more = v[i] > best[i];
      best[i] = more ? v[i] : best[i];
      places.at[i] = more ? uint16_t(r) : places.at[i];
    }
  }
  store8(top + size_t(slab) * size_t(V) + c, best);
  *reinterpret_cast<Places8*>(place + size_t(slab) * size_t(V) + c) = places;
}

template <class T>
__device__ __forceinline__ void bag_of_words_places(uint16_t* place, float* partial, const T* top, const uint16_t* slab_place,
                                                    const float* bias, const HeadChunk& chunk, int V) {
  RM_SHARED(float, scratch, WARP);
  const int sequence = int(blockIdx.y), c = bow_column();
  if (sequence >= int(chunk.counts[1])) return;
  float best[8];
  Places8 places;
#pragma unroll
  for (int i = 0; i < 8; i++) best[i] = -INFINITY, places.at[i] = BOW_NOWHERE;
  if (c < V) {
    for (int slab = int(chunk.cu_slabs[sequence]); slab < int(chunk.cu_slabs[sequence + 1]); slab++) {
      float v[8];
      load8(v, top + size_t(slab) * size_t(V) + c);
      const Places8 from = *reinterpret_cast<const Places8*>(slab_place + size_t(slab) * size_t(V) + c);
#pragma unroll
      for (int i = 0; i < 8; i++)
        if (v[i] > best[i] || places.at[i] == BOW_NOWHERE) best[i] = v[i], places.at[i] = from.at[i];
    }
    *reinterpret_cast<Places8*>(place + size_t(sequence) * size_t(V) + c) = places;
    float b[8];
    load8(b, bias + c);
#pragma unroll
    for (int i = 0; i < 8; i++) best[i] += b[i];
  }
  float most = CE_LOWEST, sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; i++) most = fmaxf(most, best[i]);
  most = block_max(most, scratch);
#pragma unroll
  for (int i = 0; i < 8; i++) sum += ce_exp(best[i] - most);
  sum = block_sum(sum, scratch);
  if (threadIdx.x != 0) return;
  float* const out = partial + (size_t(sequence) * gridDim.x + blockIdx.x) * 2;
  out[0] = most, out[1] = sum;
}

template <class T>
__device__ __forceinline__ void bag_of_words_loss(float* bag_loss, float* bags, const float* partial, const T* logits, const float* bias,
                                                  const uint16_t* place, const HeadChunk& chunk, const float* bag_scale, int parts, int V) {
  RM_SHARED(float, scratch, WARP);
  const int sequence = int(blockIdx.x), me = int(threadIdx.x);
  if (sequence >= int(chunk.counts[1])) return;
  const int first = int(chunk.cu_bags[sequence]), words = int(chunk.cu_bags[sequence + 1]) - first;
  const bool none = words == 0 || chunk.cu_rows[sequence + 1] - chunk.cu_rows[sequence] < 2;
  const float* const part = partial + size_t(sequence) * size_t(parts) * 2;
  float most = CE_LOWEST, sum = 0.f, own = 0.f;
  for (int i = me; i < parts; i += BOW_THREADS) most = fmaxf(most, part[2 * i]);
  most = block_max(most, scratch);
  for (int i = me; i < parts; i += BOW_THREADS) sum += part[2 * i + 1] * ce_exp(part[2 * i] - most);
  sum = block_sum(sum, scratch);
  if (!none)
    for (int i = me; i < words; i += BOW_THREADS) {
      const int word = int(chunk.words[first + i]), slot = int(place[size_t(sequence) * size_t(V) + word]);
      own += most - (to_float(logits[size_t(slot) * size_t(V) + word]) + bias[word]);
    }
  own = block_sum(own, scratch);
  if (me != 0) return;
  const float weight = chunk.weights[sequence];
  bag_loss[chunk.sequence[sequence]] = none ? 0.f : weight * (own + float(words) * logf(sum));
  if (bag_scale == nullptr) return;
  bags[2 * sequence] = most;
  bags[2 * sequence + 1] = none ? 0.f : *bag_scale * weight * float(words) / sum;
}

// Bit i: word c + i is in the sequence's bag.
__device__ __forceinline__ uint32_t bow_words_of(const HeadChunk& chunk, int sequence, uint32_t c) {
  uint32_t low = chunk.cu_bags[sequence], end = chunk.cu_bags[sequence + 1], high = end;
  while (low < high) {
    const uint32_t middle = (low + high) / 2;
    if (chunk.words[middle] < c) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  uint32_t bits = 0;
  for (; low < end && chunk.words[low] < c + 8; low++) bits |= 1u << (chunk.words[low] - c);
  return bits;
}

template <class T>
__device__ __forceinline__ void bag_of_words_gradient(T* logits, float* sums, const float* stats, const float* bags, const float* bias,
                                                      const uint16_t* place, const HeadChunk& chunk, const float* label_scale,
                                                      const float* bag_scale, int V) {
  const int slab = int(blockIdx.y), c = bow_column();
  if (slab >= int(chunk.counts[3]) || c >= V) return;
  const uint32_t sequence = chunk.slabs[3 * slab];
  const int first = int(chunk.slabs[3 * slab + 1]), end = int(chunk.slabs[3 * slab + 2]);
  T* x = logits + size_t(first) * size_t(V) + c;
  float total[8] = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0.f};
  if (sequence == BOW_NONE) {
    for (int r = first; r < end; r++, x += V) store8(x, total);
    return;
  }
  float b[8];
  load8(b, bias + c);
  const float top = bags[2 * sequence], factor = bags[2 * sequence + 1];
  const float weight = factor == 0.f ? 0.f : *bag_scale * chunk.weights[sequence];
  const float onehot = label_scale == nullptr ? 0.f : *label_scale;
  const uint32_t words = bow_words_of(chunk, int(sequence), uint32_t(c));
  const Places8 places = *reinterpret_cast<const Places8*>(place + size_t(sequence) * size_t(V) + c);
#pragma unroll 2
  for (int r = first; r < end; r++, x += V) {
    float v[8], g[8];
    load8(v, x);
#pragma unroll
    for (int i = 0; i < 8; i++) {
      v[i] += b[i];
      g[i] = places.at[i] == r ? ce_exp(v[i] - top) * factor - (words >> i & 1 ? weight : 0.f) : 0.f;
    }
    const uint32_t label = chunk.labels[r];
    if (label != BOW_NONE) {
      const float most = stats[2 * r], scale = stats[2 * r + 1];
#pragma unroll
      for (int i = 0; i < 8; i++) g[i] += ce_exp(v[i] - most) * scale - (label == uint32_t(c + i) ? onehot : 0.f);
    }
    store8(x, g);
#pragma unroll
    for (int i = 0; i < 8; i++) total[i] += g[i];
  }
  store8(sums + size_t(slab) * size_t(V) + c, total);
}

#endif

extern "C" __global__ void __launch_bounds__(256) bag_of_words_bias(float* db_acc, const float* sums, const uint32_t* counts, int V) {
  const int c = int(blockIdx.x) * 256 + int(threadIdx.x), live = int(counts[2]);
  if (live == 0 || c >= V) return;
  float total = 0.f;
  for (int slab = 0; slab < live; slab++) total += sums[size_t(slab) * size_t(V) + c];
  db_acc[c] += total;
}
RM_EXPORT(bag_of_words_bias)

#define RM_BAG_OF_WORDS(suffix, T, BLOCKS)                                                                                                 \
  extern "C" __global__ void __launch_bounds__(512, BLOCKS)                                                                                \
      bag_of_words_rows_##suffix(float* stats, float* row_loss, uint32_t* row_correct, const T* logits, const float* bias,                 \
                                 HeadChunk chunk, const float* label_scale, int V) {                                                       \
    bag_of_words_rows(stats, row_loss, row_correct, logits, bias, chunk, label_scale, V);                                                  \
  }                                                                                                                                        \
  RM_EXPORT_HOT(bag_of_words_rows_##suffix)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128)                                                                                        \
      bag_of_words_slabs_##suffix(T* top, uint16_t* place, const T* logits, HeadChunk chunk, int V) {                                      \
    bag_of_words_slabs(top, place, logits, chunk, V);                                                                                      \
  }                                                                                                                                        \
  RM_EXPORT_HOT(bag_of_words_slabs_##suffix)                                                                                               \
  extern "C" __global__ void __launch_bounds__(128)                                                                                        \
      bag_of_words_places_##suffix(uint16_t* place, float* partial, const T* top, const uint16_t* slab_place, const float* bias,           \
                                   HeadChunk chunk, int V) {                                                                               \
    bag_of_words_places(place, partial, top, slab_place, bias, chunk, V);                                                                  \
  }                                                                                                                                        \
  RM_EXPORT_HOT(bag_of_words_places_##suffix)                                                                                              \
  extern "C" __global__ void __launch_bounds__(128)                                                                                        \
      bag_of_words_loss_##suffix(float* bag_loss, float* bags, const float* partial, const T* logits, const float* bias,                   \
                                 const uint16_t* place, HeadChunk chunk, const float* bag_scale, int parts, int V) {                       \
    bag_of_words_loss(bag_loss, bags, partial, logits, bias, place, chunk, bag_scale, parts, V);                                           \
  }                                                                                                                                        \
  RM_EXPORT(bag_of_words_loss_##suffix)                                                                                                    \
  extern "C" __global__ void __launch_bounds__(128)                                                                                        \
      bag_of_words_gradient_##suffix(T* logits, float* sums, const float* stats, const float* bags, const float* bias,                     \
                                     const uint16_t* place, HeadChunk chunk, const float* label_scale, const float* bag_scale, int V) {    \
    bag_of_words_gradient(logits, sums, stats, bags, bias, place, chunk, label_scale, bag_scale, V);                                       \
  }                                                                                                                                        \
  RM_EXPORT_HOT(bag_of_words_gradient_##suffix)

RM_BAG_OF_WORDS(f32, float, 1)
RM_BAG_OF_WORDS(bf16, bf16, 2)
