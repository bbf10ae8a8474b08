// CPU bindings of the dense CRF's mean-field inference: checks, conversions, call.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <tuple>

#include "../cpu/dense_crf/dense_crf.h"
#include "lattice_tensors.h"

namespace deeplab_kernels {
namespace {

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;
using OptionalTensor = std::optional<Tensor>;

// +infinity as an energy forbids a label; NaN, -infinity and a point without any label left are refused.
template <typename T, typename Bits>
void check_energies(const Tensor& unary, Bits infinity) {
  const T* values = data<T>(unary);
  constexpr int64_t kBlock = 65536;
  std::atomic<bool> bad{false}, forbidden{false};
  torch_threads()((unary.numel() + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlock, unary.numel());
    // Integer comparisons, so that the loop is vectorised for any CPU.
    Bits not_finite = 0, not_allowed = 0;
    for (int64_t i = begin * kBlock; i < last; ++i) {
      Bits bits;
      std::memcpy(&bits, values + i, sizeof(bits));
      const Bits special = (bits & infinity) == infinity;
      not_finite |= special;
      not_allowed |= special & Bits(bits != infinity);
    }
    if (not_finite) forbidden.store(true, std::memory_order_relaxed);
    if (not_allowed) bad.store(true, std::memory_order_relaxed);
  });
  STD_TORCH_CHECK(!bad, "bad argument: unary must not hold NaN or -infinity");
  if (!forbidden) return;
  for (int64_t b = 0; b < unary.size(0); ++b)
    for (int64_t n = 0; n < unary.size(2); ++n) {
      bool some = false;
      for (int64_t l = 0; l < unary.size(1) && !some; ++l)
        some = std::isfinite(values[b * unary.stride(0) + l * unary.stride(1) + n * unary.stride(2)]);
      STD_TORCH_CHECK(some, "bad argument: unary must leave each point a label that is finite, got only +infinity at ",
                      "image ", b, ", point ", n);
    }
}

// unary in the dtype of computation, its memory dense in some order.
Tensor checked_unary(const Tensor& unary, ScalarType dtype) {
  Tensor result = as_dtype(unary, dtype);
  if (!result.is_contiguous() && !torch::stable::transpose(result, 1, 2).is_contiguous())
    result = torch::stable::contiguous(result);
  if (dtype == ScalarType::Double) {
    check_energies<double>(result, uint64_t{0x7ff0000000000000});
  } else {
    check_energies<float>(result, uint32_t{0x7f800000});
  }
  return result;
}

// Everything of one call but the gradients, checked and held in memory while the problem points at it.
struct Arguments {
  Arguments(const Tensor& unary, const Tensors& features, const Tensors& lattices, const Tensors& compatibility,
            const OptionalTensor& mask_any, const Ints& normalization, int64_t iterations)
      : dtype(accumulation_type(unary.scalar_type())), features(features) {
    STD_TORCH_CHECK(unary.dim() == 3 && unary.size(1) >= 1, "unary must have shape (B, L, N) with L >= 1");
    STD_TORCH_CHECK(iterations >= 0, "iterations must be at least 0");
    const size_t count = features.size();
    STD_TORCH_CHECK(compatibility.size() == count && normalization.size() == count &&
                        (lattices.empty() || lattices.size() == count),
                    "features, lattices, compatibility and normalization must be of one length");
    this->unary = checked_unary(unary, dtype);
    for (size_t m = 0; m < count; ++m) {
      check_features(features[m]);
      check_points(unary, "unary", features[m]);
      STD_TORCH_CHECK(features[m].scalar_type() == dtype, "features must be float32 (float64 for float64 unary)");
      const Tensor& c = compatibility[m];
      STD_TORCH_CHECK(c.dim() == 2 && c.size(0) == unary.size(1) && c.size(1) == unary.size(1) &&
                          c.scalar_type() == dtype && c.device() == unary.device(),
                      "compatibility must be (L, L) matrices in the dtype and on the device of features");
      matrices.push_back(torch::stable::contiguous(c));
      normalizations.push_back(normalization_of(normalization[m]));
    }
    if (mask_any) {
      mask = torch::stable::contiguous(*mask_any);
      STD_TORCH_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 2 && mask.size(0) == unary.size(0) &&
                          mask.size(1) == unary.size(2) && mask.device() == unary.device(),
                      "mask must be bool, (B, N), on the device of unary");
      has_mask = true;
    }
  }

  ScalarType dtype;
  Tensors features;
  Tensors matrices;
  std::vector<cpu::Normalization> normalizations;
  Tensor unary, mask;
  bool has_mask = false;
};

template <typename T>
std::vector<cpu::PairwiseKernel<T>> build_kernels(const Arguments& a, const Tensors& lattices) {
  std::vector<cpu::PairwiseKernel<T>> kernels;
  for (size_t m = 0; m < a.features.size(); ++m) {
    const std::string name = "features[" + std::to_string(m) + "]";
    kernels.push_back(
        {lattices.empty() ? build_lattice<T>(a.features[m], name) : lattice_of<T>(a.features[m], lattices[m], name),
         a.normalizations[m], data<T>(a.matrices[m])});
  }
  return kernels;
}

