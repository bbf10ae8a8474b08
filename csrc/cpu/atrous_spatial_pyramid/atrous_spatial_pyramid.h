// All rates of an atrous spatial pyramid and the image's mean in one pass over x, on the CPU. Types, layouts and null
// pointers as in atrous_depthwise.h; weight is (R, C, kh, kw), per-channel vectors are (R, C), contiguous.
#pragma once

#include "../atrous_depthwise/atrous_depthwise.h"

namespace deeplab_kernels::cpu {

// Branches of stride 1 and multiplier 1 that keep the image's size; they differ in rate and padding alone.
struct PyramidShape {
  const DepthwiseShape* branches;
  int64_t count;

  const DepthwiseShape& image() const { return branches[0]; }
  int64_t channels() const { return branches[0].channels; }
};

// mean null: the convolutions alone. out: `count` images. pooled: (N, C), the mean of x over the image; may be null.
template <typename T>
void atrous_spatial_pyramid(const PyramidShape& shape, const T* x, const T* weight,
                            const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                            T* const* out, T* pooled, const Parallel& parallel);

// conv may be null: then the convolutions' outputs are not kept. mean and var are outputs.
template <typename T>
void atrous_spatial_pyramid_training(const PyramidShape& shape, const T* x, const T* weight,
                                     const NormParameters<acc_t<T>>& norm, T* const* out, T* const* conv,
                                     acc_t<T>* mean, acc_t<T>* var, T* pooled, const Parallel& parallel);

template <typename T>
struct PyramidGradients {
  using A = acc_t<T>;
  const T* const* grad_out;
  const T* grad_pooled;  // (N, C); null: none
  const T* x;
  const T* weight;
  const T* const* conv;  // null: recomputed
  T* grad_x;             // null: unwanted, as the next
  T* grad_weight;
  A* grad_gamma;
  A* grad_beta;
};

// mean null: of the convolutions alone.
template <typename T>
void atrous_spatial_pyramid_backward(const PyramidShape& shape, const PyramidGradients<T>& tensors,
                                     const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                                     bool batch_statistics, const Parallel& parallel);

}  // namespace deeplab_kernels::cpu
