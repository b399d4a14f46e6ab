// Activation of the feed-forward layers and of the pooler: y = act(x) with x = u + bias, and dx = dy * act'(x).
//
// Storage f32 or bf16, arithmetic f32. `bias` [N] f32 may be null: then u holds it already (a product's epilogue added it). u stays as it
// is and is what the backward reads, with the same bias. `function` is one of `Activation`.
//
// activation_forward_*:  writes (=) y [rows, N].
// activation_backward_*: writes (=) dx over dy [rows, N].
//   `rows` is the true number, read from device memory. N: a multiple of 8. Grid: a block for every 2048 elements of the capacity.
//   Block: 256 threads.
// activation_backward_sums_*: the same without a bias, and writes (=) partials [grid.y, N] of the sums over rows of dx as stored, the
//   gradient of the bias that u holds: those of column_sums_* in gather.cu to the bit, so that column_sums_add adds them up and dx need
//   not be read again. Grid and block are those of column_sums_*.
//
// Bound by memory (bf16: 4 bytes an element forward, 6 backward) with little to spare: hence one exponential an element and approximate
// division, and no library function. The error of each formula stays below 5e-7 of the larger of |x| and 1.
#include "rows.cuh"

enum Activation { GELU = 0, GELU_TANH = 1, QUICK_GELU = 2, RELU = 3, SILU = 4, TANH = 5 };

#if !defined(RM_SIGNATURES)

// x Phi(x), Phi the normal distribution function: Abramowitz & Stegun 7.1.26, erfc(|z|) = poly(t) exp(-z^2) with t = 1 / (1 + p |z|),
// z = x / sqrt(2). The same exponential is that of the density, and the negative tail comes without cancellation.
struct Gelu {
  // Phi(x), and the density without its factor.
  static __device__ __forceinline__ float2 distribution(float x) {
    const float z = fabsf(x) * 0.70710678f, e = __expf(-0.5f * x * x), t = __fdividef(1.f, 1.f + 0.3275911f * z);
    const float poly = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
    const float tail = 0.5f * poly * e;
    return make_float2(x < 0.f ? tail : 1.f - tail, e);
  }
  static __device__ __forceinline__ float value(float x) { return x * distribution(x).x; }
  static __device__ __forceinline__ float slope(float x) {
    const float2 d = distribution(x);
    return d.x + x * 0.39894228f * d.y;
  }
};

// x sigma(k(x)): `Inner` gives k and k'.
template <class Inner> struct Swish {
  static __device__ __forceinline__ float sigmoid(float k) { return __fdividef(1.f, 1.f + __expf(-k)); }
  static __device__ __forceinline__ float value(float x) { return x * sigmoid(Inner::value(x)); }
  static __device__ __forceinline__ float slope(float x) {
    const float s = sigmoid(Inner::value(x));
    const float bump = s * (1.f - s);
    return bump == 0.f ? s : s + bump * x * Inner::slope(x);  // far out Inner::slope may be infinite
  }
};

// (1 + tanh(a)) / 2 = sigma(2 a) with a = sqrt(2 / pi) (x + 0.044715 x^3).
struct TanhInner {
  static __device__ __forceinline__ float value(float x) { return 1.59576912f * (x + 0.044715f * x * x * x); }
  static __device__ __forceinline__ float slope(float x) { return 1.59576912f * (1.f + 0.134145f * x * x); }
};
struct QuickInner {
  static __device__ __forceinline__ float value(float x) { return 1.702f * x; }
  static __device__ __forceinline__ float slope(float) { return 1.702f; }
};
struct SiluInner {
  static __device__ __forceinline__ float value(float x) { return x; }
  static __device__ __forceinline__ float slope(float) { return 1.f; }
};

// A NaN stays one, so that a broken step is noticed.
struct Relu {
  static __device__ __forceinline__ float value(float x) { return x < 0.f ? 0.f : x; }
  static __device__ __forceinline__ float slope(float x) { return x > 0.f ? 1.f : 0.f; }
};

// With e = exp(-2 |x|), which cannot overflow: tanh |x| = 1 - 2 e / (1 + e), and its series near 0, where that cancels;
// tanh' = 4 e / (1 + e)^2.
struct Tanh {
  static __device__ __forceinline__ float value(float x) {
    const float z = x * x, e = __expf(-2.f * fabsf(x)), far = 1.f - __fdividef(2.f * e, 1.f + e);
    const float near = x + x * z * (-0.333333333f + z * (0.133333333f + z * -0.0539682540f));
    return z < 0.0625f ? near : copysignf(far, x);
  }
  static __device__ __forceinline__ float slope(float x) {
    const float e = __expf(-2.f * fabsf(x)), d = 1.f + e;
    return __fdividef(4.f * e, d * d);
  }
};

