// Passes of a filter over a built lattice. Values lie in rows, one a point or vertex, channels fastest, padded with
// zeros to whole 16-byte packs. Threads: x over the packs of a row, y over rows; where the rows are vertices, whose
// number only the device knows, blocks stride over them.
//
//   splat_chunks, splat_joins   points -> vertices: sums over the sorted list of entries, in chunks of equal length
//                               whatever the vertices' lists are; a vertex whose list crosses chunks is put together
//                               from their parts, in order
//   blur                        along one direction
//   slice_rows                  vertices -> points
//   entry_gradient              d / d weight of every entry
#pragma once

#include "permutohedral_lattice.h"

namespace deeplab_kernels::cuda {

constexpr int kRowThreads = 256;
constexpr int kChunk = 32;  // entries that a thread of splat_chunks sums
constexpr int kBatch = 8;   // of them in flight at a time

// A point or vertex and the weight of its row.
template <typename T>
struct alignas(2 * sizeof(T)) Weighted {
  int32_t row;
  T weight;
};

template <typename T>
__device__ __forceinline__ Weighted<T> load_weighted(const Weighted<T>* at) {
  const Raw<T, 2> raw = __ldg(reinterpret_cast<const Raw<T, 2>*>(at));
  Weighted<T> value;
  memcpy(&value, &raw, sizeof(raw));
  return value;
}

inline dim3 row_block(int64_t packs) {
  const unsigned x = unsigned(at_most(at_least(packs, 1), 128));
  return dim3(x, kRowThreads / x);
}
inline int64_t row_blocks(int64_t rows, dim3 block) { return ceil_div(rows, block.y); }
inline int64_t vertex_blocks(int64_t most, dim3 block) { return at_most(ceil_div(most, block.y), kVertexBlocks); }

template <typename T, int V>
__device__ __forceinline__ Pack<T, V> load_pack(const T* rows, int64_t row, int64_t stride, int64_t pack) {
  return unpack<T, V>(load_raw<T, V>(rows + row * stride + pack * V));
}
template <typename T, int V>
__device__ __forceinline__ void store_pack(T* rows, int64_t row, int64_t stride, int64_t pack, const Pack<T, V>& v) {
  store_raw<T, V>(rows + row * stride + pack * V, pack_raw<T, V>(v));
}
// sum += weight * value; a weight of 0 keeps even NaN out.
template <typename T, int V>
__device__ __forceinline__ void add_scaled(Pack<T, V>& sum, T weight, const Pack<T, V>& value) {
#pragma unroll
  for (int e = 0; e < V; ++e) sum.v[e] += weight * value.v[e];
}

// The weights of one filter: a point's entries on the way in times `in`, on the way out times `out` (both per point, or
// null for 1) and the filter's constant. The two may be the same numbers the other way round for the transposed filter.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads)
    weigh_entries(Lattice<T> lattice, const T* in, const T* out, T scale, Weighted<T>* splat, Weighted<T>* slice) {
  const int64_t i = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (i >= lattice.entries) return;
  const uint32_t corners = uint32_t(lattice.d + 1);
  const int32_t vertices = *lattice.vertices;
  const uint32_t entry = uint32_t(lattice.list_entry[i]), point = entry / corners;
  splat[i] = {int32_t(point),
              lattice.list_vertex[i] < vertices ? lattice.weight[entry] * (in ? in[point] : T(1)) : T(0)};
  const int32_t vertex = lattice.vertex[i];
  const T factor = scale * (out ? out[uint32_t(i) / corners] : T(1));
  slice[i] = {vertex < vertices ? vertex : -1, factor == T(0) ? T(0) : lattice.weight[i] * factor};
}

// parts[chunks][2][stride]: of a chunk's first list, if it began in an earlier chunk, and of its last, if it goes on.
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    splat_chunks(const int32_t* list_vertex, const Weighted<T>* splat, int64_t entries, const int32_t* vertices,
                 const T* rows, int64_t stride, T* out, T* parts) {
  constexpr int V = kVector<T>;
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t begin = chunk * kChunk, end = at_most(begin + kChunk, entries);
  if (begin >= end) return;
  const int32_t count = *vertices;
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
    int32_t current = list_vertex[begin];
    bool began_before = begin > 0 && list_vertex[begin - 1] == current;
    Pack<T, V> sum{};
    for (int64_t i = begin; i < end; i += kBatch) {
      int32_t vertex[kBatch];
      T weight[kBatch];
      Pack<T, V> value[kBatch];
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        vertex[u] = i + u < end ? list_vertex[i + u] : current;
        const Weighted<T> from = i + u < end ? load_weighted(splat + i + u) : Weighted<T>{0, T(0)};
        weight[u] = from.weight;
        value[u] = from.weight != T(0) ? load_pack<T, V>(rows, from.row, stride, pack) : Pack<T, V>{};
      }
#pragma unroll
      for (int u = 0; u < kBatch; ++u) {
        if (i + u >= end) break;
        if (vertex[u] != current) {
          if (began_before)
            store_pack<T, V>(parts, chunk * 2, stride, pack, sum);
          else
            store_pack<T, V>(out, current, stride, pack, sum);
          current = vertex[u], began_before = false, sum = Pack<T, V>{};
        }
        add_scaled(sum, weight[u], value[u]);
      }
    }
    if (current >= count) continue;  // points without a vertex come last in the list
    if (began_before)
      store_pack<T, V>(parts, chunk * 2, stride, pack, sum);
    else if (end < entries && list_vertex[end] == current)
      store_pack<T, V>(parts, chunk * 2 + 1, stride, pack, sum);
    else
      store_pack<T, V>(out, current, stride, pack, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4)
    splat_joins(const int32_t* list_vertex, const int32_t* start, int64_t entries, const int32_t* vertices,
                const T* parts, int64_t stride, T* out) {
  constexpr int V = kVector<T>;
  const int64_t chunk = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t end = (chunk + 1) * kChunk;
  if (end >= entries) return;
  const int32_t vertex = list_vertex[end];
  // This chunk joins the list that begins in it and goes on.
  if (vertex >= *vertices || list_vertex[end - 1] != vertex || start[vertex] < chunk * kChunk) return;
  const int64_t last = (start[vertex + 1] - 1) / kChunk;
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
    Pack<T, V> sum = load_pack<T, V>(parts, chunk * 2 + 1, stride, pack);
#pragma unroll 8
    for (int64_t c = chunk + 1; c <= last; ++c) add_scaled(sum, T(1), load_pack<T, V>(parts, c * 2, stride, pack));
    store_pack<T, V>(out, vertex, stride, pack, sum);
  }
}

