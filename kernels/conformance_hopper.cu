// One kernel for the sm_90 primitives of hopper.cuh, in the form in which real kernels use them: a producer warp that loads tiles by
// TMA into a ring guarded by mbarriers, and one consumer warpgroup that multiplies them with wgmma. c [M, N] f32 (=).
//
// M, N and K are multiples of 64 (N of 128 for the wide form). Grid (N / tile N, M / 64), block 160 threads.
#include "mma.cuh"

constexpr int STAGES = 2, CONSUMERS = 128;
constexpr uint32_t TILE_A = 64 * 64 * 2;

// Shared memory: STAGES tiles of A, STAGES tiles of B, then the barriers.
template <int N_TILE> struct Ring {
  static constexpr uint32_t TILE_B = 64 * N_TILE * 2, STAGE = TILE_A + TILE_B, BARRIERS = STAGES * STAGE;
  uint32_t base;
  __device__ uint32_t a(int stage) const { return base + uint32_t(stage) * STAGE; }
  __device__ uint32_t b(int stage) const { return a(stage) + TILE_A; }
  __device__ uint32_t full(int stage) const { return base + BARRIERS + uint32_t(stage) * 8; }
  __device__ uint32_t empty(int stage) const { return full(stage) + STAGES * 8; }
};

// A is [M, K] (A_TRANS 0) or [K, M], B is [N, K] (B_TRANS 0) or [K, N]. A box is 64 columns wide: the 128-byte swizzle's limit.
template <int N_TILE, int A_TRANS, int B_TRANS>
__device__ __forceinline__ void produce(const Ring<N_TILE>& ring, const CUtensorMap* a, const CUtensorMap* b, int steps) {
  const int m0 = int(blockIdx.y) * 64, n0 = int(blockIdx.x) * N_TILE;
  for (int i = 0; i < steps; i++) {
    const int stage = i % STAGES;
    mbarrier_wait(ring.empty(stage), uint32_t(i / STAGES & 1) ^ 1);
    mbarrier_expect_tx(ring.full(stage), Ring<N_TILE>::STAGE);
    if (A_TRANS) {
      tma_load_2d(ring.a(stage), a, m0, i * 64, ring.full(stage));
    } else {
      tma_load_2d(ring.a(stage), a, i * 64, m0, ring.full(stage));
    }
    for (int part = 0; part < N_TILE / 64; part++) {
      const uint32_t dst = ring.b(stage) + uint32_t(part) * 8192;
      if (B_TRANS) {
        tma_load_2d(dst, b, n0 + part * 64, i * 64, ring.full(stage));
      } else {
        tma_load_2d(dst, b, i * 64, n0 + part * 64, ring.full(stage));
      }
    }
  }
}

template <int N_TILE, int B_TRANS> __device__ __forceinline__ uint64_t b_descriptor(uint32_t tile, int k) {
  // K-major: 8 rows of 128 bytes a swizzle atom. N-major: 16 rows of k, atoms of 64 columns 8 KB apart.
  return B_TRANS ? wgmma_descriptor_128b(tile + uint32_t(k) * 2048, 8192, 1024) : wgmma_descriptor_128b(tile + uint32_t(k) * 32, 16, 1024);
}

// A from registers: the fragments of this warp's 16 rows and 16 columns of k.
__device__ __forceinline__ void load_a(uint32_t (&fragment)[4], uint32_t tile, int k) {
  const int row = warp_id() * 16 + lane_id() % 16, chunk = k * 2 + lane_id() / 16;
  ldmatrix_x4(fragment, tile + uint32_t(row) * 128 + (uint32_t(chunk ^ (row & 7)) << 4));
}

template <int N_TILE> __device__ __forceinline__ void write_tile(float* c, const float (&d)[N_TILE / 2], int N, int first) {
  const int row = int(blockIdx.y) * 64 + warp_id() * 16 + lane_id() / 4, column = first + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N_TILE / 8; j++) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
      float2* p = reinterpret_cast<float2*>(c + size_t(row + half * 8) * N + column + j * 8);
      *p = make_float2(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
    }
  }
}

template <int N_TILE> __device__ __forceinline__ void begin(const Ring<N_TILE>& ring) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      mbarrier_init(ring.full(i), 1);
      mbarrier_init(ring.empty(i), CONSUMERS / WARP);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
}

