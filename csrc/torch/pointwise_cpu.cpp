// CPU bindings of the 1 x 1 convolution, alone and with the batch normalisation that follows it: checks, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cpu/pointwise/pointwise.h"
#include "map_tensors.h"
#include "threads.h"

namespace deeplab_kernels {
namespace {

cpu::PointwiseShape pointwise_shape(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(
      x.dim() == 4 && weight.dim() == 4 && weight.size(1) == x.size(1) && weight.size(2) == 1 && weight.size(3) == 1,
      "x must have shape (N, channels, H, W) and weight (out_channels, channels, 1, 1)");
  STD_TORCH_CHECK(weight.scalar_type() == x.scalar_type() && weight.device() == x.device(),
                  "weight must have the dtype and device of x");
  return {x.size(0), x.size(1), weight.size(0), x.size(2) * x.size(3), !x.is_contiguous() && is_channels_last(x)};
}

Tensor forward(const Tensor& x_any, const Tensor& weight_any) {
  const cpu::PointwiseShape shape = pointwise_shape(x_any, weight_any);
  const Tensor x = with_layout(computed(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(computed(weight_any));
  Tensor result = empty_nchw({shape.batch, shape.out_channels, x.size(2), x.size(3)}, x, shape.channels_last);
  dispatch_computed(x, [&](auto value) {
    using T = decltype(value);
    cpu::pointwise_conv2d<T>(shape, in<T>(x), in<T>(weight), out<T>(result), nullptr, nullptr, torch_threads());
  });
  return as_dtype(result, x_any.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_act_training(const Tensor& x_any, const Tensor& weight,
                                                             const OptionalTensor& residual_any,
                                                             const OptionalTensor& gamma, const OptionalTensor& beta,
                                                             double eps, int64_t activation) {
  const cpu::PointwiseShape shape = pointwise_shape(x_any, weight);
  const cpu::MapShape map{shape.batch, shape.out_channels, shape.pixels, shape.channels_last};
  const Tensor x = with_layout(computed(x_any), shape.channels_last);
  const Tensor dense = torch::stable::contiguous(computed(weight));
  Tensor product = empty_nchw({shape.batch, shape.out_channels, x.size(2), x.size(3)}, x, shape.channels_last);
  const ScalarType acc = x.scalar_type();
  Tensor mean = empty_vector(shape.out_channels, x, acc), var = empty_vector(shape.out_channels, x, acc);
  // What is normalised are the values that are kept: where these are rounded, their statistics are taken afterwards.
  const bool given = shape.channels_last && x_any.scalar_type() == acc;
  dispatch_computed(x, [&](auto value) {
    using T = decltype(value);
    cpu::pointwise_conv2d<T>(shape, in<T>(x), in<T>(dense), out<T>(product), given ? out<T>(mean) : nullptr,
                             given ? out<T>(var) : nullptr, torch_threads());
  });
  const Tensor kept = as_dtype(product, x_any.scalar_type());
  check_affine(gamma, beta, kept);
  const OptionalTensor residual = like_z(residual_any, "residual", kept, map);
  const Tensor z = widened(kept);
  Tensor result = empty_like(z, map);
  dispatch(z.scalar_type(), [&](auto value) {
    using T = decltype(value);
    using A = cpu::acc_t<T>;
    cpu::batch_norm_act_training<T>(map, in<T>(z), in_or_null<T>(residual),
                                    norm_parameters<A>(gamma, beta, eps, activation), out<T>(result), out<A>(mean),
                                    out<A>(var), given, torch_threads());
  });
  return {as_dtype(result, x_any.scalar_type()), kept, mean, var};
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any,
                                    bool need_grad_x, bool need_grad_weight) {
  const cpu::PointwiseShape shape = pointwise_shape(x_any, weight_any);
  const std::vector<int64_t> size{shape.batch, shape.out_channels, x_any.size(2), x_any.size(3)};
  STD_TORCH_CHECK(
      grad_any.dim() == 4 && grad_any.scalar_type() == x_any.scalar_type() && grad_any.device() == x_any.device(),
      "grad_out must have 4 dimensions and the dtype and device of x");
  for (int d = 0; d < 4; ++d)
    STD_TORCH_CHECK(grad_any.size(d) == size[size_t(d)], "grad_out must have the shape of the output");
  const Tensor grad = with_layout(computed(grad_any), shape.channels_last);
  const Tensor x = with_layout(computed(x_any), shape.channels_last);
  const Tensor weight = torch::stable::contiguous(computed(weight_any));
  const Tensor none = empty_vector(0, x, x.scalar_type());
  Tensor grad_x = none, grad_weight = none;
  dispatch_computed(x, [&](auto value) {
    using T = decltype(value);
    if (need_grad_x) {
      grad_x = empty_nchw({x.size(0), x.size(1), x.size(2), x.size(3)}, x, shape.channels_last);
      cpu::pointwise_grad_x<T>(shape, in<T>(grad), in<T>(weight), out<T>(grad_x), torch_threads());
    }
    if (need_grad_weight) {
      grad_weight = empty_nchw({shape.out_channels, shape.channels, 1, 1}, x, false);
      cpu::pointwise_grad_weight<T>(shape, in<T>(grad), in<T>(x), out<T>(grad_weight), torch_threads());
    }
  });
  const ScalarType dtype = x_any.scalar_type();
  return {as_dtype(grad_x, dtype), as_dtype(grad_weight, dtype)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("pointwise_conv2d", TORCH_BOX(&forward));
  m.impl("pointwise_conv2d_backward", TORCH_BOX(&backward));
  m.impl("pointwise_bn_act_training", TORCH_BOX(&norm_act_training));
}

}  // namespace deeplab_kernels
