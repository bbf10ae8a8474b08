// What the CPU bindings of batch normalisation share.
#pragma once

#include "../cpu/batch_norm_act/batch_norm_act.h"
#include "cpu_tensors.h"

namespace deeplab_kernels {

inline cpu::MapShape map_shape(const Tensor& z) {
  STD_TORCH_CHECK(z.dim() == 4, "z must have 4 dimensions");
  return {z.size(0), z.size(1), z.size(2) * z.size(3), !z.is_contiguous() && is_channels_last(z)};
}

// t in the layout and dtype that the kernels take.
inline OptionalTensor like_z(const OptionalTensor& t, const char* name, const Tensor& z, const cpu::MapShape& shape) {
  if (!t) return std::nullopt;
  STD_TORCH_CHECK(t->dim() == 4 && t->scalar_type() == z.scalar_type() && t->device() == z.device(), name,
                  " must have 4 dimensions and the dtype and device of z");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(t->size(d) == z.size(d), name, " must have the shape of z");
  return with_layout(widened(*t), shape.channels_last);
}

inline Tensor empty_like(const Tensor& z, const cpu::MapShape& shape) {
  return empty_nchw({z.size(0), z.size(1), z.size(2), z.size(3)}, z, shape.channels_last);
}

inline void check_affine(const OptionalTensor& gamma, const OptionalTensor& beta, const Tensor& z) {
  if (gamma) check_vector(*gamma, "gamma", z.size(1), z);
  if (beta) check_vector(*beta, "beta", z.size(1), z);
}

}  // namespace deeplab_kernels
