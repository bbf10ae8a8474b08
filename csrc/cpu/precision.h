// What numbers are stored as and summed in.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using acc_t = typename Accumulate<T>::type;

// bfloat16 as it lies in memory: the upper half of a float.
struct BFloat16Bits {
  uint16_t bits;
};

}  // namespace deeplab_kernels::cpu
