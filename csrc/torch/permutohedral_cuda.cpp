// CUDA bindings of the permutohedral lattice's filter: checks, conversions, call. As permutohedral_cpu.cpp, on the
// current stream.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lattice_tensors_cuda.h"

namespace deeplab_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

Tensor lattice(const Tensor& features_any) {
  lattice_shape(features_any);
  Launcher launcher(features_any);
  return lattice_of(launcher, torch::stable::contiguous(features_any), std::nullopt);
}

Tensor filter(const Tensor& values_any, const Tensor& features_any, const OptionalTensor& packed, int64_t normalization,
              bool transpose) {
  const cuda::LatticeShape shape = lattice_shape(features_any);
  check_points(values_any, "values", features_any);
  const cuda::Normalization norm = normalization_of(normalization);
  Launcher launcher(features_any);
  const ScalarType dtype = features_any.scalar_type();
  const Tensor features = torch::stable::contiguous(features_any), values = dense_as(values_any, dtype);
  const Tensor built = lattice_of(launcher, features, packed);
  Tensor out = empty_of(size_of(values), values, dtype);
  cuda::permutohedral_filter(launcher.context(), lattice_dtype(dtype), shape, built.const_data_ptr(), values.size(1),
                             values.const_data_ptr(), norm, transpose, out.mutable_data_ptr());
  return as_dtype(out, values_any.scalar_type());
}

std::tuple<Tensor, Tensor> filter_backward(const Tensor& grad_any, const Tensor& values_any, const Tensor& features_any,
                                           const OptionalTensor& packed, int64_t normalization, bool transpose,
                                           bool need_grad_values, bool need_grad_features) {
  const cuda::LatticeShape shape = lattice_shape(features_any);
  check_points(values_any, "values", features_any);
  check_same_shape(grad_any, "grad_out", size_of(values_any), values_any);
  const cuda::Normalization norm = normalization_of(normalization);
  Launcher launcher(features_any);
  const ScalarType dtype = features_any.scalar_type();
  const Tensor features = torch::stable::contiguous(features_any);
  const Tensor grad = dense_as(grad_any, dtype), values = dense_as(values_any, dtype);
  const Tensor built = lattice_of(launcher, features, packed);
  Tensor grad_values = empty_of(size_of(values), values, dtype, need_grad_values);
  Tensor grad_features = empty_of(size_of(features), features, dtype, need_grad_features);
  cuda::permutohedral_filter_backward(
      launcher.context(), lattice_dtype(dtype), shape, built.const_data_ptr(), values.size(1), grad.const_data_ptr(),
      values.const_data_ptr(), features.const_data_ptr(), norm, transpose, out_or_null(grad_values, need_grad_values),
      out_or_null(grad_features, need_grad_features));
  return {as_dtype(grad_values, values_any.scalar_type()), grad_features};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CUDA, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&lattice));
  m.impl("permutohedral_filter", TORCH_BOX(&filter));
  m.impl("permutohedral_filter_backward", TORCH_BOX(&filter_backward));
}

}  // namespace deeplab_kernels
