// Batch normalisation + residual + activation.
//
// NCHW: a task is a channel, whose second pass finds it in the caches where the batch's maps of it fit. NHWC: a task is
// a block of pixels, all channels; the blocks' sums are joined in their order. Either way the sums depend on the shape
// alone, not on the number of threads.
#include "../microkernels.h"
#include "../workspace.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

// Calls f(activation, flag), both known to the compiler: no branch for every vector.
template <auto kValue>
struct Constant {
  static constexpr auto value = kValue;
};
template <typename F>
void with_constants(Activation activation, bool flag, const F& f) {
  auto with_flag = [&](auto a) { flag ? f(a, Constant<true>()) : f(a, Constant<false>()); };
  switch (activation) {
    case Activation::kRelu:
      return with_flag(Constant<Activation::kRelu>());
    case Activation::kRelu6:
      return with_flag(Constant<Activation::kRelu6>());
    default:
      return with_flag(Constant<Activation::kNone>());
  }
}

// What a pass over maps needs of a channel, as a vector or as a broadcast scalar.
template <typename V>
struct MapNorm {
  V mean, scale, shift;  // (z - mean) * scale + shift: z * scale + (shift - mean * scale) would cancel for large means
  V slope, constant;     // backward: the gradient of z is grad * scale + (z - mean) * slope + constant
};

// The scalars of one channel. mean_grad and mean_dot: of grad and of grad * (z - mean), over the batch.
template <typename A>
MapNorm<A> map_norm(const BatchNorm<A>& norm, int64_t c, double mean_grad, double mean_dot) {
  const double inv = 1 / __builtin_sqrt(double(norm.var[c]) + norm.eps);
  const double scale = norm.gamma ? double(norm.gamma[c]) * inv : inv;
  return {norm.mean[c], A(scale), norm.beta ? norm.beta[c] : A(0), A(-scale * inv * inv * mean_dot),
          A(-scale * mean_grad)};
}

template <typename T>
struct Maps {
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  // Calls f(offset, number of values) for the vectors of [begin, end); only the last has fewer than L.
  template <typename F>
  DK_INLINE static void vectors(int64_t begin, int64_t end, const F& f) {
    int64_t k = begin;
    for (; k + L <= end; k += L) f(k, L);
    if (k < end) f(k, end - k);
  }
  DK_INLINE static V read(const T* p, int64_t n) { return n == L ? load(p) : load_part(p, n); }
  DK_INLINE static void write(T* p, V v, int64_t n) { n == L ? store(p, v) : store_part(p, v, n); }

  template <bool kResidual>
  DK_INLINE static void activate(const T* z, const T* residual, int64_t k, const MapNorm<V>& norm,
                                 Activation activation, T* out, int64_t n) {
    V v = (read(z + k, n) - norm.mean) * norm.scale + norm.shift;
    if constexpr (kResidual) v += read(residual + k, n);
    write(out + k, activated(v, activation), n);
  }

  // The gradient before the activation, and z - mean. kOut: whether `out` tells the activation's mask, or z does.
  template <Activation kActivation, bool kOut>
  DK_INLINE static V before_activation(const MapGradients<T>& t, int64_t k, const MapNorm<V>& norm, int64_t n,
                                       V& centred) {
    centred = read(t.z + k, n) - norm.mean;
    const V grad = read(t.grad_out + k, n);
    if constexpr (kOut) return masked(grad, read(t.out + k, n), kActivation);
    return masked(grad, V(centred * norm.scale + norm.shift), kActivation);
  }

  template <Activation kActivation, bool kOut>
  DK_INLINE static void gradient(const MapGradients<T>& t, int64_t k, const MapNorm<V>& norm, int64_t n) {
    V centred;
    const V g = before_activation<kActivation, kOut>(t, k, norm, n, centred);
    if constexpr (kOut) write(t.grad_residual + k, g, n);
    write(t.grad_z + k, g * norm.scale + centred * norm.slope + norm.constant, n);
  }
};

// ---- NCHW

template <typename T>
struct ChannelMaps : Maps<T> {
  using typename Maps<T>::A;
  using typename Maps<T>::V;
  using Maps<T>::L;
  using Maps<T>::vectors;
  using Maps<T>::read;
  static constexpr int64_t kChunk = 2048;  // values between joins of the sums, in the first-level cache
  static constexpr int kSums = 4;

  static MapNorm<V> broadcast_norm(const MapNorm<A>& n) {
    return {broadcast(n.mean), broadcast(n.scale), broadcast(n.shift), broadcast(n.slope), broadcast(n.constant)};
  }

