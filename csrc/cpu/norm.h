// Batch normalisation and activation as the kernels take them. gamma and beta may be null (1 and 0).
#pragma once

#include "../core/atrous_depthwise.h"

namespace deeplab_kernels::cpu {

template <typename A>
struct NormParameters {
  const A* gamma;
  const A* beta;
  double eps;
  Activation activation;
};

// With its statistics.
template <typename A>
struct BatchNorm {
  const A* gamma;
  const A* beta;
  const A* mean;
  const A* var;
  double eps;
  Activation activation;
};

}  // namespace deeplab_kernels::cpu
