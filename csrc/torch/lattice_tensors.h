// Helpers of the CPU bindings over the permutohedral lattice. The Python layer has validated shapes and dtypes; the
// checks here keep a direct call of the raw operators from reading out of bounds. What is wrong with the numbers is
// found by the kernels: messages that begin with "bad argument: " come back from the Python functions as ValueError.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>

#include "../cpu/permutohedral/permutohedral.h"
#include "filter_tensors.h"

namespace deeplab_kernels {

template <typename T>
cpu::Strided<const T> strided(const Tensor& t) {
  return {data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
cpu::Strided<T> mutable_strided(const Tensor& t) {
  return {mutable_data<T>(t), t.stride(0), t.stride(1), t.stride(2)};
}

// `wanted` is false for the placeholder of shape (0,) of a gradient that is not.
template <typename T>
cpu::Strided<T> mutable_strided_or_null(const Tensor& t, bool wanted) {
  return wanted ? mutable_strided<T>(t) : cpu::Strided<T>();
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor empty_of(std::vector<int64_t> size, const Tensor& like, ScalarType dtype) {
  return torch::stable::empty(size, dtype, std::nullopt, like.device());
}

inline cpu::Normalization normalization_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 3, "normalization must be 0 (none), 1 (before), 2 (after) or 3 (symmetric)");
  return static_cast<cpu::Normalization>(code);
}

inline void check_features(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 3, "features must have 3 dimensions");
  STD_TORCH_CHECK(features.scalar_type() == ScalarType::Float || features.scalar_type() == ScalarType::Double,
                  "features must be float32 or float64");
  STD_TORCH_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxLatticeDimension,
                  "features must have 1 to 16 dimensions");
}

// (B, C, N) beside features (B, d, N).
inline void check_points(const Tensor& t, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == features.size(0) && t.size(2) == features.size(2), name,
                  " must have 3 dimensions and the B and N of features");
  STD_TORCH_CHECK(t.device() == features.device(), name, " must be on the device of features");
}

inline void check_same_shape(const Tensor& t, const char* name, const Tensor& other) {
  STD_TORCH_CHECK(t.dim() == other.dim(), name, " has the wrong number of dimensions");
  for (int64_t k = 0; k < t.dim(); ++k) STD_TORCH_CHECK(t.size(k) == other.size(k), name, " has the wrong shape");
  STD_TORCH_CHECK(t.device() == other.device(), name, " is on the wrong device");
}

inline std::string problem_message(const cpu::FeatureProblem& problem, const std::string& name) {
  const std::string where = "image " + std::to_string(problem.image) + ", axis " + std::to_string(problem.axis) +
                            ", point " + std::to_string(problem.point);
  if (problem.kind == cpu::FeatureProblem::kNotFinite)
    return "bad argument: " + name + " must be finite, got NaN or infinity at " + where;
  return "bad argument: " + name + " must stay below " + std::to_string(problem.limit) +
         " standard deviations in absolute value, so that the lattice's coordinates fit into int32, got more at " +
         where;
}

template <typename T>
cpu::Lattice<T> build_lattice(const Tensor& features, const std::string& name) {
  cpu::Lattice<T> lattice;
  try {
    lattice = cpu::Lattice<T>(features.size(0), int(features.size(1)), features.size(2), strided<T>(features),
                              torch_threads());
  } catch (const std::length_error& error) {
    STD_TORCH_CHECK(false, "bad argument: ", name, " make too large a lattice: ", error.what());
  }
  if (lattice.problem().kind != cpu::FeatureProblem::kNone)
    STD_TORCH_CHECK(false, problem_message(lattice.problem(), name));
  return lattice;
}

// The lattice that `packed` holds, or a new one where it is empty.
template <typename T>
cpu::Lattice<T> lattice_of(const Tensor& features, const Tensor& packed, const std::string& name = "features") {
  if (packed.numel() == 0) return build_lattice<T>(features, name);
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous(),
                  "lattice must be contiguous and uint8");
  STD_TORCH_CHECK(packed.device() == features.device(), "lattice must be on the device of features");
  cpu::Lattice<T> lattice = cpu::Lattice<T>::unpack(packed.const_data_ptr(), size_t(packed.numel()));
  // A lattice without points keeps no batch.
  const bool fits = lattice.dimension() == features.size(1) && lattice.points() == features.size(2) &&
                    (lattice.points() == 0 || lattice.batch() == features.size(0));
  STD_TORCH_CHECK(fits, "lattice does not belong to these features: shape or dtype differ");
  return lattice;
}

}  // namespace deeplab_kernels
