// The kernels as each instruction set's file offers them to gaussian_filter.cpp, which sorts and packs the points.
#pragma once

#include "../instruction_set.h"
#include "gaussian_filter.h"

namespace deeplab_kernels::cpu {

// Points of one skipping decision as summands. Arrays of points are padded to a multiple of it with copies of the last
// point, with values and gradients zero.
constexpr int64_t kBlockPoints = 64;

// One image's points in their sorted order, block by block; null where not needed.
template <typename A>
struct SortedImage {
  const A* features;     // [blocks][dimensions][kBlockPoints]
  const A* low;          // [dimensions][blocks], the bounding boxes of the blocks
  const A* high;         // [dimensions][blocks]
  const A* rows;         // [blocks][kBlockPoints][channels]: what the filter sums up
  const A* values;       // [blocks][channels][kBlockPoints], for the gradient of the features, as is
  const A* grad;         // [blocks][channels][kBlockPoints]
  const int64_t* order;  // [points], place of each sorted point in out and grad_features
  A* out;                // [channels][points], the filtered rows
  A* grad_features;      // [dimensions][points]
};

template <typename A>
struct FilterJob {
  const SortedImage<A>* images;  // of those whose features are finite
  int64_t count;
  int64_t channels, points, dimensions;
  int64_t blocks;       // points / kBlockPoints, rounded up
  A cutoff;             // on squared distances
  int64_t group_tiles;  // tiles of outputs that one piece of work takes through all summands together
};

#define DK_DECLARE_ISA(isa)                                              \
  namespace isa {                                                        \
  template <typename A>                                                  \
  struct GaussianFilter {                                                \
    static int64_t tile_points(); /* of outputs; divides kBlockPoints */ \
    static void run(const FilterJob<A>& job, const Parallel& parallel);  \
  };                                                                     \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
