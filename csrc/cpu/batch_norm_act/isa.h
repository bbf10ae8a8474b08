// The kernels as each instruction set's file offers them to batch_norm_act.cpp.
#pragma once

#include "../atrous_depthwise/isa.h"
#include "batch_norm_act.h"

namespace deeplab_kernels::cpu {

// What a backward pass reads and writes; out and grad_residual may be null.
template <typename T>
struct MapGradients {
  const T* grad_out;
  const T* z;
  const T* out;
  T* grad_z;
  T* grad_residual;
  acc_t<T>* grad_gamma;
  acc_t<T>* grad_beta;
};

#define DK_DECLARE_ISA(isa)                                                                                           \
  namespace isa {                                                                                                     \
  template <typename T>                                                                                               \
  struct BatchNormAct {                                                                                               \
    using A = acc_t<T>;                                                                                               \
    static void training(const MapShape& shape, const T* z, const T* residual, const NormParameters<A>& norm, T* out, \
                         A* mean, A* var, bool given, const Parallel& parallel);                                      \
    static void backward(const MapShape& shape, const MapGradients<T>& tensors, const BatchNorm<A>& norm,             \
                         const Parallel& parallel);                                                                   \
  };                                                                                                                  \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
