// 3x3 kernels for contiguous NCHW tensors (multiplier 1).
//
// A block owns a band of rows of one plane. The rows it needs lie in one run of memory, whatever the row length: it is
// copied to shared memory in whole 16-byte vectors, keeping its misalignment, and the taps are read from there. A
// thread marches down one column through the rows of one phase (h mod rate), three reads of shared memory an output;
// the lanes of a warp are neighbouring columns, so that those reads and the stores are free of conflicts and coalesced.
//
//   conv3x3_nchw      conv(x) [normalise + activate] [statistics]         floor: X + Y bytes
//   backward3x3_nchw  grad_x and the weight gradient, from dy, or from grad_out and y with dy formed while it is copied
//                                                                         floor: 2X + Y (2X + 2Y) bytes
#pragma once

#include "norm.h"
#include "reduce.h"

namespace deeplab_kernels::cuda {

constexpr int kNchwThreads = 256;
constexpr int kNchwWarps = kNchwThreads / 32;
constexpr int64_t kNchwSharedBytes = 24 << 10;  // aimed at, so that several blocks fit a multiprocessor
constexpr uint32_t kAllLanes = 0xffffffffu;

struct NchwTiling {
  int bands, rows;       // of a plane; rows of a band
  int run;               // rows that a thread marches through
  int64_t shared_bytes;  // 0: the rows do not fit
  int64_t slices(const DepthwiseShape& s) const { return s.batch * bands; }
};

// `bytes(rows)` is the shared memory of a band of that many rows, `target` what it should not exceed.
template <typename Bytes>
NchwTiling nchw_tiling(int64_t height, int64_t width, Bytes&& bytes, int64_t target = kNchwSharedBytes) {
  NchwTiling t{0, 0, 0, 0};
  int64_t rows = height;
  while (rows > 1 && bytes(rows) > target) rows = ceil_div(rows, 2);
  if (bytes(rows) > kMaxSharedBytes) return t;
  t.bands = int(ceil_div(height, rows));
  t.rows = int(ceil_div(height, t.bands));
  t.run = int(at_least(at_most(ceil_div(t.rows * width, kNchwThreads), 16), 2));
  t.shared_bytes = bytes(t.rows);
  return t;
}

inline bool fits_nchw(const DepthwiseShape& s) {
  constexpr int64_t kLimit = int64_t(1) << 28;
  for (int64_t size : {s.in_h * s.in_w, s.out_h * s.out_w, s.pad_top, s.pad_left, s.rate_h, s.rate_w, s.stride_h,
                       s.stride_w, s.out_h * s.stride_h, s.out_w * s.stride_w})
    if (size >= kLimit) return false;
  return true;
}

// Copies elements [begin, end) of a tensor of `total` into shared memory: element k goes to shared[k - base], where
// base is begin rounded down to a whole vector. Returns base. Shared memory must hold end - base rounded up to a
// vector.
template <typename T>
__device__ __forceinline__ int64_t copy_run(const T* tensor, int64_t begin, int64_t end, int64_t total, T* shared) {
  constexpr int V = kVector<T>;
  const int64_t base = begin / V * V;
  for (int64_t k = base + int(threadIdx.x) * V; k < end; k += kNchwThreads * V) {
    if (k + V <= total) {
      *reinterpret_cast<Raw<T, V>*>(shared + (k - base)) = load_raw<T, V>(tensor + k);
    } else {
      for (int64_t e = k; e < end; ++e) shared[e - base] = tensor[e];
    }
  }
  return base;
}

template <typename T>
constexpr int64_t run_bytes(int64_t elements) {
  return ceil_div(elements + kVector<T> - 1, kVector<T>) * kVector<T> * int64_t(sizeof(T));
}

template <typename A>
__device__ __forceinline__ A add_over_warp(A value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  return value;
}

// Valid in thread 0. shared: one Moments a warp.
template <typename A>
__device__ __forceinline__ Moments<A, 1> merge_over_block(Moments<A, 1> value, Moments<A, 1>* shared) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    Moments<A, 1> other;
    other.count = __shfl_down_sync(kAllLanes, value.count, step);
    other.mean[0] = __shfl_down_sync(kAllLanes, value.mean[0], step);
    other.m2[0] = __shfl_down_sync(kAllLanes, value.m2[0], step);
    value.merge(other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kNchwWarps; ++w) value.merge(shared[w]);
  return value;
}

