// Whether values can be multiplied by zero.
#pragma once

#include <cmath>
#include <cstdint>

namespace deeplab_kernels::cpu {

// A: the type in which a value is looked at.
template <typename A, typename T>
bool all_finite(const T* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i)
    if (!std::isfinite(A(values[i]))) return false;
  return true;
}

}  // namespace deeplab_kernels::cpu
