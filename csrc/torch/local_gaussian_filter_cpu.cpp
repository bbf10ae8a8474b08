// CPU bindings of the Gaussian filter with a window: checks, conversions, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/local_gaussian_filter/local_gaussian_filter.h"
#include "filter_tensors.h"

namespace deeplab_kernels {
namespace {

cpu::WindowShape window_shape(const Tensor& values, const Tensor& features, const std::vector<int64_t>& radius) {
  check_filter_tensors(values, features, 2);
  STD_TORCH_CHECK(radius.size() == 2 && radius[0] >= 0 && radius[1] >= 0,
                  "radius must be two numbers that are not negative");
  return {values.size(0), values.size(1), values.size(2), values.size(3), features.size(1), radius[0], radius[1]};
}

Tensor filter(const Tensor& values, const Tensor& features, const std::vector<int64_t>& radius) {
  const cpu::WindowShape shape = window_shape(values, features, radius);
  return filtered(values, features,
                  [&](auto... pointers) { cpu::local_gaussian_filter(shape, pointers..., torch_threads()); });
}

std::tuple<Tensor, Tensor> filter_backward(const Tensor& grad, const Tensor& values, const Tensor& features,
                                           const std::vector<int64_t>& radius, bool need_grad_values,
                                           bool need_grad_features) {
  const cpu::WindowShape shape = window_shape(values, features, radius);
  return filter_gradients(grad, values, features, need_grad_values, need_grad_features, [&](auto... pointers) {
    cpu::local_gaussian_filter_backward(shape, pointers..., torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("local_gaussian_filter", TORCH_BOX(&filter));
  m.impl("local_gaussian_filter_backward", TORCH_BOX(&filter_backward));
}

}  // namespace deeplab_kernels
