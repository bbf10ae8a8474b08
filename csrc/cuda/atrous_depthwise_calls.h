// Which kernels serve a call, for one storage type. Instantiated by atrous_depthwise_<type>.cu, so that the types
// compile in parallel.
#pragma once

#include "atrous_depthwise.h"
#include "atrous_depthwise_general.h"
#include "atrous_depthwise_nchw.h"
#include "atrous_depthwise_nhwc.h"
#include "channel_passes.h"

namespace deeplab_kernels::cuda {

constexpr int64_t kReduceBlocks =
    2048;  // blocks that a reduction aims at; the same on every GPU, so that results are too
constexpr int64_t kStreamBlocks = int64_t(1) << 22;

template <typename T>
struct Calls {
  using A = acc_t<T>;

  static Norm<A> norm_of(const NormParameters& norm) {
    return {static_cast<const A*>(norm.gamma),
            static_cast<const A*>(norm.beta),
            static_cast<const A*>(norm.mean),
            static_cast<const A*>(norm.var),
            A(norm.eps),
            norm.activation};
  }
  static Norm<A> no_norm() { return {nullptr, nullptr, nullptr, nullptr, A(0), Activation::kNone}; }

  static T* scratch(const Context& context, int64_t count) {
    return static_cast<T*>(context.scratch(at_least(count, 1) * sizeof(T)));
  }
  static A* acc_scratch(const Context& context, int64_t count) {
    return static_cast<A*>(context.scratch(at_least(count, 1) * sizeof(A)));
  }
  static int64_t out_count(const DepthwiseShape& s) { return s.batch * s.out_channels() * s.out_h * s.out_w; }

  static bool is_3x3(const DepthwiseShape& s) { return s.kernel_h == 3 && s.kernel_w == 3 && s.multiplier == 1; }

  static bool takes_nhwc(const DepthwiseShape& s, const T* x, const T* weight, const T* out) {
    return is_3x3(s) && fits_nhwc(s) && s.channels_last && s.channels % kVector<T> == 0 && is_aligned(x) &&
           is_aligned(weight) && is_aligned(out);
  }

  static NhwcTiling conv_nhwc_tiling(const DepthwiseShape& s) {
    return nhwc_tiling<kVector<T>>(s.batch, s.channels, s.out_h, s.out_w, s.stride_h == 1 ? s.rate_h : 1);
  }

  template <bool kMoments>
  static void conv_nhwc(const Context& context, const DepthwiseShape& s, const NhwcTiling& t, const T* x,
                        const T* weight, const Norm<A>& norm, T* out, A* partial) {
    const dim3 block(kNhwcPacks, unsigned(t.columns));
    launch("conv3x3_nhwc", s.stride_h == 1 ? conv3x3_nhwc<T, true, kMoments> : conv3x3_nhwc<T, false, kMoments>,
           s.batch * t.items() * t.column_blocks * t.groups, block,
           kMoments    ? block.x * block.y * sizeof(Moments<A, kVector<T>>)
           : norm.mean ? kNhwcPacks * kVector<T> * sizeof(Affine<A>)
                       : 0,
           context.stream, s, t, x, weight, norm, out, partial);
  }

  // Bands for the NCHW kernel; none where it does not take the call.
  static NchwTiling conv_nchw_tiling(const DepthwiseShape& s, const T* x) {
    if (!is_3x3(s) || s.channels_last || !fits_nchw(s) || !is_aligned(x)) return {};
    return nchw_tiling(s.out_h, s.out_w, [&](int64_t rows) {
      const int64_t in_rows = at_most((rows - 1) * s.stride_h + 2 * s.rate_h + 1, s.in_h);
      return at_least(run_bytes<T>(in_rows * s.in_w), kNchwWarps * int64_t(sizeof(Moments<A, 1>)));
    });
  }

  template <bool kMoments>
  static void conv_nchw(const Context& context, const DepthwiseShape& s, const NchwTiling& t, const T* x,
                        const T* weight, const Norm<A>& norm, T* out, A* partial) {
    launch("conv3x3_nchw", s.stride_h == 1 ? conv3x3_nchw<T, true, kMoments> : conv3x3_nchw<T, false, kMoments>,
           s.batch * s.channels * t.bands, dim3(kNchwThreads), t.shared_bytes, context.stream, s, t, x, weight, norm,
           out, partial);
  }

