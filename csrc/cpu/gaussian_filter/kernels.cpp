// The exact Gaussian filter.
//
// A piece of work is a group of output tiles (2 vectors of points each). It goes through the blocks of 64 summands in
// their order and, for every tile near enough, forms the 64 x tile part of the kernel matrix in the L1 cache and
// multiplies it with the block's values, outputs along the lanes, up to 12 vectors of sums in registers. The sums of a
// block are added to those of the blocks before, which keeps the rounding error of long sums low.
#include "../scratch.h"
#include "../workspace.h"
#include "isa.h"
#include "math.h"

namespace deeplab_kernels::cpu {
namespace {

// sums[c][tile] += sum_k left[k][tile] * right[k][c] for kColumns columns c.
template <typename A, int kColumns>
DK_INLINE void multiply_columns(const A* left, int64_t left_pitch, const A* right, int64_t right_pitch, int64_t count,
                                A* sums) {
  constexpr int64_t L = kLanes<A>;
  constexpr int kChains = chains_of(kColumns);
  Vec<A> acc[kChains][kColumns][2] = {};
  for (int64_t k = 0; k + kChains <= count; k += kChains) {
#pragma GCC unroll 4
    for (int s = 0; s < kChains; ++s) {
      const A* a = left + (k + s) * left_pitch;
      const A* b = right + (k + s) * right_pitch;
      const Vec<A> a0 = load(a), a1 = load(a + L);
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) {
        const Vec<A> factor = broadcast(b[c]);
        acc[s][c][0] += factor * a0;
        acc[s][c][1] += factor * a1;
      }
    }
  }
  add_chains<A>(acc, sums);
}

// sums[c][tile] += sum_j kernel[j][tile] * rows[j][c] over one block.
template <typename A>
void multiply(const A* kernel, const A* rows, int64_t channels, A* sums) {
  in_groups_of_columns(channels, [&](auto columns, int64_t first) __attribute__((always_inline)) {
    multiply_columns<A, decltype(columns)::kCount>(kernel, kTile<A>, rows + first, channels, kBlockPoints,
                                                   sums + first * kTile<A>);
  });
}

// kernel[j][tile] = exp(-|f_i - f_j|^2 / 2) of one tile and one block. kDimensions 0: known at run time.
template <typename A, int kDimensions>
void form_kernel(const A* tile, const A* block, int64_t dimensions, A* kernel) {
  constexpr int64_t L = kLanes<A>;
  const int64_t d = kDimensions > 0 ? kDimensions : dimensions;
  for (int64_t j = 0; j < kBlockPoints; ++j) {
    Vec<A> s0{}, s1{};
#pragma GCC unroll 6
    for (int64_t e = 0; e < d; ++e) {
      const Vec<A> f = broadcast(block[e * kBlockPoints + j]);
      const Vec<A> d0 = f - load(tile + e * kBlockPoints), d1 = f - load(tile + e * kBlockPoints + L);
      s0 += d0 * d0;
      s1 += d1 * d1;
    }
    store(kernel + j * kTile<A>, exp_of_minus_half<A>(s0));
    store(kernel + j * kTile<A> + L, exp_of_minus_half<A>(s1));
  }
}

template <typename A>
void form_kernel(const A* tile, const A* block, int64_t dimensions, A* kernel) {
  switch (dimensions) {
    case 2:
      return form_kernel<A, 2>(tile, block, dimensions, kernel);
    case 3:
      return form_kernel<A, 3>(tile, block, dimensions, kernel);
    case 5:
      return form_kernel<A, 5>(tile, block, dimensions, kernel);
    case 6:
      return form_kernel<A, 6>(tile, block, dimensions, kernel);
    default:
      return form_kernel<A, 0>(tile, block, dimensions, kernel);
  }
}

// kernel[j][tile] *= sum_c g_i v_j + v_i g_j: how strongly i and j pull each other's features.
template <typename A>
void form_pull(const A* here_values, const A* here_grad, const A* there_values, const A* there_grad, int64_t channels,
               A* kernel) {
  constexpr int64_t L = kLanes<A>;
  constexpr int kColumns = 4;
  for (int64_t k = 0; k < kBlockPoints; k += kColumns) {
    Vec<A> acc[kColumns][2] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t at = c * kBlockPoints;
      const Vec<A> g0 = load(here_grad + at), g1 = load(here_grad + at + L);
      const Vec<A> v0 = load(here_values + at), v1 = load(here_values + at + L);
#pragma GCC unroll 4
      for (int m = 0; m < kColumns; ++m) {
        const Vec<A> there_v = broadcast(there_values[at + k + m]), there_g = broadcast(there_grad[at + k + m]);
        acc[m][0] += g0 * there_v;
        acc[m][1] += g1 * there_v;
        acc[m][0] += v0 * there_g;
        acc[m][1] += v1 * there_g;
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kColumns; ++m) {
      A* p = kernel + (k + m) * kTile<A>;
      store(p, load(p) * acc[m][0]);
      store(p + L, load(p + L) * acc[m][1]);
    }
  }
}

// sums[tile] += sum_j pull[j][tile] * (f_j - f_i) of kDimensions coordinates.
template <typename A, int kDimensions>
DK_INLINE void add_differences(const A* tile, const A* block, const A* pull, A* sums) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> acc[kDimensions][2] = {}, here[kDimensions][2];
  for (int e = 0; e < kDimensions; ++e)
    for (int m = 0; m < 2; ++m) here[e][m] = load(tile + e * kBlockPoints + m * L);
  for (int64_t j = 0; j < kBlockPoints; ++j) {
    const Vec<A> p0 = load(pull + j * kTile<A>), p1 = load(pull + j * kTile<A> + L);
#pragma GCC unroll 2
    for (int e = 0; e < kDimensions; ++e) {
      const Vec<A> f = broadcast(block[e * kBlockPoints + j]);
      acc[e][0] += p0 * (f - here[e][0]);
      acc[e][1] += p1 * (f - here[e][1]);
    }
  }
  for (int e = 0; e < kDimensions; ++e)
    for (int m = 0; m < 2; ++m) {
      A* p = sums + e * kTile<A> + m * L;
      store(p, load(p) + acc[e][m]);
    }
}

