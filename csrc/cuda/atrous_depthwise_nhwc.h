// 3x3 kernels for channels_last tensors (multiplier 1).
//
// A thread owns one pack of channels and one column, and marches down the rows of one phase (h mod rate): an atrous
// convolution of rate r is r ordinary ones on every r-th row. Each row it reads (three packs, one a column tap) goes
// into three running sums, so a row is read once instead of three times. Threads: x over packs of channels (8 packs of
// 16 bytes are a 128-byte line), y over columns, so that the column taps of a block hit in L1.
//
//   conv3x3_nhwc      conv(x) [normalise + activate] [statistics]         floor: X + Y bytes
//   backward3x3_nhwc  grad_x and the weight gradient, from dy, or from grad_out and y with dy formed on the fly
//                                                                         floor: 2X + Y (2X + 2Y) bytes
#pragma once

#include <initializer_list>

#include "norm.h"
#include "reduce.h"

namespace deeplab_kernels::cuda {

constexpr int kNhwcPacks = 8;     // threads along channels
constexpr int kNhwcColumns = 16;  // most threads along columns
constexpr int kNhwcThreads = kNhwcPacks * kNhwcColumns;

// Rows are taken in steps of `step`: phase f has rows f, f + step, ... of which a work item takes `run` in a row.
struct NhwcTiling {
  int64_t groups, column_blocks, columns;  // blocks across channels and columns; columns of a block
  int64_t step, phases, run, segments;     // of rows
  int64_t items() const { return phases * segments; }
};

template <int V>
NhwcTiling nhwc_tiling(int64_t batch, int64_t channels, int64_t rows, int64_t width, int64_t step) {
  NhwcTiling t;
  t.groups = ceil_div(channels, kNhwcPacks * V);
  t.column_blocks = ceil_div(width, kNhwcColumns);
  t.columns = ceil_div(width, t.column_blocks);
  t.step = step;
  t.phases = at_most(step, rows);
  const int64_t most = ceil_div(rows, step);  // rows of a phase
  // Long runs reread fewer rows; but a GPU wants a few hundred thousand threads.
  const int64_t threads = batch * t.phases * t.groups * kNhwcPacks * width;
  const int64_t wanted = ceil_div(int64_t(1) << 18, at_least(threads, 1));
  t.run = at_most(at_least(ceil_div(most, wanted), 4), 32);
  t.segments = ceil_div(most, t.run);
  return t;
}

// Rows and columns, and offsets within one row, are counted in 32 bits by these kernels: registers are what they are
// short of. Larger images go the general way.
inline bool fits_nhwc(const DepthwiseShape& s) {
  constexpr int64_t kLimit = int64_t(1) << 28;
  for (int64_t size :
       {s.in_h, s.in_w, s.out_h, s.out_w, s.pad_top, s.pad_left, s.rate_h, s.rate_w, s.stride_h, s.stride_w})
    if (size >= kLimit) return false;
  // Offsets of taps outside the image are formed too, though never read.
  const int64_t span = s.in_w + s.out_w + 2 * (s.rate_w + s.pad_left) + s.out_w * s.stride_w;
  return span < kLimit && span * s.channels < int64_t(1) << 31 && s.out_h * s.stride_h < kLimit;
}

struct RowRun {
  int64_t n;
  int phase, begin, end;  // rows phase + step * t, begin <= t < end
};

// Work item `item` of batch * phases * segments.
__device__ __forceinline__ RowRun row_run(const NhwcTiling& t, int64_t item, int64_t rows) {
  RowRun run;
  const int64_t rest = item / t.phases;
  run.phase = int(item - rest * t.phases);
  run.n = rest / t.segments;
  run.begin = int(rest - run.n * t.segments) * int(t.run);
  const int count = (int(rows) - run.phase + int(t.step) - 1) / int(t.step);
  run.end = run.begin + int(t.run) < count ? run.begin + int(t.run) : count;
  return run;
}

// The nine taps of V channels.
template <typename T, int V>
struct Taps {
  acc_t<T> v[9][V];

