// Gaussian filter of a feature image, cut off outside a window around each pixel, on the CPU, for float and double:
//
//     out[y, x] = sum over |dy| <= radius_v, |dx| <= radius_h of
//                 exp(-|f[y, x] - f[y + dy, x + dx]|^2 / 2) v[y + dy, x + dx]
//
// Pixels outside the image are absent. Vectors of neighbouring columns; every output is summed by one thread, in the
// order of the window.
#pragma once

#include "../../core/gaussian_filter.h"
#include "../parallel.h"

namespace deeplab_kernels::cpu {

struct WindowShape {
  int64_t batch, channels, height, width;
  int64_t dimensions;  // 1 ... kMaxFeatureDimensions
  int64_t radius_v, radius_h;
};

// values, out (B, C, H, W); features (B, d, H, W). A NaN or infinity in an image's features makes its outputs NaN.
template <typename T>
void local_gaussian_filter(const WindowShape& shape, const T* values, const T* features, T* out,
                           const Parallel& parallel);

// grad_values and grad_features may each be null.
template <typename T>
void local_gaussian_filter_backward(const WindowShape& shape, const T* grad_out, const T* values, const T* features,
                                    T* grad_values, T* grad_features, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
