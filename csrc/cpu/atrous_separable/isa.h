// The kernels as each instruction set's file offers them to atrous_separable.cpp, which prepares the per-channel
// vectors.
#pragma once

#include "../instruction_set.h"
#include "atrous_separable.h"

namespace deeplab_kernels::cpu {

// z = scale * y + shift, then the activation; one value a channel.
template <typename T>
struct ChannelAffine {
  const T* scale;
  const T* shift;
  Activation activation;
};

template <typename T>
struct SeparableJob {
  DepthwiseShape shape;
  int64_t out_channels;
  SeparableTensors<T> tensors;
  Activation pre_activation;
  ChannelAffine<T> depthwise;  // scale null: none
  ChannelAffine<T> pointwise;  // padded to a multiple of kChannelPadding
  bool finite_weights;         // depthwise
};
constexpr int64_t kChannelPadding = 32;

#define DK_DECLARE_ISA(isa)                                                \
  namespace isa {                                                          \
  template <typename T>                                                    \
  struct Separable {                                                       \
    static void run(const SeparableJob<T>& job, const Parallel& parallel); \
  };                                                                       \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
