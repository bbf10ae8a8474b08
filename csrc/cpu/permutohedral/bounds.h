// The range of the features that a lattice is built of. Internal.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "permutohedral.h"

namespace deeplab_kernels::cpu {

// Positions below this embed into int32 coordinates.
constexpr double kLargestPosition = 1 << 26;

// lattice_scale of each axis. The factor common to all axes is rounded first, as in pydensecrf. Whether a vertex exists
// may hang on the last bit of a position, and so may a label: in float the order of operations is pydensecrf's, without
// fused multiply-adds (embed_kernels.cpp).
struct Scales {
  double value[kMaxLatticeDimension];
  explicit Scales(int d) {
    for (int i = 0; i < d; ++i) value[i] = lattice_scale(d, 1.0 / std::sqrt(double(i + 1) * double(i + 2)));
  }
  void round_to_float(int d) {
    const float common = float(std::sqrt(2.0 / 3.0) * (d + 1));
    for (int i = 0; i < d; ++i) value[i] = float(double(common) / std::sqrt(double(i + 1) * double(i + 2)));
  }
};

struct Bounds {
  double low[kMaxLatticeDimension], high[kMaxLatticeDimension];
};

// Extends [low, high] by `count` values; NaN or an infinity makes it infinite for good.
template <typename T>
void add_bounds(const T* in, int64_t stride, int64_t count, double* low, double* high) {
  constexpr int64_t kLanes = 8;
  T least[kLanes], most[kLanes], wrong[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) least[l] = most[l] = in[0], wrong[l] = T(0);
  const auto add = [&](int64_t l, T value) {
    least[l] = value < least[l] ? value : least[l];
    most[l] = value > most[l] ? value : most[l];
    wrong[l] += value - value;  // NaN for NaN and infinities
  };
  int64_t p = 0;
  if (stride == 1)
    for (; p + kLanes <= count; p += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) add(l, in[p + l]);
  for (; p < count; ++p) add(p % kLanes, in[p * stride]);
  for (int64_t l = 0; l < kLanes; ++l) {
    *low = std::min<double>(*low, least[l]);
    *high = std::max<double>(*high, most[l]);
  }
  for (int64_t l = 0; l < kLanes; ++l)
    if (wrong[l] != T(0))
      *low = -std::numeric_limits<double>::infinity(), *high = std::numeric_limits<double>::infinity();
}

// Smallest and largest feature of each axis; NaN or an infinity becomes infinite bounds.
template <typename T>
Bounds find_bounds(int64_t batch, int d, int64_t points, Strided<const T> features, const Parallel& parallel) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr int64_t kPiece = 8192;
  const int64_t pieces = (points + kPiece - 1) / kPiece;
  std::vector<Bounds> of_piece(size_t(batch * pieces));
  parallel(batch * pieces, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t image = piece / pieces, first = piece % pieces * kPiece;
      Bounds& bounds = of_piece[size_t(piece)];
      for (int i = 0; i < d; ++i) {
        bounds.low[i] = kInfinity, bounds.high[i] = -kInfinity;
        const T* in = features.data + image * features.batch_stride + i * features.channel_stride;
        add_bounds(in + first * features.point_stride, features.point_stride, std::min(kPiece, points - first),
                   &bounds.low[i], &bounds.high[i]);
      }
    }
  });
  Bounds all;
  for (int i = 0; i < d; ++i) {
    all.low[i] = kInfinity, all.high[i] = -kInfinity;
    for (const Bounds& b : of_piece) {
      all.low[i] = std::min(all.low[i], b.low[i]);
      all.high[i] = std::max(all.high[i], b.high[i]);
    }
  }
  return all;
}

template <typename T>
FeatureProblem find_problem(int64_t batch, int d, int64_t points, Strided<const T> features, const Bounds& bounds) {
  const Scales scales(d);
  bool good = true;
  for (int i = 0; i < d; ++i)
    good &= std::max(std::abs(bounds.low[i]), std::abs(bounds.high[i])) * scales.value[i] < kLargestPosition;
  if (good) return {};
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t p = 0; p < points; ++p)
      for (int i = 0; i < d; ++i) {
        const double value =
            features.data[b * features.batch_stride + i * features.channel_stride + p * features.point_stride];
        const double limit = kLargestPosition / scales.value[i];
        if (!std::isfinite(value)) return {FeatureProblem::kNotFinite, b, i, p, limit};
        if (!(std::abs(value) < limit)) return {FeatureProblem::kTooLarge, b, i, p, limit};
      }
  return {};
}

}  // namespace deeplab_kernels::cpu
