// Planted bugs, one a kernel, and the correct form of some: the emulator's own tests. `bugs.rs` says who must find what.
#include "mma.cuh"

#define KERNEL extern "C" __global__ void

// ---- control flow

KERNEL bug_divergent_barrier(float* o) {
  if (threadIdx.x < 32) {
    __syncthreads();
    o[0] = 1.f;
  } else {
    __syncthreads();
    o[1] = 1.f;
  }
}
RM_EXPORT(bug_divergent_barrier)

KERNEL bug_exit_before_barrier(float* o) {
  if (threadIdx.x >= 48) return;
  __syncthreads();
  o[threadIdx.x] = 1.f;
}
RM_EXPORT(bug_exit_before_barrier)

KERNEL bug_partial_shuffle(float* o) {
  float v = float(threadIdx.x);
  if ((threadIdx.x & 31) < 20) v = __shfl_xor_sync(FULL_MASK, v, 1);
  __syncthreads();
  o[threadIdx.x] = v;
}
RM_EXPORT(bug_partial_shuffle)

KERNEL bug_shuffle_outside_mask(float* o) {
  float v = float(threadIdx.x);
  if ((threadIdx.x & 31) < 16) v = __shfl_sync(0xffffu, v, 20);
  o[threadIdx.x] = v;
}
RM_EXPORT(bug_shuffle_outside_mask)

KERNEL bug_divergent_warp(float* o) {
  const int p = int(threadIdx.x & 1);
  const unsigned votes = p ? __ballot_sync(FULL_MASK, p) : unsigned(__any_sync(FULL_MASK, p));
  o[threadIdx.x] = float(votes);
}
RM_EXPORT(bug_divergent_warp)

KERNEL bug_mbarrier_deadlock(float* o) {
  RM_DYN_SMEM(smem);
  const uint32_t barrier = smem_u32(smem);
  if (threadIdx.x == 0) mbarrier_init(barrier, 2);
  __syncthreads();
  if (threadIdx.x == 0) mbarrier_arrive(barrier);
  mbarrier_wait(barrier, 0);
  o[threadIdx.x] = 1.f;
}
RM_EXPORT(bug_mbarrier_deadlock)

KERNEL bug_endless_loop(float* o, int n) {
  volatile int spin = n;
  while (spin == n) o[threadIdx.x] += 1.f;
}
RM_EXPORT(bug_endless_loop)

KERNEL bug_endless_barriers(float* o, int n) {
  volatile int spin = n;
  while (spin == n) {
    __syncthreads();
    o[threadIdx.x] = 1.f;
  }
}
RM_EXPORT(bug_endless_barriers)

__device__ int deep(volatile int* p, int n) {
  volatile int pad[64];
  pad[0] = n;
  return n == 0 ? pad[0] : deep(p, n - 1) + pad[0] + p[0];
}
KERNEL bug_stack_overflow(float* o, int n) {
  int v = 0;
  o[threadIdx.x] = float(deep(&v, n));
}
RM_EXPORT(bug_stack_overflow)

// ---- bounds and alignment

KERNEL bug_dynamic_overrun(float* o, int n) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[int(threadIdx.x) + n] = 1.f;
  __syncthreads();
  o[threadIdx.x] = f[threadIdx.x];
}
RM_EXPORT(bug_dynamic_overrun)

KERNEL bug_static_overrun(float* o, int n) {
  RM_SHARED(float, f, 64);
  f[int(threadIdx.x) + n] = 1.f;
  __syncthreads();
  o[threadIdx.x] = f[threadIdx.x];
}
RM_EXPORT(bug_static_overrun)

KERNEL bug_global_read(float* o, const float* x, int n) { o[threadIdx.x] = x[int(threadIdx.x) + n]; }
RM_EXPORT(bug_global_read)

KERNEL bug_global_write(float* o, int n) { o[int(threadIdx.x) + n] = 1.f; }
RM_EXPORT(bug_global_write)

KERNEL bug_misaligned(float* o, const float* x) {
  const uint4 v = *reinterpret_cast<const uint4*>(x + 1 + threadIdx.x);
  o[threadIdx.x] = __uint_as_float(v.x);
}
RM_EXPORT(bug_misaligned)

KERNEL bug_int_overflow(float* o, int n) {
  const int i = n * int(threadIdx.x + 1) * 65536;
  o[threadIdx.x] = float(i);
}
RM_EXPORT(bug_int_overflow)

// ---- races and initialisation

KERNEL bug_uninitialised_shared(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  if (threadIdx.x != 5) f[threadIdx.x] = 1.f;
  __syncthreads();
  o[threadIdx.x] = f[threadIdx.x];
}
RM_EXPORT(bug_uninitialised_shared)

