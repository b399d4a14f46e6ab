// Attention of the enhanced decoder: queries in two parts or whole, and a visibility mask of bits for every position; no position sees
// itself.
//
//   enhanced_decoding_forward_d<D>        writes (=) out [R, C], lse [R, H]
//   enhanced_decoding_backward_dq_d<D>    writes (=) dq [R, C], delta [R, H]
//   enhanced_decoding_backward_dkv_d<D>   writes (=) dkv [T, 2 C] (dK, dV side by side); reads delta, so it comes after dq
//
// The query of a row is q_position[position of the row] + q_sentence[sequence of the row], formed as a tile is loaded and rounded to the
// storage type; parts [Lmax, C] and [S, C]. Without q_sentence it is a row of q_position [R, C] itself. k, v [T, C] are views with their
// own strides. Bit rows as in `Visibility` of src/data/batch.rs. A row that sees nothing gives zeros and lse = +inf, and no gradient. The
// rest (D, precision, alignment, grid, block, shared memory) is as in attention.cu; tiles come from the same loop. Bound by the tensor
// cores: a mask costs one word a row and 32 keys. On sm_90, for bf16 and heads of 64, as there by warpgroups:
//
//   enhanced_decoding_forward_hopper_d64_bf16          as above
//   enhanced_decoding_backward_{long,short}_d64_bf16   write (=) dq [R, C] and dkv [T, 2 C]
#include "flash_hopper.cuh"

// ---- parameter structs

struct VisibleKeys {
  const uint32_t* offsets;   // [S + 1] first word of each sequence's pool
  const uint32_t* words;     // bit rows of ceil(L / 32) words
  const uint16_t* row;       // [T] row of the pool, by token
};

#if !defined(RM_SIGNATURES)

namespace flash {

// One bit row a position, and never the position itself.
struct SeenKeys {
  static constexpr bool COLUMNS = true;
  template <int M> struct Rows {
    int first[M][2], position[M][2];   // first word of the bit row, in the pool
  };
  const uint32_t* pool;
  const uint16_t* row;
  int keys;

  __device__ __forceinline__ SeenKeys(const VisibleKeys& v, const Item& item)
      : pool(v.words + v.offsets[item.sequence]), row(v.row + item.first_key), keys(item.keys) {}
  __device__ __forceinline__ int first_word(int position) const { return int(row[position]) * ((keys + 31) >> 5); }
  __device__ __forceinline__ uint32_t word(int first, int position, int key) const {
    if (key >= keys) return 0;
    const uint32_t own = uint32_t(position - key), seen = pool[first + (key >> 5)] >> (key & 31) & first_bits(keys - key);
    return own < 32 ? seen & ~(1u << own) : seen;
  }

  template <int M> __device__ __forceinline__ void begin(Rows<M>& rows, const uint32_t* positions, int count) const {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        const int i = 16 * m + 8 * r + (lane_id() >> 2);
        rows.position[m][r] = i < count ? int(positions[i]) : 0;
        rows.first[m][r] = first_word(rows.position[m][r]);
      }
  }
  __device__ __forceinline__ bool cuts(int, int) const { return true; }
  template <int M> __device__ __forceinline__ uint32_t word(const Rows<M>& rows, int m, int r, int key) const {
    return word(rows.first[m][r], rows.position[m][r], key);
  }
  __device__ __forceinline__ uint32_t column(int position, int key) const { return word(first_word(position), position, key); }
};

__device__ __forceinline__ uint32_t add_pairs(uint32_t a, uint32_t b) {
  const float2 x = unpack_bf16(a), y = unpack_bf16(b);
  return pack_bf16(x.x + y.x, x.y + y.y);
}
__device__ __forceinline__ uint4 add_chunks(const bf16* a, const bf16* b) {
  const uint4 x = *reinterpret_cast<const uint4*>(a), y = *reinterpret_cast<const uint4*>(b);
  return make_uint4(add_pairs(x.x, y.x), add_pairs(x.y, y.y), add_pairs(x.z, y.z), add_pairs(x.w, y.w));
}
__device__ __forceinline__ uint4 add_chunks(const float* a, const float* b) {
  const float4 x = *reinterpret_cast<const float4*>(a), y = *reinterpret_cast<const float4*>(b);
  return make_uint4(__float_as_uint(x.x + y.x), __float_as_uint(x.y + y.y), __float_as_uint(x.z + y.z), __float_as_uint(x.w + y.w));
}

template <class T, int D> struct FormedQueries {
  const T *by_position, *sentence;   // of the head; without a sentence the first is by row
  const uint32_t* position;          // [R]
  int width;
  template <int ROWS> __device__ __forceinline__ void load(unsigned char* tile, int first, int rows) const {
    using L = Tile<T, D>;
    for (int i = int(threadIdx.x); i < ROWS * L::CHUNKS; i += int(blockDim.x)) {
      const int row = i / L::CHUNKS, chunk = i % L::CHUNKS, at = chunk * L::ELEMENTS;
      uint4 query = make_uint4(0, 0, 0, 0);
      if (row < rows) {
        const uint32_t of = sentence == nullptr ? uint32_t(first + row) : position[first + row];
        const T* const from = by_position + size_t(of) * size_t(width) + at;
        query = sentence == nullptr ? *reinterpret_cast<const uint4*>(from) : add_chunks(from, sentence + at);
      }
      *reinterpret_cast<uint4*>(tile + L::at(row, chunk)) = query;
    }
  }
};

