// Tiles of results and their convolution. For the per-instruction-set files only.
#pragma once

#include <type_traits>

#include "plane_fetch.h"

namespace deeplab_kernels::cpu {
namespace {

// Calls f(Known<activation>()): the loops should not ask again and again.
template <Activation k>
struct Known {
  static constexpr Activation value = k;
};
template <typename F>
DK_INLINE void with_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::kNone:
      return f(Known<Activation::kNone>());
    case Activation::kRelu:
      return f(Known<Activation::kRelu>());
    default:
      return f(Known<Activation::kRelu6>());
  }
}

// The rows that a tile of R rows of results reads, a rate apart: row c for kernel row u of result (c - u) / stride.
// Those in [begin, end) hold the image or zeros.
template <typename A>
struct Sources {
  const A* data;
  int begin, end;
};
// Of these rows: all, or, at stride 1, those in the places of the results: where rates are large, neither the rows
// above nor those below are left.
enum class Present { kAll, kOwn, kSome };
template <int R, typename A>
DK_INLINE bool alone(const Sources<A>& from) {
  return from.begin == 1 && from.end == R + 1;
}
template <int R, int kStride, typename A>
DK_INLINE bool whole(const Sources<A>& from) {
  return from.begin == 0 && from.end == kStride * (R - 1) + 3;
}
// Rows 0, 1, ... of a tile, a constant number of bytes apart: the few multiples of it that addresses cannot express
// stay in registers.
struct TileRows {
  int64_t one, three, five, seven;
  explicit TileRows(int64_t bytes) : one(bytes), three(3 * one), five(5 * one), seven(7 * one) {}
  template <typename P>
  DK_INLINE P* at(P* row_0, int row) const {
    using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
    Byte* p = reinterpret_cast<Byte*>(row_0);
    switch (row) {
      case 0:
        break;
      case 3:
        p += three;
        break;
      case 5:
        p += five;
        break;
      case 6:
        p += three * 2;
        break;
      case 7:
        p += seven;
        break;
      default:
        p += one * row;
    }
    return reinterpret_cast<P*>(p);
  }
};

// Calls f(input, taps of the kernel, result) for the products of a vector of columns: input is loaded once for all
// results it takes part in. rows: those of x, a rate apart; taps: of kernel row 0, from where the first result is.
template <int R, int kStride, Present kPresent, typename A, typename F>
DK_INLINE void products(const Sources<A>& from, const TileRows& rows, int64_t k, const A* const (&taps)[3],
                        const F& f) {
  constexpr int kSources = kStride * (R - 1) + 3;
  const A* data[3];
#pragma GCC unroll 3
  for (int v = 0; v < 3; ++v) data[v] = taps[v] + k;
#pragma GCC unroll 9
  for (int c = 0; c < kSources; ++c) {
    if (kPresent == Present::kSome && (c < from.begin || c >= from.end)) continue;
    if (kPresent == Present::kOwn && (c < 1 || c > R)) continue;
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) {
      const Vec<A> input = load(rows.at(data[v], c));
#pragma GCC unroll 3
      for (int u = 0; u < 3; ++u)
        if (c >= u && (c - u) % kStride == 0 && (c - u) / kStride < R) f(input, 3 * u + v, (c - u) / kStride);
    }
  }
}

template <typename T, bool kNhwc>
class PlaneTiles : public PlaneFetch<T, kNhwc> {
  using Base = PlaneFetch<T, kNhwc>;

 protected:
  using Base::Base;
  using Base::L, Base::kChannels, Base::kRows, Base::kTileColumns, Base::s_, Base::g_, Base::margins_, Base::first_,
      Base::x_held, Base::held, Base::norm_, Base::lanes_;
  using typename Base::A, typename Base::V, typename Base::Norm;

  void load_weights(const T* weight, int64_t p) {
    for (int t = 0; t < 9; ++t) {
      if constexpr (kNhwc) {
        for (int64_t l = 0; l < L; ++l) {
          const int64_t c = first_ + p * L + l;
          weights_[t][l] = c < s_.channels ? widen(weight[c * 9 + t]) : A(0);
        }
      } else {
        weights_[t] = broadcast(widen(weight[first_ * 9 + t]));
      }
    }
  }
  // For the transposed convolution.
  void load_flipped_weights(const T* weight, int64_t p) {
    load_weights(weight, p);
    for (int t = 0; t < 4; ++t) {
      const V first = weights_[t];
      weights_[t] = weights_[8 - t], weights_[8 - t] = first;
    }
  }

  void prepare_norm(const BatchNorm<A>& norm, int64_t p, const A* mean, const A* var) {
    Norm& n = norm_[p];
    for (int64_t l = 0; l < kChannels; ++l) {
      const int64_t c = first_ + p * kChannels + l;
      if (c >= s_.channels) {
        n.scale[l] = n.shift[l] = n.mean[l] = n.inv_std[l] = 0;
        continue;
      }
      A scale, shift;
      n.inv_std[l] = fold_norm(norm, c, mean[c], var[c], &scale, &shift);
      n.mean[l] = mean[c], n.scale[l] = scale, n.shift[l] = shift;
    }
    if constexpr (!kNhwc) {
      n.scale = broadcast(n.scale[0]), n.shift = broadcast(n.shift[0]);
      n.mean = broadcast(n.mean[0]), n.inv_std = broadcast(n.inv_std[0]);
    }
  }

