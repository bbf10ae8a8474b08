// Kernels of the mean field beside those of its filters. Rows as in permutohedral_passes.h, one a point, labels
// fastest.
//
//   mean_field_step           slice + normalisation + compatibility + unary + softmax: all kernels' blurred vertices
//   are
//                             read once, Q is written once
//   mean_field_backward_step  the same the other way: slice + compatibility + softmax's derivative
//   mix_labels                rows times a compatibility matrix
//   outer_products            sums over the points for the gradient of a compatibility matrix
#pragma once

#include "permutohedral_passes.h"
#include "reduce.h"

namespace deeplab_kernels::cuda {

constexpr int kMostSources = 4;  // kernels that one step takes; further ones take another step

// Blocks of a step on a multiprocessor: as many as leave it the registers it needs.
template <typename T>
constexpr int kStepBlocks = sizeof(T) == 8 ? 2 : 3;

// A (labels, labels) matrix C as the kernels read it.
template <typename T>
struct Compatibility {
  T* columns;     // [labels][stride] row j: C[0][j], C[1][j] ...
  T* rows;        // [labels][stride] row j: C[j][0], C[j][1] ..., the columns of the transposed matrix
  T* diagonal;    // [stride]
  int32_t* full;  // whether any other element is not 0

  Compatibility transposed() const { return {rows, columns, diagonal, full}; }
};

template <typename T>
struct Source {
  const Weighted<T>* slice;
  const T* blurred;
  int d;
  Compatibility<T> compatibility;
  T* sliced;  // if not null, gets the rows before the compatibility
};

template <typename T>
struct Sources {
  int count;
  Source<T> source[kMostSources];
};

// One block.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads, 4)
    prepare_compatibility(const T* matrix, int64_t labels, int64_t stride, Compatibility<T> out) {
  if (threadIdx.x == 0) *out.full = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < labels * stride; i += kBuildThreads) {
    const int64_t j = i / stride, a = i - j * stride;
    out.columns[i] = a < labels ? matrix[a * labels + j] : T(0);
    out.rows[i] = a < labels ? matrix[j * labels + a] : T(0);
    if (a < labels && a != j && matrix[a * labels + j] != T(0)) atomicMax(out.full, 1);
  }
  for (int64_t a = threadIdx.x; a < stride; a += kBuildThreads)
    out.diagonal[a] = a < labels ? matrix[a * labels + a] : T(0);
}

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> shared_pack(const T* at) {
  return unpack<T, V>(*reinterpret_cast<const Raw<T, V>*>(at));
}
template <typename T, int V>
__device__ __forceinline__ void set_shared_pack(T* at, const Pack<T, V>& pack) {
  *reinterpret_cast<Raw<T, V>*>(at) = pack_raw<T, V>(pack);
}

// sum -= diagonal * value, one pack
template <typename T, int V>
__device__ __forceinline__ void subtract_product(T* sum, const Pack<T, V>& factor, const Pack<T, V>& value) {
  Pack<T, V> total = shared_pack<T, V>(sum);
#pragma unroll
  for (int e = 0; e < V; ++e) total.v[e] -= factor.v[e] * value.v[e];
  set_shared_pack<T, V>(sum, total);
}

// sum -= (matrix of these columns) * row, one pack of the result.
template <typename T, int V>
__device__ __forceinline__ void subtract_mixed(T* sum, const T* columns, const T* row, int64_t labels, int64_t stride,
                                               int64_t pack) {
  Pack<T, V> total = shared_pack<T, V>(sum);
  for (int64_t j = 0; j < labels; ++j) {
    const T value = row[j];
    const Pack<T, V> column = load_pack<T, V>(columns, j, stride, pack);
#pragma unroll
    for (int e = 0; e < V; ++e) total.v[e] -= column.v[e] * value;
  }
  set_shared_pack<T, V>(sum, total);
}

// sums[stride] of point p -= sum_m C_m F_m ..., each thread its packs; message[stride] is the point's room for a row.
template <typename T>
__device__ __forceinline__ void subtract_messages(const Sources<T>& sources, int64_t p, bool valid, int64_t labels,
                                                  int64_t stride, T* sums, T* message) {
  constexpr int V = kVector<T>;
  for (int m = 0; m < sources.count; ++m) {
    const Source<T>& s = sources.source[m];
    const bool full = *s.compatibility.full != 0;  // the same for all threads
    for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x) {
      const Pack<T, V> value = slice_pack<T, V>(s.slice, s.d, s.blurred, p, stride, pack);
      if (s.sliced) store_pack<T, V>(s.sliced, p, stride, pack, value);
      if (full)
        set_shared_pack<T, V>(message + pack * V, value);
      else
        subtract_product<T, V>(sums + pack * V, load_pack<T, V>(s.compatibility.diagonal, 0, stride, pack), value);
    }
    if (!full) continue;
    __syncthreads();
    for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x)
      subtract_mixed<T, V>(sums + pack * V, s.compatibility.columns, message, labels, stride, pack);
    __syncthreads();
  }
}

