// The backward of `flash.cuh`, in two passes that recompute the probabilities: one that owns queries (dQ, and delta for the other),
// one that owns keys (dK, dV). Seven products instead of the five of a single pass, for no atomics, no sums across blocks, and any
// length.
#pragma once

namespace flash {

// What both passes read besides q, k and v.
template <class T> struct Saved {
  const T* dout;      // [R, H D]
  const float* lse;   // [R, H]
};

// delta = rowsum(dout * out) for the lane's rows, equal in the four lanes of a row.
template <class T, int D, int M>
__device__ __forceinline__ void row_products(float (&delta)[M][2], const T* out, const T* dout, size_t stride, int rows) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 16 * m + 8 * r + g;
      float sum = 0.f;
#pragma unroll
      for (int c = 8 * t; c < D; c += 32) {
        float x[8] = {}, y[8] = {};
        if (row < rows) {
          load8(x, out + size_t(row) * stride + c);
          load8(y, dout + size_t(row) * stride + c);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
      }
      sum += __shfl_xor_sync(FULL_MASK, sum, 1);
      delta[m][r] = sum + __shfl_xor_sync(FULL_MASK, sum, 2);
    }
}

// p = probabilities, dp = gradients of what V is multiplied by. Leaves dS / scale in dp, and in p what dV is the product of.
__device__ __forceinline__ void undrop(float& p, float& dp, float delta, bool kept, float scale) {
  dp = p * ((kept ? dp * scale : 0.f) - delta);
  p = kept ? p : 0.f;
}

// dq [R, H D] and delta [R, H] of the block's queries. `k`, `v`, `dq` begin at the sequence's first key and the packed matrix's first row.
template <class P, class Queries, class Mask>
__device__ __forceinline__ void backward_dq(typename P::T* dq, int dq_stride, float* delta_out, const typename P::T* out,
                                            const Saved<typename P::T>& saved, const Queries& queries, const View<typename P::T>& k,
                                            const View<typename P::T>& v, const Mask& mask, const Item& item,
                                            const AttentionBatch& batch, const Drop& drop, int heads, unsigned char* smem) {
  using T = typename P::T;
  constexpr int D = P::D, M = P::M;
  const Layout<P, 2> shared{smem};
  const int first = item.first_row + item.tile * TILE, rows = min(P::OWN, item.rows - item.tile * TILE);
  const int lane = lane_id(), warp_row = warp_id() * 16 * M, warp_rows = rows - warp_row;
  const size_t stride = size_t(heads) * D, warp_first = size_t(first + warp_row);
  queries.template load<P::OWN>(shared.own(0), first, rows);
  load_tile<T, D, P::OWN>(shared.own(1), View<T>{saved.dout + size_t(item.head) * D, heads * D}, first, rows);

  const uint32_t* positions = batch.position + first + warp_row;
  typename Mask::template Rows<M> seen;
  mask.begin(seen, positions, warp_rows);
  const int drop_row = lane & (16 * M - 1);
  const uint32_t drop_position = drop.threshold && drop_row < warp_rows ? positions[drop_row] : 0;
  float delta[M][2], lse[M][2];
  const size_t corner = warp_first * stride + size_t(item.head) * D;
  row_products<T, D, M>(delta, out + corner, saved.dout + corner, stride, warp_rows);
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = 16 * m + 8 * r + (lane >> 2);
      const size_t at = (warp_first + size_t(row)) * size_t(heads) + size_t(item.head);
      lse[m][r] = row < warp_rows ? saved.lse[at] * LOG2E : INFINITY;
      if ((lane & 3) == 0 && row < warp_rows) delta_out[at] = delta[m][r];
    }

  Left<T, M, D, P::KEPT> q, dout;
  float sum[M][D / 8][4];
  zero(sum);
  stream<P::STAGES>(
      tiles_of(item.keys),
      [&](int tile, int stage) {
        load_tile<T, D>(shared.streamed(stage, 0), k, tile * TILE, item.keys - tile * TILE);
        load_tile<T, D>(shared.streamed(stage, 1), v, tile * TILE, item.keys - tile * TILE);
      },
      [&]() {
        q.load(shared.own(0), warp_row);
        dout.load(shared.own(1), warp_row);
      },
      [&](int tile, int stage) {
        if (warp_rows <= 0) return;
        steps<P>(min(TILE, item.keys - tile * TILE), [&](auto number, int column) {
          constexpr int N = decltype(number)::VALUE;
          const int key = tile * TILE + column;
          float p[M][N][4], ds[M][N][4];
          zero(p);
          zero(ds);
          multiply_nt(p, q, shared.streamed(stage, 0), column);
          multiply_nt(ds, dout, shared.streamed(stage, 1), column);
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
              for (int e = 0; e < 4; e++) p[m][n][e] = ex2(p[m][n][e] * Scale<D>::LOG2 - lse[m][e >> 1]);
          if (mask.cuts(key, 8 * N))
            each_seen<M, N>(mask, seen, key, [&](int m, int n, int e, bool sees) { p[m][n][e] = sees ? p[m][n][e] : 0.f; });
          if (drop.threshold) {
            each_kept<M, N, false>(
                drop, shared.random(), key, [&](int) { return drop_position; },
                [&](int m, int n, int e, bool kept) { undrop(p[m][n][e], ds[m][n][e], delta[m][e >> 1], kept, drop.scale); });
          } else {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) ds[m][n][e] = p[m][n][e] * (ds[m][n][e] - delta[m][e >> 1]);
          }
          multiply_nn<M, N, D>(sum, ds, dq, shared.streamed(stage, 0), column, shared.product());
        });
      });
  if (warp_rows <= 0) return;
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = Scale<D>::SCORE;
  store_rows<T, D>(dq + warp_first * size_t(dq_stride) + size_t(item.head) * D, size_t(dq_stride), warp_rows,
                   shared.own(0) + warp_row * Tile<T, D>::ROW, sum, factor);
}

