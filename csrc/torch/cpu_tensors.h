// What the CPU bindings of the convolutions share.
#pragma once

#include "tensors.h"

namespace deeplab_kernels {

using Ints = std::vector<int64_t>;
using OptionalTensor = std::optional<Tensor>;

template <typename T>
const T* in(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* out(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
// Null where a gradient is not wanted or a tensor was not kept (shape (0,)).
template <typename T>
T* out_or_null(const Tensor& t, bool wanted) {
  return wanted ? out<T>(t) : nullptr;
}
template <typename A>
const A* in_or_null(const OptionalTensor& t) {
  return t ? in<A>(*t) : nullptr;
}

inline Activation activation_of(int64_t code) {
  STD_TORCH_CHECK(code >= 0 && code <= 2, "activation must be 0 (none), 1 (relu) or 2 (relu6)");
  return static_cast<Activation>(code);
}

inline Tensor as_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

}  // namespace deeplab_kernels
