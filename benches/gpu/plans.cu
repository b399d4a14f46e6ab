// Plans of attention (`flash::Plan`: warps, rows, registers) timed side by side at BERT-base's sizes, bf16, head size 64. For a GPU machine
// with nvcc, which compiles it there:
//
//   nvcc -O3 -std=c++17 -gencode arch=compute_90a,code=sm_90a -I kernels benches/gpu/plans.cu -o plans && ./plans
//
// A line a plan: workload, kernel, blocks a multiprocessor that are asked for, warps, blocks of 16 rows of each, left operands kept,
// streamed rows at once; median and least milliseconds; how far the result is from the first plan's, the engine's own on sm_80. Plans by
// warpgroups (flash_hopper.cuh) are named by how many a block has; `whole` is the backward in one pass, to be held against dq and dkv.
// With an argument every plan runs once, for a profiler.
#include "attention.cu"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

using namespace flash;

#define CHECK(call)                                                              \
  do {                                                                           \
    const cudaError_t code = (call);                                             \
    if (code != cudaSuccess) {                                                   \
      printf("error: %s: %s\n", #call, cudaGetErrorString(code));                \
      exit(1);                                                                   \
    }                                                                            \
  } while (0)

constexpr int HEADS = 12, D = 64, C = HEADS * D, SETS = 3, REPEATS = 12;

struct Operands {
  bf16 *qkv, *out, *dout, *gradient;
  float *lse, *delta;
};
struct Problem {
  const char* name;
  AttentionBatch batch;
  Dropout dropout;
  AttentionBatch whole;    // each sequence once
  int tiles, sequences, longest;
  size_t tokens;
  std::vector<Operands> sets;
  std::vector<float> expected[2];   // out; gradient
};

template <class P, int BLOCKS>
__global__ void __launch_bounds__(P::WARPS * 32, BLOCKS) forward_plan(Operands x, AttentionBatch batch, Dropout dropout) {
  RM_DYN_SMEM(memory);
  Item item;
  if (!find<P>(item, batch)) return;
  const Tensors<bf16, D> t(x.qkv, 3 * C, x.qkv + C, 3 * C, x.qkv + 2 * C, 3 * C, item);
  forward<P>(x.out, x.lse, t.queries, t.k, t.v, t.mask, item, batch, Drop(dropout, 1, batch, item), HEADS, memory);
}
template <class P, int BLOCKS>
__global__ void __launch_bounds__(P::WARPS * 32, BLOCKS) dq_plan(Operands x, AttentionBatch batch, Dropout dropout) {
  RM_DYN_SMEM(memory);
  Item item;
  if (!find<P>(item, batch)) return;
  const Tensors<bf16, D> t(x.qkv, 3 * C, x.qkv + C, 3 * C, x.qkv + 2 * C, 3 * C, item);
  backward_dq<P>(x.gradient, 3 * C, x.delta, x.out, {x.dout, x.lse}, t.queries, t.k, t.v, t.mask, item, batch,
                 Drop(dropout, 1, batch, item), HEADS, memory);
}
template <class P, int BLOCKS>
__global__ void __launch_bounds__(P::WARPS * 32, BLOCKS) dkv_plan(Operands x, AttentionBatch batch, Dropout dropout) {
  RM_DYN_SMEM(memory);
  Item item;
  if (!find<P>(item, batch)) return;
  const Tensors<bf16, D> t(x.qkv, 3 * C, x.qkv + C, 3 * C, x.qkv + 2 * C, 3 * C, item);
  bf16* const corner = x.gradient + t.column(item, 3 * C);
  backward_dkv<P>(corner + C, corner + 2 * C, 3 * C, x.delta, {x.dout, x.lse}, t.queries, t.k, t.v, t.mask, item, batch,
                  Drop(dropout, 1, batch, item), HEADS, memory);
}

template <int GROUPS, int BLOCKS>
__global__ void __launch_bounds__(GROUPS * 128, BLOCKS) forward_groups(Operands x, AttentionBatch batch, Dropout dropout, int) {
  RM_DYN_SMEM(memory);
  Item item;
  if (!find<hopper::ForwardPlan<GROUPS>>(item, batch)) return;
  const Tensors<bf16, D> t(x.qkv, 3 * C, x.qkv + C, 3 * C, x.qkv + 2 * C, 3 * C, item);
  hopper::forward<GROUPS>(x.out, x.lse, t.queries, t.k, t.v, t.mask, item, batch, Drop(dropout, 1, batch, item), HEADS, memory);
}
template <int GROUPS, int BLOCKS>
__global__ void __launch_bounds__(GROUPS * 128, BLOCKS) whole_groups(Operands x, AttentionBatch batch, Dropout dropout, int tiles) {
  RM_DYN_SMEM(memory);
  Item item;
  if (!find<hopper::ForwardPlan<1>>(item, batch)) return;
  const Tensors<bf16, D> t(x.qkv, 3 * C, x.qkv + C, 3 * C, x.qkv + 2 * C, 3 * C, item);
  bf16* const corner = x.gradient + t.column(item, 3 * C);
  hopper::backward<GROUPS>(corner, 3 * C, corner + C, corner + 2 * C, 3 * C, x.out, {x.dout, x.lse}, t.queries, t.k, t.v, t.mask, item,
                           batch, Drop(dropout, 1, batch, item), HEADS, memory, tiles);
}

bool once = false;

// Times a plan and holds what it leaves against the first one's. pass: 0 forward, 1 dq, 2 dkv, 3 both.
template <class Launch> void time_plan(Problem& problem, int pass, const char* name, Launch launch) {
  const bf16* const result = pass == 0 ? problem.sets[0].out : problem.sets[0].gradient;
  const size_t count = problem.tokens * (pass == 0 ? C : 3 * C);
  if (once) {
    launch(problem.sets[0]);
    CHECK(cudaDeviceSynchronize());
    return;
  }
  CHECK(cudaMemset(const_cast<bf16*>(result), 0xff, count * 2));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < REPEATS + 3; i++) {
    CHECK(cudaEventRecord(begin));
    for (int s = SETS - 1; s >= 0; s--) launch(problem.sets[s]);
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float ms = 0;
    CHECK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 3) times.push_back(ms / SETS);
  }
  std::sort(times.begin(), times.end());
  std::vector<bf16> stored(count);
  CHECK(cudaMemcpy(stored.data(), result, count * 2, cudaMemcpyDeviceToHost));
  std::vector<float>& expected = problem.expected[pass > 0];
  if (expected.empty()) expected.resize(count, NAN);
  double error = 0, size = 0;
  for (size_t i = 0; i < count; i++) {
    // What the other pass of the backward writes is left out.
    const size_t column = i % (3 * C);
    if (pass == 1 ? column >= C : pass == 2 ? column < C : false) continue;
    const double value = __bfloat162float(stored[i]);
    if (std::isnan(expected[i])) expected[i] = float(value);
    const double off = value - expected[i];
    error += off * off, size += double(expected[i]) * expected[i];
  }
  const char* const passes[] = {"forward", "dq", "dkv", "whole"};
  printf("%-9s %-7s %-22s  %.4f ms  (%.4f)  off %.1e\n", problem.name, passes[pass], name, times[times.size() / 2], times[0],
         std::sqrt(error / size));
  fflush(stdout);
}

