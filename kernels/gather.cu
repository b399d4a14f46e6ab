// Moving rows between matrices, and sums of rows: groups (the backward of a gather), columns (the gradient of a bias).
//
// Rows are C elements wide, a multiple of 16, in f32 or bf16; sums are f32. Counts are read from device memory: grids are made for the
// capacity, and warps or blocks without work leave at once. All are bound by memory: each element is read and written once.
//
// gather_*:      to[i] = from[rows[i]]     for i < count     Grid: a block for every 8 rows. Block: 256 threads.
// scatter_*:     to[rows[i]] = from[i]     for i < count, rows distinct; the same grid and block.
// scatter_add_*: to_acc[rows[i]] += from[i], likewise.
// zero_rows_*:   to[rows[i]] = 0, likewise.
// add_rows_*:    to[i] = a[a_rows[i]] + b[b_rows[i]], likewise; the rows of a and of b need not be distinct.
// zero_tails_*:  a[i] = 0 and b[i] = 0 for count <= i < bound, in rows of a_width and b_width that are a_stride and b_stride apart, all
//   multiples of 8 elements: what a product that sums over all `bound` rows needs of rows that are not in use. Any grid. Block: 256.
// round_rows_bf16: to[i] = from[i] in bf16, for i < count; the same grid and block.
//
// group_sums_*: to_acc[keys[g]] += the sum over j in offsets[g] .. offsets[g + 1] of from[rows[j]], for g < count; keys distinct, no
//   group empty. A group may hold one row or all of them, so the work is cut by rows and not by groups: a warp adds up 32 entries of
//   `rows`, a window, in 256 columns. Groups inside a window go to to_acc (+=); what a window holds of a larger group goes to
//   partials [windows, 2, C]: 0 for a group that began earlier, 1 for one that goes on; spans [windows, 2] (=): for a window in which
//   a group begins that goes on, the last window of it and its key, else 0.
//   Grid: a block for every 4 warps, ceil(capacity of rows / 32) * ceil(C / 256) of them. Block: 128 threads.
// group_sums_spans: adds (+=) the partials of groups over several windows, the earliest first in each of 8 slices.
//   Grid: (windows of the capacity, ceil(C / 128)). Block: 256 threads.
//
// column_sums_*: writes (=) partials [grid.y, N] of the sums over rows of x [rows, N], whose rows are `stride` elements apart (a
//   multiple of 8). Grid: (ceil(N / 256), any number that fills the machine). Block: 256 threads. activation.cu sums in the same order.
// column_sums_add: sums_acc [N] += the partials; `blocks` is grid.y of the first pass. Grid: ceil(N / 32) blocks. Block: 1024 threads.
#include "rows.cuh"

// ---- rows from one place to another: a warp each

constexpr int MOVE_WARPS = 8;

// Calls row(i) with the number of the warp's row, if it has one.
template <class Row> __device__ __forceinline__ void each_row(int count, Row row) {
  const int i = int(blockIdx.x) * MOVE_WARPS + warp_id();
  if (i < count) row(i);
}

template <class T> __device__ __forceinline__ void copy_row(T* to, const T* from, int C) {
  // Bits, so that nothing is lost of any value.
  const int vectors = C * int(sizeof(T)) / 16;
#pragma unroll 4
  for (int v = lane_id(); v < vectors; v += WARP) reinterpret_cast<uint4*>(to)[v] = reinterpret_cast<const uint4*>(from)[v];
}

template <class T> __device__ __forceinline__ void zero_row(T* to, int C) {
  const int vectors = C * int(sizeof(T)) / 16;
  for (int v = lane_id(); v < vectors; v += WARP) reinterpret_cast<uint4*>(to)[v] = make_uint4(0, 0, 0, 0);
}

template <class T> __device__ __forceinline__ void sum_row(T* to, const T* x, const T* y, int C) {
  for (int c = lane_id() * 8; c < C; c += WARP * 8) {
    float a[8], b[8];
    load8(a, x + c);
    load8(b, y + c);
#pragma unroll
    for (int i = 0; i < 8; i++) a[i] += b[i];
    store8(to + c, a);
  }
}

template <class T> __device__ __forceinline__ void zero_tail(T* x, int width, int stride, int count, int bound) {
  for (int row = count + int(blockIdx.x) * MOVE_WARPS + warp_id(); row < bound; row += int(gridDim.x) * MOVE_WARPS)
    zero_row(x + size_t(row) * size_t(stride), width);
}

// ---- sums of groups of rows

constexpr int WINDOW = 32;          // entries of `rows` that a warp adds up: one a lane
constexpr int SUM_WARPS = 4;
constexpr int SPAN_SLICES = 8;      // warps that share the windows of a group
constexpr int SPAN_COLUMNS = 128;
constexpr int ROWS_AHEAD = 4;       // loads in flight

