// The convolution of packed rows and what becomes of its results. For the per-instruction-set files only: everything
// here has internal linkage.
#pragma once

#include "row_packing.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class RowConvolution : public RowPacking<T, kNhwc> {
  using Base = RowPacking<T, kNhwc>;

 protected:
  using Base::L, Base::plan_, Base::s_, Base::parts_, Base::x_advance_, Base::image_, Base::count_, Base::active_,
      Base::forward_tables_, Base::weights_, Base::y_, Base::kept_, Base::lanes, Base::taps_of, Base::lanes_or_one,
      Base::x_pixel;
  using typename Base::A, typename Base::V;

  using Base::Base;

  // Rows computed together, apart by these distances in what they read and, in columns, in what they write.
  struct Batch {
    int64_t rows, source, result;
  };

  // result: distance of the rows in what emit writes, in columns.
  template <bool kWholeVectors, typename Emit>
  DK_INLINE void convolve(int64_t i, int64_t count, int64_t result, int64_t part, const A* base,
                          const Emit& emit) const {
    const Columns& columns = plan_.forward;
    const Batch batch{count, x_advance_, result};
    for (int64_t n = 0; n < columns.count; ++n)
      run<kWholeVectors>(columns.segments[n], taps_of(forward_tables_, columns, n, plan_.forward_rows.rows[i]),
                         weights_ + part * s_.taps(), base, columns.input_step * x_pixel(), batch, emit);
  }

  // conv(x) of a batch into y_, row behind row, or to where it is kept.
  void keep_rows(int64_t position, int64_t count, int64_t part, const A* base) {
    const int64_t i = plan_.out_rows.rows[position];
    if (kept_)
      convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base, Keep{*this, kept_row(i, part)});
    else
      convolve<false>(i, count, s_.out_w, part, base, Keep{*this, y_});
  }
  A* kept_row(int64_t i, int64_t part) const {
    return kept_ + ((image_ * parts_ + part) * s_.out_h + i) * s_.out_w * lanes_or_one();
  }
  A* y_row(int64_t r) const { return y_ + r * s_.out_w * lanes_or_one(); }

  // step: from the inputs of one result to those of the next (NHWC).
  template <bool kWholeVectors, typename Emit>
  void run(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step, const Batch& batch,
           const Emit& emit) const {
    switch (taps.count) {
      case 9:
        return run_taps<kWholeVectors, 9>(segment, taps, weights, base, step, batch, emit);
      case 6:
        return run_taps<kWholeVectors, 6>(segment, taps, weights, base, step, batch, emit);
      case 4:
        return run_taps<kWholeVectors, 4>(segment, taps, weights, base, step, batch, emit);
      case 3:
        return run_taps<kWholeVectors, 3>(segment, taps, weights, base, step, batch, emit);
      default:
        return run_taps<kWholeVectors, 0>(segment, taps, weights, base, step, batch, emit);
    }
  }

  // N: number of taps, 0 if known only at run time.
  template <bool kWholeVectors, int N, typename Emit>
  DK_INLINE void run_taps(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step,
                          const Batch& batch, const Emit& emit) const {
    if constexpr (kNhwc) {
      // Results whose distance is the rate share inputs: 3x3 kernels of stride 1 take them together.
      const int64_t apart = N == 9 && segment.step == 1 && s_.stride_w == 1 ? s_.rate_w : 0;
      if (apart > 0 && apart * 4 <= segment.count && taps.offset[1] - taps.offset[0] == apart * step)
        column_tiles<N, N == 9>(segment, taps, weights, base, step, apart, batch, emit);
      else
        column_tiles<N, false>(segment, taps, weights, base, step, 1, batch, emit);
    } else {
      const auto source = source_of<N, false>(taps, weights, base);
      const int64_t n = segment.count;
      // The last vector starts so that it ends with the segment: what it shares with the one before gets the same
      // values.
      const int64_t vectors = (n + L - 1) / L, end = kWholeVectors ? (vectors - 1) * L : n - L;
      for (int64_t r = 0; r < batch.rows; ++r) {
        const int64_t from = r * batch.source, to = segment.begin + r * batch.result;
        if (n < L) {
          block<1>(source, from, to, 0, kWholeVectors ? L : n, emit);
          continue;
        }
        int64_t k = 0;
        for (; k + 6 * L < vectors * L; k += 4 * L) block<4>(source, from + k, to + k, 3 * L, L, emit);
        switch (vectors - k / L) {
          case 6:
            block<6>(source, from + k, to + k, end - k, L, emit);
            break;
          case 5:
            block<5>(source, from + k, to + k, end - k, L, emit);
            break;
          case 4:
            block<4>(source, from + k, to + k, end - k, L, emit);
            break;
          case 3:
            block<3>(source, from + k, to + k, end - k, L, emit);
            break;
          case 2:
            block<2>(source, from + k, to + k, end - k, L, emit);
            break;
          case 1:
            block<1>(source, from + k, to + k, end - k, L, emit);
            break;
        }
      }
    }
  }

  // NHWC: results `apart` columns apart side by side, for each first column.
  template <int N, bool kSliding, typename Emit>
  DK_INLINE void column_tiles(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step,
                              int64_t apart, const Batch& batch, const Emit& emit) const {
    // A vector or two of channels at a time, whose weights stay in registers or close; few columns at a time, so that
    // all that a tile touches stays in the first-level cache.
    const int64_t width = larger(1, kColumnTile / apart) * apart;
    for (int64_t tile = 0; tile < segment.count; tile += width) {
      const int64_t tile_end = smaller(segment.count, tile + width);
      int64_t l = 0;
      if constexpr (N == 9)
        for (; l + 2 * L <= active_; l += 2 * L) {
          column_tile<N, kSliding>(TwoVectors<kSliding>(taps, weights + l, base + l), segment, tile, tile_end, step,
                                   apart, l, batch, emit);
        }
      for (; l < active_; l += L)
        column_tile<N, kSliding>(source_of<N, kSliding>(taps, weights + l, base + l), segment, tile, tile_end, step,
                                 apart, l, batch, emit);
    }
  }

  template <int N, bool kSliding, typename From, typename Emit>
  DK_INLINE void column_tile(const From& source, const Segment& segment, int64_t tile, int64_t tile_end, int64_t step,
                             int64_t apart, int64_t l, const Batch& batch, const Emit& emit) const {
    const int64_t from_step = apart * step, to_step = apart * segment.step;
    for (int64_t r = 0; r < batch.rows; ++r)
      for (int64_t q = 0; q < apart; ++q) {
        int64_t from = r * batch.source + (tile + q) * step;
        int64_t to = segment.begin + r * batch.result + (tile + q) * segment.step;
        int64_t left = (tile_end - tile - q + apart - 1) / apart;
        for (; left >= 4; left -= 4, from += 4 * from_step, to += 4 * to_step)
          pixels<4>(source, from, from_step, to, to_step, l, emit);
        switch (left) {
          case 3:
            pixels<3>(source, from, from_step, to, to_step, l, emit);
            break;
          case 2:
            pixels<2>(source, from, from_step, to, to_step, l, emit);
            break;
          case 1:
            pixels<1>(source, from, from_step, to, to_step, l, emit);
            break;
        }
      }
  }

  // What the results of one segment are computed from.
  template <int N, bool kSliding>
  struct Source {
    static constexpr bool kTwo = false;
    const A* input[N];
    V weight[N];
    DK_INLINE Source(const Taps& taps, const A* weights, const A* base) {
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) {
        input[t] = base + taps.offset[t];
        weight[t] = kNhwc ? load(weights + taps.weight[t]) : broadcast(weights[taps.weight[t]]);
      }
    }
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, int64_t last, V (&acc)[B]) const {
      if constexpr (kSliding)
        accumulate_sliding<A, B>(input, weight, offset, step, acc);
      else
        accumulate<A, N, B>(input, weight, offset, step, last, acc);
    }
  };

  // With the number of taps known only at run time.
  struct AnySource {
    static constexpr bool kTwo = false;
    const Taps& taps;
    const A *weights, *base;
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, int64_t last, V (&acc)[B]) const {
      accumulate<A, kNhwc, B>(taps, weights, base + offset, step, last, acc);
    }
  };
  template <int N, bool kSliding>
  DK_INLINE static auto source_of(const Taps& taps, const A* weights, const A* base) {
    if constexpr (N == 0)
      return AnySource{taps, weights, base};
    else
      return Source<N, kSliding>(taps, weights, base);
  }

  template <bool kSliding>
  struct TwoVectors {
    static constexpr bool kTwo = true;
    const A* input[9];
    V weight[2][9];
    DK_INLINE TwoVectors(const Taps& taps, const A* weights, const A* base) {
#pragma GCC unroll 16
      for (int t = 0; t < 9; ++t) {
        input[t] = base + taps.offset[t];
        weight[0][t] = load(weights + taps.weight[t]), weight[1][t] = load(weights + taps.weight[t] + L);
      }
    }
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, V (&acc)[2][B]) const {
      if constexpr (kSliding)
        accumulate_sliding<A, B>(input, weight, offset, step, acc);
      else
        accumulate<A, B>(input, weight, offset, step, acc);
    }
  };

  // B results side by side, to_step columns apart, of one vector of channels.
  template <int B, typename From, typename Emit>
  DK_INLINE void pixels(const From& source, int64_t from, int64_t step, int64_t to, int64_t to_step, int64_t l,
                        const Emit& emit) const {
    int64_t at[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) at[b] = to + to_step * b;
    if constexpr (From::kTwo) {
      V acc[2][B];
      source.template operator()<B>(from, step, acc);
      emit.template operator()<B>(at, l, acc[0], smaller(L, count_ - l));
      emit.template operator()<B>(at, l + L, acc[1], smaller(L, count_ - l - L));
    } else {
      V acc[B];
      source.template operator()<B>(from, step, (B - 1) * step, acc);
      emit.template operator()<B>(at, l, acc, smaller(L, count_ - l));
    }
  }
  // B vectors of columns, the last one `last` columns behind the first.
  template <int B, typename From, typename Emit>
  DK_INLINE void block(const From& source, int64_t from, int64_t to, int64_t last, int64_t valid,
                       const Emit& emit) const {
    V acc[B];
    source.template operator()<B>(from, L, last, acc);
    int64_t at[B];
#pragma GCC unroll 8
    for (int b = 0; b < B - 1; ++b) at[b] = to + b * L;
    at[B - 1] = to + last;
    emit.template operator()<B>(at, 0, acc, valid);
  }

  // ---- epilogues: acc[b] is column at[b] of the result, channels l ... (NHWC), or columns at[b] ... (NCHW)

  template <int B, typename Out>
  DK_INLINE void write(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid, Out* row,
                       int64_t pixel) const {
    Out* p = kNhwc ? row + l : row;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) put(p + (kNhwc ? at[b] * pixel : at[b]), acc[b], valid);
  }

  struct Store {
    const RowConvolution& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, valid, row, w.out_pixel_);
    }
  };

  struct StoreActivated {
    const RowConvolution& w;
    T* row;
    int64_t part;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, V (&acc)[B], int64_t valid) const {
      const V scale = kNhwc ? load(w.scale_ + l) : broadcast(w.scale_[part]);
      const V shift = kNhwc ? load(w.shift_ + l) : broadcast(w.shift_[part]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[b] = activated(V(acc[b] * scale + shift), w.activation_);
      w.write(at, l, acc, valid, row, w.out_pixel_);
    }
  };

  // Into rows of A, with all lanes of a group (NHWC).
  struct Keep {
    const RowConvolution& w;
    A* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, kNhwc ? L : valid, row, w.lanes_);
    }
  };

  template <typename Out>
  DK_INLINE static void put(Out* p, V v, int64_t valid) {
    if (valid == L)
      store(p, v);
    else
      store_part(p, v, valid);
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
