// The 3x3 atrous depthwise convolution of stride 1 or 2 and its training passes, by planes in a core's caches. For the
// per-instruction-set files only: everything here has internal linkage.
//
// A task is one channel (NCHW) or a few vectors of channels (NHWC): x and the gradient are packed into planes with
// zeros around them, and every further pass reads and writes planes. Both layouts share the passes: an NCHW plane holds
// columns of one channel, an NHWC plane columns of one vector of channels, and either way a vector's taps lie at
// constant distances. Up to kRows rows of results a rate apart are computed together, because they share what they
// read: 4.5 loads a result instead of 9.
//
// Training needs two passes over a channel, with a sum over the batch between them. Where the planes of the whole batch
// fit (resident), memory is touched once: forward x and out, backward x, grad_out and grad_x. Elsewhere both passes go
// band by band: what the second needs is packed and computed again.
#pragma once

#include "plane_strided.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class Planes : public PlaneStrided<T, kNhwc> {
  using Base = PlaneStrided<T, kNhwc>;

 protected:
  using Base::L, Base::kChannels, Base::kRows, Base::s_, Base::g_, Base::cut_, Base::size_, Base::plane_, Base::x_size_,
      Base::x_plane_, Base::margins_, Base::first_, Base::count_, Base::active_, Base::band, Base::inputs_of,
      Base::outputs_of, Base::divided_up, Base::x_held, Base::select, Base::pieces, Base::piece, Base::fresh_inputs,
      Base::finished, Base::pre_, Base::x_planes_, Base::y_planes_, Base::grad_planes_, Base::norm_, Base::sums_,
      Base::weight_sums_, Base::at_row_0, Base::pack_x, Base::pack_gradient, Base::fetch_for_sums,
      Base::fetch_for_gradients, Base::load_weights, Base::prepare_norm, Base::tiles, Base::row_bytes, Base::within,
      Base::tail_at, Base::gradient_of_strided_x;
  using typename Base::V, typename Base::Norm;

 public:
  using typename Base::A, typename Base::Pass, typename Base::Cut;

  Planes(const DepthwiseShape& shape, Pass pass, const Cut& cut, int64_t further = 0)
      : Base(shape, pass, cut, further) {}

  // norm null: gradients of the convolution alone.
  void backward(int64_t task, const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    select(task);
    pre_ = z.pre_activation;
    begin_gradients(norm);
    if (cut_.resident)
      backward_resident(z, norm, batch_statistics);
    else
      backward_by_bands(z, norm, batch_statistics);
    if (z.grad_weight)
      for (int64_t p = 0; p < active_; ++p) write_grad_weight(p, z.grad_weight);
  }

 protected:
  void begin_gradients(const BatchNorm<A>* norm) {
    for (int64_t p = 0; p < active_; ++p) {
      sums_[p] = LaneSums<A, kNhwc, 2>(), weight_sums_[p] = LaneSums<A, kNhwc, 9>();
      if (norm)
        prepare_norm(*norm, p, norm->mean, norm->var);
      else
        norm_[p].scale = V{} + 1;
    }
  }

  void backward_resident(const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    resident_gradients(
        z, norm, batch_statistics, [&](int64_t n, int64_t i) { pack_x(z.x, n, fresh_inputs(i)); },
        [&](int64_t n, int64_t i) {
          if (z.grad_x) gradient_of_x(z, n, finished(i), grad_planes_ + n * size_);
        });
  }

  // The gradients of conv(x), into their planes, and the sums that they make with x. before(n, i) packs what piece i of
  // image n reads of x; after(n, i) can use the gradients up to that piece.
  template <typename Before, typename After>
  void resident_gradients(const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics,
                          const Before& before, const After& after) {
    for (int64_t p = 0; p < active_; ++p) {
      const A* x = x_planes_ + p * x_plane_;
      A* grad = grad_planes_ + p * plane_ + g_.grad_begin;
      if (norm) load_weights(z.weight, p);
      for (int64_t n = 0; n < s_.batch; ++n)
        for (int64_t i = 0; i < pieces(); ++i) {
          if (p == 0) {
            before(n, i);
            pack_gradient(z.grad_out, n, piece(i), grad_planes_ + n * size_ + g_.grad_begin);
            fetch_for_sums(z, n, i);
          }
          if (norm)
            gradient_sums(norm->activation, x + n * x_size_, piece(i), y_planes_ + n * size_, grad + n * size_, p);
        }
      if (norm) finish_sums(p, batch_statistics, z);
      for (int64_t n = 0; n < s_.batch; ++n)
        for (int64_t i = 0; i < pieces(); ++i) {
          if (p == 0) fetch_for_gradients(z, n, i);
          gradient_of_convolution(norm && batch_statistics, x + n * x_size_, piece(i), y_planes_ + n * size_,
                                  grad + n * size_, p);
          if (p + 1 == active_) after(n, i);
        }
    }
  }

  void backward_by_bands(const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    if (norm) {
      for (int64_t n = 0; n < s_.batch; ++n)
        for (int64_t b = 0; b < cut_.bands; ++b) masked_gradient(z, *norm, n, band(b, s_.out_h));
      for (int64_t p = 0; p < active_; ++p) finish_sums(p, batch_statistics, z);
    }
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t b = 0; b < cut_.bands; ++b) {
        const IndexRange rows = band(b, s_.in_h), touched = outputs_of(rows);
        // Each row's products with x are summed in one band.
        const IndexRange owned{b == 0 ? touched.begin : owner_begins(rows.begin),
                               b + 1 == cut_.bands ? touched.end : owner_begins(rows.end)};
        const A* x = pack_x(z.x, n, inputs_of(touched));
        A* y = at_row_0(y_planes_, n, touched);
        A* grad = at_row_0(grad_planes_, n, touched);
        pack_gradient(z.grad_out, n, touched, grad + g_.grad_begin);
        for (int64_t p = 0; p < active_; ++p) {
          A* g = grad + p * plane_ + g_.grad_begin;
          if (norm) {
            load_weights(z.weight, p);
            const LaneSums<A, kNhwc, 2> sums = sums_[p];  // these rows have been counted
            gradient_sums(norm->activation, x + p * x_plane_, touched, y, g, p);
            sums_[p] = sums;
          }
          const bool batch = norm && batch_statistics;
          const LaneSums<A, kNhwc, 9> others = weight_sums_[p];  // rows of neighbouring bands are summed there
          gradient_of_convolution(batch, x + p * x_plane_, {touched.begin, owned.begin}, y, g, p);
          gradient_of_convolution(batch, x + p * x_plane_, {owned.end, touched.end}, y, g, p);
          weight_sums_[p] = others;
          gradient_of_convolution(batch, x + p * x_plane_, owned, y, g, p);
        }
        if (z.grad_x) gradient_of_x(z, n, rows, grad);
      }
  }
  int64_t owner_begins(int64_t row) const {
    return smaller(larger(divided_up(row + s_.pad_top - s_.rate_h), 0), s_.out_h);
  }

  void masked_gradient(const BackwardTensors<T>& z, const BatchNorm<A>& norm, int64_t n, IndexRange rows) {
    const A* x = pack_x(z.x, n, inputs_of(rows));
    A* grad = at_row_0(grad_planes_, n, rows) + g_.grad_begin;
    pack_gradient(z.grad_out, n, rows, grad);
    for (int64_t p = 0; p < active_; ++p) {
      load_weights(z.weight, p);
      gradient_sums(norm.activation, x + p * x_plane_, rows, at_row_0(y_planes_, n, rows), grad + p * plane_, p);
    }
  }

  // y = conv(x); grad becomes the gradient g before the activation. Its sums are the gradients of gamma and beta.
  void gradient_sums(Activation activation, const A* x, IndexRange rows, A* y, A* grad, int64_t p) {
    with_activation(activation, [&](auto known) { gradient_sums<decltype(known)::value>(x, rows, y, grad, p); });
  }
  template <Activation kActivation>
  void gradient_sums(const A* x, IndexRange rows, A* y, A* grad, int64_t p) {
    const int64_t last = (g_.out_vectors - 1) * L;
    const Norm norm = norm_[p];
    LaneSums<A, kNhwc, 2>& sums = sums_[p];
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, IndexRange columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* y_row = y + row * g_.pitch;
      A* grad_row = grad + row * g_.pitch;
      const TileRows result_rows(row_bytes(g_.pitch));
      const int64_t tile = R * g_.pitch;
      V sum = sums.now[0], dot = sums.now[1];
      this->template convolve_x<R>(x, row, count, columns, last, [&](int64_t i, int64_t k, V(&acc)[R]) {
        const V tail = tail_at(k, last);
        A *first_y = y_row + (i * tile + k), *first_grad = grad_row + (i * tile + k);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A* g = result_rows.at(first_grad, r);
          const V masked_grad = masked(load(g), V(acc[r] * norm.scale + norm.shift), kActivation);
          V d = acc[r] - norm.mean;
          if constexpr (!kNhwc) d = within(d, tail);
          store(result_rows.at(first_y, r), acc[r]), store(g, masked_grad);
          sum += masked_grad, dot += masked_grad * d;
        }
      });
      sums.now[0] = sum, sums.now[1] = dot, sums.added(R * count * (columns.end - columns.begin));
    });
  }

  void finish_sums(int64_t p, bool batch_statistics, const BackwardTensors<T>& z) {
    LaneSums<A, kNhwc, 2>& sums = sums_[p];
    Norm& norm = norm_[p];
    sums.finish();
    const double count = double(s_.batch) * double(s_.out_h) * double(s_.out_w);
    for (int64_t l = 0; l < L; ++l) {
      const double dot = sums.lane[1][l] * double(norm.inv_std[l]);
      norm.mean_grad[l] = batch_statistics ? A(sums.lane[0][l] / count) : A(0);
      norm.mean_dot[l] = batch_statistics ? A(dot / count) : A(0);
      const int64_t c = p * kChannels + l;
      if (l < kChannels && c < count_) z.grad_beta[first_ + c] = A(sums.lane[0][l]), z.grad_gamma[first_ + c] = A(dot);
    }
  }

  // grad becomes the gradient of conv(x): scale * (g - mean_grad - xhat * mean_dot) with batch statistics, scale * g
  // without. Its products with x join the sums of the weights' gradient.
  void gradient_of_convolution(bool batch_statistics, const A* x, IndexRange rows, const A* y, A* grad, int64_t p) {
    if (batch_statistics)
      gradient_of_convolution<true>(x, rows, y, grad, p);
    else
      gradient_of_convolution<false>(x, rows, y, grad, p);
  }
  template <bool kBatch>
  void gradient_of_convolution(const A* x, IndexRange rows, const A* y, A* grad, int64_t p) {
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, IndexRange columns) {
      constexpr int R = decltype(rows_at_once)::value;
      if (s_.stride_h == 1)
        gradient_tile<kBatch, R, 1>(x, row, count, y, grad, columns, p);
      else
        gradient_tile<kBatch, R, 2>(x, row, count, y, grad, columns, p);
    });
  }

  template <bool kBatch, int R, int kStride>
  DK_INLINE void gradient_tile(const A* x, int64_t row, int64_t count, const A* y, A* grad, IndexRange columns,
                               int64_t p) {
    const int64_t pitch = kStride == 1 ? g_.pitch : g_.x_pitch;
    const Sources<A> from = this->template sources<R, kStride>(x, pitch, kStride * row - s_.pad_top, x_held());
    y += row * g_.pitch, grad += row * g_.pitch;
    if ((R == kRows || margins_) && whole<R, kStride>(from))
      return gradient_tile<kBatch, R, kStride, Present::kAll>(from, pitch, count, y, grad, columns, p);
    if constexpr (kStride == 1)
      if (alone<R>(from))
        return gradient_tile<kBatch, R, kStride, Present::kOwn>(from, pitch, count, y, grad, columns, p);
    gradient_tile<kBatch, R, kStride, Present::kSome>(from, pitch, count, y, grad, columns, p);
  }
  template <bool kBatch, int R, int kStride, Present kPresent>
  DK_INLINE void gradient_tile(const Sources<A>& from, int64_t pitch, int64_t count, const A* y_row, A* grad_row,
                               IndexRange columns, int64_t p) {
    const TileRows x_rows(row_bytes(pitch)), result_rows(row_bytes(g_.pitch));
    const int64_t last = (g_.out_vectors - 1) * L;
    const int64_t step = R * kStride * pitch, result_step = R * g_.pitch, width = s_.out_w;
    const A* taps[3] = {from.data + g_.taps[0], from.data + g_.taps[1], from.data + g_.taps[2]};
    const Norm& norm = norm_[p];
    const V scale = norm.scale, mean = norm.mean;
    const V slope = -norm.scale * norm.inv_std * norm.mean_dot, constant = -norm.scale * norm.mean_grad;
    V sum[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) sum[t] = weight_sums_[p].now[t];
    const auto fetch = this->template next_fetch<R, kStride>(count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t before = i * width;
      for (int64_t k = columns.begin * L; k < columns.end * L; k += L) {
        fetch(before + k);
        const V tail = tail_at(k, last);
        V g[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A* to = result_rows.at(grad_row + k, r);
          g[r] = load(to) * scale;
          if constexpr (kBatch) {
            g[r] += (load(result_rows.at(y_row + k, r)) - mean) * slope + constant;
            if constexpr (!kNhwc) g[r] = within(g[r], tail);
          }
          store(to, g[r]);
        }
        products<R, kStride, kPresent>(from, x_rows, k, taps, [&](V input, int t, int r) { sum[t] += g[r] * input; });
      }
      for (const A*& tap : taps) tap += step;
      y_row += result_step, grad_row += result_step;
    }
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight_sums_[p].now[t] = sum[t];
    weight_sums_[p].added(R * count * (columns.end - columns.begin));
  }

  void write_grad_weight(int64_t p, T* grad_weight) const {
    weight_sums_[p].finish();
    for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l)
      for (int t = 0; t < 9; ++t)
        narrow(A(weight_sums_[p].lane[t][l]), grad_weight + (first_ + p * kChannels + l) * 9 + t);
  }

  // grad: row 0 of the first gradient plane.
  void gradient_of_x(const BackwardTensors<T>& z, int64_t n, IndexRange rows, const A* grad) {
    grad += g_.grad_begin - g_.grad_left;
    if (s_.stride_h == 1)
      this->template to_memory<false, true>(grad, n, rows, z.weight, Activation::kNone, z.grad_x,
                                            pre_ == Activation::kNone ? nullptr : z.x);
    else
      gradient_of_strided_x(z, n, rows, grad);
  }
};

}  // namespace
}  // namespace deeplab_kernels::cpu