// The group that holds entry `entry`: the last g < count with offsets[g] <= entry. All lanes of a warp call it and get the same.
__device__ __forceinline__ int find_group(const uint32_t* offsets, int count, uint32_t entry) {
  int low = 0, high = count;   // offsets[low] <= entry < offsets[high]
  while (high - low > 1) {
    const int step = (high - low + WARP - 1) / WARP;
    const int probe = low + (lane_id() + 1) * step;
    const bool at_or_before = probe < high && offsets[probe] <= entry;
    low += __popc(__ballot_sync(FULL_MASK, at_or_before)) * step;
    high = low + step < high ? low + step : high;
  }
  return low;
}

template <class T>
__device__ __forceinline__ void group_sums(float* to_acc, float* partials, uint32_t* spans, const T* from, const uint32_t* keys,
                                           const uint32_t* offsets, const uint32_t* rows, int count, int C) {
  const int chunks = (C + SUM_COLUMNS - 1) / SUM_COLUMNS, task = int(blockIdx.x) * SUM_WARPS + warp_id();
  const int window = task / chunks, column = task % chunks * SUM_COLUMNS + lane_id() * 8;
  const uint32_t entries = count > 0 ? offsets[count] : 0, begin = uint32_t(window) * WINDOW;
  if (begin >= entries) return;
  const int n = entries - begin < WINDOW ? int(entries - begin) : WINDOW;
  const int group = find_group(offsets, count, begin);
  // Lane l holds row l of the window, and the key and end of the group that is l groups on: no more can be in the window.
  const uint32_t row = lane_id() < n ? rows[begin + uint32_t(lane_id())] : 0;
  const int mine = group + lane_id() < count ? group + lane_id() : count - 1;
  const uint32_t key = keys[mine], end = offsets[mine + 1];
  bool began_earlier = offsets[group] < begin;

  const bool active = column < C;
  const size_t width = size_t(C);
  float* head = partials + size_t(window) * 2 * width + size_t(column);
  float sum[8] = {};
  int current = 0;    // groups behind the first
  bool open = true;   // the last entry's group goes on behind it
  uint32_t current_end = __shfl_sync(FULL_MASK, end, 0);
  for (int first = 0; first < n; first += ROWS_AHEAD) {
    Held8<T> held[ROWS_AHEAD];
#pragma unroll
    for (int j = 0; j < ROWS_AHEAD; j++) {
      const uint32_t r = __shfl_sync(FULL_MASK, row, (first + j) % WARP);
      if (first + j < n && active) hold8(held[j], from + size_t(r) * width + size_t(column));
    }
#pragma unroll
    for (int j = 0; j < ROWS_AHEAD; j++) {
      if (first + j >= n) break;
      if (active) {
        float v[8];
        unpack8(v, held[j]);
#pragma unroll
        for (int i = 0; i < 8; i++) sum[i] += v[i];
      }
      open = begin + uint32_t(first + j) + 1 < current_end;
      if (open) continue;
      const uint32_t current_key = __shfl_sync(FULL_MASK, key, current);
      current++;
      current_end = __shfl_sync(FULL_MASK, end, current % WARP);
      if (active && began_earlier) {
        store8(head, sum);
      } else if (active) {
        float* to = to_acc + size_t(current_key) * width + size_t(column);
        float old[8];
        load8(old, to);
#pragma unroll
        for (int i = 0; i < 8; i++) old[i] += sum[i];
        store8(to, old);
      }
#pragma unroll
      for (int i = 0; i < 8; i++) sum[i] = 0.f;
      began_earlier = false;
    }
  }
  const uint32_t open_key = __shfl_sync(FULL_MASK, key, current % WARP);
  if (open && active) store8(began_earlier ? head : head + width, sum);
  if (task % chunks == 0 && lane_id() == 0) {
    const bool begins = open && !began_earlier;
    spans[2 * window] = begins ? (current_end - 1) / WINDOW : 0;
    spans[2 * window + 1] = begins ? open_key : 0;
  }
}

// ---- sums of columns

template <class T> __device__ __forceinline__ void column_sums(float* partials, const T* x, int rows, int N, int stride) {
  RM_SHARED(float, shared, COLUMN_SHARED);
  const auto at = [&](int row, int column) { return x + size_t(row) * size_t(stride) + size_t(column); };
  column_partials<Held8<T>, ROWS_AHEAD>(
      partials, rows, N, shared, [&](Held8<T>& held, int row, int column) { hold8(held, at(row, column)); },
      [&](float (&v)[8], const Held8<T>& held, int, int) { unpack8(v, held); });
}

