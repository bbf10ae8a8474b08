// The kernels as each instruction set's file offers them to atrous_depthwise.cpp, which checks what the CPU has.
#pragma once

#include "../instruction_set.h"
#include "atrous_depthwise.h"
#include "plan.h"

namespace deeplab_kernels::cpu {

// What a backward pass reads and writes; null where absent or unwanted.
template <typename T>
struct BackwardTensors {
  using A = acc_t<T>;
  const T* grad_out;
  const T* x;
  const T* weight;
  const T* y;
  T* grad_x;
  T* grad_weight;
  A* grad_gamma;
  A* grad_beta;
  Activation pre_activation = Activation::kNone;  // of x; grad_x is the gradient before it
};

// norm of forward() and backward() may be null: the convolution alone.
#define DK_DECLARE_ISA(isa)                                                                                     \
  namespace isa {                                                                                               \
  template <typename T>                                                                                         \
  struct Kernels {                                                                                              \
    using A = acc_t<T>;                                                                                         \
    static void forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,        \
                        const Parallel& parallel);                                                              \
    static void training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y, \
                         A* mean, A* var, Activation pre_activation, const Parallel& parallel);                 \
    static void backward(const Plan& plan, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,         \
                         bool batch_statistics, const Parallel& parallel);                                      \
  };                                                                                                            \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
