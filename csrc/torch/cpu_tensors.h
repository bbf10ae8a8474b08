// What the CPU bindings of the convolutions share.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "../cpu/atrous_depthwise/atrous_depthwise.h"
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

// Calls f with a value of the storage type, so that the kernels' template argument can be deduced from it.
template <typename F>
void dispatch(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(float());
    case ScalarType::Double:
      return f(double());
    case ScalarType::BFloat16:
      return f(torch::headeronly::BFloat16());
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64, float16 or bfloat16");
  }
}

template <typename A>
cpu::NormParameters<A> norm_parameters(const OptionalTensor& gamma, const OptionalTensor& beta, double eps,
                                       int64_t activation) {
  return {in_or_null<A>(gamma), in_or_null<A>(beta), eps, activation_of(activation)};
}

// float16 has no kernels of its own on the CPU: it is computed in float32, at the price of the conversions.
inline Tensor widened(const Tensor& t) {
  return t.scalar_type() == ScalarType::Half ? torch::stable::to(t, ScalarType::Float) : t;
}

// For the operators that have no bfloat16 kernels either.
inline Tensor computed(const Tensor& t) {
  return t.scalar_type() == ScalarType::BFloat16 ? torch::stable::to(t, ScalarType::Float) : widened(t);
}

// As dispatch(), after computed().
template <typename F>
void dispatch_computed(const Tensor& x, F&& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32, float64, float16 or bfloat16");
  f(float());
}

}  // namespace deeplab_kernels
