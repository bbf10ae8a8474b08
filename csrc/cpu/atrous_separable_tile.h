// The depthwise half of the separable convolution, for a tile of pixels and all channels, laid out as the matrix product
// wants it. For the per-instruction-set files only: everything here has internal linkage.
//
// A tile is a run of consecutive pixels of one image, row after row.
#pragma once

#include "atrous_separable_gemm.h"
#include "scratch.h"

namespace deeplab_kernels::cpu {
namespace {

#define DK_INLINE_LAMBDA __attribute__((always_inline))

struct Pixels {
  int64_t image, begin, end;
  int64_t count() const { return end - begin; }
};

// Calls f(row, first column, last column + 1, first pixel in the tile) for each row's part of the tile.
template <typename F>
DK_INLINE void for_rows(const Pixels& tile, int64_t width, const F& f) {
  for (int64_t p = tile.begin; p < tile.end;) {
    const int64_t i = p / width, j = p % width, end = smaller(width, j + tile.end - p);
    f(i, j, end, p - tile.begin);
    p += end - j;
  }
}

// ---- NHWC: (pixels, channels), rows `step` apart

// The taps that a run of pixels reads: where the first pixel's input lies, and its weights, one a channel.
template <typename A>
struct PixelTaps {
  const A** input;
  const A** weight;
  int64_t count;
  int64_t step;  // from pixel to pixel
};

// V: a vector or a scalar. load_at(pointer) reads one; store_at(pointer, value) writes one.
template <int B, typename V, typename A, typename Load, typename Splat, typename Store>
DK_INLINE void pixel_results(const PixelTaps<A>& taps, int64_t c, Activation pre, const ChannelAffine<A>& affine,
                             const Load& load_at, const Splat& from, const Store& store_at) {
  V acc[B];
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) acc[b] = V{};
  if (pre == Activation::kNone)
    for (int64_t t = 0; t < taps.count; ++t) {
      const V weight = load_at(taps.weight[t] + c);
      const A* p = taps.input[t] + c;
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[b] += weight * load_at(p + b * taps.step);
    }
  else
    for (int64_t t = 0; t < taps.count; ++t) {
      const V weight = load_at(taps.weight[t] + c);
      const A* p = taps.input[t] + c;
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[b] += weight * activated(load_at(p + b * taps.step), pre);
    }
#pragma GCC unroll 8
  for (int b = 0; b < B; ++b) {
    if (affine.scale) acc[b] = activated(acc[b] * from(affine.scale + c) + from(affine.shift + c), affine.activation);
    store_at(b, c, acc[b]);
  }
}

template <typename A>
class PixelTile {
 public:
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  // weight: (taps, channels). most_pixels: of a tile; in_place: the tile's pixels are x's own.
  PixelTile(const SeparableJob<A>& job, const A* weight, int64_t most_pixels, bool in_place, Arena& arena)
      : job_(job), s_(job.shape), weight_(weight), in_place_(in_place), step_(step_of(job, in_place)) {
    y_ = arena.take<A>(in_place ? 0 : most_pixels * step_);
    sums_ = arena.take<A>(most_pixels * kPanel<A>);
    inputs_ = arena.take<const A*>(s_.taps());
    weights_ = arena.take<const A*>(s_.taps());
  }

  // Room for rows of the tile: not a multiple of 1 KB apart, so that they lie in different sets of the cache.
  static int64_t step_of(const SeparableJob<A>& job, bool in_place) {
    if (in_place) return job.shape.channels;
    const int64_t step = rounded_up(job.shape.channels, L);
    return step * int64_t(sizeof(A)) % 1024 == 0 ? step + 16 : step;
  }
  int64_t step() const { return step_; }
  A* sums() const { return sums_; }

