// The passes over packed rows of backward: with them a worker is whole. For the per-instruction-set files only:
// everything here has internal linkage.
#pragma once

#include "row_forward.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class Worker : public RowForward<T, kNhwc> {
  using Base = RowForward<T, kNhwc>;

 protected:
  using Base::plan_, Base::s_, Base::parts_, Base::out_pixel_, Base::count_, Base::lanes_, Base::active_,
      Base::activation_, Base::grad_window_, Base::forward_tables_, Base::transposed_tables_, Base::weights_,
      Base::scale_, Base::shift_, Base::mean_, Base::inv_std_, Base::y_, Base::kept_, Base::g_, Base::dots_, Base::dx_,
      Base::lanes, Base::taps_of, Base::dot_lanes, Base::lanes_or_one, Base::x_pixel, Base::out_offset, Base::in_offset,
      Base::select_image, Base::x_base, Base::keep_rows, Base::kept_row, Base::y_row;
  using typename Base::V;

 public:
  using Base::Base;
  using Base::L;
  using typename Base::A, typename Base::Needs;

  // Sums over the band of g and of g * xhat for each channel; g is the gradient behind the activation.
  void gradient_sums(const Task& task, const T* grad_out, const T* y, double* sum, double* dot) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) sum[l] = dot[l] = 0;
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = y ? nullptr : x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        if (!y) keep_rows(position, count, part, base);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = plan_.out_rows.rows[position + r], offset = out_offset(i, part);
          if (y) widened_row(y + offset, y_row(r));
          row_gradient_sums(!y && kept_ ? kept_row(i, part) : y_row(r), grad_row(grad_out + offset), part, sum + part,
                            dot + part);
        }
      }
      position += count;
    }
  }

  struct GradientPass {
    const T* grad_out;
    const T* y;
    bool with_norm;
    bool batch_statistics;  // mean and variance depend on x; otherwise y, which may be infinite, has no part in it
    const A* mean_grad;     // per lane: sum of g / count
    const A* mean_dot;      // per lane: sum of g * xhat / count
    T* grad_x;              // null: not wanted
    double* grad_weight;    // [taps][lanes], added to; null: not wanted
  };

  // Gradients of x and of the weights over a band of input rows (of output rows if only the weights' is wanted).
  void gradients(const Task& task, const GradientPass& pass) {
    select_image(task.image);
    grad_window_.clear();
    pass_ = pass;
    dot_updates_ = 0;
    if (pass.grad_weight) __builtin_memset(dots_, 0, s_.taps() * parts_ * dot_lanes() * sizeof(A));
    if (!pass.grad_x) {
      const IndexRange band = plan_.out_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end; ++position)
        fill_grad_slot(plan_.out_rows.rows[position], grad_window_.memory, true);
    } else {
      const IndexRange band = plan_.in_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end;) {
        // Rows of which every column or channel has to be put in its place come one at a time.
        const bool alone = s_.stride_w > 1 || s_.multiplier > 1;
        const int64_t count = alone ? 1 : smaller(plan_.in_rows.batches[position], band.end - position);
        grad_x_rows(position, count, band.begin);
        position += count;
      }
    }
    if (pass.grad_weight) flush_dots();
  }

 private:
  struct StoreGradX {
    const Worker& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, valid, row, w.s_.channels);
    }
  };

  // Phase of a strided gradient: results of one segment side by side (NCHW).
  struct KeepPhase {
    const Worker& w;
    A* row;
    int64_t begin;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t, const V (&acc)[B], int64_t) const {
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) store(row + at[b] - begin, acc[b]);
    }
  };

  // A row of the gradient: columns `pixel` apart (NHWC).
  struct GradRow {
    const A* data;
    int64_t pixel;
  };
  // In place where it needs no widening; otherwise valid until the next call.
  GradRow grad_row(const T* src) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!kNhwc || count_ == lanes_) return {reinterpret_cast<const A*>(src), out_pixel_};
    }
    return {widened_row(src, g_), lanes_};
  }
  const A* widened_row(const T* src, A* memory) const {
    if constexpr (kNhwc) {
      for (int64_t j = 0; j < s_.out_w; ++j) copy_widened(src + j * s_.out_channels(), memory + j * lanes_, count_);
    } else {
      copy_widened(src, memory, s_.out_w);
    }
    return memory;
  }

  void row_gradient_sums(const A* y_row, const GradRow& g, int64_t part, double* sum, double* dot) const {
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        V sums = {}, dots = {};
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_row + j * lanes_ + l);
          const V grad = masked(load(g.data + j * g.pixel + l), V(y * scale + shift), activation_);
          sums += grad, dots += grad * ((y - mean) * inv);
        }
        for (int64_t e = 0; e < L; ++e) sum[l + e] += sums[e], dot[l + e] += dots[e];
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const int64_t whole = s_.out_w / L * L;
      V sums = {}, dots = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_row + j);
        const V grad = masked(load(g.data + j), V(y * scale + shift), activation_);
        sums += grad, dots += grad * ((y - mean) * inv);
      }
      A sum_row = sum_of_lanes<A>(sums), dot_row = sum_of_lanes<A>(dots);
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g.data[j], y_row[j] * scale + shift, activation_);
        sum_row += grad, dot_row += grad * ((y_row[j] - mean) * inv);
      }
      *sum += sum_row, *dot += dot_row;
    }
  }

  // conv(x) of a row: from y if the forward pass stored it, from the first pass if that kept it, otherwise from x.
  const A* convolution_row(int64_t i, int64_t part, const A* base, const T* y) {
    if (y) return widened_row(y + out_offset(i, part), y_);
    if (kept_) return kept_row(i, part);
    this->template convolve<false>(i, 1, 0, part, base, typename Base::Keep{*this, y_});
    return y_;
  }

  // Gradient of conv(x) from the gradient of the activation's output, for row i of one part.
  void fill_grad_row(int64_t i, int64_t part, const A* base, A* dst) {
    const T* src = pass_.grad_out + out_offset(i, part);
    if (!pass_.with_norm) {
      widened_row(src, dst);
      return;
    }
    const A* y_row = convolution_row(i, part, base, pass_.y);
    const GradRow g = grad_row(src);
    const bool batch = pass_.batch_statistics;
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        const V mean_grad = load(pass_.mean_grad + l), mean_dot = load(pass_.mean_dot + l);
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_row + j * lanes_ + l);
          const V grad = masked(load(g.data + j * g.pixel + l), V(y * scale + shift), activation_);
          store(dst + j * lanes_ + l, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
        }
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const A mean_grad = pass_.mean_grad[part], mean_dot = pass_.mean_dot[part];
      const int64_t whole = s_.out_w / L * L;
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_row + j);
        const V grad = masked(load(g.data + j), V(y * scale + shift), activation_);
        store(dst + j, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
      }
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g.data[j], y_row[j] * scale + shift, activation_);
        dst[j] = scale * (batch ? grad - mean_grad - (y_row[j] - mean) * inv * mean_dot : grad);
      }
    }
  }

  // Row i of every part into the slot, and, where this band owns the row, its share of the weights' gradient.
  void fill_grad_slot(int64_t i, A* slot, bool owned) {
    const bool dots = pass_.grad_weight && owned;
    const A* base = dots || (pass_.with_norm && !pass_.y && !kept_) ? x_base(i) : nullptr;
    for (int64_t part = 0; part < parts_; ++part) {
      A* row = slot + part * (grad_window_.pitch / parts_);
      if constexpr (!kNhwc) row -= plan_.grad_row.origin;
      fill_grad_row(i, part, base, row);
      if (dots) row_dots(i, part, base, row);
    }
    if (!dots) return;
    dot_updates_ += kNhwc ? s_.out_w : s_.out_w / L + 1;
    if (dot_updates_ > 512) flush_dots();  // float sums stay short
  }

  void row_dots(int64_t i, int64_t part, const A* base, const A* grad) {
    A* sums = dots_ + part * s_.taps() * dot_lanes();
    for (int64_t n = 0; n < plan_.forward.count; ++n) {
      const Segment& segment = plan_.forward.segments[n];
      const Taps taps = taps_of(forward_tables_, plan_.forward, n, plan_.forward_rows.rows[i]);
      const A* g = grad + segment.begin * lanes_or_one();
      for (int64_t t = 0; t < taps.count; t += kMostDots)
        dots(segment, {taps.offset + t, taps.weight + t, smaller(kMostDots, taps.count - t)}, base, g, sums);
    }
  }

  void dots(const Segment& segment, const Taps& taps, const A* base, const A* grad, A* row_sums) const {
    const A* inputs[kMostDots];
    A* sums[kMostDots];
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        for (int64_t t = 0; t < taps.count; ++t)
          inputs[t] = base + taps.offset[t] + l, sums[t] = row_sums + taps.weight[t] + l;
        dispatch_dots(taps.count, inputs, grad + l, segment.count, plan_.forward.input_step * x_pixel(), lanes_, sums);
      }
    } else {
      for (int64_t t = 0; t < taps.count; ++t)
        inputs[t] = base + taps.offset[t], sums[t] = row_sums + taps.weight[t] * L;
      // A padded segment is the whole row, and the gradient's row is zero beyond its end.
      const int64_t whole = plan_.forward.padded ? (segment.count + L - 1) / L : segment.count / L;
      dispatch_dots(taps.count, inputs, grad, whole, L, L, sums);
      for (int64_t k = whole * L; k < segment.count; ++k)
        for (int64_t t = 0; t < taps.count; ++t) sums[t][0] += grad[k] * inputs[t][k];
    }
  }

  void dispatch_dots(int64_t n, const A* const* inputs, const A* grad, int64_t count, int64_t in_step,
                     int64_t grad_step, A* const* sums) const {
    switch (n) {
      case 1:
        return dot_products<A, 1>(inputs, grad, count, in_step, grad_step, sums);
      case 2:
        return dot_products<A, 2>(inputs, grad, count, in_step, grad_step, sums);
      case 3:
        return dot_products<A, 3>(inputs, grad, count, in_step, grad_step, sums);
      case 4:
        return dot_products<A, 4>(inputs, grad, count, in_step, grad_step, sums);
      case 5:
        return dot_products<A, 5>(inputs, grad, count, in_step, grad_step, sums);
      case 6:
        return dot_products<A, 6>(inputs, grad, count, in_step, grad_step, sums);
      case 7:
        return dot_products<A, 7>(inputs, grad, count, in_step, grad_step, sums);
      case 8:
        return dot_products<A, 8>(inputs, grad, count, in_step, grad_step, sums);
      case 9:
        return dot_products<A, 9>(inputs, grad, count, in_step, grad_step, sums);
    }
  }

  void flush_dots() {
    const int64_t taps = s_.taps();
    for (int64_t part = 0; part < parts_; ++part)
      for (int64_t t = 0; t < taps; ++t) {
        A* sums = dots_ + (part * taps + t) * dot_lanes();
        if constexpr (kNhwc) {
          for (int64_t l = 0; l < lanes_; ++l) pass_.grad_weight[t * lanes_ + l] += sums[l], sums[l] = 0;
        } else {
          double total = 0;
          for (int64_t l = 0; l < L; ++l) total += sums[l], sums[l] = 0;
          pass_.grad_weight[t * parts_ + part] += total;
        }
      }
    dot_updates_ = 0;
  }

  void grad_x_rows(int64_t position, int64_t count, int64_t band_begin) {
    const int64_t h = plan_.in_rows.rows[position];
    const ResultRow& row = plan_.transposed_rows.rows[h];
    const ResultRow& last = plan_.transposed_rows.rows[plan_.in_rows.rows[position + count - 1]];
    if (row.first < row.last)
      grad_window_.require(row.keep, last.high, last.high,
                           [&](int64_t i, A* slot) { fill_grad_slot(i, slot, owns(i, band_begin)); });
    const int64_t advance =
        count == 1 ? 0 : (last.source - row.source) / (count - 1) / grad_window_.step * grad_window_.pitch;
    const typename Base::Batch batch{count, advance, plan_.in_rows.step * s_.in_w};
    const A* base = grad_window_.at(row.source);
    const Columns& columns = plan_.transposed;
    T* out = pass_.grad_x + in_offset(h);
    for (int64_t n = 0; n < columns.count; ++n) {
      const Segment& segment = columns.segments[n];
      const Taps taps = taps_of(transposed_tables_, columns, n, row);
      if constexpr (kNhwc) {
        if (s_.multiplier == 1)
          this->template run<false>(segment, taps, weights_, base, lanes_or_one(), batch, StoreGradX{*this, out});
        else
          this->template run<true>(segment, taps, weights_, base, lanes_or_one(), batch,
                                   typename Base::Keep{*this, dx_});
      } else if (segment.step == 1) {
        this->template run<false>(segment, taps, weights_, base, lanes_or_one(), batch, StoreGradX{*this, out});
      } else {
        this->template run<true>(segment, taps, weights_, base, lanes_or_one(), batch,
                                 KeepPhase{*this, dx_, segment.begin});
        for (int64_t k = 0; k < segment.count; ++k) narrow(dx_[k], out + segment.begin + segment.step * k);
      }
    }
    if constexpr (kNhwc)
      if (s_.multiplier > 1) sum_multiples(out);
  }

  // The outputs of one input channel lie side by side: their gradients add up.
  void sum_multiples(T* out) const {
    const int64_t m = s_.multiplier;
    for (int64_t w = 0; w < s_.in_w; ++w)
      for (int64_t c = 0; c < count_ / m; ++c) {
        A sum = 0;
        for (int64_t q = 0; q < m; ++q) sum += dx_[w * lanes_ + c * m + q];
        narrow(sum, out + w * s_.channels + c);
      }
  }

  // An output row counts for the band that holds the first input row it touches.
  bool owns(int64_t i, int64_t band_begin) const {
    const ResultRow& row = plan_.forward_rows.rows[i];
    return row.first < row.last &&
           plan_.in_row_position[row.source + row.first * plan_.forward_rows.source_step] >= band_begin;
  }

  GradientPass pass_{};
  int64_t dot_updates_ = 0;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
