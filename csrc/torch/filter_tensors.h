// Helpers of the Gaussian filters' CPU bindings.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "../core/gaussian_filter.h"
#include "tensors.h"
#include "threads.h"

namespace deeplab_kernels {

// The Python layer has validated user input and raised readable errors; these keep a direct call of the raw operator
// from reading out of bounds. values (B, C, ...) and features (B, d, ...) with `axes` axes of points.
inline void check_filter_tensors(const Tensor& values, const Tensor& features, int64_t axes) {
  STD_TORCH_CHECK(values.dim() == 2 + axes && features.dim() == 2 + axes, "values and features must have ", 2 + axes,
                  " dimensions");
  for (int64_t k = 0; k < 2 + axes; ++k)
    STD_TORCH_CHECK(k == 1 || values.size(k) == features.size(k), "features must have the sizes of values but for C");
  STD_TORCH_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxFeatureDimensions,
                  "features must have 1 to 16 dimensions");
  STD_TORCH_CHECK(values.device() == features.device(), "features must be on the device of values");
}

inline void check_filter_gradient(const Tensor& grad, const Tensor& values) {
  STD_TORCH_CHECK(grad.dim() == values.dim(), "grad_out must have the shape of values");
  for (int64_t k = 0; k < values.dim(); ++k)
    STD_TORCH_CHECK(grad.size(k) == values.size(k), "grad_out must have the shape of values");
  STD_TORCH_CHECK(grad.device() == values.device(), "grad_out must be on the device of values");
}

// Contiguous and in `dtype`; t itself where it is so already.
inline Tensor dense_as(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}

// An uninitialised tensor of t's shape, or of shape (0,) where it is not wanted.
inline Tensor empty_as(const Tensor& t, ScalarType dtype, bool wanted) {
  std::vector<int64_t> size{0};
  if (wanted) {
    size.clear();
    for (int64_t k = 0; k < t.dim(); ++k) size.push_back(t.size(k));
  }
  return torch::stable::empty(size, dtype, std::nullopt, t.device());
}

template <typename F>
void dispatch_accumulation(ScalarType dtype, F&& f) {
  if (dtype == ScalarType::Double) return f(double());
  f(float());
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// filter(values, features, out) of contiguous data in the accumulation type.
template <typename F>
Tensor filtered(const Tensor& values_any, const Tensor& features_any, F&& filter) {
  const ScalarType acc = accumulation_type(values_any.scalar_type());
  const Tensor values = dense_as(values_any, acc), features = dense_as(features_any, acc);
  Tensor out = empty_as(values, acc, true);
  dispatch_accumulation(acc, [&](auto value) {
    using T = decltype(value);
    filter(data<T>(values), data<T>(features), mutable_data<T>(out));
  });
  return out;
}

// backward(grad_out, values, features, grad_values, grad_features), the last two null where not wanted; the gradients
// in the types of what they are gradients of.
template <typename F>
std::tuple<Tensor, Tensor> filter_gradients(const Tensor& grad_any, const Tensor& values_any,
                                            const Tensor& features_any, bool need_grad_values, bool need_grad_features,
                                            F&& backward) {
  check_filter_gradient(grad_any, values_any);
  const ScalarType acc = accumulation_type(values_any.scalar_type());
  const Tensor grad = dense_as(grad_any, acc), values = dense_as(values_any, acc);
  const Tensor features = dense_as(features_any, acc);
  Tensor grad_values = empty_as(values, acc, need_grad_values);
  Tensor grad_features = empty_as(features, acc, need_grad_features);
  dispatch_accumulation(acc, [&](auto value) {
    using T = decltype(value);
    backward(data<T>(grad), data<T>(values), data<T>(features),
             need_grad_values ? mutable_data<T>(grad_values) : nullptr,
             need_grad_features ? mutable_data<T>(grad_features) : nullptr);
  });
  return {dense_as(grad_values, values_any.scalar_type()), dense_as(grad_features, features_any.scalar_type())};
}

}  // namespace deeplab_kernels