template <class Work> __device__ __forceinline__ void by_function(int function, Work work) {
  switch (function) {
    case GELU: return work(Gelu());
    case GELU_TANH: return work(Swish<TanhInner>());
    case QUICK_GELU: return work(Swish<QuickInner>());
    case RELU: return work(Relu());
    case SILU: return work(Swish<SiluInner>());
    default: return work(Tanh());
  }
}

// First of the thread's eight elements, or false when it has none.
__device__ __forceinline__ bool first_element(size_t& first, int rows, int N) {
  first = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
  return first < size_t(rows) * size_t(N);
}

template <class T> __device__ __forceinline__ void load_biased(float (&x)[8], const T* u, const float* bias, size_t first, int N) {
  load8(x, u + first);
  if (!bias) return;
  float b[8];
  // In vectors, so that the number fits 32 bits: a 64-bit remainder is slow.
  load8(b, bias + uint32_t(first / 8) % uint32_t(N / 8) * 8);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] += b[i];
}

template <class F, class T> __device__ __forceinline__ void activation_forward(T* y, const T* u, const float* bias, int rows, int N) {
  size_t first;
  if (!first_element(first, rows, N)) return;
  float x[8];
  load_biased(x, u, bias, first, N);
#pragma unroll
  for (int i = 0; i < 8; i++) x[i] = F::value(x[i]);
  store8(y + first, x);
}

template <class F, class T> __device__ __forceinline__ void activation_backward(T* dy, const T* u, const float* bias, int rows, int N) {
  size_t first;
  if (!first_element(first, rows, N)) return;
  float d[8], x[8];
  load8(d, dy + first);
  load_biased(x, u, bias, first, N);
#pragma unroll
  for (int i = 0; i < 8; i++) d[i] *= F::slope(x[i]);
  store8(dy + first, d);
}

template <class F, class T>
__device__ __forceinline__ void activation_backward_sums(T* dy, float* partials, const T* u, int rows, int N, float* shared) {
  struct Pair {
    Held8<T> d, x;
  };
  // As many loads in flight as registers allow with four blocks a multiprocessor.
  constexpr int AHEAD = 2;
  const auto at = [&](int row, int column) { return size_t(row) * size_t(N) + size_t(column); };
  column_partials<Pair, AHEAD>(
      partials, rows, N, shared,
      [&](Pair& held, int row, int column) {
        hold8(held.d, dy + at(row, column));
        hold8(held.x, u + at(row, column));
      },
      [&](float (&d)[8], const Pair& held, int row, int column) {
        float x[8];
        unpack8(d, held.d);
        unpack8(x, held.x);
#pragma unroll
        for (int i = 0; i < 8; i++) d[i] = rounded<T>(d[i] * F::slope(x[i]));
        store8(dy + at(row, column), d);
      });
}

#endif

#define ACTIVATION(T, name)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      activation_forward_##name(T* y, const T* u, const float* bias, const int* rows, int N, int function) {                           \
    by_function(function, [&](auto f) { activation_forward<decltype(f)>(y, u, bias, *rows, N); });                                     \
  }                                                                                                                                    \
  RM_EXPORT_HOT(activation_forward_##name)                                                                                             \
  extern "C" __global__ void __launch_bounds__(256)                                                                                    \
      activation_backward_##name(T* dy, const T* u, const float* bias, const int* rows, int N, int function) {                         \
    by_function(function, [&](auto f) { activation_backward<decltype(f)>(dy, u, bias, *rows, N); });                                   \
  }                                                                                                                                    \
  RM_EXPORT_HOT(activation_backward_##name)                                                                                            \
  extern "C" __global__ void __launch_bounds__(256, 4)                                                                                 \
      activation_backward_sums_##name(T* dy, float* partials, const T* u, const int* rows, int N, int function) {                      \
    RM_SHARED(float, shared, COLUMN_SHARED);                                                                                           \
    by_function(function, [&](auto f) { activation_backward_sums<decltype(f)>(dy, partials, u, *rows, N, shared); });                  \
  }                                                                                                                                    \
  RM_EXPORT_HOT(activation_backward_sums_##name)

ACTIVATION(float, f32)
ACTIVATION(bf16, bf16)
