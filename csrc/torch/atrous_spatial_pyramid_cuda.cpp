// CUDA bindings of the atrous spatial pyramid: checks, geometry, call, on the current stream of x's device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/atrous_spatial_pyramid.h"
#include "cuda_tensors.h"
#include "launcher.h"
#include "pyramid_tensors.h"

namespace deeplab_kernels {
namespace {

cuda::PyramidShape pyramid_shape(const Tensor& x, const Tensor& weight, const Ints& dilation) {
  const bool channels_last = pyramid_branches(x, weight, dilation)[0].channels_last;
  return {x.size(0), x.size(1), x.size(2), x.size(3), weight.size(3), weight.size(4), channels_last, dilation};
}

cuda::NormParameters norm_of(const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& mean,
                             const OptionalTensor& var, double eps, int64_t activation, const cuda::PyramidShape& shape,
                             const Tensor& x) {
  if (gamma) check_branch_vectors(*gamma, "gamma", shape.branches(), x);
  if (beta) check_branch_vectors(*beta, "beta", shape.branches(), x);
  if (mean) check_branch_vectors(*mean, "mean", shape.branches(), x);
  if (var) check_branch_vectors(*var, "var", shape.branches(), x);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must both be given or both be None");
  return {in_or_null(gamma), in_or_null(beta), in_or_null(mean), in_or_null(var), eps, activation_of(activation)};
}

std::vector<void*> pointers(const Tensors& tensors) {
  std::vector<void*> found;
  for (const Tensor& t : tensors) found.push_back(out(t));
  return found;
}

// Checked, and in the layout of x.
Tensors branches(const Tensors& any, const char* name, const cuda::PyramidShape& shape, const Tensor& x) {
  check_branch_count(any, name, shape.branches());
  Tensors found;
  for (const Tensor& t : any) {
    check_like_output(t, name, shape.branch(0), x);
    found.push_back(with_layout(t, shape.channels_last));
  }
  return found;
}

std::vector<const void*> const_pointers(const Tensors& tensors) {
  std::vector<const void*> found;
  for (const Tensor& t : tensors) found.push_back(in(t));
  return found;
}

std::tuple<Tensors, Tensor> pyramid(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& gamma,
                                    const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                                    double eps, int64_t activation, const Ints& dilation, bool pool) {
  const cuda::PyramidShape shape = pyramid_shape(x_any, weight_any, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  const cuda::NormParameters norm = norm_of(gamma, beta, mean, var, eps, activation, shape, x);
  const Tensors result = empty_images(x, shape.branches(), shape.channels_last);
  const Tensor pooled = empty_pooled(x, pool);
  cuda::atrous_spatial_pyramid(launcher.context(), dtype_of(x), shape, in(x), in(weight), norm, pointers(result).data(),
                               out_or_null(pooled, pool));
  return {result, pooled};
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> training(const Tensor& x_any, const Tensor& weight_any,
                                                              const OptionalTensor& gamma, const OptionalTensor& beta,
                                                              double eps, int64_t activation, const Ints& dilation,
                                                              bool pool, bool save_conv) {
  const cuda::PyramidShape shape = pyramid_shape(x_any, weight_any, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  const cuda::NormParameters norm = norm_of(gamma, beta, std::nullopt, std::nullopt, eps, activation, shape, x);
  const Tensors result = empty_images(x, shape.branches(), shape.channels_last),
                conv = empty_images(x, save_conv ? shape.branches() : 0, shape.channels_last);
  const Tensor pooled = empty_pooled(x, pool), mean = empty_branch_vectors(x, shape.branches()),
               var = empty_branch_vectors(x, shape.branches());
  cuda::atrous_spatial_pyramid_training(launcher.context(), dtype_of(x), shape, in(x), in(weight), norm,
                                        pointers(result).data(), save_conv ? pointers(conv).data() : nullptr, out(mean),
                                        out(var), out_or_null(pooled, pool));
  return {result, conv, mean, var, pooled};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensors& grad_any, const OptionalTensor& grad_pooled_any,
                                                    const Tensor& x_any, const Tensor& weight_any,
                                                    const Tensors& conv_any, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, const OptionalTensor& mean,
                                                    const OptionalTensor& var, double eps, int64_t activation,
                                                    bool batch_statistics, const Ints& dilation, bool need_grad_x,
                                                    bool need_grad_weight) {
  const cuda::PyramidShape shape = pyramid_shape(x_any, weight_any, dilation);
  Launcher launcher(x_any);
  const Tensor x = with_layout(x_any, shape.channels_last), weight = torch::stable::contiguous(weight_any);
  const cuda::NormParameters norm = norm_of(gamma, beta, mean, var, eps, activation, shape, x);
  const Tensors grad = branches(grad_any, "grad_out", shape, x);
  const Tensors conv = conv_any.empty() || !mean ? Tensors{} : branches(conv_any, "conv", shape, x);
  OptionalTensor grad_pooled;
  if (grad_pooled_any) {
    STD_TORCH_CHECK(grad_pooled_any->dim() == 4 && grad_pooled_any->size(0) == shape.batch &&
                        grad_pooled_any->size(1) == shape.channels && grad_pooled_any->size(2) == 1 &&
                        grad_pooled_any->size(3) == 1 && grad_pooled_any->scalar_type() == x.scalar_type() &&
                        grad_pooled_any->device() == x.device(),
                    "grad_pooled must have shape (N, C, 1, 1) and the dtype and device of x");
    grad_pooled = torch::stable::contiguous(*grad_pooled_any);
  }
  const Tensor grad_x = need_grad_x ? empty_images(x, 1, shape.channels_last)[0] : empty_vector(0, x, x.scalar_type());
  const Tensor grad_weight =
      need_grad_weight ? torch::stable::empty({weight.size(0), weight.size(1), 1, weight.size(3), weight.size(4)},
                                              weight.scalar_type(), std::nullopt, weight.device())
                       : empty_vector(0, x, x.scalar_type());
  const ScalarType acc = accumulation_type(x.scalar_type());
  const Tensor grad_gamma = mean ? empty_branch_vectors(x, shape.branches()) : empty_vector(0, x, acc);
  const Tensor grad_beta = mean ? empty_branch_vectors(x, shape.branches()) : empty_vector(0, x, acc);
  cuda::atrous_spatial_pyramid_backward(
      launcher.context(), dtype_of(x), shape, const_pointers(grad).data(), in_or_null(grad_pooled), in(x), in(weight),
      conv.empty() ? nullptr : const_pointers(conv).data(), norm, batch_statistics, out_or_null(grad_x, need_grad_x),
      out_or_null(grad_weight, need_grad_weight), out_or_null(grad_gamma, mean.has_value()),
      out_or_null(grad_beta, mean.has_value()));
  return {grad_x, grad_weight, grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CUDA, m) {
  m.impl("atrous_spatial_pyramid", TORCH_BOX(&pyramid));
  m.impl("atrous_spatial_pyramid_training", TORCH_BOX(&training));
  m.impl("atrous_spatial_pyramid_backward", TORCH_BOX(&backward));
}

}  // namespace deeplab_kernels