  // Calls f(offset of the first value, number of values) for the chunks of a channel.
  template <typename F>
  static void chunks(const MapShape& s, int64_t c, const F& f) {
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t k = 0; k < s.pixels; k += kChunk)
        f((n * s.channels + c) * s.pixels + k, smaller(kChunk, s.pixels - k));
  }

  // Adds f(vector) over [begin, begin + count) up in kSums vectors by turns; absent lanes of the last one are zero.
  template <int N, typename F>
  DK_INLINE static void sums(int64_t count, A (&totals)[N], const F& f) {
    V sum[N][kSums] = {};
    int64_t k = 0;
    for (; k + kSums * L <= count; k += kSums * L)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) {
        V terms[N];
        f(k + i * L, L, terms);
        for (int j = 0; j < N; ++j) sum[j][i] += terms[j];
      }
    vectors(k, count, [&](int64_t at, int64_t n) {
      V terms[N];
      f(at, n, terms);
      for (int j = 0; j < N; ++j)
        if (n == L)
          sum[j][0] += terms[j];
        else
          for (int64_t l = 0; l < n; ++l) sum[j][0][l] += terms[j][l];
    });
    for (int j = 0; j < N; ++j) totals[j] = sum_of_lanes<A>((sum[j][0] + sum[j][1]) + (sum[j][2] + sum[j][3]));
  }

  static void statistics(const MapShape& s, int64_t c, const T* z, A* mean, A* var) {
    double seen = 0, centre = 0, m2 = 0;
    chunks(s, c, [&](int64_t first, int64_t count) {
      const T* p = z + first;
      A total[1], squares[2];
      sums<1>(count, total, [&](int64_t k, int64_t n, V(&terms)[1]) { terms[0] = read(p + k, n); });
      const A about = A(double(total[0]) / double(count));
      const V centred = broadcast(about);
      sums<2>(count, squares, [&](int64_t k, int64_t n, V(&terms)[2]) {
        terms[1] = read(p + k, n) - centred;
        terms[0] = terms[1] * terms[1];
      });
      join_deviations(seen, double(count), double(about), double(squares[1]), double(squares[0]), centre, m2);
      seen += double(count);
    });
    mean[c] = A(centre), var[c] = A(m2 / seen);
  }

  template <Activation kActivation, bool kResidual>
  static void training(const MapShape& s, int64_t c, const T* z, const T* residual, const BatchNorm<A>& norm, T* out,
                       A* mean, A* var, bool given) {
    if (!given) statistics(s, c, z, mean, var);
    const MapNorm<V> values = broadcast_norm(map_norm(norm, c, 0, 0));
    chunks(s, c, [&](int64_t first, int64_t count) {
      vectors(first, first + count, [&](int64_t k, int64_t n) {
        Maps<T>::template activate<kResidual>(z, residual, k, values, kActivation, out, n);
      });
    });
  }

  template <Activation kActivation, bool kOut>
  static void backward(const MapShape& s, int64_t c, const MapGradients<T>& t, const BatchNorm<A>& norm) {
    MapNorm<V> values = broadcast_norm(map_norm(norm, c, 0, 0));
    double grad = 0, dot = 0;
    chunks(s, c, [&](int64_t first, int64_t count) {
      A part[2];
      sums<2>(count, part, [&](int64_t k, int64_t n, V(&terms)[2]) {
        V centred;
        terms[0] = Maps<T>::template before_activation<kActivation, kOut>(t, first + k, values, n, centred);
        terms[1] = terms[0] * centred;
      });
      grad += double(part[0]), dot += double(part[1]);
    });
    const double count = double(s.batch) * double(s.pixels);
    values = broadcast_norm(map_norm(norm, c, grad / count, dot / count));
    t.grad_beta[c] = A(grad), t.grad_gamma[c] = A(dot / __builtin_sqrt(double(norm.var[c]) + norm.eps));
    chunks(s, c, [&](int64_t first, int64_t values_here) {
      vectors(first, first + values_here,
              [&](int64_t k, int64_t n) { Maps<T>::template gradient<kActivation, kOut>(t, k, values, n); });
    });
  }
};

// ---- NHWC

template <typename T>
class PixelMaps : Maps<T> {
 public:
  using typename Maps<T>::A;
  using typename Maps<T>::V;
  using Maps<T>::L;
  using Maps<T>::vectors;
  using Maps<T>::read;
  static constexpr int64_t kChunk = 64;       // pixels between joins of the statistics, in the second-level cache
  static constexpr int64_t kLongChunk = 256;  // the same of the gradients' sums
  static constexpr int64_t kFewestPixels = 256, kMostBlocks = 64;
  static constexpr int kVectors = 4;  // of channels at a time: two cache lines of floats with AVX2

  explicit PixelMaps(const MapShape& s)
      : channels_(s.channels),
        pixels_(s.batch * s.pixels),
        block_(larger(kFewestPixels, (pixels_ + kMostBlocks - 1) / kMostBlocks)),
        blocks_((pixels_ + block_ - 1) / block_),
        padded_(rounded_up(channels_, L)),
        sums_(size_t(2 * blocks_ * padded_) * sizeof(double)),
        norm_(size_t(5 * padded_) * sizeof(A)) {}

