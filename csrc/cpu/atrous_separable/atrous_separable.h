// Atrous separable convolution as one operator on the CPU (inference): depthwise convolution, normalisation and
// activation, then the pointwise product with its normalisation, residual and activation.
//
//   y   = depthwise_act(depthwise_norm(conv(pre_act(x), depthwise_weight)))
//   out = pointwise_act(pointwise_norm(pointwise_weight y) + residual)
//
// y is never written as a whole: a tile of its pixels, all channels, is made in a core's second level cache and
// multiplied there.
#pragma once

#include "../../core/atrous_depthwise.h"
#include "../parallel.h"

namespace deeplab_kernels::cpu {

// z = gamma (y - mean) / sqrt(var + eps) + beta, then the activation. Null: gamma 1, beta 0, mean 0, and without var no
// division.
template <typename T>
struct ChannelNorm {
  const T* gamma;
  const T* beta;
  const T* mean;
  const T* var;
  double eps;
  Activation activation;
};

// Dense in the layout that shape.channels_last names; null where absent.
template <typename T>
struct SeparableTensors {
  const T* x;
  const T* depthwise_weight;  // (channels, kernel_h, kernel_w); null: the pointwise half alone, kernel 1 x 1
  const T* pointwise_weight;  // (out_channels, channels)
  const T* residual;          // as out
  T* out;                     // (batch, out_channels, out_h, out_w)
};

// T: float or double. shape is that of the depthwise half, its multiplier 1.
template <typename T>
void atrous_separable_conv2d(const DepthwiseShape& shape, int64_t out_channels, const SeparableTensors<T>& tensors,
                             Activation pre_activation, const ChannelNorm<T>& depthwise_norm,
                             const ChannelNorm<T>& pointwise_norm, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
