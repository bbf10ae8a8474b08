// What the CUDA bindings of the convolutions share.
#pragma once

#include "../cuda/context.h"
#include "tensors.h"

namespace deeplab_kernels {

using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

inline cuda::Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return cuda::Dtype::kFloat32;
    case ScalarType::Double:
      return cuda::Dtype::kFloat64;
    case ScalarType::Half:
      return cuda::Dtype::kFloat16;
    case ScalarType::BFloat16:
      return cuda::Dtype::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "the CUDA kernels take float32, float64, float16 and bfloat16");
  }
}

inline const void* in(const Tensor& t) { return t.const_data_ptr(); }
inline const void* in_or_null(const OptionalTensor& t) { return t ? in(*t) : nullptr; }
inline void* out(const Tensor& t) { return t.mutable_data_ptr(); }
inline void* out_or_null(const Tensor& t, bool wanted) { return wanted ? out(t) : nullptr; }

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "activation must be 0 (none), 1 (relu) or 2 (relu6)");
  return static_cast<Activation>(code);
}

}  // namespace deeplab_kernels