template <class T, int D> struct DecoderTensors {
  View<T> k, v;
  FormedQueries<T, D> queries;
  SeenKeys mask;
  __device__ __forceinline__ DecoderTensors(const T* q_position, const T* q_sentence, const T* k_start, int k_stride, const T* v_start,
                                            int v_stride, const VisibleKeys& visible, const AttentionBatch& batch, int heads,
                                            const Item& item)
      : k{k_start + column(item, k_stride), k_stride}, v{v_start + column(item, v_stride), v_stride},
        queries{q_position + item.head * D,
                q_sentence == nullptr ? nullptr : q_sentence + (size_t(item.sequence) * size_t(heads) + size_t(item.head)) * D,
                batch.position, heads * D},
        mask(visible, item) {}
  static __device__ __forceinline__ size_t column(const Item& item, int stride) {
    return size_t(item.first_key) * size_t(stride) + size_t(item.head) * D;
  }
};

}  // namespace flash

#endif

#define ENHANCED_DECODING_FORWARD(T, suffix, D, threads, blocks, ...)                                                   \
  extern "C" __global__ void __launch_bounds__(threads, blocks) enhanced_decoding_forward_d##D##_##suffix(              \
      T* out, float* lse, const T* q_position, const T* q_sentence, const T* k, int k_stride, const T* v, int v_stride, \
      VisibleKeys visible, AttentionBatch batch, Dropout dropout, unsigned site, int heads) {                           \
    RM_DYN_SMEM(smem);                                                                                                  \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                           \
    flash::Item item;                                                                                                   \
    if (!flash::find<P>(item, batch)) return;                                                                           \
    const flash::DecoderTensors<T, D> x(q_position, q_sentence, k, k_stride, v, v_stride, visible, batch, heads, item); \
    const flash::Drop drop(dropout, site, batch, item);                                                                 \
    flash::forward<P>(out, lse, x.queries, x.k, x.v, x.mask, item, batch, drop, heads, smem);                           \
  }                                                                                                                     \
  RM_EXPORT_HOT(enhanced_decoding_forward_d##D##_##suffix)

#define ENHANCED_DECODING_BACKWARD_DQ(T, suffix, D, threads, blocks, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) enhanced_decoding_backward_dq_d##D##_##suffix(                  \
      T* dq, float* delta, const T* q_position, const T* q_sentence, const T* k, int k_stride, const T* v, int v_stride,        \
      const T* out, const float* lse, const T* dout, VisibleKeys visible, AttentionBatch batch, Dropout dropout, unsigned site, \
      int heads) {                                                                                                              \
    RM_DYN_SMEM(smem);                                                                                                          \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                                   \
    flash::Item item;                                                                                                           \
    if (!flash::find<P>(item, batch)) return;                                                                                   \
    const flash::DecoderTensors<T, D> x(q_position, q_sentence, k, k_stride, v, v_stride, visible, batch, heads, item);         \
    const flash::Drop drop(dropout, site, batch, item);                                                                         \
    flash::backward_dq<P>(dq, heads * D, delta, out, {dout, lse}, x.queries, x.k, x.v, x.mask, item,                            \
                                                       batch, drop, heads, smem);                                               \
  }                                                                                                                             \
  RM_EXPORT_HOT(enhanced_decoding_backward_dq_d##D##_##suffix)

#define ENHANCED_DECODING_BACKWARD_DKV(T, suffix, D, threads, blocks, ...)                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) enhanced_decoding_backward_dkv_d##D##_##suffix(                  \
      T* dkv, const T* q_position, const T* q_sentence, const T* k, int k_stride, const T* v, int v_stride, const float* lse,    \
      const float* delta, const T* dout, VisibleKeys visible, AttentionBatch batch, Dropout dropout, unsigned site, int heads) { \
    RM_DYN_SMEM(smem);                                                                                                           \
    using P = flash::Plan<T, D, __VA_ARGS__>;                                                                                    \
    flash::Item item;                                                                                                            \
    if (!flash::find<P>(item, batch)) return;                                                                                    \
    const flash::DecoderTensors<T, D> x(q_position, q_sentence, k, k_stride, v, v_stride, visible, batch, heads, item);          \
    const flash::Drop drop(dropout, site, batch, item);                                                                          \
    const int width = heads * D;                                                                                                 \
    T* const dk = dkv + x.column(item, 2 * width);                                                                               \
    flash::backward_dkv<P>(dk, dk + width, 2 * width, delta, {dout, lse}, x.queries, x.k, x.v,                                   \
                                                        x.mask, item, batch, drop, heads, smem);                                 \
  }                                                                                                                              \
  RM_EXPORT_HOT(enhanced_decoding_backward_dkv_d##D##_##suffix)

// Threads, least blocks a multiprocessor, then the plan: warps, blocks of 16 rows of each, left operands kept, streamed rows a step, and
// of the rest.
ENHANCED_DECODING_FORWARD(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ENHANCED_DECODING_FORWARD(bf16, bf16, 64, 64, 1, 2, 2, true, 32, 32)
ENHANCED_DECODING_FORWARD(bf16, bf16, 128, 128, 1, 4, 1, true, 64, 32)
ENHANCED_DECODING_FORWARD(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_FORWARD(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_FORWARD(float, f32, 128, 128, 1, 4, 1, false, 32, 32)

ENHANCED_DECODING_BACKWARD_DQ(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ENHANCED_DECODING_BACKWARD_DQ(bf16, bf16, 64, 64, 1, 2, 2, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DQ(bf16, bf16, 128, 64, 1, 2, 2, false, 16, 16)
ENHANCED_DECODING_BACKWARD_DQ(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DQ(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DQ(float, f32, 128, 128, 1, 4, 1, false, 32, 32)

ENHANCED_DECODING_BACKWARD_DKV(bf16, bf16, 32, 64, 1, 2, 2, true, 32, 32)
ENHANCED_DECODING_BACKWARD_DKV(bf16, bf16, 64, 64, 1, 2, 2, false, 16, 16)
ENHANCED_DECODING_BACKWARD_DKV(bf16, bf16, 128, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DKV(float, f32, 32, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DKV(float, f32, 64, 128, 1, 4, 1, false, 32, 32)
ENHANCED_DECODING_BACKWARD_DKV(float, f32, 128, 128, 1, 4, 1, false, 16, 16)

#define ENHANCED_DECODING_FORWARD_HOPPER(threads, blocks, GROUPS)                                                              \
  extern "C" __global__ void __launch_bounds__(threads, blocks) enhanced_decoding_forward_hopper_d64_bf16(                     \
      bf16* out, float* lse, const bf16* q_position, const bf16* q_sentence, const bf16* k, int k_stride, const bf16* v,       \
      int v_stride, VisibleKeys visible, AttentionBatch batch, Dropout dropout, unsigned site, int heads) {                    \
    RM_DYN_SMEM(smem);                                                                                                         \
    flash::Item item;                                                                                                          \
    if (!flash::find<flash::hopper::ForwardPlan<GROUPS>>(item, batch)) return;                                                 \
    const flash::DecoderTensors<bf16, 64> x(q_position, q_sentence, k, k_stride, v, v_stride, visible, batch, heads, item);    \
    const flash::Drop drop(dropout, site, batch, item);                                                                        \
    flash::hopper::forward<GROUPS>(out, lse, x.queries, x.k, x.v, x.mask, item, batch, drop, heads, smem);                     \
  }                                                                                                                            \
  RM_EXPORT_HOT(enhanced_decoding_forward_hopper_d64_bf16)

#define ENHANCED_DECODING_BACKWARD_HOPPER(kind, threads, blocks, GROUPS)                                                       \
  extern "C" __global__ void __launch_bounds__(threads, blocks) enhanced_decoding_backward_##kind##_d64_bf16(                  \
      bf16* dq, bf16* dkv, const bf16* q_position, const bf16* q_sentence, const bf16* k, int k_stride, const bf16* v,         \
      int v_stride, const bf16* out, const float* lse, const bf16* dout, VisibleKeys visible, AttentionBatch batch,            \
      Dropout dropout, unsigned site, int heads, int tiles) {                                                                  \
    RM_DYN_SMEM(smem);                                                                                                         \
    flash::Item item;                                                                                                          \
    if (!flash::find<flash::hopper::ForwardPlan<1>>(item, batch)) return;                                                      \
    const flash::DecoderTensors<bf16, 64> x(q_position, q_sentence, k, k_stride, v, v_stride, visible, batch, heads, item);    \
    const flash::Drop drop(dropout, site, batch, item);                                                                        \
    const int width = heads * 64;                                                                                              \
    bf16* const dk = dkv + x.column(item, 2 * width);                                                                          \
    flash::hopper::backward<GROUPS>(dq + size_t(item.first_row) * size_t(width) + size_t(item.head) * 64, width, dk, dk + width, \
                                    2 * width, out, {dout, lse}, x.queries, x.k, x.v, x.mask, item, batch, drop, heads, smem,  \
                                    tiles);                                                                                    \
  }                                                                                                                            \
  RM_EXPORT_HOT(enhanced_decoding_backward_##kind##_d64_bf16)

ENHANCED_DECODING_FORWARD_HOPPER(256, 2, 2)
ENHANCED_DECODING_BACKWARD_HOPPER(long, 256, 1, 2)
ENHANCED_DECODING_BACKWARD_HOPPER(short, 128, 2, 1)
