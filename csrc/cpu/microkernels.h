// The innermost loops of the atrous depthwise convolution and the activation, on vectors. For the per-instruction-set
// files only: everything here has internal linkage.
#pragma once

#include "norm.h"
#include "simd.h"

namespace deeplab_kernels::cpu {
namespace {

// The taps of a segment for one class of rows, kernel row by kernel row: where each reads, from the row's base, and
// which weight it takes.
struct TapTable {
  int64_t* offset;
  int64_t* weight;
  int64_t per_row;
};

// The taps of one result row.
struct Taps {
  const int64_t* offset;
  const int64_t* weight;
  int64_t count;
};

// acc[b] = sum over taps of weights[tap] * input[tap + b*step], the last b at `last` instead.
template <typename A, bool kNhwc, int B>
DK_INLINE void accumulate(const Taps& taps, const A* weights, const A* input, int64_t step, int64_t last,
                          Vec<A> (&acc)[B]) {
  for (int b = 0; b < B; ++b) acc[b] = Vec<A>{};
  for (int64_t t = 0; t < taps.count; ++t) {
    const A* p = input + taps.offset[t];
    const A* w = weights + taps.weight[t];
    const Vec<A> weight = kNhwc ? load(w) : broadcast(*w);
#pragma GCC unroll 8
    for (int b = 0; b < B - 1; ++b) acc[b] += weight * load(p + b * step);
    acc[B - 1] += weight * load(p + last);
  }
}

// The same for a number of taps known to the compiler, with the weights already in registers.
template <typename A, int N, int B>
DK_INLINE void accumulate(const A* const (&inputs)[N], const Vec<A> (&weights)[N], int64_t offset, int64_t step,
                          int64_t last, Vec<A> (&acc)[B]) {
  for (int b = 0; b < B; ++b) acc[b] = Vec<A>{};
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) {
    const A* p = inputs[t] + offset;
#pragma GCC unroll 8
    for (int b = 0; b < B - 1; ++b) acc[b] += weights[t] * load(p + b * step);
    acc[B - 1] += weights[t] * load(p + last);
  }
}

// The nine taps of a 3x3 kernel where the taps of a kernel row lie `step` apart, as the results do: each input is
// loaded once for the up to three results that share it.
template <typename A, int B>
DK_INLINE void accumulate_sliding(const A* const (&inputs)[9], const Vec<A> (&weights)[9], int64_t offset, int64_t step,
                                  Vec<A> (&acc)[B]) {
  for (int b = 0; b < B; ++b) acc[b] = Vec<A>{};
#pragma GCC unroll 3
  for (int u = 0; u < 3; ++u) {
    const A* p = inputs[3 * u] + offset;
#pragma GCC unroll 8
    for (int c = 0; c < B + 2; ++c) {
      const Vec<A> input = load(p + c * step);
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v)
        if (c - v >= 0 && c - v < B) acc[c - v] += weights[3 * u + v] * input;
    }
  }
}

// The same for two neighbouring vectors of channels, one cache line of floats with AVX2; too many weights for the
// registers come from the stack.
template <typename A, int B>
DK_INLINE void accumulate_sliding(const A* const (&inputs)[9], const Vec<A> (&weights)[2][9], int64_t offset,
                                  int64_t step, Vec<A> (&acc)[2][B]) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[h][b] = Vec<A>{};
#pragma GCC unroll 3
  for (int u = 0; u < 3; ++u) {
    const A* p = inputs[3 * u] + offset;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
      for (int c = 0; c < B + 2; ++c) {
        const Vec<A> input = load(p + c * step + h * kLanes<A>);
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v)
          if (c - v >= 0 && c - v < B) acc[h][c - v] += weights[h][3 * u + v] * input;
      }
  }
}

// Nine taps anywhere, two vectors of channels.
template <typename A, int B>
DK_INLINE void accumulate(const A* const (&inputs)[9], const Vec<A> (&weights)[2][9], int64_t offset, int64_t step,
                          Vec<A> (&acc)[2][B]) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[h][b] = Vec<A>{};
#pragma GCC unroll 16
  for (int t = 0; t < 9; ++t) {
    const A* p = inputs[t] + offset;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) {
      acc[0][b] += weights[0][t] * load(p + b * step);
      acc[1][b] += weights[1][t] * load(p + b * step + kLanes<A>);
    }
  }
}

// sums[t][lane] += sum over k of grad[k*grad_step] * inputs[t][k*in_step]
template <typename A, int N>
DK_INLINE void dot_products(const A* const* inputs, const A* grad, int64_t count, int64_t in_step, int64_t grad_step,
                            A* const* sums) {
  Vec<A> sum[N];
  const A* input[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) sum[t] = load(sums[t]), input[t] = inputs[t];
  for (int64_t k = 0; k < count; ++k) {
    const Vec<A> g = load(grad + k * grad_step);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sum[t] += g * load(input[t] + k * in_step);
  }
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) store(sums[t], sum[t]);
}
constexpr int kMostDots = 9;
constexpr int64_t kColumnTile = 32;
constexpr int64_t kRowsAhead = 7;
// Up to this much of conv(x) is kept between two passes over a group: it should stay in a core's share of the caches.
constexpr int64_t kKeptBytes = 2 << 20;

// X: a vector or a scalar.
template <typename X>
DK_INLINE X activated(X z, Activation activation) {
  const X zero = {};
  if (activation == Activation::kNone) return z;
  z = z < zero ? zero : z;
  if (activation == Activation::kRelu6) z = z > zero + 6 ? zero + 6 : z;
  return z;
}

// The gradient through the activation at z; a choice, not a product, so that an infinite gradient is dropped too.
template <typename X>
DK_INLINE X masked(X grad, X z, Activation activation) {
  const X zero = {};
  if (activation == Activation::kNone) return grad;
  grad = z <= zero ? zero : grad;
  if (activation == Activation::kRelu6) grad = z >= zero + 6 ? zero : grad;
  return grad;
}

// Normalisation and affine map of channel c as one multiply-add. Returns 1 / the standard deviation.
template <typename A>
DK_INLINE A fold_norm(const BatchNorm<A>& norm, int64_t c, A mean, A var, A* scale, A* shift) {
  const A inv = A(1) / __builtin_sqrt(var + A(norm.eps));
  *scale = norm.gamma ? norm.gamma[c] * inv : inv;
  *shift = (norm.beta ? norm.beta[c] : A(0)) - mean * *scale;
  return inv;
}

// Chan, Golub and LeVeque's update: (n values with this mean and m2, the sum of squared deviations) joins (seen values
// with mean and m2). X, deduced from the last two: double or a vector of them.
template <typename X>
struct Given {
  using type = X;
};
template <typename X>
DK_INLINE void join_moments(double seen, double n, typename Given<X>::type add_mean, typename Given<X>::type add_m2,
                            X& mean, X& m2) {
  const X delta = add_mean - mean;
  const double total = seen + n;
  mean += delta * (n / total);
  m2 += add_m2 + delta * delta * (seen * n / total);
}
// The same for n values whose deviations from `centre`, itself rounded, sum up to `rest` and their squares to
// `squares`.
template <typename X>
DK_INLINE void join_deviations(double seen, double n, typename Given<X>::type centre, typename Given<X>::type rest,
                               typename Given<X>::type squares, X& mean, X& m2) {
  const X zero = {}, add_m2 = squares - rest * rest / n;
  join_moments(seen, n, centre + rest / n, add_m2 < zero ? zero : add_m2, mean, m2);
}

}  // namespace
}  // namespace deeplab_kernels::cpu