  template <Activation kActivation, bool kResidual>
  void training(const T* z, const T* residual, const BatchNorm<A>& norm, T* out, A* mean, A* var, bool given,
                const Parallel& parallel) {
    if (!given) statistics(z, mean, var, parallel);
    for_channels(parallel, [&](int64_t c) { keep(c, map_norm(norm, c, 0, 0)); });
    for_rows(parallel, [&](int64_t row, int64_t c, int64_t n, const MapNorm<V>& values) {
      Maps<T>::template activate<kResidual>(z, residual, row + c, values, kActivation, out, n);
    });
  }

  template <Activation kActivation, bool kOut>
  void backward(const MapGradients<T>& t, const BatchNorm<A>& norm, const Parallel& parallel) {
    for_channels(parallel, [&](int64_t c) { keep(c, map_norm(norm, c, 0, 0)); });
    parallel(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) gradient_sums<kActivation, kOut>(t, b);
    });
    for_channels(parallel, [&](int64_t c) {
      double grad = 0, dot = 0;
      for (int64_t b = 0; b < blocks_; ++b) grad += first_sum(b)[c], dot += second_sum(b)[c];
      t.grad_beta[c] = A(grad), t.grad_gamma[c] = A(dot / __builtin_sqrt(double(norm.var[c]) + norm.eps));
      keep(c, map_norm(norm, c, grad / double(pixels_), dot / double(pixels_)));
    });
    for_rows(parallel, [&](int64_t row, int64_t c, int64_t n, const MapNorm<V>& values) {
      Maps<T>::template gradient<kActivation, kOut>(t, row + c, values, n);
    });
  }

 private:
  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  int64_t first(int64_t b) const { return b * block_; }
  int64_t last(int64_t b) const { return smaller(pixels_, (b + 1) * block_); }
  // Of a block, one value a channel: mean and squared deviations, or sums of the gradient and its products.
  double* first_sum(int64_t b) const { return sums_.as<double>() + 2 * b * padded_; }
  double* second_sum(int64_t b) const { return first_sum(b) + padded_; }

  void keep(int64_t c, const MapNorm<A>& n) const {
    A* p = norm_.template as<A>() + c;
    p[0] = n.mean, p[padded_] = n.scale, p[2 * padded_] = n.shift;
    p[3 * padded_] = n.slope, p[4 * padded_] = n.constant;
  }
  DK_INLINE MapNorm<V> kept(int64_t c) const {
    const A* p = norm_.template as<A>() + c;
    return {load(p), load(p + padded_), load(p + 2 * padded_), load(p + 3 * padded_), load(p + 4 * padded_)};
  }

  template <typename F>
  void for_channels(const Parallel& parallel, const F& f) const {
    parallel((channels_ + 63) / 64, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin * 64; c < smaller(channels_, end * 64); ++c) f(c);
    });
  }
  // Calls f(offset of the pixel, first channel, number of channels, what is kept of them).
  template <typename F>
  void for_rows(const Parallel& parallel, const F& f) const {
    parallel(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t row = first(begin) * channels_; row < last(end - 1) * channels_; row += channels_)
        vectors(0, channels_, [&](int64_t c, int64_t n) { f(row, c, n, kept(c)); });
    });
  }
  // Calls f(Count<vectors of channels>, first channel, number of channels).
  template <typename F>
  DK_INLINE void groups(const F& f) const {
    int64_t c = 0;
    for (; c + kVectors * L <= channels_; c += kVectors * L) f(Count<kVectors>(), c, kVectors * L);
    vectors(c, channels_, [&](int64_t at, int64_t n) { f(Count<1>(), at, n); });
  }
  // Calls f(first pixel, number of pixels) for the chunks of a block.
  template <typename F>
  void chunks(int64_t b, int64_t chunk, const F& f) const {
    for (int64_t row = first(b); row < last(b); row += chunk) f(row, smaller(chunk, last(b) - row));
  }

  void clear_sums(int64_t b) const {
    for (int64_t i = 0; i < 2 * padded_; ++i) first_sum(b)[i] = 0;
  }

  void statistics(const T* z, A* mean, A* var, const Parallel& parallel) const {
    parallel(blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) block_statistics(z, b);
    });
    for_channels(parallel, [&](int64_t c) {
      double seen = 0, centre = 0, m2 = 0;
      for (int64_t b = 0; b < blocks_; ++b) {
        const double n = double(last(b) - first(b));
        join_moments(seen, n, first_sum(b)[c], second_sum(b)[c], centre, m2);
        seen += n;
      }
      mean[c] = A(centre), var[c] = A(m2 / seen);
    });
  }

  void block_statistics(const T* z, int64_t b) const {
    clear_sums(b);
    double seen = 0;
    chunks(b, kChunk, [&](int64_t row, int64_t rows) {
      groups([&](auto vectors_at_once, int64_t c, int64_t n) {
        constexpr int N = decltype(vectors_at_once)::value;
        const int64_t each = N == 1 ? n : L;
        const T* top = z + row * channels_ + c;
        V sum[N] = {}, squares[N] = {}, rest[N] = {};
        const T* p = top;
        for (int64_t r = 0; r < rows; ++r, p += channels_)
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) sum[i] += read(p + i * L, each);
        for (int i = 0; i < N; ++i) sum[i] /= A(rows);
        p = top;
        for (int64_t r = 0; r < rows; ++r, p += channels_)
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) {
            const V d = read(p + i * L, each) - sum[i];
            squares[i] += d * d, rest[i] += d;
          }
        for (int i = 0; i < N; ++i) {
          double *mean = first_sum(b) + c + i * L, *m2 = second_sum(b) + c + i * L;
          Doubles<A> joined_mean = load_doubles<A>(mean), joined_m2 = load_doubles<A>(m2);
          join_deviations(seen, double(rows), in_double<A>(sum[i]), in_double<A>(rest[i]), in_double<A>(squares[i]),
                          joined_mean, joined_m2);
          store_doubles<A>(mean, joined_mean), store_doubles<A>(m2, joined_m2);
        }
      });
      seen += double(rows);
    });
  }

  template <Activation kActivation, bool kOut>
  void gradient_sums(const MapGradients<T>& t, int64_t b) const {
    clear_sums(b);
    chunks(b, kLongChunk, [&](int64_t row, int64_t rows) {
      groups([&](auto vectors_at_once, int64_t c, int64_t n) {
        constexpr int N = decltype(vectors_at_once)::value;
        const int64_t each = N == 1 ? n : L;
        MapNorm<V> norm[N];
        for (int i = 0; i < N; ++i) norm[i] = kept(c + i * L);
        V grads[N] = {}, dots[N] = {};
        int64_t k = row * channels_ + c;
        for (int64_t r = 0; r < rows; ++r, k += channels_)
#pragma GCC unroll 4
          for (int i = 0; i < N; ++i) {
            V centred;
            const V g = Maps<T>::template before_activation<kActivation, kOut>(t, k + i * L, norm[i], each, centred);
            grads[i] += g, dots[i] += g * centred;
          }
        for (int i = 0; i < N; ++i) {
          double *sum = first_sum(b) + c + i * L, *dot = second_sum(b) + c + i * L;
          store_doubles<A>(sum, load_doubles<A>(sum) + in_double<A>(grads[i]));
          store_doubles<A>(dot, load_doubles<A>(dot) + in_double<A>(dots[i]));
        }
      });
    });
  }

  const int64_t channels_, pixels_, block_, blocks_, padded_;
  const Workspace sums_, norm_;
};

}  // namespace

