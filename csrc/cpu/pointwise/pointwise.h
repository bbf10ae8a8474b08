// The 1 x 1 convolution and its gradients on the CPU, as matrix products of the maps as they lie.
//
//   out = weight x,   grad_x = weight^T grad_out,   grad_weight = sum over images and pixels of grad_out x^T
//
// Passes over memory of a separable block in training: x -> y (depthwise half) -> z (this product) -> out (norm,
// residual, activation), with depthwise planes that fit the caches. Each read or write of a whole map counts once.
//
//   forward   read x, y, z, residual, write y, z, out. The floor is the same: y and z are kept for backward, and their
//             statistics must be known before the first of y, or of out, can be made. (Without the statistics of z
//             gathered here one more read of z, in NHWC; in NCHW its channels stay in the caches between two reads.)
//   backward  read grad_out and z twice, grad_z twice, y, grad_y, x, write grad_z, grad_y, grad_x. The floor is three
//             fewer, the passes over grad_z: both products would have to make it, tile by tile, at the same time.
#pragma once

#include <cstdint>

#include "../parallel.h"

namespace deeplab_kernels::cpu {

struct PointwiseShape {
  int64_t batch, channels, out_channels, pixels;
  bool channels_last;
};

// T: float or double. Maps are dense, in the layout that the shape names; weight is (out_channels, channels). The
// results do not depend on the number of threads.

// mean and var, (out_channels), or both null: of out in NHWC, the biased variance, gathered as out is computed. (In
// NCHW batch normalisation has a channel at a time in the caches, and reads it from there the second time.)
template <typename T>
void pointwise_conv2d(const PointwiseShape& shape, const T* x, const T* weight, T* out, T* mean, T* var,
                      const Parallel& parallel);
template <typename T>
void pointwise_grad_x(const PointwiseShape& shape, const T* grad_out, const T* weight, T* grad_x,
                      const Parallel& parallel);
template <typename T>
void pointwise_grad_weight(const PointwiseShape& shape, const T* grad_out, const T* x, T* grad_weight,
                           const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
