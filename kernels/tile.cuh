// Tiles of 64 rows in shared memory, and the two products of them that attention is made of.
//
// A warp owns 16 M rows of a product. Accumulators have the fragment layout of mma.m16n8: lane (g, t) = (lane / 4, lane % 4) holds, of
// 16-row block m and 8-column block n, elements x[m][n][2 r + j] = (row 16 m + 8 r + g, column 8 n + 2 t + j). f32 storage uses the
// same layout with fused multiply-adds in place of mma: tf32 keeps 11 bits, too few for 1e-5.
#pragma once
#include "mma.cuh"

#if !defined(RM_SIGNATURES)

namespace flash {

constexpr int TILE = 64;

// A row lies in 16-byte chunks, permuted so that one chunk of eight neighbouring rows occupies all banks once: ldmatrix and row-wise
// 16-byte access are free of conflicts.
template <class T, int D> struct Tile {
  static constexpr int ELEMENTS = 16 / int(sizeof(T));   // of a chunk
  static constexpr int CHUNKS = D / ELEMENTS;            // of a row
  static constexpr int ROW = D * int(sizeof(T));         // bytes
  static constexpr int BYTES = TILE * ROW;
  static __device__ __forceinline__ int swizzle(int row) { return CHUNKS >= 8 ? row & 7 : row >> 1 & 3; }
  static __device__ __forceinline__ int at(int row, int chunk) { return row * ROW + ((chunk ^ swizzle(row)) << 4); }
};

// Rows of one head in a packed matrix: row r begins at start + r * stride.
template <class T> struct View {
  const T* start;
  int stride;
  __device__ __forceinline__ const T* row(int r) const { return start + size_t(r) * size_t(stride); }
};

template <int M, int N> __device__ __forceinline__ void zero(float (&x)[M][N][4]) {
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][n][e] = 0.f;
}

// Begins to copy `rows` rows from `first` of a view to a tile of ROWS; its other rows become zero.
template <class T, int D, int ROWS = TILE>
__device__ __forceinline__ void load_tile(unsigned char* tile, const View<T>& from, int first, int rows) {
  using L = Tile<T, D>;
  const uint32_t base = smem_u32(tile);
  for (int i = int(threadIdx.x); i < ROWS * L::CHUNKS; i += int(blockDim.x)) {
    const int row = i / L::CHUNKS, chunk = i % L::CHUNKS;
    const bool inside = row < rows;
    cp_async_16(base + uint32_t(L::at(row, chunk)), from.row(inside ? first + row : first) + chunk * L::ELEMENTS, inside ? 16 : 0);
  }
}

// The rows that a warp multiplies from the left: 16 M of a tile, from a multiple of 16 on. KEPT: in registers, else read again for
// every product.
template <class T, int M, int D, bool KEPT> struct Left;

template <int M, int D> struct Left<bf16, M, D, false> {
  uint32_t base;
  int chunk, swizzle;
  __device__ __forceinline__ void load(const unsigned char* tile, int row) {
    const int r = lane_id() & 15;
    base = smem_u32(tile) + uint32_t((row + r) * Tile<bf16, D>::ROW);
    chunk = lane_id() >> 4;
    swizzle = Tile<bf16, D>::swizzle(r);
  }
  __device__ __forceinline__ void get(uint32_t (&a)[M][4], int k) const {
#pragma unroll
    for (int m = 0; m < M; m++) ldmatrix_x4(a[m], base + uint32_t(16 * m * Tile<bf16, D>::ROW + (((2 * k + chunk) ^ swizzle) << 4)));
  }
};

template <int M, int D> struct Left<bf16, M, D, true> {
  uint32_t fragments[D / 16][M][4];
  __device__ __forceinline__ void load(const unsigned char* tile, int row) {
    Left<bf16, M, D, false> rows;
    rows.load(tile, row);
#pragma unroll
    for (int k = 0; k < D / 16; k++) rows.get(fragments[k], k);
  }
  __device__ __forceinline__ void get(uint32_t (&a)[M][4], int k) const {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) a[m][i] = fragments[k][m][i];
  }
};

template <int M, int D, bool KEPT> struct Left<float, M, D, KEPT> {
  const unsigned char* rows;
  __device__ __forceinline__ void load(const unsigned char* tile, int row) { rows = tile + row * Tile<float, D>::ROW; }
  __device__ __forceinline__ float4 get(int row, int chunk) const {
    return *reinterpret_cast<const float4*>(rows + Tile<float, D>::at(row, chunk));
  }
};