template <int GROUPS, int BLOCKS> void forward_by_groups(Problem& problem) {
  using P = hopper::ForwardPlan<GROUPS>;
  constexpr int SHARED = Layout<P, 1>::COLUMNS;
  const auto kernel = forward_groups<GROUPS, BLOCKS>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
  const std::string name = "b" + std::to_string(BLOCKS) + " groups " + std::to_string(GROUPS);
  time_plan(problem, 0, name.c_str(), [&](const Operands& x) {
    kernel<<<dim3(problem.tiles, HEADS), GROUPS * 128, SHARED>>>(x, problem.batch, problem.dropout, 0);
    CHECK(cudaGetLastError());
  });
}
template <int GROUPS, int BLOCKS> void whole_by_groups(Problem& problem) {
  using Shared = hopper::BackwardLayout<GROUPS>;
  const int tiles = (problem.longest + TILE - 1) / TILE;
  const int shared = Shared::QUERIES + Shared::QUERY * TILE * tiles + (problem.longest > Shared::KEYS ? tiles * TILE * D * 4 : 0);
  const auto kernel = whole_groups<GROUPS, BLOCKS>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  int resident = 0;
  CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, GROUPS * 128, size_t(shared)));
  const std::string name = "b" + std::to_string(BLOCKS) + " groups " + std::to_string(GROUPS) + " (" + std::to_string(resident) + " fit)";
  time_plan(problem, 3, name.c_str(), [&](const Operands& x) {
    kernel<<<dim3(problem.sequences, HEADS), GROUPS * 128, shared>>>(x, problem.whole, problem.dropout, tiles);
    CHECK(cudaGetLastError());
  });
}

