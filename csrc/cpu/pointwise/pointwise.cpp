// What each product multiplies, and the choice of the instruction set; the kernels are in kernels.cpp.
#include "pointwise.h"

#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T>
void run(const MatrixProduct<T>& product, const Parallel& parallel) {
  with_kernels<portable::Pointwise<T>, avx2::Pointwise<T>, avx512::Pointwise<T>>(
      [&](auto kernels) { kernels.run(product, parallel); });
}

// A map with its pixels, or its channels, as the outer index.
template <typename T>
Factor<T> by_pixel(const T* map, int64_t channels, const PointwiseShape& s) {
  return s.channels_last ? Factor<T>{map, channels, 1, s.pixels * channels}
                         : Factor<T>{map, 1, s.pixels, s.pixels * channels};
}
template <typename T>
Factor<T> by_channel(const T* map, int64_t channels, const PointwiseShape& s) {
  const Factor<T> pixels = by_pixel(map, channels, s);
  return {map, pixels.inner, pixels.outer, pixels.next};
}

// to (N, out_channels) = sum over channels of from and weight, whose element (out channel, channel) is at outer, inner.
// mean and var of it, or null, in NHWC only.
template <typename T>
void convolve(const PointwiseShape& s, int64_t channels, int64_t out_channels, const T* from, Factor<T> weight, T* to,
              T* mean, T* var, const Parallel& parallel) {
  const Factor<T> pixels = by_pixel(from, channels, s);
  if (s.channels_last)
    run<T>({s.batch * s.pixels, out_channels, channels, 1, false, pixels, weight, to, 0, mean, var}, parallel);
  else
    run<T>({out_channels, s.pixels, channels, s.batch, false, weight, pixels, to, out_channels * s.pixels}, parallel);
}

}  // namespace

template <typename T>
void pointwise_conv2d(const PointwiseShape& s, const T* x, const T* weight, T* out, T* mean, T* var,
                      const Parallel& parallel) {
  convolve<T>(s, s.channels, s.out_channels, x, {weight, s.channels, 1, 0}, out, mean, var, parallel);
}

template <typename T>
void pointwise_grad_x(const PointwiseShape& s, const T* grad_out, const T* weight, T* grad_x,
                      const Parallel& parallel) {
  convolve<T>(s, s.out_channels, s.channels, grad_out, {weight, 1, s.channels, 0}, grad_x, nullptr, nullptr, parallel);
}

template <typename T>
void pointwise_grad_weight(const PointwiseShape& s, const T* grad_out, const T* x, T* grad_weight,
                           const Parallel& parallel) {
  run<T>({s.out_channels, s.channels, s.pixels, s.batch, true, by_channel(grad_out, s.out_channels, s),
          by_channel(x, s.channels, s), grad_weight, 0},
         parallel);
}

#define DK_INSTANTIATE(T)                                                                                    \
  template void pointwise_conv2d<T>(const PointwiseShape&, const T*, const T*, T*, T*, T*, const Parallel&); \
  template void pointwise_grad_x<T>(const PointwiseShape&, const T*, const T*, T*, const Parallel&);         \
  template void pointwise_grad_weight<T>(const PointwiseShape&, const T*, const T*, T*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
