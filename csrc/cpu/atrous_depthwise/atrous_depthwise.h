// Atrous depthwise convolution, alone and fused with batch normalisation and activation, on the CPU.
//
// Storage types: float, double, BFloat16. Accumulation and per-channel vectors: double for double, float otherwise.
// x, y and their gradients are dense in the layout shape.channels_last names; weight is (C*m, kh, kw), contiguous.
#pragma once

#include "../instruction_set.h"
#include "../norm.h"
#include "../parallel.h"
#include "../precision.h"

namespace deeplab_kernels::cpu {

template <typename T>
void atrous_depthwise_conv2d(const DepthwiseShape& shape, const T* x, const T* weight, T* y, const Parallel& parallel);

// grad_x and grad_weight may each be null.
template <typename T>
void atrous_depthwise_conv2d_backward(const DepthwiseShape& shape, const T* grad_out, const T* x, const T* weight,
                                      T* grad_x, T* grad_weight, const Parallel& parallel);

template <typename T>
void atrous_depthwise_bn_act_inference(const DepthwiseShape& shape, const T* x, const T* weight,
                                       const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                                       T* out, const Parallel& parallel);

// The convolution of pre_activation(x). y may be null: then it is not kept. mean and var are outputs.
template <typename T>
void atrous_depthwise_bn_act_training(const DepthwiseShape& shape, const T* x, const T* weight,
                                      const NormParameters<acc_t<T>>& norm, T* out, T* y, acc_t<T>* mean, acc_t<T>* var,
                                      Activation pre_activation, const Parallel& parallel);

// y may be null: then the convolution is recomputed. grad_x and grad_weight may each be null.
template <typename T>
void atrous_depthwise_bn_act_backward(const DepthwiseShape& shape, const T* grad_out, const T* x, const T* weight,
                                      const T* y, const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean,
                                      const acc_t<T>* var, bool batch_statistics, T* grad_x, T* grad_weight,
                                      acc_t<T>* grad_gamma, acc_t<T>* grad_beta, Activation pre_activation,
                                      const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
