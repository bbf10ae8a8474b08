// Which kernels serve a call of the atrous spatial pyramid, for one storage type. Instantiated by
// atrous_spatial_pyramid_<type>.cu.
#pragma once

#include "atrous_depthwise_calls.h"
#include "atrous_spatial_pyramid_general.h"
#include "atrous_spatial_pyramid_nchw.h"
#include "atrous_spatial_pyramid_nhwc.h"

namespace deeplab_kernels::cuda {

template <typename T>
struct PyramidCalls {
  using A = acc_t<T>;
  using Depthwise = Calls<T>;

  static bool is_3x3(const PyramidShape& s) { return s.kernel_h == 3 && s.kernel_w == 3; }
  // Rows, columns and offsets in a plane are counted in 32 bits.
  static bool fits(const PyramidShape& s) { return s.plane() < int64_t(1) << 28; }

  template <typename Pointer>
  static bool all_aligned(Pointer const* pointers, int64_t count) {
    for (int64_t r = 0; pointers && r < count; ++r)
      if (!is_aligned(pointers[r])) return false;
    return true;
  }

  // The rows of the (R, C) vectors from branch r on.
  static Norm<A> from_branch(Norm<A> norm, int64_t r, int64_t channels) {
    for (const A** v : {&norm.gamma, &norm.beta, &norm.mean, &norm.var})
      if (*v) *v += r * channels;
    return norm;
  }

  // Branches [r, r + kMaxBranches) of s.
  static PyramidShape part_of(const PyramidShape& s, int64_t r) {
    PyramidShape part = s;
    const int64_t end = at_most(r + kMaxBranches, s.branches());
    part.rates.assign(s.rates.begin() + 2 * r, s.rates.begin() + 2 * end);
    return part;
  }

  static SlabTiling forward_slabs(const PyramidShape& s, const T* x, const T* weight, T* const* out, bool moments) {
    constexpr int V = kVector<T>;
    if (!is_3x3(s) || !fits(s) || !s.channels_last || s.channels % V || !is_aligned(x) || !is_aligned(weight) ||
        !all_aligned(out, s.branches()))
      return {};
    return slab_tiling(s, V, kSlabThreads, [&](int64_t pixels, int64_t packs) {
      return slab_forward_bytes<T>(pixels, packs, s.branches(), moments);
    });
  }

  static NchwTiling forward_bands(const PyramidShape& s, const T* x, int64_t reach, bool moments) {
    if (!is_3x3(s) || !fits(s) || s.channels_last || !is_aligned(x)) return {};
    return nchw_tiling(
        s.height, s.width,
        [&](int64_t rows) {
          return band_merge_bytes<A>(s.branches(), moments) +
                 run_bytes<T>(at_most(rows + 2 * reach, s.height) * s.width);
        },
        kMaxSharedBytes);
  }

  // Up to kMaxBranches branches: out[r] = conv_r(x), or act(norm_r(conv_r(x))) where norm has a mean. With kMoments
  // mean and var are computed, and out, or an out[r], may be null. False: no kernel takes the call.
  template <bool kMoments>
  static bool forward_part(const Context& context, const PyramidShape& s, const T* x, const T* weight,
                           const Norm<A>& norm, T* const* out, A* mean, A* var, T* pooled) {
    const int64_t channels = s.branches() * s.channels, planes = s.batch * s.channels;
    if (!is_3x3(s) || !fits(s)) return false;
    PyramidBranches<T> b = branches_of<T>(s);
    for (int r = 0; r < b.count; ++r) b.out[r] = out ? out[r] : nullptr;
    const int64_t reach = reach_of(b);
    int64_t slices = 0;  // of an image
    A *partial = nullptr, *pool = nullptr;
    auto reserve = [&](int64_t count) {
      slices = count;
      if (kMoments) partial = Depthwise::acc_scratch(context, s.batch * slices * 3 * channels);
      if (pooled) pool = Depthwise::acc_scratch(context, slices * planes);
    };
    if (const SlabTiling t = forward_slabs(s, x, weight, out, kMoments); t.shared_bytes > 0) {
      reserve(t.phases);
      launch("pyramid_nhwc", pyramid_nhwc<T, kMoments>, s.batch * slices * t.groups,
             dim3(unsigned(t.packs), unsigned(t.pixel_lanes)), t.shared_bytes, context.stream, b, t, x, weight, norm,
             partial, pool);
    } else if (const NchwTiling t = forward_bands(s, x, reach, kMoments); t.bands > 0) {
      reserve(t.bands);
      launch("pyramid_nchw", pyramid_nchw<T, kMoments>, planes * slices, dim3(kNchwThreads), t.shared_bytes,
             context.stream, b, t, int(reach), x, weight, norm, partial, pool);
    } else {
      return false;
    }
    if (pooled) run_sum_slices<T>(context.stream, pool, slices, 1, planes, pooled);
    if (kMoments)
      run_merge_moments(context.stream, static_cast<const A*>(partial), s.batch * slices, channels, mean, var);
    return true;
  }

