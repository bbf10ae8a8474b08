// The gradient of x at stride 2. For the per-instruction-set files only.
#pragma once

#include "plane_forward.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class PlaneStrided : public PlaneForward<T, kNhwc> {
  using Base = PlaneForward<T, kNhwc>;

 protected:
  using Base::Base;
  using Base::L, Base::kColumn, Base::kRows, Base::s_, Base::g_, Base::plane_, Base::margins_, Base::count_,
      Base::active_, Base::offset, Base::pre_, Base::zeros_, Base::writer_, Base::collected, Base::both_,
      Base::whole_planes, Base::before_pre_activation, Base::both_size, Base::weights_, Base::load_weights;
  using typename Base::A, typename Base::V;

  // Stride 2, odd rates. Padded row a of x met kernel rows 0 and 2 of the result rows a / 2 and a / 2 - rate if a is
  // even, kernel row 1 of (a - rate) / 2 if it is odd; the same holds for columns. At rate 1 an even row and the odd
  // one below share what they read (NCHW).
  void gradient_of_strided_x(const BackwardTensors<T>& z, int64_t n, IndexRange rows, const A* grad) {
    auto result_row = [&](int64_t p, int64_t i) {
      return i < 0 || i >= s_.out_h ? zeros_ : grad + p * plane_ + i * g_.pitch;
    };
    if constexpr (kNhwc)
      strided_pixels(z, n, rows, result_row);
    else
      strided_rows(z, n, rows, result_row);
  }

  template <typename ResultRow>
  void strided_pixels(const BackwardTensors<T>& z, int64_t n, IndexRange rows, const ResultRow& result_row) {
    const int64_t size = both_size();
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      const int64_t a = h + s_.pad_top;
      T* to = z.grad_x + offset(n, h, s_.in_h, s_.in_w);
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1 || h == rows.begin) load_weights(z.weight, p);
        A* both = both_ + 2 * p * size;
        if (a % 2 == 0)
          strided_row<Parity::kEven>(result_row(p, a / 2), result_row(p, a / 2 - s_.rate_h), both);
        else
          strided_row<Parity::kOdd>(result_row(p, (a - s_.rate_h) / 2), zeros_, both);
      }
      write_both(to, z.x + (to - z.grad_x));
    }
  }

  template <typename ResultRow>
  void strided_rows(const BackwardTensors<T>& z, int64_t n, IndexRange rows, const ResultRow& result_row) {
    load_weights(z.weight, 0);
    const bool collect = collected(s_.in_w, 2 * L + s_.pad_left % 2);
    if (collect) writer_.begin(z.grad_x + offset(n, rows.begin, s_.in_h, s_.in_w));
    for (int64_t h = rows.begin, count = 0; h < rows.end; h += count) {  // count: rows of x
      const int64_t a = h + s_.pad_top, at = offset(n, h, s_.in_h, s_.in_w);
      T* results = collect ? writer_.room() : z.grad_x + at;
      const T* x = z.x + at;
      count = 1;
      if (a % 2 == 1) {
        strided_rows_to_memory<Parity::kOdd>(result_row(0, (a - s_.rate_h) / 2), zeros_, 1, results, x);
      } else {
        const int64_t i = a / 2;
        const A *near = result_row(0, i), *far = result_row(0, i - s_.rate_h);
        if (margins_ && h + 1 < rows.end) {
          const bool inside = i >= s_.rate_h && i < s_.out_h && !collect;
          const int64_t pairs = inside ? smaller((rows.end - h) / 2, s_.out_h - i) : 1;
          strided_rows_to_memory<Parity::kPair>(near, far, pairs, results, x), count = 2 * pairs;
        } else {
          strided_rows_to_memory<Parity::kEven>(near, far, 1, results, x);
        }
      }
      if (collect) writer_.add(count * s_.in_w);
    }
    if (collect) writer_.end();
  }
  enum class Parity { kEven, kOdd, kPair };

  // Of a padded row, or of an even one and the odd one below it: even columns 2k, 2k + 2, ... and odd columns 2k + 1,
  // ... Result column j lies at left + j.
  template <Parity kParity>
  struct Strided {
    static constexpr int kRows = kParity == Parity::kPair ? 2 : 1;
    V even[kRows], odd[kRows];
  };
  template <Parity kParity>
  DK_INLINE Strided<kParity> strided_at(const A* near, const A* far, int64_t k) const {
    const int64_t left = g_.grad_left, half = kParity == Parity::kPair ? 0 : s_.rate_w / 2 * kColumn;
    const V before = load(near + k), after = load(near + k + left), between = load(near + k + left - half);
    Strided<kParity> result;
    if constexpr (kParity != Parity::kOdd) {
      const V far_before = load(far + k), far_after = load(far + k + left), far_between = load(far + k + left - half);
      result.even[0] = weights_[0] * after + weights_[2] * before + weights_[6] * far_after + weights_[8] * far_before;
      result.odd[0] = weights_[1] * between + weights_[7] * far_between;
    }
    if constexpr (kParity != Parity::kEven) {
      constexpr int r = Strided<kParity>::kRows - 1;
      result.even[r] = weights_[3] * after + weights_[5] * before;
      result.odd[r] = weights_[4] * between;
    }
    return result;
  }
  // NCHW: `count` times such rows. Rows of less than two vectors go to memory of the writer: they are written whole
  // vectors at a time.
  template <Parity kParity>
  DK_INLINE void strided_rows_to_memory(const A* near, const A* far, int64_t count, T* to, const T* x) const {
    if (pre_ == Activation::kNone)
      strided_rows_to_memory<kParity>(near, far, count, to, [](auto v, auto...) { return v; });
    else
      strided_rows_to_memory<kParity>(near, far, count, to, [&](auto v, int64_t k, int64_t values) {
        if constexpr (sizeof(v) == sizeof(A))
          return masked(v, A(widen(x[k])), this->pre_);
        else
          return this->before_pre_activation(v, x + k, values);
      });
  }
  template <Parity kParity, typename F>
  void strided_rows_to_memory(const A* near, const A* far, int64_t count, T* to, const F& f) const {
    constexpr int kRows = Strided<kParity>::kRows;
    const int64_t q = s_.pad_left, width = s_.in_w, pitch = g_.pitch;
    for (int64_t row = 0; count > 0; --count, row += kRows * width, near += pitch, far += pitch) {
      auto vectors = [&](int64_t w, int64_t first, int64_t second) {  // w: an even padded column
        const auto v = strided_at<kParity>(near, far, (w + q) / 2);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) {
          const int64_t k = row + r * width + w;
          store(to + k, f(interleaved<0>(v.even[r], v.odd[r]), k, first));
          store(to + k + L, f(interleaved<1>(v.even[r], v.odd[r]), k + L, second));
        }
      };
      auto column = [&](int64_t w) {
        const auto v = strided_at<kParity>(near, far, (w + q) / 2);
        for (int r = 0; r < kRows; ++r) {
          const int64_t k = row + r * width + w;
          narrow(f((w + q) % 2 == 0 ? v.even[r][0] : v.odd[r][0], k, 1), to + k);
        }
      };
      int64_t w = q % 2;
      if (width - w < 2 * L) {  // in the writer's memory
        vectors(w, smaller(L, width - w), larger(0, width - w - L));
      } else {
        for (; w + 2 * L <= width; w += 2 * L) vectors(w, L, L);
        if (w + 1 < width) w = width - (width - q) % 2, vectors(w - 2 * L, L, L);
        if (w < width) column(w);
      }
      if (q % 2 == 1) column(0);  // the vectors of the row above may have reached it
    }
  }
  // Even columns of a padded row, then the odd ones.
  template <Parity kParity>
  DK_INLINE void strided_row(const A* near, const A* far, A* both) const {
    const int64_t size = both_size();
    for (int64_t k = 0; k < size; k += L) {
      const auto v = strided_at<kParity>(near, far, k);
      store(both + k, v.even[0]), store(both + size + k, v.odd[0]);
    }
  }

  // Even and odd columns of the planes' padded row into the image's, masked by the row of x.
  void write_both(T* to, const T* x) const {
    const int64_t size = both_size(), q = s_.pad_left, pixel = s_.channels;
    whole_planes([&](auto planes_at_once, int64_t first) {
      constexpr int P = decltype(planes_at_once)::value;
      int64_t k = first * L;
      for (int64_t w = 0; w < s_.in_w; ++w, k += pixel) {
        const A* from = both_ + (2 * first + (w + q) % 2) * size + (w + q) / 2 * L;
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(to + k + p * L, masked_row(load(from + 2 * p * size), x, k + p * L, L));
      }
    });
    if (const int64_t rest = count_ % L) {
      const int64_t p = count_ / L;
      for (int64_t w = 0, k = p * L; w < s_.in_w; ++w, k += pixel)
        store_part(to + k, masked_row(load(both_ + (2 * p + (w + q) % 2) * size + (w + q) / 2 * L), x, k, rest), rest);
    }
  }
  DK_INLINE V masked_row(V v, const T* x, int64_t k, int64_t channels) const {
    return pre_ == Activation::kNone ? v : before_pre_activation(v, x + k, channels);
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
