// CPU bindings of the atrous depthwise operators: checks, geometry, call.
#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

#include "../cpu/atrous_depthwise/atrous_depthwise.h"
#include "cpu_tensors.h"
#include "threads.h"

namespace deeplab_kernels {
namespace {

void check_norm(const OptionalTensor& gamma, const OptionalTensor& beta, const DepthwiseShape& shape, const Tensor& x) {
  if (gamma) check_vector(*gamma, "gamma", shape, x);
  if (beta) check_vector(*beta, "beta", shape, x);
}

Tensor conv2d(const Tensor& x_any, const Tensor& weight_any, const Ints& stride, const Ints& padding,
              const Ints& dilation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  const Tensor x = with_layout(widened(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  Tensor y = empty_nchw(output_size(shape), x, shape.channels_last);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    cpu::atrous_depthwise_conv2d<T>(shape, in<T>(x), in<T>(weight), out<T>(y), torch_threads());
  });
  return as_dtype(y, x_any.scalar_type());
}

Tensor gradient_like(const Tensor& t, const DepthwiseShape& shape, bool wanted) {
  if (!wanted) return torch::stable::empty({0}, t.scalar_type(), std::nullopt, t.device());
  return empty_nchw({t.size(0), t.size(1), t.size(2), t.size(3)}, t, shape.channels_last && !t.is_contiguous());
}

std::tuple<Tensor, Tensor> conv2d_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any,
                                           const Ints& stride, const Ints& padding, const Ints& dilation,
                                           bool need_grad_x, bool need_grad_weight) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  const Tensor x = with_layout(widened(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  check_like_output(grad_any, "grad_out", shape, x_any);
  const Tensor grad = with_layout(widened(grad_any), shape.channels_last);
  Tensor grad_x = gradient_like(x, shape, need_grad_x);
  Tensor grad_weight = gradient_like(weight, shape, need_grad_weight);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    cpu::atrous_depthwise_conv2d_backward<T>(shape, in<T>(grad), in<T>(x), in<T>(weight),
                                             out_or_null<T>(grad_x, need_grad_x),
                                             out_or_null<T>(grad_weight, need_grad_weight), torch_threads());
  });
  return {as_dtype(grad_x, x_any.scalar_type()), as_dtype(grad_weight, x_any.scalar_type())};
}

Tensor bn_act_inference(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& gamma,
                        const OptionalTensor& beta, const Tensor& mean, const Tensor& var, double eps,
                        int64_t activation, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  const Tensor x = with_layout(widened(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  check_norm(gamma, beta, shape, x);
  check_vector(mean, "mean", shape, x);
  check_vector(var, "var", shape, x);
  Tensor result = empty_nchw(output_size(shape), x, shape.channels_last);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::atrous_depthwise_bn_act_inference<T>(shape, in<T>(x), in<T>(weight),
                                              norm_parameters<A>(gamma, beta, eps, activation), in<A>(mean), in<A>(var),
                                              out<T>(result), torch_threads());
  });
  return as_dtype(result, x_any.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_training(const Tensor& x_any, const Tensor& weight_any,
                                                           const OptionalTensor& gamma, const OptionalTensor& beta,
                                                           double eps, int64_t activation, const Ints& stride,
                                                           const Ints& padding, const Ints& dilation, bool save_conv,
                                                           int64_t pre_activation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  const Tensor x = with_layout(widened(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  check_norm(gamma, beta, shape, x);
  const ScalarType acc = accumulation_type(x.scalar_type());
  Tensor result = empty_nchw(output_size(shape), x, shape.channels_last);
  Tensor y = save_conv ? empty_nchw(output_size(shape), x, shape.channels_last) : empty_vector(0, x, x.scalar_type());
  Tensor mean = empty_vector(shape.out_channels(), x, acc);
  Tensor var = empty_vector(shape.out_channels(), x, acc);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::atrous_depthwise_bn_act_training<T>(
        shape, in<T>(x), in<T>(weight), norm_parameters<A>(gamma, beta, eps, activation), out<T>(result),
        out_or_null<T>(y, save_conv), out<A>(mean), out<A>(var), activation_of(pre_activation), torch_threads());
  });
  return {as_dtype(result, x_any.scalar_type()), as_dtype(y, x_any.scalar_type()), mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any, const Tensor& y_any,
    const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& mean, const Tensor& var, double eps,
    int64_t activation, bool batch_statistics, const Ints& stride, const Ints& padding, const Ints& dilation,
    bool need_grad_x, bool need_grad_weight, int64_t pre_activation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  const Tensor x = with_layout(widened(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  const ScalarType acc = accumulation_type(x.scalar_type());
  check_like_output(grad_any, "grad_out", shape, x_any);
  check_norm(gamma, beta, shape, x);
  check_vector(mean, "mean", shape, x);
  check_vector(var, "var", shape, x);
  const bool have_y = was_kept(y_any, shape, x_any);
  const Tensor grad = with_layout(widened(grad_any), shape.channels_last);
  const Tensor y = have_y ? with_layout(widened(y_any), shape.channels_last) : y_any;
  Tensor grad_x = gradient_like(x, shape, need_grad_x);
  Tensor grad_weight = gradient_like(weight, shape, need_grad_weight);
  Tensor grad_gamma = empty_vector(shape.out_channels(), x, acc);
  Tensor grad_beta = empty_vector(shape.out_channels(), x, acc);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::atrous_depthwise_bn_act_backward<T>(shape, in<T>(grad), in<T>(x), in<T>(weight), have_y ? in<T>(y) : nullptr,
                                             norm_parameters<A>(gamma, beta, eps, activation), in<A>(mean), in<A>(var),
                                             batch_statistics, out_or_null<T>(grad_x, need_grad_x),
                                             out_or_null<T>(grad_weight, need_grad_weight), out<A>(grad_gamma),
                                             out<A>(grad_beta), activation_of(pre_activation), torch_threads());
  });
  return {as_dtype(grad_x, x_any.scalar_type()), as_dtype(grad_weight, x_any.scalar_type()), grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("atrous_depthwise_conv2d", TORCH_BOX(&conv2d));
  m.impl("atrous_depthwise_conv2d_backward", TORCH_BOX(&conv2d_backward));
  m.impl("atrous_depthwise_bn_act_inference", TORCH_BOX(&bn_act_inference));
  m.impl("atrous_depthwise_bn_act_training", TORCH_BOX(&bn_act_training));
  m.impl("atrous_depthwise_bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace deeplab_kernels

// For `python -m deeplab_kernels info`, through ctypes.
extern "C" __attribute__((visibility("default"))) const char* deeplab_kernels_cpu_instruction_set() {
  return deeplab_kernels::cpu::instruction_set();
}