KERNEL bug_uninitialised_global(float* o, const float* x, int n) { o[threadIdx.x] = x[threadIdx.x] * float(n); }
RM_EXPORT(bug_uninitialised_global)

KERNEL bug_read_after_write(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[threadIdx.x] = 0.f;
  __syncthreads();
  f[threadIdx.x] = float(threadIdx.x);
  o[threadIdx.x] = f[(threadIdx.x + 32) % blockDim.x];
}
RM_EXPORT(bug_read_after_write)

KERNEL bug_write_after_read(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  const float v = f[threadIdx.x ^ 32];
  f[threadIdx.x] = v + 1.f;
  __syncthreads();
  o[threadIdx.x] = f[threadIdx.x];
}
RM_EXPORT(bug_write_after_read)

KERNEL bug_write_after_write(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[threadIdx.x % 32] = float(threadIdx.x);
  __syncthreads();
  o[threadIdx.x] = f[threadIdx.x % 32];
}
RM_EXPORT(bug_write_after_write)

KERNEL bug_inside_warp(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[threadIdx.x] = 0.f;
  __syncwarp();
  f[threadIdx.x] = float(threadIdx.x);
  o[threadIdx.x] = f[threadIdx.x ^ 1];
}
RM_EXPORT(bug_inside_warp)

KERNEL ok_inside_warp(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  f[threadIdx.x] = float(threadIdx.x);
  __syncwarp();
  o[threadIdx.x] = f[threadIdx.x ^ 1];
}
RM_EXPORT(ok_inside_warp)

// Byte stores of neighbouring threads into one word are no race.
KERNEL ok_neighbouring_bytes(float* o) {
  RM_DYN_SMEM(smem);
  smem[threadIdx.x] = (unsigned char)threadIdx.x;
  __syncthreads();
  o[threadIdx.x] = float(smem[threadIdx.x ^ 33]);
}
RM_EXPORT(ok_neighbouring_bytes)

// Named barriers order the two halves of a block.
KERNEL ok_producer_consumer(float* o) {
  RM_DYN_SMEM(smem);
  float* f = smem_at<float>(smem, 0);
  if (threadIdx.x < 32) {
    f[threadIdx.x] = float(threadIdx.x);
    named_barrier_arrive(1, 64);
  } else {
    named_barrier_sync(1, 64);
    o[threadIdx.x - 32] = o[threadIdx.x] = f[threadIdx.x - 32];
  }
}
RM_EXPORT(ok_producer_consumer)

// Every block writes its first element, which the block before writes too.
KERNEL bug_between_blocks(float* o) { o[threadIdx.x / 2 + blockIdx.x] = 1.f; }
RM_EXPORT(bug_between_blocks)

// Block 0 reads what later blocks overwrite.
KERNEL bug_read_then_overwritten(float* o) {
  if (blockIdx.x == 0) {
    o[threadIdx.x + 64] = o[threadIdx.x];
  } else {
    o[threadIdx.x] = 2.f;
  }
}
RM_EXPORT(bug_read_then_overwritten)

// ---- asynchronous copies and products