  const A* make(const Pixels& tile) {
    if (in_place_) return job_.tensors.x + (tile.image * s_.out_h * s_.out_w + tile.begin) * step_;
    // Columns whose taps all lie in the image's row.
    IndexRange inner{0, s_.out_w};
    for (int64_t v = 0; v < s_.kernel_w; ++v) {
      const IndexRange inside = tap_outputs(v, s_.stride_w, s_.rate_w, s_.pad_left, s_.in_w, s_.out_w);
      inner.begin = larger(inner.begin, inside.begin), inner.end = smaller(inner.end, inside.end);
    }
    for_rows(tile, s_.out_w, [&](int64_t i, int64_t begin, int64_t end, int64_t first) {
      for (int64_t j = begin; j < end;) {
        const bool is_inner = j >= inner.begin && j < inner.end;
        const int64_t columns = is_inner ? smaller(end, inner.end) - j : 1;
        A* to = y_ + (first + j - begin) * step_;
        if (columns >= 4)
          run<4>(tile.image, i, j, to), j += 4;
        else if (columns >= 2)
          run<2>(tile.image, i, j, to), j += 2;
        else
          run<1>(tile.image, i, j, to), j += 1;
      }
    });
    return y_;
  }

 private:
  // B neighbouring pixels that read the same taps.
  template <int B>
  void run(int64_t image, int64_t i, int64_t j, A* to) {
    const int64_t channels = s_.channels;
    PixelTaps<A> taps{inputs_, weights_, 0, s_.stride_w * channels};
    for (int64_t u = 0; u < s_.kernel_h; ++u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h < 0 || h >= s_.in_h) continue;
      for (int64_t v = 0; v < s_.kernel_w; ++v) {
        const int64_t w = tap_input(j, v, s_.stride_w, s_.rate_w, s_.pad_left);
        if (w < 0 || w >= s_.in_w) continue;
        inputs_[taps.count] = job_.tensors.x + ((image * s_.in_h + h) * s_.in_w + w) * channels;
        weights_[taps.count++] = weight_ + (u * s_.kernel_w + v) * channels;
      }
    }
    auto vector = [&](int64_t c) {
      pixel_results<B, V>(
          taps, c, job_.pre_activation, job_.depthwise, [](const A* p) DK_INLINE_LAMBDA { return load(p); },
          [](const A* p) DK_INLINE_LAMBDA { return load(p); },
          [&](int b, int64_t at, V z) DK_INLINE_LAMBDA { store(to + b * step_ + at, z); });
    };
    int64_t c = 0;
    for (; c + L <= channels; c += L) vector(c);
    if (c < channels && channels >= L) return vector(channels - L);
    for (; c < channels; ++c)
      pixel_results<B, A>(
          taps, c, job_.pre_activation, job_.depthwise, [](const A* p) { return *p; }, [](const A* p) { return *p; },
          [&](int b, int64_t at, A z) { to[b * step_ + at] = z; });
  }

  const SeparableJob<A>& job_;
  const DepthwiseShape& s_;
  const A* weight_;
  bool in_place_;
  int64_t step_;
  A* y_;
  A* sums_;
  const A** inputs_;
  const A** weights_;
};

// ---- NCHW: panels of kPanel pixels, (panels, channels, kPanel)

// Rows of the weights that are multiplied with a panel while it is in the first level cache.
constexpr int64_t kGroupRows = 2 * kBlockRows;

template <typename A>
class PanelTile {
 public:
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>, N = kPanel<A>;

  // most_pixels: of a tile.
  PanelTile(const SeparableJob<A>& job, int64_t most_pixels, Arena& arena) : job_(job), s_(job.shape) {
    y_ = arena.take<A>(most_pixels * s_.channels);
    sums_ = arena.take<A>(kGroupRows * most_pixels);
    const int64_t rows = (most_pixels + s_.out_w - 2) / s_.out_w + 1;
    const int64_t columns = larger((s_.pad_left + s_.in_w - 1) / s_.stride_w,
                                   s_.out_w - 1 + (s_.kernel_w - 1) * s_.rate_w / s_.stride_w);
    phase_ = rounded_up(columns + 1, L) + 4 * L;  // the last vectors of a row read beyond it
    pitch_ = phase_ * s_.stride_w;
    slots_ = arena.take<A>((rows * s_.kernel_h + 1) * pitch_);
    slot_rows_ = arena.take<int64_t>(rows * s_.kernel_h + 1);
    slot_of_ = arena.take<int64_t>(rows * s_.kernel_h);
    offsets_ = arena.take<int64_t>(s_.kernel_w);
    taps_ = arena.take<int64_t>(2 * s_.taps());
    line_ = arena.take<A>(rounded_up(most_pixels, N) + 4 * L);
  }
  A* sums() const { return sums_; }