// Begins to copy what is known of `rows` queries from `row`; zeros for the rest, whose dout is zero too.
template <int OWN, class Mask>
__device__ __forceinline__ void load_columns(Columns<OWN>* to, const float* lse, const float* delta, const uint32_t* position, int heads,
                                             int row, int rows, const Mask& mask, int key) {
  for (int i = int(threadIdx.x); i < TILE; i += int(blockDim.x)) {
    const bool inside = i < rows;
    const int from = inside ? row + i : row, bytes = inside ? 4 : 0;
    const size_t at = size_t(from) * size_t(heads);
    cp_async_4(smem_u32(&to->lse[i]), lse + at, bytes);
    cp_async_4(smem_u32(&to->delta[i]), delta + at, bytes);
    cp_async_4(smem_u32(&to->position[i]), position + from, bytes);
    if (Mask::COLUMNS) {
      const uint32_t own = position[from];
#pragma unroll
      for (int word = 0; word < OWN / 32; word++)
        to->visible[OWN / 32 * i + word] = inside ? mask.column(int(own), key + 32 * word) : 0;
    }
  }
}

// dk and dv [T, H D] (rows of `stride` elements) of the block's keys. `k`, `v`, `dk` and `dv` begin at the sequence's first key.
template <class P, class Queries, class Mask>
__device__ __forceinline__ void backward_dkv(typename P::T* dk, typename P::T* dv, int dkv_stride, const float* delta,
                                             const Saved<typename P::T>& saved, const Queries& queries, const View<typename P::T>& k,
                                             const View<typename P::T>& v, const Mask& mask, const Item& item,
                                             const AttentionBatch& batch, const Drop& drop, int heads, unsigned char* smem) {
  using T = typename P::T;
  constexpr int D = P::D, M = P::M;
  const Layout<P, 2> shared{smem};
  const int first = item.tile * TILE, rows = min(P::OWN, item.keys - first);
  const int g = lane_id() >> 2, t = lane_id() & 3, warp_row = warp_id() * 16 * M, warp_rows = rows - warp_row;
  load_tile<T, D, P::OWN>(shared.own(0), k, first, rows);
  load_tile<T, D, P::OWN>(shared.own(1), v, first, rows);

  const View<T> dout{saved.dout + size_t(item.head) * D, heads * D};
  Left<T, M, D, P::KEPT> keys, values;
  float sum_k[M][D / 8][4], sum_v[M][D / 8][4];
  zero(sum_k);
  zero(sum_v);
  stream<P::STAGES>(
      tiles_of(item.rows),
      [&](int tile, int stage) {
        const int row = item.first_row + tile * TILE, count = item.rows - tile * TILE;
        queries.template load<TILE>(shared.streamed(stage, 0), row, count);
        load_tile<T, D>(shared.streamed(stage, 1), dout, row, count);
        load_columns(shared.columns(stage), saved.lse + item.head, delta + item.head, batch.position, heads, row, count, mask, first);
      },
      [&]() {
        keys.load(shared.own(0), warp_row);
        values.load(shared.own(1), warp_row);
      },
      [&](int tile, int stage) {
        if (warp_rows <= 0) return;
        const Columns<P::OWN>& columns = *shared.columns(stage);
        steps<P>(min(TILE, item.rows - tile * TILE), [&](auto number, int column) {
          constexpr int N = decltype(number)::VALUE;
          float p[M][N][4], ds[M][N][4];
          zero(p);
          zero(ds);
          multiply_nt(p, keys, shared.streamed(stage, 0), column);
          multiply_nt(ds, values, shared.streamed(stage, 1), column);
#pragma unroll
          for (int n = 0; n < N; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const int query = column + 8 * n + 2 * t + j;
              const float lse = columns.lse[query] * LOG2E;
              const uint32_t sees = Mask::COLUMNS ? columns.visible[P::OWN / 32 * query + (warp_row >> 5)] >> ((warp_row & 31) + g) : 0;
#pragma unroll
              for (int m = 0; m < M; m++)
#pragma unroll
                for (int r = 0; r < 2; r++) {
                  const float exponential = ex2(p[m][n][2 * r + j] * Scale<D>::LOG2 - lse);
                  p[m][n][2 * r + j] = !Mask::COLUMNS || (sees >> (16 * m + 8 * r) & 1) ? exponential : 0.f;
                }
            }
          const auto gradient = [&](int m, int n, int e, bool kept) {
            undrop(p[m][n][e], ds[m][n][e], columns.delta[column + 8 * n + 2 * t + (e & 1)], kept, drop.scale);
          };
          if (drop.threshold) {
            each_kept<M, N, true>(
                drop, shared.random(), first + warp_row, [&](int query) { return columns.position[column + query]; }, gradient);
          } else {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
              for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) gradient(m, n, e, true);
          }
          multiply_nn<M, N, D>(sum_v, p, dv, shared.streamed(stage, 1), column, shared.product());
          multiply_nn<M, N, D>(sum_k, ds, dk, shared.streamed(stage, 0), column, shared.product());
        });
      });
  if (warp_rows <= 0) return;
  float factor_k[M][2], factor_v[M][2];
#pragma unroll
  for (int m = 0; m < M; m++) factor_k[m][0] = factor_k[m][1] = Scale<D>::SCORE, factor_v[m][0] = factor_v[m][1] = drop.scale;
  const size_t corner = size_t(first + warp_row) * size_t(dkv_stride);
  store_rows<T, D>(dk + corner, size_t(dkv_stride), warp_rows, shared.own(0) + warp_row * Tile<T, D>::ROW, sum_k, factor_k);
  store_rows<T, D>(dv + corner, size_t(dkv_stride), warp_rows, shared.own(1) + warp_row * Tile<T, D>::ROW, sum_v, factor_v);
}

}  // namespace flash
