// All 3x3 rates of an atrous spatial pyramid over planes that hold x once.
//
// A task is a group of channels. Its planes of x are packed as the widest rate needs them; narrower rates read them
// further to the right. The rates follow one another and share all other memory, so that a core's caches hold x, one
// rate's planes and, in backward, the sum of the gradients of x, which goes to memory once.
//
// Passes over memory (X: x or one result): inference X + R X, training the same, backward X + R X + X; rate by rate
// they are 2 R X + X (the mean), 2 R X + X, and 2 R X + X + R X + (R - 1) 3 X.
//
// For atrous_depthwise/planes_*_kernels.cpp, which compile what the pyramid and the single convolution share once.
#pragma once

#include "../atrous_depthwise/planes.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, bool kNhwc>
class Pyramid : private Planes<T, kNhwc> {
  using Base = Planes<T, kNhwc>;
  using Base::active_;
  using Base::count_;
  using Base::cut_;
  using Base::first_;
  using Base::g_;
  using Base::kChannels;
  using Base::kColumn;
  using Base::kTile;
  using Base::kTileColumns;
  using Base::L;
  using Base::plane_;
  using Base::s_;
  using Base::size_;
  using Base::tile_;
  using Base::within;
  using Base::x_plane_;
  using Base::x_planes_;
  using Base::x_size_;
  using Base::y_planes_;
  using typename Base::Moments;
  using typename Base::V;

 public:
  using A = typename Base::A;
  using typename Base::Cut;
  using typename Base::Pass;

  static Cut cut(const PyramidShape& shape, Pass pass, int64_t threads) {
    Cut cut = Base::cut(widest(shape), pass, threads);
    if (pass != Pass::kInference && !cut.resident) cut.planes = 0;
    if (!kNhwc && shape.image().in_w < L) cut.planes = 0;  // the sums are stored by whole vectors
    return cut;
  }

  Pyramid(const PyramidShape& shape, Pass pass, const Cut& cut, bool sums)
      : Base(widest(shape), pass, cut, sums ? cut.planes * shape.image().batch * sum_size(shape.image()) : 0),
        shape_(shape),
        widest_(widest(shape)),
        widest_planes_(x_planes_) {}

  // sums: of each band's values, (N, bands, C); null: unwanted. norm: (R, C).
  void inference(int64_t task, const T* x, const T* weight, const BatchNorm<A>* norm, T* const* out, double* sums) {
    const int64_t n = task / cut_.bands % s_.batch, b = task % cut_.bands;
    this->select(task / (cut_.bands * s_.batch));
    use(widest_);
    const IndexRange rows = this->band(b, s_.out_h);
    const A* packed = this->pack_x(x, n, this->inputs_of(rows));
    if (sums) add_up(packed, rows, sums + (n * cut_.bands + b) * s_.channels);
    for (int64_t r = 0; r < shape_.count; ++r) {
      use(shape_.branches[r]);
      const A* planes = packed + (x_planes_ - widest_planes_);
      if (norm) {
        const BatchNorm<A> own = branch_norm(*norm, r);
        for (int64_t p = 0; p < active_; ++p) this->prepare_norm(own, p, own.mean, own.var);
        this->template to_memory<true, false>(planes, n, rows, weights(weight, r), own.activation, out[r]);
      } else {
        this->template to_memory<false, false>(planes, n, rows, weights(weight, r), Activation::kNone, out[r]);
      }
    }
  }

  // mean, var: (R, C), outputs.
  void training(int64_t task, const T* x, const T* weight, const BatchNorm<A>& norm, T* const* out, A* mean, A* var,
                double* sums) {
    this->select(task);
    pack(x, sums);
    for (int64_t r = 0; r < shape_.count; ++r) {
      use(shape_.branches[r]);
      for (int64_t p = 0; p < active_; ++p) {
        this->moments_[p] = Moments();
        this->load_weights(weights(weight, r), p);
        for (int64_t n = 0; n < s_.batch; ++n)
          this->statistics(x_planes_ + p * x_plane_ + n * x_size_, {0, s_.out_h}, y_planes_ + p * plane_ + n * size_,
                           this->moments_[p]);
      }
      const BatchNorm<A> own = branch_norm(norm, r);
      this->finish_moments(own, mean + r * s_.channels, var + r * s_.channels);
      for (int64_t n = 0; n < s_.batch; ++n) this->write_resident(n, own.activation, out[r]);
    }
  }

