// bfloat16 under the type that the per-instruction-set files know it by.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include "precision.h"

namespace deeplab_kernels::cpu {

template <typename T>
struct Stored {
  using type = T;
};
template <>
struct Stored<torch::headeronly::BFloat16> {
  using type = BFloat16Bits;
};

// The same memory.
template <typename T>
const typename Stored<T>::type* stored(const T* p) {
  return reinterpret_cast<const typename Stored<T>::type*>(p);
}
template <typename T>
typename Stored<T>::type* stored(T* p) {
  return reinterpret_cast<typename Stored<T>::type*>(p);
}
template <typename T>
const typename Stored<T>::type* const* stored_all(const T* const* p) {
  return reinterpret_cast<const typename Stored<T>::type* const*>(p);
}
template <typename T>
typename Stored<T>::type* const* stored_all(T* const* p) {
  return reinterpret_cast<typename Stored<T>::type* const*>(p);
}

}  // namespace deeplab_kernels::cpu
