// CUDA C++ for the host compiler: qualifiers, vector types, built-in variables, bf16 and f16, intrinsics.
//
// Only what the project's kernels use. What is absent is absent on purpose: `__activemask`, `__nanosleep` and float `atomicAdd`
// would break rules 4, 6 and 10 of `kernels/README.md`, so a kernel that uses them does not compile here.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "core.h"
#include "export.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
// `__noinline__` stays undefined: libstdc++ spells attributes with it.
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__ __restrict
#define __constant__ static const

#define threadIdx (::emu::cur->tid)
#define blockIdx (::emu::cur->block->index)
#define blockDim (::emu::cur->block->dim)
#define gridDim (::emu::cur->block->grid)

// Default argument that records the caller's line.
#define EMU_SITE ::emu::Site site_ = {__builtin_FILE(), __builtin_LINE()}

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- synchronisation and warp collectives

inline void __syncthreads(EMU_SITE) { emu::barrier_sync(0, -1, "__syncthreads", site_); }
inline void __syncwarp(std::uint32_t mask = 0xffffffffu, EMU_SITE) { emu::syncwarp(mask, site_); }
inline void __threadfence() { emu::thread_fence(); }
inline void __threadfence_block() {}

namespace emu {
template <class T> T shuffle_as(Shuffle kind, std::uint32_t mask, T value, int operand, int width, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = shuffle(kind, mask, bits, operand, width, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emu
template <class T> T __shfl_xor_sync(std::uint32_t mask, T v, int lanes, int width = 32, EMU_SITE) {
  return emu::shuffle_as(emu::Shuffle::Xor, mask, v, lanes, width, site_);
}
template <class T> T __shfl_sync(std::uint32_t mask, T v, int lane, int width = 32, EMU_SITE) {
  return emu::shuffle_as(emu::Shuffle::Index, mask, v, lane, width, site_);
}
template <class T> T __shfl_down_sync(std::uint32_t mask, T v, int delta, int width = 32, EMU_SITE) {
  return emu::shuffle_as(emu::Shuffle::Down, mask, v, delta, width, site_);
}
template <class T> T __shfl_up_sync(std::uint32_t mask, T v, int delta, int width = 32, EMU_SITE) {
  return emu::shuffle_as(emu::Shuffle::Up, mask, v, delta, width, site_);
}
inline std::uint32_t __ballot_sync(std::uint32_t mask, int p, EMU_SITE) {
  return emu::ballot(mask, p != 0, "__ballot_sync", site_);
}
inline int __any_sync(std::uint32_t mask, int p, EMU_SITE) { return emu::ballot(mask, p != 0, "__any_sync", site_) != 0; }
inline int __all_sync(std::uint32_t mask, int p, EMU_SITE) { return emu::ballot(mask, p != 0, "__all_sync", site_) == mask; }

// ---- atomics, for integers only: a float sum must not depend on the order of blocks

inline unsigned atomicAdd(unsigned* p, unsigned v) { return emu::atomic_add(p, v); }
inline int atomicAdd(int* p, int v) { return int(emu::atomic_add(reinterpret_cast<unsigned*>(p), unsigned(v))); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long v) {
  static_assert(sizeof(unsigned long long) == sizeof(std::uint64_t), "");
  return emu::atomic_add(reinterpret_cast<std::uint64_t*>(p), std::uint64_t(v));
}
inline unsigned atomicOr(unsigned* p, unsigned v) { return emu::atomic_or(p, v); }
inline int atomicOr(int* p, int v) { return int(emu::atomic_or(reinterpret_cast<unsigned*>(p), unsigned(v))); }
inline int atomicMax(int* p, int v) { return emu::atomic_max(p, v); }
inline unsigned atomicMax(unsigned* p, unsigned v) { return emu::atomic_max(p, v); }
inline int atomicMin(int* p, int v) { return emu::atomic_min(p, v); }
inline unsigned atomicExch(unsigned* p, unsigned v) { return emu::atomic_exchange(p, v); }
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned v) { return emu::atomic_compare_exchange(p, expected, v); }

// ---- bf16

struct __nv_bfloat16 {
  std::uint16_t x;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __uint_as_float(unsigned u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline unsigned __float_as_uint(float f) {
  unsigned u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
inline int __float_as_int(float f) { return int(__float_as_uint(f)); }
inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float(unsigned(h.x) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const unsigned u = __float_as_uint(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {std::uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float f) { return __float2bfloat16_rn(f); }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) { return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 h) { return {__bfloat162float(h.x), __bfloat162float(h.y)}; }

// ---- f16

struct __half {
  std::uint16_t x;
};
// Exact: exponents of f16 are moved to those of f32 by a product, which makes its denormals normal numbers.
inline float __half2float(__half h) {
  const unsigned magnitude = __float_as_uint(__uint_as_float(unsigned(h.x & 0x7fff) << 13) * 0x1p112f);
  return __uint_as_float(magnitude | ((h.x & 0x7c00) == 0x7c00 ? 0x7f800000u : 0u) | unsigned(h.x & 0x8000) << 16);
}
// To nearest even; NaN and what rounds past 65504 as the device has them.
inline __half __float2half_rn(float f) {
  const unsigned u = __float_as_uint(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {0x7fff};
  if (magnitude >= 0x477ff000u) return {std::uint16_t(sign | 0x7c00)};
  // Below the least normal number, 2^-14, adding one half leaves the digits of f16 in the low bits, rounded.
  if (magnitude < 0x38800000u) return {std::uint16_t(sign | (__float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3f000000u))};
  return {std::uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13))};
}

// ---- intrinsics. The approximate ones are exact here: tests against a GPU need a tolerance.

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> void __stcs(T* p, T v) { *p = v; }
using std::max;
using std::min;
