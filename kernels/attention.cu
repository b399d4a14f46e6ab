// Multi-head self-attention over packed sequences: P = softmax(Q K^T / sqrt(D)), out = dropout(P) V, and its gradients.
//
//   attention_forward_d<D>        writes (=) out [R, C], lse [R, H]
//   attention_backward_dq_d<D>    writes (=) dq [R, C] in rows of dq_stride elements, delta [R, H] = rowsum(dout * out)
//   attention_backward_dkv_d<D>   writes (=) dk, dv [T, C] in rows of dkv_stride elements; reads delta, so it comes after dq
//
// D is 32, 64 or 128, C = H D. q [R, C], k, v [T, C] are views with their own strides; pointers and strides are multiples of 16 bytes.
// out and dout are dense [R, C]. lse and delta are f32. Scores, probabilities and sums are f32; bf16 storage rounds P and dS to bf16
// for the tensor cores. Rows that belong to no sequence, and tokens past the last sequence, stay as they are.
//
// Grid: (capacity for tiles, H). batch.tiles lists the tiles of 64 query rows (forward, dq) or of 64 keys (dkv), longest sequence
// first; blocks past *batch.tile_count leave at once, and every other one of a sequence where blocks own 128 rows. Block: the entry point's
// launch bound, exactly. Dynamic shared memory:
//   tiles of 64 D elements: 5 (forward), 6 (dq, dkv) in bf16; 3, 4, 4 in f32; and 2048 bytes; f32: 9216 more; dkv: 1280 n more,
//   n = 2 stages in bf16 and 1 in f32.
// Bound by the tensor cores from about 256 tokens on, by bytes below.
//
// On sm_90, for bf16 and heads of 64, by warpgroups (flash_hopper.cuh):
//
//   attention_forward_hopper_d64_bf16          as above; 33 KB + 18 KB of shared memory: 6 tiles and 4096 bytes
//   attention_backward_{long,short}_d64_bf16   write (=) dq, dk and dv in one pass over a head of a sequence
//
// The backward's grid is (capacity for sequences, H), batch.tiles lists each sequence once with tile 0, and no sequence has more than
// 64 `tiles` keys; shared memory as in BackwardLayout, with a dQ of `tiles` tiles where sequences may have more than 128 keys (long) or
// 64 (short).
#include "flash_hopper.cuh"

#if !defined(RM_SIGNATURES)

namespace flash {

template <class T, int D> struct Tensors {
  View<T> k, v;
  GivenQueries<T, D> queries;
  AllKeys mask;
  __device__ __forceinline__ Tensors(const T* q, int q_stride, const T* k_start, int k_stride, const T* v_start, int v_stride,
                                     const Item& item)
      : k{k_start + column(item, k_stride), k_stride}, v{v_start + column(item, v_stride), v_stride},
        queries{{q + size_t(item.head) * D, q_stride}}, mask{item.keys} {}
  static __device__ __forceinline__ size_t column(const Item& item, int stride) {
    return size_t(item.first_key) * size_t(stride) + size_t(item.head) * D;
  }
};

}  // namespace flash

#endif

