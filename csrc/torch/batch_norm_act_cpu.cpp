// CPU bindings of batch normalisation + residual + activation: checks, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "map_tensors.h"
#include "threads.h"

namespace deeplab_kernels {
namespace {

std::tuple<Tensor, Tensor, Tensor> training(const Tensor& z_any, const OptionalTensor& residual_any,
                                            const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                            int64_t activation) {
  const cpu::MapShape shape = map_shape(z_any);
  check_affine(gamma, beta, z_any);
  const OptionalTensor residual = like_z(residual_any, "residual", z_any, shape);
  const Tensor z = with_layout(widened(z_any), shape.channels_last);
  Tensor result = empty_like(z, shape);
  Tensor mean = empty_vector(shape.channels, z, accumulation_type(z.scalar_type()));
  Tensor var = empty_vector(shape.channels, z, accumulation_type(z.scalar_type()));
  dispatch(z.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::batch_norm_act_training<T>(shape, in<T>(z), in_or_null<T>(residual),
                                    norm_parameters<A>(gamma, beta, eps, activation), out<T>(result), out<A>(mean),
                                    out<A>(var), false, torch_threads());
  });
  return {as_dtype(result, z_any.scalar_type()), mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& z_any,
                                                    const OptionalTensor& out_any, const OptionalTensor& gamma,
                                                    const OptionalTensor& beta, const Tensor& mean, const Tensor& var,
                                                    double eps, int64_t activation) {
  const cpu::MapShape shape = map_shape(z_any);
  check_affine(gamma, beta, z_any);
  check_vector(mean, "mean", shape.channels, z_any);
  check_vector(var, "var", shape.channels, z_any);
  const OptionalTensor grad = like_z(grad_any, "grad_out", z_any, shape);
  const OptionalTensor activated = like_z(out_any, "out", z_any, shape);
  const Tensor z = with_layout(widened(z_any), shape.channels_last);
  const ScalarType acc = accumulation_type(z.scalar_type());
  Tensor grad_z = empty_like(z, shape);
  Tensor grad_residual = activated ? empty_like(z, shape) : empty_vector(0, z, z.scalar_type());
  Tensor grad_gamma = empty_vector(shape.channels, z, acc), grad_beta = empty_vector(shape.channels, z, acc);
  dispatch(z.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::batch_norm_act_backward<T>(shape, in<T>(*grad), in<T>(z), in_or_null<T>(activated),
                                    norm_parameters<A>(gamma, beta, eps, activation), in<A>(mean), in<A>(var),
                                    out<T>(grad_z), out_or_null<T>(grad_residual, activated.has_value()),
                                    out<A>(grad_gamma), out<A>(grad_beta), torch_threads());
  });
  const ScalarType dtype = z_any.scalar_type();
  return {as_dtype(grad_z, dtype), as_dtype(grad_residual, dtype), grad_gamma, grad_beta};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("batch_norm_act_training", TORCH_BOX(&training));
  m.impl("batch_norm_act_backward", TORCH_BOX(&backward));
}

}  // namespace deeplab_kernels
