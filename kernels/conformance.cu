// One kernel a primitive of common.cuh and mma.cuh (sm_80): inputs in plain row-major order, outputs that a plain definition predicts.
//
// The same launches run on the emulator and on a GPU, so that a misreading of the PTX manual in an emulated body shows. One warp each
// unless stated; all outputs are written (=).
#include "mma.cuh"

// tile [32, 8] 16-bit words (matrix m in rows 8 m .. 8 m + 7); out [6, 4, 32] registers: x1, x2, x4, then the same transposed.
extern "C" __global__ void __launch_bounds__(32) conformance_ldmatrix(uint32_t* out, const uint16_t* tile) {
  RM_SHARED(uint16_t, smem, 256);
  const int lane = lane_id();
  for (int i = lane; i < 256; i += WARP) smem[i] = tile[i];
  __syncwarp();
  const uint32_t row = smem_u32(smem) + uint32_t(lane) * 16;
  uint32_t a[1], b[2], c[4], at[1], bt[2], ct[4];
  ldmatrix_x1(a, row);
  ldmatrix_x2(b, row);
  ldmatrix_x4(c, row);
  ldmatrix_x1_trans(at, row);
  ldmatrix_x2_trans(bt, row);
  ldmatrix_x4_trans(ct, row);
  for (int i = 0; i < 4; i++) {
    out[(0 * 4 + i) * WARP + lane] = i < 1 ? a[i & 0] : 0;
    out[(1 * 4 + i) * WARP + lane] = i < 2 ? b[i & 1] : 0;
    out[(2 * 4 + i) * WARP + lane] = c[i];
    out[(3 * 4 + i) * WARP + lane] = i < 1 ? at[i & 0] : 0;
    out[(4 * 4 + i) * WARP + lane] = i < 2 ? bt[i & 1] : 0;
    out[(5 * 4 + i) * WARP + lane] = ct[i];
  }
}
RM_EXPORT(conformance_ldmatrix)

// C and D fragment of m16n8: lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next.
__device__ __forceinline__ void load_fragment(float (&d)[4], const float* m) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  for (int i = 0; i < 4; i++) d[i] = m[(g + i / 2 * 8) * 8 + t + i % 2];
}
__device__ __forceinline__ void store_fragment(float* m, const float (&d)[4]) {
  const int g = lane_id() / 4, t = lane_id() % 4 * 2;
  for (int i = 0; i < 4; i++) m[(g + i / 2 * 8) * 8 + t + i % 2] = d[i];
}

// Both operands [16, 16] and [16, 8] through ldmatrix, b transposed by it.
template <class T> __device__ __forceinline__ void load_operands(uint32_t (&fa)[4], uint32_t (&fb)[2], const T* a, const T* b) {
  RM_SHARED(T, sa, 256);
  RM_SHARED(T, sb, 128);
  const int lane = lane_id();
  for (int i = lane; i < 256; i += WARP) sa[i] = a[i];
  for (int i = lane; i < 128; i += WARP) sb[i] = b[i];
  __syncwarp();
  ldmatrix_x4(fa, smem_u32(sa) + uint32_t(lane % 16 * 32 + lane / 16 * 16));
  ldmatrix_x2_trans(fb, smem_u32(sb) + uint32_t(lane % 16 * 16));
}

// d [16, 8] = a [16, 16] b [16, 8] + c [16, 8].
extern "C" __global__ void __launch_bounds__(32) conformance_mma_bf16(float* d, const bf16* a, const bf16* b, const float* c) {
  uint32_t fa[4], fb[2];
  float acc[4];
  load_operands(fa, fb, a, b);
  load_fragment(acc, c);
  mma_bf16(acc, fa, fb);
  store_fragment(d, acc);
}
RM_EXPORT(conformance_mma_bf16)

extern "C" __global__ void __launch_bounds__(32) conformance_mma_f16(float* d, const f16* a, const f16* b, const float* c) {
  uint32_t fa[4], fb[2];
  float acc[4];
  load_operands(fa, fb, a, b);
  load_fragment(acc, c);
  mma_f16(acc, fa, fb);
  store_fragment(d, acc);
}
RM_EXPORT(conformance_mma_f16)

// half [n] = x [n] rounded to f16; back [n]: what is left of it. One thread each.
extern "C" __global__ void __launch_bounds__(32) conformance_f16(f16* half, float* back, const float* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  half[i] = from_float<f16>(x[i]);
  back[i] = to_float(half[i]);
}
RM_EXPORT(conformance_f16)