  __device__ __forceinline__ void load(const T* weight) {
#pragma unroll
    for (int k = 0; k < 9; ++k) {
      const Pack<acc_t<T>, V> pack = unpack<T, V>(load_raw<T, V>(weight + k * V));
#pragma unroll
      for (int e = 0; e < V; ++e) v[(k * V + e) % 9][(k * V + e) / 9] = pack.v[e];
    }
  }
};

// Three packs of one row, at the columns of the three taps; zero outside the image.
template <typename T, int V>
struct RowTaps {
  Raw<T, V> raw[3];

  __device__ __forceinline__ void load(const T* row, const int (&offset)[3], const bool (&inside)[3]) {
#pragma unroll
    for (int v = 0; v < 3; ++v) raw[v] = inside[v] ? load_raw<T, V>(row + offset[v]) : Raw<T, V>{};
  }
};

template <typename A, int V>
__device__ __forceinline__ void clear(Pack<A, V>& pack) {
#pragma unroll
  for (int e = 0; e < V; ++e) pack.v[e] = A(0);
}

template <typename A, int V>
__device__ __forceinline__ void multiply_add(Pack<A, V>& sum, const A (&factor)[V], const Pack<A, V>& value) {
#pragma unroll
  for (int e = 0; e < V; ++e) sum.v[e] += factor[e] * value.v[e];
}

// kUnitStride: vertical stride 1, rows marched by phase. Otherwise every output row reads its three rows.
// kMoments: the statistics go to partial[slice][3][C], slice = block / groups; norm is then not read and out may be
// null.
template <typename T, bool kUnitStride, bool kMoments>
__global__ void __launch_bounds__(kNhwcThreads, 3)
    conv3x3_nhwc(DepthwiseShape s, NhwcTiling tiling, const T* x, const T* weight, Norm<acc_t<T>> norm, T* out,
                 acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int V = kVector<T>;
  const int64_t rest = blockIdx.x / tiling.groups, group = blockIdx.x - rest * tiling.groups;
  const int64_t item = rest / tiling.column_blocks, column_block = rest - item * tiling.column_blocks;
  const int64_t c = (group * kNhwcPacks + threadIdx.x) * V;
  const int j = int(column_block * tiling.columns) + int(threadIdx.y);
  const bool active = c < s.channels && j < s.out_w;
  // The normalisation of this thread's channels waits in shared memory: [channel][mean, scale, beta].
  Affine<A>* affines = dynamic_shared<Affine<A>>() + threadIdx.x * V;
  if (!kMoments && norm.mean) {
    for (int e = threadIdx.y; e < V; e += blockDim.y)
      if (c + e < s.channels) affines[e] = affine(norm, c + e);
    __syncthreads();
  }
  Moments<A, kMoments ? V : 1> moments;
  moments.clear();
  if (active) {
    const RowRun run = row_run(tiling, item, s.out_h);
    Taps<T, V> taps;
    taps.load(weight + c * 9);
    const int channels = int(s.channels), in_row = int(s.in_w) * channels, out_row = int(s.out_w) * channels;
    int offset[3];
    bool inside[3];
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      const int w = j * int(s.stride_w) + v * int(s.rate_w) - int(s.pad_left);
      inside[v] = w >= 0 && w < int(s.in_w);
      offset[v] = w * channels;
    }
    const T* image = x + run.n * s.in_h * in_row + c;
    T* column = out ? out + (run.n * s.out_h * s.out_w + j) * channels + c : nullptr;
    auto emit = [&](int t, const Pack<A, V>& sum) {
      if constexpr (kMoments) moments.add(sum);
      if (!column) return;
      Pack<A, V> value = sum;
      if (!kMoments && norm.mean) {
#pragma unroll
        for (int e = 0; e < V; ++e) value.v[e] = activate(affines[e](sum.v[e]), norm.activation);
      }
      T* address = column + int64_t(run.phase + int(tiling.step) * t) * out_row;
      store_raw<T, V>(address, pack_raw<T, V>(value));
    };
    if constexpr (kUnitStride) {
      // Row q of the phase (image row first + rate * q) is tap u of output t = q - u.
      const int first = run.phase - int(s.pad_top), rate = int(s.rate_h);
      auto row_inside = [&](int q) { return first + rate * q >= 0 && first + rate * q < int(s.in_h); };
      auto row_address = [&](int q) { return image + int64_t(first + rate * q) * in_row; };
      Pack<A, V> sum0, sum1, sum2;
      clear(sum0), clear(sum1);
      RowTaps<T, V> next;
      if (row_inside(run.begin)) next.load(row_address(run.begin), offset, inside);
      for (int q = run.begin; q < run.end + 2; ++q) {
        const RowTaps<T, V> row = next;
        if (q + 1 < run.end + 2 && row_inside(q + 1)) next.load(row_address(q + 1), offset, inside);
        clear(sum2);
        if (row_inside(q)) {
#pragma unroll
          for (int v = 0; v < 3; ++v) {
            const Pack<A, V> value = unpack<T, V>(row.raw[v]);
            multiply_add(sum0, taps.v[6 + v], value);
            multiply_add(sum1, taps.v[3 + v], value);
            multiply_add(sum2, taps.v[v], value);
          }
        }
        if (q - 2 >= run.begin) emit(q - 2, sum0);
        sum0 = sum1, sum1 = sum2;
      }
    } else {
      for (int t = run.begin; t < run.end; ++t) {
        Pack<A, V> sum;
        clear(sum);
#pragma unroll
        for (int u = 0; u < 3; ++u) {
          const int h = (run.phase + int(tiling.step) * t) * int(s.stride_h) + u * int(s.rate_h) - int(s.pad_top);
          if (h < 0 || h >= int(s.in_h)) continue;
          RowTaps<T, V> row;
          row.load(image + int64_t(h) * in_row, offset, inside);
#pragma unroll
          for (int v = 0; v < 3; ++v) multiply_add(sum, taps.v[3 * u + v], unpack<T, V>(row.raw[v]));
        }
        emit(t, sum);
      }
    }
  }
  if constexpr (kMoments) {
    moments = merge_over_y(moments, dynamic_shared<Moments<A, V>>());
    if (threadIdx.y == 0 && c < s.channels) {
      A* row = partial + rest * 3 * s.channels + c;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        row[e] = moments.count;
        row[s.channels + e] = moments.mean[e];
        row[2 * s.channels + e] = moments.m2[e];
      }
    }
  }
}

