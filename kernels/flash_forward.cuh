// The forward of `flash.cuh`: queries own, keys and values stream.
#pragma once

namespace flash {

// Softmax over the keys seen so far, for the lane's rows. `sum` is that of the lane's own columns.
template <int M> struct Softmax {
  float top[M][2], sum[M][2];

  __device__ __forceinline__ Softmax() {
#pragma unroll
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = -INFINITY, sum[m][0] = sum[m][1] = 0.f;
  }

  // Turns scores into probabilities times a factor that is common to a row, and brings `o` to the same factor. `scale` includes log2(e).
  template <int N, int C> __device__ __forceinline__ void add(float (&s)[M][N][4], float (&o)[M][C][4], float scale) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        float high = top[m][r];
#pragma unroll
        for (int n = 0; n < N; n++) high = fmaxf(high, fmaxf(s[m][n][2 * r], s[m][n][2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(FULL_MASK, high, 1));
        high = fmaxf(high, __shfl_xor_sync(FULL_MASK, high, 2));
        // A row that has seen nothing yet: any finite number keeps its exponentials at zero.
        const float base = high == -INFINITY ? 0.f : high * scale;
        const float shrink = ex2(top[m][r] * scale - base);
        float total = 0.f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
          for (int j = 0; j < 2; j++) total += s[m][n][2 * r + j] = ex2(s[m][n][2 * r + j] * scale - base);
        top[m][r] = high;
        sum[m][r] = sum[m][r] * shrink + total;
#pragma unroll
        for (int c = 0; c < C; c++) o[m][c][2 * r] *= shrink, o[m][c][2 * r + 1] *= shrink;
      }
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        sum[m][r] += __shfl_xor_sync(FULL_MASK, sum[m][r], 1);
        sum[m][r] += __shfl_xor_sync(FULL_MASK, sum[m][r], 2);
      }
  }
};

// out [R, H D] = dropout(softmax(Q K^T / sqrt(D))) V, lse [R, H] = the log-sum-exp of each row's scores; zeros and +inf for a row that
// sees nothing. `k` and `v` begin at the sequence's first key.
template <class P, class Queries, class Mask>
__device__ __forceinline__ void forward(typename P::T* out, float* lse, const Queries& queries, const View<typename P::T>& k,
                                        const View<typename P::T>& v, const Mask& mask, const Item& item, const AttentionBatch& batch,
                                        const Drop& drop, int heads, unsigned char* smem) {
  using T = typename P::T;
  constexpr int D = P::D, M = P::M;
  const Layout<P, 1> shared{smem};
  const int first = item.first_row + item.tile * TILE, rows = min(P::OWN, item.rows - item.tile * TILE);
  const int lane = lane_id(), warp_row = warp_id() * 16 * M, warp_rows = rows - warp_row;
  queries.template load<P::OWN>(shared.own(0), first, rows);

  const uint32_t* positions = batch.position + first + warp_row;
  typename Mask::template Rows<M> seen;
  mask.begin(seen, positions, warp_rows);
  const int drop_row = lane & (16 * M - 1);
  const uint32_t drop_position = drop.threshold && drop_row < warp_rows ? positions[drop_row] : 0;

  Left<T, M, D, P::KEPT> q;
  Softmax<M> softmax;
  float o[M][D / 8][4];
  zero(o);
  stream<P::STAGES>(
      tiles_of(item.keys),
      [&](int tile, int stage) {
        load_tile<T, D>(shared.streamed(stage, 0), k, tile * TILE, item.keys - tile * TILE);
        load_tile<T, D>(shared.streamed(stage, 1), v, tile * TILE, item.keys - tile * TILE);
      },
      [&]() { q.load(shared.own(0), warp_row); },
      [&](int tile, int stage) {
        if (warp_rows <= 0) return;
        steps<P>(min(TILE, item.keys - tile * TILE), [&](auto number, int column) {
          constexpr int N = decltype(number)::VALUE;
          const int key = tile * TILE + column;
          float s[M][N][4];
          zero(s);
          multiply_nt(s, q, shared.streamed(stage, 0), column);
          if (mask.cuts(key, 8 * N))
            each_seen<M, N>(mask, seen, key, [&](int m, int n, int e, bool sees) { s[m][n][e] = sees ? s[m][n][e] : -INFINITY; });
          softmax.add(s, o, Scale<D>::LOG2);
          if (drop.threshold)
            each_kept<M, N, false>(
                drop, shared.random(), key, [&](int) { return drop_position; },
                [&](int m, int n, int e, bool kept) { s[m][n][e] = kept ? s[m][n][e] : 0.f; });
          multiply_nn<M, N, D>(o, s, out, shared.streamed(stage, 1), column, shared.product());
        });
      });
  if (warp_rows <= 0) return;

  softmax.finish();
  float factor[M][2];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float sum = softmax.sum[m][r];
      const int row = 16 * m + 8 * r + (lane >> 2);
      factor[m][r] = sum > 0.f ? drop.scale / sum : 0.f;
      if ((lane & 3) == 0 && row < warp_rows)
        lse[size_t(first + warp_row + row) * size_t(heads) + size_t(item.head)] =
            sum > 0.f ? softmax.top[m][r] * Scale<D>::SCORE + logf(sum) : INFINITY;
    }
  const size_t stride = size_t(heads) * D;
  store_rows<T, D>(out + size_t(first + warp_row) * stride + size_t(item.head) * D, stride, warp_rows,
                   shared.own(0) + warp_row * Tile<T, D>::ROW, o, factor);
}

}  // namespace flash
