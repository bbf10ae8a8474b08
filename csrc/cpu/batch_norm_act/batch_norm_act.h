// Batch normalisation with the batch's own statistics, addition of a residual and activation, on the CPU.
//
//   out = act(gamma (z - mean) / sqrt(var + eps) + beta + residual)
//
// Passes over memory. Forward: z twice (its statistics come first; a map that fits the caches is read from there the
// second time), the residual once, out once; the floor is z, residual and out once each, and is met where whoever made
// z gives its statistics (pointwise.h). Backward: grad_out, z (and out, where it tells the activation's mask) twice,
// the gradient of z once, that of the residual once if an activation makes it another tensor than grad_out. As separate
// operators: forward z twice, out twice with its activation and twice more with its residual; backward two more reads
// and one more write for the activation.
#pragma once

#include "../atrous_depthwise/atrous_depthwise.h"

namespace deeplab_kernels::cpu {

// All tensors are (batch, channels, pixels), or (batch, pixels, channels) with channels_last.
struct MapShape {
  int64_t batch, channels, pixels;
  bool channels_last;
};

// residual may be null. mean and var, the biased variance, are outputs, or those of z if `given`.
template <typename T>
void batch_norm_act_training(const MapShape& shape, const T* z, const T* residual, const NormParameters<acc_t<T>>& norm,
                             T* out, acc_t<T>* mean, acc_t<T>* var, bool given, const Parallel& parallel);

// out: where there was a residual; null otherwise, when z tells the activation's mask. grad_residual may be null.
template <typename T>
void batch_norm_act_backward(const MapShape& shape, const T* grad_out, const T* z, const T* out,
                             const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var, T* grad_z,
                             T* grad_residual, acc_t<T>* grad_gamma, acc_t<T>* grad_beta, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
