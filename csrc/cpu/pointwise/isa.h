// The matrix products as each instruction set's file offers them to pointwise.cpp.
#pragma once

#include "../factor.h"
#include "../instruction_set.h"
#include "pointwise.h"

namespace deeplab_kernels::cpu {

// out (rows, columns), dense, = the sum over k of left (i, k) right (j, k). Images are products of their own, next_out
// apart, or all terms of one sum. mean and var are those of the columns of one image, or null.
template <typename A>
struct MatrixProduct {
  int64_t rows, columns, depth, images;
  bool one_sum;
  Factor<A> left, right;
  A* out;
  int64_t next_out;
  A* mean = nullptr;
  A* var = nullptr;
};

#define DK_DECLARE_ISA(isa)                                                     \
  namespace isa {                                                               \
  template <typename A>                                                         \
  struct Pointwise {                                                            \
    static void run(const MatrixProduct<A>& product, const Parallel& parallel); \
  };                                                                            \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
