// The Gaussian filter with a window.
//
// A piece of work is a row of an image, in tiles of 2 vectors of columns. A tile's kernels with up to 128 neighbours
// are formed in the L1 cache, then multiplied with those neighbours' values, up to 12 vectors of sums in registers.
#include "../gaussian_filter/math.h"
#include "../scratch.h"
#include "../workspace.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

constexpr int64_t kMostOffsets = 128;

// The neighbours of one pass over a tile: their distances in memory from the pixel.
struct Offsets {
  int64_t at[kMostOffsets];
  int64_t count;
};

// sums[c][tile] += sum_k kernel[k][tile] * rows[c][tile + offset k] for kColumns planes.
template <typename A, int kColumns>
DK_INLINE void multiply_planes(const A* kernel, const Offsets& offsets, const A* rows, int64_t plane, A* sums) {
  constexpr int64_t L = kLanes<A>;
  constexpr int kChains = chains_of(kColumns);
  Vec<A> acc[kChains][kColumns][2] = {};
  auto step = [&](int64_t k, int s) __attribute__((always_inline)) {
    const Vec<A> k0 = load(kernel + k * kTile<A>), k1 = load(kernel + k * kTile<A> + L);
    const A* p = rows + offsets.at[k];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) {
      acc[s][c][0] += k0 * load(p + c * plane);
      acc[s][c][1] += k1 * load(p + c * plane + L);
    }
  };
  int64_t k = 0;
  for (; k + kChains <= offsets.count; k += kChains) {
#pragma GCC unroll 4
    for (int s = 0; s < kChains; ++s) step(k + s, s);
  }
  for (; k < offsets.count; ++k) step(k, 0);
  add_chains<A>(acc, sums);
}

template <typename A>
void multiply(const A* kernel, const Offsets& offsets, const A* rows, int64_t plane, int64_t channels, A* sums) {
  in_groups_of_columns(channels, [&](auto columns, int64_t first) __attribute__((always_inline)) {
    multiply_planes<A, decltype(columns)::kCount>(kernel, offsets, rows + first * plane, plane,
                                                  sums + first * kTile<A>);
  });
}

// kernel[k][tile] = exp(-|f - f at offset k|^2 / 2)
template <typename A>
void form_kernel(const A* features, const Offsets& offsets, int64_t plane, int64_t dimensions, A* kernel) {
  constexpr int64_t L = kLanes<A>;
  for (int64_t k = 0; k < offsets.count; ++k) {
    Vec<A> s0{}, s1{};
    for (int64_t e = 0; e < dimensions; ++e) {
      const A* f = features + e * plane;
      const Vec<A> d0 = load(f + offsets.at[k]) - load(f), d1 = load(f + offsets.at[k] + L) - load(f + L);
      s0 += d0 * d0;
      s1 += d1 * d1;
    }
    store(kernel + k * kTile<A>, exp_of_minus_half<A>(s0));
    store(kernel + k * kTile<A> + L, exp_of_minus_half<A>(s1));
  }
}

// kernel[k][tile] *= sum_c g v_k + v g_k: how strongly a pixel and its neighbour pull each other's features.
template <typename A, int kCount>
DK_INLINE void form_pull(const A* values, const A* grad, const int64_t* offsets, int64_t plane, int64_t channels,
                         A* kernel) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> acc[kCount][2] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const A *v = values + c * plane, *g = grad + c * plane;
    const Vec<A> v0 = load(v), v1 = load(v + L), g0 = load(g), g1 = load(g + L);
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      acc[k][0] += g0 * load(v + offsets[k]);
      acc[k][1] += g1 * load(v + offsets[k] + L);
      acc[k][0] += v0 * load(g + offsets[k]);
      acc[k][1] += v1 * load(g + offsets[k] + L);
    }
  }
#pragma GCC unroll 4
  for (int k = 0; k < kCount; ++k) {
    A* p = kernel + k * kTile<A>;
    store(p, load(p) * acc[k][0]);
    store(p + L, load(p + L) * acc[k][1]);
  }
}

