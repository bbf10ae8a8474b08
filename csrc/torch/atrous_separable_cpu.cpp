// CPU binding of the atrous separable convolution: checks, geometry, call.
#include <torch/csrc/stable/library.h>

#include "../cpu/atrous_separable/atrous_separable.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace deeplab_kernels {
namespace {

struct NormTensors {
  const OptionalTensor& gamma;
  const OptionalTensor& beta;
  const OptionalTensor& mean;
  const OptionalTensor& var;
  double eps;
  int64_t activation;

  void check(int64_t channels, const Tensor& x) const {
    if (gamma) check_vector(*gamma, "gamma", channels, x);
    if (beta) check_vector(*beta, "beta", channels, x);
    if (mean) check_vector(*mean, "mean", channels, x);
    if (var) check_vector(*var, "var", channels, x);
  }
  template <typename T>
  cpu::ChannelNorm<T> get() const {
    return {in_or_null<T>(gamma),     in_or_null<T>(beta), in_or_null<T>(mean), in_or_null<T>(var), eps,
            activation_of(activation)};
  }
};

Tensor separable_conv2d(const Tensor& x_any, const Tensor& depthwise_weight, const Tensor& pointwise_weight,
                        const OptionalTensor& residual_any, const OptionalTensor& depthwise_gamma,
                        const OptionalTensor& depthwise_beta, const OptionalTensor& depthwise_mean,
                        const OptionalTensor& depthwise_var, const OptionalTensor& pointwise_gamma,
                        const OptionalTensor& pointwise_beta, const OptionalTensor& pointwise_mean,
                        const OptionalTensor& pointwise_var, double depthwise_eps, double pointwise_eps,
                        int64_t pre_activation, int64_t depthwise_activation, int64_t pointwise_activation,
                        const Ints& stride, const Ints& padding, const Ints& dilation) {
  const DepthwiseShape shape = depthwise_shape(x_any, depthwise_weight, stride, padding, dilation);
  STD_TORCH_CHECK(shape.multiplier == 1 || shape.channels == 0, "the depthwise multiplier must be 1");
  STD_TORCH_CHECK(pointwise_weight.dim() == 4 && pointwise_weight.size(1) == shape.channels &&
                      pointwise_weight.size(2) == 1 && pointwise_weight.size(3) == 1,
                  "pointwise_weight must have shape (out_channels, channels, 1, 1)");
  STD_TORCH_CHECK(pointwise_weight.scalar_type() == x_any.scalar_type() && pointwise_weight.device() == x_any.device(),
                  "pointwise_weight must have the dtype and device of x");
  const int64_t out_channels = pointwise_weight.size(0);
  const std::vector<int64_t> size{shape.batch, out_channels, shape.out_h, shape.out_w};
  if (residual_any) {
    STD_TORCH_CHECK(residual_any->dim() == 4 && residual_any->scalar_type() == x_any.scalar_type() &&
                        residual_any->device() == x_any.device(),
                    "residual must have 4 dimensions and the dtype and device of x");
    for (int d = 0; d < 4; ++d)
      STD_TORCH_CHECK(residual_any->size(d) == size[size_t(d)], "residual must have the shape of the output");
  }
  const Tensor x = with_layout(computed(x_any), shape.channels_last);
  const Tensor depthwise = torch::stable::contiguous(computed(depthwise_weight));
  const Tensor pointwise = torch::stable::contiguous(computed(pointwise_weight));
  OptionalTensor residual;
  if (residual_any) residual = with_layout(computed(*residual_any), shape.channels_last);
  const NormTensors first{depthwise_gamma, depthwise_beta, depthwise_mean,
                          depthwise_var,   depthwise_eps,  depthwise_activation};
  const NormTensors second{pointwise_gamma, pointwise_beta, pointwise_mean,
                           pointwise_var,   pointwise_eps,  pointwise_activation};
  first.check(shape.channels, x);
  second.check(out_channels, x);
  Tensor result = empty_nchw(size, x, shape.channels_last);
  dispatch_computed(x, [&](auto value) {
    using T = decltype(value);
    const cpu::SeparableTensors<T> tensors{in<T>(x), in<T>(depthwise), in<T>(pointwise), in_or_null<T>(residual),
                                           out<T>(result)};
    cpu::atrous_separable_conv2d<T>(shape, out_channels, tensors, activation_of(pre_activation), first.get<T>(),
                                    second.get<T>(), torch_threads());
  });
  return as_dtype(result, x_any.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) { m.impl("atrous_separable_conv2d", TORCH_BOX(&separable_conv2d)); }

}  // namespace deeplab_kernels
