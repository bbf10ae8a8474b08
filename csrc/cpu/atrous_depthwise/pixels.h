// Inference of the 3x3 atrous depthwise convolution on NHWC images, pixel by pixel: a few results a rate apart take all
// their channels in turn, so that memory is read and written in runs as long as a pixel. For the per-instruction-set
// files only: everything here has internal linkage.
//
// With pixels of some KB, going along the columns with a vector or two of channels would touch another page at every
// step; a run of channels needs but the pages of the 18 pixels that four results read. The nine weights of a vector
// are loaded once for these four. Taps in the padding are left out, never multiplied.
#pragma once

#include "../workspace.h"
#include "pixel_columns.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T>
class Pixels {
 public:
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kVectorsOfLine = larger(1, 64 / int64_t(L * sizeof(T)));

  static bool serve(const DepthwiseShape& s) {
    return s.channels_last && s.kernel_h == 3 && s.kernel_w == 3 && s.multiplier == 1 && s.channels >= L;
  }

  // How the results are cut: into runs of rows and, where rows are few, tiles of columns.
  struct Cut {
    int64_t tiles, pieces;
  };
  static Cut cut(const DepthwiseShape& s) {
    const int64_t rows = larger(1, s.batch * s.out_h);
    int64_t tiles = larger(1, smaller(s.out_w / 4, kFewestPieces / rows));
    // Four threads share 33 rows badly. Tiles still hold the four results a rate apart that share what they read.
    if (rows < 2 * kFewestPieces && s.out_w >= 8 * s.rate_w) tiles = larger(2, tiles);
    return {tiles, tiles * s.batch * s.out_h};
  }

  // What all threads read: the weights and the folded normalisation, by vectors. norm null: the convolution alone.
  class Prepared {
   public:
    Prepared(const DepthwiseShape& shape, const T* weight, const BatchNorm<A>* norm)
        : vectors_((shape.channels + L - 1) / L), memory_(size_t(vectors_ * (norm ? 11 : 9) * L) * sizeof(A)) {
      weights = memory_.template as<A>();
      scale = norm ? weights + vectors_ * 9 * L : nullptr;
      shift = norm ? scale + vectors_ * L : nullptr;
      activation = norm ? norm->activation : Activation::kNone;
      for (int64_t k = 0; k < vectors_; ++k)
        for (int64_t l = 0; l < L; ++l) {
          // The last vector overlaps the one before it where the channels are no multiple.
          const int64_t c = smaller(k * L, shape.channels - L) + l;
          for (int64_t t = 0; t < 9; ++t) weights[(k * 9 + t) * L + l] = widen(weight[c * 9 + t]);
          if (norm) fold_norm(*norm, c, norm->mean[c], norm->var[c], scale + k * L + l, shift + k * L + l);
        }
    }
    A *weights, *scale, *shift;  // scale null: no normalisation
    Activation activation;

   private:
    int64_t vectors_;
    Workspace memory_;
  };

  Pixels(const DepthwiseShape& shape, const Prepared& prepared)
      : s_(shape),
        vectors_((shape.channels + L - 1) / L),
        row_step_(shape.rate_h / greatest_common_divisor(shape.rate_h, shape.stride_h)),
        prepared_(prepared) {
    count_segments();
  }