// pass: 0 forward, 1 dq, 2 dkv. The first plan of each leaves what the next pass reads.
template <int PASS, int BLOCKS, int WARPS, int M, bool KEPT, int STEP, int REST> void plan(Problem& problem) {
  using P = Plan<bf16, D, WARPS, M, KEPT, STEP, REST>;
  constexpr int SHARED = Layout<P, PASS == 0 ? 1 : 2>::COLUMNS + (PASS == 2 ? P::STAGES * int(sizeof(Columns<P::OWN>)) : 0);
  const auto kernel = PASS == 0 ? forward_plan<P, BLOCKS> : PASS == 1 ? dq_plan<P, BLOCKS> : dkv_plan<P, BLOCKS>;
  CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED));
  const auto launch = [&](const Operands& x) {
    kernel<<<dim3(problem.tiles, HEADS), WARPS * 32, SHARED>>>(x, problem.batch, problem.dropout);
    CHECK(cudaGetLastError());
  };
  const std::string name = "b" + std::to_string(BLOCKS) + " w" + std::to_string(WARPS) + " m" + std::to_string(M) +
                           (KEPT ? " kept" : " read") + " s" + std::to_string(STEP);
  time_plan(problem, PASS, name.c_str(), launch);
}

template <class T> T* on_device(const std::vector<T>& values) {
  T* p = nullptr;
  CHECK(cudaMalloc(&p, values.size() * sizeof(T)));
  CHECK(cudaMemcpy(p, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return p;
}

Problem make(const char* name, const std::vector<int>& lengths, bool dropout) {
  std::vector<uint32_t> borders{0}, positions, table;
  std::vector<uint64_t> samples;
  std::vector<int> order;
  for (size_t s = 0; s < lengths.size(); s++) {
    borders.push_back(borders.back() + uint32_t(lengths[s]));
    samples.push_back(s);
    order.push_back(int(s));
    for (int i = 0; i < lengths[s]; i++) positions.push_back(uint32_t(i));
  }
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return lengths[a] > lengths[b]; });
  for (int s : order)
    for (int tile = 0; tile < (lengths[s] + TILE - 1) / TILE; tile++) table.push_back(uint32_t(s)), table.push_back(uint32_t(tile));
  const int tiles = int(table.size() / 2);
  const size_t tokens = borders.back();
  const AttentionBatch batch{on_device(borders), on_device(borders), on_device(positions),
                             on_device(samples), on_device(table), on_device(std::vector<int>{tiles})};
  const Dropout drop{on_device(std::vector<uint32_t>{123, 456}), dropout ? 6554u : 0u, dropout ? 1.f / 0.9f : 1.f};
  std::vector<uint32_t> sequences;
  for (int s : order) sequences.push_back(uint32_t(s)), sequences.push_back(0);
  AttentionBatch whole = batch;
  whole.tiles = on_device(sequences);
  whole.tile_count = on_device(std::vector<int>{int(lengths.size())});
  const int longest = *std::max_element(lengths.begin(), lengths.end());
  Problem problem{name, batch, drop, whole, tiles, int(lengths.size()), longest, tokens, {}, {}};
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<bf16> values(tokens * 4 * C);
  for (auto& value : values) value = __float2bfloat16(normal(generator));
  const std::vector<bf16> qkv(values.begin(), values.begin() + tokens * 3 * C), dout(values.begin() + tokens * 3 * C, values.end());
  for (int s = 0; s < SETS; s++)
    problem.sets.push_back({on_device(qkv), on_device(std::vector<bf16>(tokens * C)), on_device(dout),
                            on_device(std::vector<bf16>(tokens * 3 * C)), on_device(std::vector<float>(tokens * HEADS)),
                            on_device(std::vector<float>(tokens * HEADS))});
  return problem;
}

