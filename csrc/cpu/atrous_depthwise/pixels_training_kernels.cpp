// Training of the 3x3 atrous depthwise convolution on NHWC images, row by row.
//
// Rows of a chunk of channels are packed into rings of three rows in a core's second-level cache, in runs of memory as
// long as a pixel's share of the chunk. Forward: conv(x) for the statistics, kept in the output's memory and normalised
// there; bfloat16 would round it and computes it again. Backward: conv(x) for the gradients of the normalisation; then
// row by row the gradient of conv(x), in whose registers the gradient of the weights is summed, and from a ring of
// these rows the gradient of x. Rows that read the same rows follow each other.
#include "pixel_pieces.h"
#include "pixels_isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T>
class TrainingPixels : private PixelRows<acc_t<T>> {
  using A = acc_t<T>;
  using Base = PixelRows<A>;
  using Base::along, Base::channels_, Base::forward_, Base::L, Base::pixel_, Base::s_, Base::transposed_;
  using Cut = PixelCut<T>;
  using typename Base::Lines, typename Base::Sums, typename Base::V;

 public:
  // Whether the output's memory holds conv(x) between the passes: it has room for its precision.
  static constexpr bool kKeeps = sizeof(T) == sizeof(A);

  static bool serve(const DepthwiseShape& s) {
    return Pixels<T>::serve(s) && s.stride_h <= 2 && s.stride_w <= 2 && s.batch * s.out_h * s.out_w > 0;
  }