  // The mean of every image, by itself.
  static void pool(const Context& context, const PyramidShape& s, const T* x, T* pooled) {
    // NCHW: every plane is a channel of one image. NHWC: image by image.
    DepthwiseShape image = s.branch(0);
    image.batch = 1;
    if (!s.channels_last) image.channels = s.batch * s.channels;
    for (int64_t n = 0; n < (s.channels_last ? s.batch : 1); ++n) {
      const T* first = x + n * s.channels * s.plane();
      const ChannelView view = channel_view<T>(image, is_aligned(first), kReduceBlocks);
      A* partial = Depthwise::acc_scratch(context, view.slices * view.channels);
      launch("channel_sums", s.channels_last ? channel_sums<T, true> : channel_sums<T, false>,
             pass_blocks<T>(image, view), pass_block(image), kPassThreads * 16 / sizeof(T) * sizeof(A), context.stream,
             view, first, A(1) / A(s.plane()), partial);
      run_sum_slices<T>(context.stream, partial, view.slices, 1, view.channels, pooled + n * s.channels);
    }
  }

  static void forward(const Context& context, const PyramidShape& s, const T* x, const T* weight, const Norm<A>& norm,
                      T* const* out, T* pooled) {
    for (int64_t r = 0; r < s.branches(); r += kMaxBranches) {
      const PyramidShape part = part_of(s, r);
      const T* part_weight = weight + r * s.channels * s.taps();
      const Norm<A> part_norm = from_branch(norm, r, s.channels);
      if (forward_part<false>(context, part, x, part_weight, part_norm, out + r, nullptr, nullptr,
                              r ? nullptr : pooled))
        continue;
      for (int64_t k = 0; k < part.branches(); ++k)
        Depthwise::conv(context, part.branch(k), x, part_weight + k * s.channels * s.taps(),
                        from_branch(part_norm, k, s.channels), out[r + k]);
      if (pooled && r == 0) pool(context, s, x, pooled);
    }
  }

  static void training(const Context& context, const PyramidShape& s, const T* x, const T* weight, Norm<A> norm,
                       T* const* out, T* const* conv, A* mean, A* var, T* pooled) {
    for (int64_t r = 0; r < s.branches(); r += kMaxBranches) {
      const PyramidShape part = part_of(s, r);
      const T* part_weight = weight + r * s.channels * s.taps();
      A *part_mean = mean + r * s.channels, *part_var = var + r * s.channels;
      if (forward_part<true>(context, part, x, part_weight, Depthwise::no_norm(), conv ? conv + r : nullptr, part_mean,
                             part_var, r ? nullptr : pooled))
        continue;
      for (int64_t k = 0; k < part.branches(); ++k)
        Depthwise::conv_moments(context, part.branch(k), x, part_weight + k * s.channels * s.taps(),
                                conv ? conv[r + k] : nullptr, out[r + k], part_mean + k * s.channels,
                                part_var + k * s.channels);
      if (pooled && r == 0) pool(context, s, x, pooled);
    }
    norm.mean = mean, norm.var = var;
    if (!conv) return forward(context, s, x, weight, norm, out, nullptr);
    for (int64_t r = 0; r < s.branches(); ++r)
      Depthwise::normalised(context, s.branch(r), static_cast<const T*>(conv[r]), from_branch(norm, r, s.channels),
                            out[r]);
  }

