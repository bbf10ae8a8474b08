// The 1 x 1 convolution and its gradients on the CPU, as matrix products of the maps as they lie.
//
//   out = weight x,   grad_x = weight^T grad_out,   grad_weight = sum over images and pixels of grad_out x^T
#pragma once

#include <cstdint>

#include "parallel.h"

namespace deeplab_kernels::cpu {

struct PointwiseShape {
  int64_t batch, channels, out_channels, pixels;
  bool channels_last;
};

// T: float or double. Maps are dense, in the layout that the shape names; weight is (out_channels, channels). The
// results do not depend on the number of threads.
template <typename T>
void pointwise_conv2d(const PointwiseShape& shape, const T* x, const T* weight, T* out, const Parallel& parallel);
template <typename T>
void pointwise_grad_x(const PointwiseShape& shape, const T* grad_out, const T* weight, T* grad_x,
                      const Parallel& parallel);
template <typename T>
void pointwise_grad_weight(const PointwiseShape& shape, const T* grad_out, const T* x, T* grad_weight,
                           const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