  void backward(int64_t task, const PyramidGradients<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    this->select(task);
    pack(z.x, nullptr);
    if (z.grad_x) begin_sums(z.grad_pooled);
    const int64_t channels = s_.channels;
    for (int64_t r = 0; r < shape_.count; ++r) {
      use(shape_.branches[r]);
      const BackwardTensors<T> branch{z.grad_out[r],
                                      z.x,
                                      weights(z.weight, r),
                                      nullptr,
                                      nullptr,
                                      z.grad_weight ? z.grad_weight + r * channels * 9 : nullptr,
                                      norm ? z.grad_gamma + r * channels : nullptr,
                                      norm ? z.grad_beta + r * channels : nullptr};
      BatchNorm<A> own{};
      if (norm) own = branch_norm(*norm, r);
      this->begin_gradients(norm ? &own : nullptr);
      this->resident_gradients(
          branch, norm ? &own : nullptr, batch_statistics, [](int64_t, int64_t) {}, [](int64_t, int64_t) {});
      if (z.grad_weight)
        for (int64_t p = 0; p < active_; ++p) this->write_grad_weight(p, branch.grad_weight);
      if (!z.grad_x) continue;
      for (int64_t n = 0; n < s_.batch; ++n)
        if (r + 1 < shape_.count)
          add_gradient_of_x<false>(n, branch.weight, nullptr);
        else
          add_gradient_of_x<true>(n, branch.weight, z.grad_x);
    }
  }

 private:
  // Taps of larger rates than the image has rows or columns lie outside, as those of this one do.
  static DepthwiseShape clipped(DepthwiseShape s) {
    s.rate_h = s.pad_top = smaller(s.rate_h, s.in_h);
    s.rate_w = s.pad_left = smaller(s.rate_w, s.in_w);
    return s;
  }
  static DepthwiseShape widest(const PyramidShape& shape) {
    DepthwiseShape s = shape.image();
    for (int64_t r = 1; r < shape.count; ++r) {
      s.rate_h = larger(s.rate_h, shape.branches[r].rate_h);
      s.rate_w = larger(s.rate_w, shape.branches[r].rate_w);
    }
    return clipped(s);
  }

  // What follows computes this branch.
  void use(const DepthwiseShape& branch) {
    s_ = clipped(branch);
    g_.taps[1] = s_.rate_w * kColumn, g_.taps[2] = 2 * s_.rate_w * kColumn;
    g_.grad_left = s_.rate_w * kColumn;
    x_planes_ = widest_planes_ + (widest_.rate_w - s_.rate_w) * kColumn;
  }

  const T* weights(const T* weight, int64_t r) const { return weight + r * s_.channels * 9; }
  BatchNorm<A> branch_norm(const BatchNorm<A>& norm, int64_t r) const {
    auto own = [&](const A* v) { return v ? v + r * s_.channels : nullptr; };
    return {own(norm.gamma), own(norm.beta), own(norm.mean), own(norm.var), norm.eps, norm.activation};
  }

  // All images, into planes; sums as in inference().
  void pack(const T* x, double* sums) {
    use(widest_);
    const IndexRange rows{0, s_.in_h};
    for (int64_t n = 0; n < s_.batch; ++n) {
      const A* packed = this->pack_x(x, n, rows);
      if (sums) add_up(packed, rows, sums + n * s_.channels);
    }
  }