  // The pieces [begin, end), which are the rows of one tile of one image after another, those that read the same rows
  // of x next to each other.
  void run(const Cut& cut, int64_t begin, int64_t end, const T* x, T* out) {
    // Runs of parked vectors end where lines do.
    streams_ = streams(out, s_) && s_.channels % (L * kVectorsOfLine) == 0;
    // Pixels of a multiple of 2 KB compete for the same places of the first-level cache: fewer at once are better. So
    // they are where all waits for memory.
    pairs_ = s_.stride_h == 1 && s_.channels * int64_t(sizeof(T)) % 2048 != 0 && !exceeds_last_level_cache<T>(s_);
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t strip = piece / s_.out_h, place = piece % s_.out_h, i = row_at(place);
      // In pairs, where both rows of results have all their rows of x.
      const bool pair = pairs_ && piece + 1 < end && place + 1 < s_.out_h && row_at(place + 1) == i + row_step_ &&
                        i >= s_.pad_top && i + row_step_ - s_.pad_top + 2 * s_.rate_h < s_.in_h;
      const int64_t image = strip / cut.tiles, tile = strip % cut.tiles;
      const IndexRange columns{s_.out_w * tile / cut.tiles, s_.out_w * (tile + 1) / cut.tiles};
      const T* x_image = x + image * s_.in_h * s_.in_w * s_.channels;
      T* out_row = out + (image * s_.out_h + i) * s_.out_w * s_.channels;
      if (pair)
        rows<true>(i, columns, x_image, out_row), ++piece;
      else
        rows<false>(i, columns, x_image, out_row);
    }
    if (streams_) finish_streams();
  }

 private:
  static constexpr int64_t kFewestPieces = 32;
  static constexpr int64_t kParked = 16;
  static constexpr int kOfPair = 4;  // rows of x that two rows of results read
  static constexpr int kTogether = kVectorBytes < 64 ? 2 : 1;

  // What a block of results reads and writes; distances in values.
  struct Block {
    const T* x;        // first tap of the first result
    int64_t row, tap;  // from one tap to the next, down and to the right
    int64_t result;    // from one result's taps to the next one's
    T* out;
    int64_t next;      // from one result to the next
    const A* weights;  // of the first tap
    const T* ahead;    // pixels, `result` apart, that the next row of results reads first; null: none
    const A *scale, *shift;
    Activation activation;
    A* parked;  // null: results go through the caches
    int64_t vectors, last_channel;
    // Of a pair of rows: from one to the other, of results and of pixels ahead (0: of the first alone).
    int64_t next_row, next_ahead;
  };

  // The row at a place in the order of rows 0, step, 2 step, ..., 1, 1 + step, ...
  int64_t row_at(int64_t place) const {
    const int64_t shorter = s_.out_h / row_step_, longer = s_.out_h % row_step_;
    const int64_t in_longer = longer * (shorter + 1);
    if (place < in_longer) return place / (shorter + 1) + place % (shorter + 1) * row_step_;
    return longer + (place - in_longer) / shorter + (place - in_longer) % shorter * row_step_;
  }

  void count_segments() {
    IndexRange inside[3];
    for (int v = 0; v < 3; ++v) inside[v] = tap_outputs(v, s_.stride_w, s_.rate_w, s_.pad_left, s_.in_w, s_.out_w);
    segment_count_ = cut_columns(inside, s_.out_w, segments_);
  }

  template <bool kPair>
  void rows(int64_t i, const IndexRange& columns, const T* x, T* out) const {
    int first = 3, taps = 0;
    for (int u = 2; u >= 0; --u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h >= 0 && h < s_.in_h) first = u, ++taps;
    }
    for (int k = 0; k < segment_count_; ++k) {
      ColumnSegment segment = segments_[k];
      segment.columns.begin = larger(segment.columns.begin, columns.begin);
      segment.columns.end = smaller(segment.columns.end, columns.end);
      if (segment.columns.begin >= segment.columns.end) continue;
      if constexpr (kPair) {
        switch (segment.taps) {
          case 0:
            results<0, 0>(i, 0, segment, x, out);
            results<0, 0>(i + row_step_, 0, segment, x, out + row_step_ * s_.out_w * s_.channels);
            break;
          case 1:
            results<kOfPair, 1>(i, 0, segment, x, out);
            break;
          case 2:
            results<kOfPair, 2>(i, 0, segment, x, out);
            break;
          default:
            results<kOfPair, 3>(i, 0, segment, x, out);
        }
        continue;
      }
      if (taps == 0 || segment.taps == 0) {
        results<0, 0>(i, 0, segment, x, out);
        continue;
      }
      switch (3 * (taps - 1) + segment.taps - 1) {
        case 0:
          results<1, 1>(i, first, segment, x, out);
          break;
        case 1:
          results<1, 2>(i, first, segment, x, out);
          break;
        case 2:
          results<1, 3>(i, first, segment, x, out);
          break;
        case 3:
          results<2, 1>(i, first, segment, x, out);
          break;
        case 4:
          results<2, 2>(i, first, segment, x, out);
          break;
        case 5:
          results<2, 3>(i, first, segment, x, out);
          break;
        case 6:
          results<3, 1>(i, first, segment, x, out);
          break;
        case 7:
          results<3, 2>(i, first, segment, x, out);
          break;
        default:
          results<3, 3>(i, first, segment, x, out);
      }
    }
  }

  // The results of a segment of row i, whose taps first ... first + kTapsV - 1 down the image lie inside it. kTapsV =
  // kOfPair: of row i and the next that shares its rows of x, all of which lie inside it.
  template <int kTapsV, int kTapsH>
  void results(int64_t i, int first, const ColumnSegment& segment, const T* x, T* out) const {
    const int64_t c = s_.channels, end = segment.columns.end;
    const int64_t h = kTapsV > 0 ? tap_input(i, first, s_.stride_h, s_.rate_h, s_.pad_top) : 0;
    const int64_t new_h = h + (kTapsV - 1) * s_.rate_h + row_step_ * s_.stride_h;
    const bool more_than_one = kTapsV == kOfPair && new_h + s_.rate_h < s_.in_h;
    const bool more = kTapsV > 0 && kTapsH > 0 && new_h < s_.in_h;
    auto block = [&](int64_t j, int64_t apart) -> Block {
      const int64_t w = kTapsH > 0 ? tap_input(j, segment.first, s_.stride_w, s_.rate_w, s_.pad_left) : 0;
      return {x + (h * s_.in_w + w) * c,
              s_.rate_h * s_.in_w * c,
              s_.rate_w * c,
              apart * s_.stride_w * c,
              out + j * c,
              apart * c,
              prepared_.weights + (3 * first + segment.first) * L,
              more ? x + (new_h * s_.in_w + w) * c : nullptr,
              prepared_.scale,
              prepared_.shift,
              prepared_.activation,
              streams_ ? parked_ : nullptr,
              vectors_,
              c - L,
              row_step_ * s_.out_w * c,
              more_than_one ? s_.rate_h * s_.in_w * c : 0};
    };
    int64_t j = segment.columns.begin;
    // Results whose taps fall on each other's share what they read: a rate apart at stride 1, any at stride 2, rate 1.
    auto slide = [&](auto kResults, auto shared, int64_t apart) __attribute__((always_inline)) {
      constexpr int B = decltype(kResults)::kValue;
      for (; j + B * apart <= end; j += B * apart)
        for (int64_t q = 0; q < apart; ++q) compute<kTapsV, kTapsH, B, decltype(shared)::kValue>(block(j + q, apart));
    };
    if (s_.stride_w == 1) {
      slide(Number<4>(), Number<1>(), s_.rate_w);
      slide(Number<3>(), Number<1>(), s_.rate_w);
      slide(Number<2>(), Number<1>(), s_.rate_w);
    } else if (s_.stride_w == 2 && s_.rate_w == 1) {
      slide(Number<4>(), Number<2>(), 1);
    }
    slide(Number<4>(), Number<0>(), 1);
    slide(Number<1>(), Number<0>(), 1);
  }

  // B results whose taps lie kShared taps apart (0: anywhere).
  template <int kTapsV, int kTapsH, int B, int kShared>
  void compute(const Block& given) const {
    // A copy, which the compiler knows that no store changes.
    const Block block = given;
    int64_t k = 0;
    if constexpr (kTapsV == kOfPair) {
      for (; k < block.vectors; ++k) at_vector_of_pair<kTapsH, B, kShared>(block, k);
      return;
    }
    for (; k + kTogether <= block.vectors; k += kTogether) at_vectors<kTapsV, kTapsH, B, kShared, kTogether>(block, k);
    for (; k < block.vectors; ++k) at_vectors<kTapsV, kTapsH, B, kShared, 1>(block, k);
  }

  // B results of each of two rows: inputs are loaded once for both, three vectors a result instead of 4.5.
  template <int kTapsH, int B, int kShared>
  DK_INLINE void at_vector_of_pair(const Block& block, int64_t k) const {
    const int64_t c = smaller(k * L, block.last_channel);
    if (block.ahead && k % kVectorsOfLine == 0) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) __builtin_prefetch(block.ahead + b * block.result + c, 0, 2);
      if (block.next_ahead)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) __builtin_prefetch(block.ahead + block.next_ahead + b * block.result + c, 0, 2);
    }
    V acc[2][B] = {};
    const A* weights = block.weights + k * 9 * L;
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      V weight[2][3];
#pragma GCC unroll 3
      for (int v = 0; v < kTapsH; ++v) {
        if (u < 3) weight[0][v] = load(weights + (3 * u + v) * L);
        if (u > 0) weight[1][v] = load(weights + (3 * u - 3 + v) * L);
      }
      const T* p = block.x + u * block.row + c;
      constexpr int kColumns = kShared > 0 ? (B - 1) * kShared + kTapsH : B * kTapsH;