// out = in + (one neighbour + the other) / 2
template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    blur(const int32_t* neighbour, const int32_t* vertices, const T* in, int64_t stride, T* out) {
  constexpr int V = kVector<T>;
  const int64_t count = *vertices;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; v < count; v += int64_t(gridDim.x) * blockDim.y) {
    const int32_t a = neighbour[v * 2], b = neighbour[v * 2 + 1];
    for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x) {
      const Pack<T, V> one = a >= 0 ? load_pack<T, V>(in, a, stride, pack) : Pack<T, V>{};
      const Pack<T, V> other = b >= 0 ? load_pack<T, V>(in, b, stride, pack) : Pack<T, V>{};
      Pack<T, V> sum = load_pack<T, V>(in, v, stride, pack);
#pragma unroll
      for (int e = 0; e < V; ++e) sum.v[e] += T(0.5) * (one.v[e] + other.v[e]);
      store_pack<T, V>(out, v, stride, pack, sum);
    }
  }
}

// One pack of the filter's result for point p. Without a position it is NaN, or 0 if the weights are.
template <typename T, int V>
__device__ __forceinline__ Pack<T, V> slice_pack(const Weighted<T>* slice, int d, const T* blurred, int64_t p,
                                                 int64_t stride, int64_t pack) {
  Pack<T, V> sum{};
#pragma unroll 4
  for (int k = 0; k <= d; ++k) {
    const Weighted<T> from = load_weighted(slice + p * (d + 1) + k);
    add_scaled(sum, from.weight, from.row >= 0 ? load_pack<T, V>(blurred, from.row, stride, pack) : Pack<T, V>{});
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    slice_rows(const Weighted<T>* slice, int d, int64_t total, const T* blurred, int64_t stride, T* rows) {
  constexpr int V = kVector<T>;
  const int64_t p = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
  if (p >= total) return;
  for (int64_t pack = threadIdx.x; pack < stride / V; pack += blockDim.x)
    store_pack<T, V>(rows, p, stride, pack, slice_pack<T, V>(slice, d, blurred, p, stride, pack));
}

// grad_weight[total][d + 1] += scale * factor[p] * (rows of p) . (vertex values); factor may be null.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads)
    entry_gradient(Lattice<T> lattice, const T* rows, const T* blurred, int64_t stride, const T* factor, T scale,
                   T* grad_weight) {
  constexpr int V = kVector<T>;
  const int64_t e = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (e >= lattice.entries) return;
  const int64_t p = uint32_t(e) / uint32_t(lattice.d + 1);
  const int32_t vertex = lattice.vertex[e];
  T sum = vertex < *lattice.vertices ? T(0) : T(NAN);
  if (sum == T(0) && (!factor || factor[p] != T(0))) {
#pragma unroll 4
    for (int64_t pack = 0; pack < stride / V; ++pack) {
      const Pack<T, V> a = load_pack<T, V>(rows, p, stride, pack), b = load_pack<T, V>(blurred, vertex, stride, pack);
#pragma unroll
      for (int i = 0; i < V; ++i) sum += a.v[i] * b.v[i];
    }
    sum *= factor ? scale * factor[p] : scale;
  }
  grad_weight[e] += sum;
}

constexpr int kTile = 32, kTileRows = 8;

// (batch, channels, points) -> rows [batch * points][stride], padded with zeros. Blocks: x channels, y points of a
// tile.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows)
    to_rows(const T* data, int64_t channels, int64_t points, int64_t stride, int64_t tiles, T factor, T* rows) {
  T* tile = dynamic_shared<T>();  // [kTile channels][kTile + 1]
  const int64_t image = blockIdx.x / tiles, first = (blockIdx.x - image * tiles) * kTile;
  for (int64_t c0 = 0; c0 < stride; c0 += kTile) {
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t c = c0 + y, n = first + threadIdx.x;
      if (c < channels && n < points) tile[y * (kTile + 1) + threadIdx.x] = data[(image * channels + c) * points + n];
    }
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t c = c0 + threadIdx.x, n = first + y;
      if (c < stride && n < points)
        rows[(image * points + n) * stride + c] =
            c < channels ? factor * tile[int(threadIdx.x) * (kTile + 1) + y] : T(0);
    }
    __syncthreads();
  }
}

