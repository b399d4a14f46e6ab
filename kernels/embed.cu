// BERT's embedding layer: z = word[id] + position[p] + type[t], y = dropout((z - mean) * rstd * gamma + beta).
//
// Storage of tables and rows f32 or bf16; statistics, gamma, beta and their gradients f32. C: a multiple of 16, at most 4096. `rows` is
// the true number of rows, read from device memory: grids are made for the capacity, and blocks without rows leave at once. z is never
// stored: it is summed in f32, word first, and gathered again in the backward.
//
// embed_forward_*: writes (=) y [rows, C], mean [rows], rstd [rows].
//   Grid: a block for every 4 rows of the capacity (every row above C = 1024). Block: 128 threads.
// embed_backward_*: writes (=) dz over dy, and partials [blocks, 2, C] of dgamma and dbeta, which layernorm_backward_sums adds up. The
//   gradients of the tables are sums of groups of rows of dz: group_sums_* in gather.cu.
//   Grid: any number of blocks, each works through its share of the rows: as many as are resident at once (2 an SM). Block: 128 threads.
//
// Bound by memory: in bf16 the word row and y forward, the word row, dy and dz backward; positions, types, gamma and beta come from
// the caches.
#include "rows.cuh"

// What is summed for one row.
template <class T> struct EmbeddedRow {
  const T *word, *position, *token_type;
  __device__ __forceinline__ void load(float (&z)[8], int column) const {
    Held8<T> held[3];
    hold8(held[0], word + column);
    hold8(held[1], position + column);
    hold8(held[2], token_type + column);
    float p[8], t[8];
    unpack8(z, held[0]);
    unpack8(p, held[1]);
    unpack8(t, held[2]);
#pragma unroll
    for (int i = 0; i < 8; i++) z[i] = z[i] + p[i] + t[i];
  }
};

template <class T> struct EmbedTables {
  const T *word, *position, *token_type;
  const uint32_t *ids, *types, *positions;
  __device__ __forceinline__ EmbeddedRow<T> row(int row, int C) const {
    const size_t width = size_t(C);
    return {word + ids[row] * width, position + positions[row] * width, token_type + types[row] * width};
  }
};

template <class L, class T>
__device__ __forceinline__ void embed_forward(T* y, float* mean, float* rstd, const EmbedTables<T>& tables, const float* gamma,
                                              const float* beta, const RowNames& names, const Dropout& dropout, uint32_t site, int rows,
                                              int C, float eps, float* scratch) {
  const int row = int(blockIdx.x) * L::ROWS + L::row();
  if (row >= rows) return;   // with several rows a block there is no barrier
  const EmbeddedRow<T> source = tables.row(row, C);
  const RowDropout drop(dropout, names, row);
  float z[L::V][8];
#pragma unroll
  for (int v = 0; v < L::V; v++) {
#pragma unroll
    for (int i = 0; i < 8; i++) z[v][i] = 0.f;
    if (L::column(v) < C) source.load(z[v], L::column(v));
  }
  y += size_t(row) * size_t(C);
  normalize_row<L>(z, mean + row, rstd + row, gamma, beta, C, eps, scratch, [&](int c, float (&out)[8]) {
    drop.apply(out, dropout, site, c);
    store8(y + c, out);
  });
}

template <class L, class T>
__device__ __forceinline__ void embed_backward(T* dy, float* partials, const EmbedTables<T>& tables, const float* mean, const float* rstd,
                                               const float* gamma, const RowNames& names, const Dropout& dropout, uint32_t site, int rows,
                                               int C, float* shared) {
  if (int(blockIdx.x) * L::ROWS >= rows) return;
  AffineSums<L> sums;
  for (int row = int(blockIdx.x) * L::ROWS + L::row(); row < rows; row += int(gridDim.x) * L::ROWS) {
    const size_t start = size_t(row) * size_t(C);
    const EmbeddedRow<T> source = tables.row(row, C);
    const RowDropout drop(dropout, names, row);
    // In f32: z as the forward summed it, dy after dropout.
    Held8<float> held_z[L::V], held_dy[L::V];
#pragma unroll
    for (int v = 0; v < L::V; v++) {
      const int c = L::column(v);
      if (c >= C) continue;
      source.load(held_z[v].v, c);
      load8(held_dy[v].v, dy + start + c);
      drop.apply(held_dy[v].v, dropout, site, c);
    }
    backward_row<L>(sums, held_z, held_dy, mean[row], rstd[row], gamma, C, shared,
                    [&](int c, const float (&dz)[8]) { store8(dy + start + c, dz); });
  }
  write_sums<L>(partials + size_t(blockIdx.x) * 2 * size_t(C), sums, C, shared);
}

#define EMBED(T, name)                                                                                                                 \
  extern "C" __global__ void __launch_bounds__(128)                                                                                    \
      embed_forward_##name(T* y, float* mean, float* rstd, const T* word, const T* position, const T* token_type, const float* gamma,  \
                           const float* beta, const uint32_t* ids, const uint32_t* types, const RowNames names,                        \
                           const Dropout dropout, uint32_t site, const int* rows, int C, float eps) {                                  \
    RM_SHARED(float, scratch, 32);                                                                                                     \
    const EmbedTables<T> tables = {word, position, token_type, ids, types, names.position};                                            \
    by_width(C, [&](auto layout) {                                                                                                     \
      embed_forward<decltype(layout)>(y, mean, rstd, tables, gamma, beta, names, dropout, site, *rows, C, eps, scratch);               \
    });                                                                                                                                \
  }                                                                                                                                    \
  RM_EXPORT_HOT(embed_forward_##name)                                                                                                  \
  extern "C" __global__ void __launch_bounds__(128, 2)                                                                                 \
      embed_backward_##name(T* dy, float* partials, const T* word, const T* position, const T* token_type, const float* mean,          \
                            const float* rstd, const float* gamma, const uint32_t* ids, const uint32_t* types,                         \
                            const RowNames names, const Dropout dropout, uint32_t site, const int* rows, int C) {                      \
    RM_SHARED(float, shared, ROW_SHARED);                                                                                              \
    const EmbedTables<T> tables = {word, position, token_type, ids, types, names.position};                                            \
    by_width(C, [&](auto layout) {                                                                                                     \
      embed_backward<decltype(layout)>(dy, partials, tables, mean, rstd, gamma, names, dropout, site, *rows, C, shared);               \
    });                                                                                                                                \
  }                                                                                                                                    \
  RM_EXPORT_HOT(embed_backward_##name)

EMBED(float, f32)
EMBED(bf16, bf16)