// The part of a block that the threads share out: columns fastest, then phases, then runs of `run` rows of a phase.
struct NchwItems {
  int width, phases, step, rows, run, count;

  __device__ __forceinline__ NchwItems(int width, int rows, int step, int run)
      : width(width), phases(step < rows ? step : rows), step(step), rows(rows), run(run) {
    const int most = (rows + step - 1) / step;  // rows of a phase
    count = (most + run - 1) / run * phases * width;
  }
  // Calls f(column, phase, begin, end): rows phase + step * t, begin <= t < end.
  template <typename F>
  __device__ __forceinline__ void each(F&& f) const {
    for (int item = threadIdx.x; item < count; item += kNchwThreads) {
      const int rest = item / width, column = item - rest * width;
      const int segment = rest / phases, phase = rest - segment * phases;
      const int most = (rows - phase + step - 1) / step, begin = segment * run;
      f(column, phase, begin, begin + run < most ? begin + run : most);
    }
  }
};

// The columns first, first + step, first + 2 * step of the three column taps, and which of them the image has.
struct ColumnTaps {
  int column[3];
  bool inside[3];

  __device__ __forceinline__ ColumnTaps(int first, int step, int width) {
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      column[v] = first + v * step;
      inside[v] = column[v] >= 0 && column[v] < width;
    }
  }
};

// Calls emit(t, output t) for begin <= t < end; output t reads rows top + rate * (t, t + 1, t + 2) of an image of
// height x width, of which those rows are in memory.
template <typename T, typename Emit>
__device__ __forceinline__ void march_column(const T* image, int height, int width, int top, int rate, int begin,
                                             int end, const ColumnTaps& at, const acc_t<T> (&taps)[9], Emit&& emit) {
  using A = acc_t<T>;
  A sum0 = A(0), sum1 = A(0);
  for (int q = begin; q < end + 2; ++q) {
    const int h = top + rate * q;
    A sum2 = A(0);
    if (h >= 0 && h < height) {
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        const A value = at.inside[v] ? widen(image[h * width + at.column[v]]) : A(0);
        sum0 += taps[6 + v] * value;
        sum1 += taps[3 + v] * value;
        sum2 += taps[v] * value;
      }
    }
    if (q - 2 >= begin) emit(q - 2, sum0);
    sum0 = sum1, sum1 = sum2;
  }
}

// Statistics go to partial[slice][3][C], slice = n * bands + band.
template <typename T, bool kUnitStride, bool kMoments>
__global__ void __launch_bounds__(kNchwThreads, 2)
    conv3x3_nchw(DepthwiseShape s, NchwTiling tiling, const T* x, const T* weight, Norm<acc_t<T>> norm, T* out,
                 acc_t<T>* partial) {
  using A = acc_t<T>;
  const int64_t plane = blockIdx.x / tiling.bands;
  const int band = int(blockIdx.x - plane * tiling.bands);
  const int64_t n = plane / s.channels, c = plane - n * s.channels;
  const int first = band * tiling.rows;
  const int rows = first + tiling.rows < int(s.out_h) ? tiling.rows : int(s.out_h) - first;
  const int in_w = int(s.in_w), out_w = int(s.out_w), rate = int(s.rate_h);
  // The rows of x that the band reads.
  const int top = first * int(s.stride_h) - int(s.pad_top);
  const int bottom = top + (rows - 1) * int(s.stride_h) + 2 * rate + 1;
  const int h_begin = top > 0 ? (top < int(s.in_h) ? top : int(s.in_h)) : 0;
  const int h_end = bottom < int(s.in_h) ? (bottom > h_begin ? bottom : h_begin) : int(s.in_h);
  T* shared = dynamic_shared<T>();
  const int64_t begin = (plane * s.in_h + h_begin) * in_w, end = (plane * s.in_h + h_end) * in_w;
  const int64_t base = copy_run(x, begin, end, s.batch * s.channels * s.in_h * in_w, shared);
  const T* image = shared + (begin - base) - h_begin * in_w;  // row h is image + h * in_w
  A taps[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) taps[k] = widen(weight[c * 9 + k]);
  Affine<A> affine_c{A(0), A(0), A(0)};
  if (!kMoments && norm.mean) affine_c = affine(norm, c);
  Moments<A, 1> moments;
  moments.clear();
  __syncthreads();
  T* plane_out = out ? out + (plane * s.out_h + first) * out_w : nullptr;
  const NchwItems items(out_w, rows, kUnitStride ? rate : 1, tiling.run);
  items.each([&](int j, int phase, int t_begin, int t_end) {
    const ColumnTaps at(j * int(s.stride_w) - int(s.pad_left), int(s.rate_w), in_w);
    auto emit = [&](int t, A sum) {
      if constexpr (kMoments) moments.add({{sum}});
      if (!plane_out) return;
      if (!kMoments && norm.mean) sum = activate(affine_c(sum), norm.activation);
      plane_out[(phase + items.step * t) * out_w + j] = narrow<T>(sum);
    };
    if constexpr (kUnitStride) {
      march_column(image, int(s.in_h), in_w, top + phase, rate, t_begin, t_end, at, taps, emit);
    } else {
      for (int t = t_begin; t < t_end; ++t) {
        A sum = A(0);
#pragma unroll
        for (int u = 0; u < 3; ++u) {
          const int h = top + t * int(s.stride_h) + u * rate;
          if (h < 0 || h >= int(s.in_h)) continue;
#pragma unroll
          for (int v = 0; v < 3; ++v)
            if (at.inside[v]) sum += taps[3 * u + v] * widen(image[h * in_w + at.column[v]]);
        }
        emit(t, sum);
      }
    }
  });
  if constexpr (kMoments) {
    __syncthreads();
    moments = merge_over_block(moments, dynamic_shared<Moments<A, 1>>());
    if (threadIdx.x != 0) return;
    A* row = partial + (n * tiling.bands + band) * 3 * s.channels + c;
    row[0] = moments.count;
    row[s.channels] = moments.mean[0];
    row[2 * s.channels] = moments.m2[0];
  }
}