  // Calls f(Count<R>, row, tiles, vectors) for tiles of R rows row, row + rate, ... and some vectors of columns, few
  // enough for what they read to stay in the first-level cache. Where there are margins, several tiles that follow one
  // another form a run, as setting up costs as much as a short row.
  template <typename F>
  DK_INLINE void tiles(IndexRange range, int64_t vectors, const F& f) const {
    if (margins_) {
      const int64_t most = larger(1, kSumTerms / (kRows * vectors));
      int64_t row = range.begin;
      for (int64_t tiles; (tiles = smaller(most, (range.end - row) / kRows)) > 0; row += tiles * kRows)
        f(Count<kRows>(), row, tiles, IndexRange{0, vectors});
      if (range.end - row >= 2) f(Count<2>(), row, 1, IndexRange{0, vectors}), row += 2;
      if (range.end > row) f(Count<1>(), row, 1, IndexRange{0, vectors});
      return;
    }
    const int64_t rate = s_.rate_h, most = kNhwc ? kTileColumns : vectors;
    for (int64_t base = range.begin; base < range.end; base += kRows * rate)
      for (int64_t begin = 0; begin < vectors; begin += most) {
        const IndexRange columns{begin, smaller(vectors, begin + most)};
        for (int64_t row = base; row < smaller(range.end, base + rate); ++row)
          switch (smaller(kRows, (range.end - row + rate - 1) / rate)) {
            case 4:
              f(Count<4>(), row, 1, columns);
              break;
            case 3:
              f(Count<3>(), row, 1, columns);
              break;
            case 2:
              f(Count<2>(), row, 1, columns);
              break;
            default:
              f(Count<1>(), row, 1, columns);
          }
      }
  }

  // first: the row that kernel row 0 of the first result reads; held: the rows that can be read.
  template <int R, int kStride>
  DK_INLINE Sources<A> sources(const A* plane, int64_t pitch, int64_t first, IndexRange held) const {
    constexpr int kMost = kStride * (R - 1) + 3;
    const int64_t rate = s_.rate_h;
    const A* data = plane + first * pitch;
    if (first >= held.begin && first + (kMost - 1) * rate < held.end) return {data, 0, kMost};  // no divisions, mostly
    auto before = [&](int64_t bound) {
      int count = 0;
#pragma GCC unroll 9
      for (int c = 0; c < kMost; ++c) count += first + c * rate < bound;
      return count;
    };
    return {data, before(held.begin), before(held.end)};
  }

  // From a row of a plane to the one a rate below.
  int64_t row_bytes(int64_t pitch) const { return s_.rate_h * pitch * int64_t(sizeof(A)); }

  // emit(t, k, acc): acc[r] is the vector of results at column offset k of row r of tile t. The last vector of a row
  // lies at `last`.
  template <int R, int kStride, typename Emit>
  DK_INLINE void convolve(const Sources<A>& from, int64_t pitch, const int64_t* taps, int64_t count, IndexRange vectors,
                          int64_t last, const Emit& emit) const {
    if ((R == kRows || margins_) && whole<R, kStride>(from))
      return convolve<R, kStride, Present::kAll>(from, pitch, taps, count, vectors, last, emit);
    if constexpr (kStride == 1)
      if (alone<R>(from)) return convolve<R, kStride, Present::kOwn>(from, pitch, taps, count, vectors, last, emit);
    convolve<R, kStride, Present::kSome>(from, pitch, taps, count, vectors, last, emit);
  }
  template <int R, int kStride, Present kPresent, typename Emit>
  DK_INLINE void convolve(const Sources<A>& from, int64_t pitch, const int64_t* row_taps, int64_t count,
                          IndexRange vectors, int64_t last, const Emit& emit) const {
    const TileRows x_rows(row_bytes(pitch));
    const int64_t step = R * kStride * pitch, width = s_.out_w;
    const A* taps[3] = {from.data + row_taps[0], from.data + row_taps[1], from.data + row_taps[2]};
    V weight[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight[t] = weights_[t];
    const auto fetch = this->template next_fetch<R, kStride>(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t before = i * width;
      for (int64_t n = vectors.begin; n < vectors.end; ++n) {
        const int64_t k = kNhwc ? n * L : smaller(n * L, last);
        fetch(before + k);
        V acc[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = V{};
        products<R, kStride, kPresent>(from, x_rows, k, taps,
                                       [&](V input, int t, int r) { acc[r] += weight[t] * input; });
        emit(i, k, acc);
      }
      for (const A*& tap : taps) tap += step;
    }
  }
  // Of x planes; plane: row 0 of the image.
  template <int R, typename Emit>
  DK_INLINE void convolve_x(const A* plane, int64_t row, int64_t count, IndexRange vectors, int64_t last,
                            const Emit& emit) const {
    if (s_.stride_h == 1)  // there the pitches are the same
      convolve<R, 1>(sources<R, 1>(plane, g_.pitch, row - s_.pad_top, x_held()), g_.pitch, g_.taps, count, vectors,
                     last, emit);
    else
      convolve<R, 2>(sources<R, 2>(plane, g_.x_pitch, 2 * row - s_.pad_top, x_held()), g_.x_pitch, g_.taps, count,
                     vectors, last, emit);
  }

  // Lanes beyond the end of the row become zero, whatever they hold. tail: the lanes of the vector at column offset k
  // that lie within; looked up rather than asked for, as branches would part what the compiler should schedule
  // together.
  DK_INLINE static V within(V v, V tail) { return tail > V{} ? v : V{}; }
  DK_INLINE V tail_at(int64_t k, int64_t last) const { return load(lanes_ + (k == last ? L : 0)); }

  V weights_[9] = {};
};

}  // namespace
}  // namespace deeplab_kernels::cpu