// Bounding box of the points [first, first + count), as [low ... high ...].
template <typename A>
void bound(const SortedImage<A>& image, int64_t dimensions, int64_t first, int64_t count, A* box) {
  for (int64_t e = 0; e < dimensions; ++e) {
    A low = 0, high = 0;
    for (int64_t i = first; i < first + count; ++i) {
      const A f = image.features[i / kBlockPoints * dimensions * kBlockPoints + e * kBlockPoints + i % kBlockPoints];
      low = i == first || f < low ? f : low;
      high = i == first || f > high ? f : high;
    }
    box[e] = low;
    box[dimensions + e] = high;
  }
}

template <typename A>
bool near_block(const A* box, const SortedImage<A>& image, const FilterJob<A>& job, int64_t block) {
  A square = 0;
  for (int64_t e = 0; e < job.dimensions; ++e) {
    const int64_t at = e * job.blocks + block;
    square += gap_square(box[e], box[job.dimensions + e], image.low[at], image.high[at]);
  }
  return square <= job.cutoff;
}

template <typename A>
void run_group(const FilterJob<A>& job, const SortedImage<A>& image, int64_t first_tile, int64_t tiles) {
  const int64_t channels = image.rows ? job.channels : 0, dimensions = image.grad_features ? job.dimensions : 0;
  const int64_t box_size = 2 * job.dimensions, sums_size = (channels + dimensions) * kTile<A>;
  A *kernel, *boxes, *sums;
  auto arrange = [&](void* base) {
    Arena arena(base);
    kernel = arena.take<A>(kBlockPoints * kTile<A>);
    boxes = arena.take<A>((tiles + 1) * box_size);
    sums = arena.take<A>(tiles * sums_size);
    return arena.used();
  };
  arrange(thread_scratch(arrange(nullptr)));
  const int64_t first = first_tile * kTile<A>;
  A* group_box = boxes + tiles * box_size;
  bound(image, job.dimensions, first, tiles * kTile<A>, group_box);
  for (int64_t t = 0; t < tiles; ++t)
    bound(image, job.dimensions, first + t * kTile<A>, kTile<A>, boxes + t * box_size);
  for (int64_t k = 0; k < tiles * sums_size; ++k) sums[k] = 0;

  const int64_t feature_block = job.dimensions * kBlockPoints, channel_block = job.channels * kBlockPoints;
  for (int64_t b = 0; b < job.blocks; ++b) {
    if (!near_block(group_box, image, job, b)) continue;
    for (int64_t t = 0; t < tiles; ++t) {
      if (!near_block(boxes + t * box_size, image, job, b)) continue;
      const int64_t i = first + t * kTile<A>, i_block = i / kBlockPoints, i_in_block = i % kBlockPoints;
      const A* here = image.features + i_block * feature_block + i_in_block;
      const A* there = image.features + b * feature_block;
      A* tile_sums = sums + t * sums_size;
      form_kernel(here, there, job.dimensions, kernel);
      if (channels > 0) multiply(kernel, image.rows + b * channel_block, job.channels, tile_sums);
      if (dimensions == 0) continue;
      const int64_t i_channels = i_block * channel_block + i_in_block, j_channels = b * channel_block;
      form_pull(image.values + i_channels, image.grad + i_channels, image.values + j_channels, image.grad + j_channels,
                job.channels, kernel);
      A* along = tile_sums + channels * kTile<A>;
      int64_t e = 0;
      for (; e + 2 <= dimensions; e += 2)
        add_differences<A, 2>(here + e * kBlockPoints, there + e * kBlockPoints, kernel, along + e * kTile<A>);
      if (e < dimensions)
        add_differences<A, 1>(here + e * kBlockPoints, there + e * kBlockPoints, kernel, along + e * kTile<A>);
    }
  }

  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = first + t * kTile<A>, count = smaller(kTile<A>, job.points - i);
    const A* tile_sums = sums + t * sums_size;
    for (int64_t c = 0; c < channels + dimensions; ++c) {
      A* out = c < channels ? image.out + c * job.points : image.grad_features + (c - channels) * job.points;
      for (int64_t k = 0; k < count; ++k) out[image.order[i + k]] = tile_sums[c * kTile<A> + k];
    }
  }
}

}  // namespace

namespace DK_ISA {

template <typename A>
int64_t GaussianFilter<A>::tile_points() {
  return kTile<A>;
}

template <typename A>
void GaussianFilter<A>::run(const FilterJob<A>& job, const Parallel& parallel) {
  const int64_t tiles = (job.points + kTile<A> - 1) / kTile<A>;
  const int64_t groups = (tiles + job.group_tiles - 1) / job.group_tiles, pieces = job.count * groups;
  // Neighbouring groups skip alike, and a thread takes a run of pieces: pieces are dealt out with a stride, so that
  // every thread gets some of each kind.
  int64_t stride = pieces * 5 / 8 + 1;
  while (greatest_common_divisor(stride, pieces) != 1) ++stride;
  parallel(pieces, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t piece = k * stride % pieces, first = piece % groups * job.group_tiles;
      run_group(job, job.images[piece / groups], first, smaller(job.group_tiles, tiles - first));
    }
  });
}

template struct GaussianFilter<float>;
template struct GaussianFilter<double>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
