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

// x itself when it is dense in the wanted layout (DepthwiseShape::channels_last), otherwise a copy. A tensor dense in
// both counts as contiguous, and one dense in neither is copied to contiguous (_layout.py, which the fake kernels
// follow).
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

// Bounds under which no index computed in 64 bits overflows.
constexpr int64_t kLargestParameter =
    (int64_t{1} << 31) - 1;  // kernel, stride, rate, padding; ops/_validation.py has it too
constexpr int64_t kLargestImageSide = int64_t{1} << 40;

// Geometry of one call. The Python layer has validated user input and raised readable errors; the checks here only keep
// a direct call of the raw operator from reading out of bounds. Nothing is copied before they have passed.
inline DepthwiseShape depthwise_shape(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                                      const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, "x and weight must have 4 dimensions");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2,
                  "stride and dilation take 2 values, padding 4 (top, bottom, left, right)");
  STD_TORCH_CHECK(x.scalar_type() == weight.scalar_type(), "x and weight must have the same dtype");
  STD_TORCH_CHECK(x.device() == weight.device(), "x and weight must be on the same device");
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
  STD_TORCH_CHECK(weight.size(1) == 1 && shape.multiplier * shape.channels == weight.size(0) &&
                      (shape.multiplier > 0 || shape.channels == 0),
                  "weight must have shape (channels * multiplier, 1, kh, kw)");
  STD_TORCH_CHECK(
      shape.in_h > 0 && shape.in_w > 0 && shape.in_h <= kLargestImageSide && shape.in_w <= kLargestImageSide,
      "the height and width of x must be positive and at most 2^40");
  for (int64_t value : {shape.kernel_h, shape.kernel_w, stride[0], stride[1], dilation[0], dilation[1]})
    STD_TORCH_CHECK(value > 0 && value <= kLargestParameter,
                    "kernel, stride and dilation must be positive and below 2^31");
  for (int64_t value : padding)
    STD_TORCH_CHECK(value >= 0 && value <= kLargestParameter, "padding must be in [0, 2^31)");
  const int64_t free_h = shape.in_h + padding[0] + padding[1] - (shape.rate_h * (shape.kernel_h - 1) + 1);
  const int64_t free_w = shape.in_w + padding[2] + padding[3] - (shape.rate_w * (shape.kernel_w - 1) + 1);
  STD_TORCH_CHECK(free_h >= 0 && free_w >= 0, "the dilated kernel is larger than the padded input");
  shape.out_h = free_h / shape.stride_h + 1;
  shape.out_w = free_w / shape.stride_w + 1;
  // A step that is never taken must not size a kernel's scratch memory.
  if (shape.out_h == 1) shape.stride_h = 1;
  if (shape.out_w == 1) shape.stride_w = 1;
  if (shape.kernel_h == 1) shape.rate_h = 1;
  if (shape.kernel_w == 1) shape.rate_w = 1;
  shape.channels_last = !x.is_contiguous() && is_channels_last(x);
  return shape;
}

inline std::vector<int64_t> output_size(const DepthwiseShape& shape) {
  return {shape.batch, shape.out_channels(), shape.out_h, shape.out_w};
}

inline void check_vector(const Tensor& v, const char* name, int64_t channels, const Tensor& x) {
  STD_TORCH_CHECK(v.dim() == 1 && v.size(0) == channels && v.is_contiguous(), name,
                  " must be a contiguous vector with one value per output channel");
  STD_TORCH_CHECK(v.scalar_type() == accumulation_type(x.scalar_type()), name,
                  " must have the accumulation dtype (float32; float64 for float64 x)");
  STD_TORCH_CHECK(v.device() == x.device(), name, " must be on the device of x");
}

inline void check_vector(const Tensor& v, const char* name, const DepthwiseShape& shape, const Tensor& x) {
  check_vector(v, name, shape.out_channels(), x);
}

// grad_out, or the convolution's output kept by the forward pass.
inline void check_like_output(const Tensor& t, const char* name, const DepthwiseShape& shape, const Tensor& x) {
  const std::vector<int64_t> size = output_size(shape);
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == x.scalar_type(), name,
                  " must have 4 dimensions and the dtype of x");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == size[d], name, " must have the shape of the convolution's output");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
}

// y was kept, or is the empty tensor of shape (0,) that stands for "recompute it".
inline bool was_kept(const Tensor& y, const DepthwiseShape& shape, const Tensor& x) {
  if (y.dim() == 1 && y.size(0) == 0) return false;
  check_like_output(y, "y", shape, x);
  return true;
}

}  // namespace deeplab_kernels