  // out = conv(x), or act(norm(conv(x))) where norm has a mean.
  static void conv(const Context& context, const DepthwiseShape& s, const T* x, const T* weight, const Norm<A>& norm,
                   T* out) {
    if (takes_nhwc(s, x, weight, out))
      return conv_nhwc<false>(context, s, conv_nhwc_tiling(s), x, weight, norm, out, nullptr);
    if (const NchwTiling t = conv_nchw_tiling(s, x); t.bands > 0)
      return conv_nchw<false>(context, s, t, x, weight, norm, out, nullptr);
    launch("conv_general", conv_general<T>, ceil_div(out_count(s), kGeneralThreads), dim3(kGeneralThreads), 0,
           context.stream, s, x, weight, out, norm);
  }

  // Statistics of conv(x), in the pass that computes it where there is a kernel for that. y = conv(x) if not null;
  // otherwise `workspace`, of y's size, may be overwritten.
  static void conv_moments(const Context& context, const DepthwiseShape& s, const T* x, const T* weight, T* y,
                           T* workspace, A* mean, A* var) {
    if (takes_nhwc(s, x, weight, y)) {
      const NhwcTiling t = conv_nhwc_tiling(s);
      const int64_t slices = s.batch * t.items() * t.column_blocks;
      A* partial = acc_scratch(context, slices * 3 * s.channels);
      conv_nhwc<true>(context, s, t, x, weight, no_norm(), y, partial);
      return run_merge_moments(context.stream, static_cast<const A*>(partial), slices, s.channels, mean, var);
    }
    if (const NchwTiling t = conv_nchw_tiling(s, x); t.bands > 0) {
      A* partial = acc_scratch(context, t.slices(s) * 3 * s.channels);
      conv_nchw<true>(context, s, t, x, weight, no_norm(), y, partial);
      return run_merge_moments(context.stream, static_cast<const A*>(partial), t.slices(s), s.channels, mean, var);
    }
    T* conv_out = y ? y : workspace;
    conv(context, s, x, weight, no_norm(), conv_out);
    moments(context, s, conv_out, mean, var);
  }

  static void moments(const Context& context, const DepthwiseShape& s, const T* y, A* mean, A* var) {
    const ChannelView view = channel_view<T>(s, is_aligned(y), kReduceBlocks);
    A* partial = acc_scratch(context, view.slices * 3 * view.channels);
    const int64_t blocks = pass_blocks<T>(s, view);
    if (s.channels_last) {
      launch("channel_moments", channel_moments<T, true>, blocks, pass_block(s),
             kPassThreads * sizeof(Moments<A, kVector<T>>), context.stream, view, y, partial);
    } else {
      launch("channel_moments", channel_moments<T, false>, blocks, pass_block(s), kPassThreads * sizeof(Moments<A, 1>),
             context.stream, view, y, partial);
    }
    run_merge_moments(context.stream, partial, view.slices, view.channels, mean, var);
  }

  static void training(const Context& context, const DepthwiseShape& s, const T* x, const T* weight, Norm<A> norm,
                       T* out, T* y, A* mean, A* var) {
    conv_moments(context, s, x, weight, y, out, mean, var);
    norm.mean = mean, norm.var = var;
    if (!y) return conv(context, s, x, weight, norm, out);  // a second convolution is cheaper than keeping the first
    normalised(context, s, y, norm, out);
  }

  // out = act(norm(y))
  static void normalised(const Context& context, const DepthwiseShape& s, const T* y, const Norm<A>& norm, T* out) {
    const ChannelView view = channel_view<T>(s, is_aligned(y) && is_aligned(out), kStreamBlocks);
    launch("normalise", s.channels_last ? normalise<T, true> : normalise<T, false>, pass_blocks<T>(s, view),
           pass_block(s), 0, context.stream, view, y, norm, out);
  }

  static bool backward_takes_nhwc(const DepthwiseShape& s, const T* grad, const T* y, const T* x, const T* weight,
                                  const T* grad_x) {
    return is_3x3(s) && fits_nhwc(s) && s.channels_last && s.stride_h == 1 && s.stride_w == 1 &&
           s.channels % kNhwcBackwardVector<T> == 0 && is_aligned(grad) && is_aligned(y) && is_aligned(x) &&
           is_aligned(weight) && is_aligned(grad_x);
  }