// Narrower packs: nine sums of the weight gradient a channel live in registers.
template <typename T>
constexpr int kNhwcBackwardVector = sizeof(T) == 8 ? 2 : 4;

// Adds the nine tap sums up over threadIdx.y, in order, and writes them to partial[k * stride], partial at the block's
// first channel. Threads: x over `packs` packs of channels, of which `channels` channels exist from there on.
// shared: [y][9][packs * V], free to be written when all threads of the block are here.
template <typename A, int V>
__device__ __forceinline__ void write_tap_sums(const Pack<A, V> (&sums)[9], int packs, int64_t channels, A* shared,
                                               A* partial, int64_t stride) {
  const int width = packs * V, row = 9 * width;
#pragma unroll
  for (int k = 0; k < 9; ++k) {
#pragma unroll
    for (int e = 0; e < V; ++e) shared[threadIdx.y * row + k * width + threadIdx.x * V + e] = sums[k].v[e];
  }
  __syncthreads();
  for (int k = threadIdx.y * packs + threadIdx.x; k < row; k += packs * blockDim.y) {
    if (k % width >= channels) continue;
    A total = A(0);
    for (int y = 0; y < int(blockDim.y); ++y) total += shared[y * row + k];
    partial[k / width * stride + k % width] = total;
  }
}

