// CUDA bindings of the dense CRF's mean-field inference: checks, conversions, call. As dense_crf_cpu.cpp, on the
// current stream.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../cuda/dense_crf.h"
#include "lattice_tensors_cuda.h"

namespace deeplab_kernels {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// Everything of one call but its results, checked and held in memory while the problem points at it.
struct Arguments {
  Arguments(const Tensor& unary_any, const Tensors& features_any, const Tensors& lattices_any,
            const Tensors& compatibility, const OptionalTensor& mask_any, const Ints& normalization, int64_t iterations)
      : launcher(unary_any), dtype(accumulation_type(unary_any.scalar_type())) {
    STD_TORCH_CHECK(unary_any.dim() == 3 && unary_any.size(1) >= 1, "unary must have shape (B, L, N) with L >= 1");
    STD_TORCH_CHECK(unary_any.size(1) <= cuda::kMostLabels, "bad argument: unary must have at most ", cuda::kMostLabels,
                    " labels on CUDA, got ", unary_any.size(1));
    STD_TORCH_CHECK(iterations >= 0 && iterations <= kLargestParameter, "iterations must be at least 0");
    const size_t count = features_any.size();
    STD_TORCH_CHECK(compatibility.size() == count && normalization.size() == count &&
                        (lattices_any.empty() || lattices_any.size() == count),
                    "features, lattices, compatibility and normalization must be of one length");
    unary = dense_as(unary_any, dtype);
    const int64_t labels = unary.size(1);
    for (size_t m = 0; m < count; ++m) {
      const cuda::LatticeShape shape = lattice_shape(features_any[m]);
      check_points(unary, "unary", features_any[m]);
      STD_TORCH_CHECK(features_any[m].scalar_type() == dtype, "features must be float32 (float64 for float64 unary)");
      const Tensor& c = compatibility[m];
      STD_TORCH_CHECK(c.dim() == 2 && c.size(0) == labels && c.size(1) == labels && c.scalar_type() == dtype &&
                          c.device() == unary.device(),
                      "compatibility must be (L, L) matrices in the dtype and on the device of features");
      features.push_back(torch::stable::contiguous(features_any[m]));
      matrices.push_back(torch::stable::contiguous(c));
      lattices.push_back(
          lattice_of(launcher, features[m], lattices_any.empty() ? OptionalTensor() : OptionalTensor(lattices_any[m])));
      kernels.push_back({shape.dimension, features[m].const_data_ptr(), lattices[m].const_data_ptr(),
                         matrices[m].const_data_ptr(), normalization_of(normalization[m]), nullptr, nullptr});
    }
    if (mask_any) {
      mask = torch::stable::contiguous(*mask_any);
      STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == unary.size(0) &&
                          mask.size(1) == unary.size(2) && mask.device() == unary.device(),
                      "mask must be bool, (B, N), on the device of unary");
    }
    problem = {unary.size(0),          labels,
               unary.size(2),          int(iterations),
               unary.const_data_ptr(), mask_any ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr,
               kernels.data(),         int(count)};
  }
  Arguments(const Arguments&) = delete;

  std::vector<int64_t> saved_size() const {
    return {problem.iterations, problem.batch, problem.points, (problem.labels + 7) / 8 * 8};
  }

  Launcher launcher;
  ScalarType dtype;
  Tensor unary, mask;
  Tensors features, matrices, lattices;
  std::vector<cuda::PairwiseKernel> kernels;
  cuda::MeanFieldProblem problem;
};

std::tuple<Tensor, Tensor> mean_field(const Tensor& unary, const Tensors& features, const Tensors& lattices,
                                      const Tensors& compatibility, const OptionalTensor& mask,
                                      const Ints& normalization, int64_t iterations, bool save) {
  Arguments a(unary, features, lattices, compatibility, mask, normalization, iterations);
  Tensor energy = empty_of(size_of(unary), unary, a.dtype);
  Tensor saved = empty_of(a.saved_size(), unary, a.dtype, save);
  cuda::dense_crf_mean_field(a.launcher.context(), lattice_dtype(a.dtype), a.problem, energy.mutable_data_ptr(),
                             out_or_null(saved, save && iterations > 0));
  return {as_dtype(energy, unary.scalar_type()), saved};
}

std::tuple<Tensor, Tensors, Tensors> mean_field_backward(const Tensor& grad_any, const Tensor& saved_any,
                                                         const Tensor& unary, const Tensors& features,
                                                         const Tensors& lattices, const Tensors& compatibility,
                                                         const OptionalTensor& mask, const Ints& normalization,
                                                         int64_t iterations, bool need_grad_features,
                                                         bool need_grad_compatibility) {
  Arguments a(unary, features, lattices, compatibility, mask, normalization, iterations);
  check_same_shape(grad_any, "grad_out", size_of(unary), unary);
  const Tensor grad = dense_as(grad_any, a.dtype);
  const bool have_saved = saved_any.dim() == 4;
  const Tensor saved = torch::stable::contiguous(saved_any);
  if (have_saved) {
    check_same_shape(saved, "saved", a.saved_size(), unary);
    STD_TORCH_CHECK(saved.scalar_type() == a.dtype, "saved must have the dtype of features");
  }
  Tensor grad_unary = empty_of(size_of(unary), unary, a.dtype);
  Tensors grad_features, grad_compatibility;
  for (size_t m = 0; m < a.kernels.size(); ++m) {
    grad_features.push_back(empty_of(size_of(a.features[m]), unary, a.dtype, need_grad_features));
    grad_compatibility.push_back(empty_of(size_of(a.matrices[m]), unary, a.dtype, need_grad_compatibility));
    a.kernels[m].grad_features = out_or_null(grad_features[m], need_grad_features);
    a.kernels[m].grad_compatibility = out_or_null(grad_compatibility[m], need_grad_compatibility);
  }
  cuda::dense_crf_mean_field_backward(a.launcher.context(), lattice_dtype(a.dtype), a.problem, grad.const_data_ptr(),
                                      have_saved ? saved.const_data_ptr() : nullptr, grad_unary.mutable_data_ptr());
  return {as_dtype(grad_unary, unary.scalar_type()), grad_features, grad_compatibility};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CUDA, m) {
  m.impl("dense_crf_mean_field", TORCH_BOX(&mean_field));
  m.impl("dense_crf_mean_field_backward", TORCH_BOX(&mean_field_backward));
}

}  // namespace deeplab_kernels