#pragma GCC unroll 16
      for (int column = 0; column < kColumns; ++column) {
        const V input = load(kShared > 0 ? p + column * block.tap
                                         : p + column / kTapsH * block.result + column % kTapsH * block.tap);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) {
          const int v = kShared > 0 ? column - b * kShared : column - b * kTapsH;
          if (v < 0 || v >= kTapsH) continue;
          if (u < 3) acc[0][b] += weight[0][v] * input;
          if (u > 0) acc[1][b] += weight[1][v] * input;
        }
      }
    }
    if (block.scale) {
      const V factor = load(block.scale + k * L), summand = load(block.shift + k * L);
#pragma GCC unroll 2
      for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[r][b] = activated(V(acc[r][b] * factor + summand), block.activation);
    }
#pragma GCC unroll 2
    for (int r = 0; r < 2; ++r)
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) store(block.out + r * block.next_row + b * block.next + c, acc[r][b]);
  }

  // Vectors k ... k + N - 1: of a kernel row all N, while its cache lines are there. Pixels of a multiple of 4 KB
  // compete for eight places.
  template <int kTapsV, int kTapsH, int B, int kShared, int N>
  DK_INLINE void at_vectors(const Block& block, int64_t k) const {
    int64_t c[N];
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) c[n] = smaller((k + n) * L, block.last_channel);
    if (block.ahead && k % kVectorsOfLine == 0) {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) __builtin_prefetch(block.ahead + b * block.result + c[0], 0, 2);
    }
    V acc[N][B] = {};
