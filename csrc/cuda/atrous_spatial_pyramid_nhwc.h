// 3x3 kernels of the atrous spatial pyramid for channels_last tensors.
//
// A tap moves by a multiple of its branch's rate, so that rows step apart, where step divides every rate, never meet
// others: a block owns a few packs of channels of the rows phase, phase + step, ... of one image. It copies these rows
// to shared memory, reading x once, and makes the outputs of every branch from there. With DeepLab's rates (6, 12, 18
// on 33 x 33, twice that on 65 x 65) a slab has six rows. A thread owns a pack of channels and every so-many-th pixel.
//
//   pyramid_nhwc           every branch [normalise + activate] [statistics], the mean    floor: X + R X bytes
//   pyramid_backward_nhwc  grad_x, summed over the branches and the mean, and the weight gradient, from dy or from
//                          grad_out and y                                                floor: 2X + R X (2X + 2R X)
//
// Backward reads x once from memory and R times from the caches. Slabs too large for shared memory (rates without a
// common divisor, on images from about 55 x 55 on) go the general way.
#pragma once

#include "atrous_depthwise_nhwc.h"
#include "atrous_spatial_pyramid_branches.h"

namespace deeplab_kernels::cuda {

constexpr int kSlabThreads = 128, kSlabBackwardThreads = 64;
constexpr int64_t kSlabSharedBytes = 32 << 10;  // aimed at, so that several blocks fit a multiprocessor

struct SlabTiling {
  int step, phases;                    // of rows
  int64_t packs, groups, pixel_lanes;  // threads across channels, blocks across channels, threads across pixels
  int64_t shared_bytes;                // 0: a slab does not fit
};

// `bytes(packs, threads)` is the shared memory of a block with so many packs of channels; a pack has `pack_channels`.
template <typename Bytes>
SlabTiling slab_tiling(const PyramidShape& s, int pack_channels, int threads, Bytes&& bytes) {
  SlabTiling t{};
  t.step = int(row_step(s));
  t.phases = int(at_most(t.step, s.height));
  t.packs = kNhwcPacks;
  auto pixels = [&] { return ceil_div(s.height, t.step) * s.width; };
  auto needed = [&] { return bytes(pixels(), t.packs); };
  // Two packs fill a 32-byte sector of memory: fewer only where nothing else fits.
  while (t.packs > 1 && needed() > (t.packs > 2 ? kSlabSharedBytes : kMaxSharedBytes)) t.packs /= 2;
  while (t.packs > 1 && t.packs / 2 * pack_channels >= s.channels) t.packs /= 2;
  if (needed() > kMaxSharedBytes) return t;
  t.groups = ceil_div(s.channels, t.packs * pack_channels);
  t.pixel_lanes = at_least(at_most(threads / t.packs, pixels()), 1);
  t.shared_bytes = needed();
  return t;
}

// Which image, phase and channels this block has.
struct SlabSite {
  int64_t n, first_channel, c;  // c: this thread's first channel
  int phase, rows;

  __device__ __forceinline__ SlabSite(const SlabTiling& t, int pack_channels, int height) {
    const int64_t slab = blockIdx.x / t.groups;
    first_channel = (blockIdx.x - slab * t.groups) * t.packs * pack_channels;
    c = first_channel + threadIdx.x * pack_channels;
    n = slab / t.phases;
    phase = int(slab - n * t.phases);
    rows = (height - phase + t.step - 1) / t.step;
  }

  // Calls f(pixel, row, column, offset in a plane of the image) for this thread's pixels of the slab.
  template <typename F>
  __device__ __forceinline__ void each(const SlabTiling& t, int width, F&& f) const {
    int row = int(threadIdx.y) / width, column = int(threadIdx.y) - row * width;
    for (int pixel = threadIdx.y; row < rows; pixel += blockDim.y) {
      f(pixel, row, column, int64_t(phase + t.step * row) * width + column);
      for (column += blockDim.y; column >= width; column -= width) ++row;
    }
  }
};

// Calls f(tap, pixel of the slab) for the taps of a pixel that lie in the image, which are `down` rows and `right`
// columns apart.
template <typename F>
__device__ __forceinline__ void each_tap(int row, int column, int down, int right, int rows, int width, F&& f) {
#pragma unroll
  for (int u = 0; u < 3; ++u) {
    const int h = row + (u - 1) * down;
    if (h < 0 || h >= rows) continue;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      const int w = column + (v - 1) * right;
      if (w >= 0 && w < width) f(3 * u + v, h * width + w);
    }
  }
}

// Of packs of 16 bytes.
DK_HOST_DEVICE int64_t slab_bytes(int64_t pixels, int64_t packs) { return pixels * packs * 16; }

// Shared memory: the slab, then the normalisation of all branches or room to merge sums in.
template <typename T>
int64_t slab_forward_bytes(int64_t pixels, int64_t packs, int64_t branches, bool moments) {
  constexpr int V = kVector<T>;
  using A = acc_t<T>;
  const int64_t merge = kSlabThreads * at_least(moments ? sizeof(Moments<A, V>) : 0, sizeof(Sums<A, V>));
  return slab_bytes(pixels, packs) + at_least(merge, branches * packs * V * int64_t(sizeof(Affine<A>)));
}

