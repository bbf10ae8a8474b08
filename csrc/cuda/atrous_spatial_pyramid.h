// All depthwise rates of an atrous spatial pyramid, and the image's mean, in one pass over the input on CUDA: the calls
// that the bindings and the emulator's driver make. Same operators as csrc/torch/schema.cpp describes; conventions as
// in atrous_depthwise.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "atrous_depthwise.h"

namespace deeplab_kernels::cuda {

// x, every output and every gradient are (N, C, H, W) in the layout channels_last names; weight is (R, C, kh, kw),
// per-channel vectors are (R, C), pooled is (N, C).
struct PyramidShape {
  int64_t batch, channels, height, width;
  int64_t kernel_h, kernel_w;
  bool channels_last;
  std::vector<int64_t> rates;  // vertical, horizontal; for each branch

  int64_t branches() const { return int64_t(rates.size()) / 2; }
  int64_t plane() const { return height * width; }
  int64_t count() const { return batch * channels * plane(); }
  int64_t taps() const { return kernel_h * kernel_w; }

  // The padding keeps the image's size; where it is odd, the larger part comes last.
  DepthwiseShape branch(int64_t r) const {
    const int64_t rate_h = rates[std::size_t(2 * r)], rate_w = rates[std::size_t(2 * r + 1)];
    return {batch,
            channels,
            1,
            height,
            width,
            height,
            width,
            kernel_h,
            kernel_w,
            1,
            1,
            rate_h * (kernel_h - 1) / 2,
            rate_w * (kernel_w - 1) / 2,
            rate_h,
            rate_w,
            channels_last};
  }
};

// norm.mean null: the convolutions alone. pooled may be null.
void atrous_spatial_pyramid(const Context& context, Dtype dtype, const PyramidShape& shape, const void* x,
                            const void* weight, const NormParameters& norm, void* const* out, void* pooled);

// conv may be null: then conv_r(x) are not kept. mean and var are outputs.
void atrous_spatial_pyramid_training(const Context& context, Dtype dtype, const PyramidShape& shape, const void* x,
                                     const void* weight, const NormParameters& norm, void* const* out,
                                     void* const* conv, void* mean, void* var, void* pooled);

// norm.mean null: of the convolutions alone; grad_gamma and grad_beta are then not written. conv may be null: then it
// is recomputed. grad_pooled, grad_x and grad_weight may each be null.
void atrous_spatial_pyramid_backward(const Context& context, Dtype dtype, const PyramidShape& shape,
                                     const void* const* grad_out, const void* grad_pooled, const void* x,
                                     const void* weight, const void* const* conv, const NormParameters& norm,
                                     bool batch_statistics, void* grad_x, void* grad_weight, void* grad_gamma,
                                     void* grad_beta);

}  // namespace deeplab_kernels::cuda
