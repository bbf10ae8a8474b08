// Exact Gaussian filter of points with features, on the CPU, for float and double:
//
//     out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j        (j = i included)
//
// Points are sorted so that neighbours in memory are neighbours in feature space (gaussian_filter.cpp), packed, and
// taken in tiles of 2 vectors x 64 points; tiles too far apart to matter are skipped (core/gaussian_filter.h). Every
// output is summed by one thread in an order that depends on the points alone.
#pragma once

#include "../../core/gaussian_filter.h"
#include "../parallel.h"

namespace deeplab_kernels::cpu {

struct PointsShape {
  int64_t batch, channels, points;
  int64_t dimensions;  // 1 ... kMaxFeatureDimensions
};

// values, out (B, C, N); features (B, d, N). A NaN or infinity in an image's features makes its outputs NaN, one in a
// channel's values this channel's.
template <typename T>
void gaussian_filter(const PointsShape& shape, const T* values, const T* features, T* out, const Parallel& parallel);

// grad_values and grad_features may each be null.
template <typename T>
void gaussian_filter_backward(const PointsShape& shape, const T* grad_out, const T* values, const T* features,
                              T* grad_values, T* grad_features, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