// Statistics go to partial[slice][3][branches * C], slice = n * phases + phase; the sums for the mean, already divided
// by the number of pixels, to pool[phase][N * C]. Either may be null; out[r] may be null where there are statistics.
template <typename T, bool kMoments>
__global__ void __launch_bounds__(kSlabThreads, kMoments ? 3 : 4)
    pyramid_nhwc(PyramidBranches<T> b, SlabTiling tiling, const T* x, const T* weight, Norm<acc_t<T>> norm,
                 acc_t<T>* partial, acc_t<T>* pool) {
  using A = acc_t<T>;
  constexpr int V = kVector<T>;
  const SlabSite site(tiling, V, b.height);
  const int packs = int(tiling.packs), width = b.width;
  const bool active = site.c < b.channels;
  T* slab = dynamic_shared<T>();  // [pixel][packs * V]
  unsigned char* rest = dynamic_shared<unsigned char>() + slab_bytes(ceil_div(b.height, tiling.step) * width, packs);
  const int64_t image = site.n * b.height * width * b.channels + site.c;
  Sums<A, V> total;
  total.clear();
  if (active) {
    site.each(tiling, width, [&](int pixel, int, int, int64_t offset) {
      const Raw<T, V> raw = load_raw<T, V>(x + image + offset * b.channels);
      *reinterpret_cast<Raw<T, V>*>(slab + (pixel * packs + threadIdx.x) * V) = raw;
      if (pool) {
        const Pack<A, V> value = unpack<T, V>(raw);
#pragma unroll
        for (int e = 0; e < V; ++e) total.v[e] += value.v[e];
      }
    });
  }
  if (pool) {
    total = merge_over_y(total, reinterpret_cast<Sums<A, V>*>(rest));
    if (active && threadIdx.y == 0) {
      A* row = pool + (site.phase * b.batch + site.n) * b.channels + site.c;
#pragma unroll
      for (int e = 0; e < V; ++e) row[e] = total.v[e] / A(b.height * width);
    }
    __syncthreads();
  }
  Affine<A>* affines = reinterpret_cast<Affine<A>*>(rest);  // [branch][packs * V]
  if (!kMoments && norm.mean) {
    for (int k = threadIdx.y * packs + threadIdx.x; k < b.count * packs * V; k += packs * blockDim.y) {
      const int r = k / (packs * V);
      const int64_t c = site.first_channel + k - r * packs * V;
      if (c < b.channels) affines[k] = affine(norm, r * b.channels + c);
    }
  }
  __syncthreads();
  for (int r = 0; r < b.count; ++r) {
    const int down = b.rate_h[r] / tiling.step, right = b.rate_w[r];
    T* out = b.out[r];
    Moments<A, kMoments ? V : 1> moments;
    moments.clear();
    if (active) {
      Taps<T, V> taps;
      taps.load(weight + (r * b.channels + site.c) * 9);
      const Affine<A>* affine_r = affines + (r * packs + threadIdx.x) * V;
      site.each(tiling, width, [&](int, int row, int column, int64_t offset) {
        Pack<A, V> sum;
        clear(sum);
        each_tap(row, column, down, right, site.rows, width, [&](int tap, int pixel) {
          const T* address = slab + (pixel * packs + threadIdx.x) * V;
          multiply_add(sum, taps.v[tap], unpack<T, V>(*reinterpret_cast<const Raw<T, V>*>(address)));
        });
        if constexpr (kMoments) moments.add(sum);
        if (!out) return;
        if (!kMoments && norm.mean) {
#pragma unroll
          for (int e = 0; e < V; ++e) sum.v[e] = activate(affine_r[e](sum.v[e]), norm.activation);
        }
        store_raw<T, V>(out + image + offset * b.channels, pack_raw<T, V>(sum));
      });
    }
    if constexpr (kMoments) {
      if (r > 0) __syncthreads();  // the merge before has been read
      moments = merge_over_y(moments, reinterpret_cast<Moments<A, V>*>(rest));
      if (active && threadIdx.y == 0) {
        const int64_t channels = b.count * b.channels, slice = site.n * tiling.phases + site.phase;
        A* row = partial + slice * 3 * channels + r * b.channels + site.c;
#pragma unroll
        for (int e = 0; e < V; ++e) {
          row[e] = moments.count;
          row[channels + e] = moments.mean[e];
          row[2 * channels + e] = moments.m2[e];
        }
      }
    }
  }
}

