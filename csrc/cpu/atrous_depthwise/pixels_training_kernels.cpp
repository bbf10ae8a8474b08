// Training of the 3x3 atrous depthwise convolution on NHWC images, row by row.
//
// Rows of a chunk of channels are packed into rings of three rows in a core's second-level cache, in runs of memory as
// long as a pixel's share of the chunk. Forward: conv(x) for the statistics, kept in the output's memory and normalised
// there, or in a tensor that is kept for backward; bfloat16 would round it and computes it again. Backward, with
// conv(x) kept or computed again: the sums for the gradients of the normalisation; then row by row the gradient of
// conv(x), and from a ring of these rows at once the gradients of x and, as products with x, of the weights. Rows that
// read the same rows follow each other.
#include "../scratch.h"
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

  // out = act(bn(conv(pre(x)))) with the batch's statistics, which it returns too, and conv(pre(x)) unless y is null.
  static void training(const DepthwiseShape& s, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y,
                       A* mean, A* var, Activation pre, const Parallel& parallel) {
    T* const kept = y ? y : kKeeps ? out : nullptr;
    // What is kept for backward is soon read again, but not so soon that the caches have it: in the order of memory
    // then.
    const Cut cut = y ? Cut::tiled(s, s.out_h, Cut::Tiles::kOfResults) : Cut(s, s.out_h);
    const Cut out_cut(s, s.out_h, y ? s.channels : Cut::kChunk);
    const int64_t lanes = cut.most * L;
    const Workspace partials(size_t(cut.pieces() * 2 * lanes) * sizeof(double));
    auto partial = [&](int64_t piece) { return partials.as<double>() + piece * 2 * lanes; };
    auto first = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, cut, x, weight, pre, {3, 0});
      pixels.streams_ = kept && streams(kept, s);
      for (int64_t p = begin; p < end; ++p) pixels.statistics(p, partial(p), partial(p) + lanes, kept);
      if (pixels.streams_) finish_streams();
    };
    auto join = [&](int64_t chunk) {
      cut.each_lane(chunk, [&](int64_t lane, int64_t c) {
        double seen = 0, centre = 0, m2 = 0;
        for (int64_t p = chunk * cut.pieces_of_chunk(); p < (chunk + 1) * cut.pieces_of_chunk(); ++p) {
          const PixelPiece piece = cut.piece(p);
          const double n = double(piece.rows()) * double(count_of(cut.results(piece.tile)));
          join_moments(seen, n, partial(p)[lane], partial(p)[lanes + lane], centre, m2);
          seen += n;
        }
        mean[c] = A(centre), var[c] = A(m2 / seen);
      });
    };
    auto second = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, out_cut, x, weight, pre, {kept ? 0 : 3, 0});
      pixels.streams_ = kept != out && streams(out, s);
      for (int64_t p = begin; p < end; ++p) pixels.outputs(p, norm, mean, var, kept, out);
      if (pixels.streams_) finish_streams();
    };
    run_pieces(cut, out_cut, parallel, first, join, second, [](int64_t) {});
  }

  // norm null: gradients of the convolution alone.
  static void backward(const DepthwiseShape& s, const BackwardTensors<T>& z, const BatchNorm<A>* norm,
                       bool batch_statistics, const Parallel& parallel) {
    const Cut sum_cut(s, norm ? s.out_h : 0, z.y ? s.channels : Cut::kChunk);
    const int64_t rows = z.grad_x || z.grad_weight ? s.in_h : 0;
    const Cut cut = z.y ? Cut::tiled(s, rows, Cut::Tiles::kOfX) : Cut(s, rows);
    const int64_t lanes = cut.most * L, sum_lanes = sum_cut.most * L;
    const Workspace sum_partials(size_t(sum_cut.pieces() * 2 * sum_lanes) * sizeof(double) + 64);
    const Workspace partials(size_t(z.grad_weight ? cut.pieces() * 9 * lanes : 0) * sizeof(double) + 64);
    const Workspace means(size_t(2 * s.channels) * sizeof(A));
    A *mean_grad = means.as<A>(), *mean_dot = mean_grad + s.channels;
    auto sum_partial = [&](int64_t piece) { return sum_partials.as<double>() + piece * 2 * sum_lanes; };
    auto partial = [&](int64_t piece) { return z.grad_weight ? partials.as<double>() + piece * 9 * lanes : nullptr; };
    auto first = [&](int64_t begin, int64_t end) {
      TrainingPixels pixels(s, sum_cut, z.x, z.weight, z.pre_activation, {z.y ? 0 : 3, 0});
      for (int64_t p = begin; p < end; ++p) pixels.gradient_sums(p, *norm, z, sum_partial(p));
    };
    auto join = [&](int64_t chunk) {
      if (!norm) return;
      const double count = double(s.batch) * double(s.out_h) * double(s.out_w);
      sum_cut.each_lane(chunk, [&](int64_t lane, int64_t c) {
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
      TrainingPixels pixels(s, cut, z.x, z.weight, z.pre_activation, {z.y ? 1 : 3, 3});
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
  // Packed rows to hold.
  struct Held {
    int64_t x, grad;
  };

  TrainingPixels(const DepthwiseShape& s, const Cut& cut, const T* x, const T* weight, Activation pre, const Held& held)
      : Base(s, cut.most), cut_(cut), x_(x), weight_(weight), pre_(pre) {
    row_step_ = s.rate_h / greatest_common_divisor(s.rate_h, s.stride_h);
    Arena measure(nullptr);
    allocate(measure, held);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena, held);
  }

  void allocate(Arena& arena, const Held& held) {
    const int64_t lanes = cut_.most * L;
    const int64_t x_row = cut_.x_columns() * pixel_, row = cut_.result_columns() * pixel_;
    weights_ = arena.take<A>(9 * lanes);
    now_ = arena.take<A>(9 * lanes);
    for (A** p : {&scale_, &shift_, &mean_, &slope_, &constant_}) *p = arena.take<A>(lanes);
    x_rows_ = {arena.take<A>(held.x * x_row), x_row, s_.rate_h, held.x, {}};
    grad_rows_ = {arena.take<A>(held.grad * row), row, row_step_, held.grad, {}};
    row_ = arena.take<A>(held.x > 0 ? larger(x_row, row) : 0);
  }

  // norm null: the weights alone. mean_grad null: mean and variance do not depend on x.
  void select(const PixelPiece& piece, const BatchNorm<A>* norm, const A* mean, const A* var, const A* mean_grad,
              const A* mean_dot) {
    if (piece.chunk != chunk_ || piece.image != image_ || piece.tile != tile_) x_rows_.clear(), grad_rows_.clear();
    image_ = piece.image, tile_ = piece.tile;
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

  // A row in memory as a packed row; each vector through f(v, where it lies, its number).
  template <typename F>
  void pack(const T* from, int64_t columns, A* to, const F& f) const {
    const int64_t vectors = channels_.vectors, last = channels_.last;
    for (int64_t w = 0; w < columns; ++w, from += s_.channels, to += pixel_) {
#pragma GCC unroll 4
      for (int64_t k = 0; k < vectors - 1; ++k) store(to + k * L, f(load(from + k * L), from + k * L, k));
      store(to + (vectors - 1) * L, f(load(from + last), from + last, vectors - 1));
    }
  }
  void pack(const T* from, int64_t columns, A* to) const {
    pack(from, columns, to, [](V v, const T*, int64_t) { return v; });
  }
  // These columns; where column 0 lies or would lie.
  const A* packed_x(int64_t h, const IndexRange& columns) {
    const int64_t count = count_of(columns);
    const A* row = x_rows_.row(h, [&](A* to) {
      const T* from = x_ + in_row(h) + columns.begin * s_.channels;
      if (pre_ == Activation::kNone) return pack(from, count, to);
      pack(from, count, to, [pre = pre_](V v, const T*, int64_t) { return activated(v, pre); });
    });
    return row - columns.begin * pixel_;
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

  // The rows of x, as far as the tile reads them, for row i of the results.
  Lines lines_of(int64_t i) {
    const IndexRange columns = cut_.x(tile_);
    Lines lines{};
    for (int64_t u = 0; u < 3; ++u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h < 0 || h >= s_.in_h) continue;
      lines.row[lines.rows] = packed_x(h, columns);
      lines.weights[lines.rows++] = weights_ + 3 * u * L;
    }
    return lines;
  }
  // kept: where conv(x) goes; null: nowhere.
  void statistics(int64_t index, double* mean, double* m2, T* kept) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, nullptr, nullptr, nullptr, nullptr, nullptr);
    const int64_t size = channels_.vectors * L;
    for (int64_t l = 0; l < size; ++l) mean[l] = m2[l] = 0, mean_[l] = 0;
    typename Base::Statistics pass{mean_, now_, mean, m2, size, nullptr, pixel_};
    // The mean of a few results is the first centre that deviations are taken from.
    pass.clear();
    const Lines middle = lines_of(row_at((piece.begin + piece.end) / 2, s_.out_h, row_step_));
    const IndexRange columns = cut_.results(piece.tile);
    for (int64_t q = 1; q < 8; q += 2) {
      const int64_t j = columns.begin + count_of(columns) * q / 8;
      along(middle, forward_, {j, j + 1}, pass);
    }
    for (int64_t l = 0; l < size; l += L) store(mean_ + l, load(now_ + 2 * l) * A(0.25));
    pass.clear();
    pass.kept = kept ? row_ - columns.begin * pixel_ : nullptr;
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t i = row_at(t, s_.out_h, row_step_);
      along(lines_of(i), forward_, columns, pass);
      T* to = kept + out_row(i) + columns.begin * s_.channels;
      if (kept) unpack(row_, count_of(columns), to, [](V v, const T*) { return v; });
    }
    pass.join();
  }

  // kept: conv(x), perhaps where out goes; null: it is computed again.
  void outputs(int64_t index, const BatchNorm<A>& norm, const A* mean, const A* var, const T* kept, T* out) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, &norm, mean, var, nullptr, nullptr);
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t i = row_at(t, s_.out_h, row_step_);
      if (kept) {
        with_activation(activation_, [&](auto known) { normalise<known.value>(kept + out_row(i), out + out_row(i)); });
      } else {
        typename Base::Outputs pass{scale_, shift_, activation_, row_, pixel_};
        along(lines_of(i), forward_, {0, s_.out_w}, pass);
        unpack(row_, s_.out_w, out + out_row(i), [](V v, const T*) { return v; });
      }
    }
  }

  // A row of conv(x) in memory, perhaps in its own place, becomes the output.
  template <Activation kActivation>
  void normalise(const T* from, T* to) const {
    const int64_t vectors = channels_.vectors, last = channels_.last;
    for (int64_t w = 0; w < s_.out_w; ++w, from += s_.channels, to += s_.channels) {
      auto normalised = [&](int64_t k, int64_t at) {
        return activated(V(load(from + at) * load(scale_ + k * L) + load(shift_ + k * L)), kActivation);
      };
      if (streams_) {
        stream_vectors(to, vectors, [&](int64_t k) { return normalised(k, k * L); });
        continue;
      }
      // The last vector overlaps the one before it: read first.
      const V end = normalised(vectors - 1, last);
#pragma GCC unroll 4
      for (int64_t k = 0; k < vectors - 1; ++k) store(to + k * L, normalised(k, k * L));
      store(to + last, end);
    }
  }

  void gradient_sums(int64_t index, const BatchNorm<A>& norm, const BackwardTensors<T>& z, double* partial) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, &norm, norm.mean, norm.var, nullptr, nullptr);
    const Sums sums{now_, partial, 2 * channels_.vectors * L};
    sums.start();
    with_activation(activation_, [&](auto known) {
      typename Base::template GradientSums<known.value> pass{scale_, shift_, mean_, row_, pixel_, sums};
      for (int64_t t = piece.begin; t < piece.end; ++t) {
        const int64_t i = row_at(t, s_.out_h, row_step_);
        const T* grad = z.grad_out + out_row(i);
        if (z.y) {
          pass.take_row(grad, z.y + out_row(i), s_.out_w, s_.channels, channels_);
        } else {
          pack(grad, s_.out_w, row_);
          along(lines_of(i), forward_, {0, s_.out_w}, pass);
        }
      }
      pass.sums.flush();
    });
  }

  // partial: of the weights' gradient; null: not wanted. mean_grad null: the statistics do not depend on x.
  void gradients(int64_t index, const BackwardTensors<T>& z, const BatchNorm<A>* norm, const A* mean_grad,
                 const A* mean_dot, double* partial) {
    const PixelPiece piece = cut_.piece(index);
    select(piece, norm, norm ? norm->mean : nullptr, norm ? norm->var : nullptr, mean_grad, mean_dot);
    const Sums sums{now_, partial, 9 * channels_.vectors * L};
    if (partial) sums.start();
    const IndexRange columns = cut_.x(piece.tile), results = cut_.results(piece.tile);
    const int64_t count = count_of(columns);
    A* const grad_x = row_ - columns.begin * pixel_;
    typename Base::template InputGradients<true> with_products{nullptr, nullptr, 0, sums};
    typename Base::template InputGradients<false> alone{nullptr, nullptr, 0, sums};
    for (int64_t t = piece.begin; t < piece.end; ++t) {
      const int64_t h = row_at(t, s_.in_h, s_.rate_h);
      Lines lines{};
      for (int64_t u = 2; u >= 0; --u) {
        const int64_t i = tap_output(h, u, s_.stride_h, s_.rate_h, s_.pad_top, s_.out_h);
        if (i < 0) continue;
        const A* row = grad_rows_.row(i, [&](A* to) { gradient_of_conv(i, results, z, norm, mean_grad, to); });
        lines.row[lines.rows] = row - results.begin * pixel_;
        lines.products[lines.rows] = now_ + 3 * u * L;
        lines.weights[lines.rows++] = weights_ + 3 * u * L;
      }
      const A* x = partial ? packed_x(h, columns) : nullptr;
      for (int64_t q = 0; q < s_.stride_w; ++q) {
        const int64_t to = transposed_[q].to * pixel_;
        auto each_column = [&](auto& pass) {
          pass.x = x + to, pass.out = grad_x + to, pass.step = transposed_[q].step * pixel_;
          along(lines, transposed_[q], {columns.begin / s_.stride_w, (columns.end + s_.stride_w - 1) / s_.stride_w},
                pass);
        };
        if (partial)
          each_column(with_products);
        else
          each_column(alone);
      }
      if (!z.grad_x) continue;
      T* to = z.grad_x + in_row(h) + columns.begin * s_.channels;
      if (pre_ == Activation::kNone)
        unpack(row_, count, to, [](V v, const T*) { return v; });
      else
        unpack(row_, count, to,
               [&, pre = pre_](V v, const T* p) { return masked(v, load(z.x + (p - z.grad_x)), pre); });
    }
    if (partial) with_products.sums.flush();
  }

  // Row i of the gradient of conv(x), packed: all of it, or, where conv(x) needs not be computed, these columns.
  void gradient_of_conv(int64_t i, const IndexRange& columns, const BackwardTensors<T>& z, const BatchNorm<A>* norm,
                        bool batch, A* row) {
    const int64_t count = columns.end - columns.begin, begin = out_row(i) + columns.begin * s_.channels;
    const T* grad = z.grad_out + begin;
    if (!norm) return pack(grad, count, row);
    const typename Base::Backward backward{scale_, shift_, mean_, slope_, constant_, batch};
    with_activation(activation_, [&](auto known) {
      if (z.y) {
        const T* y = z.y + begin;
        return pack(grad, count, row, [&](V g, const T* p, int64_t k) {
          return backward.template operator()<known.value>(g, load(y + (p - grad)), k);
        });
      }
      pack(grad, count, row);
      typename Base::template Gradients<known.value> pass{backward, row, pixel_};
      along(lines_of(i), forward_, {0, s_.out_w}, pass);
    });
  }

  const Cut cut_;
  const T *x_, *weight_;
  const Activation pre_;  // of x
  Activation activation_ = Activation::kNone;
  int64_t row_step_;  // rows of results that read the same rows of x lie this far apart
  bool streams_ = false;
  int64_t chunk_ = -1, image_ = -1, tile_ = -1;
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

// With conv(x) kept for backward. In bfloat16 it would be rounded before it is normalised.
template <typename T>
bool keeps_by_pixels(const DepthwiseShape& s) {
  return TrainingPixels<T>::serve(s) && TrainingPixels<T>::kKeeps;
}

}  // namespace

namespace DK_ISA {

template <typename T>
bool PixelKernels<T>::training(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm,
                               T* out, T* y, A* mean, A* var, Activation pre_activation, const Parallel& parallel) {
  const bool serves = y ? keeps_by_pixels<T>(shape) : faster_by_pixels<T>(shape);
  if (serves) TrainingPixels<T>::training(shape, x, weight, norm, out, y, mean, var, pre_activation, parallel);
  return serves;
}

template <typename T>
bool PixelKernels<T>::backward(const DepthwiseShape& shape, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,
                               bool batch_statistics, const Parallel& parallel) {
  const bool serves = tensors.y ? keeps_by_pixels<T>(shape) : faster_by_pixels<T>(shape);
  if (serves) TrainingPixels<T>::backward(shape, tensors, norm, batch_statistics, parallel);
  return serves;
}

template struct PixelKernels<float>;
template struct PixelKernels<BFloat16Bits>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
