// What the bindings of the atrous spatial pyramid see of their tensors.
#pragma once

#include "tensors.h"

namespace deeplab_kernels {

using Tensors = std::vector<Tensor>;

// Geometry of each branch; weight (R, C, 1, kh, kw), dilation R pairs.
inline std::vector<DepthwiseShape> pyramid_branches(const Tensor& x, const Tensor& weight,
                                                    const std::vector<int64_t>& dilation) {
  STD_TORCH_CHECK(weight.dim() == 5 && weight.size(0) > 0, "weight must have shape (branches, C, 1, kh, kw)");
  STD_TORCH_CHECK(int64_t(dilation.size()) == 2 * weight.size(0), "dilation takes 2 values a branch");
  std::vector<DepthwiseShape> branches;
  for (int64_t r = 0; r < weight.size(0); ++r) {
    std::vector<int64_t> padding;
    for (int64_t axis = 0; axis < 2; ++axis) {
      const int64_t rate = dilation[size_t(2 * r + axis)], kernel = weight.size(3 + axis);
      STD_TORCH_CHECK(rate > 0 && rate <= kLargestParameter && kernel > 0 && kernel <= kLargestParameter,
                      "kernel and dilation must be positive and below 2^31");
      const int64_t total = rate * (kernel - 1);
      padding.insert(padding.end(), {total / 2, total - total / 2});
    }
    branches.push_back(depthwise_shape(x, torch::stable::select(weight, 0, r), {1, 1}, padding,
                                       {dilation[size_t(2 * r)], dilation[size_t(2 * r + 1)]}));
  }
  STD_TORCH_CHECK(weight.size(1) == x.size(1), "weight must have one filter for each channel of x");
  return branches;
}

// (R, C) in the accumulation dtype.
inline void check_branch_vectors(const Tensor& v, const char* name, int64_t branches, const Tensor& x) {
  STD_TORCH_CHECK(v.dim() == 2 && v.size(0) == branches && v.size(1) == x.size(1) && v.is_contiguous(), name,
                  " must be contiguous, of shape (branches, C)");
  STD_TORCH_CHECK(v.scalar_type() == accumulation_type(x.scalar_type()), name,
                  " must have the accumulation dtype (float32; float64 for float64 x)");
  STD_TORCH_CHECK(v.device() == x.device(), name, " must be on the device of x");
}

inline void check_branch_count(const Tensors& tensors, const char* name, int64_t branches) {
  STD_TORCH_CHECK(int64_t(tensors.size()) == branches, name, " must hold one tensor for each branch");
}

// What a call returns: the mean (shape (0,) where it is not wanted), one image for each branch, (R, C) vectors.
inline Tensor empty_pooled(const Tensor& x, bool wanted) {
  const std::vector<int64_t> size = wanted ? std::vector<int64_t>{x.size(0), x.size(1), 1, 1} : std::vector<int64_t>{0};
  return torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device());
}

inline Tensors empty_images(const Tensor& x, int64_t count, bool channels_last) {
  Tensors images;
  for (int64_t r = 0; r < count; ++r)
    images.push_back(empty_nchw({x.size(0), x.size(1), x.size(2), x.size(3)}, x, channels_last));
  return images;
}

inline Tensor empty_branch_vectors(const Tensor& x, int64_t branches) {
  return torch::stable::empty({branches, x.size(1)}, accumulation_type(x.scalar_type()), std::nullopt, x.device());
}

}  // namespace deeplab_kernels
