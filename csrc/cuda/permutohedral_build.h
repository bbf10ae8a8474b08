// Building the permutohedral lattice on the device, without a look at its size from the host: every array holds as many
// vertices as the points could enclose at most, and the number there are stays on the device.
//
//   embed_points     features -> simplex of every point, weights of its vertices
//   insert_vertices  hash table of all vertices; the slot of every (point, vertex of its simplex) pair, an "entry"
//   count_owners, scan_sums, number_vertices
//                    vertices numbered in the order of their first entries, whatever the order of insertion was
//   name_vertices    the number of every entry's vertex
//   sort_pairs, start_lists
//                    the entries of every vertex, in order
//   find_neighbours  the two neighbours of every vertex along each of the d + 1 directions
//
// kD is the dimension where the compiler should know it, or 0.
#pragma once

#include "permutohedral_lattice.h"
#include "scan.h"

namespace deeplab_kernels::cuda {

constexpr int kNumberRounds = 8;  // entries that a thread numbers

using TableSlot = unsigned long long;  // tag (upper half of the vertex's hash) and an entry that has this vertex
constexpr TableSlot kEmptySlot = ~TableSlot(0);

// Axis scales in the points' type.
template <typename T>
struct AxisScales {
  T scale[kMaxLatticeDimension];
};

// Beyond this a position's coordinates would not fit simplex_code.
constexpr double kPositionLimit = 1 << 26;

// q * (d + 1) is a coordinate of the simplex's vertex of remainder 0, rank the coordinate's place among the residuals.
__device__ __forceinline__ int32_t simplex_code(int32_t q, int32_t rank) { return q * 32 + rank; }
constexpr int32_t kNoSimplex = INT32_MIN;

template <int kD>
constexpr int kAxes = kD ? kD : kMaxLatticeDimension;

// features[batch][d][points]; the position of point p, false if it has none.
template <typename T, int kD>
__device__ __forceinline__ bool load_position(const T* features, int64_t p, int64_t points, int d_any,
                                              const AxisScales<T>& scales, T* position) {
  const int d = kD ? kD : d_any;
  const int64_t image = p / points;
  const T* at = features + image * d * points + (p - image * points);
  bool finite = true;
#pragma unroll
  for (int i = 0; i < d; ++i) {
    position[i] = at[i * points] * scales.scale[i];
    finite = finite && position[i] < T(kPositionLimit) && position[i] > T(-kPositionLimit);
  }
  return finite;
}

// code[total][d]
template <typename T, int kD>
__global__ void __launch_bounds__(kBuildThreads)
    embed_points(const T* features, int64_t total, int64_t points, int d_any, AxisScales<T> scales, int32_t* code,
                 T* weight) {
  const int d = kD ? kD : d_any;
  const int64_t p = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (p >= total) return;
  T position[kAxes<kD>], barycentric[kAxes<kD> + 2];
  if (!load_position<T, kD>(features, p, points, d, scales, position)) {
    for (int k = 0; k <= d; ++k) weight[p * (d + 1) + k] = T(NAN);
    code[p * d] = kNoSimplex;
    return;
  }
  int32_t greedy[kAxes<kD> + 1], rank[kAxes<kD> + 1];
  lattice_simplex(position, d, greedy, rank, barycentric);
#pragma unroll
  for (int i = 0; i < d; ++i) code[p * d + i] = simplex_code(greedy[i] / (d + 1), rank[i]);
#pragma unroll
  for (int k = 0; k <= d; ++k) weight[p * (d + 1) + k] = barycentric[k];
}

// A vertex in full: which image's, its remainder and its first d coordinates, each (d + 1) q + remainder.
template <int kD>
struct VertexKey {
  int32_t image, remainder;
  int32_t q[kAxes<kD>];

  __device__ __forceinline__ uint64_t hash(int d_any) const {
    const int d = kD ? kD : d_any;
    uint64_t h = (uint64_t(uint32_t(image)) << 32 | uint32_t(remainder)) * 0x9e3779b97f4a7c15u;
#pragma unroll
    for (int i = 0; i < d; ++i) h = (h ^ (h >> 32) ^ uint32_t(q[i])) * 0x9e3779b97f4a7c15u;
    h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
    return h ^ (h >> 32);
  }
  __device__ __forceinline__ bool equals(const VertexKey& other, int d_any) const {
    const int d = kD ? kD : d_any;
    int32_t difference = (image ^ other.image) | (remainder ^ other.remainder);
#pragma unroll
    for (int i = 0; i < d; ++i) difference |= q[i] ^ other.q[i];
    return difference == 0;
  }
};

// The vertices of all points, read off the codes of their simplices.
struct Simplices {
  const int32_t* code;  // [total][d]
  int64_t points;
  int d;