// The reverse: data = factor * rows.
template <typename T>
__global__ void __launch_bounds__(kTile* kTileRows)
    from_rows(const T* rows, int64_t channels, int64_t points, int64_t stride, int64_t tiles, T factor, T* data) {
  T* tile = dynamic_shared<T>();  // [kTile points][kTile + 1]
  const int64_t image = blockIdx.x / tiles, first = (blockIdx.x - image * tiles) * kTile;
  for (int64_t c0 = 0; c0 < channels; c0 += kTile) {
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t c = c0 + threadIdx.x, n = first + y;
      if (c < channels && n < points) tile[y * (kTile + 1) + threadIdx.x] = rows[(image * points + n) * stride + c];
    }
    __syncthreads();
    for (int y = threadIdx.y; y < kTile; y += kTileRows) {
      const int64_t c = c0 + y, n = first + threadIdx.x;
      if (c < channels && n < points)
        data[(image * channels + c) * points + n] = factor * tile[int(threadIdx.x) * (kTile + 1) + y];
    }
    __syncthreads();
  }
}

// What the normalisation multiplies by, from n = K 1 (the first of each row): 1 / n, or its square root; times the
// mask.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads)
    normalization_factors(const T* rows, int64_t stride, int64_t total, bool root, const T* mask, T* factor) {
  const int64_t p = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (p >= total) return;
  const T n = rows[p * stride] + T(1e-20);
  factor[p] = mask && mask[p] == T(0) ? T(0) : T(1) / (root ? sqrt(n) : n);
}

// The gradient of n: what the weights on the way out (in) would gain by their own factor is weight * grad_weight,
// summed over the point's entries. Adds up what of both depends on n. grad_n goes to the first of each row, zeros to
// the rest.
template <typename T>
__global__ void __launch_bounds__(kBuildThreads)
    normalization_gradient(Lattice<T> lattice, const T* factor, bool root, const T* grad_out_weight,
                           const T* grad_in_weight, int64_t stride, T* rows) {
  const int64_t p = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (p >= lattice.total) return;
  T sum = T(0);
  for (int k = 0; k <= lattice.d; ++k) {
    const int64_t e = p * (lattice.d + 1) + k;
    sum += lattice.weight[e] *
           ((grad_out_weight ? grad_out_weight[e] : T(0)) + (grad_in_weight ? grad_in_weight[e] : T(0)));
  }
  const T f = factor[p];
  rows[p * stride] = f == T(0) ? T(0) : root ? T(-0.5) * sum * f * f : -sum * f;
  for (int64_t c = 1; c < stride; ++c) rows[p * stride + c] = T(0);
}

}  // namespace deeplab_kernels::cuda
