// What every kernel starts from: both compilers' preamble, element types, 128-bit access, reductions, Philox and dropout.
//
// Three readers: nvcc (PTX), the host compiler (the emulator), and the preprocessor alone with RM_SIGNATURES, from whose output
// build.rs takes entry points and parameter structs to generate the Rust launch stubs.
#pragma once

#if defined(RM_SIGNATURES)
#define RM_DYN_SMEM(name)
#define RM_SHARED(T, name, N)
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
// Dynamic shared memory of the block, aligned for the 128-byte swizzle.
#define RM_DYN_SMEM(name) extern __shared__ __align__(1024) unsigned char name[]
// A static shared array `T name[N]`.
#define RM_SHARED(T, name, N) __shared__ __align__(16) T name[N]
// Makes an entry point known to the launcher; the HOT form also fails the build when ptxas spills registers in it.
#define RM_EXPORT(fn)
#define RM_EXPORT_HOT(fn)
struct alignas(64) CUtensorMap {
  uint64_t q[16];
};
#else
#include "emulator/api.h"
#include "emulator/language.h"
#endif

typedef __nv_bfloat16 bf16;
typedef __half f16;

// ---- parameter structs, mirrored in Rust by build.rs: plain scalars, arrays of them, and pointers

// Dropout of one step. The key lies in device memory so that a captured graph can be replayed with another step's key.
struct Dropout {
  const uint32_t* key;   // [2]
  uint32_t threshold;    // an element is dropped when its 16 bits are below this; 0: no dropout
  float scale;           // what a kept element is multiplied by
};

#if !defined(RM_SIGNATURES)

constexpr int WARP = 32;
constexpr uint32_t FULL_MASK = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) & (WARP - 1); }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / WARP; }

template <class T> __device__ __forceinline__ T* smem_at(unsigned char* smem, uint32_t offset) {
  return reinterpret_cast<T*>(smem + offset);
}

// ---- bf16 pairs: the low half is the element with the lower index

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  union {
    __nv_bfloat162 pair;
    uint32_t bits;
  } v;
  v.pair = __floats2bfloat162_rn(low, high);
  return v.bits;
}
__device__ __forceinline__ float2 unpack_bf16(uint32_t bits) {
  return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
}

// ---- one element, storage to f32 and back (round to nearest even)

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(f16 v) { return __half2float(v); }
template <class T> __device__ __forceinline__ T from_float(float v);
template <> __device__ __forceinline__ float from_float<float>(float v) { return v; }
template <> __device__ __forceinline__ bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <> __device__ __forceinline__ f16 from_float<f16>(float v) { return __float2half_rn(v); }

// ---- eight neighbouring elements by 128-bit accesses. `p` must be 16-byte aligned.

__device__ __forceinline__ void load8(float (&v)[8], const float* p) {
  const float4 a = reinterpret_cast<const float4*>(p)[0], b = reinterpret_cast<const float4*>(p)[1];
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
__device__ __forceinline__ void load8(float (&v)[8], const bf16* p) {
  const uint4 w = *reinterpret_cast<const uint4*>(p);
  const float2 a = unpack_bf16(w.x), b = unpack_bf16(w.y), c = unpack_bf16(w.z), d = unpack_bf16(w.w);
  v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y, v[4] = c.x, v[5] = c.y, v[6] = d.x, v[7] = d.y;
}
__device__ __forceinline__ void store8(float* p, const float (&v)[8]) {
  reinterpret_cast<float4*>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
  reinterpret_cast<float4*>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
__device__ __forceinline__ void store8(bf16* p, const float (&v)[8]) {
  *reinterpret_cast<uint4*>(p) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// ---- reductions in a fixed order: equal bits on every run. All 32 lanes must call the warp forms.

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v += __shfl_xor_sync(FULL_MASK, v, lanes);
  return v;
}
__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
  for (int lanes = WARP / 2; lanes > 0; lanes /= 2) v = fmaxf(v, __shfl_xor_sync(FULL_MASK, v, lanes));
  return v;
}

// Sum over the block, equal in every thread. `scratch` holds 32 floats. The leading barrier lets scratch be used again at once.
// blockDim.x must be a multiple of 32; the whole block must call it.
__device__ __forceinline__ float block_sum(float v, float* scratch) {
  v = warp_sum(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  const int warps = int(blockDim.x) / WARP;
  return warp_sum(lane_id() < warps ? scratch[lane_id()] : 0.f);
}
__device__ __forceinline__ float block_max(float v, float* scratch) {
  v = warp_max(v);
  __syncthreads();
  if (lane_id() == 0) scratch[warp_id()] = v;
  __syncthreads();
  const int warps = int(blockDim.x) / WARP;
  return warp_max(lane_id() < warps ? scratch[lane_id()] : -INFINITY);
}

// ---- randomness: the twin of src/rng.rs, equal bit for bit

// Ten rounds of Philox4x32 on counter `c` under the key (k0, k1).
__device__ __forceinline__ uint4 philox4x32(uint32_t k0, uint32_t k1, uint4 c) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    const uint32_t high0 = __umulhi(0xD2511F53u, c.x), low0 = 0xD2511F53u * c.x;
    const uint32_t high1 = __umulhi(0xCD9E8D57u, c.z), low1 = 0xCD9E8D57u * c.z;
    c = make_uint4(high1 ^ c.y ^ k0, low1, high0 ^ c.w ^ k1, low0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The sixteen-bit randoms of the eight elements 8*group .. 8*group + 8, two a word, low half first (`Dropout::bits` in src/rng.rs).
__device__ __forceinline__ uint4 dropout_bits(const Dropout& d, uint32_t site, uint64_t sample, uint32_t position, uint32_t group) {
  return philox4x32(d.key[0], d.key[1], make_uint4(group, position | site << 16, uint32_t(sample), uint32_t(sample >> 32)));
}

// Whether element `i` (0..8) of the group is kept.
__device__ __forceinline__ bool dropout_keeps(const Dropout& d, uint4 bits, int i) {
  const uint32_t word = i < 2 ? bits.x : i < 4 ? bits.y : i < 6 ? bits.z : bits.w;
  return ((i & 1) ? word >> 16 : word & 0xffffu) >= d.threshold;
}

// Drops and scales the eight elements of a group; its own backward. Leaves them as they are without dropout.
__device__ __forceinline__ void dropout8(float (&v)[8], const Dropout& d, uint32_t site, uint64_t sample, uint32_t position,
                                         uint32_t group) {
  if (d.threshold == 0) return;
  const uint4 bits = dropout_bits(d, site, sample, position, group);
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = dropout_keeps(d, bits, i) ? v[i] * d.scale : 0.f;
}

#endif
