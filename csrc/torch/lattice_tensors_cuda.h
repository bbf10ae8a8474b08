// Helpers of the CUDA bindings over the permutohedral lattice. The Python layer has validated shapes and dtypes; the
// checks here keep a direct call of the raw operators from reading out of bounds. The numbers are not looked at,
// because the host would have to wait for the device: what is not finite gives NaN where it is.
#pragma once

#include "../core/permutohedral.h"
#include "../cuda/permutohedral.h"
#include "launcher.h"

namespace deeplab_kernels {

inline cuda::Dtype lattice_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? cuda::Dtype::kFloat64 : cuda::Dtype::kFloat32;
}

// Contiguous and in `dtype`; t itself where it is so already.
inline Tensor dense_as(const Tensor& t, ScalarType dtype) {
  return torch::stable::contiguous(t.scalar_type() == dtype ? t : torch::stable::to(t, dtype));
}
inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline std::vector<int64_t> size_of(const Tensor& t) {
  std::vector<int64_t> size;
  for (int64_t k = 0; k < t.dim(); ++k) size.push_back(t.size(k));
  return size;
}

// Of shape (0,) where it is not wanted.
inline Tensor empty_of(const std::vector<int64_t>& size, const Tensor& like, ScalarType dtype, bool wanted = true) {
  return torch::stable::empty(wanted ? size : std::vector<int64_t>{0}, dtype, std::nullopt, like.device());
}
inline void* out_or_null(const Tensor& t, bool wanted) { return wanted ? t.mutable_data_ptr() : nullptr; }

inline cuda::Normalization normalization_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 3, "normalization must be 0 (none), 1 (before), 2 (after) or 3 (symmetric)");
  return static_cast<cuda::Normalization>(code);
}

inline cuda::LatticeShape lattice_shape(const Tensor& features) {
  STD_TORCH_CHECK(features.dim() == 3, "features must have 3 dimensions");
  STD_TORCH_CHECK(features.scalar_type() == ScalarType::Float || features.scalar_type() == ScalarType::Double,
                  "features must be float32 or float64");
  STD_TORCH_CHECK(features.size(1) >= 1 && features.size(1) <= kMaxLatticeDimension,
                  "features must have 1 to 16 dimensions");
  const cuda::LatticeShape shape{features.size(0), int(features.size(1)), features.size(2)};
  STD_TORCH_CHECK(shape.entries() <= cuda::kMostEntries,
                  "bad argument: features make too large a lattice: B * N * (d + 1) must be at most 2^30 on CUDA, got ",
                  shape.entries());
  return shape;
}

// (B, C, N) beside features (B, d, N).
inline void check_points(const Tensor& t, const char* name, const Tensor& features) {
  STD_TORCH_CHECK(t.dim() == 3 && t.size(0) == features.size(0) && t.size(2) == features.size(2), name,
                  " must have 3 dimensions and the B and N of features");
  STD_TORCH_CHECK(t.device() == features.device(), name, " must be on the device of features");
}

inline void check_same_shape(const Tensor& t, const char* name, const std::vector<int64_t>& size, const Tensor& like) {
  STD_TORCH_CHECK(size_of(t) == size, name, " has the wrong shape");
  STD_TORCH_CHECK(t.device() == like.device(), name, " is on the wrong device");
}

// A built lattice: `packed`, or a new one where it is empty. features must be contiguous.
inline Tensor lattice_of(Launcher& launcher, const Tensor& features, const std::optional<Tensor>& packed) {
  const cuda::LatticeShape shape = lattice_shape(features);
  const cuda::Dtype dtype = lattice_dtype(features.scalar_type());
  const int64_t bytes = cuda::lattice_bytes(dtype, shape);
  if (packed && packed->numel() > 0) {
    STD_TORCH_CHECK(packed->scalar_type() == ScalarType::Byte && packed->is_contiguous() &&
                        packed->device() == features.device() && packed->numel() == bytes,
                    "lattice does not belong to these features: shape, dtype or device differ");
    return *packed;
  }
  const Tensor built = empty_vector(bytes, features, ScalarType::Byte);
  cuda::lattice_build(launcher.context(), dtype, shape, features.const_data_ptr(), built.mutable_data_ptr());
  return built;
}

}  // namespace deeplab_kernels
