// 3x3 kernels of the atrous spatial pyramid for contiguous NCHW tensors.
//
// A block owns a band of rows of one plane, the whole plane where shared memory holds it: it copies the rows that any
// branch reads, once, and marches through them for every branch as atrous_depthwise_nchw.h does for one.
//
//   pyramid_nchw           every branch [normalise + activate] [statistics], the mean    floor: X + R X bytes
//   pyramid_backward_nchw  grad_x, summed over the branches and the mean, and the weight gradient, from dy or from
//                          grad_out and y                                                floor: 2X + R X (2X + 2R X)
//
// Bands read the rows that branches reach in other bands again.
#pragma once

#include "atrous_depthwise_nchw.h"
#include "atrous_spatial_pyramid_branches.h"

namespace deeplab_kernels::cuda {

// How far the taps of a branch reach up and down.
template <typename T>
int64_t reach_of(const PyramidBranches<T>& b) {
  int reach = 0;
  for (int r = 0; r < b.count; ++r) reach = b.rate_h[r] > reach ? b.rate_h[r] : reach;
  return reach;
}

// A plane's rows [begin, end) of a band, and those within `reach` of it.
struct BandRows {
  int64_t plane, n, c;
  int band, begin, end, top, bottom;

  template <typename T>
  __device__ __forceinline__ BandRows(const PyramidBranches<T>& b, const NchwTiling& t, int reach) {
    plane = blockIdx.x / t.bands;
    band = int(blockIdx.x - plane * t.bands);
    n = plane / b.channels, c = plane - n * b.channels;
    begin = band * t.rows;
    end = begin + t.rows < b.height ? begin + t.rows : b.height;
    top = begin - reach > 0 ? begin - reach : 0;
    bottom = end + reach < b.height ? end + reach : b.height;
  }
};

// The block's sum, valid in thread 0. shared: one value a warp.
template <typename A>
__device__ __forceinline__ A add_over_block(A value, A* shared) {
  value = add_over_warp(value);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kNchwWarps; ++warp) value += shared[warp];
  return value;
}

// Shared memory: room to merge sums and the statistics of every branch in, then the rows.
template <typename A>
DK_HOST_DEVICE int64_t band_merge_bytes(int64_t branches, bool moments) {
  const int64_t bytes = kNchwWarps * (int64_t(sizeof(A)) + (moments ? branches * int64_t(sizeof(Moments<A, 1>)) : 0));
  return ceil_div(bytes, 16) * 16;
}

// Statistics go to partial[n * bands + band][3][branches * C]; the sums for the mean, already divided by the number of
// pixels, to pool[band][N * C]. Either may be null; out[r] may be null where there are statistics.
template <typename T, bool kMoments>
__global__ void __launch_bounds__(kNchwThreads, 2)
    pyramid_nchw(PyramidBranches<T> b, NchwTiling tiling, int reach, const T* x, const T* weight, Norm<acc_t<T>> norm,
                 acc_t<T>* partial, acc_t<T>* pool) {
  using A = acc_t<T>;
  const BandRows rows(b, tiling, reach);
  const int width = b.width, count = rows.end - rows.begin;
  A* merge_sums = dynamic_shared<A>();
  Moments<A, 1>* merge_moments_of = reinterpret_cast<Moments<A, 1>*>(merge_sums + kNchwWarps);
  T* shared = reinterpret_cast<T*>(dynamic_shared<unsigned char>() + band_merge_bytes<A>(b.count, kMoments));
  const int64_t start = (rows.plane * b.height + rows.top) * width, end = (rows.plane * b.height + rows.bottom) * width;
  const int64_t base = copy_run(x, start, end, b.batch * b.channels * b.height * width, shared);
  const T* image = shared + (start - base) - rows.top * width;  // row h is image + h * width
  __syncthreads();
  if (pool) {
    A sum = A(0);
    for (int k = threadIdx.x; k < count * width; k += kNchwThreads) sum += widen(image[rows.begin * width + k]);
    sum = add_over_block(sum, merge_sums);
    if (threadIdx.x == 0) pool[(rows.band * b.batch + rows.n) * b.channels + rows.c] = sum / A(b.height * width);
  }
  for (int r = 0; r < b.count; ++r) {
    const int rate = b.rate_h[r];
    const int64_t c = r * b.channels + rows.c;
    A taps[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) taps[k] = widen(weight[c * 9 + k]);
    Affine<A> affine_c{A(0), A(0), A(0)};
    if (!kMoments && norm.mean) affine_c = affine(norm, c);
    Moments<A, 1> moments;
    moments.clear();
    T* out = b.out[r] ? b.out[r] + (rows.plane * b.height + rows.begin) * width : nullptr;
    const NchwItems items(width, count, rate, tiling.run);
    items.each([&](int j, int phase, int t_begin, int t_end) {
      const ColumnTaps at(j - b.rate_w[r], b.rate_w[r], width);
      auto emit = [&](int t, A sum) {
        if constexpr (kMoments) moments.add({{sum}});
        if (!out) return;
        if (!kMoments && norm.mean) sum = activate(affine_c(sum), norm.activation);
        out[(phase + rate * t) * width + j] = narrow<T>(sum);
      };
      march_column(image, b.height, width, rows.begin - rate + phase, rate, t_begin, t_end, at, taps, emit);
    });
    if constexpr (kMoments) {
      moments = merge_over_block(moments, merge_moments_of + r * kNchwWarps);
      if (threadIdx.x == 0) {
        const int64_t channels = b.count * b.channels;
        A* row = partial + (rows.n * tiling.bands + rows.band) * 3 * channels + c;
        row[0] = moments.count;
        row[channels] = moments.mean[0];
        row[2 * channels] = moments.m2[0];
      }
    }
  }
}

