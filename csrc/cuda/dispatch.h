// From run-time storage types and untyped pointers to those of a call.
#pragma once

#include <vector>

#include "context.h"
#include "pack.h"

namespace deeplab_kernels::cuda {

// Calls f with a value of the storage type.
template <typename F>
void dispatch(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float());
    case Dtype::kFloat64:
      return f(double());
    case Dtype::kFloat16:
      return f(__half());
    case Dtype::kBFloat16:
      return f(__nv_bfloat16());
  }
}

template <typename T>
const T* in(const void* pointer) {
  return static_cast<const T*>(pointer);
}
template <typename T>
T* out(void* pointer) {
  return static_cast<T*>(pointer);
}

// `count` pointers, or none where there is no array.
template <typename P, typename Untyped>
std::vector<P> all(Untyped* const* pointers, int64_t count) {
  std::vector<P> typed;
  for (int64_t r = 0; pointers && r < count; ++r) typed.push_back(static_cast<P>(pointers[r]));
  return typed;
}

}  // namespace deeplab_kernels::cuda
