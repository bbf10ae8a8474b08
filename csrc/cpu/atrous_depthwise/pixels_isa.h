// Training pixel by pixel (NHWC) as each instruction set's file offers it to atrous_depthwise.cpp.
#pragma once

#include "isa.h"

namespace deeplab_kernels::cpu {

// As Kernels' functions, of float and bfloat16. False where this does not serve, or others are faster: nothing was
// done.
#define DK_DECLARE_ISA(isa)                                                                                          \
  namespace isa {                                                                                                    \
  template <typename T>                                                                                              \
  struct PixelKernels {                                                                                              \
    using A = acc_t<T>;                                                                                              \
    static bool training(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, \
                         T* y, A* mean, A* var, Activation pre_activation, const Parallel& parallel);                \
    static bool backward(const DepthwiseShape& shape, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,   \
                         bool batch_statistics, const Parallel& parallel);                                           \
  };                                                                                                                 \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
