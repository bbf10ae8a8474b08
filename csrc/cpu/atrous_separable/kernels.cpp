// Cuts the separable convolution into tiles of pixels, each made and multiplied by one thread.
#include "../workspace.h"
#include "isa.h"
#include "tile.h"

namespace deeplab_kernels::cpu {
namespace {

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
  return {job.tensors.out + offset,
          residual ? residual + offset : nullptr,
          row_step,
          job.pointwise.scale,
          job.pointwise.shift,
          job.pointwise.activation};
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
    Packer<kPanel<A>, A>({job.tensors.pointwise_weight, depth, 1, 0}, begin * kPanel<A>,
                         smaller(job.out_channels, end * kPanel<A>), 0, depth, weights + begin * kPanel<A> * depth);
  });
  const TilePlan plan(s, job.out_channels, sizeof(A), kBlockRows, !in_place, parallel.threads());
  const int64_t runs = Terms::runs(depth), step_runs = plan.by_depth ? 1 : runs;
  parallel(s.batch * plan.tiles, [&](int64_t begin, int64_t end) {
    auto maker = in_scratch<PixelTile<A>>(job, taps, plan, in_place);
    for (int64_t t = begin; t < end; ++t) {
      const Pixels tile = plan.tile(t, pixels);
      const auto to = results_at(job, (tile.image * pixels + tile.begin) * job.out_channels, job.out_channels);
      const Grouping<A> group{tile.count(), 1, maker.sums(), plan.by_depth};
      for (int64_t run = 0; run < runs; run += step_runs) {
        const Terms terms = Terms::of_runs(depth, run, run + step_runs);
        const Operand<A> y{maker.make(tile, terms.begin, terms.end), maker.step()};
        multiply<A, true>(y, {weights + terms.begin * kPanel<A>, depth * kPanel<A>}, tile.count(), job.out_channels,
                          terms, group, to);
      }
    }
  });
}

template <typename A>
void run_nchw(const SeparableJob<A>& job, const Parallel& parallel) {
  const DepthwiseShape& s = job.shape;
  const int64_t depth = s.channels, pixels = s.out_h * s.out_w;
  const TilePlan plan(s, job.out_channels, sizeof(A), kPanel<A>, true, parallel.threads());
  const int64_t runs = Terms::runs(depth), step_runs = plan.by_depth ? 1 : runs;
  parallel(s.batch * plan.tiles, [&](int64_t begin, int64_t end) {
    auto maker = in_scratch<PanelTile<A>>(job, plan);
    for (int64_t t = begin; t < end; ++t) {
      const Pixels tile = plan.tile(t, pixels);
      const auto to = results_at(job, tile.image * job.out_channels * pixels + tile.begin, pixels);
      const Grouping<A> group{kGroupRows, plan.most_pixels() / kPanel<A>, maker.sums(), plan.by_depth};
      for (int64_t run = 0; run < runs; run += step_runs) {
        const Terms terms = Terms::of_runs(depth, run, run + step_runs);
        const Operand<A> y{maker.make(tile, terms.begin, terms.end), (terms.end - terms.begin) * kPanel<A>};
        multiply<A, false>({job.tensors.pointwise_weight + terms.begin, depth}, y, job.out_channels, tile.count(),
                           terms, group, to);
      }
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
