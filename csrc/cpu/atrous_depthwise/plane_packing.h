// The memory of planes, and the ways between it and tensors. For the per-instruction-set files only.
#pragma once

#include "../scratch.h"
#include "../workspace.h"
#include "plane_layout.h"
#include "plane_sums.h"
#include "row_writer.h"

namespace deeplab_kernels::cpu {
namespace {

// Elements 0, 2, ... and 1, 3, ... of what two vectors hold.
template <typename A>
struct EvenOdd {
  Vec<A> even, odd;
};
template <typename T>
DK_INLINE EvenOdd<acc_t<T>> load_even_odd(const T* p) {
  const auto a = load(p), b = load(p + kLanes<acc_t<T>>);
  return {every_second<0>(a, b), every_second<1>(a, b)};
}
#if defined(__AVX2__) && !defined(__AVX512F__)
// Cheap shuffles stay within halves of a vector: the second quarter and the third change places while they are loaded.
DK_INLINE EvenOdd<float> load_even_odd(const float* p) {
  auto quarters = [](const float* low) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(low + 8), 1);
  };
  const __m256 a = quarters(p), b = quarters(p + 4);
  return {_mm256_shuffle_ps(a, b, 0x88), _mm256_shuffle_ps(a, b, 0xdd)};
}
#endif

template <typename T, bool kNhwc>
class PlanePacking : public PlaneLayout<T, kNhwc> {
  using Base = PlaneLayout<T, kNhwc>;

 protected:
  using Base::L, Base::kColumn, Base::kRows, Base::kTile, Base::s_, Base::g_, Base::cut_, Base::images_, Base::rows_,
      Base::size_, Base::plane_, Base::x_rows_, Base::x_size_, Base::x_plane_, Base::margins_, Base::above_,
      Base::below_, Base::x_above_, Base::x_below_, Base::count_, Base::offset, Base::collected;
  using typename Base::A, typename Base::V, typename Base::Pass, typename Base::Cut;
  using Norm = PlaneNorm<A>;
  using Moments = LaneMoments<A>;
  template <int N>
  using Sums = LaneSums<A, kNhwc, N>;