  // packed: row 0 of the first plane.
  void add_up(const A* packed, IndexRange rows, double* sums) const {
    const int64_t whole = (g_.in_vectors - 1) * L;
    const V tail = load(this->tail_);
    for (int64_t p = 0; p < active_; ++p) {
      LaneSums<A, kNhwc, 1> total;
      for (int64_t h = rows.begin; h < rows.end; ++h) {
        const A* row = packed + p * x_plane_ + h * g_.x_pitch + g_.x_begin;
        V sum[4] = {within(load(row + whole), tail)};
        int64_t k = 0;
        for (; k + 4 * L <= whole; k += 4 * L)
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sum[i] += load(row + k + i * L);
        for (; k < whole; k += L) sum[0] += load(row + k);
        total.now[0] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
        total.added(g_.in_vectors);
      }
      total.finish();
      for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l)
        sums[first_ + p * kChannels + l] = total.lane[0][l];
    }
  }

  // ---- the sum of the gradients of x

  static int64_t sum_pitch(const DepthwiseShape& s) { return kNhwc ? s.in_w * L : rounded_up(s.in_w, L); }
  static int64_t sum_size(const DepthwiseShape& s) { return s.in_h * sum_pitch(s); }
  A* sum_plane(int64_t p, int64_t n) const { return this->further_ + (p * s_.batch + n) * sum_size(s_); }

  void begin_sums(const T* grad_pooled) {
    const A pixels = A(s_.in_h * s_.in_w);
    for (int64_t p = 0; p < active_; ++p)
      for (int64_t n = 0; n < s_.batch; ++n) {
        V start = {};
        for (int64_t l = 0; grad_pooled && l < kChannels && p * kChannels + l < count_; ++l)
          start[l] = widen(grad_pooled[n * s_.channels + first_ + p * kChannels + l]) / pixels;
        if constexpr (!kNhwc) start = broadcast(start[0]);
        A* sum = sum_plane(p, n);
        for (int64_t k = 0; k < sum_size(s_); k += L) store(sum + k, start);
      }
  }

  // The last branch's sum goes to memory.
  template <bool kLast>
  void add_gradient_of_x(int64_t n, const T* weight, T* grad_x) {
    const int64_t pitch = sum_pitch(s_);
    const int64_t last = kNhwc || !kLast ? (g_.in_vectors - 1) * L : s_.in_w - L;
    const A* grad = this->grad_planes_ + n * size_ + g_.grad_begin - g_.grad_left;
    if (active_ == 1) this->load_flipped_weights(weight, 0);
    this->tiles({0, s_.in_h}, g_.in_vectors, [&](auto rows_at_once, int64_t row, int64_t count, IndexRange columns) {
      constexpr int R = decltype(rows_at_once)::value;
      T* to = kLast ? grad_x + this->offset(n, row, s_.in_h, s_.in_w) : nullptr;
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1) this->load_flipped_weights(weight, p);
        A* sum = sum_plane(p, n) + row * pitch;
        A* tile = kLast && kNhwc ? tile_ + p * kTile - columns.begin * L : nullptr;
        this->template convolve<R, 1>(
            this->template sources<R, 1>(grad + p * plane_, g_.pitch, row - s_.rate_h, this->held()), g_.pitch, g_.taps,
            count, columns, last, [&](int64_t t, int64_t k, V(&acc)[R]) {
#pragma GCC unroll 4
              for (int i = 0; i < R; ++i) {
                A* so_far = sum + (t * R + i * s_.rate_h) * pitch + k;
                const V total = acc[i] + load(so_far);
                if constexpr (!kLast)
                  store(so_far, total);
                else if constexpr (kNhwc)
                  store(tile + i * kTileColumns * L + k, total);
                else
                  store(to + (t * R + i * s_.rate_h) * s_.in_w + k, total);
              }
            });
      }
      if constexpr (kLast && kNhwc)
        for (int i = 0; i < R; ++i)
          this->unpack(tile_ + i * kTileColumns * L, kTile, columns.end - columns.begin,
                       to + (i * s_.rate_h * s_.in_w + columns.begin) * s_.channels, [](V v, auto...) { return v; });
    });
  }

  const PyramidShape& shape_;
  const DepthwiseShape widest_;
  A* const widest_planes_;
};

// Calls run(pyramid, task) for all tasks; false where this code does not serve. sums: room for those of the gradients.
template <typename P, typename Run>
bool by_planes(const PyramidShape& shape, const typename P::Cut& cut, typename P::Pass pass, bool sums,
               const Parallel& parallel, const Run& run) {
  if (cut.planes == 0) return false;
  parallel(cut.tasks, [&](int64_t begin, int64_t end) {
    P pyramid(shape, pass, cut, sums);
    for (int64_t task = begin; task < end; ++task) run(pyramid, task);
  });
  return true;
}

