// Passes over one or two whole activations with a few values per channel: statistics, normalise + activate, and the two
// passes of the backward of normalise + activate. Memory-bound; every access is a 16-byte vector where the layout
// allows.
//
//   channel_sums       y            -> scale * sum
//   channel_moments    y            -> mean, var
//   normalise          y            -> act(norm(y))
//   norm_grad_sums     grad_out, y  -> sum of g, sum of g * xhat
//   norm_grad          grad_out, y  -> dy
//
// Floors (bytes of one activation Y): Y, Y, 2Y, 2Y, 3Y.
#pragma once

#include "norm.h"
#include "reduce.h"

namespace deeplab_kernels::cuda {

// A dense activation as [outer][channels][length] (NCHW: outer = N, length = H*W) or, channels_last, [length][channels]
// with length = N*H*W. The length is worked through in chunks; chunk k of all outer*chunks belongs to slice k % slices.
struct ChannelView {
  int64_t outer, channels, length;
  int64_t chunk, chunks;
  int64_t slices;
  bool aligned;  // packs may be accessed whole
};

constexpr int kPassThreads = 256;
constexpr int kPassPacks = 8;  // channel packs of a block, channels_last

template <typename T>
ChannelView channel_view(const DepthwiseShape& s, bool aligned, int64_t target_blocks) {
  const int64_t pixels = s.out_h * s.out_w;
  ChannelView view;
  view.channels = s.out_channels();
  view.outer = s.channels_last ? 1 : s.batch;
  view.length = s.channels_last ? s.batch * pixels : pixels;
  view.chunk = s.channels_last ? 4 * kPassThreads / kPassPacks : 4 * kPassThreads * kVector<T>;
  view.chunks = ceil_div(view.length, view.chunk);
  view.aligned = aligned && (!s.channels_last || view.channels % kVector<T> == 0);
  const int64_t across = s.channels_last ? ceil_div(view.channels, kPassPacks * kVector<T>) : view.channels;
  const int64_t wanted = ceil_div(target_blocks, at_least(across, 1));
  view.slices = at_least(at_most(wanted, view.outer * view.chunks), 1);
  return view;
}

inline dim3 pass_block(const DepthwiseShape& s) {
  return s.channels_last ? dim3(kPassPacks, kPassThreads / kPassPacks) : dim3(1, kPassThreads);
}

template <typename T>
int64_t pass_blocks(const DepthwiseShape& s, const ChannelView& view) {
  return view.slices * (s.channels_last ? ceil_div(view.channels, kPassPacks * kVector<T>) : view.channels);
}

// Which channels and slice this block has.
template <typename T, bool kChannelsLast>
struct PassSite {
  static constexpr int kPack = kVector<T>;
  static constexpr int kChannels = kChannelsLast ? kPack : 1;  // channels of a pack
  int64_t channel, slice;

  __device__ __forceinline__ explicit PassSite(const ChannelView& view) {
    if (kChannelsLast) {
      const int64_t groups = (view.channels + kPassPacks * kPack - 1) / (kPassPacks * kPack);
      slice = blockIdx.x / groups;
      channel = ((blockIdx.x - slice * groups) * kPassPacks + threadIdx.x) * kPack;
    } else {
      slice = blockIdx.x / view.channels;
      channel = blockIdx.x - slice * view.channels;
    }
  }

