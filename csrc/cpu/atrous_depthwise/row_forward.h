// The passes over packed rows of inference and of a training step's forward half. For the per-instruction-set files
// only: everything here has internal linkage.
#pragma once

#include "row_convolution.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class RowForward : public RowConvolution<T, kNhwc> {
  using Base = RowConvolution<T, kNhwc>;

 protected:
  using Base::L, Base::plan_, Base::s_, Base::parts_, Base::count_, Base::lanes_, Base::active_, Base::y_, Base::lanes,
      Base::out_offset, Base::select_image, Base::x_base, Base::keep_rows, Base::y_row, Base::put;
  using typename Base::A, typename Base::V;

 public:
  using Base::Base;

  void forward(const Task& task, T* out, bool with_norm) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t i = plan_.out_rows.rows[position];
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        T* row = out + out_offset(i, part);
        if (with_norm)
          this->template convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base,
                                         typename Base::StoreActivated{*this, row, part});
        else
          this->template convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base,
                                         typename Base::Store{*this, row});
      }
      position += count;
    }
  }

  // Adds the band's outputs to mean and m2 (sum of squared deviations) of each channel. kept: where to store them, or
  // null.
  void statistics(const Task& task, T* kept, double* mean, double* m2) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) mean[l] = m2[l] = 0;
    double seen = 0;
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        keep_rows(position, count, part, base);
        for (int64_t r = 0; kept && r < count; ++r)
          store_row(y_row(r), kept + out_offset(plan_.out_rows.rows[position + r], part));
        row_statistics(seen, count * s_.out_w, mean + part, m2 + part);
      }
      seen += double(count * s_.out_w);
      position += count;
    }
  }

 protected:
  // Narrows a packed row of outputs to where it belongs.
  void store_row(const A* row, T* dst) const {
    if constexpr (kNhwc) {
      for (int64_t j = 0; j < s_.out_w; ++j)
        for (int64_t l = 0; l < count_; l += L)
          put(dst + j * s_.out_channels() + l, load(row + j * lanes_ + l), smaller(L, count_ - l));
    } else {
      for (int64_t j = 0; j < s_.out_w; j += L) put(dst + j, load(row + j), smaller(L, s_.out_w - j));
    }
  }
  // The first `columns` of y_ (NHWC: pixels), NCHW rows lying one behind the other.
  void row_statistics(double seen, int64_t columns, double* mean, double* m2) const {
    const double n = double(columns);
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        V sum = {};
        for (int64_t j = 0; j < columns; ++j) sum += load(y_ + j * lanes_ + l);
        const V centre = sum / A(n);
        V squares = {}, rests = {};
        for (int64_t j = 0; j < columns; ++j) {
          const V d = load(y_ + j * lanes_ + l) - centre;
          squares += d * d, rests += d;
        }
        for (int64_t e = 0; e < L; ++e)
          join_deviations(seen, n, centre[e], rests[e], squares[e], mean[l + e], m2[l + e]);
      }
    } else {
      const int64_t whole = columns / L * L;
      V sums = {};
      for (int64_t j = 0; j < whole; j += L) sums += load(y_ + j);
      A sum = sum_of_lanes<A>(sums);
      for (int64_t j = whole; j < columns; ++j) sum += y_[j];
      const A centre = sum / A(n);
      V squares = {}, rests = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V d = load(y_ + j) - centre;
        squares += d * d, rests += d;
      }
      A square = sum_of_lanes<A>(squares), rest = sum_of_lanes<A>(rests);
      for (int64_t j = whole; j < columns; ++j) {
        const A d = y_[j] - centre;
        square += d * d, rest += d;
      }
      join_deviations(seen, n, centre, rest, square, *mean, *m2);
    }
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
