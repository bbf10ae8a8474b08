// Rows of NHWC pixels in a core's caches, and what the training passes of the 3x3 atrous depthwise convolution compute
// from them. For the per-instruction-set files only: everything here has internal linkage.
//
// A packed row holds a chunk of channels of every pixel of an image's row, as whole vectors. A few results a rate apart
// take the chunk's vectors in turn; the nine weights of a vector are loaded once for these. Taps in the padding are
// left out, never multiplied.
#pragma once

#include "pixels.h"
#include "plane_tiles.h"  // with_activation

namespace deeplab_kernels::cpu {
namespace {

// As add_taps; and sums[v] += tap v of result b times inputs[b], for each b.
template <int kTaps, int kShared, typename A, typename V, int B>
DK_INLINE void add_taps_and_products(const A* p, int64_t tap, int64_t result, const V (&weights)[kTaps],
                                     const V (&inputs)[B], V (&acc)[B], V (&sums)[kTaps]) {
  if constexpr (kShared > 0) {
#pragma GCC unroll 16
    for (int column = 0; column < (B - 1) * kShared + kTaps; ++column) {
      const V source = load(p + column * tap);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const int v = column - b * kShared;
        if (v >= 0 && v < kTaps) acc[b] += weights[v] * source, sums[v] += inputs[b] * source;
      }
    }
  } else {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b)
#pragma GCC unroll 3
      for (int v = 0; v < kTaps; ++v) {
        const V source = load(p + b * result + v * tap);
        acc[b] += weights[v] * source, sums[v] += inputs[b] * source;
      }
  }
}

template <typename A>
class PixelRows {
 public:
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  // Vectors of a chunk of channels; the last one overlaps the one before it where the channels are no multiple.
  struct Channels {
    int64_t first, vectors, last;
    int64_t at(int64_t vector) const { return smaller(vector * L, last); }
  };

  // Results of one kind along a row, and where in a row of the source their taps lie; distances in pixels.
  struct Columns {
    ColumnSegment segments[7];
    int count;
    int64_t base, tap, result;  // tap 0 of result 0, from one tap to the next, from one result to the next
    int64_t shared, apart;      // results `apart` from each other read the same pixels, `shared` taps later
    int64_t weight;             // from one tap's weight to the next
    int64_t first_tap;          // of the kernel row
    int64_t to, step;           // where result 0 goes, and how far apart the results
  };

  // The packed rows that a row of results reads.
  struct Lines {
    const A* row[3];
    const A* weights[3];
    A* products[3];  // sums of the gradient's with the taps
    int rows;
  };

  // Packed rows of an image, `step` apart; row h lies in slot h / step % slots.
  struct Ring {
    A* memory;
    int64_t size, step, slots;
    int64_t held[3];
    void clear() { held[0] = held[1] = held[2] = -1; }
    // Calls fill(where it belongs) if row h is not there.
    template <typename Fill>
    const A* row(int64_t h, const Fill& fill) {
      const int64_t slot = h / step % slots;
      A* to = memory + slot * size;
      if (held[slot] != h) held[slot] = h, fill(to);
      return to;
    }
  };

  // vectors: at most, of a chunk.
  PixelRows(const DepthwiseShape& s, int64_t vectors) : s_(s) {
    // An odd number of cache lines, so that neighbouring pixels lie in different sets of the cache.
    const int64_t line = 64 / int64_t(sizeof(A));
    pixel_ = ((vectors * L + line - 1) / line | 1) * line;
    forward_columns();
    for (int64_t q = 0; q < s.stride_w; ++q) transposed_columns(q);
  }

  // ---- what becomes of the results

  // A vector of channels of a block of results.
  struct At {
    int64_t k;         // the vector
    int64_t j, apart;  // the first result, and from one to the next
  };

  // Sums of floats stay short: they move into doubles after about a hundred terms.
  struct Sums {
    A* now;
    double* total;
    int64_t size;
    int64_t terms = 0;
    void start() const {
      for (int64_t i = 0; i < size; ++i) now[i] = 0, total[i] = 0;
    }
    DK_INLINE void added(int64_t count) {
      terms += count;
      if (terms >= 128) flush();
    }
    __attribute__((noinline)) void flush() {
      for (int64_t i = 0; i < size; ++i) total[i] += double(now[i]), now[i] = 0;
      terms = 0;
    }
  };