  const A* make(const Pixels& tile) {
    choose_slots(tile);
    for (int64_t v = 0; v < s_.kernel_w; ++v) {
      const int64_t offset = v * s_.rate_w;
      offsets_[v] = offset % s_.stride_w * phase_ + offset / s_.stride_w;
    }
    const int64_t padded = rounded_up(tile.count(), N);
    __builtin_memset(slots_, 0, size_t((count_ + 1) * pitch_) * sizeof(A));
    __builtin_memset(line_, 0, size_t(padded + 4 * L) * sizeof(A));
    for (int64_t c = 0; c < s_.channels; ++c) {
      const A* image = job_.tensors.x + (tile.image * s_.channels + c) * s_.in_h * s_.in_w;
      const A* weight = job_.tensors.depthwise_weight ? job_.tensors.depthwise_weight + c * s_.taps() : nullptr;
      if (!job_.finite_weights) {
        exact_channel(tile, image, weight);
      } else {
        for (int64_t k = 1; k <= count_; ++k) fill(image + slot_rows_[k] * s_.in_w, slots_ + k * pitch_);
        if (s_.kernel_h == 3 && s_.kernel_w == 3)
          channel_3x3(tile, weight);
        else
          channel(tile, weight);
      }
      write(c, padded);
    }
    return y_;
  }

 private:
  // The rows of x that the tile reads, each in a slot; slot 0 is a row of zeros.
  void choose_slots(const Pixels& tile) {
    const int64_t first = tile.begin / s_.out_w, last = (tile.end - 1) / s_.out_w;
    count_ = 0;
    for (int64_t i = first; i <= last; ++i)
      for (int64_t u = 0; u < s_.kernel_h; ++u) {
        const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
        int64_t& slot = slot_of_[(i - first) * s_.kernel_h + u];
        slot = 0;
        if (h < 0 || h >= s_.in_h) continue;
        for (int64_t k = 1; k <= count_ && slot == 0; ++k)
          if (slot_rows_[k] == h) slot = k;
        if (slot == 0) slot = ++count_, slot_rows_[count_] = h;
      }
    first_row_ = first;
  }

  // A row behind pad_left zeros, one phase of the stride after the other, after the activation.
  DK_INLINE void fill(const A* row, A* slot) const {
    const int64_t pad = s_.pad_left, stride = s_.stride_w, width = s_.in_w;
    const Activation pre = job_.pre_activation;
    if (stride == 1) {
      A* to = slot + pad;
      int64_t w = 0;
      for (; w + L <= width; w += L) store(to + w, activated(load(row + w), pre));
      for (; w < width; ++w) to[w] = activated(row[w], pre);
      return;
    }
    int64_t w = 0;
    if (stride == 2) {
      A* even = slot + pad % 2 * phase_ + pad / 2;
      A* odd = slot + (pad + 1) % 2 * phase_ + (pad + 1) / 2;
      for (; w + 2 * L <= width; w += 2 * L) {
        const V a = activated(load(row + w), pre), b = activated(load(row + w + L), pre);
        store(even + w / 2, every_second<0>(a, b));
        store(odd + w / 2, every_second<1>(a, b));
      }
    }
    for (; w < width; ++w) slot[(w + pad) % stride * phase_ + (w + pad) / stride] = activated(row[w], pre);
  }

