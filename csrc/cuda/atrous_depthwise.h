// Atrous depthwise convolution, alone and fused with batch normalisation and activation, on CUDA: the calls that the
// bindings and the emulator's driver make. Same operators and conventions as
// csrc/cpu/atrous_depthwise/atrous_depthwise.h.
//
// All pointers are device pointers to dense tensors in the layout shape.channels_last names; weight is (C*m, kh, kw),
// contiguous. Per-channel vectors are float (double for float64 x). Everything runs on context.stream, asynchronously,
// and every sum is formed in an order that depends on the shapes alone.
#pragma once

#include <cstdint>

#include "../core/atrous_depthwise.h"
#include "context.h"

namespace deeplab_kernels::cuda {

// gamma and beta may be null (1 and 0); mean and var may be null where the operator computes them.
struct NormParameters {
  const void* gamma;
  const void* beta;
  const void* mean;
  const void* var;
  double eps;
  Activation activation;
};

void atrous_depthwise_conv2d(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                             const void* weight, void* y);

// grad_x and grad_weight may each be null.
void atrous_depthwise_conv2d_backward(const Context& context, Dtype dtype, const DepthwiseShape& shape,
                                      const void* grad_out, const void* x, const void* weight, void* grad_x,
                                      void* grad_weight);

void atrous_depthwise_bn_act_inference(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                                       const void* weight, const NormParameters& norm, void* out);

// y may be null: then conv(x) is not kept. mean and var are outputs.
void atrous_depthwise_bn_act_training(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                                      const void* weight, const NormParameters& norm, void* out, void* y, void* mean,
                                      void* var);

// y may be null: then conv(x) is recomputed. grad_x and grad_weight may each be null.
void atrous_depthwise_bn_act_backward(const Context& context, Dtype dtype, const DepthwiseShape& shape,
                                      const void* grad_out, const void* x, const void* weight, const void* y,
                                      const NormParameters& norm, bool batch_statistics, void* grad_x,
                                      void* grad_weight, void* grad_gamma, void* grad_beta);

}  // namespace deeplab_kernels::cuda
