// An operand of a matrix product, as it lies in memory.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

// Element (i, k), k running along the sum, lies at data + i * outer + k * inner; one of the two distances is 1.
template <typename A>
struct Factor {
  const A* data;
  int64_t outer, inner;
  int64_t next;  // from image to image
};

}  // namespace deeplab_kernels::cpu