template <int LEFT> __device__ __forceinline__ void copy_and_read(float* o, const float* x) {
  RM_DYN_SMEM(smem);
  cp_async_16(smem_u32(smem) + threadIdx.x * 16, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<LEFT>();
  __syncthreads();
  o[threadIdx.x] = smem_at<float>(smem, 0)[threadIdx.x];
  cp_async_wait<0>();
}
KERNEL bug_copy_without_wait(float* o, const float* x) { copy_and_read<1>(o, x); }
RM_EXPORT(bug_copy_without_wait)
KERNEL ok_copy_with_wait(float* o, const float* x) { copy_and_read<0>(o, x); }
RM_EXPORT(ok_copy_with_wait)

KERNEL bug_copy_without_barrier(float* o, const float* x) {
  RM_DYN_SMEM(smem);
  cp_async_16(smem_u32(smem) + threadIdx.x * 16, x + threadIdx.x * 4);
  cp_async_commit();
  cp_async_wait<0>();
  o[threadIdx.x] = smem_at<float>(smem, 0)[threadIdx.x];
}
RM_EXPORT(bug_copy_without_barrier)

KERNEL bug_copy_not_drained(float* o, const float* x) {
  RM_DYN_SMEM(smem);
  cp_async_16(smem_u32(smem) + threadIdx.x * 16, x + threadIdx.x * 4);
  cp_async_commit();
  o[threadIdx.x] = 1.f;
}
RM_EXPORT(bug_copy_not_drained)

KERNEL bug_copy_misaligned(float* o, const float* x) {
  RM_DYN_SMEM(smem);
  cp_async_16(smem_u32(smem) + threadIdx.x * 16, x + threadIdx.x * 4 + 1);
  cp_async_wait_all();
  o[threadIdx.x] = 1.f;
}
RM_EXPORT(bug_copy_misaligned)

// The double buffer of a tile loop. Without the trailing barrier a fast warp refills the buffer that a slow one still reads.
template <bool TRAILING_BARRIER> __device__ __forceinline__ void tile_loop(float* o, const float* x) {
  RM_DYN_SMEM(smem);
  const int t = int(threadIdx.x);
  const float* tile = smem_at<float>(smem, 0);
  const auto fetch = [&](int i) {
    if (i < 4) cp_async_16(smem_u32(smem) + uint32_t(i & 1) * 1024 + uint32_t(t) * 16, x + i * 256 + t * 4);
    cp_async_commit();
  };
  fetch(0);
  float sum = 0.f;
  for (int i = 0; i < 4; i++) {
    fetch(i + 1);
    cp_async_wait<1>();
    __syncthreads();
    sum += tile[(i & 1) * 256 + (t ^ 63) * 4];
    if (TRAILING_BARRIER) __syncthreads();
  }
  cp_async_wait<0>();
  o[t] = sum;
}
KERNEL bug_no_trailing_barrier(float* o, const float* x) { tile_loop<false>(o, x); }
RM_EXPORT(bug_no_trailing_barrier)
KERNEL ok_trailing_barrier(float* o, const float* x) { tile_loop<true>(o, x); }
RM_EXPORT(ok_trailing_barrier)

// One 64 x 64 x 64 product from tiles stored by ordinary stores.
template <bool PROXY_FENCE, bool WAIT> __device__ __forceinline__ void product(float* o) {
  RM_DYN_SMEM(smem);
  const uint32_t s = smem_u32(smem);
  const int t = int(threadIdx.x);
  for (int i = t; i < 8192 / 4; i += 128) smem_at<uint2>(smem, 0)[i] = make_uint2(0x3f803f80u, 0x3f803f80u);
  if (PROXY_FENCE) fence_async_shared();
  __syncthreads();
  float d[32] = {};
  wgmma_fence();
  for (int k = 0; k < 4; k++)
    wgmma_m64n64k16<0, 0>(d, wgmma_descriptor_128b(s + k * 32, 16, 1024), wgmma_descriptor_128b(s + 8192 + k * 32, 16, 1024), 1);
  wgmma_commit();
  if (WAIT) wgmma_wait<0>();
  o[t] = d[t % 32];
  wgmma_wait<0>();
}
KERNEL bug_no_proxy_fence(float* o) { product<false, true>(o); }
RM_EXPORT(bug_no_proxy_fence)
KERNEL bug_no_wgmma_wait(float* o) { product<true, false>(o); }
RM_EXPORT(bug_no_wgmma_wait)
KERNEL ok_product(float* o) { product<true, true>(o); }
RM_EXPORT(ok_product)

// A ring of one stage: without waiting until the consumers are done with it, the producer overwrites what they still read.
template <bool EMPTY_WAIT> __device__ __forceinline__ void ring(float* o, const CUtensorMap* map) {
  RM_DYN_SMEM(smem);
  const uint32_t tile = smem_u32(smem), full = tile + 4096, empty = full + 8;
  const int t = int(threadIdx.x);
  if (t == 0) {
    mbarrier_init(full, 1);
    mbarrier_init(empty, 1);
    mbarrier_fence_init();
  }
  __syncthreads();
  if (t >= 32) {
    if (t == 32) {
      for (int i = 0; i < 4; i++) {
        if (EMPTY_WAIT) mbarrier_wait(empty, uint32_t(i & 1) ^ 1);
        mbarrier_expect_tx(full, 4096);
        tma_load_2d(tile, map, 0, i * 32, full);
      }
    }
    return;
  }
  float sum = 0.f;
  for (int i = 0; i < 4; i++) {
    mbarrier_wait(full, uint32_t(i & 1));
    for (int j = 0; j < 32; j++) sum += smem_at<float>(smem, 0)[j * 32 + (t ^ (j / 8 % 4 * 8))];
    __syncwarp();
    if (t == 0) mbarrier_arrive(empty);
  }
  o[t] = sum;
}
KERNEL bug_no_empty_wait(float* o, const __grid_constant__ CUtensorMap map) { ring<false>(o, &map); }
RM_EXPORT(bug_no_empty_wait)
KERNEL ok_empty_wait(float* o, const __grid_constant__ CUtensorMap map) { ring<true>(o, &map); }
RM_EXPORT(ok_empty_wait)
