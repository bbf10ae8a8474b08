// CPU bindings of the Gaussian filter with a window: checks, conversions, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/local_gaussian_filter.h"
#include "filter_tensors.h"

namespace deeplab_kernels {
namespace {

cpu::WindowShape window_shape(const Tensor& values, const Tensor& features, const std::vector<int64_t>& radius) {
  check_filter_tensors(values, features, 2);
  STD_TORCH_CHECK(radius.size() == 2 && radius[0] >= 0 && radius[1] >= 0,
                  "radius must be two numbers that are not negative");
  return {values.size(0), values.size(1), values.size(2), values.size(3), features.size(1), radius[0], radius[1]};
}

Tensor filter(const Tensor& values_any, const Tensor& features_any, const std::vector<int64_t>& radius) {
  const cpu::WindowShape shape = window_shape(values_any, features_any, radius);
  const ScalarType acc = accumulation_type(values_any.scalar_type());
  const Tensor values = dense_as(values_any, acc), features = dense_as(features_any, acc);
  Tensor out = empty_as(values, acc, true);
  dispatch_accumulation(acc, [&](auto value) {
    using T = decltype(value);
    cpu::local_gaussian_filter<T>(shape, data<T>(values), data<T>(features), mutable_data<T>(out), torch_threads());
  });
  return out;
}

std::tuple<Tensor, Tensor> filter_backward(const Tensor& grad_any, const Tensor& values_any, const Tensor& features_any,
                                           const std::vector<int64_t>& radius, bool need_grad_values,
                                           bool need_grad_features) {
  const cpu::WindowShape shape = window_shape(values_any, features_any, radius);
  const ScalarType acc = accumulation_type(values_any.scalar_type());
  check_filter_gradient(grad_any, values_any);
  const Tensor grad = dense_as(grad_any, acc), values = dense_as(values_any, acc);
  const Tensor features = dense_as(features_any, acc);
  Tensor grad_values = empty_as(values, acc, need_grad_values);
  Tensor grad_features = empty_as(features, acc, need_grad_features);
  dispatch_accumulation(acc, [&](auto value) {
    using T = decltype(value);
    cpu::local_gaussian_filter_backward<T>(shape, data<T>(grad), data<T>(values), data<T>(features),
                                           need_grad_values ? mutable_data<T>(grad_values) : nullptr,
                                           need_grad_features ? mutable_data<T>(grad_features) : nullptr,
                                           torch_threads());
  });
  return {dense_as(grad_values, values_any.scalar_type()), dense_as(grad_features, features_any.scalar_type())};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("local_gaussian_filter", TORCH_BOX(&filter));
  m.impl("local_gaussian_filter_backward", TORCH_BOX(&filter_backward));
}

}  // namespace deeplab_kernels
