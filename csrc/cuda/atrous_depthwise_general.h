// Kernels for any kernel size, stride, rate, padding, multiplier and layout: one output (or input) element a thread.
// What the 3x3 kernels (atrous_depthwise_nhwc.h, atrous_depthwise_nchw.h) do not take comes here.
#pragma once

#include "norm.h"
#include "reduce.h"

namespace deeplab_kernels::cuda {

constexpr int kGeneralThreads = 256;

// Quotient and remainder, with the far cheaper 32-bit division where the values allow.
__device__ __forceinline__ int64_t divide(int64_t a, int64_t b, int64_t* remainder) {
  if (uint64_t(a | b) >> 32 == 0) {
    const uint32_t quotient = uint32_t(a) / uint32_t(b);
    *remainder = uint32_t(a) - quotient * uint32_t(b);
    return quotient;
  }
  const int64_t quotient = a / b;
  *remainder = a - quotient * b;
  return quotient;
}

struct Site {
  int64_t n, c, i, j;
};

// Position of element `index` of a dense tensor of `channels` planes of h x w.
__device__ __forceinline__ Site site_of(int64_t index, int64_t channels, int64_t h, int64_t w, bool channels_last) {
  Site site;
  int64_t rest;
  if (channels_last) {
    rest = divide(index, channels, &site.c);
    rest = divide(rest, w, &site.j);
    site.n = divide(rest, h, &site.i);
  } else {
    rest = divide(index, w, &site.j);
    rest = divide(rest, h, &site.i);
    site.n = divide(rest, channels, &site.c);
  }
  return site;
}

__device__ __forceinline__ int64_t offset_of(const Site& s, int64_t channels, int64_t h, int64_t w,
                                             bool channels_last) {
  return channels_last ? ((s.n * h + s.i) * w + s.j) * channels + s.c : ((s.n * channels + s.c) * h + s.i) * w + s.j;
}

template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, 2)
    conv_general(DepthwiseShape s, const T* x, const T* weight, T* out, Norm<acc_t<T>> norm) {
  using A = acc_t<T>;
  const int64_t total = s.batch * s.out_channels() * s.out_h * s.out_w;
  const int64_t index = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (index >= total) return;
  const Site site = site_of(index, s.out_channels(), s.out_h, s.out_w, s.channels_last);
  const int64_t step = s.channels_last ? s.channels : 1;
  int64_t unused;
  const Site corner{site.n, divide(site.c, s.multiplier, &unused), 0, 0};
  const T* plane = x + offset_of(corner, s.channels, s.in_h, s.in_w, s.channels_last);
  const T* taps = weight + site.c * s.taps();
  A sum = A(0);
  for (int64_t u = 0; u < s.kernel_h; ++u) {
    const int64_t h = tap_input(site.i, u, s.stride_h, s.rate_h, s.pad_top);
    if (h < 0 || h >= s.in_h) continue;
    for (int64_t v = 0; v < s.kernel_w; ++v) {
      const int64_t w = tap_input(site.j, v, s.stride_w, s.rate_w, s.pad_left);
      if (w < 0 || w >= s.in_w) continue;
      sum += widen(plane[(h * s.in_w + w) * step]) * widen(taps[u * s.kernel_w + v]);
    }
  }
  if (norm.mean) sum = activate(affine(norm, site.c)(sum), norm.activation);
  out[index] = narrow<T>(sum);
}

// grad_x as a gather: every input element collects from the outputs that read it.
template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, 2)
    grad_x_general(DepthwiseShape s, const T* grad_y, const T* weight, T* grad_x) {
  using A = acc_t<T>;
  const int64_t total = s.batch * s.channels * s.in_h * s.in_w;
  const int64_t index = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (index >= total) return;
  const Site site = site_of(index, s.channels, s.in_h, s.in_w, s.channels_last);
  const int64_t step = s.channels_last ? s.out_channels() : 1;
  A sum = A(0);
  for (int64_t u = 0; u < s.kernel_h; ++u) {
    const int64_t i = tap_output(site.i, u, s.stride_h, s.rate_h, s.pad_top, s.out_h);
    if (i < 0) continue;
    for (int64_t v = 0; v < s.kernel_w; ++v) {
      const int64_t j = tap_output(site.j, v, s.stride_w, s.rate_w, s.pad_left, s.out_w);
      if (j < 0) continue;
      for (int64_t q = 0; q < s.multiplier; ++q) {
        const Site corner{site.n, site.c * s.multiplier + q, 0, 0};
        const T* plane = grad_y + offset_of(corner, s.out_channels(), s.out_h, s.out_w, s.channels_last);
        sum += widen(plane[(i * s.out_w + j) * step]) * widen(weight[(corner.c * s.kernel_h + u) * s.kernel_w + v]);
      }
    }
  }
  grad_x[index] = narrow<T>(sum);
}

// One tap of the weight gradient per block: partial[slice][tap][channel]. Threads: x over channels, y over output
// pixels.
template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, 2)
    grad_weight_general(DepthwiseShape s, const T* grad_y, const T* x, int64_t slices, acc_t<T>* partial) {
  using A = acc_t<T>;
  int64_t group, tap, v;
  const int64_t channels = s.out_channels(), groups = (channels + blockDim.x - 1) / blockDim.x;
  const int64_t rest = divide(blockIdx.x, groups, &group);
  const int64_t slice = divide(rest, s.taps(), &tap), u = divide(tap, s.kernel_w, &v);
  const int64_t c = group * blockDim.x + threadIdx.x;
  Sums<A, 1> sum;
  sum.clear();
  if (c < channels) {
    const int64_t pixels = s.batch * s.out_h * s.out_w;
    int64_t unused;
    const int64_t in_channel = divide(c, s.multiplier, &unused);
    for (int64_t p = slice * blockDim.y + threadIdx.y; p < pixels; p += slices * blockDim.y) {
      Site site{0, c, 0, 0};
      site.n = divide(divide(p, s.out_w, &site.j), s.out_h, &site.i);
      const int64_t h = tap_input(site.i, u, s.stride_h, s.rate_h, s.pad_top);
      const int64_t w = tap_input(site.j, v, s.stride_w, s.rate_w, s.pad_left);
      if (h < 0 || h >= s.in_h || w < 0 || w >= s.in_w) continue;
      sum.v[0] += widen(grad_y[offset_of(site, channels, s.out_h, s.out_w, s.channels_last)]) *
                  widen(x[offset_of({site.n, in_channel, h, w}, s.channels, s.in_h, s.in_w, s.channels_last)]);
    }
  }
  sum = merge_over_y(sum, dynamic_shared<Sums<A, 1>>());
  if (c < channels && threadIdx.y == 0) partial[(slice * s.taps() + tap) * channels + c] = sum.v[0];
}

}  // namespace deeplab_kernels::cuda