// Shared memory: the sums of grad_x; dy of one branch or the tap sums of all threads; AffineGrad of all branches.
template <typename T>
int64_t slab_backward_bytes(int64_t pixels, int64_t packs, int64_t branches) {
  constexpr int V = kNhwcBackwardVector<T>;
  using A = acc_t<T>;
  const int64_t slab = pixels * packs * V * int64_t(sizeof(A)),
                taps = kSlabBackwardThreads * 9 * V * int64_t(sizeof(A));
  return slab + at_least(slab, taps) + branches * packs * V * int64_t(sizeof(AffineGrad<A>));
}

// kNorm: b.grad is grad_out and dy is formed from it and b.y; otherwise b.grad is dy. Either of grad_x and
// partial[n * phases + phase][9][branches * C] may be null, and grad_pooled.
template <typename T, bool kNorm>
__global__ void __launch_bounds__(kSlabBackwardThreads, 6)
    pyramid_backward_nhwc(PyramidBranches<T> b, SlabTiling tiling, NormGrad<acc_t<T>> norm, const T* grad_pooled,
                          const T* x, const T* weight, T* grad_x, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int V = kNhwcBackwardVector<T>;
  const SlabSite site(tiling, V, b.height);
  const int packs = int(tiling.packs), width = b.width, lanes = packs * V;
  const bool active = site.c < b.channels;
  const int slab = int(ceil_div(b.height, tiling.step)) * width * lanes;
  A* sums_x = dynamic_shared<A>();  // [pixel][packs * V]; every thread reads what it wrote
  A* shared = sums_x + slab;        // dy, as sums_x; then the tap sums
  const int taps_size = int(blockDim.x * blockDim.y) * 9 * V;
  AffineGrad<A>* affines = reinterpret_cast<AffineGrad<A>*>(shared + (slab > taps_size ? slab : taps_size));
  if constexpr (kNorm) {
    for (int k = threadIdx.y * packs + threadIdx.x; k < b.count * lanes; k += packs * blockDim.y) {
      const int r = k / lanes;
      const int64_t c = site.first_channel + k - r * lanes;
      if (c < b.channels) affines[k] = affine_grad(norm, r * b.channels + c);
    }
  }
  const int64_t image = site.n * b.height * width * b.channels + site.c;
  Pack<A, V> from_mean;
  clear(from_mean);
  if (active && grad_pooled) {
    from_mean = unpack<T, V>(load_raw<T, V>(grad_pooled + site.n * b.channels + site.c));
#pragma unroll
    for (int e = 0; e < V; ++e) from_mean.v[e] /= A(b.height * width);
  }
  for (int r = 0; r < b.count; ++r) {
    const int down = b.rate_h[r] / tiling.step, right = b.rate_w[r];
    if (kNorm || r > 0) __syncthreads();
    if (active) {
      const AffineGrad<A>* affine_r = affines + (r * packs + threadIdx.x) * V;
      site.each(tiling, width, [&](int pixel, int, int, int64_t offset) {
        Pack<A, V> dy = unpack<T, V>(load_raw<T, V>(b.grad[r] + image + offset * b.channels));
        if constexpr (kNorm) {
          const Pack<A, V> value = unpack<T, V>(load_raw<T, V>(b.y[r] + image + offset * b.channels));
#pragma unroll
          for (int e = 0; e < V; ++e) dy.v[e] = affine_r[e](dy.v[e], value.v[e], norm.norm.activation);
        }
        *reinterpret_cast<Raw<A, V>*>(shared + pixel * lanes + threadIdx.x * V) = pack_raw<A, V>(dy);
      });
    }
    __syncthreads();
    Pack<A, V> sums[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) clear(sums[k]);
    if (active) {
      Taps<T, V> taps;
      taps.load(weight + (r * b.channels + site.c) * 9);
      site.each(tiling, width, [&](int own, int row, int column, int64_t offset) {
        Pack<A, V> value, sum = from_mean;
        clear(value);
        if (partial) value = unpack<T, V>(load_raw<T, V>(x + image + offset * b.channels));
        Raw<A, V>* kept = reinterpret_cast<Raw<A, V>*>(sums_x + own * lanes + threadIdx.x * V);
        if (r > 0) sum = unpack<A, V>(*kept);
        each_tap(row, column, -down, -right, site.rows, width, [&](int tap, int pixel) {
          const A* address = shared + pixel * lanes + threadIdx.x * V;
          const Pack<A, V> dy = unpack<A, V>(*reinterpret_cast<const Raw<A, V>*>(address));
          multiply_add(sum, taps.v[tap], dy);
          multiply_add(sums[tap], value.v, dy);
        });
        if (r < b.count - 1) {
          *kept = pack_raw<A, V>(sum);
        } else if (grad_x) {
          store_raw<T, V>(grad_x + image + offset * b.channels, pack_raw<T, V>(sum));
        }
      });
    }
    if (!partial) continue;
    __syncthreads();
    const int64_t channels = b.count * b.channels, slice = site.n * tiling.phases + site.phase;
    write_tap_sums(sums, packs, b.channels - site.first_channel, shared,
                   partial + slice * 9 * channels + r * b.channels + site.first_channel, channels);
  }
}

}  // namespace deeplab_kernels::cuda
