// The kernels as each instruction set's file offers them to atrous_spatial_pyramid.cpp.
#pragma once

#include "../atrous_depthwise/isa.h"
#include "atrous_spatial_pyramid.h"

namespace deeplab_kernels::cpu {

// Each returns false, having done nothing, where this code does not serve. norm: (R, C); null where it may be: the
// convolutions alone. The weights are finite.
#define DK_DECLARE_ISA(isa)                                                                                       \
  namespace isa {                                                                                                 \
  template <typename T>                                                                                           \
  struct PyramidKernels {                                                                                         \
    using A = acc_t<T>;                                                                                           \
    static bool inference(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>* norm,       \
                          T* const* out, T* pooled, const Parallel& parallel);                                    \
    static bool training(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm,        \
                         T* const* out, A* mean, A* var, T* pooled, const Parallel& parallel);                    \
    static bool backward(const PyramidShape& shape, const PyramidGradients<T>& tensors, const BatchNorm<A>* norm, \
                         bool batch_statistics, const Parallel& parallel);                                        \
  };                                                                                                              \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
