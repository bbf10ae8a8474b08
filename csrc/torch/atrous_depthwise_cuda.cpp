// CUDA bindings of the atrous depthwise operators: checks, geometry, call. As atrous_depthwise_cpu.cpp, on the current
// stream of x's device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/atrous_depthwise.h"
#include "cuda_tensors.h"
#include "launcher.h"

namespace deeplab_kernels {
namespace {

void check_norm(const OptionalTensor& gamma, const OptionalTensor& beta, const DepthwiseShape& shape, const Tensor& x) {
  if (gamma) check_vector(*gamma, "gamma", shape, x);
  if (beta) check_vector(*beta, "beta", shape, x);
}

void check_statistics(const Tensor& mean, const Tensor& var, const DepthwiseShape& shape, const Tensor& x) {
  check_vector(mean, "mean", shape, x);
  check_vector(var, "var", shape, x);
}

Tensor gradient_like(const Tensor& t, const DepthwiseShape& shape, bool wanted) {
  if (!wanted) return empty_vector(0, t, t.scalar_type());
  return empty_nchw({t.size(0), t.size(1), t.size(2), t.size(3)}, t, shape.channels_last && !t.is_contiguous());
}

Tensor conv2d(const Tensor& x_any, const Tensor& weight_any, const Ints& stride, const Ints& padding,
              const Ints& dilation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  Tensor y = empty_nchw(output_size(shape), x, shape.channels_last);
  cuda::atrous_depthwise_conv2d(launcher.context(), dtype_of(x), shape, in(x), in(weight), out(y));
  return y;
}

std::tuple<Tensor, Tensor> conv2d_backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any,
                                           const Ints& stride, const Ints& padding, const Ints& dilation,
                                           bool need_grad_x, bool need_grad_weight) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  check_like_output(grad_any, "grad_out", shape, x);
  const Tensor grad = with_layout(grad_any, shape.channels_last);
  Tensor grad_x = gradient_like(x, shape, need_grad_x);
  Tensor grad_weight = gradient_like(weight, shape, need_grad_weight);
  cuda::atrous_depthwise_conv2d_backward(launcher.context(), dtype_of(x), shape, in(grad), in(x), in(weight),
                                         out_or_null(grad_x, need_grad_x), out_or_null(grad_weight, need_grad_weight));
  return {grad_x, grad_weight};
}

Tensor bn_act_inference(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& gamma,
                        const OptionalTensor& beta, const Tensor& mean, const Tensor& var, double eps,
                        int64_t activation, const Ints& stride, const Ints& padding, const Ints& dilation) {
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  check_norm(gamma, beta, shape, x);
  check_statistics(mean, var, shape, x);
  const cuda::NormParameters norm{in_or_null(gamma),        in_or_null(beta), in(mean), in(var), eps,
                                  activation_of(activation)};
  Tensor result = empty_nchw(output_size(shape), x, shape.channels_last);
  cuda::atrous_depthwise_bn_act_inference(launcher.context(), dtype_of(x), shape, in(x), in(weight), norm, out(result));
  return result;
}

// The Python functions apply it before they come here.
void check_no_pre_activation(int64_t pre_activation) {
  STD_TORCH_CHECK(pre_activation == 0, "pre_activation is not part of the CUDA kernels: apply it to x");
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_training(const Tensor& x_any, const Tensor& weight_any,
                                                           const OptionalTensor& gamma, const OptionalTensor& beta,
                                                           double eps, int64_t activation, const Ints& stride,
                                                           const Ints& padding, const Ints& dilation, bool save_conv,
                                                           int64_t pre_activation) {
  check_no_pre_activation(pre_activation);
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  const ScalarType acc = accumulation_type(x.scalar_type());
  check_norm(gamma, beta, shape, x);
  const cuda::NormParameters norm{in_or_null(gamma),        in_or_null(beta), nullptr, nullptr, eps,
                                  activation_of(activation)};
  Tensor result = empty_nchw(output_size(shape), x, shape.channels_last);
  Tensor y = save_conv ? empty_nchw(output_size(shape), x, shape.channels_last) : empty_vector(0, x, x.scalar_type());
  Tensor mean = empty_vector(shape.out_channels(), x, acc);
  Tensor var = empty_vector(shape.out_channels(), x, acc);
  cuda::atrous_depthwise_bn_act_training(launcher.context(), dtype_of(x), shape, in(x), in(weight), norm, out(result),
                                         out_or_null(y, save_conv), out(mean), out(var));
  return {result, y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any, const Tensor& y_any,
    const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& mean, const Tensor& var, double eps,
    int64_t activation, bool batch_statistics, const Ints& stride, const Ints& padding, const Ints& dilation,
    bool need_grad_x, bool need_grad_weight, int64_t pre_activation) {
  check_no_pre_activation(pre_activation);
  const DepthwiseShape shape = depthwise_shape(x_any, weight_any, stride, padding, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  const ScalarType acc = accumulation_type(x.scalar_type());
  check_like_output(grad_any, "grad_out", shape, x);
  check_norm(gamma, beta, shape, x);
  check_statistics(mean, var, shape, x);
  const Tensor grad = with_layout(grad_any, shape.channels_last);
  const bool have_y = was_kept(y_any, shape, x);
  const Tensor y = have_y ? with_layout(y_any, shape.channels_last) : y_any;
  const cuda::NormParameters norm{in_or_null(gamma),        in_or_null(beta), in(mean), in(var), eps,
                                  activation_of(activation)};
  Tensor grad_x = gradient_like(x, shape, need_grad_x);
  Tensor grad_weight = gradient_like(weight, shape, need_grad_weight);
  Tensor grad_gamma = empty_vector(shape.out_channels(), x, acc);
  Tensor grad_beta = empty_vector(shape.out_channels(), x, acc);
  cuda::atrous_depthwise_bn_act_backward(launcher.context(), dtype_of(x), shape, in(grad), in(x), in(weight),
                                         have_y ? in(y) : nullptr, norm, batch_statistics,
                                         out_or_null(grad_x, need_grad_x), out_or_null(grad_weight, need_grad_weight),
                                         out(grad_gamma), out(grad_beta));
  return {grad_x, grad_weight, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CUDA, m) {
  m.impl("atrous_depthwise_conv2d", TORCH_BOX(&conv2d));
  m.impl("atrous_depthwise_conv2d_backward", TORCH_BOX(&conv2d_backward));
  m.impl("atrous_depthwise_bn_act_inference", TORCH_BOX(&bn_act_inference));
  m.impl("atrous_depthwise_bn_act_training", TORCH_BOX(&bn_act_training));
  m.impl("atrous_depthwise_bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace deeplab_kernels