  template <int kD>
  __device__ __forceinline__ VertexKey<kD> key(uint32_t entry) const {
    const int dim = kD ? kD : d;
    const uint32_t p = entry / uint32_t(dim + 1);
    VertexKey<kD> key;
    key.image = int32_t(p / uint32_t(points));
    key.remainder = int32_t(entry - p * uint32_t(dim + 1));
#pragma unroll
    for (int i = 0; i < dim; ++i) {
      const int32_t value = code[int64_t(p) * dim + i];
      key.q[i] = (value >> 5) - ((value & 31) > dim - key.remainder ? 1 : 0);
    }
    return key;
  }
};

// slot[entries] of the table, -1 for points that have no position. The table holds more slots than there are entries,
// so that a probe ends; a slot's vertex never changes once it has one, only the entry that stands for it, which is the
// smallest of all when the kernel ends.
template <int kD>
__global__ void __launch_bounds__(kBuildThreads)
    insert_vertices(Simplices simplices, int64_t entries, TableSlot* table, uint32_t mask, int32_t* slot) {
  const int64_t e = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (e >= entries) return;
  const int d = simplices.d, dim = kD ? kD : d;
  if (simplices.code[int64_t(uint32_t(e) / uint32_t(dim + 1)) * dim] == kNoSimplex) {
    slot[e] = -1;
    return;
  }
  const VertexKey<kD> key = simplices.template key<kD>(uint32_t(e));
  const uint64_t hash = key.hash(d);
  const TableSlot mine = (TableSlot(hash) >> 32 << 32) | TableSlot(e);
  uint32_t at = uint32_t(hash) & mask;
  for (;; at = (at + 1) & mask) {
    TableSlot there = table[at];
    if (there == kEmptySlot) {
      there = atomicCAS(&table[at], kEmptySlot, mine);
      if (there == kEmptySlot) break;
    }
    if (there >> 32 == mine >> 32 && key.equals(simplices.template key<kD>(uint32_t(there)), d)) {
      if (mine < there) atomicMin(&table[at], mine);
      break;
    }
  }
  slot[e] = int32_t(at);
}

__device__ __forceinline__ bool owns_vertex(const TableSlot* table, const int32_t* slot, int64_t e, int64_t entries) {
  return e < entries && slot[e] >= 0 && uint32_t(table[slot[e]]) == uint32_t(e);
}

// sums[block]: entries that are the first of their vertex.
static __global__ void __launch_bounds__(kScanThreads)
    count_owners(const TableSlot* table, const int32_t* slot, int64_t entries, int32_t* sums) {
  int32_t count = 0;
  for (int round = 0; round < kNumberRounds; ++round) {
    const int64_t e = (int64_t(blockIdx.x) * kNumberRounds + round) * kScanThreads + threadIdx.x;
    count += owns_vertex(table, slot, e, entries);
  }
  const Scan scan = block_scan(count, dynamic_shared<int32_t>());
  if (threadIdx.x == 0) sums[blockIdx.x] = scan.total;
}

// Puts the vertices' numbers into the table in place of their first entries, and those into owner[vertices]. A number
// is at most the entry, and only that entry looks for its own value in the slot, so replacing it while others look is
// safe.
static __global__ void __launch_bounds__(kScanThreads)
    number_vertices(TableSlot* table, const int32_t* slot, int64_t entries, const int32_t* before, int32_t* owner) {
  int32_t next = before[blockIdx.x];
  for (int round = 0; round < kNumberRounds; ++round) {
    const int64_t e = (int64_t(blockIdx.x) * kNumberRounds + round) * kScanThreads + threadIdx.x;
    const bool owns = owns_vertex(table, slot, e, entries);
    const Scan scan = block_scan(owns, dynamic_shared<int32_t>());
    if (owns) {
      const int32_t number = next + scan.before;
      owner[number] = int32_t(e);
      table[slot[e]] = (table[slot[e]] >> 32 << 32) | TableSlot(number);
    }
    next += scan.total;
  }
}

// vertex[entries], and the entries' own numbers to sort along.
static __global__ void __launch_bounds__(kBuildThreads)
    name_vertices(const TableSlot* table, const int32_t* slot, int64_t entries, int32_t* vertex, uint32_t* entry) {
  const int64_t e = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (e >= entries) return;
  vertex[e] = slot[e] < 0 ? int32_t(entries) : int32_t(uint32_t(table[slot[e]]));
  entry[e] = uint32_t(e);
}

static __global__ void __launch_bounds__(kBuildThreads)
    start_lists(const int32_t* list_vertex, int64_t entries, const int32_t* vertices, int32_t* start) {
  const int64_t i = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (i >= entries) return;
  const int32_t vertex = list_vertex[i], count = *vertices;
  if (i == 0 || list_vertex[i - 1] != vertex) start[vertex < count ? vertex : count] = int32_t(i);
  if (i == entries - 1 && vertex < count) start[count] = int32_t(entries);
}

// The number of the vertex, or -1.
template <int kD>
__device__ __forceinline__ int32_t find_vertex(const VertexKey<kD>& key, const Simplices& simplices,
                                               const TableSlot* table, uint32_t mask, const int32_t* owner) {
  const uint64_t hash = key.hash(simplices.d);
  for (uint32_t at = uint32_t(hash) & mask;; at = (at + 1) & mask) {
    const TableSlot there = table[at];
    if (there == kEmptySlot) return -1;
    if (there >> 32 != hash >> 32) continue;
    const int32_t number = int32_t(uint32_t(there));
    if (key.equals(simplices.template key<kD>(uint32_t(owner[number])), simplices.d)) return number;
  }
}

// Threads: x directions, y vertices. neighbour[d + 1][entries][2]: along direction j all coordinates + 1 and coordinate
// j - d, and the reverse.
template <int kD>
__global__ void __launch_bounds__(kBuildThreads)
    find_neighbours(Simplices simplices, const TableSlot* table, uint32_t mask, const int32_t* owner,
                    const int32_t* vertices, int64_t entries, int32_t* neighbour) {
  const int d = kD ? kD : simplices.d;
  const int64_t count = *vertices;
  const int j = threadIdx.x;
  for (int64_t v = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; v < count; v += int64_t(gridDim.x) * blockDim.y) {
    const VertexKey<kD> key = simplices.template key<kD>(uint32_t(owner[v]));
    for (int side = 0; side < 2; ++side) {
      // Of coordinates (d + 1) q + remainder, one step changes either the remainder and q_j, or wraps the remainder and
      // changes every q but q_j.
      const int step = side == 0 ? 1 : -1, last = side == 0 ? d : 0;
      const bool wraps = key.remainder == last;
      VertexKey<kD> other = key;
      other.remainder = wraps ? d - last : key.remainder + step;
#pragma unroll
      for (int a = 0; a < d; ++a) other.q[a] += wraps ? (a == j ? 0 : step) : (a == j ? -step : 0);
      neighbour[(j * entries + v) * 2 + side] = find_vertex(other, simplices, table, mask, owner);
    }
  }
}

// grad_features[batch][d][points] from the gradients of both uses of the weights.
template <typename T, int kD>
__global__ void __launch_bounds__(kBuildThreads, 4)
    feature_gradient(const T* features, int64_t total, int64_t points, int d_any, AxisScales<T> scales,
                     const T* grad_out_weight, const T* grad_in_weight, T* grad_features) {
  const int d = kD ? kD : d_any;
  const int64_t p = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x;
  if (p >= total) return;
  const int64_t image = p / points;
  T* out = grad_features + image * d * points + (p - image * points);
  T position[kAxes<kD>], barycentric[kAxes<kD> + 2], gradient[kAxes<kD> + 1];
  if (!load_position<T, kD>(features, p, points, d, scales, position)) {
    for (int i = 0; i < d; ++i) out[i * points] = T(NAN);
    return;
  }
  int32_t greedy[kAxes<kD> + 1], rank[kAxes<kD> + 1];
  lattice_simplex(position, d, greedy, rank, barycentric);
#pragma unroll
  for (int k = 0; k <= d; ++k) gradient[k] = grad_out_weight[p * (d + 1) + k] + grad_in_weight[p * (d + 1) + k];
  lattice_simplex_backward(gradient, rank, d, position);
#pragma unroll
  for (int i = 0; i < d; ++i) out[i * points] = position[i] * scales.scale[i];
}

}  // namespace deeplab_kernels::cuda
