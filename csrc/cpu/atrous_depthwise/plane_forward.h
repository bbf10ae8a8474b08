// The passes of inference and of a training step's forward half. For the per-instruction-set files only.
#pragma once

#include "plane_tiles.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class PlaneForward : public PlaneTiles<T, kNhwc> {
  using Base = PlaneTiles<T, kNhwc>;

 protected:
  using Base::Base;
  using Base::L, Base::kChannels, Base::kTileColumns, Base::kTile, Base::s_, Base::g_, Base::cut_, Base::size_,
      Base::plane_, Base::x_plane_, Base::first_, Base::count_, Base::active_, Base::band, Base::inputs_of, Base::held,
      Base::select, Base::offset, Base::pieces, Base::piece, Base::fresh_inputs, Base::pre_, Base::y_planes_,
      Base::tile_, Base::writer_, Base::collected, Base::norm_, Base::moments_, Base::tail_, Base::at_row_0,
      Base::pack_x, Base::unpack, Base::before_pre_activation, Base::fetch_for_forward, Base::fetch_for_inference,
      Base::load_weights, Base::load_flipped_weights, Base::prepare_norm, Base::tiles, Base::row_bytes, Base::within,
      Base::tail_at;
  using typename Base::A, typename Base::V, typename Base::Moments;

 public:
  // act(norm(conv(x))) of a group's band; norm null: conv(x).
  void inference(int64_t task, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const int64_t n = task / cut_.bands % s_.batch;
    select(task / (cut_.bands * s_.batch));
    if (norm)
      for (int64_t p = 0; p < active_; ++p) prepare_norm(*norm, p, norm->mean, norm->var);
    const IndexRange rows = band(task % cut_.bands, s_.out_h);
    fetch_for_inference(task + 1, x, out);
    results(n, rows, x, weight, norm, out);
  }

  // out = act(bn(conv(pre(x)))) with the batch's statistics, which it returns too.
  void training(int64_t task, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, A* mean, A* var,
                Activation pre_activation = Activation::kNone) {
    select(task);
    pre_ = pre_activation;
    for (int64_t p = 0; p < active_; ++p) moments_[p] = Moments();
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t i = 0; i < pieces(); ++i) {
        const IndexRange rows = piece(i);
        const A* packed = pack_x(x, n, fresh_inputs(i));
        fetch_for_forward(x, n, i, out);
        for (int64_t p = 0; p < active_; ++p) {
          load_weights(weight, p);
          statistics(packed + p * x_plane_, rows, at_row_0(y_planes_ + p * plane_, n, rows), moments_[p]);
        }
      }
    finish_moments(norm, mean, var);
    for (int64_t n = 0; n < s_.batch; ++n)
      if (cut_.resident)
        write_resident(n, norm.activation, out);
      else
        for (int64_t b = 0; b < cut_.bands; ++b) results(n, band(b, s_.out_h), x, weight, &norm, out);
  }

 protected:
  // y = conv(x), whose values join the moments.
  void statistics(const A* x, IndexRange rows, A* y, Moments& moments) const {
    const int64_t last = (g_.out_vectors - 1) * L;
    const V tail = load(tail_);
    LaneSums<A, kNhwc, 1> total;
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, IndexRange columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* to = y + row * g_.pitch;
      const TileRows result_rows(row_bytes(g_.pitch));
      const int64_t tile = R * g_.pitch;
      V sum = total.now[0];
      this->template convolve_x<R>(x, row, count, columns, last, [&](int64_t i, int64_t k, V(&acc)[R]) {
        V together = {};
        A* first = to + (i * tile + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store(result_rows.at(first, r), acc[r]), together += acc[r];
        sum += kNhwc ? together : within(together, tail_at(k, last));
      });
      total.now[0] = sum, total.added(R * count * (columns.end - columns.begin));
    });
    total.finish();
    // The squares about the mean, which is rounded: what is left of it is subtracted.
    const double count = double(rows.end - rows.begin) * double(s_.out_w);
    V centre;
    for (int64_t l = 0; l < L; ++l) centre[l] = A(total.lane[0][l] / count);
    LaneSums<A, kNhwc, 2> deviations;
    const int64_t pitch = g_.pitch, most = larger(1, kSumTerms / g_.out_vectors);
    for (int64_t begin = rows.begin; begin < rows.end; begin += most) {
      V square[2] = {}, rest[2] = {};
      const A* row = y + begin * pitch;
      for (int64_t i = begin; i < smaller(rows.end, begin + most); ++i, row += pitch) {
        int64_t k = 0;
        for (; k + L < last; k += 2 * L)
#pragma GCC unroll 2
          for (int e = 0; e < 2; ++e) {
            const V d = load(row + k + e * L) - centre;
            square[e] += d * d, rest[e] += d;
          }
        for (; k <= last; k += L) {
          V d = load(row + k) - centre;
          if (!kNhwc && k == last) d = within(d, tail);
          square[0] += d * d, rest[0] += d;
        }
      }
      deviations.now[0] = square[0] + square[1], deviations.now[1] = rest[0] + rest[1];
      deviations.flush();
    }
    deviations.finish();
    for (int64_t l = 0; l < kChannels; ++l)
      join_deviations(moments.seen, count, centre[l], deviations.lane[1][l], deviations.lane[0][l], moments.mean[l],
                      moments.m2[l]);
    moments.seen += count;
  }

  void finish_moments(const BatchNorm<A>& norm, A* mean, A* var) {
    const double count = double(s_.batch) * double(s_.out_h) * double(s_.out_w);
    for (int64_t p = 0; p < active_; ++p) {
      for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l) {
        mean[first_ + p * L + l] = A(moments_[p].mean[l]);
        var[first_ + p * L + l] = A(moments_[p].m2[l] / count);
      }
      prepare_norm(norm, p, mean, var);
    }
  }

  void write_resident(int64_t n, Activation activation, T* out) const {
    out += offset(n, 0, s_.out_h, s_.out_w);
    const A* y = y_planes_ + n * size_;
    if constexpr (kNhwc)
      for (int64_t i = 0; i < s_.out_h; ++i, y += g_.pitch, out += s_.out_w * s_.channels)
        unpack(y, plane_, s_.out_w, out,
               [&](V v, int64_t p, auto...) { return activated(V(v * norm_[p].scale + norm_[p].shift), activation); });
    else
      with_activation(activation, [&](auto known) { write_rows<decltype(known)::value>(y, out); });
  }
  // NCHW: the rows of an image.
  template <Activation kActivation>
  void write_rows(const A* y, T* out) const {
    const V scale = norm_[0].scale, shift = norm_[0].shift;
    const int64_t rows = s_.out_h, width = s_.out_w, pitch = g_.pitch, last = larger(0, width - L);
    const bool collect = collected(width, L);
    if (collect) writer_.begin(out);
    for (int64_t i = 0; i < rows; ++i, y += pitch, out += width) {
      T* row = collect ? writer_.room() : out;
      auto write = [&](int64_t k) { store(row + k, activated(V(load(y + k) * scale + shift), kActivation)); };
      int64_t k = 0;
      for (; k + 4 * L <= last; k += 4 * L)
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) write(k + e * L);
      for (; k < last; k += L) write(k);
      write(last);
      if (collect) writer_.add(width);
    }
    if (collect) writer_.end();
  }

  void results(int64_t n, IndexRange rows, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const A* planes = pack_x(x, n, inputs_of(rows));
    if (norm)
      to_memory<true, false>(planes, n, rows, weight, norm->activation, out);
    else
      to_memory<false, false>(planes, n, rows, weight, Activation::kNone, out);
  }

  // The convolution of x planes, or, transposed, of gradient planes, masked by x where that is given; planes: row 0 of
  // the first. NHWC: the rows of a tile go through memory of their own, so that cache lines of the result are written
  // whole.
  template <bool kNorm, bool kTransposed>
  void to_memory(const A* planes, int64_t n, IndexRange rows, const T* weight, Activation activation, T* out,
                 const T* x = nullptr) {
    if constexpr (kNorm)
      with_activation(activation, [&](auto known) {
        to_memory<kNorm, kTransposed, false, decltype(known)::value>(planes, n, rows, weight, out, x);
      });
    else if (kTransposed && x)
      to_memory<kNorm, kTransposed, kTransposed, Activation::kNone>(planes, n, rows, weight, out, x);
    else
      to_memory<kNorm, kTransposed, false, Activation::kNone>(planes, n, rows, weight, out, x);
  }
  template <bool kNorm, bool kTransposed, bool kMasked, Activation kActivation>
  void to_memory(const A* planes, int64_t n, IndexRange rows, const T* weight, T* out, const T* x) {
    const int64_t vectors = kTransposed ? g_.in_vectors : g_.out_vectors;
    const int64_t width = kTransposed ? s_.in_w : s_.out_w, height = kTransposed ? s_.in_h : s_.out_h;
    const int64_t distance = kTransposed ? plane_ : x_plane_;
    const int64_t last = kNhwc ? (vectors - 1) * L : larger(0, width - L);
    const bool collect = collected(width, L), follow = s_.rate_h == 1;  // follow: the rows of a tile
    if (collect && follow) writer_.begin(out + offset(n, rows.begin, height, width));
    auto load_taps = [&](int64_t p) { kTransposed ? load_flipped_weights(weight, p) : load_weights(weight, p); };
    if (active_ == 1) load_taps(0);
    tiles(rows, vectors, [&](auto rows_at_once, int64_t row, int64_t count, IndexRange columns) {
      constexpr int R = decltype(rows_at_once)::value;
      T* to = out + offset(n, row, height, width);
      const int64_t step = s_.rate_h * width, result_step = collect ? width : step;
      [[maybe_unused]] const T* row_x = x + (to - out);
      [[maybe_unused]] T* results = collect ? writer_.room() : to;
      [[maybe_unused]] const TileRows x_rows(step * int64_t(sizeof(T)));
      const TileRows out_rows(result_step * int64_t(sizeof(T)));
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1) load_taps(p);
        const V scale = norm_[p].scale, shift = norm_[p].shift;
        A* tile = tile_ + p * kTile - columns.begin * L;
        auto emit = [&](int64_t i, int64_t k, V(&acc)[R]) {
          const int64_t at = kNhwc ? 0 : i * (R * width) + k;
          [[maybe_unused]] T* first = results + at;
          [[maybe_unused]] const T* first_x = row_x + at;
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            if constexpr (kNorm) acc[r] = activated(V(acc[r] * scale + shift), kActivation);
            if constexpr (kNhwc) {
              store(tile + r * kTileColumns * L + k, acc[r]);
            } else {
              if constexpr (kMasked) acc[r] = before_pre_activation(acc[r], x_rows.at(first_x, r), smaller(L, width));
              store(out_rows.at(first, r), acc[r]);
            }
          }
        };
        const A* plane = planes + p * distance;
        if constexpr (kTransposed)
          this->template convolve<R, 1>(
              this->template sources<R, 1>(plane, g_.pitch, row + s_.pad_top - 2 * s_.rate_h, held()), g_.pitch,
              g_.taps, count, columns, last, emit);
        else
          this->template convolve_x<R>(plane, row, count, columns, last, emit);
      }
      if constexpr (kNhwc)
        for (int r = 0; r < R; ++r) {
          const A* tile = tile_ + r * kTileColumns * L;
          T* first = to + (r * step + columns.begin) * s_.channels;
          const int64_t count = columns.end - columns.begin;
          if constexpr (kMasked) {
            const T* first_x = x + (first - out);
            unpack(tile, kTile, count, first, [&](V v, int64_t, int64_t k, int64_t channels) {
              return before_pre_activation(v, first_x + k, channels);
            });
          } else {
            unpack(tile, kTile, count, first, [](V v, auto...) { return v; });
          }
        }
      if (collect) follow ? writer_.add(R * count * width) : writer_.spread(to, step, R, width);
    });
    if (collect && follow) writer_.end();
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