namespace DK_ISA {

template <typename T>
void BatchNormAct<T>::training(const MapShape& shape, const T* z, const T* residual, const NormParameters<A>& norm,
                               T* out, A* mean, A* var, bool given, const Parallel& parallel) {
  const BatchNorm<A> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  auto run = [&](auto activation, auto has_residual) {
    constexpr Activation kActivation = decltype(activation)::value;
    constexpr bool kResidual = decltype(has_residual)::value;
    if (shape.channels_last) {
      PixelMaps<T> maps(shape);
      return maps.template training<kActivation, kResidual>(z, residual, batch_norm, out, mean, var, given, parallel);
    }
    parallel(shape.channels, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        ChannelMaps<T>::template training<kActivation, kResidual>(shape, c, z, residual, batch_norm, out, mean, var,
                                                                  given);
    });
  };
  with_constants(norm.activation, residual != nullptr, run);
}

template <typename T>
void BatchNormAct<T>::backward(const MapShape& shape, const MapGradients<T>& tensors, const BatchNorm<A>& norm,
                               const Parallel& parallel) {
  auto run = [&](auto activation, auto has_out) {
    constexpr Activation kActivation = decltype(activation)::value;
    constexpr bool kOut = decltype(has_out)::value;
    if (shape.channels_last) {
      PixelMaps<T> maps(shape);
      return maps.template backward<kActivation, kOut>(tensors, norm, parallel);
    }
    parallel(shape.channels, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c)
        ChannelMaps<T>::template backward<kActivation, kOut>(shape, c, tensors, norm);
    });
  };
  with_constants(norm.activation, tensors.out != nullptr, run);
}

template struct BatchNormAct<float>;
template struct BatchNormAct<double>;
template struct BatchNormAct<BFloat16Bits>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
