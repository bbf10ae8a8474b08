// Vectors of the instruction set that the including file is compiled for, through the compiler's vector extensions.
// For the per-instruction-set files only: everything here has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "precision.h"

namespace deeplab_kernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

template <typename E, int kCount>
struct VectorOf {
  typedef E type __attribute__((vector_size(kCount * sizeof(E))));
  typedef E unaligned __attribute__((vector_size(kCount * sizeof(E)), aligned(alignof(E)), may_alias));
};
template <typename A>
using Vec = typename VectorOf<A, kLanes<A>>::type;

#define DK_INLINE inline __attribute__((always_inline))

DK_INLINE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DK_INLINE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
DK_INLINE int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }
DK_INLINE int64_t greatest_common_divisor(int64_t a, int64_t b) {
  while (b != 0) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return a;
}

template <typename A>
DK_INLINE Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A, kLanes<A>>::unaligned*>(p);
}

DK_INLINE Vec<float> load(const BFloat16Bits* p) {
  constexpr int n = kLanes<float>;
  using Narrow = VectorOf<uint16_t, n>;
  using Wide = typename VectorOf<uint32_t, n>::type;
  const auto bits = __builtin_convertvector(*reinterpret_cast<const typename Narrow::unaligned*>(p), Wide) << 16;
  return reinterpret_cast<Vec<float>>(bits);
}

template <typename A>
DK_INLINE void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorOf<A, kLanes<A>>::unaligned*>(p) = v;
}

// To the nearest bfloat16, ties to even; NaN stays NaN.
DK_INLINE auto rounded_to_bfloat16(Vec<float> v) {
  constexpr int n = kLanes<float>;
  using Wide = typename VectorOf<uint32_t, n>::type;
  const Wide bits = reinterpret_cast<Wide>(v);
  const Wide rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Wide quiet = (v != v) ? Wide{} + 0x7fc0 : rounded;
  return __builtin_convertvector(quiet, typename VectorOf<uint16_t, n>::type);
}
DK_INLINE void store(BFloat16Bits* p, Vec<float> v) {
  *reinterpret_cast<typename VectorOf<uint16_t, kLanes<float>>::unaligned*>(p) = rounded_to_bfloat16(v);
}

// Past the caches where the CPU can, to an address aligned to what is written; finish_streams() before others read it.
template <typename T>
DK_INLINE void stream(T* p, Vec<acc_t<T>> v) {
  store(p, v);
}
DK_INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
#if defined(__AVX512F__)
DK_INLINE void stream(float* p, Vec<float> v) { _mm512_stream_ps(p, reinterpret_cast<__m512>(v)); }
DK_INLINE void stream(BFloat16Bits* p, Vec<float> v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(rounded_to_bfloat16(v)));
}
#elif defined(__AVX2__)
DK_INLINE void stream(float* p, Vec<float> v) { _mm256_stream_ps(p, reinterpret_cast<__m256>(v)); }
DK_INLINE void stream(BFloat16Bits* p, Vec<float> v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), reinterpret_cast<__m128i>(rounded_to_bfloat16(v)));
}
#endif

template <typename A>
DK_INLINE A widen(A value) {
  return value;
}
DK_INLINE float widen(BFloat16Bits value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

DK_INLINE void narrow(float value, float* p) { *p = value; }
DK_INLINE void narrow(double value, double* p) { *p = value; }
DK_INLINE void narrow(float value, BFloat16Bits* p) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  p->bits = value != value ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

template <typename A>
DK_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};  // x - 0 is x, also for -0
}