#define ATTENTION_FORWARD(T, suffix, D, threads, blocks, ...)                                                                 \
  extern "C" __global__ void __launch_bounds__(threads, blocks) attention_forward_d##D##_##suffix(                            \
      T* out, float* lse, const T* q, int q_stride, const T* k, int k_stride, const T* v, int v_stride, AttentionBatch batch, \
      Dropout dropout, unsigned site, int heads) {                                                                            \
    RM_DYN_SMEM(smem);                                                                                                        \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                                 \
    flash::Item item;                                                                                                         \
    if (!flash::find<P>(item, batch)) return;                                                                                 \
    const flash::Tensors<T, D> x(q, q_stride, k, k_stride, v, v_stride, item);                                                \
    const flash::Drop drop(dropout, site, batch, item);                                                                       \
    flash::forward<P>(out, lse, x.queries, x.k, x.v, x.mask, item, batch, drop, heads, smem);                                 \
  }                                                                                                                           \
  RM_EXPORT_HOT(attention_forward_d##D##_##suffix)

#define ATTENTION_BACKWARD_DQ(T, suffix, D, threads, blocks, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) attention_backward_dq_d##D##_##suffix(                  \
      T* dq, int dq_stride, float* delta, const T* q, int q_stride, const T* k, int k_stride, const T* v, int v_stride, \
      const T* out, const float* lse, const T* dout, AttentionBatch batch, Dropout dropout, unsigned site, int heads) { \
    RM_DYN_SMEM(smem);                                                                                                  \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                           \
    flash::Item item;                                                                                                   \
    if (!flash::find<P>(item, batch)) return;                                                                           \
    const flash::Tensors<T, D> x(q, q_stride, k, k_stride, v, v_stride, item);                                          \
    const flash::Drop drop(dropout, site, batch, item);                                                                 \
    flash::backward_dq<P>(dq, dq_stride, delta, out, {dout, lse}, x.queries, x.k, x.v, x.mask, item,                    \
                                                       batch, drop, heads, smem);                                       \
  }                                                                                                                     \
  RM_EXPORT_HOT(attention_backward_dq_d##D##_##suffix)

#define ATTENTION_BACKWARD_DKV(T, suffix, D, threads, blocks, ...)                                                            \
  extern "C" __global__ void __launch_bounds__(threads, blocks) attention_backward_dkv_d##D##_##suffix(                       \
      T* dk, T* dv, int dkv_stride, const T* q, int q_stride, const T* k, int k_stride, const T* v, int v_stride,             \
      const float* lse, const float* delta, const T* dout, AttentionBatch batch, Dropout dropout, unsigned site, int heads) { \
    RM_DYN_SMEM(smem);                                                                                                        \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                                 \
    flash::Item item;                                                                                                         \
    if (!flash::find<P>(item, batch)) return;                                                                                 \
    const flash::Tensors<T, D> x(q, q_stride, k, k_stride, v, v_stride, item);                                                \
    const flash::Drop drop(dropout, site, batch, item);                                                                       \
    const size_t corner = x.column(item, dkv_stride);                                                                         \
    flash::backward_dkv<P>(dk + corner, dv + corner, dkv_stride, delta, {dout, lse}, x.queries, x.k,                          \
                                                        x.v, x.mask, item, batch, drop, heads, smem);                         \
  }                                                                                                                           \
  RM_EXPORT_HOT(attention_backward_dkv_d##D##_##suffix)

// Threads, least blocks a multiprocessor, then the plan: warps, blocks of 16 rows of each, left operands kept, streamed rows a step, and
// of the rest.
ATTENTION_FORWARD(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ATTENTION_FORWARD(bf16, bf16, 64, 64, 1, 2, 2, true, 64, 32)
ATTENTION_FORWARD(bf16, bf16, 128, 64, 1, 2, 2, false, 32, 32)
ATTENTION_FORWARD(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ATTENTION_FORWARD(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ATTENTION_FORWARD(float, f32, 128, 128, 1, 4, 1, false, 32, 32)

ATTENTION_BACKWARD_DQ(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ATTENTION_BACKWARD_DQ(bf16, bf16, 64, 64, 1, 2, 2, true, 32, 32)
ATTENTION_BACKWARD_DQ(bf16, bf16, 128, 64, 1, 2, 2, false, 16, 16)
ATTENTION_BACKWARD_DQ(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ATTENTION_BACKWARD_DQ(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ATTENTION_BACKWARD_DQ(float, f32, 128, 128, 1, 4, 1, false, 32, 32)

ATTENTION_BACKWARD_DKV(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ATTENTION_BACKWARD_DKV(bf16, bf16, 64, 64, 1, 2, 2, false, 16, 16)
ATTENTION_BACKWARD_DKV(bf16, bf16, 128, 128, 1, 4, 1, false, 32, 32)
ATTENTION_BACKWARD_DKV(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ATTENTION_BACKWARD_DKV(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ATTENTION_BACKWARD_DKV(float, f32, 128, 128, 1, 4, 1, false, 32, 32)

#define ATTENTION_FORWARD_HOPPER(threads, blocks, GROUPS)                                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) attention_forward_hopper_d64_bf16(                              \
      bf16* out, float* lse, const bf16* q, int q_stride, const bf16* k, int k_stride, const bf16* v, int v_stride,             \
      AttentionBatch batch, Dropout dropout, unsigned site, int heads) {                                                        \
    RM_DYN_SMEM(smem);                                                                                                          \
    flash::Item item;                                                                                                           \
    if (!flash::find<flash::hopper::ForwardPlan<GROUPS>>(item, batch)) return;                                                  \
    const flash::Tensors<bf16, 64> x(q, q_stride, k, k_stride, v, v_stride, item);                                              \
    const flash::Drop drop(dropout, site, batch, item);                                                                         \
    flash::hopper::forward<GROUPS>(out, lse, x.queries, x.k, x.v, x.mask, item, batch, drop, heads, smem);                      \
  }                                                                                                                             \
  RM_EXPORT_HOT(attention_forward_hopper_d64_bf16)

#define ATTENTION_BACKWARD_HOPPER(kind, threads, blocks, GROUPS)                                                                \
  extern "C" __global__ void __launch_bounds__(threads, blocks) attention_backward_##kind##_d64_bf16(                           \
      bf16* dq, int dq_stride, bf16* dk, bf16* dv, int dkv_stride, const bf16* q, int q_stride, const bf16* k, int k_stride,    \
      const bf16* v, int v_stride, const bf16* out, const float* lse, const bf16* dout, AttentionBatch batch, Dropout dropout,  \
      unsigned site, int heads, int tiles) {                                                                                    \
    RM_DYN_SMEM(smem);                                                                                                          \
    flash::Item item;                                                                                                           \
    if (!flash::find<flash::hopper::ForwardPlan<1>>(item, batch)) return;                                                       \
    const flash::Tensors<bf16, 64> x(q, q_stride, k, k_stride, v, v_stride, item);                                              \
    const flash::Drop drop(dropout, site, batch, item);                                                                         \
    const size_t corner = x.column(item, dkv_stride), row = size_t(item.first_row) * size_t(dq_stride) + size_t(item.head) * 64; \
    flash::hopper::backward<GROUPS>(dq + row, dq_stride, dk + corner, dv + corner, dkv_stride, out, {dout, lse}, x.queries,     \
                                    x.k, x.v, x.mask, item, batch, drop, heads, smem, tiles);                                   \
  }                                                                                                                             \
  RM_EXPORT_HOT(attention_backward_##kind##_d64_bf16)

ATTENTION_FORWARD_HOPPER(256, 2, 2)
ATTENTION_BACKWARD_HOPPER(long, 256, 1, 2)
ATTENTION_BACKWARD_HOPPER(short, 128, 2, 1)