#define MOVES(T, name)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      gather_##name(T* to, const T* from, const uint32_t* rows, const int* count, int C) {                                             \
    each_row(*count, [&](int i) { copy_row(to + size_t(i) * size_t(C), from + size_t(rows[i]) * size_t(C), C); });                     \
  }                                                                                                                                    \
  RM_EXPORT(gather_##name)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      scatter_##name(T* to, const T* from, const uint32_t* rows, const int* count, int C) {                                            \
    each_row(*count, [&](int i) { copy_row(to + size_t(rows[i]) * size_t(C), from + size_t(i) * size_t(C), C); });                     \
  }                                                                                                                                    \
  RM_EXPORT(scatter_##name)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      scatter_add_##name(T* to_acc, const T* from, const uint32_t* rows, const int* count, int C) {                                    \
    const size_t width = size_t(C);                                                                                                    \
    each_row(*count, [&](int i) {                                                                                                      \
      T* const to = to_acc + rows[i] * width;                                                                                          \
      sum_row(to, to, from + size_t(i) * width, C);                                                                                    \
    });                                                                                                                                \
  }                                                                                                                                    \
  RM_EXPORT(scatter_add_##name)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(256) zero_rows_##name(T* to, const uint32_t* rows, const int* count, int C) {           \
    each_row(*count, [&](int i) { zero_row(to + size_t(rows[i]) * size_t(C), C); });                                                   \
  }                                                                                                                                    \
  RM_EXPORT(zero_rows_##name)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      add_rows_##name(T* to, const T* a, const uint32_t* a_rows, const T* b, const uint32_t* b_rows, const int* count, int C) {        \
    const size_t width = size_t(C);                                                                                                    \
    each_row(*count, [&](int i) { sum_row(to + size_t(i) * width, a + a_rows[i] * width, b + b_rows[i] * width, C); });                \
  }                                                                                                                                    \
  RM_EXPORT(add_rows_##name)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      zero_tails_##name(T* a, int a_width, int a_stride, T* b, int b_width, int b_stride, const int* count, int bound) {               \
    zero_tail(a, a_width, a_stride, *count, bound);                                                                                    \
    zero_tail(b, b_width, b_stride, *count, bound);                                                                                    \
  }                                                                                                                                    \
  RM_EXPORT(zero_tails_##name)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(128)                                                                                    \
      group_sums_##name(float* to_acc, float* partials, uint32_t* spans, const T* from, const uint32_t* keys,                          \
                        const uint32_t* offsets, const uint32_t* rows, const int* count, int C) {                                      \
    group_sums(to_acc, partials, spans, from, keys, offsets, rows, *count, C);                                                         \
  }                                                                                                                                    \
  RM_EXPORT_HOT(group_sums_##name)                                                                                                     \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      column_sums_##name(float* partials, const T* x, const int* rows, int N, int stride) {                                            \
    column_sums(partials, x, *rows, N, stride);                                                                                        \
  }                                                                                                                                    \
  RM_EXPORT_HOT(column_sums_##name)

MOVES(float, f32)
MOVES(bf16, bf16)

extern "C" __global__ void __launch_bounds__(256) round_rows_bf16(bf16* to, const float* from, const int* count, int C) {
  each_row(*count, [&](int i) {
    for (int c = lane_id() * 8; c < C; c += WARP * 8) {
      float v[8];
      load8(v, from + size_t(i) * size_t(C) + size_t(c));
      store8(to + size_t(i) * size_t(C) + size_t(c), v);
    }
  });
}
RM_EXPORT(round_rows_bf16)

extern "C" __global__ void __launch_bounds__(256)
    group_sums_spans(float* to_acc, const float* partials, const uint32_t* spans, const uint32_t* offsets, const int* count, int C) {
  RM_SHARED(float4, slices, SPAN_SLICES * WARP);
  const int window = int(blockIdx.x), groups = *count;
  if (groups == 0 || uint32_t(window) * WINDOW >= offsets[groups]) return;
  const int last = int(spans[2 * window]);
  if (last == 0) return;
  const int column = int(blockIdx.y) * SPAN_COLUMNS + lane_id() * 4;
  const size_t width = size_t(C);
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if (column < C) {
#pragma unroll 4
    for (int w = window + warp_id(); w <= last; w += SPAN_SLICES) {
      const size_t part = 2 * size_t(w) + (w == window ? 1 : 0);
      const float4 v = *reinterpret_cast<const float4*>(partials + part * width + size_t(column));
      sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
    }
  }
  slices[warp_id() * WARP + lane_id()] = sum;
  __syncthreads();
  if (warp_id() > 0 || column >= C) return;
  float4* to = reinterpret_cast<float4*>(to_acc + size_t(spans[2 * window + 1]) * width + size_t(column));
  float4 total = *to;
  sum = slices[lane_id()];
#pragma unroll
  for (int s = 1; s < SPAN_SLICES; s++) {
    const float4 v = slices[s * WARP + lane_id()];
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  *to = make_float4(total.x + sum.x, total.y + sum.y, total.z + sum.z, total.w + sum.w);
}
RM_EXPORT(group_sums_spans)

extern "C" __global__ void __launch_bounds__(1024)
    column_sums_add(float* sums_acc, const float* partials, const int* rows, int blocks, int N) {
  const int used = (*rows + COLUMN_WARPS - 1) / COLUMN_WARPS;
  add_partials(partials, used < blocks ? used : blocks, N, [&](int i) { return sums_acc + i; });
}
RM_EXPORT(column_sums_add)
