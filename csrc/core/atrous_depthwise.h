// Tap geometry and activation of the atrous depthwise convolution: the one definition that the CPU, CUDA and emulated
// kernels share.
//
//   y[n, c*m + q, i, j] = sum_{u,v} x[n, c, s_h*i + r_h*u - p_top, s_w*j + r_w*v - p_left] * w[c*m + q, u, v]
//
// with x read as zero outside the image (DeepLab v3, arXiv:1706.05587, eq. 1, one filter per channel).
#pragma once

#include "macros.h"

namespace deeplab_kernels {

enum class Activation : int { kNone = 0, kRelu = 1, kRelu6 = 2 };

// Plain data: everything a kernel needs to know besides pointers. Sizes in elements; 64-bit so that tensors of more
// than 2^31 elements index correctly.
struct DepthwiseShape {
  int64_t batch;
  int64_t channels;    // of x
  int64_t multiplier;  // channels of y = channels * multiplier
  int64_t in_h, in_w;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t pad_top, pad_left;
  int64_t rate_h, rate_w;
  bool channels_last;  // memory layout of both x and y: NHWC if true, NCHW if false

  DK_HOST_DEVICE int64_t out_channels() const { return channels * multiplier; }
  DK_HOST_DEVICE int64_t taps() const { return kernel_h * kernel_w; }
};

// Half-open range of output indices.
struct IndexRange {
  int64_t begin, end;
};

// Input coordinate read by output `out` through tap `tap`; outside [0, in) means padding.
DK_HOST_DEVICE int64_t tap_input(int64_t out, int64_t tap, int64_t stride, int64_t rate, int64_t pad) {
  return out * stride + tap * rate - pad;
}

// The outputs i in [0, out) whose tap `tap` lies inside the image, i.e. 0 <= tap_input(i) < in. Empty if begin >= end.
DK_HOST_DEVICE IndexRange tap_outputs(int64_t tap, int64_t stride, int64_t rate, int64_t pad, int64_t in, int64_t out) {
  const int64_t offset = tap * rate - pad;  // input = i*stride + offset
  const int64_t begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  const int64_t last = in - 1 - offset;  // largest allowed i*stride
  const int64_t end = last < 0 ? 0 : last / stride + 1;
  return {begin < out ? begin : out, end < out ? end : out};
}

// The output that reads input `in_index` through tap `tap`, or -1 if there is none (the transposed convolution's
// gather).
DK_HOST_DEVICE int64_t tap_output(int64_t in_index, int64_t tap, int64_t stride, int64_t rate, int64_t pad,
                                  int64_t out) {
  const int64_t shifted = in_index + pad - tap * rate;
  if (shifted < 0 || shifted % stride != 0) return -1;
  const int64_t index = shifted / stride;
  return index < out ? index : -1;
}

// Written so that NaN propagates, as torch.relu and torch.nn.functional.relu6 do.
template <typename T>
DK_HOST_DEVICE T activate(T z, Activation activation) {
  if (activation == Activation::kNone) return z;
  z = z < T(0) ? T(0) : z;
  if (activation == Activation::kRelu6) z = z > T(6) ? T(6) : z;
  return z;
}

// Derivative of `activate` at pre-activation z; zero at the kinks, as torch's relu and hardtanh backward have it.
template <typename T>
DK_HOST_DEVICE T activation_slope(T z, Activation activation) {
  if (activation == Activation::kNone) return T(1);
  if (z <= T(0)) return T(0);
  return activation == Activation::kRelu6 && z >= T(6) ? T(0) : T(1);
}

}  // namespace deeplab_kernels
