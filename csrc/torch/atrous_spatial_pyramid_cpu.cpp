// CPU bindings of the atrous spatial pyramid: checks, geometry, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/atrous_spatial_pyramid/atrous_spatial_pyramid.h"
#include "cpu_tensors.h"
#include "pyramid_tensors.h"
#include "threads.h"

namespace deeplab_kernels {
namespace {

struct Branches {
  const std::vector<DepthwiseShape> shapes;
  Branches(const Tensor& x, const Tensor& weight, const Ints& dilation)
      : shapes(pyramid_branches(x, weight, dilation)) {}
  int64_t count() const { return int64_t(shapes.size()); }
  bool channels_last() const { return shapes[0].channels_last; }
  cpu::PyramidShape shape() const { return {shapes.data(), count()}; }
};

struct NormTensors {
  const OptionalTensor& gamma;
  const OptionalTensor& beta;
  double eps;
  int64_t activation;

  void check(int64_t branches, const Tensor& x) const {
    if (gamma) check_branch_vectors(*gamma, "gamma", branches, x);
    if (beta) check_branch_vectors(*beta, "beta", branches, x);
  }
  template <typename A>
  cpu::NormParameters<A> get() const {
    return norm_parameters<A>(gamma, beta, eps, activation);
  }
};

// Whether there are statistics to normalise with.
bool check_statistics(const NormTensors& norm, const OptionalTensor& mean, const OptionalTensor& var, int64_t branches,
                      const Tensor& x) {
  norm.check(branches, x);
  STD_TORCH_CHECK(mean.has_value() == var.has_value(), "mean and var must both be given or both be None");
  if (mean) {
    check_branch_vectors(*mean, "mean", branches, x);
    check_branch_vectors(*var, "var", branches, x);
  } else {
    STD_TORCH_CHECK(!norm.gamma && !norm.beta && norm.activation == 0,
                    "gamma, beta and an activation need mean and var");
  }
  return mean.has_value();
}

Tensors all_as_dtype(Tensors tensors, ScalarType dtype) {
  for (Tensor& t : tensors) t = as_dtype(t, dtype);
  return tensors;
}

template <typename T>
std::vector<T*> pointers(const Tensors& tensors) {
  std::vector<T*> result;
  for (const Tensor& t : tensors) result.push_back(out<T>(t));
  return result;
}
template <typename T>
std::vector<const T*> const_pointers(const Tensors& tensors) {
  std::vector<const T*> result;
  for (const Tensor& t : tensors) result.push_back(in<T>(t));
  return result;
}

std::tuple<Tensors, Tensor> pyramid(const Tensor& x_any, const Tensor& weight_any, const OptionalTensor& gamma,
                                    const OptionalTensor& beta, const OptionalTensor& mean, const OptionalTensor& var,
                                    double eps, int64_t activation, const Ints& dilation, bool pool) {
  const Branches branches(x_any, weight_any, dilation);
  const Tensor x = with_layout(widened(x_any), branches.channels_last());
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  const NormTensors norm{gamma, beta, eps, activation};
  check_statistics(norm, mean, var, branches.count(), x);
  const Tensors results = empty_images(x, branches.count(), branches.channels_last());
  const Tensor pooled = empty_pooled(x, pool);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::atrous_spatial_pyramid<T>(branches.shape(), in<T>(x), in<T>(weight), norm.get<A>(), in_or_null<A>(mean),
                                   in_or_null<A>(var), pointers<T>(results).data(), out_or_null<T>(pooled, pool),
                                   torch_threads());
  });
  return {all_as_dtype(results, x_any.scalar_type()), as_dtype(pooled, x_any.scalar_type())};
}

std::tuple<Tensors, Tensors, Tensor, Tensor, Tensor> pyramid_training(const Tensor& x_any, const Tensor& weight_any,
                                                                      const OptionalTensor& gamma,
                                                                      const OptionalTensor& beta, double eps,
                                                                      int64_t activation, const Ints& dilation,
                                                                      bool pool, bool save_conv) {
  const Branches branches(x_any, weight_any, dilation);
  const Tensor x = with_layout(widened(x_any), branches.channels_last());
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  const NormTensors norm{gamma, beta, eps, activation};
  norm.check(branches.count(), x);
  const Tensors results = empty_images(x, branches.count(), branches.channels_last());
  const Tensors conv = empty_images(x, save_conv ? branches.count() : 0, branches.channels_last());
  const Tensor mean = empty_branch_vectors(x, branches.count()), var = empty_branch_vectors(x, branches.count());
  const Tensor pooled = empty_pooled(x, pool);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::atrous_spatial_pyramid_training<T>(branches.shape(), in<T>(x), in<T>(weight), norm.get<A>(),
                                            pointers<T>(results).data(), save_conv ? pointers<T>(conv).data() : nullptr,
                                            out<A>(mean), out<A>(var), out_or_null<T>(pooled, pool), torch_threads());
  });
  const ScalarType dtype = x_any.scalar_type();
  return {all_as_dtype(results, dtype), all_as_dtype(conv, dtype), mean, var, as_dtype(pooled, dtype)};
}