// Stride 1. A thread owns a column of x; row q of dy is read once and serves grad_x and the weight gradient:
//   grad_x[t] = sum_u w[u] dy[t - u],   grad_w[u] = sum_t x[t] dy[t - u]    (t, q: rows of one phase)
// kNorm: `grad` is grad_out and dy is formed from it and y; otherwise `grad` is dy and y is not read.
// Either of grad_x and partial[slices * column_blocks][9][C] may be null.
template <typename T, bool kNorm>
__global__ void __launch_bounds__(kNhwcThreads, 3)
    backward3x3_nhwc(DepthwiseShape s, NhwcTiling tiling, int64_t slices, const T* grad, const T* y,
                     NormGrad<acc_t<T>> norm, const T* x, const T* weight, T* grad_x, acc_t<T>* partial) {
  using A = acc_t<T>;
  constexpr int V = kNhwcBackwardVector<T>;
  const int64_t rest = blockIdx.x / tiling.groups, group = blockIdx.x - rest * tiling.groups;
  const int64_t slice = rest / tiling.column_blocks, column_block = rest - slice * tiling.column_blocks;
  const int64_t c = (group * kNhwcPacks + threadIdx.x) * V;
  const int w = int(column_block * tiling.columns) + int(threadIdx.y);
  // What dy needs of this thread's channels waits in shared memory.
  AffineGrad<A>* affines = dynamic_shared<AffineGrad<A>>() + threadIdx.x * V;
  if constexpr (kNorm) {
    for (int e = threadIdx.y; e < V; e += blockDim.y)
      if (c + e < s.channels) affines[e] = affine_grad(norm, c + e);
    __syncthreads();
  }
  Pack<A, V> sums[9];
#pragma unroll
  for (int k = 0; k < 9; ++k) clear(sums[k]);
  if (c < s.channels && w < s.in_w) {
    Taps<T, V> taps;
    taps.load(weight + c * 9);
    const int channels = int(s.channels), in_row = int(s.in_w) * channels, out_row = int(s.out_w) * channels;
    int offset[3];
    bool inside[3];
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      const int j = w + int(s.pad_left) - int(s.rate_w) * v;
      inside[v] = j >= 0 && j < int(s.out_w);
      offset[v] = j * channels;
    }
    const int64_t items = s.batch * tiling.phases * tiling.segments;
    for (int64_t item = slice; item < items; item += slices) {
      const RowRun run = row_run(tiling, item, s.in_h);
      const int64_t x_column = (run.n * s.in_h * s.in_w + w) * channels + c;
      const int64_t grad_image = run.n * s.out_h * out_row + c;
      auto x_offset = [&](int t) { return x_column + int64_t(run.phase + int(tiling.step) * t) * in_row; };
      auto x_row = [&](int t) {
        Pack<A, V> value;
        clear(value);
        if (partial && t >= run.begin && t < run.end) value = unpack<T, V>(load_raw<T, V>(x + x_offset(t)));
        return value;
      };
      Pack<A, V> sum0, sum1, sum2, x0, x1, x2;  // x rows q, q + 1, q + 2
      clear(sum0), clear(sum1), clear(x1), clear(x2);
      for (int q = run.begin - 2; q < run.end; ++q) {
        x0 = x1, x1 = x2, x2 = x_row(q + 2);
        clear(sum2);
        const int i = run.phase + int(s.pad_top) + int(s.rate_h) * q;
        if (i >= 0 && i < int(s.out_h)) {
          const int64_t grad_row = grad_image + int64_t(i) * out_row;
          RowTaps<T, V> raw_grad, raw_y;
          raw_grad.load(grad + grad_row, offset, inside);
          if constexpr (kNorm) raw_y.load(y + grad_row, offset, inside);
#pragma unroll
          for (int v = 0; v < 3; ++v) {
            Pack<A, V> dy = unpack<T, V>(raw_grad.raw[v]);
            if constexpr (kNorm) {
              const Pack<A, V> value = unpack<T, V>(raw_y.raw[v]);
#pragma unroll
              for (int e = 0; e < V; ++e)
                dy.v[e] = inside[v] ? affines[e](dy.v[e], value.v[e], norm.norm.activation) : A(0);
            }
            multiply_add(sum0, taps.v[v], dy);
            multiply_add(sum1, taps.v[3 + v], dy);
            multiply_add(sum2, taps.v[6 + v], dy);
            multiply_add(sums[v], x0.v, dy);
            multiply_add(sums[3 + v], x1.v, dy);
            multiply_add(sums[6 + v], x2.v, dy);
          }
        }
        if (grad_x && q >= run.begin) store_raw<T, V>(grad_x + x_offset(q), pack_raw<T, V>(sum0));
        sum0 = sum1, sum1 = sum2;
      }
    }
  }
  if (!partial) return;
  if constexpr (kNorm) __syncthreads();
  const int64_t first = group * kNhwcPacks * V;
  write_tap_sums(sums, kNhwcPacks, s.channels - first, dynamic_shared<A>(), partial + rest * 9 * s.channels + first,
                 s.channels);
}

}  // namespace deeplab_kernels::cuda