  // further: values of memory for a class derived from this one.
  PlanePacking(const DepthwiseShape& shape, Pass pass, const Cut& cut, int64_t further)
      : Base(shape, cut), further_size_(further) {
    Arena measure(nullptr);
    allocate(measure, pass);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena, pass);
    for (int64_t i = 0; i < images_ * cut.planes; ++i) {
      clear_padding(x_planes_ + i * x_size_, x_rows_ + x_above_ + x_below_, g_.x_pitch, g_.x_slack, g_.x_begin,
                    s_.stride_w == 1 && !margins_ ? s_.in_w : 0);
      if (pass == Pass::kBackward)
        clear_padding(grad_planes_ + i * size_, rows_ + above_ + below_, g_.pitch, g_.slack, g_.grad_begin,
                      margins_ ? 0 : s_.out_w);
    }
    x_planes_ += x_above_ * g_.x_pitch, y_planes_ += above_ * g_.pitch, grad_planes_ += above_ * g_.pitch;
    const int64_t rest = kNhwc ? L : s_.out_w - (g_.out_vectors - 1) * L;
    for (int64_t l = 0; l < L; ++l) lanes_[l] = 1, lanes_[L + l] = tail_[l] = l < rest ? A(1) : A(0);
  }

  void allocate(Arena& arena, Pass pass) {
    const bool backward = pass == Pass::kBackward;
    x_planes_ = arena.take<A>(x_plane_ * cut_.planes);
    y_planes_ = arena.take<A>(pass == Pass::kInference ? 0 : plane_ * (backward ? 1 : cut_.planes));
    grad_planes_ = arena.take<A>(backward ? plane_ * cut_.planes : 0);
    tile_ = arena.take<A>(kNhwc ? cut_.planes * kTile : 0);
    norm_ = arena.take<Norm>(cut_.planes);
    moments_ = arena.take<Moments>(cut_.planes);
    sums_ = arena.take<Sums<2>>(cut_.planes);
    weight_sums_ = arena.take<Sums<9>>(cut_.planes);
    zeros_ = arena.take<A>(s_.stride_w == 2 ? g_.pitch + g_.slack : 0);
    both_ = arena.take<A>(kNhwc && s_.stride_w == 2 ? 2 * cut_.planes * both_size() : 0);
    // Tiles of four rows of a vector each add the most.
    const bool narrow = collected(smaller(s_.in_w, s_.out_w), 2 * L + 1);
    writer_ = RowWriter<T>(arena.take<T>(narrow ? RowWriter<T>::size(larger(kSumTerms, kRows) * L, 2 * L) : 0));
    further_ = arena.take<A>(further_size_);
    if (zeros_ && s_.stride_w == 2) __builtin_memset(zeros_, 0, size_t(g_.pitch + g_.slack) * sizeof(A));
  }

  // All but `columns` from `begin` on; all of them if columns is 0.
  void clear_padding(A* image, int64_t rows, int64_t pitch, int64_t slack, int64_t begin, int64_t columns) const {
    const int64_t end = columns == 0 ? begin : begin + columns * kColumn;
    for (int64_t h = 0; h < rows; ++h) {
      __builtin_memset(image + h * pitch, 0, size_t(begin) * sizeof(A));
      if (end < pitch) __builtin_memset(image + h * pitch + end, 0, size_t(pitch - end) * sizeof(A));
    }
    __builtin_memset(image + rows * pitch, 0, size_t(slack) * sizeof(A));
  }

  // The memory of image n, of which only `rows` are held, as if it began with row 0.
  A* at_row_0(A* planes, int64_t n, IndexRange rows) const {
    return planes + (cut_.resident ? n * size_ : -rows.begin * g_.pitch);
  }
  A* x_at_row_0(int64_t n, IndexRange rows) const {
    return x_planes_ + (cut_.resident ? n * x_size_ : -rows.begin * g_.x_pitch);
  }

  // Calls f(Count<P>, first plane) for the planes that have all their channels (NHWC). P is known to the compiler, so
  // that more accesses to memory are under way at once.
  template <typename F>
  DK_INLINE void whole_planes(const F& f) const {
    switch (count_ / L) {
      case 4:
        return f(Count<4>(), 0);
      case 3:
        return f(Count<3>(), 0);
      case 2:
        return f(Count<2>(), 0);
      default:
        for (int64_t p = 0; p < count_ / L; ++p) f(Count<1>(), p);
    }
  }

  // pre(x). Returns where row 0 of the image lies or would lie.
  const A* pack_x(const T* x, int64_t n, IndexRange range) const {
    if (pre_ == Activation::kNone) return pack_x(x, n, range, [](V v) { return v; });
    return pack_x(x, n, range, [pre = pre_](V v) { return activated(v, pre); });
  }
  template <typename F>
  const A* pack_x(const T* x, int64_t n, IndexRange range, const F& f) const {
    A* row_0 = x_at_row_0(n, range);
    const T* from = x + offset(n, range.begin, s_.in_h, s_.in_w);
    A* to = row_0 + range.begin * g_.x_pitch;
    const int64_t rows = range.end - range.begin;
    if constexpr (kNhwc) {
      for (int64_t h = 0; h < rows; ++h, from += s_.in_w * s_.channels, to += g_.x_pitch) pack_pixels(from, to, f);
    } else {
      s_.stride_w == 1 ? copy_rows(from, rows, s_.in_w, to + g_.x_begin, g_.x_pitch) : deinterleave(from, rows, to);
      if (pre_ != Activation::kNone)  // the padding stays zero
        for (int64_t k = 0; k < rows * g_.x_pitch; k += L) store(to + k, f(load(to + k)));
    }
    if (range.end == s_.in_h && !cut_.resident)
      __builtin_memset(row_0 + s_.in_h * g_.x_pitch, 0, size_t(x_below_ * g_.x_pitch) * sizeof(A));
    return row_0;
  }
  template <typename F>
  void pack_pixels(const T* row, A* to, const F& f) const {
    if (s_.stride_w == 1) return pack_row(row, 1, s_.in_w, to + g_.x_begin, x_plane_, f);
    const int64_t even = s_.pad_left % 2, q = s_.pad_left;  // the first even column of the padded row
    pack_row(row + even * s_.channels, 2, (s_.in_w - even + 1) / 2, to + (q + even) / 2 * L, x_plane_, f);
    pack_row(row + (1 - even) * s_.channels, 2, (s_.in_w + even) / 2, to + g_.x_odd + (q + 1 - even) / 2 * L, x_plane_,
             f);
  }
  // to: the first column of row 0 of the first plane.
  void pack_gradient(const T* grad, int64_t n, IndexRange range, A* to) const {
    const T* from = grad + offset(n, range.begin, s_.out_h, s_.out_w);
    if constexpr (kNhwc)
      for (int64_t i = range.begin; i < range.end; ++i, from += s_.out_w * s_.channels)
        pack_row(from, 1, s_.out_w, to + i * g_.pitch, plane_, [](V v) { return v; });
    else
      copy_rows(from, range.end - range.begin, s_.out_w, to + range.begin * g_.pitch, g_.pitch);
    if (range.end == s_.out_h && !cut_.resident)
      __builtin_memset(to + s_.out_h * g_.pitch, 0, size_t(below_ * g_.pitch) * sizeof(A));
  }

  // Every step-th pixel (NHWC), through f.
  template <typename F>
  void pack_row(const T* row, int64_t step, int64_t columns, A* to, int64_t distance, const F& f) const {
    const int64_t pixel = step * s_.channels;
    whole_planes([&](auto planes_at_once, int64_t first) {
      constexpr int P = decltype(planes_at_once)::value;
      const T* from = row + first * L;
      A* column = to + first * distance;
      for (int64_t w = 0; w < columns; ++w, from += pixel, column += L)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(column + p * distance, f(load(from + p * L)));
    });
    if (const int64_t rest = count_ % L) {
      const int64_t p = count_ / L;
      for (int64_t w = 0; w < columns; ++w)
        store(to + p * distance + w * L, f(load_part(row + p * L + w * pixel, rest)));
    }
  }

  // Rows of an image as they are (NCHW).
  static void copy_rows(const T* from, int64_t rows, int64_t columns, A* to, int64_t pitch) {
    for (int64_t h = 0; h < rows; ++h, from += columns, to += pitch) {
      int64_t k = 0;
      for (; k + 4 * L <= columns; k += 4 * L)
#pragma GCC unroll 4
        for (int e = 0; e < 4; ++e) store(to + k + e * L, load(from + k + e * L));
      for (; k + L <= columns; k += L) store(to + k, load(from + k));
      if (k < columns && columns >= L) k = columns - L, store(to + k, load(from + k)), k = columns;
      for (; k < columns; ++k) to[k] = widen(from[k]);
    }
  }

  // The even and the odd columns of padded rows (NCHW).
  void deinterleave(const T* row, int64_t rows, A* to) const {
    // The image's column w is column w + pad_left of the padded row.
    const int64_t q = s_.pad_left, width = s_.in_w, pitch = g_.x_pitch, pairs = width / 2;
    A *first = to + (q + 1) / 2, *second = to + g_.x_odd + q / 2;
    if (q % 2 == 1) std::swap(first, second);
    for (int64_t h = 0; h < rows; ++h, row += width, first += pitch, second += pitch) {
      auto vectors = [&](int64_t i) {
        const auto v = load_even_odd(row + 2 * i);
        store(first + i, v.even), store(second + i, v.odd);
      };
      int64_t i = 0;
      for (; i + 2 * L <= pairs; i += 2 * L) vectors(i), vectors(i + L);
      for (; i + L <= pairs; i += L) vectors(i);
      if (i < pairs && pairs >= L) vectors(pairs - L), i = pairs;
      for (; i < pairs; ++i) first[i] = widen(row[2 * i]), second[i] = widen(row[2 * i + 1]);
      if (width % 2 == 1) first[pairs] = widen(row[2 * pairs]);
    }
  }

  // A row of the planes, `distance` apart, to memory; each vector through f(v, plane, offset in the row, channels).
  template <typename F>
  DK_INLINE void unpack(const A* planes, int64_t distance, int64_t columns, T* row, const F& f) const {
    const int64_t pixel = s_.channels;
    whole_planes([&](auto planes_at_once, int64_t first) {
      constexpr int P = decltype(planes_at_once)::value;
      const A* from = planes + first * distance;
      T* to = row + first * L;
      for (int64_t w = 0; w < columns; ++w, from += L, to += pixel)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(to + p * L, f(load(from + p * distance), first + p, to + p * L - row, L));
    });
    if (const int64_t rest = count_ % L) {
      const int64_t p = count_ / L;
      for (int64_t w = 0; w < columns; ++w)
        store_part(row + p * L + w * pixel, f(load(planes + p * distance + w * L), p, p * L + w * pixel, rest), rest);
    }
  }
  // Gradients v of `channels` channels or columns of pre(x), as those of x.
  DK_INLINE V before_pre_activation(V v, const T* x, int64_t channels) const {
    return masked(v, channels == L ? load(x) : load_part(x, channels), pre_);
  }

  // Values of the even or the odd columns of a padded row of x (stride 2).
  int64_t both_size() const { return rounded_up((s_.pad_left + s_.in_w + 1) / 2 * kColumn, L); }

  Activation pre_ = Activation::kNone;  // of x
  A *x_planes_ = nullptr, *y_planes_ = nullptr, *grad_planes_ = nullptr;
  A *tile_ = nullptr, *zeros_ = nullptr, *both_ = nullptr, *further_ = nullptr;
  const int64_t further_size_;
  mutable RowWriter<T> writer_;  // NCHW
  Norm* norm_ = nullptr;
  Moments* moments_ = nullptr;
  Sums<2>* sums_ = nullptr;
  Sums<9>* weight_sums_ = nullptr;
  A tail_[L];       // 1 within a row's last vector, 0 beyond
  A lanes_[2 * L];  // the same of any other vector and of the last
};

}  // namespace
}  // namespace deeplab_kernels::cpu