// s [16 M, 8 N] += left [16 M, D] . (8 N rows of `tile` from `row`, a multiple of 16) transposed.
template <int M, int N, int D, bool KEPT>
__device__ __forceinline__ void multiply_nt(float (&s)[M][N][4], const Left<bf16, M, D, KEPT>& left, const unsigned char* tile, int row) {
  using L = Tile<bf16, D>;
  const int lane = lane_id(), r = (lane & 7) + (lane >> 4) * 8, chunk = lane >> 3 & 1, swizzle = L::swizzle(r);
  const uint32_t base = smem_u32(tile) + uint32_t((row + r) * L::ROW);
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t a[M][4];
    left.get(a, k);
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, base + uint32_t(8 * n * L::ROW + (((2 * k + chunk) ^ swizzle) << 4)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_bf16(s[m][n], a[m], b[0], b[1]);
        mma_bf16(s[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

__device__ __forceinline__ float dot(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

template <int M, int N, int D, bool KEPT>
__device__ __forceinline__ void multiply_nt(float (&s)[M][N][4], const Left<float, M, D, KEPT>& left, const unsigned char* tile, int row) {
  using L = Tile<float, D>;
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll 1
  for (int chunk = 0; chunk < L::CHUNKS; chunk++) {
    float4 a[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) a[m][r] = left.get(16 * m + 8 * r + g, chunk);
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        const float4 b = *reinterpret_cast<const float4*>(tile + L::at(row + 8 * n + 2 * t + j, chunk));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
          for (int r = 0; r < 2; r++) s[m][n][2 * r + j] = dot(a[m][r], b, s[m][n][2 * r + j]);
      }
  }
}

// o [16 M, D] += p [16 M, 8 N] . (8 N rows of `tile` from `row`, a multiple of 16). p is rounded to the storage type first.
template <int M, int N, int D>
__device__ __forceinline__ void multiply_nn(float (&o)[M][D / 8][4], const float (&p)[M][N][4], const bf16*, const unsigned char* tile,
                                            int row, float*) {
  using L = Tile<bf16, D>;
  const int r = lane_id() & 15, chunk = lane_id() >> 4, swizzle = L::swizzle(r);
  const uint32_t base = smem_u32(tile) + uint32_t((row + r) * L::ROW);
#pragma unroll
  for (int k = 0; k < N; k += 2) {
    uint32_t a[M][4];
#pragma unroll
    for (int m = 0; m < M; m++) {
      a[m][0] = pack_bf16(p[m][k][0], p[m][k][1]);
      a[m][1] = pack_bf16(p[m][k][2], p[m][k][3]);
      a[m][2] = pack_bf16(p[m][k + 1][0], p[m][k + 1][1]);
      a[m][3] = pack_bf16(p[m][k + 1][2], p[m][k + 1][3]);
    }
#pragma unroll
    for (int n = 0; n < D / 8; n += 2) {
      uint32_t b[4];
      ldmatrix_x4_trans(b, base + uint32_t(8 * k * L::ROW + (((n + chunk) ^ swizzle) << 4)));
#pragma unroll
      for (int m = 0; m < M; m++) {
        mma_bf16(o[m][n], a[m], b[0], b[1]);
        mma_bf16(o[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// In f32 the rows of p, spread over four lanes, meet in `scratch`: 16 M rows of 8 N + 4 floats, the warp's own.
template <int M, int N, int D>
__device__ __forceinline__ void multiply_nn(float (&o)[M][D / 8][4], const float (&p)[M][N][4], const float*, const unsigned char* tile,
                                            int row, float* scratch) {
  using L = Tile<float, D>;
  constexpr int STRIDE = 8 * N + 4;
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        *reinterpret_cast<float2*>(scratch + (16 * m + 8 * r + g) * STRIDE + 8 * n + 2 * t) =
            make_float2(p[m][n][2 * r], p[m][n][2 * r + 1]);
  __syncwarp();
#pragma unroll 1
  for (int k = 0; k < 8 * N; k++) {
    float a[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) a[m][r] = scratch[(16 * m + 8 * r + g) * STRIDE + k];
#pragma unroll
    for (int n = 0; n < D / 8; n++) {
      const float2 b = *reinterpret_cast<const float2*>(tile + L::at(row + k, 2 * n + (t >> 1)) + 8 * (t & 1));
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          o[m][n][2 * r] = fmaf(a[m][r], b.x, o[m][n][2 * r]);
          o[m][n][2 * r + 1] = fmaf(a[m][r], b.y, o[m][n][2 * r + 1]);
        }
    }
  }
  __syncwarp();
}

// ---- accumulators back to memory, through the warp's own 16 M rows of a tile, so that every access moves 16 bytes

template <int D> __device__ __forceinline__ void stage(unsigned char* rows, const bf16*, int row, int n, int t, float x, float y) {
  *reinterpret_cast<uint32_t*>(rows + Tile<bf16, D>::at(row, n) + 4 * t) = pack_bf16(x, y);
}
template <int D> __device__ __forceinline__ void stage(unsigned char* rows, const float*, int row, int n, int t, float x, float y) {
  *reinterpret_cast<float2*>(rows + Tile<float, D>::at(row, 2 * n + (t >> 1)) + 8 * (t & 1)) = make_float2(x, y);
}

// Writes (=) o, each row times its factor, to the first `rows` rows at `to`. `own` are the warp's rows of a tile that only it uses.
template <class T, int D, int M>
__device__ __forceinline__ void store_rows(T* to, size_t stride, int rows, unsigned char* own, const float (&o)[M][D / 8][4],
                                           const float (&factor)[M][2]) {
  using L = Tile<T, D>;
  const int g = lane_id() >> 2, t = lane_id() & 3;
  __syncwarp();
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int r = 0; r < 2; r++)
        stage<D>(own, to, 16 * m + 8 * r + g, n, t, o[m][n][2 * r] * factor[m][r], o[m][n][2 * r + 1] * factor[m][r]);
  __syncwarp();
  for (int i = lane_id(); i < 16 * M * L::CHUNKS; i += WARP) {
    const int row = i / L::CHUNKS, chunk = i % L::CHUNKS;
    if (row < rows)
      *reinterpret_cast<uint4*>(to + size_t(row) * stride + chunk * L::ELEMENTS) =
          *reinterpret_cast<const uint4*>(own + L::at(row, chunk));
  }
}

}  // namespace flash

#endif
