// The sm_90 half of mma.cuh: mbarrier, TMA loads, warpgroup products. Included by it; see there.
#pragma once

// ---- mbarrier: 8 bytes of shared memory, 8-byte aligned

RM_PRIMITIVE void mbarrier_init(uint32_t barrier, uint32_t count) {
#if defined(__CUDACC__)
  RM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
#else
  emu::mbarrier_init(barrier, count);
#endif
}
// Makes initialised mbarriers visible to TMA; a __syncthreads must follow for other threads.
RM_PRIMITIVE void mbarrier_fence_init() {
#if defined(__CUDACC__)
  RM_SM90("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
RM_PRIMITIVE void mbarrier_arrive(uint32_t barrier) {
#if defined(__CUDACC__)
  RM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
#else
  emu::mbarrier_arrive(barrier, 0);
#endif
}
// Arrives and announces `bytes` that TMA will bring.
RM_PRIMITIVE void mbarrier_expect_tx(uint32_t barrier, uint32_t bytes) {
#if defined(__CUDACC__)
  RM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
#else
  emu::mbarrier_arrive(barrier, bytes);
#endif
}
// Blocks until the phase of the given parity is complete.
RM_PRIMITIVE void mbarrier_wait(uint32_t barrier, uint32_t parity RM_SITE) {
#if defined(__CUDACC__)
  RM_SM90(
      "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
#else
  emu::mbarrier_wait(barrier, parity, site_);
#endif
}

// ---- TMA: a box of a two-dimensional tensor to shared memory; its bytes count towards the mbarrier

RM_PRIMITIVE void tma_load_2d(uint32_t dst, const CUtensorMap* map, int x, int y, uint32_t barrier) {
#if defined(__CUDACC__)
  RM_SM90("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst), "l"(map),
          "r"(barrier), "r"(x), "r"(y)
          : "memory");
#else
  emu::tma_load_2d(dst, map, x, y, barrier);
#endif
}
// Orders the thread's ordinary shared-memory stores before reads by wgmma and TMA. Belongs before the barrier that hands them over.
RM_PRIMITIVE void fence_async_shared() {
#if defined(__CUDACC__)
  RM_SM90("fence.proxy.async.shared::cta;" ::: "memory");
#else
  emu::fence_proxy_async();
#endif
}

// ---- wgmma: d (64 x N) = a (64 x 16) b (16 x N) [+ d], bf16 inputs, asynchronous. `d` must be a local array that stays where it is
// until the wait. TA, TB: 1 when the operand is M- or N-major in shared memory, 0 when K-major.

RM_PRIMITIVE void wgmma_fence(RM_SITE0) {
#if defined(__CUDACC__)
  RM_SM90("wgmma.fence.sync.aligned;" ::: "memory");
#else
  emu::wgmma_fence(site_);
#endif
}
RM_PRIMITIVE void wgmma_commit(RM_SITE0) {
#if defined(__CUDACC__)
  RM_SM90("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  emu::wgmma_commit(site_);
#endif
}
template <int N> RM_PRIMITIVE void wgmma_wait(RM_SITE0) {
#if defined(__CUDACC__)
  RM_SM90("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  emu::wgmma_wait(N, site_);
#endif
}

// Descriptor of an operand tile with the 128-byte swizzle; `lbo` and `sbo` in bytes as the PTX manual defines them.
RM_PRIMITIVE uint64_t wgmma_descriptor_128b(uint32_t address, uint32_t lbo, uint32_t sbo) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(lbo >> 4) << 16 | uint64_t(sbo >> 4) << 32 | uint64_t(1) << 62;
}

#if defined(__CUDACC__)
#define RM_ACC8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define RM_ACC32(i) RM_ACC8(i), RM_ACC8(i + 8), RM_ACC8(i + 16), RM_ACC8(i + 24)
#define RM_REGS_0_15 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define RM_REGS_0_31 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define RM_REGS_32_63 \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#endif

// A and B from shared memory.
template <int TA, int TB> RM_PRIMITIVE void wgmma_m64n32k16(float (&d)[16], uint64_t a, uint64_t b, int accumulate RM_SITE) {
#if defined(__CUDACC__)
  RM_SM90("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\nwgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {" RM_REGS_0_15
          "}, %16, %17, p, 1, 1, %19, %20;\n}"
          : RM_ACC8(0), RM_ACC8(8)
          : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
#else
  emu::wgmma({d, 32, a, b, nullptr, accumulate != 0, TA != 0, TB != 0}, site_);
#endif
}
template <int TA, int TB> RM_PRIMITIVE void wgmma_m64n64k16(float (&d)[32], uint64_t a, uint64_t b, int accumulate RM_SITE) {
#if defined(__CUDACC__)
  RM_SM90("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RM_REGS_0_31
          "}, %32, %33, p, 1, 1, %35, %36;\n}"
          : RM_ACC32(0)
          : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
#else
  emu::wgmma({d, 64, a, b, nullptr, accumulate != 0, TA != 0, TB != 0}, site_);
#endif
}
template <int TA, int TB> RM_PRIMITIVE void wgmma_m64n128k16(float (&d)[64], uint64_t a, uint64_t b, int accumulate RM_SITE) {
#if defined(__CUDACC__)
  RM_SM90("{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" RM_REGS_0_31 "," RM_REGS_32_63
          "}, %64, %65, p, 1, 1, %67, %68;\n}"
          : RM_ACC32(0), RM_ACC32(32)
          : "l"(a), "l"(b), "r"(accumulate), "n"(TA), "n"(TB));
#else
  emu::wgmma({d, 128, a, b, nullptr, accumulate != 0, TA != 0, TB != 0}, site_);
#endif
}
// A from registers, in the fragment layout of mma_bf16; warp w of the warpgroup holds rows 16 w to 16 w + 15.
template <int TB> RM_PRIMITIVE void wgmma_m64n64k16_ra(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate RM_SITE) {
#if defined(__CUDACC__)
  RM_SM90("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" RM_REGS_0_31
          "}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"
          : RM_ACC32(0)
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(TB));
#else
  emu::wgmma({d, 64, 0, b, a, accumulate != 0, false, TB != 0}, site_);
#endif
}