  // With a null norm `grad` is dy, otherwise grad_out.
  static void backward_nhwc(const Context& context, const DepthwiseShape& s, const T* grad, const T* y,
                            const NormGrad<A>* norm, const T* x, const T* weight, T* grad_x, T* grad_weight) {
    const NhwcTiling t = nhwc_tiling<kNhwcBackwardVector<T>>(s.batch, s.channels, s.in_h, s.in_w, s.rate_h);
    const int64_t items = s.batch * t.items();
    const int64_t wanted = ceil_div(kReduceBlocks, at_least(t.groups * t.column_blocks, 1));
    const int64_t slices = grad_weight ? at_least(at_most(items, wanted), 1) : items;
    A* partial = grad_weight ? acc_scratch(context, slices * t.column_blocks * 9 * s.channels) : nullptr;
    const dim3 block(kNhwcPacks, unsigned(t.columns));
    launch("backward3x3_nhwc", norm ? backward3x3_nhwc<T, true> : backward3x3_nhwc<T, false>,
           slices * t.column_blocks * t.groups, block,
           at_least(partial ? block.x * block.y * 9 * kNhwcBackwardVector<T> * sizeof(A) : 0,
                    norm ? kNhwcPacks * kNhwcBackwardVector<T> * sizeof(AffineGrad<A>) : 0),
           context.stream, s, t, slices, grad, y, norm ? *norm : NormGrad<A>{}, x, weight, grad_x, partial);
    if (grad_weight) run_sum_slices<T>(context.stream, partial, slices * t.column_blocks, 9, s.channels, grad_weight);
  }

  static NchwTiling backward_nchw_tiling(const DepthwiseShape& s, const T* grad, const T* y, const T* x) {
    if (!is_3x3(s) || s.channels_last || s.stride_h != 1 || s.stride_w != 1 || !fits_nchw(s) || !is_aligned(grad) ||
        !is_aligned(y) || !is_aligned(x))
      return {};
    return nchw_tiling(s.in_h, s.in_w, [&](int64_t rows) {
      return at_least(nchw_backward_bytes(s, rows, sizeof(T), sizeof(A)), 9 * kNchwWarps * int64_t(sizeof(A)));
    });
  }

  static void backward_nchw(const Context& context, const DepthwiseShape& s, const NchwTiling& t, const T* grad,
                            const T* y, const NormGrad<A>* norm, const T* x, const T* weight, T* grad_x,
                            T* grad_weight) {
    A* partial = grad_weight ? acc_scratch(context, t.slices(s) * 9 * s.channels) : nullptr;
    launch("backward3x3_nchw", norm ? backward3x3_nchw<T, true> : backward3x3_nchw<T, false>,
           s.batch * s.channels * t.bands, dim3(kNchwThreads), t.shared_bytes, context.stream, s, t, grad, y,
           norm ? *norm : NormGrad<A>{}, x, weight, grad_x, partial);
    if (grad_weight) run_sum_slices<T>(context.stream, partial, t.slices(s), 9, s.channels, grad_weight);
  }

  static void conv_backward(const Context& context, const DepthwiseShape& s, const T* grad_y, const T* x,
                            const T* weight, T* grad_x, T* grad_weight) {
    if (!grad_x && !grad_weight) return;
    if (backward_takes_nhwc(s, grad_y, nullptr, x, weight, grad_x))
      return backward_nhwc(context, s, grad_y, nullptr, nullptr, x, weight, grad_x, grad_weight);
    if (const NchwTiling t = backward_nchw_tiling(s, grad_y, nullptr, x); t.bands > 0)
      return backward_nchw(context, s, t, grad_y, nullptr, nullptr, x, weight, grad_x, grad_weight);
    if (grad_x) {
      const int64_t total = s.batch * s.channels * s.in_h * s.in_w;
      launch("grad_x_general", grad_x_general<T>, ceil_div(total, kGeneralThreads), dim3(kGeneralThreads), 0,
             context.stream, s, grad_y, weight, grad_x);
    }
    if (!grad_weight) return;
    const dim3 block = s.channels_last ? dim3(32, 8) : dim3(1, 256);
    const int64_t groups = ceil_div(s.out_channels(), block.x), pixels = s.batch * s.out_h * s.out_w;
    const int64_t wanted = ceil_div(kReduceBlocks, at_least(groups * s.taps(), 1));
    const int64_t slices = at_least(at_most(wanted, ceil_div(pixels, 4 * block.y)), 1);
    A* partial = acc_scratch(context, slices * s.taps() * s.out_channels());
    launch("grad_weight_general", grad_weight_general<T>, groups * s.taps() * slices, block,
           kGeneralThreads * sizeof(Sums<A, 1>), context.stream, s, grad_y, x, slices, partial);
    run_sum_slices<T>(context.stream, partial, slices, s.taps(), s.out_channels(), grad_weight);
  }