// Threads of the two step kernels, x over packs and y over points, and their shared memory.
struct StepShape {
  dim3 block;
  int64_t shared_bytes;
};

template <typename T>
StepShape step_shape(int64_t stride) {
  const unsigned x = unsigned(at_most(stride / kVector<T>, 32));
  const int64_t per_point = (2 * stride + 2 * x) * sizeof(T);
  const unsigned y = unsigned(at_least(at_most(kRowThreads / x, kMaxSharedBytes / per_point), 1));
  return {dim3(x, y), y * per_point};
}

// The block's shared memory: per point its sums, a message, and what its threads tell each other.
template <typename T>
struct StepMemory {
  T* sums;
  T* message;
  T* first;   // [blockDim.x]
  T* second;  // [blockDim.x]

  __device__ __forceinline__ explicit StepMemory(int64_t stride) {
    T* all = dynamic_shared<T>();
    const int64_t points = blockDim.y, y = threadIdx.y;
    sums = all + y * stride;
    message = all + (points + y) * stride;
    first = all + 2 * points * stride + y * 2 * blockDim.x;
    second = first + blockDim.x;
  }
};

__device__ __forceinline__ float exponential(float v) { return expf(v); }
__device__ __forceinline__ double exponential(double v) { return exp(v); }

// energy_out = energy - sum_m C_m F_m Q and q = softmax of that, each if not null; energy_out may be energy.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kStepBlocks<T>)
    mean_field_step(Sources<T> sources, const T* energy, int64_t total, int64_t labels, int64_t stride, T* energy_out,
                    T* q) {
  constexpr int V = kVector<T>;
  const StepMemory<T> memory(stride);
  const int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool valid = p < total;
  const T lowest = T(-INFINITY);
  for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x)
    set_shared_pack<T, V>(memory.sums + pack * V, load_pack<T, V>(energy, p, stride, pack));
  subtract_messages(sources, p, valid, labels, stride, memory.sums, memory.message);
  T top = lowest, sum = T(0);
  for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x) {
    const Pack<T, V> e = shared_pack<T, V>(memory.sums + pack * V);
    if (energy_out) store_pack<T, V>(energy_out, p, stride, pack, e);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (pack * V + i < labels && e.v[i] > top) top = e.v[i];
  }
  if (!q) return;
  for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x) {
    const Pack<T, V> e = shared_pack<T, V>(memory.sums + pack * V);
#pragma unroll
    for (int i = 0; i < V; ++i)
      if (pack * V + i < labels && e.v[i] != lowest) sum += exponential(e.v[i] - top);
  }
  memory.first[threadIdx.x] = top, memory.second[threadIdx.x] = sum;
  __syncthreads();
  if (!valid) return;
  T highest = lowest, norm = T(0);
  for (int x = 0; x < int(blockDim.x); ++x) highest = memory.first[x] > highest ? memory.first[x] : highest;
  for (int x = 0; x < int(blockDim.x); ++x)
    norm += memory.second[x] != T(0) ? memory.second[x] * exponential(memory.first[x] - highest) : T(0);
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
    const Pack<T, V> e = shared_pack<T, V>(memory.sums + pack * V);
    Pack<T, V> share;
#pragma unroll
    for (int i = 0; i < V; ++i) share.v[i] = pack * V + i < labels ? exponential(e.v[i] - highest) / norm : T(0);
    store_pack<T, V>(q, p, stride, pack, share);
  }
}

// grad_q = (grad_q if not null) - sum_m C_m^T F_m^T (gradient of E). If last: turned into the gradient of the previous
// E by the softmax that gave q, written to grad_energy, and added to grad_sum; otherwise written to grad_energy.
template <typename T>
__global__ void __launch_bounds__(kRowThreads, kStepBlocks<T>)
    mean_field_backward_step(Sources<T> sources, const T* grad_q, const T* q, int64_t total, int64_t labels,
                             int64_t stride, bool last, T* grad_energy, T* grad_sum) {
  constexpr int V = kVector<T>;
  const StepMemory<T> memory(stride);
  const int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool valid = p < total;
  for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x)
    set_shared_pack<T, V>(memory.sums + pack * V, grad_q ? load_pack<T, V>(grad_q, p, stride, pack) : Pack<T, V>{});
  subtract_messages(sources, p, valid, labels, stride, memory.sums, memory.message);
  T part = T(0);
  for (int64_t pack = threadIdx.x; valid && pack < stride / V; pack += blockDim.x) {
    const Pack<T, V> grad = shared_pack<T, V>(memory.sums + pack * V);
    if (!last) {
      store_pack<T, V>(grad_energy, p, stride, pack, grad);
      continue;
    }
    const Pack<T, V> share = load_pack<T, V>(q, p, stride, pack);
#pragma unroll
    for (int i = 0; i < V; ++i) part += share.v[i] * grad.v[i];
  }
  if (!last) return;
  memory.first[threadIdx.x] = part;
  __syncthreads();
  if (!valid) return;
  T dot = T(0);
  for (int x = 0; x < int(blockDim.x); ++x) dot += memory.first[x];
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
    Pack<T, V> grad = shared_pack<T, V>(memory.sums + pack * V);
    const Pack<T, V> share = load_pack<T, V>(q, p, stride, pack);
    Pack<T, V> sum = load_pack<T, V>(grad_sum, p, stride, pack);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      grad.v[i] = share.v[i] * (grad.v[i] - dot);
      sum.v[i] += grad.v[i];
    }
    store_pack<T, V>(grad_energy, p, stride, pack, grad);
    store_pack<T, V>(grad_sum, p, stride, pack, sum);
  }
}

