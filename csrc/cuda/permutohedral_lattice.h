// A lattice in device memory.
#pragma once

#include "../core/permutohedral.h"
#include "pack.h"
#include "permutohedral.h"

namespace deeplab_kernels::cuda {

constexpr int kBuildThreads = 256;       // of kernels with one element a thread
constexpr int64_t kVertexBlocks = 2048;  // of kernels that stride over a number only the device knows

// A built lattice's arrays, all in one block of memory.
template <typename T>
struct Lattice {
  int64_t total, entries;
  int d;
  int32_t* vertex;       // [total][d + 1] vertex of each entry; `entries` for points whose features are not finite
  T* weight;             // [total][d + 1] barycentric weights; NaN for such points
  int32_t* list_vertex;  // [entries] vertices in order, each as often as it has entries
  int32_t* list_entry;   // [entries] those entries
  int32_t* start;        // [entries + 1] where each vertex's entries begin in the list, and the end
  int32_t* neighbour;    // [d + 1][entries][2], -1 where there is none
  int32_t* vertices;     // how many there are
};

template <typename T>
__global__ void __launch_bounds__(kBuildThreads) fill(T* data, int64_t count, T value) {
  for (int64_t i = int64_t(blockIdx.x) * kBuildThreads + threadIdx.x; i < count;
       i += int64_t(gridDim.x) * kBuildThreads)
    data[i] = value;
}

}  // namespace deeplab_kernels::cuda