  void channel_3x3(const Pixels& tile, const A* weight) const {
    V weights[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weights[t] = broadcast(weight[t]);
    for_rows(tile, s_.out_w, [&](int64_t i, int64_t begin, int64_t end, int64_t first) {
      const int64_t* slot = slot_of_ + (i - first_row_) * 3;
      const A* inputs[9];
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) inputs[t] = slots_ + slot[t / 3] * pitch_ + offsets_[t % 3] + begin;
      results(line_ + first, end - begin, [&](int64_t j, auto& acc) DK_INLINE_LAMBDA {
        accumulate(inputs, weights, j, L, (int64_t(sizeof(acc) / sizeof(V)) - 1) * L, acc);
      });
    });
  }

  void channel(const Pixels& tile, const A* weight) const {
    const A one = 1;
    for_rows(tile, s_.out_w, [&](int64_t i, int64_t begin, int64_t end, int64_t first) {
      const int64_t* slot = slot_of_ + (i - first_row_) * s_.kernel_h;
      const Taps taps{taps_, taps_ + s_.taps(), s_.taps()};
      for (int64_t t = 0; t < s_.taps(); ++t) {
        taps_[t] = slot[t / s_.kernel_w] * pitch_ + offsets_[t % s_.kernel_w];
        taps_[s_.taps() + t] = t;
      }
      results(line_ + first, end - begin, [&](int64_t j, auto& acc) DK_INLINE_LAMBDA {
        accumulate<A, false>(taps, weight ? weight : &one, slots_ + begin + j, L,
                             (int64_t(sizeof(acc) / sizeof(V)) - 1) * L, acc);
      });
    });
  }

  // Results of a row's part, in vectors; the last may reach beyond it, where the next part's will follow.
  template <typename F>
  DK_INLINE void results(A* to, int64_t count, const F& f) const {
    int64_t j = 0;
    for (; j + 4 * L <= count; j += 4 * L) {
      V acc[4];
      f(j, acc);
#pragma GCC unroll 4
      for (int b = 0; b < 4; ++b) store(to + j + b * L, acc[b]);
    }
    for (; j < count; j += L) {
      V acc[1];
      f(j, acc);
      store(to + j, acc[0]);
    }
  }

  // The sum over the image alone: padding times an infinite weight is no part of it.
  void exact_channel(const Pixels& tile, const A* image, const A* weight) const {
    for (int64_t p = tile.begin; p < tile.end; ++p) {
      A sum = 0;
      for (int64_t t = 0; t < s_.taps(); ++t) {
        const int64_t h = tap_input(p / s_.out_w, t / s_.kernel_w, s_.stride_h, s_.rate_h, s_.pad_top);
        const int64_t w = tap_input(p % s_.out_w, t % s_.kernel_w, s_.stride_w, s_.rate_w, s_.pad_left);
        if (h >= 0 && h < s_.in_h && w >= 0 && w < s_.in_w)
          sum += weight[t] * activated(image[h * s_.in_w + w], job_.pre_activation);
      }
      line_[p - tile.begin] = sum;
    }
  }

  void write(int64_t c, int64_t padded) const {
    const ChannelAffine<A>& affine = job_.depthwise;
    const V scale = broadcast(affine.scale ? affine.scale[c] : A(1));
    const V shift = broadcast(affine.scale ? affine.shift[c] : A(0));
    A* to = y_ + c * N;
    for (int64_t p = 0; p < padded; p += N, to += s_.channels * N)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        V z = load(line_ + p + h * L);
        if (affine.scale) z = activated(z * scale + shift, affine.activation);
        store(to + h * L, z);
      }
  }

  const SeparableJob<A>& job_;
  const DepthwiseShape& s_;
  int64_t phase_, pitch_, count_ = 0, first_row_ = 0;
  A* y_;
  A* sums_;
  A* slots_;
  int64_t* slot_rows_;
  int64_t* slot_of_;
  int64_t* offsets_;
  int64_t* taps_;
  A* line_;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
