// Helpers of the bindings: what the kernels see of a tensor, and the parameter struct they take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "../core/atrous_depthwise.h"

namespace deeplab_kernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// True when x, read in (N, H, W, C) order, is dense.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() != 4) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
  }
  return true;
}

// x itself when its layout is one the kernels read, otherwise a contiguous copy. A tensor that is both counts as
// contiguous (see ops/_layout.py, which the fake kernels follow).
inline Tensor dense(const Tensor& x) {
  return x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
}

inline Tensor with_layout(const Tensor& x, bool channels_last) {
  if (channels_last ? is_channels_last(x) : x.is_contiguous()) return x;
  return torch::stable::contiguous(x, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline Tensor empty_nchw(std::vector<int64_t> size, const Tensor& like, bool channels_last) {
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

inline ScalarType accumulation_type(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline Tensor empty_vector(int64_t size, const Tensor& like, ScalarType dtype) {
  return torch::stable::empty({size}, dtype, std::nullopt, like.device());
}

// Geometry of one call; x must already be dense. The Python layer has validated user input and raised readable errors;
// the checks here only keep a direct call of the raw operator from reading out of bounds.
inline DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x and weight must have 4 dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "stride and dilation take 2 values, padding 4 (top, bottom, left, right)");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x and weight must have the same dtype");
  DepthwiseShape shape;
  shape.batch = x.size(0);
  shape.channels = x.size(1);
  shape.in_h = x.size(2);
  shape.in_w = x.size(3);
  shape.multiplier = shape.channels == 0 ? 0 : weight.size(0) / shape.channels;
  shape.kernel_h = weight.size(2);
  shape.kernel_w = weight.size(3);
  shape.stride_h = stride[0];
  shape.stride_w = stride[1];
  shape.pad_top = padding[0];
  shape.pad_left = padding[2];
  shape.rate_h = dilation[0];
  shape.rate_w = dilation[1];
  STD_TORCH_CHECK(weight.size(1) == 1 && shape.multiplier * shape.channels == weight.size(0),
                  "weight must have shape (channels * multiplier, 1, kh, kw)");
  STD_TORCH_CHECK(stride[0] > 0 && stride[1] > 0 && dilation[0] > 0 && dilation[1] > 0,
                  "stride and dilation must be positive");
  STD_TORCH_CHECK(shape.kernel_h > 0 && shape.kernel_w > 0, "the kernel must not be empty");
  STD_TORCH_CHECK(padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
                  "padding must not be negative");
  const int64_t free_h = shape.in_h + padding[0] + padding[1] - (shape.rate_h * (shape.kernel_h - 1) + 1);
  const int64_t free_w = shape.in_w + padding[2] + padding[3] - (shape.rate_w * (shape.kernel_w - 1) + 1);
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "the dilated kernel is larger than the padded input");
  shape.out_h = free_h / shape.stride_h + 1;
  shape.out_w = free_w / shape.stride_w + 1;
  shape.channels_last = !x.is_contiguous();
  return shape;
}

inline std::vector<int64_t> output_size(const DepthwiseShape& shape) {
  return {shape.batch, shape.out_channels(), shape.out_h, shape.out_w};
}

inline void check_vector(const Tensor& v, const char* name, const DepthwiseShape& shape, ScalarType dtype) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == shape.out_channels() && v.is_contiguous(), name,
                  " must be a contiguous vector with one value per output channel");
  STD_TORCH_CHECK(v.scalar_type() == dtype, name, " must have the accumulation dtype (float32; float64 for float64 x)");
}

inline void check_grad(const Tensor& grad, const DepthwiseShape& shape, const Tensor& x) {
  const std::vector<int64_t> size = output_size(shape);
  STD_TORCH_CHECK(grad.dim() == 4 && grad.scalar_type() == x.scalar_type(),
                  "grad_out must have 4 dimensions and the dtype of x");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(grad.size(d) == size[d], "grad_out must have the shape of the output");
}

}  // namespace deeplab_kernels
