// Columns of NHWC images, pixel by pixel: which taps serve which, products of a kernel row, writing past the caches.
// For the per-instruction-set files only: everything here has internal linkage.
#pragma once

#include "../last_level_cache.h"
#include "../microkernels.h"

namespace deeplab_kernels::cpu {
namespace {

template <int kNumber>
struct Number {
  static constexpr int kValue = kNumber;
};

// acc[b] += the kTaps taps of a kernel row of result b, which lie `tap` apart from p + b * result on. kShared: results
// read the same pixels that many taps later, and each is loaded once; 0: they do not.
template <int kTaps, int kShared, typename T, typename V, int kWeights, int B>
DK_INLINE void add_taps(const T* p, int64_t tap, int64_t result, const V (&weights)[kWeights], V (&acc)[B]) {
  if constexpr (kShared > 0) {
#pragma GCC unroll 16
    for (int column = 0; column < (B - 1) * kShared + kTaps; ++column) {
      const V input = load(p + column * tap);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        if (column >= b * kShared && column < b * kShared + kTaps) acc[b] += weights[column - b * kShared] * input;
    }
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 3
      for (int v = 0; v < kTaps; ++v) acc[b] += weights[v] * load(p + b * result + v * tap);
  }
}

// Columns of results whose taps [first, first + taps) of each kernel row lie inside the image.
struct ColumnSegment {
  IndexRange columns;
  int first, taps;
};

// Cuts the columns [0, count), of which tap v of a kernel row serves inside[v], into segments. Returns their number.
DK_INLINE int cut_columns(const IndexRange (&inside)[3], int64_t count, ColumnSegment (&segments)[7]) {
  int64_t cuts[8] = {0, count};
  for (int v = 0; v < 3; ++v)
    cuts[2 + 2 * v] = inside[v].begin, cuts[3 + 2 * v] = larger(inside[v].begin, inside[v].end);
  for (int a = 1; a < 8; ++a)
    for (int b = a; b > 0 && cuts[b - 1] > cuts[b]; --b) {
      const int64_t greater = cuts[b - 1];
      cuts[b - 1] = cuts[b], cuts[b] = greater;
    }
  int n = 0;
  for (int k = 0; k < 7; ++k) {
    if (cuts[k] == cuts[k + 1]) continue;
    ColumnSegment segment{{cuts[k], cuts[k + 1]}, 0, 0};
    for (int v = 2; v >= 0; --v)
      if (inside[v].begin <= cuts[k] && cuts[k] < inside[v].end) segment.first = v, ++segment.taps;
    segments[n++] = segment;
  }
  return n;
}

// Whether x and the output together exceed the last-level cache.
template <typename T>
DK_INLINE bool exceeds_last_level_cache(const DepthwiseShape& s) {
  return s.batch * s.channels * int64_t(sizeof(T)) * (s.in_h * s.in_w + s.out_h * s.out_w) > last_level_cache_bytes();
}

// Whether to write pixels past the caches: these are exceeded, and pixels are whole vectors.
template <typename T>
DK_INLINE bool streams(const T* to, const DepthwiseShape& s) {
  constexpr int64_t kVector = kLanes<acc_t<T>> * int64_t(sizeof(T));
  return reinterpret_cast<uintptr_t>(to) % kVector == 0 && s.channels * int64_t(sizeof(T)) % kVector == 0 &&
         exceeds_last_level_cache<T>(s);
}

// `count` vectors, value(k) for each, past the caches; not the parts of cache lines at the ends, which memory would
// have to take by parts.
template <typename T, typename F>
DK_INLINE void stream_vectors(T* to, int64_t count, const F& value) {
  constexpr int64_t L = kLanes<acc_t<T>>, kOfLine = larger(1, 64 / (L * int64_t(sizeof(T))));
  int64_t k = 0;
  for (; k < count && reinterpret_cast<uintptr_t>(to + k * L) % 64 != 0; ++k) store(to + k * L, value(k));
  for (; k + kOfLine <= count; k += kOfLine)
#pragma GCC unroll 4
    for (int64_t n = k; n < k + kOfLine; ++n) stream(to + n * L, value(n));
  for (; k < count; ++k) store(to + k * L, value(k));
}

}  // namespace
}  // namespace deeplab_kernels::cpu