  static SlabTiling backward_slabs(const PyramidShape& s, const T* const* grad, const T* const* y, const T* grad_pooled,
                                   const T* x, const T* weight, const T* grad_x) {
    constexpr int V = kNhwcBackwardVector<T>;
    if (!is_3x3(s) || !fits(s) || s.branches() > kMaxBranches || !s.channels_last || s.channels % V ||
        !all_aligned(grad, s.branches()) || !all_aligned(y, s.branches()) || !is_aligned(grad_pooled) ||
        !is_aligned(x) || !is_aligned(weight) || !is_aligned(grad_x))
      return {};
    return slab_tiling(s, V, kSlabBackwardThreads, [&](int64_t pixels, int64_t packs) {
      return slab_backward_bytes<T>(pixels, packs, s.branches());
    });
  }

  static NchwTiling backward_bands(const PyramidShape& s, const T* const* grad, const T* const* y, const T* x,
                                   int64_t reach) {
    if (!is_3x3(s) || !fits(s) || s.branches() > kMaxBranches || s.channels_last || !all_aligned(grad, s.branches()) ||
        !all_aligned(y, s.branches()) || !is_aligned(x))
      return {};
    return nchw_tiling(
        s.height, s.width, [&](int64_t rows) { return band_backward_bytes<T>(s, reach, rows); }, kMaxSharedBytes);
  }

  // grad: of out where `norm` is not null, which also has y then; otherwise dy. False: no kernel takes the call.
  static bool backward_part(const Context& context, const PyramidShape& s, const T* const* grad, const T* const* y,
                            const NormGrad<A>* norm, const T* grad_pooled, const T* x, const T* weight, T* grad_x,
                            T* grad_weight) {
    if (!is_3x3(s) || !fits(s) || s.branches() > kMaxBranches) return false;
    const int64_t channels = s.branches() * s.channels;
    PyramidBranches<T> b = branches_of<T>(s);
    for (int r = 0; r < b.count; ++r) b.grad[r] = grad[r], b.y[r] = y ? y[r] : nullptr;
    const int64_t reach = reach_of(b);
    const NormGrad<A> norm_of = norm ? *norm : NormGrad<A>{};
    auto reserve = [&](int64_t slices) {
      return grad_weight ? Depthwise::acc_scratch(context, slices * 9 * channels) : nullptr;
    };
    A* partial = nullptr;
    int64_t slices = 0;
    if (const SlabTiling t = backward_slabs(s, grad, y, grad_pooled, x, weight, grad_x); t.shared_bytes > 0) {
      partial = reserve(slices = s.batch * t.phases);
      launch("pyramid_backward_nhwc", norm ? pyramid_backward_nhwc<T, true> : pyramid_backward_nhwc<T, false>,
             slices * t.groups, dim3(unsigned(t.packs), unsigned(t.pixel_lanes)), t.shared_bytes, context.stream, b, t,
             norm_of, grad_pooled, x, weight, grad_x, partial);
    } else if (const NchwTiling t = backward_bands(s, grad, y, x, reach); t.bands > 0) {
      partial = reserve(slices = s.batch * t.bands);
      launch("pyramid_backward_nchw", norm ? pyramid_backward_nchw<T, true> : pyramid_backward_nchw<T, false>,
             slices * s.channels, dim3(kNchwThreads), t.shared_bytes, context.stream, b, t, int(reach), norm_of,
             grad_pooled, x, weight, grad_x, partial);
    } else {
      return false;
    }
    if (grad_weight) run_sum_slices<T>(context.stream, partial, slices, 9, channels, grad_weight);
    return true;
  }