  // Calls f(offset, part) for every pack of this thread.
  template <typename F>
  __device__ __forceinline__ void each(const ChannelView& view, F&& f) const {
    if (kChannelsLast && channel >= view.channels) return;
    for (int64_t item = slice; item < view.outer * view.chunks; item += view.slices) {
      const int64_t outer = item / view.chunks, begin = (item - outer * view.chunks) * view.chunk;
      const int64_t end = begin + view.chunk < view.length ? begin + view.chunk : view.length;
      if (kChannelsLast) {
        const int64_t left = view.channels - channel;
        const Part part{0, left < kPack ? int(left) : kPack, view.aligned};
        for (int64_t p = begin + threadIdx.y; p < end; p += blockDim.y) f(p * view.channels + channel, part);
      } else {
        // Packs start at multiples of kPack of the whole tensor, so that they are aligned whatever the plane's size.
        const int64_t plane = (outer * view.channels + channel) * view.length;
        const int64_t first = plane + begin, last = plane + end;
        for (int64_t o = first / kPack * kPack + threadIdx.y * kPack; o < last; o += blockDim.y * kPack)
          f(o, Part{o < first ? int(first - o) : 0, last - o < kPack ? int(last - o) : kPack, view.aligned});
      }
    }
  }
};

// partial: [slices][channels]
template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPassThreads, 2)
    channel_sums(ChannelView view, const T* y, acc_t<T> scale, acc_t<T>* partial) {
  using A = acc_t<T>;
  using Site = PassSite<T, kChannelsLast>;
  const Site site(view);
  Sums<A, Site::kPack> total;
  total.clear();
  site.each(view, [&](int64_t offset, Part part) {
    const Pack<A, Site::kPack> value = load_part<T, Site::kPack>(y + offset, part);
#pragma unroll
    for (int e = 0; e < Site::kPack; ++e) total.v[e] += value.v[e];
  });
  Sums<A, Site::kChannels> sums;
  sums.clear();
#pragma unroll
  for (int e = 0; e < Site::kPack; ++e) sums.v[kChannelsLast ? e : 0] += total.v[e];
  sums = merge_over_y(sums, dynamic_shared<Sums<A, Site::kChannels>>());
  if (threadIdx.y != 0) return;
#pragma unroll
  for (int e = 0; e < Site::kChannels; ++e)
    if (site.channel + e < view.channels) partial[site.slice * view.channels + site.channel + e] = scale * sums.v[e];
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPassThreads, 2) channel_moments(ChannelView view, const T* y, acc_t<T>* partial) {
  using A = acc_t<T>;
  using Site = PassSite<T, kChannelsLast>;
  using Value = Moments<A, Site::kChannels>;
  const Site site(view);
  Value total;
  total.clear();
  site.each(view, [&](int64_t offset, Part part) {
    const Pack<A, Site::kPack> value = load_part<T, Site::kPack>(y + offset, part);
    if constexpr (kChannelsLast) {
      total.add(value);
    } else {
      total.merge(moments_of(value, part));
    }
  });
  total = merge_over_y(total, dynamic_shared<Value>());
  if (threadIdx.y != 0) return;
  A* row = partial + site.slice * 3 * view.channels + site.channel;
#pragma unroll
  for (int e = 0; e < Site::kChannels; ++e) {
    if (site.channel + e >= view.channels) break;
    row[e] = total.count;
    row[view.channels + e] = total.mean[e];
    row[2 * view.channels + e] = total.m2[e];
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPassThreads, 2)
    normalise(ChannelView view, const T* y, Norm<acc_t<T>> norm, T* out) {
  using A = acc_t<T>;
  using Site = PassSite<T, kChannelsLast>;
  const Site site(view);
  Affines<A, Site::kChannels> affines;
  affines.load(norm, site.channel, view.channels);
  site.each(view, [&](int64_t offset, Part part) {
    Pack<A, Site::kPack> value = load_part<T, Site::kPack>(y + offset, part);
#pragma unroll
    for (int e = 0; e < Site::kPack; ++e)
      value.v[e] = activate(affines.channel[kChannelsLast ? e : 0](value.v[e]), norm.activation);
    store_part<T, Site::kPack>(out + offset, value, part);
  });
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPassThreads, 2)
    norm_grad_sums(ChannelView view, const T* grad_out, const T* y, Norm<acc_t<T>> norm, acc_t<T>* partial) {
  using A = acc_t<T>;
  using Site = PassSite<T, kChannelsLast>;
  constexpr int kPack = Site::kPack, kChannels = Site::kChannels;
  const Site site(view);
  Affines<A, kChannels> affines;
  affines.load(norm, site.channel, view.channels);
  Sums<A, 2 * kPack> total;  // sum of g, then of g * (y - mean)
  total.clear();
  site.each(view, [&](int64_t offset, Part part) {
    const Pack<A, kPack> grad = load_part<T, kPack>(grad_out + offset, part);
    const Pack<A, kPack> value = load_part<T, kPack>(y + offset, part);
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (e < part.first || e >= part.last) continue;
      const Affine<A>& a = affines.channel[kChannelsLast ? e : 0];
      const A g = activation_slope(a(value.v[e]), norm.activation) == A(0) ? A(0) : grad.v[e];
      total.v[e] += g;
      total.v[kPack + e] += g * (value.v[e] - a.mean);
    }
  });
  Sums<A, 2 * kChannels> sums;
  sums.clear();
#pragma unroll
  for (int e = 0; e < kPack; ++e) {
    sums.v[kChannelsLast ? e : 0] += total.v[e];
    sums.v[kChannels + (kChannelsLast ? e : 0)] += total.v[kPack + e];
  }
  sums = merge_over_y(sums, dynamic_shared<Sums<A, 2 * kChannels>>());
  if (threadIdx.y != 0) return;
  A* row = partial + site.slice * 2 * view.channels + site.channel;
#pragma unroll
  for (int e = 0; e < kChannels; ++e) {
    if (site.channel + e >= view.channels) break;
    row[e] = sums.v[e];
    row[view.channels + e] = sums.v[kChannels + e] * inverse_deviation(norm.var[site.channel + e], norm.eps);
  }
}

