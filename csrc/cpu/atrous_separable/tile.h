// The depthwise half of the separable convolution, for a tile of pixels and all channels, laid out as the matrix
// product wants it. For the per-instruction-set files only: everything here has internal linkage.
//
// A tile is a run of consecutive pixels of one image, row after row.
#pragma once

#include "../matrix_product.h"
#include "../scratch.h"

namespace deeplab_kernels::cpu {
namespace {

#define DK_INLINE_LAMBDA __attribute__((always_inline))

struct Pixels {
  int64_t image, begin, end;
  int64_t count() const { return end - begin; }
};

// Of a tile's part of y, or of the sums over it: what is left of a core's second level cache holds what passes by.
constexpr int64_t kTileBytes = 256 << 10;

// The tiles of an image, in units of pixels (what the matrix product takes at once). A tile holds all channels of y and
// is multiplied panel by panel; or, by_depth, where there are fewer results, it holds kDepth channels at a time and the
// sums of all results.
struct TilePlan {
  int64_t unit, units, tiles;
  bool by_depth;

  // by_depth_too: whether that is possible.
  TilePlan(const DepthwiseShape& s, int64_t out_channels, int64_t element, int64_t pixels_at_once, bool by_depth_too,
           int64_t threads)
      : unit(pixels_at_once), units((s.out_h * s.out_w + unit - 1) / unit) {
    by_depth = by_depth_too && out_channels + kDepth < s.channels;
    const int64_t values = by_depth ? out_channels + kDepth : larger(1, s.channels);
    const int64_t most = larger(1, kTileBytes / (values * element * unit));
    tiles = (units + most - 1) / most;
    // The same number for each thread, unless there are many.
    while (s.batch * tiles % threads != 0 && s.batch * tiles < 16 * threads && tiles < units) ++tiles;
  }
  int64_t most_pixels() const { return (units + tiles - 1) / tiles * unit; }
  int64_t most_channels(int64_t channels) const { return by_depth ? smaller(channels, kDepth) : channels; }
  Pixels tile(int64_t index, int64_t pixels) const {
    const int64_t t = index % tiles;
    return {index / tiles, units * t / tiles * unit, smaller(units * (t + 1) / tiles * unit, pixels)};
  }
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

template <typename A>
DK_INLINE void load_into(const A* p, A& value) {
  value = *p;
}
template <typename A>
DK_INLINE void load_into(const A* p, Vec<A>& value) {
  value = load(p);
}
template <typename A>
DK_INLINE void store_to(A* p, A value) {
  *p = value;
}
template <typename A>
DK_INLINE void store_to(A* p, Vec<A> value) {
  store(p, value);
}

// sums[b] = the sum over the taps of B pixels, a vector or a scalar of channels from c on. N: the number of taps if the
// compiler knows it, or 0.
template <int N, Activation kPre, int B, typename V, typename A>
DK_INLINE void sum_taps(const PixelTaps<A>& taps, int64_t c, V (&sums)[B]) {
#pragma GCC unroll 4
  for (int b = 0; b < B; ++b) sums[b] = V{};
  const int64_t count = N ? N : taps.count;
#pragma GCC unroll 9
  for (int64_t t = 0; t < count; ++t) {
    V weight, value;
    const A* p = taps.input[t] + c;
    load_into(taps.weight[t] + c, weight);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) load_into(p + b * taps.step, value), sums[b] += weight * activated(value, kPre);
  }
}

template <typename A>
class PixelTile {
 public:
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  // weight: (taps, channels). in_place: the tile's pixels are x's own.
  PixelTile(const SeparableJob<A>& job, const A* weight, const TilePlan& plan, bool in_place, Arena& arena)
      : job_(job), s_(job.shape), weight_(weight), in_place_(in_place) {
    const int64_t pixels = plan.most_pixels(), panels = (job.out_channels + kPanel<A> - 1) / kPanel<A>;
    step_ = in_place ? s_.channels : step_of(plan.most_channels(s_.channels));
    y_ = arena.take<A>(in_place ? 0 : pixels * step_);
    sums_ = arena.take<A>(pixels * (plan.by_depth ? panels : 1) * kPanel<A>);
    inputs_ = arena.take<const A*>(s_.taps());
    weights_ = arena.take<const A*>(s_.taps());
  }

  // Room for rows of the tile: not a multiple of 1 KB apart, so that they lie in different sets of the cache.
  static int64_t step_of(int64_t channels) {
    const int64_t step = rounded_up(channels, L);
    return step * int64_t(sizeof(A)) % 1024 == 0 ? step + 16 : step;
  }
  int64_t step() const { return step_; }
  A* sums() const { return sums_; }

  // Channels [begin, end) of the tile.
  const A* make(const Pixels& tile, int64_t begin_channel, int64_t end_channel) {
    if (in_place_) return job_.tensors.x + (tile.image * s_.out_h * s_.out_w + tile.begin) * step_ + begin_channel;
    first_ = begin_channel, count_ = end_channel - begin_channel;
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
        inputs_[taps.count] = job_.tensors.x + ((image * s_.in_h + h) * s_.in_w + w) * channels + first_;
        weights_[taps.count++] = weight_ + (u * s_.kernel_w + v) * channels + first_;
      }
    }
    switch (job_.pre_activation) {
      case Activation::kNone:
        return sum_channels<Activation::kNone, B>(taps, to);
      case Activation::kRelu:
        return sum_channels<Activation::kRelu, B>(taps, to);
      case Activation::kRelu6:
        return sum_channels<Activation::kRelu6, B>(taps, to);
    }
  }