  // beta's and gamma's gradients.
  static void norm_sums(const Context& context, const DepthwiseShape& s, const T* grad_out, const T* y,
                        const Norm<A>& norm, A* grad_gamma, A* grad_beta) {
    const ChannelView view = channel_view<T>(s, is_aligned(grad_out) && is_aligned(y), kReduceBlocks);
    A* partial = acc_scratch(context, view.slices * 2 * view.channels);
    constexpr int kChannels = kVector<T>;
    launch("norm_grad_sums", s.channels_last ? norm_grad_sums<T, true> : norm_grad_sums<T, false>,
           pass_blocks<T>(s, view), pass_block(s),
           kPassThreads * (s.channels_last ? sizeof(Sums<A, 2 * kChannels>) : sizeof(Sums<A, 2>)), context.stream, view,
           grad_out, y, norm, partial);
    launch("merge_norm_grad_sums", merge_norm_grad_sums<A>, ceil_div(view.channels, kMergeColumns),
           dim3(kMergeColumns, kMergeLanes), kMergeColumns * kMergeLanes * sizeof(Sums<double, 2>), context.stream,
           static_cast<const A*>(partial), view.slices, view.channels, grad_beta, grad_gamma);
  }

  static NormGrad<A> norm_grad_of(const DepthwiseShape& s, const Norm<A>& norm, bool batch_statistics,
                                  const A* grad_gamma, const A* grad_beta) {
    const int64_t count = s.batch * s.out_h * s.out_w;
    return {norm, grad_beta, grad_gamma, batch_statistics && count > 0 ? A(1) / A(count) : A(0)};
  }

  // The gradient w.r.t. conv(x).
  static void dy(const Context& context, const DepthwiseShape& s, const T* grad_out, const T* y,
                 const NormGrad<A>& from_out, T* grad_y) {
    const bool aligned = is_aligned(grad_out) && is_aligned(y) && is_aligned(grad_y);
    const ChannelView view = channel_view<T>(s, aligned, kStreamBlocks);
    launch("norm_grad", s.channels_last ? norm_grad<T, true> : norm_grad<T, false>, pass_blocks<T>(s, view),
           pass_block(s), 0, context.stream, view, grad_out, y, from_out, grad_y);
  }

  static void backward(const Context& context, const DepthwiseShape& s, const T* grad_out, const T* x, const T* weight,
                       const T* y, const Norm<A>& norm, bool batch_statistics, T* grad_x, T* grad_weight, A* grad_gamma,
                       A* grad_beta) {
    if (!y) {
      T* recomputed = scratch(context, out_count(s));
      conv(context, s, x, weight, no_norm(), recomputed);
      y = recomputed;
    }
    norm_sums(context, s, grad_out, y, norm, grad_gamma, grad_beta);
    if (!grad_x && !grad_weight) return;
    const NormGrad<A> from_out = norm_grad_of(s, norm, batch_statistics, grad_gamma, grad_beta);
    if (backward_takes_nhwc(s, grad_out, y, x, weight, grad_x))
      return backward_nhwc(context, s, grad_out, y, &from_out, x, weight, grad_x, grad_weight);
    if (const NchwTiling t = backward_nchw_tiling(s, grad_out, y, x); t.bands > 0)
      return backward_nchw(context, s, t, grad_out, y, &from_out, x, weight, grad_x, grad_weight);
    T* grad_y = scratch(context, out_count(s));
    dy(context, s, grad_out, y, from_out, grad_y);
    conv_backward(context, s, grad_y, x, weight, grad_x, grad_weight);
  }
};

}  // namespace deeplab_kernels::cuda