void plans(Problem problem) {
  plan<0, 1, 2, 2, true, 64, 32>(problem);
  plan<0, 4, 4, 1, true, 32, 32>(problem);
  plan<0, 3, 4, 1, true, 64, 32>(problem);
  plan<0, 4, 4, 1, true, 64, 32>(problem);
  plan<0, 2, 8, 1, true, 32, 32>(problem);
  plan<0, 2, 8, 1, true, 64, 32>(problem);
  plan<0, 2, 4, 2, true, 32, 32>(problem);
  plan<0, 2, 4, 2, true, 64, 32>(problem);
  forward_by_groups<1, 4>(problem);
  forward_by_groups<1, 3>(problem);
  forward_by_groups<2, 2>(problem);
  forward_by_groups<4, 1>(problem);
  plan<0, 1, 2, 2, true, 64, 32>(problem);
  plan<1, 1, 2, 2, true, 32, 32>(problem);
  plan<1, 4, 4, 1, true, 32, 32>(problem);
  plan<1, 3, 4, 1, true, 32, 32>(problem);
  plan<1, 4, 4, 1, false, 32, 32>(problem);
  plan<1, 4, 4, 1, false, 16, 16>(problem);
  plan<1, 2, 8, 1, true, 32, 32>(problem);
  plan<1, 2, 8, 1, false, 32, 32>(problem);
  plan<1, 2, 4, 2, true, 32, 32>(problem);
  plan<1, 1, 2, 2, true, 32, 32>(problem);
  plan<2, 1, 2, 2, false, 16, 16>(problem);
  plan<2, 3, 4, 1, false, 32, 32>(problem);
  plan<2, 4, 4, 1, false, 32, 32>(problem);
  plan<2, 4, 4, 1, false, 16, 16>(problem);
  plan<2, 3, 4, 1, true, 32, 32>(problem);
  plan<2, 2, 8, 1, false, 32, 32>(problem);
  plan<2, 2, 8, 1, false, 16, 16>(problem);
  plan<2, 1, 8, 1, true, 32, 32>(problem);
  plan<2, 2, 4, 2, false, 16, 16>(problem);
  plan<2, 1, 2, 2, false, 16, 16>(problem);
  whole_by_groups<1, 1>(problem);
  whole_by_groups<1, 2>(problem);
  whole_by_groups<1, 3>(problem);
  whole_by_groups<2, 1>(problem);
}

int main(int argc, char**) {
  once = argc > 1;
  std::vector<int> passages;
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  for (int left = 32768; left > 0; left -= passages.back())
    passages.push_back(std::min(left, std::min(150, std::max(8, int(std::lround(75 * std::exp(0.45f * normal(generator))))))));
  plans(make("full512", std::vector<int>(64, 512), true));
  if (once) return 0;
  plans(make("passages", passages, true));
  plans(make("nodropout", std::vector<int>(64, 512), false));
}