  template <Activation kPre, int B>
  void sum_channels(const PixelTaps<A>& taps, A* to) const {
    taps.count == 9 ? sum_channels<9, kPre, B>(taps, to) : sum_channels<0, kPre, B>(taps, to);
  }

  template <int N, Activation kPre, int B>
  DK_INLINE void sum_channels(const PixelTaps<A>& taps, A* to) const {
    int64_t c = 0;
    for (; c + L <= count_; c += L) write<N, kPre, B, V>(taps, c, to);
    if (c < count_ && count_ >= L) return write<N, kPre, B, V>(taps, count_ - L, to);
    for (; c < count_; ++c) write<N, kPre, B, A>(taps, c, to);
  }

  template <int N, Activation kPre, int B, typename X>
  DK_INLINE void write(const PixelTaps<A>& taps, int64_t c, A* to) const {
    X sums[B];
    sum_taps<N, kPre>(taps, c, sums);
    const ChannelAffine<A>& affine = job_.depthwise;
    X scale = {}, shift = {};
    if (affine.scale) load_into(affine.scale + first_ + c, scale), load_into(affine.shift + first_ + c, shift);
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
      store_to(to + b * step_ + c, affine.scale ? activated(sums[b] * scale + shift, affine.activation) : sums[b]);
  }

  const SeparableJob<A>& job_;
  const DepthwiseShape& s_;
  const A* weight_;
  bool in_place_;
  int64_t step_, first_ = 0, count_ = 0;
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

  PanelTile(const SeparableJob<A>& job, const TilePlan& plan, Arena& arena) : job_(job), s_(job.shape) {
    const int64_t most_pixels = plan.most_pixels();
    y_ = arena.take<A>(most_pixels * plan.most_channels(s_.channels));
    sums_ = arena.take<A>(most_pixels * (plan.by_depth ? job.out_channels : kGroupRows));
    const int64_t rows = (most_pixels + s_.out_w - 2) / s_.out_w + 1;
    const int64_t columns =
        larger((s_.pad_left + s_.in_w - 1) / s_.stride_w, s_.out_w - 1 + (s_.kernel_w - 1) * s_.rate_w / s_.stride_w);
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

  // Channels [begin, end) of the tile.
  const A* make(const Pixels& tile, int64_t begin, int64_t end) {
    choose_slots(tile);
    for (int64_t v = 0; v < s_.kernel_w; ++v) {
      const int64_t offset = v * s_.rate_w;
      offsets_[v] = offset % s_.stride_w * phase_ + offset / s_.stride_w;
    }
    const int64_t padded = rounded_up(tile.count(), N);
    __builtin_memset(slots_, 0, size_t((count_ + 1) * pitch_) * sizeof(A));
    __builtin_memset(line_, 0, size_t(padded + 4 * L) * sizeof(A));
    for (int64_t c = begin; c < end; ++c) {
      const A* image = job_.tensors.x + (tile.image * s_.channels + c) * s_.in_h * s_.in_w;
      const A* weight = job_.tensors.depthwise_weight ? job_.tensors.depthwise_weight + c * s_.taps() : nullptr;
      if (!job_.finite_weights) {
        exact_channel(tile, image, weight);
      } else {
        fill(image);
        if (s_.kernel_h == 3 && s_.kernel_w == 3)
          channel_3x3(tile, weight);
        else
          channel(tile, weight);
      }
      write(c, padded, y_ + (c - begin) * N, (end - begin) * N);
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

  void fill(const A* image) const {
    switch (job_.pre_activation) {
      case Activation::kNone:
        return fill<Activation::kNone>(image);
      case Activation::kRelu:
        return fill<Activation::kRelu>(image);
      case Activation::kRelu6:
        return fill<Activation::kRelu6>(image);
    }
  }

  // Each row behind pad_left zeros, one phase of the stride after the other, after the activation.
  template <Activation kPre>
  DK_INLINE void fill(const A* image) const {
    const int64_t pad = s_.pad_left, stride = s_.stride_w, width = s_.in_w;
    for (int64_t k = 1; k <= count_; ++k) {
      const A* row = image + slot_rows_[k] * width;
      A* slot = slots_ + k * pitch_;
      int64_t w = 0;
      if (stride == 1) {
        for (; w + L <= width; w += L) store(slot + pad + w, activated(load(row + w), kPre));
        if (w < width && width >= L) store(slot + pad + width - L, activated(load(row + width - L), kPre)), w = width;
      } else if (stride == 2) {
        A* even = slot + pad % 2 * phase_ + pad / 2;
        A* odd = slot + (pad + 1) % 2 * phase_ + (pad + 1) / 2;
        for (; w + 2 * L <= width; w += 2 * L) {
          const V a = activated(load(row + w), kPre), b = activated(load(row + w + L), kPre);
          store(even + w / 2, every_second<0>(a, b));
          store(odd + w / 2, every_second<1>(a, b));
        }
      }
      for (; w < width; ++w) slot[(w + pad) % stride * phase_ + (w + pad) / stride] = activated(row[w], kPre);
    }
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

  void write(int64_t c, int64_t padded, A* to, int64_t step) const {
    const ChannelAffine<A>& affine = job_.depthwise;
    const V scale = broadcast(affine.scale ? affine.scale[c] : A(1));
    const V shift = broadcast(affine.scale ? affine.shift[c] : A(0));
    for (int64_t p = 0; p < padded; p += N, to += step)
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
