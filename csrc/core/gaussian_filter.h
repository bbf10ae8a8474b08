// The Gaussian filter's kernel exp(-|f_i - f_j|^2 / 2), and which pairs of points it may leave out.
#pragma once

#include "macros.h"

namespace deeplab_kernels {

constexpr int64_t kMaxFeatureDimensions = 16;

// Pairs at a squared distance above the cutoff have a kernel below 2^-24 / N (2^-53 / N in double) and may be left out:
// an output then lacks less than 2^-24 (2^-53) times the mean of its channel's |v|. A thousandth is added for the
// rounding of distances. log2_points = log2(N).
template <typename A>
DK_HOST_DEVICE A cutoff_square(A log2_points) {
  const A bits = (sizeof(A) == sizeof(double) ? A(53) : A(24)) + log2_points;
  return A(1.001) * A(1.3862943611198906) * bits;  // 2 ln(2) bits
}

// Squared distance of the intervals [low, high] and [other_low, other_high] of one coordinate.
template <typename A>
DK_HOST_DEVICE A gap_square(A low, A high, A other_low, A other_high) {
  const A above = other_low - high, below = low - other_high;
  const A gap = above > below ? above : below;
  return gap > 0 ? gap * gap : A(0);
}

// Neighbours within `radius` on an axis of `size` pixels, out of the image ones left out.
DK_HOST_DEVICE int64_t clamped_radius(int64_t radius, int64_t size) {
  return size <= 1 ? 0 : radius < size - 1 ? radius : size - 1;
}

}  // namespace deeplab_kernels