// Rows of dy that `rows` rows of x meet.
inline int64_t nchw_backward_bytes(const DepthwiseShape& s, int64_t rows, int64_t size, int64_t acc_size) {
  const int64_t dy_rows = at_most(rows + 2 * s.rate_h, s.out_h), vector = 16 / size;
  return (dy_rows * s.out_w + 2 * vector) * acc_size + ceil_div((rows * s.in_w + 2 * vector) * size, 16) * 16;
}

// The transposed march: row row + rate * q of dy meets x rows q, q + 1, q + 2 of a phase. Calls emit(t, grad_x row t)
// for begin <= t < end, and adds the products of dy with x_at(t) to the weight gradient `sums`.
template <typename A, typename X, typename Emit>
__device__ __forceinline__ void march_column_backward(const A* image_dy, int height, int width, int row, int rate,
                                                      int begin, int end, const ColumnTaps& at, const A (&taps)[9],
                                                      A (&sums)[9], X&& x_at, Emit&& emit) {
  A sum0 = A(0), sum1 = A(0), x0, x1 = A(0), x2 = A(0);  // x rows q, q + 1, q + 2
  for (int q = begin - 2; q < end; ++q) {
    x0 = x1, x1 = x2;
    x2 = q + 2 < end ? x_at(q + 2) : A(0);
    A sum2 = A(0);
    const int i = row + rate * q;
    if (i >= 0 && i < height) {
#pragma unroll
      for (int v = 0; v < 3; ++v) {
        const A dy = at.inside[v] ? image_dy[i * width + at.column[v]] : A(0);
        sum0 += taps[v] * dy;
        sum1 += taps[3 + v] * dy;
        sum2 += taps[6 + v] * dy;
        sums[v] += x0 * dy;
        sums[3 + v] += x1 * dy;
        sums[6 + v] += x2 * dy;
      }
    }
    if (q >= begin) emit(q, sum0);
    sum0 = sum1, sum1 = sum2;
  }
}