template <typename T>
cpu::MeanFieldProblem<T> problem_of(const Arguments& a, const std::vector<cpu::PairwiseKernel<T>>& kernels) {
  cpu::MeanFieldProblem<T> problem;
  problem.batch = a.unary.size(0);
  problem.labels = a.unary.size(1);
  problem.points = a.unary.size(2);
  problem.unary = strided<T>(a.unary);
  problem.mask = a.has_mask ? static_cast<const uint8_t*>(a.mask.const_data_ptr()) : nullptr;
  problem.kernels = kernels.data();
  problem.kernel_count = int(kernels.size());
  return problem;
}

Tensor empty_saved(const Arguments& a, int64_t iterations) {
  return empty_of({iterations, a.unary.size(0), a.unary.size(2), cpu::packed_channels(a.unary.size(1))}, a.unary,
                  a.dtype);
}

std::tuple<Tensor, Tensor> mean_field(const Tensor& unary, const Tensors& features, const Tensors& lattices,
                                      const Tensors& compatibility, const OptionalTensor& mask,
                                      const Ints& normalization, int64_t iterations, bool save) {
  const Arguments a(unary, features, lattices, compatibility, mask, normalization, iterations);
  Tensor energy = empty_as(unary, a.dtype, true);
  Tensor saved = save ? empty_saved(a, iterations) : empty_of({0}, unary, a.dtype);
  dispatch_accumulation(a.dtype, [&](auto value) {
    using T = decltype(value);
    const auto kernels = build_kernels<T>(a, lattices);
    cpu::mean_field<T>(problem_of<T>(a, kernels), iterations, {mutable_strided<T>(energy), {}},
                       save ? mutable_data<T>(saved) : nullptr, torch_threads());
  });
  return {as_dtype(energy, unary.scalar_type()), saved};
}

std::tuple<Tensor, Tensors, Tensors> mean_field_backward(const Tensor& grad_any, const Tensor& saved_any,
                                                         const Tensor& unary, const Tensors& features,
                                                         const Tensors& lattices, const Tensors& compatibility,
                                                         const OptionalTensor& mask, const Ints& normalization,
                                                         int64_t iterations, bool need_grad_features,
                                                         bool need_grad_compatibility) {
  const Arguments a(unary, features, lattices, compatibility, mask, normalization, iterations);
  check_same_shape(grad_any, "grad_out", unary);
  const Tensor grad = as_dtype(grad_any, a.dtype);
  const bool have_saved = saved_any.dim() == 4;
  Tensor saved = have_saved ? torch::stable::contiguous(saved_any) : empty_saved(a, iterations);
  if (have_saved) {
    check_same_shape(saved, "saved", empty_saved(a, iterations));
    STD_TORCH_CHECK(saved.scalar_type() == a.dtype, "saved must have the dtype of features");
  }
  Tensor grad_unary = empty_as(unary, a.dtype, true);
  Tensors grad_features, grad_compatibility;
  for (const Tensor& f : features) grad_features.push_back(empty_as(f, a.dtype, need_grad_features));
  for (const Tensor& c : compatibility) grad_compatibility.push_back(empty_as(c, a.dtype, need_grad_compatibility));
  dispatch_accumulation(a.dtype, [&](auto value) {
    using T = decltype(value);
    const auto kernels = build_kernels<T>(a, lattices);
    const cpu::MeanFieldProblem<T> problem = problem_of<T>(a, kernels);
    if (!have_saved) cpu::mean_field<T>(problem, iterations, {}, mutable_data<T>(saved), torch_threads());
    std::vector<T*> to_matrices;
    std::vector<cpu::Strided<const T>> feature_views;
    std::vector<cpu::Strided<T>> to_features;
    for (size_t m = 0; m < features.size(); ++m) {
      if (need_grad_compatibility) to_matrices.push_back(mutable_data<T>(grad_compatibility[m]));
      feature_views.push_back(strided<T>(features[m]));
      if (need_grad_features) to_features.push_back(mutable_strided<T>(grad_features[m]));
    }
    cpu::MeanFieldGradients<T> gradients;
    gradients.grad_energy = strided<T>(grad);
    gradients.saved = data<T>(saved);
    gradients.grad_unary = mutable_strided<T>(grad_unary);
    gradients.grad_compatibility = need_grad_compatibility ? to_matrices.data() : nullptr;
    gradients.features = need_grad_features ? feature_views.data() : nullptr;
    gradients.grad_features = need_grad_features ? to_features.data() : nullptr;
    cpu::mean_field_backward<T>(problem, iterations, gradients, torch_threads());
  });
  return {as_dtype(grad_unary, unary.scalar_type()), grad_features, grad_compatibility};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(deeplab_kernels, CPU, m) {
  m.impl("dense_crf_mean_field", TORCH_BOX(&mean_field));
  m.impl("dense_crf_mean_field_backward", TORCH_BOX(&mean_field_backward));
}

}  // namespace deeplab_kernels