// Of the image's shape, in its layout.
Tensors checked_images(const Tensors& given, const char* name, const Branches& branches, const Tensor& x) {
  check_branch_count(given, name, branches.count());
  Tensors images;
  for (const Tensor& t : given) {
    check_like_output(t, name, branches.shapes[0], x);
    images.push_back(with_layout(widened(t), branches.channels_last()));
  }
  return images;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pyramid_backward(
    const Tensors& grads_any, const OptionalTensor& grad_pooled_any, const Tensor& x_any, const Tensor& weight_any,
    const Tensors& conv_any, const OptionalTensor& gamma, const OptionalTensor& beta, const OptionalTensor& mean,
    const OptionalTensor& var, double eps, int64_t activation, bool batch_statistics, const Ints& dilation,
    bool need_grad_x, bool need_grad_weight) {
  const Branches branches(x_any, weight_any, dilation);
  const Tensor x = with_layout(widened(x_any), branches.channels_last());
  const Tensor weight = torch::stable::contiguous(widened(weight_any));
  const NormTensors norm{gamma, beta, eps, activation};
  const bool normalised = check_statistics(norm, mean, var, branches.count(), x);
  const Tensors grads = checked_images(grads_any, "grad_out", branches, x_any);
  const Tensors conv = conv_any.empty() ? Tensors{} : checked_images(conv_any, "conv", branches, x_any);
  OptionalTensor grad_pooled;
  if (grad_pooled_any) {
    STD_TORCH_CHECK(grad_pooled_any->scalar_type() == x_any.scalar_type() && grad_pooled_any->dim() == 4 &&
                        grad_pooled_any->size(0) == x.size(0) && grad_pooled_any->size(1) == x.size(1) &&
                        grad_pooled_any->size(2) == 1 && grad_pooled_any->size(3) == 1 &&
                        grad_pooled_any->device() == x.device(),
                    "grad_pooled must have shape (N, C, 1, 1) and the dtype and device of x");
    grad_pooled = torch::stable::contiguous(widened(*grad_pooled_any));
  }
  const Tensor none = torch::stable::empty({0}, x.scalar_type(), std::nullopt, x.device());
  const Tensor grad_x = need_grad_x ? empty_images(x, 1, branches.channels_last())[0] : none;
  const Tensor grad_weight = need_grad_weight ? torch::stable::empty_like(weight) : none;
  const ScalarType acc = accumulation_type(x.scalar_type());
  const Tensor grad_gamma = normalised ? empty_branch_vectors(x, branches.count()) : empty_vector(0, x, acc);
  const Tensor grad_beta = normalised ? empty_branch_vectors(x, branches.count()) : empty_vector(0, x, acc);
  dispatch(x.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    const auto from = const_pointers<T>(grads), kept = const_pointers<T>(conv);
    const cpu::PyramidGradients<T> tensors{from.data(),
                                           in_or_null<T>(grad_pooled),
                                           in<T>(x),
                                           in<T>(weight),
                                           conv.empty() ? nullptr : kept.data(),
                                           out_or_null<T>(grad_x, need_grad_x),
                                           out_or_null<T>(grad_weight, need_grad_weight),
                                           out_or_null<A>(grad_gamma, normalised),
                                           out_or_null<A>(grad_beta, normalised)};
    cpu::atrous_spatial_pyramid_backward<T>(branches.shape(), tensors, norm.get<A>(), in_or_null<A>(mean),
                                            in_or_null<A>(var), batch_statistics, torch_threads());
  });
  const ScalarType dtype = x_any.scalar_type();
  return {as_dtype(grad_x, dtype), as_dtype(grad_weight, dtype), grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("atrous_spatial_pyramid", TORCH_BOX(&pyramid));
  m.impl("atrous_spatial_pyramid_training", TORCH_BOX(&pyramid_training));
  m.impl("atrous_spatial_pyramid_backward", TORCH_BOX(&pyramid_backward));
}

}  // namespace deeplab_kernels