#pragma GCC unroll 3
    for (int u = 0; u < kTapsV; ++u) {
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) {
        const A* weights = block.weights + ((k + n) * 9 + 3 * u) * L;
        V weight[kTapsH > 0 ? kTapsH : 1];
#pragma GCC unroll 3
        for (int v = 0; v < kTapsH; ++v) weight[v] = load(weights + v * L);
        add_taps<kTapsH, kShared>(block.x + u * block.row + c[n], block.tap, block.result, weight, acc[n]);
      }
    }
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) {
      if (block.scale) {
        const V factor = load(block.scale + (k + n) * L), summand = load(block.shift + (k + n) * L);
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) acc[n][b] = activated(V(acc[n][b] * factor + summand), block.activation);
      }
    }
    if (block.parked) {
      const int64_t at = k % kParked;
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n)
#pragma GCC unroll 4
        for (int b = 0; b < B; ++b) store(block.parked + (b * kParked + at + n) * L, acc[n][b]);
      if (at + N == kParked || k + N == block.vectors)
        send<B>(block.parked, block.out + (k - at) * L, block.next, at + N);
    } else {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b)
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) store(block.out + b * block.next + c[n], acc[n][b]);
    }
  }

  // `count` parked vectors of each of B results, `next` apart, past the caches.
  template <int B>
  static __attribute__((noinline)) void send(const A* parked, T* out, int64_t next, int64_t count) {
    for (int b = 0; b < B; ++b)
      stream_vectors(out + b * next, count, [&](int64_t k) { return load(parked + (b * kParked + k) * L); });
  }

  DepthwiseShape s_;
  int64_t vectors_;
  int64_t row_step_;  // rows of results that read the same rows of x lie this far apart
  const Prepared& prepared_;
  bool streams_ = false, pairs_ = false;
  alignas(64) mutable A parked_[4 * kParked * L];  // up to four results' vectors on their way past the caches
  ColumnSegment segments_[7];
  int segment_count_;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
