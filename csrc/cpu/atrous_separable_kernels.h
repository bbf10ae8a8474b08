// Cuts the separable convolution into tiles of pixels, each made and multiplied by one thread. The file of an
// instruction set defines DK_ISA and includes this one.
#include "atrous_separable_isa.h"
#include "atrous_separable_tile.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

// Of a tile of y: what is left of a core's second level cache holds the weights that pass by.
constexpr int64_t kTileBytes = 256 << 10;
// Tiles of an image in units of pixels (what the matrix product takes at once).
struct TilePlan {
  int64_t unit, units, tiles;
  int64_t most_pixels() const { return (units + tiles - 1) / tiles * unit; }

  TilePlan(int64_t pixels, int64_t pixels_at_once, int64_t bytes_a_pixel, int64_t batch, int64_t threads)
      : unit(pixels_at_once), units((pixels + unit - 1) / unit) {
    const int64_t most = larger(1, kTileBytes / larger(1, bytes_a_pixel * unit));
    tiles = (units + most - 1) / most;
    // The same number for each thread, unless there are many.
    while (batch * tiles % threads != 0 && batch * tiles < 16 * threads && tiles < units) ++tiles;
  }
  Pixels tile(int64_t index, int64_t pixels) const {
    const int64_t t = index % tiles;
    return {index / tiles, units * t / tiles * unit, smaller(units * (t + 1) / tiles * unit, pixels)};
  }
};

// What the calling thread works with, in its scratch memory.
template <typename Tile, typename... Arguments>
Tile in_scratch(const Arguments&... arguments) {
  Arena measure(nullptr);
  Tile(arguments..., measure);
  Arena arena(thread_scratch(measure.used()));
  return Tile(arguments..., arena);
}

template <typename A>
Results<A> results_at(const SeparableJob<A>& job, int64_t offset, int64_t row_step) {
  const A* residual = job.tensors.residual;
  return {job.tensors.out + offset, residual ? residual + offset : nullptr, row_step,
          job.pointwise.scale,      job.pointwise.shift,                    job.pointwise.activation};
}

template <typename A>
void run_nhwc(const SeparableJob<A>& job, const Parallel& parallel) {
  const DepthwiseShape& s = job.shape;
  const int64_t depth = s.channels, panels = (job.out_channels + kPanel<A> - 1) / kPanel<A>, pixels = s.out_h * s.out_w;
  // The pointwise half alone reads x in place.
  const bool in_place = !job.tensors.depthwise_weight && job.pre_activation == Activation::kNone && s.stride_h == 1 &&
                        s.stride_w == 1 && pixels == s.in_h * s.in_w;
  const Workspace memory(size_t(panels * kPanel<A> + s.taps()) * size_t(depth) * sizeof(A));
  A *weights = memory.as<A>(), *taps = weights + panels * kPanel<A> * depth;
  for (int64_t t = 0; t < s.taps(); ++t)
    for (int64_t c = 0; c < depth; ++c)
      taps[t * depth + c] = job.tensors.depthwise_weight ? job.tensors.depthwise_weight[c * s.taps() + t] : A(1);
  parallel(panels, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      pack_panel(job.tensors.pointwise_weight, job.out_channels, depth, p, weights + p * kPanel<A> * depth);
  });
  const int64_t step = PixelTile<A>::step_of(job, in_place);
  const TilePlan plan(pixels, kBlockRows, step * int64_t(sizeof(A)), s.batch, parallel.threads());
  parallel(s.batch * plan.tiles, [&](int64_t begin, int64_t end) {
    auto maker = in_scratch<PixelTile<A>>(job, taps, plan.most_pixels(), in_place);
    for (int64_t t = begin; t < end; ++t) {
      const Pixels tile = plan.tile(t, pixels);
      const A* y = maker.make(tile);
      const auto to = results_at(job, (tile.image * pixels + tile.begin) * job.out_channels, job.out_channels);
      multiply<A, true>(y, step, weights, tile.count(), job.out_channels, depth, tile.count(), 1, maker.sums(), to);
    }
  });
}

template <typename A>
void run_nchw(const SeparableJob<A>& job, const Parallel& parallel) {
  const DepthwiseShape& s = job.shape;
  const int64_t depth = s.channels, pixels = s.out_h * s.out_w;
  const TilePlan plan(pixels, kPanel<A>, depth * int64_t(sizeof(A)), s.batch, parallel.threads());
  parallel(s.batch * plan.tiles, [&](int64_t begin, int64_t end) {
    const int64_t most = plan.most_pixels();
    auto maker = in_scratch<PanelTile<A>>(job, most);
    for (int64_t t = begin; t < end; ++t) {
      const Pixels tile = plan.tile(t, pixels);
      const A* y = maker.make(tile);
      const auto to = results_at(job, tile.image * job.out_channels * pixels + tile.begin, pixels);
      multiply<A, false>(job.tensors.pointwise_weight, depth, y, job.out_channels, tile.count(), depth, kGroupRows,
                         most / kPanel<A>, maker.sums(), to);
    }
  });
}

}  // namespace

namespace DK_ISA {

template <typename T>
void Separable<T>::run(const SeparableJob<T>& job, const Parallel& parallel) {
  job.shape.channels_last ? run_nhwc(job, parallel) : run_nchw(job, parallel);
}

template struct Separable<float>;
template struct Separable<double>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