// The sums of the bands of x, (N, bands, C), that the tasks leave, and the mean that they make.
template <typename T>
class Mean {
 public:
  Mean(const DepthwiseShape& image, int64_t bands, T* pooled)
      : image_(image),
        bands_(bands),
        pooled_(pooled),
        memory_(pooled ? size_t(image.batch * bands * image.channels) * sizeof(double) : 0) {}
  double* sums() const { return pooled_ ? memory_.as<double>() : nullptr; }
  void write() const {
    if (!pooled_) return;
    const double pixels = double(image_.in_h) * double(image_.in_w);
    for (int64_t n = 0; n < image_.batch; ++n)
      for (int64_t c = 0; c < image_.channels; ++c) {
        double sum = 0;
        for (int64_t b = 0; b < bands_; ++b) sum += sums()[(n * bands_ + b) * image_.channels + c];
        narrow(acc_t<T>(sum / pixels), pooled_ + n * image_.channels + c);
      }
  }

 private:
  const DepthwiseShape& image_;
  const int64_t bands_;
  T* const pooled_;
  const Workspace memory_;
};

template <typename T, bool kNhwc>
struct PyramidPasses {
  using A = acc_t<T>;
  using P = Pyramid<T, kNhwc>;
  using Pass = typename P::Pass;

  static bool inference(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>* norm, T* const* out,
                        T* pooled, const Parallel& parallel) {
    const auto cut = P::cut(shape, Pass::kInference, parallel.threads());
    const Mean<T> mean(shape.image(), cut.bands, pooled);
    if (!by_planes<P>(shape, cut, Pass::kInference, false, parallel,
                      [&](P& pyramid, int64_t task) { pyramid.inference(task, x, weight, norm, out, mean.sums()); }))
      return false;
    mean.write();
    return true;
  }

  static bool training(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm, T* const* out,
                       A* mean, A* var, T* pooled, const Parallel& parallel) {
    const auto cut = P::cut(shape, Pass::kTraining, parallel.threads());
    const Mean<T> image_mean(shape.image(), 1, pooled);
    if (!by_planes<P>(shape, cut, Pass::kTraining, false, parallel, [&](P& pyramid, int64_t task) {
          pyramid.training(task, x, weight, norm, out, mean, var, image_mean.sums());
        }))
      return false;
    image_mean.write();
    return true;
  }

  static bool backward(const PyramidShape& shape, const PyramidGradients<T>& z, const BatchNorm<A>* norm,
                       bool batch_statistics, const Parallel& parallel) {
    const auto cut = P::cut(shape, Pass::kBackward, parallel.threads());
    return by_planes<P>(shape, cut, Pass::kBackward, z.grad_x != nullptr, parallel,
                        [&](P& pyramid, int64_t task) { pyramid.backward(task, z, norm, batch_statistics); });
  }
};

}  // namespace

namespace DK_ISA {

template <typename T>
bool PyramidKernels<T>::inference(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>* norm,
                                  T* const* out, T* pooled, const Parallel& parallel) {
  if (shape.image().channels_last)
    return PyramidPasses<T, true>::inference(shape, x, weight, norm, out, pooled, parallel);
  return PyramidPasses<T, false>::inference(shape, x, weight, norm, out, pooled, parallel);
}

template <typename T>
bool PyramidKernels<T>::training(const PyramidShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm,
                                 T* const* out, A* mean, A* var, T* pooled, const Parallel& parallel) {
  if (shape.image().channels_last)
    return PyramidPasses<T, true>::training(shape, x, weight, norm, out, mean, var, pooled, parallel);
  return PyramidPasses<T, false>::training(shape, x, weight, norm, out, mean, var, pooled, parallel);
}

template <typename T>
bool PyramidKernels<T>::backward(const PyramidShape& shape, const PyramidGradients<T>& tensors,
                                 const BatchNorm<A>* norm, bool batch_statistics, const Parallel& parallel) {
  if (shape.image().channels_last)
    return PyramidPasses<T, true>::backward(shape, tensors, norm, batch_statistics, parallel);
  return PyramidPasses<T, false>::backward(shape, tensors, norm, batch_statistics, parallel);
}

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