  // A pass whose inputs are multiplied with what its results are computed from, for sums beside the weights.
  template <typename Pass>
  static constexpr bool kHasProducts = requires { requires Pass::kProducts; };

  // Mean and m2 (sum of squared deviations), from the deviations from the mean so far.
  struct Statistics {
    A *centre, *now;  // now: sum of deviations and of their squares, vector by vector
    double *mean, *m2;
    int64_t size;
    A* kept;  // a packed row of the results; null: not wanted
    int64_t pixel;
    int64_t terms = 0;
    double seen = 0;

    void clear() {
      for (int64_t l = 0; l < 2 * size; ++l) now[l] = 0;
      terms = 0;
    }
    template <int kTaps, bool kWhole, int B>
    DK_INLINE void take(V (&y)[B], const At& at, const Lines&) const {
      const V origin = load(centre + at.k * L);
      V rest = {}, squares = {};
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const V d = y[b] - origin;
        rest += d, squares += d * d;
      }
      A* sums = now + 2 * at.k * L;
      store(sums, load(sums) + rest), store(sums + L, load(sums + L) + squares);
      if (!kept) return;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) store(kept + (at.j + b * at.apart) * pixel + at.k * L, y[b]);
    }
    DK_INLINE void added(int64_t count) {
      terms += count;
      if (terms >= 128) join();
    }
    __attribute__((noinline)) void join() {
      if (terms == 0) return;
      for (int64_t k = 0; k < size; k += L)
        for (int64_t l = k; l < k + L; ++l) {
          join_deviations(seen, double(terms), double(centre[l]), double(now[k + l]), double(now[k + l + L]), mean[l],
                          m2[l]);
          centre[l] = A(mean[l]);
        }
      seen += double(terms);
      clear();
    }
  };

  struct Outputs {
    const A *scale, *shift;
    Activation activation;
    A* out;
    int64_t pixel;
    template <int kTaps, bool kWhole, int B>
    DK_INLINE void take(V (&y)[B], const At& at, const Lines&) const {
      const V factor = load(scale + at.k * L), summand = load(shift + at.k * L);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
        store(out + (at.j + b * at.apart) * pixel + at.k * L, activated(V(y[b] * factor + summand), activation));
    }
    DK_INLINE void added(int64_t) const {}
  };

  template <Activation kActivation>
  struct GradientSums {
    const A *scale, *shift, *mean;
    const A* grad;
    int64_t pixel;
    Sums sums;
    template <int kTaps, bool kWhole, int B>
    DK_INLINE void take(V (&y)[B], const At& at, const Lines&) const {
      V g[B];
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) g[b] = load(grad + (at.j + b * at.apart) * pixel + at.k * L);
      add(g, y, at.k);
    }
    template <int B>
    DK_INLINE void add(const V (&g)[B], const V (&y)[B], int64_t k) const {
      const V factor = load(scale + k * L), summand = load(shift + k * L), centre = load(mean + k * L);
      A* now = sums.now + 2 * k * L;
      V sum = load(now), dot = load(now + L);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) {
        const V masked_grad = masked(g[b], V(y[b] * factor + summand), kActivation);
        sum += masked_grad, dot += masked_grad * (y[b] - centre);
      }
      store(now, sum), store(now + L, dot);
    }
    DK_INLINE void added(int64_t count) { sums.added(count); }

    // A row in memory.
    template <typename T>
    void take_row(const T* g, const T* y, int64_t columns, int64_t step, const Channels& channels) {
      auto pixels = [&](auto together) __attribute__((always_inline)) {
        constexpr int B = decltype(together)::kValue;
        for (; columns >= B; columns -= B, g += B * step, y += B * step, added(B))
          for (int64_t k = 0; k < channels.vectors; ++k) {
            V gs[B], ys[B];
#pragma GCC unroll 4
            for (int b = 0; b < B; ++b)
              gs[b] = load(g + b * step + channels.at(k)), ys[b] = load(y + b * step + channels.at(k));
            add(gs, ys, k);
          }
      };
      pixels(Number<4>());
      pixels(Number<1>());
    }
  };

  // From the gradient of the output and conv(x) to the gradient of conv(x).
  struct Backward {
    const A *scale, *shift, *mean, *slope, *constant;
    bool batch;  // whether mean and variance depend on x
    template <Activation kActivation>
    DK_INLINE V operator()(V grad, V y, int64_t k) const {
      const V factor = load(scale + k * L);
      V g = factor * masked(grad, V(y * factor + load(shift + k * L)), kActivation);
      if (batch) g += (y - load(mean + k * L)) * load(slope + k * L) + load(constant + k * L);
      return g;
    }
  };

  // The packed gradient of the output becomes that of conv(x).
  template <Activation kActivation>
  struct Gradients {
    const Backward& backward;
    A* grad;
    int64_t pixel;
    template <int kTaps, bool kWhole, int B>
    DK_INLINE void take(V (&y)[B], const At& at, const Lines&) const {
      A* to = grad + at.j * pixel + at.k * L;
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b, to += at.apart * pixel)
        store(to, backward.template operator()<kActivation>(load(to), y[b], at.k));
    }
    DK_INLINE void added(int64_t) const {}
  };

  // The gradient of x; the products of x with what it is computed from are summed.
  template <bool kSummed>
  struct InputGradients {
    static constexpr bool kProducts = kSummed;
    const A* x;
    A* out;
    int64_t step;
    Sums sums;
    template <int B>
    DK_INLINE void inputs(const At& at, V (&values)[B]) const {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) values[b] = load(x + (at.j + b * at.apart) * step + at.k * L);
    }
    template <int kTaps, bool kWhole, int B>
    DK_INLINE void take(V (&y)[B], const At& at, const Lines&) const {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) store(out + (at.j + b * at.apart) * step + at.k * L, y[b]);
    }
    DK_INLINE void added(int64_t count) {
      if (kSummed) sums.added(count);
    }
  };

  // The results of a row, all or those in `within`.
  template <typename Pass>
  void along(const Lines& given, const Columns& columns, const IndexRange& within, Pass& pass) const {
    for (int k = 0; k < columns.count; ++k) {
      ColumnSegment segment = columns.segments[k];
      segment.columns.begin = larger(segment.columns.begin, within.begin);
      segment.columns.end = smaller(segment.columns.end, within.end);
      if (segment.columns.begin >= segment.columns.end) continue;
      if (given.rows == 3 && segment.taps == 3) {
        results<3, true>(given, columns, segment, pass);
        continue;
      }
      Lines lines = given;
      if (segment.taps == 0) lines.rows = 0;
      if (segment.taps == 3)
        results<3, false>(lines, columns, segment, pass);
      else if (segment.taps == 2)
        results<2, false>(lines, columns, segment, pass);
      else
        results<1, false>(lines, columns, segment, pass);
    }
  }

 protected:
  const DepthwiseShape s_;
  Channels channels_{};
  int64_t pixel_;                    // values from one packed pixel to the next
  Columns forward_, transposed_[2];  // results of the convolution; columns of x, by their place in a stride

 private:
  void forward_columns() {
    const int64_t common = greatest_common_divisor(s_.rate_w, s_.stride_w);
    IndexRange inside[3];
    for (int v = 0; v < 3; ++v) inside[v] = tap_outputs(v, s_.stride_w, s_.rate_w, s_.pad_left, s_.in_w, s_.out_w);
    forward_ = {{}, 0, -s_.pad_left, s_.rate_w, s_.stride_w, s_.stride_w / common, s_.rate_w / common, L, 0, 0, 1};
    forward_.count = cut_columns(inside, s_.out_w, forward_.segments);
  }

  // Columns q, q + stride, ... of x, which met every tap or every second one; from the last tap to the first, so that
  // what they read lies from left to right.
  void transposed_columns(int64_t q) {
    const int64_t results = s_.in_w > q ? (s_.in_w - q + s_.stride_w - 1) / s_.stride_w : 0;
    IndexRange inside[3] = {};
    Columns& columns = transposed_[q];
    columns = {};
    int64_t taps = 0;
    for (int64_t v = 2; v >= 0; --v) {
      const int64_t offset = q + s_.pad_left - v * s_.rate_w;
      if (offset % s_.stride_w != 0) continue;
      const int64_t base = offset / s_.stride_w;
      const int64_t begin = smaller(larger(0, -base), results);
      inside[taps] = {begin, larger(begin, smaller(results, s_.out_w - base))};
      if (taps == 0) columns.base = base, columns.first_tap = v;
      if (taps == 1) columns.tap = base - columns.base, columns.weight = (v - columns.first_tap) * L;
      ++taps;
    }
    columns.result = 1, columns.shared = 1, columns.apart = columns.tap, columns.to = q, columns.step = s_.stride_w;
    columns.count = cut_columns(inside, results, columns.segments);
  }

  template <int kTaps, bool kWhole, typename Pass>
  void results(const Lines& lines, const Columns& columns, const ColumnSegment& segment, Pass& pass) const {
    int64_t j = segment.columns.begin;
    const int64_t end = segment.columns.end;
    auto slide = [&](auto kResults, auto shared, int64_t apart) __attribute__((always_inline)) {
      constexpr int B = decltype(kResults)::kValue;
      for (; j + B * apart <= end; j += B * apart) {
        for (int64_t q = 0; q < apart; ++q)
          block<kTaps, kWhole, B, decltype(shared)::kValue>(lines, columns, segment.first, j + q, apart, pass);
        pass.added(B * apart);
      }
    };
    if constexpr (kWhole) {
      if (columns.shared == 1)
        slide(Number<4>(), Number<1>(), columns.apart);
      else
        slide(Number<4>(), Number<2>(), columns.apart);
    }
    slide(Number<4>(), Number<0>(), 1);
    slide(Number<1>(), Number<0>(), 1);
  }

  template <int kTaps, bool kWhole, int B, int kShared, typename Pass>
  void block(const Lines& given, const Columns& columns, int64_t first, int64_t j, int64_t apart,
             const Pass& given_pass) const {
    // Copies, which the compiler knows that no store changes.
    const Lines lines = given;
    Pass pass = given_pass;
    const int64_t tap = columns.tap * pixel_, result = columns.result * apart * pixel_;
    const int64_t offset = (columns.base + j * columns.result + first * columns.tap) * pixel_;
    const int64_t weight_step = columns.weight, weight = columns.first_tap * L + first * weight_step;
    const int64_t vectors = channels_.vectors;
    const int rows = kWhole ? 3 : lines.rows;
    for (int64_t k = 0; k < vectors; ++k) {
      const int64_t source = offset + k * L;
      const At at{k, j, apart};
      V acc[B] = {}, inputs[B];
      if constexpr (kHasProducts<Pass>) pass.inputs(at, inputs);
#pragma GCC unroll 3
      for (int u = 0; u < rows; ++u) {
        const A* p = lines.row[u] + source;
        const A* w = lines.weights[u] + weight + k * 9 * L;
        V weights[kTaps];
#pragma GCC unroll 3
        for (int v = 0; v < kTaps; ++v) weights[v] = load(w + v * weight_step);
        if constexpr (kHasProducts<Pass>) {
          A* now = lines.products[u] + weight + k * 9 * L;
          V sums[kTaps];
#pragma GCC unroll 3
          for (int v = 0; v < kTaps; ++v) sums[v] = load(now + v * weight_step);
          add_taps_and_products<kTaps, kShared>(p, tap, result, weights, inputs, acc, sums);
#pragma GCC unroll 3
          for (int v = 0; v < kTaps; ++v) store(now + v * weight_step, sums[v]);
        } else {
          add_taps<kTaps, kShared>(p, tap, result, weights, acc);
        }
      }
      pass.template take<kTaps, kWhole>(acc, at, lines);
    }
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