  // Any kernel size and any number of branches, from dy.
  static void backward_general(const Context& context, const PyramidShape& s, const T* const* dy, const T* grad_pooled,
                               const T* x, const T* weight, T* grad_x, T* grad_weight) {
    const int64_t filter = s.channels * s.taps();
    for (int64_t r = 0; grad_weight && r < s.branches(); ++r)
      Depthwise::conv_backward(context, s.branch(r), dy[r], x, weight + r * filter, nullptr, grad_weight + r * filter);
    if (!grad_x) return;
    A* sum = s.branches() > kMaxBranches ? Depthwise::acc_scratch(context, s.count()) : nullptr;
    for (int64_t r = 0; r < s.branches(); r += kMaxBranches) {
      const PyramidShape part = part_of(s, r);
      GeneralBranches<T> b{s.batch,         s.channels, s.height, s.width, s.kernel_h, s.kernel_w, int(part.branches()),
                           s.channels_last, {},         {},       {},      {},         {}};
      for (int k = 0; k < b.count; ++k) {
        const DepthwiseShape branch = part.branch(k);
        b.rate_h[k] = branch.rate_h, b.rate_w[k] = branch.rate_w;
        b.pad_h[k] = branch.pad_top, b.pad_w[k] = branch.pad_left;
        b.grad[k] = dy[r + k];
      }
      const bool last = r + kMaxBranches >= s.branches();
      launch("pyramid_grad_x_general", pyramid_grad_x_general<T>, ceil_div(s.count(), kGeneralThreads),
             dim3(kGeneralThreads), 0, context.stream, b, weight + r * filter, r ? nullptr : grad_pooled,
             r ? static_cast<const A*>(sum) : nullptr, last ? nullptr : sum, grad_x);
    }
  }

  static void backward(const Context& context, const PyramidShape& s, const T* const* grad_out, const T* grad_pooled,
                       const T* x, const T* weight, const T* const* conv, const Norm<A>& norm, bool batch_statistics,
                       T* grad_x, T* grad_weight, A* grad_gamma, A* grad_beta) {
    const std::size_t branches = std::size_t(s.branches());
    std::vector<const T*> y(branches), dy(branches);
    if (norm.mean) {
      std::vector<T*> recomputed(branches);
      if (!conv) {
        for (T*& part : recomputed) part = Depthwise::scratch(context, s.count());
        forward(context, s, x, weight, Depthwise::no_norm(), recomputed.data(), nullptr);
      }
      for (std::size_t r = 0; r < branches; ++r) {
        const int64_t row = int64_t(r) * s.channels;
        y[r] = conv ? conv[r] : recomputed[r];
        Depthwise::norm_sums(context, s.branch(int64_t(r)), grad_out[r], y[r],
                             from_branch(norm, int64_t(r), s.channels), grad_gamma + row, grad_beta + row);
      }
    }
    if (!grad_x && !grad_weight) return;
    const NormGrad<A> norm_grad = Depthwise::norm_grad_of(s.branch(0), norm, batch_statistics, grad_gamma, grad_beta);
    if (backward_part(context, s, grad_out, norm.mean ? y.data() : nullptr, norm.mean ? &norm_grad : nullptr,
                      grad_pooled, x, weight, grad_x, grad_weight))
      return;
    for (std::size_t r = 0; r < branches; ++r) {
      dy[r] = grad_out[r];
      if (!norm.mean) continue;
      const int64_t row = int64_t(r) * s.channels;
      NormGrad<A> branch = norm_grad;
      branch.norm = from_branch(norm, int64_t(r), s.channels);
      branch.sum_g += row, branch.sum_g_xhat += row;
      T* scratch = Depthwise::scratch(context, s.count());
      Depthwise::dy(context, s.branch(int64_t(r)), grad_out[r], y[r], branch, scratch);
      dy[r] = scratch;
    }
    backward_general(context, s, dy.data(), grad_pooled, x, weight, grad_x, grad_weight);
  }
};

}  // namespace deeplab_kernels::cuda