// Every second element of a and then of b, from element kFirst on.
template <int kFirst, typename V, int... kIndex>
DK_INLINE V every_second(V a, V b, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(a, b, (2 * kIndex + kFirst)...);
}
template <int kFirst, typename V>
DK_INLINE V every_second(V a, V b) {
  return every_second<kFirst>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

// The elements of one half of a and of b by turns.
template <int kHalf, typename V, int... kIndex>
DK_INLINE V interleaved(V a, V b, std::integer_sequence<int, kIndex...>) {
  constexpr int n = int(sizeof...(kIndex));
  return __builtin_shufflevector(a, b, (kIndex / 2 + kHalf * n / 2 + kIndex % 2 * n)...);
}
template <int kHalf, typename V>
DK_INLINE V interleaved(V a, V b) {
  return interleaved<kHalf>(a, b, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

// Each element of one half of v twice.
template <int kHalf, typename V, int... kIndex>
DK_INLINE V doubled(V v, std::integer_sequence<int, kIndex...>) {
  return __builtin_shufflevector(v, v, (kIndex / 2 + kHalf * int(sizeof...(kIndex)) / 2)...);
}
template <int kHalf, typename V>
DK_INLINE V doubled(V v) {
  return doubled<kHalf>(v, std::make_integer_sequence<int, sizeof(V) / sizeof(v[0])>());
}

// The first n lanes, n < kLanes.
template <typename T, typename V>
DK_INLINE void store_part(T* p, V v, int64_t n) {
  decltype(widen(*p)) values[sizeof(V) / sizeof(v[0])];
  store(values, v);
  for (int64_t l = 0; l < n; ++l) narrow(values[l], p + l);
}
#if defined(__AVX512F__)
DK_INLINE void store_part(float* p, Vec<float> v, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1 << n) - 1), reinterpret_cast<__m512>(v));
}
DK_INLINE void store_part(double* p, Vec<double> v, int64_t n) {
  _mm512_mask_storeu_pd(p, __mmask8((1 << n) - 1), reinterpret_cast<__m512d>(v));
}
#elif defined(__AVX2__)
alignas(64) constexpr int64_t kMasks[8] = {-1, -1, -1, -1, 0, 0, 0, 0};
DK_INLINE void store_part(float* p, Vec<float> v, int64_t n) {
  const __m256i mask =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(reinterpret_cast<const int32_t*>(kMasks) + 8 - n));
  _mm256_maskstore_ps(p, mask, reinterpret_cast<__m256>(v));
}
DK_INLINE void store_part(double* p, Vec<double> v, int64_t n) {
  _mm256_maskstore_pd(p, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMasks + 4 - n)),
                      reinterpret_cast<__m256d>(v));
}
#endif

// The first n lanes, the others zero.
template <typename T>
DK_INLINE auto load_part(const T* p, int64_t n) {
  using A = decltype(widen(*p));
  Vec<A> v = {};
  for (int64_t l = 0; l < n; ++l) v[l] = widen(p[l]);
  return v;
}

template <typename A>
DK_INLINE A sum_of_lanes(Vec<A> v) {
  A sum = 0;
  for (int l = 0; l < kLanes<A>; ++l) sum += v[l];
  return sum;
}

// As many doubles as a vector has lanes.
template <typename A>
using Doubles = typename VectorOf<double, kLanes<A>>::type;

template <typename A>
DK_INLINE Doubles<A> in_double(Vec<A> v) {
  return __builtin_convertvector(v, Doubles<A>);
}
template <typename A>
DK_INLINE Doubles<A> load_doubles(const double* p) {
  return *reinterpret_cast<const typename VectorOf<double, kLanes<A>>::unaligned*>(p);
}
template <typename A>
DK_INLINE void store_doubles(double* p, Doubles<A> v) {
  *reinterpret_cast<typename VectorOf<double, kLanes<A>>::unaligned*>(p) = v;
}

// dst[k] = src[k] for k < n, widened.
template <typename T, typename A>
DK_INLINE void copy_widened(const T* src, A* dst, int64_t n) {
  constexpr int64_t L = kLanes<A>;
  int64_t k = 0;
  for (; k + L <= n; k += L) store(dst + k, load(src + k));
  if (k == n) return;
  if (n >= L) {
    store(dst + n - L, load(src + n - L));
  } else {
    for (; k < n; ++k) dst[k] = widen(src[k]);
  }
}

}  // namespace
}  // namespace deeplab_kernels::cpu
