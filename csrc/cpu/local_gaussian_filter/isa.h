// The kernels as each instruction set's file offers them to local_gaussian_filter.cpp, which makes room for windows
// and whole vectors beside the rows.
#pragma once

#include "../instruction_set.h"
#include "local_gaussian_filter.h"

namespace deeplab_kernels::cpu {

// One image; null where not needed. Padded planes have pixel (y, x) at y * pitch + x, with radius_h pixels of zeros to
// the left of every row and at least as many to the right of its last tile.
template <typename A>
struct PaddedImage {
  const A* features;  // [dimensions][plane]
  const A* rows;      // [channels][plane]: what the filter sums up
  const A* values;    // [channels][plane], for the gradient of the features, as is
  const A* grad;      // [channels][plane]
  A* out;             // (channels, height, width), the filtered rows
  A* grad_features;   // (dimensions, height, width)
};

template <typename A>
struct WindowJob {
  const PaddedImage<A>* images;  // of those whose features are finite
  int64_t count;
  WindowShape shape;  // radii inside the image
  int64_t pitch, plane;
};

#define DK_DECLARE_ISA(isa)                                             \
  namespace isa {                                                       \
  template <typename A>                                                 \
  struct LocalGaussianFilter {                                          \
    static int64_t tile_columns();                                      \
    static void run(const WindowJob<A>& job, const Parallel& parallel); \
  };                                                                    \
  }

DK_EACH_INSTRUCTION_SET(DK_DECLARE_ISA)
#undef DK_DECLARE_ISA

}  // namespace deeplab_kernels::cpu