// sums[tile] += sum_k pull[k][tile] * (f at offset k - f) of one coordinate
template <typename A>
void add_differences(const A* f, const Offsets& offsets, const A* pull, A* sums) {
  constexpr int64_t L = kLanes<A>;
  const Vec<A> here0 = load(f), here1 = load(f + L);
  Vec<A> acc0 = load(sums), acc1 = load(sums + L);
  for (int64_t k = 0; k < offsets.count; ++k) {
    acc0 += load(pull + k * kTile<A>) * (load(f + offsets.at[k]) - here0);
    acc1 += load(pull + k * kTile<A> + L) * (load(f + offsets.at[k] + L) - here1);
  }
  store(sums, acc0);
  store(sums + L, acc1);
}

template <typename A>
void run_tile(const WindowJob<A>& job, const PaddedImage<A>& image, int64_t y, int64_t x, A* kernel, A* sums) {
  const WindowShape& shape = job.shape;
  const int64_t channels = image.rows ? shape.channels : 0, dimensions = image.grad_features ? shape.dimensions : 0;
  const int64_t pixel = y * job.pitch + x;
  for (int64_t k = 0; k < (channels + dimensions) * kTile<A>; ++k) sums[k] = 0;
  Offsets offsets;
  offsets.count = 0;
  const int64_t first = larger(-shape.radius_v, -y), last = smaller(shape.radius_v, shape.height - 1 - y);
  for (int64_t dy = first; dy <= last; ++dy)
    for (int64_t dx = -shape.radius_h; dx <= shape.radius_h; ++dx) {
      offsets.at[offsets.count++] = dy * job.pitch + dx;
      if (offsets.count < kMostOffsets && (dy < last || dx < shape.radius_h)) continue;
      form_kernel(image.features + pixel, offsets, job.plane, shape.dimensions, kernel);
      if (channels > 0) multiply(kernel, offsets, image.rows + pixel, job.plane, channels, sums);
      if (dimensions > 0) {
        const A *values = image.values + pixel, *grad = image.grad + pixel;
        int64_t k = 0;
        for (; k + 4 <= offsets.count; k += 4)
          form_pull<A, 4>(values, grad, offsets.at + k, job.plane, shape.channels, kernel + k * kTile<A>);
        for (; k < offsets.count; ++k)
          form_pull<A, 1>(values, grad, offsets.at + k, job.plane, shape.channels, kernel + k * kTile<A>);
        for (int64_t e = 0; e < dimensions; ++e)
          add_differences(image.features + e * job.plane + pixel, offsets, kernel, sums + (channels + e) * kTile<A>);
      }
      offsets.count = 0;
    }
  const int64_t count = smaller(kTile<A>, shape.width - x);
  for (int64_t c = 0; c < channels + dimensions; ++c) {
    A* planes = c < channels ? image.out : image.grad_features;
    const int64_t plane = c < channels ? c : c - channels;
    A* out = planes + (plane * shape.height + y) * shape.width + x;
    const A* sum = sums + c * kTile<A>;
    if (count == kTile<A>) {
      store(out, load(sum));
      store(out + kLanes<A>, load(sum + kLanes<A>));
    } else {
      for (int64_t k = 0; k < count; ++k) out[k] = sum[k];
    }
  }
}

}  // namespace

namespace DK_ISA {

template <typename A>
int64_t LocalGaussianFilter<A>::tile_columns() {
  return kTile<A>;
}

template <typename A>
void LocalGaussianFilter<A>::run(const WindowJob<A>& job, const Parallel& parallel) {
  const int64_t sums_size = (job.shape.channels + job.shape.dimensions) * kTile<A>;
  parallel(job.count * job.shape.height, [&](int64_t begin, int64_t end) {
    A *kernel, *sums;
    auto arrange = [&](void* base) {
      Arena arena(base);
      kernel = arena.take<A>(kMostOffsets * kTile<A>);
      sums = arena.take<A>(sums_size);
      return arena.used();
    };
    arrange(thread_scratch(arrange(nullptr)));
    for (int64_t item = begin; item < end; ++item)
      for (int64_t x = 0; x < job.shape.width; x += kTile<A>)
        run_tile(job, job.images[item / job.shape.height], item % job.shape.height, x, kernel, sums);
  });
}

template struct LocalGaussianFilter<float>;
template struct LocalGaussianFilter<double>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
