// The only inline PTX of the project: tensor-core, asynchronous-copy and barrier primitives, each beside its emulated twin.
//
// Shared addresses are the 32-bit values of `smem_u32`. Fragment layouts are those of the PTX manual ("Matrix Fragments"). Primitives
// of sm_90 trap in PTX for older targets, so that one source compiles for all; the launcher picks kernels by architecture.
#pragma once
#include "common.cuh"

#if !defined(RM_SIGNATURES)

#if defined(__CUDACC__)
#define RM_PRIMITIVE __device__ __forceinline__
#define RM_SITE
#define RM_SITE0
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define RM_SM90(...) __trap()
#endif
#else
#define RM_PRIMITIVE inline
#define RM_SITE , EMU_SITE
#define RM_SITE0 EMU_SITE
#endif

// Shared-memory address of a generic pointer.
RM_PRIMITIVE uint32_t smem_u32(const void* p) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
#else
  return emu::shared_address(p);
#endif
}

// 2^x, flushing denormals.
RM_PRIMITIVE float ex2(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = exp2f(x);
  return y < FLT_MIN ? 0.f : y;
#endif
}

// ---- ldmatrix: 8x8 matrices of 16-bit elements. Lane l gives the address of row l % 8 of matrix l / 8 (lanes past the last matrix
// give any valid address) and receives row l / 4, columns 2 (l % 4) and the next, of each matrix; `trans` swaps rows and columns.

#if defined(__CUDACC__)
#define RM_LDMATRIX1(kind, r, a) \
  asm volatile("ldmatrix.sync.aligned.m8n8.x1" kind ".shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(a) : "memory")
#define RM_LDMATRIX2(kind, r, a) \
  asm volatile("ldmatrix.sync.aligned.m8n8.x2" kind ".shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(a) : "memory")
#define RM_LDMATRIX4(kind, r, a)                                                    \
  asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0,%1,%2,%3}, [%4];" \
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                     \
               : "r"(a)                                                             \
               : "memory")
RM_PRIMITIVE void ldmatrix_x1(uint32_t (&r)[1], uint32_t a) { RM_LDMATRIX1("", r, a); }
RM_PRIMITIVE void ldmatrix_x2(uint32_t (&r)[2], uint32_t a) { RM_LDMATRIX2("", r, a); }
RM_PRIMITIVE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a) { RM_LDMATRIX4("", r, a); }
RM_PRIMITIVE void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t a) { RM_LDMATRIX1(".trans", r, a); }
RM_PRIMITIVE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t a) { RM_LDMATRIX2(".trans", r, a); }
RM_PRIMITIVE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a) { RM_LDMATRIX4(".trans", r, a); }
#else
RM_PRIMITIVE void ldmatrix_x1(uint32_t (&r)[1], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 1, false, site_); }
RM_PRIMITIVE void ldmatrix_x2(uint32_t (&r)[2], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 2, false, site_); }
RM_PRIMITIVE void ldmatrix_x4(uint32_t (&r)[4], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 4, false, site_); }
RM_PRIMITIVE void ldmatrix_x1_trans(uint32_t (&r)[1], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 1, true, site_); }
RM_PRIMITIVE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 2, true, site_); }
RM_PRIMITIVE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t a RM_SITE) { emu::ldmatrix(r, a, 4, true, site_); }
#endif

// ---- mma: d += a b, f32 accumulators

#if defined(__CUDACC__)
#define RM_MMA_M16N8K16(type, d, a, b)                                                                                                  \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// d (16x8) += a (16x16, row major) b (16x8, column major), bf16 inputs.
RM_PRIMITIVE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RM_SITE) {
#if defined(__CUDACC__)
  RM_MMA_M16N8K16("bf16", d, a, b);
#else
  emu::mma_bf16(d, a, b, site_);
#endif
}

// The same with f16 inputs.
RM_PRIMITIVE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RM_SITE) {
#if defined(__CUDACC__)
  RM_MMA_M16N8K16("f16", d, a, b);
#else
  emu::mma_f16(d, a, b, site_);
#endif
}

// Both with the two registers of b apart, as they come out of one ldmatrix_x4.
RM_PRIMITIVE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 RM_SITE) {
  const uint32_t b[2] = {b0, b1};
#if defined(__CUDACC__)
  mma_bf16(d, a, b);
#else
  emu::mma_bf16(d, a, b, site_);
#endif
}
RM_PRIMITIVE void mma_f16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 RM_SITE) {
  const uint32_t b[2] = {b0, b1};
#if defined(__CUDACC__)
  mma_f16(d, a, b);
#else
  emu::mma_f16(d, a, b, site_);
#endif
}

// d (16x8) += a (16x8, row major) b (8x8, column major), tf32 inputs: f32 bits whose low 13 bits are ignored.
RM_PRIMITIVE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RM_SITE) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emu::mma_tf32(d, a, b, site_);
#endif
}

// f32 rounded to tf32 (to nearest, ties away from zero), as bits.
RM_PRIMITIVE uint32_t to_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
#else
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  return (bits + 0x1000u) & 0xffffe000u;
#endif
}

// ---- cp.async: global to shared, in flight until the wait. Bytes past `src_bytes` are filled with zero; nothing is read when it is 0.

RM_PRIMITIVE void cp_async_16(uint32_t dst, const void* src, int src_bytes = 16) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(src_bytes) : "memory");
#else
  emu::cp_async(dst, src, 16, src_bytes);
#endif
}
RM_PRIMITIVE void cp_async_4(uint32_t dst, const void* src, int src_bytes = 4) {
#if defined(__CUDACC__)
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(__cvta_generic_to_global(src)), "r"(src_bytes) : "memory");
#else
  emu::cp_async(dst, src, 4, src_bytes);
#endif
}
RM_PRIMITIVE void cp_async_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cp_async_commit();
#endif
}
// Until at most N of the thread's committed groups are in flight. Other threads see the data after a barrier.
template <int N> RM_PRIMITIVE void cp_async_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emu::cp_async_wait(N);
#endif
}
RM_PRIMITIVE void cp_async_wait_all() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  emu::cp_async_wait(-1);
#endif
}

// ---- named barriers 1 .. 15 for parts of a block; `threads` is a multiple of 32

RM_PRIMITIVE void named_barrier_sync(int id, int threads RM_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::barrier_sync(id, threads, "bar.sync", site_);
#endif
}
RM_PRIMITIVE void named_barrier_arrive(int id, int threads RM_SITE) {
#if defined(__CUDACC__)
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  emu::barrier_arrive(id, threads, site_);
#endif
}

#include "hopper.cuh"

#endif