// Elements of shared memory, whole vectors, for `count` consecutive elements of memory at any alignment.
template <typename T>
DK_HOST_DEVICE int64_t run_elements(int64_t count) {
  return ceil_div(count + kVector<T> - 1, kVector<T>) * kVector<T>;
}

// Shared memory of `rows` rows: the tap sums, dy of one branch, the sums of grad_x; then x.
template <typename T>
int64_t band_backward_bytes(const PyramidShape& s, int64_t reach, int64_t rows) {
  const int64_t dy = run_elements<T>(at_most(rows + 2 * reach, s.height) * s.width),
                x = run_elements<T>(rows * s.width);
  return (9 * kNchwWarps + dy + x) * int64_t(sizeof(acc_t<T>)) + x * int64_t(sizeof(T));
}

// kNorm: b.grad is grad_out and dy is formed from it and b.y; otherwise b.grad is dy. Either of grad_x and
// partial[n * bands + band][9][branches * C] may be null, and grad_pooled.
template <typename T, bool kNorm>
__global__ void __launch_bounds__(kNchwThreads, 2)
    pyramid_backward_nchw(PyramidBranches<T> b, NchwTiling tiling, int reach, NormGrad<acc_t<T>> norm,
                          const T* grad_pooled, const T* x, const T* weight, T* grad_x, acc_t<T>* partial) {
  using A = acc_t<T>;
  const BandRows rows(b, tiling, reach);
  const int width = b.width, count = rows.end - rows.begin, first = rows.begin;
  A* merge = dynamic_shared<A>();  // [9][warps]
  A* shared_dy = merge + 9 * kNchwWarps;
  A* sums_x = shared_dy + run_elements<T>((rows.bottom - rows.top) * width);  // [count][width]
  const int64_t plane = rows.plane * b.height * width, x_begin = plane + first * width;
  const T* image_x = nullptr;  // row `first` of x
  if (partial) {
    T* shared_x = reinterpret_cast<T*>(sums_x + run_elements<T>(count * width));
    const int64_t total = b.batch * b.channels * b.height * width;
    image_x = shared_x + (x_begin - copy_run(x, x_begin, x_begin + count * width, total, shared_x));
  }
  const A from_mean = grad_pooled ? widen(grad_pooled[rows.n * b.channels + rows.c]) / A(b.height * width) : A(0);
  for (int r = 0; r < b.count; ++r) {
    const int rate = b.rate_h[r];
    const bool last = r == b.count - 1;
    const int64_t c = r * b.channels + rows.c;
    const int64_t start = plane + rows.top * width, end = plane + rows.bottom * width;
    AffineGrad<A> affine_c{};
    if constexpr (kNorm) affine_c = affine_grad(norm, c);
    if (r > 0 && !partial) __syncthreads();  // with partial the tap sums have met already
    const int64_t base = copy_dy<T, kNorm>(b.grad[r], b.y[r], affine_c, norm.norm.activation, start, end, shared_dy);
    const A* image_dy = shared_dy + (start - base) - rows.top * width;  // row i is image_dy + i * width
    A taps[9], sums[9];
#pragma unroll
    for (int k = 0; k < 9; ++k) taps[k] = widen(weight[c * 9 + k]), sums[k] = A(0);
    __syncthreads();
    const NchwItems items(width, count, rate, tiling.run);
    items.each([&](int w, int phase, int t_begin, int t_end) {
      const ColumnTaps at(w + b.rate_w[r], -b.rate_w[r], width);
      auto x_at = [&](int t) { return partial ? widen(image_x[(phase + rate * t) * width + w]) : A(0); };
      auto emit = [&](int t, A sum) {
        const int k = (phase + rate * t) * width + w;
        sum += r > 0 ? sums_x[k] : from_mean;
        if (!last) {
          sums_x[k] = sum;
        } else if (grad_x) {
          grad_x[x_begin + k] = narrow<T>(sum);
        }
      };
      march_column_backward(image_dy, b.height, width, first + phase + rate, rate, t_begin, t_end, at, taps, sums, x_at,
                            emit);
    });
    if (!partial) continue;
    const int64_t channels = b.count * b.channels;
    write_tap_sums(sums, merge, partial + (rows.n * tiling.bands + rows.band) * 9 * channels + c, channels);
  }
}

}  // namespace deeplab_kernels::cuda
