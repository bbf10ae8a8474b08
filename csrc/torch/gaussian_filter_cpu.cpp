// CPU bindings of the exact Gaussian filter: checks, conversions, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/gaussian_filter/gaussian_filter.h"
#include "filter_tensors.h"

namespace deeplab_kernels {
namespace {

cpu::PointsShape points_shape(const Tensor& values, const Tensor& features) {
  check_filter_tensors(values, features, 1);
  return {values.size(0), values.size(1), values.size(2), features.size(1)};
}

Tensor filter(const Tensor& values, const Tensor& features) {
  const cpu::PointsShape shape = points_shape(values, features);
  return filtered(values, features,
                  [&](auto... pointers) { cpu::gaussian_filter(shape, pointers..., torch_threads()); });
}

std::tuple<Tensor, Tensor> filter_backward(const Tensor& grad, const Tensor& values, const Tensor& features,
                                           bool need_grad_values, bool need_grad_features) {
  const cpu::PointsShape shape = points_shape(values, features);
  return filter_gradients(grad, values, features, need_grad_values, need_grad_features, [&](auto... pointers) {
    cpu::gaussian_filter_backward(shape, pointers..., torch_threads());
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("gaussian_filter", TORCH_BOX(&filter));
  m.impl("gaussian_filter_backward", TORCH_BOX(&filter_backward));
}

}  // namespace deeplab_kernels
