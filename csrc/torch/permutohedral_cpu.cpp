// CPU bindings of the permutohedral lattice's filter: checks, conversions, call.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "lattice_tensors.h"

namespace deeplab_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

template <typename T>
cpu::Lattice<T> lattice_of(const Tensor& features, const OptionalTensor& packed) {
  return packed ? deeplab_kernels::lattice_of<T>(features, *packed) : build_lattice<T>(features, "features");
}

Tensor lattice(const Tensor& features) {
  check_features(features);
  Tensor packed;
  dispatch_accumulation(features.scalar_type(), [&](auto value) {
    const auto built = build_lattice<decltype(value)>(features, "features");
    packed = empty_of({int64_t(built.packed_bytes())}, features, ScalarType::Byte);
    built.pack(packed.mutable_data_ptr());
  });
  return packed;
}

Tensor filter(const Tensor& values_any, const Tensor& features, const OptionalTensor& packed, int64_t normalization,
              bool transpose) {
  check_features(features);
  check_points(values_any, "values", features);
  const cpu::Normalization norm = normalization_of(normalization);
  const ScalarType dtype = features.scalar_type();
  const Tensor values = as_dtype(values_any, dtype);
  Tensor out = empty_as(values, dtype, true);
  dispatch_accumulation(dtype, [&](auto value) {
    using T = decltype(value);
    const auto built = lattice_of<T>(features, packed);
    cpu::permutohedral_filter<T>(built, values.size(1), strided<T>(values), mutable_strided<T>(out), norm,
                                 cpu::LatticeScale::kExactSum, transpose, torch_threads());
  });
  return as_dtype(out, values_any.scalar_type());
}

std::tuple<Tensor, Tensor> filter_backward(const Tensor& grad_any, const Tensor& values_any, const Tensor& features,
                                           const OptionalTensor& packed, int64_t normalization, bool transpose,
                                           bool need_grad_values, bool need_grad_features) {
  check_features(features);
  check_points(values_any, "values", features);
  check_same_shape(grad_any, "grad_out", values_any);
  const cpu::Normalization norm = normalization_of(normalization);
  const ScalarType dtype = features.scalar_type();
  const Tensor grad = as_dtype(grad_any, dtype), values = as_dtype(values_any, dtype);
  Tensor grad_values = empty_as(values, dtype, need_grad_values);
  Tensor grad_features = empty_as(features, dtype, need_grad_features);
  if (values.numel() == 0) {
    torch::stable::zero_(grad_features);
    return {as_dtype(grad_values, values_any.scalar_type()), grad_features};
  }
  dispatch_accumulation(dtype, [&](auto value) {
    using T = decltype(value);
    const auto built = lattice_of<T>(features, packed);
    cpu::permutohedral_filter_backward<T>(built, values.size(1), strided<T>(grad), strided<T>(values),
                                          strided<T>(features),
                                          mutable_strided_or_null<T>(grad_values, need_grad_values),
                                          mutable_strided_or_null<T>(grad_features, need_grad_features), norm,
                                          cpu::LatticeScale::kExactSum, transpose, torch_threads());
  });
  return {as_dtype(grad_values, values_any.scalar_type()), grad_features};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("permutohedral_lattice", TORCH_BOX(&lattice));
  m.impl("permutohedral_filter", TORCH_BOX(&filter));
  m.impl("permutohedral_filter_backward", TORCH_BOX(&filter_backward));
}

}  // namespace deeplab_kernels