// out = -C rows, of every point.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    mix_labels(Compatibility<T> compatibility, const T* rows, int64_t total, int64_t labels, int64_t stride, T* out) {
  constexpr int V = kVector<T>;
  const int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (p >= total) return;
  const bool full = *compatibility.full != 0;
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
    Pack<T, V> sum{};
    if (full) {
      for (int64_t j = 0; j < labels; ++j)
        add_scaled(sum, -rows[p * stride + j], load_pack<T, V>(compatibility.columns, j, stride, pack));
    } else {
      const Pack<T, V> value = load_pack<T, V>(rows, p, stride, pack);
      const Pack<T, V> factor = load_pack<T, V>(compatibility.diagonal, 0, stride, pack);
#pragma unroll
      for (int e = 0; e < V; ++e) sum.v[e] = -factor.v[e] * value.v[e];
    }
    store_pack<T, V>(out, p, stride, pack, sum);
  }
}

constexpr int kOuterSide = 16, kOuterTile = 2 * kOuterSide;  // threads and labels along a side of the tile
constexpr int kOuterPoints = 32;                             // that a block holds at a time

// partial[slice][b][a] -= sum over the slice's points of left[a] * right[b]. A thread has 2 x 2 elements of a tile of
// kOuterTile x kOuterTile; its columns lie kOuterSide apart.
template <typename T>
__global__ void __launch_bounds__(kOuterSide* kOuterSide)
    outer_products(const T* left, const T* right, int64_t total, int64_t labels, int64_t stride, int64_t slices,
                   T* partial) {
  T* left_tile = dynamic_shared<T>();  // [kOuterPoints][kOuterTile]
  T* right_tile = left_tile + kOuterPoints * kOuterTile;
  const int64_t tiles = ceil_div(labels, kOuterTile);
  const int64_t slice = blockIdx.x / (tiles * tiles), tile = blockIdx.x - slice * tiles * tiles;
  const int64_t first_a = tile % tiles * kOuterTile, first_b = tile / tiles * kOuterTile;
  const int thread = threadIdx.y * kOuterSide + threadIdx.x;
  T sum[2][2] = {};
  for (int64_t p0 = slice * kOuterPoints; p0 < total; p0 += slices * kOuterPoints) {
    for (int i = thread; i < kOuterPoints * kOuterTile; i += kOuterSide * kOuterSide) {
      const int64_t p = p0 + i / kOuterTile, c = i % kOuterTile;
      left_tile[i] = p < total && first_a + c < labels ? left[p * stride + first_a + c] : T(0);
      right_tile[i] = p < total && first_b + c < labels ? right[p * stride + first_b + c] : T(0);
    }
    __syncthreads();
#pragma unroll 8
    for (int i = 0; i < kOuterPoints; ++i) {
      const T* a = left_tile + i * kOuterTile + threadIdx.x;
      const T* b = right_tile + i * kOuterTile + threadIdx.y;
#pragma unroll
      for (int v = 0; v < 2; ++v)
#pragma unroll
        for (int u = 0; u < 2; ++u) sum[v][u] += a[u * kOuterSide] * b[v * kOuterSide];
    }
    __syncthreads();
  }
#pragma unroll
  for (int v = 0; v < 2; ++v)
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int64_t a = first_a + threadIdx.x + u * kOuterSide, b = first_b + threadIdx.y + v * kOuterSide;
      if (a < labels && b < labels) partial[(slice * labels + b) * labels + a] -= sum[v][u];
    }
}

template <typename T>
__global__ void __launch_bounds__(kBuildThreads) mask_values(const uint8_t* mask, int64_t count, T* values) {
  const int64_t i = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (i < count) values[i] = mask[i] ? T(1) : T(0);
}

}  // namespace deeplab_kernels::cuda