  // out = act(bn(conv(pre(x)))) with the batch's statistics, which it returns too.
  static void training(const DepthwiseShape& s, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, A* mean,
                       A* var, Activation pre, const Parallel& parallel) {
    const Cut cut(s, s.out_h);
    const int64_t lanes = cut.most * L;
    const Workspace partials(size_t(cut.pieces() * 2 * lanes) * sizeof(double));
    auto partial = [&](int64_t piece) { return partials.as<double>() + piece * 2 * lanes; };
    auto first = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, cut, x, weight, pre);
      pixels.streams_ = streams(out, s);
      for (int64_t p = begin; p < end; ++p) pixels.statistics(p, partial(p), partial(p) + lanes, out);
      if (pixels.streams_) finish_streams();
    };
    auto join = [&](int64_t chunk) {
      cut.each_lane(chunk, [&](int64_t lane, int64_t c) {
        double seen = 0, centre = 0, m2 = 0;
        for (int64_t p = chunk * cut.pieces_of_chunk(); p < (chunk + 1) * cut.pieces_of_chunk(); ++p) {
          const double n = double(cut.piece(p).rows()) * double(s.out_w);
          join_moments(seen, n, partial(p)[lane], partial(p)[lanes + lane], centre, m2);
          seen += n;
        }
        mean[c] = A(centre), var[c] = A(m2 / seen);
      });
    };
    auto second = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, cut, x, weight, pre);
      pixels.streams_ = !kKeeps && streams(out, s);
      for (int64_t p = begin; p < end; ++p) pixels.outputs(p, norm, mean, var, out);
      if (pixels.streams_) finish_streams();
    };
    run_pieces(cut, cut, parallel, first, join, second, [](int64_t) {});
  }

  // norm null: gradients of the convolution alone.
  static void backward(const DepthwiseShape& s, const BackwardTensors<T>& z, const BatchNorm<A>* norm,
                       bool batch_statistics, const Parallel& parallel) {
    const Cut sum_cut(s, norm ? s.out_h : 0), cut(s, z.grad_x || z.grad_weight ? s.in_h : 0);
    const int64_t lanes = cut.most * L;
    const Workspace sum_partials(size_t(sum_cut.pieces() * 2 * lanes) * sizeof(double) + 64);
    const Workspace partials(size_t(z.grad_weight ? cut.pieces() * 9 * lanes : 0) * sizeof(double) + 64);
    const Workspace means(size_t(2 * s.channels) * sizeof(A));
    A *mean_grad = means.as<A>(), *mean_dot = mean_grad + s.channels;
    auto sum_partial = [&](int64_t piece) { return sum_partials.as<double>() + piece * 2 * lanes; };
    auto partial = [&](int64_t piece) { return z.grad_weight ? partials.as<double>() + piece * 9 * lanes : nullptr; };
    auto first = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, sum_cut, z.x, z.weight, z.pre_activation);
      for (int64_t p = begin; p < end; ++p) pixels.gradient_sums(p, *norm, z.grad_out, sum_partial(p));
    };
    auto join = [&](int64_t chunk) {
      if (!norm) return;
      const double count = double(s.batch) * double(s.out_h) * double(s.out_w);
      cut.each_lane(chunk, [&](int64_t lane, int64_t c) {
        const int64_t at = lane / L * 2 * L + lane % L;
        double sum = 0, dot = 0;
        for (int64_t p = chunk * sum_cut.pieces_of_chunk(); p < (chunk + 1) * sum_cut.pieces_of_chunk(); ++p)
          sum += sum_partial(p)[at], dot += sum_partial(p)[at + L];
        A scale, shift;
        dot *= double(fold_norm(*norm, c, norm->mean[c], norm->var[c], &scale, &shift));
        z.grad_beta[c] = A(sum), z.grad_gamma[c] = A(dot);
        mean_grad[c] = A(sum / count), mean_dot[c] = A(dot / count);
      });
    };
    auto second = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, cut, z.x, z.weight, z.pre_activation, true);
      pixels.streams_ = streams(z.grad_x, s);
      for (int64_t p = begin; p < end; ++p)
        pixels.gradients(p, z, norm, norm && batch_statistics ? mean_grad : nullptr, mean_dot, partial(p));
      if (pixels.streams_) finish_streams();
    };
    auto join_weights = [&](int64_t chunk) {
      if (!z.grad_weight) return;
      cut.each_lane(chunk, [&](int64_t lane, int64_t c) {
        for (int64_t t = 0; t < 9; ++t) {
          double sum = 0;
          for (int64_t p = chunk * cut.pieces_of_chunk(); p < (chunk + 1) * cut.pieces_of_chunk(); ++p)
            sum += partial(p)[(lane / L * 9 + t) * L + lane % L];
          narrow(A(sum), z.grad_weight + c * 9 + t);
        }
      });
    };
    run_pieces(sum_cut, cut, parallel, first, join, second, join_weights);
  }

 private:
  TrainingPixels(const DepthwiseShape& s, const Cut& cut, const T* x, const T* weight, Activation pre,
                 bool gradients = false)
      : Base(s, cut.most), cut_(cut), x_(x), weight_(weight), pre_(pre) {
    row_step_ = s.rate_h / greatest_common_divisor(s.rate_h, s.stride_h);
    Arena measure(nullptr);
    allocate(measure, gradients);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena, gradients);
  }

  void allocate(Arena& arena, bool gradients) {
    const int64_t lanes = cut_.most * L, x_row = s_.in_w * pixel_, row = s_.out_w * pixel_;
    weights_ = arena.take<A>(9 * lanes);
    now_ = arena.take<A>(9 * lanes);
    for (A** p : {&scale_, &shift_, &mean_, &slope_, &constant_}) *p = arena.take<A>(lanes);
    x_rows_ = {arena.take<A>(3 * x_row), x_row, s_.rate_h, {}};
    grad_rows_ = {arena.take<A>(gradients ? 3 * row : 0), row, row_step_, {}};
    row_ = arena.take<A>(larger(x_row, row));
  }

  // norm null: the weights alone. mean_grad null: mean and variance do not depend on x.
  void select(const PixelPiece& piece, const BatchNorm<A>* norm, const A* mean, const A* var, const A* mean_grad,
              const A* mean_dot) {
    if (piece.chunk != chunk_ || piece.image != image_) x_rows_.clear(), grad_rows_.clear();
    image_ = piece.image;
    if (piece.chunk == chunk_) return;
    chunk_ = piece.chunk;
    channels_ = cut_.channels(chunk_);
    activation_ = norm ? norm->activation : Activation::kNone;
    cut_.each_lane(chunk_, [&](int64_t lane, int64_t c) {
      for (int64_t t = 0; t < 9; ++t) weights_[(lane / L * 9 + t) * L + lane % L] = widen(weight_[c * 9 + t]);
      if (!norm) return;
      const A inv_std = fold_norm(*norm, c, mean[c], var[c], scale_ + lane, shift_ + lane);
      mean_[lane] = mean[c];
      slope_[lane] = mean_grad ? -scale_[lane] * inv_std * mean_dot[c] : A(0);
      constant_[lane] = mean_grad ? -scale_[lane] * mean_grad[c] : A(0);
    });
  }

  // Row number t of `rows` in an order where those `step` apart follow each other.
  static int64_t row_at(int64_t t, int64_t rows, int64_t step) {
    const int64_t each = rows / step, longer = rows % step, split = longer * (each + 1);
    if (t < split) return t / (each + 1) + t % (each + 1) * step;
    return longer + (t - split) / each + (t - split) % each * step;
  }

  int64_t in_row(int64_t h) const { return (image_ * s_.in_h + h) * s_.in_w * s_.channels + channels_.first; }
  int64_t out_row(int64_t i) const { return (image_ * s_.out_h + i) * s_.out_w * s_.channels + channels_.first; }

  // A row in memory, through f, as a packed row.
  template <typename F>
  void pack(const T* from, int64_t columns, A* to, const F& f) const {
    const int64_t vectors = channels_.vectors, last = channels_.last;
    for (int64_t w = 0; w < columns; ++w, from += s_.channels, to += pixel_) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < vectors - 1; ++k) store(to + k * L, f(load(from + k * L)));
      store(to + (vectors - 1) * L, f(load(from + last)));
    }
  }
  void pack(const T* from, int64_t columns, A* to) const {
    pack(from, columns, to, [](V v) { return v; });
  }
  const A* packed_x(int64_t h) {
    return x_rows_.row(h, [&](A* to) {
      const T* from = x_ + in_row(h);
      if (pre_ == Activation::kNone) return pack(from, s_.in_w, to);
      pack(from, s_.in_w, to, [pre = pre_](V v) { return activated(v, pre); });
    });
  }

  // A packed row to memory, past the caches where streams_ says so; each vector through f(v, where it goes).
  template <typename F>
  void unpack(const A* from, int64_t columns, T* to, const F& f) const {
    const int64_t vectors = channels_.vectors, last = channels_.last;
    for (int64_t w = 0; w < columns; ++w, from += pixel_, to += s_.channels) {
      if (streams_) {
        stream_vectors(to, vectors, [&](int64_t k) { return f(load(from + k * L), to + k * L); });
        continue;
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < vectors - 1; ++k) store(to + k * L, f(load(from + k * L), to + k * L));
      store(to + last, f(load(from + (vectors - 1) * L), to + last));
    }
  }

  // The rows of x for row i of the results.
  Lines lines_of(int64_t i) {
    Lines lines{};
    for (int64_t u = 0; u < 3; ++u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h < 0 || h >= s_.in_h) continue;
      lines.row[lines.rows] = packed_x(h);
      lines.products[lines.rows] = now_ + 3 * u * L;
      lines.weights[lines.rows++] = weights_ + 3 * u * L;
    }
    return lines;
  }
  // Of the first kernel row that meets the image there.
  int64_t first_input(int64_t i) const {
    int64_t h = tap_input(i, 0, s_.stride_h, s_.rate_h, s_.pad_top);
    while (h < 0) h += s_.rate_h;
    return h;
  }

  void statistics(int64_t index, double* mean, double* m2, T* out) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, nullptr, nullptr, nullptr, nullptr, nullptr);
    const int64_t size = channels_.vectors * L;
    for (int64_t l = 0; l < size; ++l) mean[l] = m2[l] = 0, mean_[l] = 0;
    typename Base::Statistics pass{mean_, now_, mean, m2, size, nullptr, pixel_};
    // The mean of a few results is the first centre that deviations are taken from.
    pass.clear();
    const Lines middle = lines_of(row_at((piece.begin + piece.end) / 2, s_.out_h, row_step_));
    for (int64_t q = 1; q < 8; q += 2) along(middle, forward_, {s_.out_w * q / 8, s_.out_w * q / 8 + 1}, pass);
    for (int64_t l = 0; l < size; l += L) store(mean_ + l, load(now_ + 2 * l) * A(0.25));
    pass.clear();
    pass.kept = kKeeps ? row_ : nullptr;
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t i = row_at(t, s_.out_h, row_step_);
      along(lines_of(i), forward_, {0, s_.out_w}, pass);
      if (kKeeps) unpack(row_, s_.out_w, out + out_row(i), [](V v, const T*) { return v; });
    }
    pass.join();
  }

  void outputs(int64_t index, const BatchNorm<A>& norm, const A* mean, const A* var, T* out) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, &norm, mean, var, nullptr, nullptr);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t i = row_at(t, s_.out_h, row_step_);
      if constexpr (kKeeps) {
        normalise(out + out_row(i));
      } else {
        typename Base::Outputs pass{scale_, shift_, activation_, row_, pixel_};
        along(lines_of(i), forward_, {0, s_.out_w}, pass);
        unpack(row_, s_.out_w, out + out_row(i), [](V v, const T*) { return v; });
      }
    }
  }

  // conv(x) of a row in memory becomes the output.
  void normalise(T* row) const {
    const int64_t vectors = channels_.vectors, last = channels_.last;
    for (int64_t w = 0; w < s_.out_w; ++w, row += s_.channels) {
      auto normalised = [&](int64_t k, const T* from) {
        return activated(V(load(from) * load(scale_ + k * L) + load(shift_ + k * L)), activation_);
      };
      // The last vector overlaps the one before it: read first.
      const V end = normalised(vectors - 1, row + last);
#pragma GCC unroll 4
      for (int64_t k = 0; k < vectors - 1; ++k) store(row + k * L, normalised(k, row + k * L));
      store(row + last, end);
    }
  }

  void gradient_sums(int64_t index, const BatchNorm<A>& norm, const T* grad_out, double* partial) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, &norm, norm.mean, norm.var, nullptr, nullptr);
    const Sums sums{now_, partial, 2 * channels_.vectors * L};
    sums.start();
    typename Base::GradientSums pass{scale_, shift_, mean_, activation_, row_, pixel_, sums};
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t i = row_at(t, s_.out_h, row_step_);
      pack(grad_out + out_row(i), s_.out_w, row_);
      along(lines_of(i), forward_, {0, s_.out_w}, pass);
    }
    pass.sums.flush();
  }

  // partial: of the weights' gradient; null: not wanted. mean_grad null: the statistics do not depend on x.
  void gradients(int64_t index, const BackwardTensors<T>& z, const BatchNorm<A>* norm, const A* mean_grad,
                 const A* mean_dot, double* partial) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, norm, norm ? norm->mean : nullptr, norm ? norm->var : nullptr, mean_grad, mean_dot);
    const Sums sums{now_, partial, 9 * channels_.vectors * L};
    if (partial) sums.start();
    typename Base::Gradients pass{scale_,    shift_,      mean_,           slope_,
                                  constant_, activation_, norm != nullptr, mean_grad != nullptr,
                                  false,     nullptr,     pixel_,          sums};
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t h = row_at(t, s_.in_h, s_.rate_h);
      Lines lines{};
      for (int64_t u = 2; u >= 0; --u) {
        const int64_t i = tap_output(h, u, s_.stride_h, s_.rate_h, s_.pad_top, s_.out_h);
        if (i < 0) continue;
        lines.row[lines.rows] = grad_rows_.row(i, [&](A* row) {
          pack(z.grad_out + out_row(i), s_.out_w, row);
          // A row's products are summed where the first row of x that it reads is.
          pass.summed = partial && first_input(i) == h;
          pass.grad = row;
          along(lines_of(i), forward_, {0, s_.out_w}, pass);
        });
        lines.weights[lines.rows++] = weights_ + 3 * u * L;
      }
      if (!z.grad_x) continue;
      for (int64_t q = 0; q < s_.stride_w; ++q) {
        typename Base::InputGradient gx{row_ + transposed_[q].to * pixel_, transposed_[q].step * pixel_};
        along(lines, transposed_[q], {0, s_.in_w}, gx);
      }
      T* to = z.grad_x + in_row(h);
      if (pre_ == Activation::kNone)
        unpack(row_, s_.in_w, to, [](V v, const T*) { return v; });
      else
        unpack(row_, s_.in_w, to,
               [&, pre = pre_](V v, const T* p) { return masked(v, load(z.x + (p - z.grad_x)), pre); });
    }
    if (partial) pass.sums.flush();
  }

  const Cut cut_;
  const T *x_, *weight_;
  const Activation pre_;  // of x
  Activation activation_ = Activation::kNone;
  int64_t row_step_;  // rows of results that read the same rows of x lie this far apart
  bool streams_ = false;
  int64_t chunk_ = -1, image_ = -1;
  A *weights_, *now_, *scale_, *shift_, *mean_, *slope_, *constant_;
  typename Base::Ring x_rows_, grad_rows_;
  A* row_;  // packed: of results on their way to memory, of the gradient of the output
};

// Planes (planes.h), which hold columns of padding too, read memory once: faster while they fit the
// caches.
template <typename T>
bool faster_by_pixels(const DepthwiseShape& s) {
  return TrainingPixels<T>::serve(s) && s.batch * s.in_h * (s.in_w + s.pad_left) > 3 << 13;
}

}  // namespace

namespace DK_ISA {

template <typename T>
bool PixelKernels<T>::training(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm,
                               T* out, A* mean, A* var, Activation pre_activation, const Parallel& parallel) {
  const bool serves = faster_by_pixels<T>(shape);
  if (serves) TrainingPixels<T>::training(shape, x, weight, norm, out, mean, var, pre_activation, parallel);
  return serves;
}

template <typename T>
bool PixelKernels<T>::backward(const DepthwiseShape& shape, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,
                               bool batch_statistics, const Parallel& parallel) {
  const bool serves = !tensors.y && faster_by_pixels<T>(shape);
  if (serves) TrainingPixels<T>::backward(shape, tensors, norm, batch_statistics, parallel);
  return serves;
}

template struct PixelKernels<float>;
template struct PixelKernels<BFloat16Bits>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