// d [16, 8] = a [16, 8] b [8, 8] + c [16, 8] with a and b rounded to tf32.
extern "C" __global__ void __launch_bounds__(32) conformance_mma_tf32(float* d, const float* a, const float* b, const float* c) {
  const int g = lane_id() / 4, t = lane_id() % 4;
  uint32_t fa[4], fb[2];
  float acc[4];
  for (int i = 0; i < 4; i++) fa[i] = to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) fb[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  load_fragment(acc, c);
  mma_tf32(acc, fa, fb);
  store_fragment(d, acc);
}
RM_EXPORT(conformance_mma_tf32)

// Copies of 16 and 4 bytes a lane of which only the first `valid[lane]` bytes are read; out [32, 5] words.
extern "C" __global__ void __launch_bounds__(32) conformance_cp_async(uint32_t* out, const uint32_t* x, const int* valid) {
  RM_SHARED(uint4, wide, 32);
  RM_SHARED(uint32_t, narrow, 32);
  const int lane = lane_id(), bytes = valid[lane];
  cp_async_16(smem_u32(wide + lane), x + lane * 4, bytes);
  cp_async_commit();
  cp_async_4(smem_u32(narrow + lane), x + lane * 4, bytes < 4 ? bytes : 4);
  cp_async_commit();
  cp_async_wait<1>();
  const uint4 w = wide[lane];
  cp_async_wait_all();
  out[lane * 5] = w.x;
  out[lane * 5 + 1] = w.y;
  out[lane * 5 + 2] = w.z;
  out[lane * 5 + 3] = w.w;
  out[lane * 5 + 4] = narrow[lane];
}
RM_EXPORT(conformance_cp_async)

// out [4, n]: ex2, tf32 bits, bf16 bits of x, and x through load8 and store8 of both storages (n a multiple of 8; one thread each 8).
extern "C" __global__ void __launch_bounds__(32) conformance_conversions(uint32_t* out, bf16* narrow, const float* x, int n) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x) * 8;
  if (i >= n) return;
  float v[8], back[8];
  load8(v, x + i);
  store8(narrow + i, v);
  load8(back, narrow + i);
  for (int j = 0; j < 8; j++) {
    out[i + j] = __float_as_uint(ex2(v[j]));
    out[n + i + j] = to_tf32(v[j]);
    out[2 * n + i + j] = pack_bf16(v[j], 0.f);
    out[3 * n + i + j] = __float_as_uint(back[j]);
  }
}
RM_EXPORT(conformance_conversions)

// Warp and block reductions of x [blockDim]; out [8, blockDim]: warp sum and max, block sum and max, then the four shuffles.
extern "C" __global__ void __launch_bounds__(1024) conformance_reductions(float* out, const float* x) {
  RM_SHARED(float, scratch, 32);
  const int t = int(threadIdx.x), n = int(blockDim.x);
  const float v = x[t];
  out[t] = warp_sum(v);
  out[n + t] = warp_max(v);
  out[2 * n + t] = block_sum(v, scratch);
  out[3 * n + t] = block_max(v, scratch);
  out[4 * n + t] = __shfl_xor_sync(FULL_MASK, v, 5, 16);
  out[5 * n + t] = __shfl_sync(FULL_MASK, v, 3, 8);
  out[6 * n + t] = __shfl_down_sync(FULL_MASK, v, 7);
  out[7 * n + t] = __shfl_up_sync(FULL_MASK, v, 2, 8);
}
RM_EXPORT(conformance_reductions)

// Sixteen-bit randoms of `groups` groups of eight elements: out [groups, 8]; and what dropout8 makes of ones: kept [groups, 8].
extern "C" __global__ void __launch_bounds__(64)
    conformance_dropout(uint16_t* out, float* kept, const Dropout d, uint32_t site, uint64_t sample, uint32_t position, int groups) {
  const int group = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (group >= groups) return;
  const uint4 bits = dropout_bits(d, site, sample, position, uint32_t(group));
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  float v[8];
  for (int i = 0; i < 8; i++) {
    out[group * 8 + i] = uint16_t(words[i / 2] >> (i % 2 * 16));
    v[i] = 1.f;
  }
  dropout8(v, d, site, sample, position, uint32_t(group));
  store8(kept + group * 8, v);
}
RM_EXPORT(conformance_dropout)