template <int N_TILE, int B_TRANS, bool A_IN_REGISTERS>
__device__ __forceinline__ void product(float* c, const CUtensorMap* a, const CUtensorMap* b, int N, int K) {
  RM_DYN_SMEM(smem);
  const Ring<N_TILE> ring{smem_u32(smem)};
  const int t = int(threadIdx.x), steps = K / 64;
  begin(ring);
  if (t >= CONSUMERS) {
    if (t == CONSUMERS) produce<N_TILE, 0, B_TRANS>(ring, a, b, steps);
    return;
  }
  float d[N_TILE / 2];
#pragma unroll
  for (int i = 0; i < N_TILE / 2; i++) d[i] = 0.f;
  for (int i = 0; i < steps; i++) {
    const int stage = i % STAGES;
    mbarrier_wait(ring.full(stage), uint32_t(i / STAGES & 1));
    uint32_t fragments[4][4];
    if constexpr (A_IN_REGISTERS) {
#pragma unroll
      for (int k = 0; k < 4; k++) load_a(fragments[k], ring.a(stage), k);
    }
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint64_t bd = b_descriptor<N_TILE, B_TRANS>(ring.b(stage), k);
      if constexpr (A_IN_REGISTERS) {
        wgmma_m64n64k16_ra<B_TRANS>(d, fragments[k], bd, i > 0 || k > 0);
      } else {
        const uint64_t ad = wgmma_descriptor_128b(ring.a(stage) + uint32_t(k) * 32, 16, 1024);
        if constexpr (N_TILE == 64) {
          wgmma_m64n64k16<0, B_TRANS>(d, ad, bd, i > 0 || k > 0);
        } else {
          wgmma_m64n128k16<0, B_TRANS>(d, ad, bd, i > 0 || k > 0);
        }
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (lane_id() == 0) mbarrier_arrive(ring.empty(stage));
  }
  write_tile<N_TILE>(c, d, N, int(blockIdx.x) * N_TILE);
}

// Both operands by columns, A [K, M] and B [K, N], and 32 columns of B at a time: the second half begins inside a swizzle atom.
__device__ __forceinline__ void product_of_halves(float* c, const CUtensorMap* a, const CUtensorMap* b, int N, int K) {
  RM_DYN_SMEM(smem);
  const Ring<64> ring{smem_u32(smem)};
  const int t = int(threadIdx.x), steps = K / 64;
  begin(ring);
  if (t >= CONSUMERS) {
    if (t == CONSUMERS) produce<64, 1, 1>(ring, a, b, steps);
    return;
  }
  float left[16], right[16];
#pragma unroll
  for (int i = 0; i < 16; i++) left[i] = right[i] = 0.f;
  for (int i = 0; i < steps; i++) {
    const int stage = i % STAGES;
    mbarrier_wait(ring.full(stage), uint32_t(i / STAGES & 1));
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint64_t ad = wgmma_descriptor_128b(ring.a(stage) + uint32_t(k) * 2048, 8192, 1024);
      wgmma_m64n32k16<1, 1>(left, ad, b_descriptor<64, 1>(ring.b(stage), k), i > 0 || k > 0);
      wgmma_m64n32k16<1, 1>(right, ad, b_descriptor<64, 1>(ring.b(stage) + 64, k), i > 0 || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    if (lane_id() == 0) mbarrier_arrive(ring.empty(stage));
  }
  write_tile<32>(c, left, N, int(blockIdx.x) * 64);
  write_tile<32>(c, right, N, int(blockIdx.x) * 64 + 32);
}

#define PRODUCT(name, N_TILE, B_TRANS, A_IN_REGISTERS)                                                                         \
  extern "C" __global__ void __launch_bounds__(160)                                                                            \
      conformance_##name(float* c, const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int N, int K) { \
    product<N_TILE, B_TRANS, A_IN_REGISTERS>(c, &a, &b, N, K);                                                                 \
  }                                                                                                                            \
  RM_EXPORT(conformance_##name)

PRODUCT(wgmma_64_nk, 64, 0, false)
PRODUCT(wgmma_64_kn, 64, 1, false)
PRODUCT(wgmma_128_nk, 128, 0, false)
PRODUCT(wgmma_128_kn, 128, 1, false)
PRODUCT(wgmma_64_nk_registers, 64, 0, true)
PRODUCT(wgmma_64_kn_registers, 64, 1, true)

extern "C" __global__ void __launch_bounds__(160)
    conformance_wgmma_32_km_kn(float* c, const __grid_constant__ CUtensorMap a, const __grid_constant__ CUtensorMap b, int N, int K) {
  product_of_halves(c, &a, &b, N, K);
}
RM_EXPORT(conformance_wgmma_32_km_kn)
