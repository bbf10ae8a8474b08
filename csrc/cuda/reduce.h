// Sums that come out the same on every run: each thread's own, a tree over the threads of a block, one partial result
// per slice of the work in global memory, and a second kernel that merges the slices in a fixed order.
#pragma once

#include "pack.h"

namespace deeplab_kernels::cuda {

// Merges `value` over threadIdx.y; the result is valid where threadIdx.y == 0. shared holds one Value per thread, and
// is free to be written when all threads of the block are here.
template <typename Value>
__device__ __forceinline__ Value merge_over_y(Value value, Value* shared) {
  const int x = threadIdx.x, y = threadIdx.y, width = blockDim.x, height = blockDim.y;
  int step = 1;
  while (step < height) step *= 2;
  shared[y * width + x] = value;
  for (step /= 2; step > 0; step /= 2) {
    __syncthreads();
    if (y < step && y + step < height) {
      value.merge(shared[(y + step) * width + x]);
      shared[y * width + x] = value;
    }
  }
  return value;
}

// Count, mean and sum of squared deviations of values seen one at a time (Welford) or in parts (Chan, Golub, LeVeque
// 1979), for V channels that see the same number of values.
template <typename A, int V>
struct Moments {
  A count;
  A mean[V], m2[V];

  __device__ __forceinline__ void clear() {
    count = A(0);
#pragma unroll
    for (int e = 0; e < V; ++e) mean[e] = m2[e] = A(0);
  }
  __device__ __forceinline__ void add(const Pack<A, V>& value) {
    count += A(1);
    const A inverse = A(1) / count;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A delta = value.v[e] - mean[e];
      mean[e] += delta * inverse;
      m2[e] += delta * (value.v[e] - mean[e]);
    }
  }
  __device__ __forceinline__ void merge(const Moments& other) {
    const A total = count + other.count;
    if (total == A(0)) return;
    const A share = other.count / total;
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const A delta = other.mean[e] - mean[e];
      m2[e] += other.m2[e] + delta * delta * count * share;
      mean[e] += delta * share;
    }
    count = total;
  }
};

// Moments of elements [first, last) of a pack whose elements belong to one channel.
template <typename A, int V>
__device__ __forceinline__ Moments<A, 1> moments_of(const Pack<A, V>& value, const Part& part) {
  Moments<A, 1> result;
  result.clear();
  A sum = A(0);
#pragma unroll
  for (int e = 0; e < V; ++e) sum += e >= part.first && e < part.last ? value.v[e] : A(0);
  result.count = A(part.last - part.first);
  result.mean[0] = sum / result.count;
#pragma unroll
  for (int e = 0; e < V; ++e) {
    const A delta = e >= part.first && e < part.last ? value.v[e] - result.mean[0] : A(0);
    result.m2[0] += delta * delta;
  }
  return result;
}

template <typename A, int K>
struct Sums {
  A v[K];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = A(0);
  }
  __device__ __forceinline__ void merge(const Sums& other) {
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] += other.v[k];
  }
};

constexpr int kMergeColumns = 16, kMergeLanes = 32;

// partial[slices][3][channels] (count, mean, m2) -> mean and biased var.
template <typename A>
__global__ void __launch_bounds__(kMergeColumns* kMergeLanes)
    merge_moments(const A* partial, int64_t slices, int64_t channels, A* mean, A* var) {
  const int64_t c = int64_t(blockIdx.x) * kMergeColumns + threadIdx.x;
  Moments<double, 1> total;
  total.clear();
  if (c < channels) {
    for (int64_t s = threadIdx.y; s < slices; s += kMergeLanes) {
      const A* row = partial + s * 3 * channels + c;
      total.merge(Moments<double, 1>{double(row[0]), {double(row[channels])}, {double(row[2 * channels])}});
    }
  }
  total = merge_over_y(total, dynamic_shared<Moments<double, 1>>());
  if (c < channels && threadIdx.y == 0) {
    // Without any value both are NaN, as torch.var_mean has it.
    mean[c] = A(total.count > 0 ? total.mean[0] : total.m2[0] / total.count);
    var[c] = A(total.m2[0] / total.count);
  }
}

template <typename A>
void run_merge_moments(Stream stream, const A* partial, int64_t slices, int64_t channels, A* mean, A* var) {
  launch("merge_moments", merge_moments<A>, ceil_div(channels, kMergeColumns), dim3(kMergeColumns, kMergeLanes),
         kMergeColumns * kMergeLanes * sizeof(Moments<double, 1>), stream, partial, slices, channels, mean, var);
}

// partial[slices][rows][channels] -> out[channels][rows].
template <typename T>
__global__ void __launch_bounds__(kMergeColumns* kMergeLanes)
    sum_slices(const acc_t<T>* partial, int64_t slices, int64_t rows, int64_t channels, T* out) {
  using Value = Sums<double, 1>;
  const int64_t column = int64_t(blockIdx.x) * kMergeColumns + threadIdx.x, columns = rows * channels;
  Value total;
  total.clear();
  if (column < columns)
    for (int64_t s = threadIdx.y; s < slices; s += kMergeLanes) total.v[0] += double(partial[s * columns + column]);
  total = merge_over_y(total, dynamic_shared<Value>());
  if (column < columns && threadIdx.y == 0)
    out[column % channels * rows + column / channels] = narrow<T>(acc_t<T>(total.v[0]));
}

template <typename T>
void run_sum_slices(Stream stream, const acc_t<T>* partial, int64_t slices, int64_t rows, int64_t channels, T* out) {
  launch("sum_slices", sum_slices<T>, ceil_div(rows * channels, kMergeColumns), dim3(kMergeColumns, kMergeLanes),
         kMergeColumns * kMergeLanes * sizeof(double), stream, partial, slices, rows, channels, out);
}

}  // namespace deeplab_kernels::cuda
