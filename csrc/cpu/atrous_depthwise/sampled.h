// Depthwise convolutions whose rate is a multiple of their stride. All their taps fall on the pixels that have one
// place modulo the stride: these make a smaller image, of which the convolution has stride 1 and a smaller rate.
#pragma once

#include "../workspace.h"
#include "atrous_depthwise.h"

namespace deeplab_kernels::cpu {

// Along one side: pixels first, first + stride, ... of x.
struct SampledSide {
  int64_t first, size, pad;
  SampledSide(int64_t in, int64_t stride, int64_t padding)
      : first((stride - padding % stride) % stride),
        size(first < in ? (in - first + stride - 1) / stride : 0),
        pad((padding + first) / stride) {}
};

// NCHW only: the kernels of NHWC lose nothing to a stride.
inline bool can_be_sampled(const DepthwiseShape& s) {
  return !s.channels_last && (s.stride_h > 1 || s.stride_w > 1) && s.rate_h % s.stride_h == 0 &&
         s.rate_w % s.stride_w == 0 && SampledSide(s.in_h, s.stride_h, s.pad_top).size > 0 &&
         SampledSide(s.in_w, s.stride_w, s.pad_left).size > 0;
}

// Calls f(the convolution of stride 1, its image).
template <typename T, typename F>
void with_sampled(const DepthwiseShape& s, const T* x, const Parallel& parallel, const F& f) {
  const SampledSide rows(s.in_h, s.stride_h, s.pad_top), columns(s.in_w, s.stride_w, s.pad_left);
  const Workspace memory(size_t(s.batch * s.channels * rows.size * columns.size) * sizeof(T));
  T* sampled = memory.as<T>();
  parallel(s.batch * s.channels, [&](int64_t begin, int64_t end) {
    T* to = sampled + begin * rows.size * columns.size;
    for (int64_t plane = begin; plane < end; ++plane)
      for (int64_t h = 0; h < rows.size; ++h) {
        const T* row = x + (plane * s.in_h + rows.first + h * s.stride_h) * s.in_w + columns.first;
        for (int64_t w = 0; w < columns.size; ++w) *to++ = row[w * s.stride_w];
      }
  });
  DepthwiseShape shape = s;
  shape.in_h = rows.size, shape.in_w = columns.size, shape.pad_top = rows.pad, shape.pad_left = columns.pad;
  shape.rate_h /= s.stride_h, shape.rate_w /= s.stride_w, shape.stride_h = shape.stride_w = 1;
  f(shape, static_cast<const T*>(sampled));
}

}  // namespace deeplab_kernels::cpu