// Writes the block's sum of each of the nine to partial[k * stride]. shared: [9][warps].
template <typename A>
__device__ __forceinline__ void write_tap_sums(const A (&sums)[9], A* shared, A* partial, int64_t stride) {
#pragma unroll
  for (int k = 0; k < 9; ++k) {
    const A sum = add_over_warp(sums[k]);
    if (threadIdx.x % 32 == 0) shared[k * kNchwWarps + threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x < 9) {
    A total = A(0);
    for (int warp = 0; warp < kNchwWarps; ++warp) total += shared[threadIdx.x * kNchwWarps + warp];
    partial[threadIdx.x * stride] = total;
  }
}

// Copies elements [begin, end) of dy to shared memory in the accumulation type, forming them from `grad` and `y` where
// kNorm; element k goes to shared[k - base]. Returns base, as copy_run.
template <typename T, bool kNorm>
__device__ __forceinline__ int64_t copy_dy(const T* grad, const T* y, const AffineGrad<acc_t<T>>& affine_c,
                                           Activation activation, int64_t begin, int64_t end, acc_t<T>* shared) {
  using A = acc_t<T>;
  constexpr int V = kVector<T>;
  const int64_t base = begin / V * V;
  for (int64_t k = base + int(threadIdx.x) * V; k < end; k += kNchwThreads * V) {
    const Part part{k < begin ? int(begin - k) : 0, end - k < V ? int(end - k) : V, true};
    Pack<A, V> dy = load_part<T, V>(grad + k, part);
    if constexpr (kNorm) {
      const Pack<A, V> value = load_part<T, V>(y + k, part);
#pragma unroll
      for (int e = 0; e < V; ++e) dy.v[e] = affine_c(dy.v[e], value.v[e], activation);
    }
#pragma unroll
    for (int e = 0; e < V; ++e) shared[k - base + e] = dy.v[e];
  }
  return base;
}

// Stride 1. Shared memory holds dy in the accumulation type, then x. Otherwise as backward3x3_nhwc; partial is
// [n * bands][9][C].
template <typename T, bool kNorm>
__global__ void __launch_bounds__(kNchwThreads, 2)
    backward3x3_nchw(DepthwiseShape s, NchwTiling tiling, const T* grad, const T* y, NormGrad<acc_t<T>> norm,
                     const T* x, const T* weight, T* grad_x, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int V = kVector<T>;
  const int64_t plane = blockIdx.x / tiling.bands;
  const int band = int(blockIdx.x - plane * tiling.bands);
  const int64_t n = plane / s.channels, c = plane - n * s.channels;
  const int first = band * tiling.rows;
  const int rows = first + tiling.rows < int(s.in_h) ? tiling.rows : int(s.in_h) - first;
  const int in_w = int(s.in_w), out_w = int(s.out_w), rate = int(s.rate_h);
  const int top = first + int(s.pad_top) - 2 * rate, bottom = first + int(s.pad_top) + rows;
  const int i_begin = top > 0 ? (top < int(s.out_h) ? top : int(s.out_h)) : 0;
  const int i_end = bottom < int(s.out_h) ? (bottom > i_begin ? bottom : i_begin) : int(s.out_h);
  A* shared_dy = dynamic_shared<A>();
  const int64_t begin = (plane * s.out_h + i_begin) * out_w, end = (plane * s.out_h + i_end) * out_w;
  AffineGrad<A> affine_c{};
  if constexpr (kNorm) affine_c = affine_grad(norm, c);
  const int64_t base = copy_dy<T, kNorm>(grad, y, affine_c, norm.norm.activation, begin, end, shared_dy);
  const A* image_dy = shared_dy + (begin - base) - i_begin * out_w;  // row i is image_dy + i * out_w
  T* shared_x = reinterpret_cast<T*>(shared_dy + ((end - base) + V - 1) / V * V);
  const int64_t x_begin = (plane * s.in_h + first) * in_w;
  const T* image_x = nullptr;  // row `first` of x
  if (partial) {
    const int64_t total = s.batch * s.channels * s.in_h * in_w;
    image_x = shared_x + (x_begin - copy_run(x, x_begin, x_begin + rows * in_w, total, shared_x));
  }
  A taps[9], sums[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) taps[k] = widen(weight[c * 9 + k]), sums[k] = A(0);
  __syncthreads();
  const NchwItems items(in_w, rows, rate, tiling.run);
  items.each([&](int w, int phase, int t_begin, int t_end) {
    const ColumnTaps at(w + int(s.pad_left), -int(s.rate_w), out_w);
    auto x_at = [&](int t) { return partial ? widen(image_x[(phase + rate * t) * in_w + w]) : A(0); };
    auto emit = [&](int t, A sum) {
      if (grad_x) grad_x[x_begin + (phase + rate * t) * in_w + w] = narrow<T>(sum);
    };
    march_column_backward(image_dy, int(s.out_h), out_w, first + phase + int(s.pad_top), rate, t_begin, t_end, at, taps,
                          sums, x_at, emit);
  });
  if (!partial) return;
  __syncthreads();
  write_tap_sums(sums, dynamic_shared<A>(), partial + (n * tiling.bands + band) * 9 * s.channels + c, s.channels);
}

}  // namespace deeplab_kernels::cuda