template <typename T, bool kChannelsLast>
__global__ void __launch_bounds__(kPassThreads, 2)
    norm_grad(ChannelView view, const T* grad_out, const T* y, NormGrad<acc_t<T>> norm, T* grad_y) {
  using A = acc_t<T>;
  using Site = PassSite<T, kChannelsLast>;
  const Site site(view);
  AffineGrad<A> affines[Site::kChannels];
#pragma unroll
  for (int e = 0; e < Site::kChannels; ++e)
    if (site.channel + e < view.channels) affines[e] = affine_grad(norm, site.channel + e);
  site.each(view, [&](int64_t offset, Part part) {
    Pack<A, Site::kPack> grad = load_part<T, Site::kPack>(grad_out + offset, part);
    const Pack<A, Site::kPack> value = load_part<T, Site::kPack>(y + offset, part);
#pragma unroll
    for (int e = 0; e < Site::kPack; ++e)
      if (e >= part.first && e < part.last)
        grad.v[e] = affines[kChannelsLast ? e : 0](grad.v[e], value.v[e], norm.norm.activation);
    store_part<T, Site::kPack>(grad_y + offset, grad, part);
  });
}

// partial[slices][2][channels] -> the two sums.
template <typename A>
__global__ void __launch_bounds__(kMergeColumns* kMergeLanes)
    merge_norm_grad_sums(const A* partial, int64_t slices, int64_t channels, A* sum_g, A* sum_g_xhat) {
  using Value = Sums<double, 2>;
  const int64_t c = int64_t(blockIdx.x) * kMergeColumns + threadIdx.x;
  Value total;
  total.clear();
  if (c < channels) {
    for (int64_t s = threadIdx.y; s < slices; s += kMergeLanes) {
      total.v[0] += double(partial[2 * s * channels + c]);
      total.v[1] += double(partial[(2 * s + 1) * channels + c]);
    }
  }
  total = merge_over_y(total, dynamic_shared<Value>());
  if (c < channels && threadIdx.y == 0) {
    sum_g[c] = A(total.v[0]);
    sum_g_xhat[c] = A(total.v[1]);
  }
}

}  // namespace deeplab_kernels::cuda
