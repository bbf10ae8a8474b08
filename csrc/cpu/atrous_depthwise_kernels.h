// The vectorised kernels of the atrous depthwise convolution. Included once for each instruction set by
// atrous_depthwise_{portable,avx2,avx512}.cpp, which define DK_ISA.
//
// Every pass streams: a row of x is widened and packed once into a ring of kernel_h rows in the fast caches, a row of
// results is computed from the ring in registers and leaves through an epilogue (store; scale, shift, activate;
// statistics; gradients). NCHW vectors run over columns, NHWC vectors over channels. Training passes recompute the
// convolution instead of storing it: nine multiply-adds cost less than eight bytes of memory traffic.
#include <cstddef>

#include "simd.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename A>
struct Tap {
  const A* input;
  const A* weight;
};

DK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
DK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
DK_INLINE int64_t rounded_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// acc[b] = sum over taps of weight * input[offset + b*step]
template <typename A, bool kNhwc, int B>
DK_INLINE void accumulate(const Tap<A>* taps, int64_t count, int64_t offset, int64_t step, int64_t lane,
                          Vec<A> (&acc)[B]) {
  for (int b = 0; b < B; ++b) acc[b] = Vec<A>{};
  for (int64_t t = 0; t < count; ++t) {
    const A* input = taps[t].input + offset;
    const Vec<A> weight = kNhwc ? load(taps[t].weight + lane) : broadcast(*taps[t].weight);
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) acc[b] += weight * load(input + b * step);
  }
}

// sums[t][lane] += sum over k of grad[k*grad_step] * inputs[t][k*in_step]
template <typename A, int N>
DK_INLINE void dot_products(const A* const* inputs, const A* grad, int64_t count, int64_t in_step, int64_t grad_step,
                            A* const* sums) {
  Vec<A> sum[N];
  const A* input[N];
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) sum[t] = load(sums[t]), input[t] = inputs[t];
  for (int64_t k = 0; k < count; ++k) {
    const Vec<A> g = load(grad + k * grad_step);
#pragma GCC unroll 16
    for (int t = 0; t < N; ++t) sum[t] += g * load(input[t] + k * in_step);
  }
#pragma GCC unroll 16
  for (int t = 0; t < N; ++t) store(sums[t], sum[t]);
}
constexpr int kMostDots = 9;

// X: a vector or a scalar.
template <typename X>
DK_INLINE X activated(X z, Activation activation) {
  const X zero = {};
  if (activation == Activation::kNone) return z;
  z = z < zero ? zero : z;
  if (activation == Activation::kRelu6) z = z > zero + 6 ? zero + 6 : z;
  return z;
}

// The gradient through the activation at z; a choice, not a product, so that an infinite gradient is dropped too.
template <typename X>
DK_INLINE X masked(X grad, X z, Activation activation) {
  const X zero = {};
  if (activation == Activation::kNone) return grad;
  grad = z <= zero ? zero : grad;
  if (activation == Activation::kRelu6) grad = z >= zero + 6 ? zero : grad;
  return grad;
}

// Packed rows, found again by their row index.
template <typename A>
struct Ring {
  A* memory;
  int64_t* tags;
  int64_t slots, row_size;

  void clear() {
    for (int64_t i = 0; i < slots; ++i) tags[i] = -1;
  }
  A* slot(int64_t i) const { return memory + i * row_size; }

  // Slot that holds `row`, or -1.
  int64_t find(int64_t row) const {
    for (int64_t i = 0; i < slots; ++i)
      if (tags[i] == row) return i;
    return -1;
  }
  // A slot that holds none of the rows still needed.
  int64_t evict(const int64_t* needed, int64_t count) const {
    for (int64_t i = 0; i < slots; ++i) {
      bool free = true;
      for (int64_t k = 0; k < count; ++k) free = free && tags[i] != needed[k];
      if (free) return i;
    }
    return 0;  // not reached: there are as many slots as rows needed at once
  }
};

// Hands out parts of one block; with base null it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename E>
  E* take(int64_t count) {
    E* result = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
    used_ += size_t(rounded_up(count * int64_t(sizeof(E)), 64)) + 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

struct Task {
  int64_t group, image, band;
};
DK_INLINE Task task_of(int64_t index, int64_t images, int64_t bands) {
  return {index / (images * bands), index / bands % images, index % bands};
}

template <typename T, bool kNhwc>
class Worker {
 public:
  using A = typename AccumulateOf<T>::type;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  enum class Needs { kForward, kStatistics, kBackward };

  Worker(const Plan& plan, const T* x, const T* weight, Needs needs)
      : plan_(plan), s_(plan.shape), x_(x), weight_(weight) {
    const int64_t most = smaller(plan.group_channels, s_.channels) * s_.multiplier;
    parts_ = kNhwc ? 1 : s_.multiplier;
    row_lanes_ = kNhwc ? rounded_up(most, L) : 1;
    // Nothing to widen, pad or gather: the taps read x itself.
    direct_ = kNhwc && sizeof(T) == sizeof(A) && s_.multiplier == 1 && most == s_.channels && most % L == 0;
    Arena measure(nullptr);
    allocate(measure, needs);
    const size_t bytes = measure.used();
    void* memory = thread_scratch(bytes);
    Arena arena(memory);
    allocate(arena, needs);
    // What is never written must read as zero: padding, and the lanes beyond the last channel.
    __builtin_memset(memory, 0, bytes);
  }

  int64_t lanes() const { return kNhwc ? lanes_ : parts_; }
  int64_t first_channel() const { return first_; }
  int64_t channels() const { return count_; }

  void select(int64_t group) {
    if (group == group_) return;
    group_ = group;
    const int64_t in_channels = smaller(plan_.group_channels, s_.channels - group * plan_.group_channels);
    first_in_ = group * plan_.group_channels;
    first_ = first_in_ * s_.multiplier;
    count_ = in_channels * s_.multiplier;
    const int64_t taps = s_.taps();
    const T* weight = weight_ + first_ * taps;
    if constexpr (kNhwc) {
      lanes_ = row_lanes_;
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t l = 0; l < count_; ++l) weights_[t * lanes_ + l] = widen(weight[l * taps + t]);
        for (int64_t l = count_; l < lanes_; ++l) weights_[t * lanes_ + l] = 0;
      }
      // A narrower last group leaves the previous one's values in the lanes beyond it.
      if (count_ < lanes_ && !direct_)
        __builtin_memset(x_ring_.memory, 0, x_ring_.slots * x_ring_.row_size * sizeof(A));
    } else {
      for (int64_t i = 0; i < count_ * taps; ++i) weights_[i] = widen(weight[i]);
    }
    image_ = -1;
  }

  // scale, shift: normalisation and affine map as one multiply-add.
  void select_norm(const BatchNorm<A>& norm) {
    activation_ = norm.activation;
    for (int64_t l = 0; l < count_; ++l) {
      const int64_t c = first_ + l;
      const A inv = A(1) / __builtin_sqrt(norm.var[c] + A(norm.eps));
      const A scale = norm.gamma ? norm.gamma[c] * inv : inv;
      scale_[l] = scale;
      shift_[l] = (norm.beta ? norm.beta[c] : A(0)) - norm.mean[c] * scale;
      mean_[l] = norm.mean[c], inv_std_[l] = inv;
    }
    for (int64_t l = count_; l < row_lanes_; ++l) scale_[l] = shift_[l] = mean_[l] = inv_std_[l] = 0;
  }

  void forward(const Task& task, T* out, bool with_norm) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t position = band.begin; position < band.end; ++position) {
      const int64_t i = plan_.out_rows.rows[position];
      const int64_t rows = x_rows_of(i);
      for (int64_t part = 0; part < parts_; ++part) {
        T* row = out + out_offset(i, part);
        if (with_norm)
          convolve<false>(plan_.forward, rows, part, StoreActivated{*this, row, part});
        else
          convolve<false>(plan_.forward, rows, part, Store{*this, row});
      }
    }
  }

  // Adds the band's outputs to mean and m2 (sum of squared deviations) of each channel. kept: where to store them, or
  // null.
  void statistics(const Task& task, T* kept, double* mean, double* m2) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) mean[l] = m2[l] = 0;
    double seen = 0;
    for (int64_t position = band.begin; position < band.end; ++position) {
      const int64_t i = plan_.out_rows.rows[position];
      const int64_t rows = x_rows_of(i);
      for (int64_t part = 0; part < parts_; ++part) {
        convolve<true>(plan_.forward, rows, part, Keep{*this, y_});
        if (kept) store_row(y_, kept + out_offset(i, part));
        row_statistics(seen, mean + part, m2 + part);
      }
      seen += double(s_.out_w);
    }
  }

  // Sums over the band of g and of g * xhat for each channel; g is the gradient behind the activation.
  void gradient_sums(const Task& task, const T* grad_out, const T* y, double* sum, double* dot) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) sum[l] = dot[l] = 0;
    for (int64_t position = band.begin; position < band.end; ++position) {
      const int64_t i = plan_.out_rows.rows[position];
      const int64_t rows = y ? 0 : x_rows_of(i);
      for (int64_t part = 0; part < parts_; ++part) {
        convolution_row(i, part, rows, y);
        const A* g = grad_row(grad_out + out_offset(i, part));
        row_gradient_sums(g, part, sum + part, dot + part);
      }
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
    grad_ring_.clear();
    pass_ = pass;
    dot_updates_ = 0;
    if (pass.grad_weight) __builtin_memset(dots_, 0, s_.taps() * parts_ * dot_lanes() * sizeof(A));
    if (!pass.grad_x) {
      const IndexRange band = plan_.out_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end; ++position)
        fill_grad_slot(plan_.out_rows.rows[position], 0, true);
    } else {
      const IndexRange band = plan_.in_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end; ++position)
        grad_x_row(plan_.in_rows.rows[position], band.begin);
    }
    if (pass.grad_weight) flush_dots();
  }

 private:
  // ---- memory

  void allocate(Arena& arena, Needs needs) {
    const int64_t kh = s_.kernel_h, taps = s_.taps(), m = s_.multiplier;
    const int64_t most = kNhwc ? row_lanes_ : m;
    x_ring_ = {nullptr, nullptr, kh, kNhwc ? s_.in_w * row_lanes_ : plan_.x_row.size()};
    x_ring_.memory = arena.take<A>(direct_ ? 0 : x_ring_.slots * x_ring_.row_size);
    x_ring_.tags = arena.take<int64_t>(kh);
    weights_ = arena.take<A>(taps * most);
    taps_ = arena.take<Tap<A>>(taps * parts_);
    rows_ = arena.take<Row>(kh);
    needed_ = arena.take<int64_t>(kh);
    scale_ = arena.take<A>(most), shift_ = arena.take<A>(most);
    mean_ = arena.take<A>(most), inv_std_ = arena.take<A>(most);
    out_row_size_ = kNhwc ? s_.out_w * row_lanes_ : rounded_up(s_.out_w, kMostLanes) + kMostLanes;
    if (needs == Needs::kForward) return;
    y_ = arena.take<A>(out_row_size_);
    if (needs == Needs::kStatistics) return;
    g_ = arena.take<A>(out_row_size_);
    grad_ring_ = {nullptr, nullptr, kh, (kNhwc ? out_row_size_ : plan_.grad_row.size()) * parts_};
    grad_ring_.memory = arena.take<A>(grad_ring_.slots * grad_ring_.row_size);
    grad_ring_.tags = arena.take<int64_t>(kh);
    grad_rows_ = arena.take<Row>(kh);
    grad_needed_ = arena.take<int64_t>(kh);
    dots_ = arena.take<A>(taps * parts_ * dot_lanes());
    dx_ = arena.take<A>(kNhwc ? (m > 1 ? s_.in_w * row_lanes_ : 0) : rounded_up(s_.in_w, kMostLanes) + kMostLanes);
  }

  int64_t dot_lanes() const { return kNhwc ? row_lanes_ : L; }

  struct Row {
    int64_t tap;  // along the kernel's height
    const A* data;
  };

  // ---- addresses

  int64_t out_offset(int64_t i, int64_t part) const {
    return kNhwc ? (image_ * s_.out_h + i) * s_.out_w * s_.out_channels() + first_
                 : ((image_ * s_.out_channels() + first_ + part) * s_.out_h + i) * s_.out_w;
  }
  int64_t in_offset(int64_t h) const {
    return kNhwc ? (image_ * s_.in_h + h) * s_.in_w * s_.channels + first_in_
                 : ((image_ * s_.channels + first_in_) * s_.in_h + h) * s_.in_w;
  }

  void select_image(int64_t image) {
    image_ = image;
    x_ring_.clear();
  }

  // ---- packing

  void pack_x_row(int64_t h, A* dst) const {
    const T* src = x_ + in_offset(h);
    if constexpr (kNhwc) {
      if (s_.multiplier == 1) {
        if (count_ == s_.channels && count_ == lanes_) return copy_widened(src, dst, s_.in_w * count_);
        for (int64_t w = 0; w < s_.in_w; ++w) copy_widened(src + w * s_.channels, dst + w * lanes_, count_);
      } else {
        const int64_t m = s_.multiplier;
        for (int64_t w = 0; w < s_.in_w; ++w)
          for (int64_t c = 0; c < count_ / m; ++c) {
            const A value = widen(src[w * s_.channels + c]);
            for (int64_t q = 0; q < m; ++q) dst[w * lanes_ + c * m + q] = value;
          }
      }
    } else {
      const PackedRow& row = plan_.x_row;
      if (row.phases == 1) return copy_widened(src, dst - row.origin, row.columns);
      if (row.phases == 2) return deinterleave(src, dst);
      for (int64_t w = 0; w < row.columns; ++w) {
        const int64_t e = w - row.origin;
        dst[e % row.phases * row.phase_size + e / row.phases] = widen(src[w]);
      }
    }
  }

  void deinterleave(const T* src, A* dst) const {
    const PackedRow& row = plan_.x_row;
    const int64_t e = -row.origin;
    A* even = dst + e % 2 * row.phase_size + e / 2;
    A* odd = dst + (e + 1) % 2 * row.phase_size + (e + 1) / 2;
    int64_t w = 0;
    for (; w + 2 * L <= row.columns; w += 2 * L) {
      const V a = load(src + w), b = load(src + w + L);
      store(even + w / 2, every_second<0>(a, b));
      store(odd + w / 2, every_second<1>(a, b));
    }
    for (; w < row.columns; ++w) (w % 2 ? odd : even)[w / 2] = widen(src[w]);
  }

  // Fills rows_ with the input rows that output row i reads; returns their number.
  int64_t x_rows_of(int64_t i) {
    int64_t count = 0;
    for (int64_t u = 0; u < s_.kernel_h; ++u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h < 0 || h >= s_.in_h) continue;
      rows_[count].tap = u;
      needed_[count++] = h;
    }
    for (int64_t k = 0; k < count; ++k) {
      if (direct_) {
        // T is A here; the cast keeps the other instantiations compiling.
        rows_[k].data = reinterpret_cast<const A*>(x_ + in_offset(needed_[k]));
        continue;
      }
      int64_t slot = x_ring_.find(needed_[k]);
      if (slot < 0) {
        slot = x_ring_.evict(needed_, count);
        pack_x_row(needed_[k], x_ring_.slot(slot));
        x_ring_.tags[slot] = needed_[k];
      }
      rows_[k].data = x_ring_.slot(slot);
    }
    return count;
  }

  // ---- the convolution of one row

  int64_t collect(const Columns& columns, const Segment& segment, const Row* rows, int64_t count, const A* weights,
                  Tap<A>* taps) const {
    const int64_t pixel = kNhwc ? lanes_ : 1, stride = kNhwc ? lanes_ : 1;
    int64_t n = 0;
    for (int64_t k = 0; k < count; ++k)
      for (int64_t t = 0; t < segment.taps; ++t) {
        const ColumnTap& tap = columns.taps[segment.first_tap + t];
        taps[n++] = {rows[k].data + tap.input * pixel, weights + (rows[k].tap * s_.kernel_w + tap.tap) * stride};
      }
    return n;
  }

  template <bool kWholeVectors, typename Emit>
  void convolve(const Columns& columns, int64_t rows, int64_t part, const Emit& emit) {
    const A* weights = weights_ + part * s_.taps();
    for (int64_t i = 0; i < columns.count; ++i) {
      const Segment& segment = columns.segments[i];
      const int64_t taps = collect(columns, segment, rows_, rows, weights, taps_);
      run<kWholeVectors>(segment, taps, columns.input_step, emit);
    }
  }

  // kWholeVectors: emit may be given columns beyond the segment's end (NCHW).
  template <bool kWholeVectors, typename Emit>
  void run(const Segment& segment, int64_t taps, int64_t input_step, const Emit& emit) const {
    int64_t k = 0;
    if constexpr (kNhwc) {
      const int64_t step = input_step * lanes_;
      for (; k + 4 <= segment.count; k += 4) pixels<4>(segment, taps, k, step, emit);
      switch (segment.count - k) {
        case 3:
          return pixels<3>(segment, taps, k, step, emit);
        case 2:
          return pixels<2>(segment, taps, k, step, emit);
        case 1:
          return pixels<1>(segment, taps, k, step, emit);
      }
    } else {
      const int64_t n = segment.count;
      const int64_t end = kWholeVectors ? rounded_up(n, L) : n;
      for (; k + 4 * L <= end; k += 4 * L) block<4>(segment, taps, k, L, emit);
      switch ((end - k) / L) {
        case 3:
          block<3>(segment, taps, k, L, emit);
          break;
        case 2:
          block<2>(segment, taps, k, L, emit);
          break;
        case 1:
          block<1>(segment, taps, k, L, emit);
          break;
      }
      if (end % L == 0) return;
      // The last columns again in a whole vector: same sums, same values.
      if (n >= L)
        block<1>(segment, taps, n - L, L, emit);
      else
        block<1>(segment, taps, 0, n, emit);
    }
  }

  template <int B, typename Emit>
  DK_INLINE void pixels(const Segment& segment, int64_t taps, int64_t k, int64_t step, const Emit& emit) const {
    for (int64_t l = 0; l < lanes_; l += L) {
      V acc[B];
      accumulate<A, true, B>(taps_, taps, k * step + l, step, l, acc);
      emit.template operator()<B>(segment, k, l, acc, smaller(L, count_ - l));
    }
  }
  template <int B, typename Emit>
  DK_INLINE void block(const Segment& segment, int64_t taps, int64_t k, int64_t valid, const Emit& emit) const {
    V acc[B];
    accumulate<A, false, B>(taps_, taps, k, L, 0, acc);
    emit.template operator()<B>(segment, k, 0, acc, valid);
  }

  // ---- epilogues: element b of acc is output k + b (NHWC) or the vector of outputs k + b*L ... (NCHW)

  template <int B, typename Out>
  DK_INLINE void write(const Segment& segment, int64_t k, int64_t l, const V (&acc)[B], int64_t valid, Out* row,
                       int64_t pixel) const {
#pragma GCC unroll 4
    for (int b = 0; b < B; ++b) {
      Out* p = kNhwc ? row + (segment.begin + segment.step * (k + b)) * pixel + l : row + segment.begin + k + b * L;
      if (valid == L)
        store(p, acc[b]);
      else
        store_part(p, acc[b], valid);
    }
  }

  struct Store {
    const Worker& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const Segment& s, int64_t k, int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(s, k, l, acc, valid, row, w.s_.out_channels());
    }
  };

  struct StoreGradX {
    const Worker& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const Segment& s, int64_t k, int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(s, k, l, acc, valid, row, w.s_.channels);
    }
  };

  struct StoreActivated {
    const Worker& w;
    T* row;
    int64_t part;
    template <int B>
    DK_INLINE void operator()(const Segment& s, int64_t k, int64_t l, V (&acc)[B], int64_t valid) const {
      const V scale = kNhwc ? load(w.scale_ + l) : broadcast(w.scale_[part]);
      const V shift = kNhwc ? load(w.shift_ + l) : broadcast(w.shift_[part]);
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) acc[b] = activated(V(acc[b] * scale + shift), w.activation_);
      w.write(s, k, l, acc, valid, row, w.s_.out_channels());
    }
  };

  // Into a row of A, whole vectors.
  struct Keep {
    const Worker& w;
    A* row;
    template <int B>
    DK_INLINE void operator()(const Segment& s, int64_t k, int64_t l, const V (&acc)[B], int64_t) const {
      w.write(s, k, l, acc, L, row, w.lanes_);
    }
  };

  // Phase of a strided gradient: outputs of one segment side by side (NCHW).
  struct KeepPhase {
    const Worker& w;
    A* row;
    template <int B>
    DK_INLINE void operator()(const Segment&, int64_t k, int64_t, const V (&acc)[B], int64_t) const {
#pragma GCC unroll 4
      for (int b = 0; b < B; ++b) store(row + k + b * L, acc[b]);
    }
  };

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
  DK_INLINE static void put(T* p, V v, int64_t valid) {
    if (valid == L)
      store(p, v);
    else
      store_part(p, v, valid);
  }

  // A row of T tensors with the outputs' shape, widened; the result is valid until the next call.
  const A* grad_row(const T* src) { return widened_row(src, g_); }
  const A* widened_row(const T* src, A* memory) const {
    if constexpr (kNhwc) {
      for (int64_t j = 0; j < s_.out_w; ++j) copy_widened(src + j * s_.out_channels(), memory + j * lanes_, count_);
    } else {
      copy_widened(src, memory, s_.out_w);
    }
    return memory;
  }

  // ---- sums over a row

  void row_statistics(double seen, double* mean, double* m2) const {
    const double n = double(s_.out_w);
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < lanes_; l += L) {
        V sum = {};
        for (int64_t j = 0; j < s_.out_w; ++j) sum += load(y_ + j * lanes_ + l);
        const V centre = sum / A(n);
        V squares = {};
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V d = load(y_ + j * lanes_ + l) - centre;
          squares += d * d;
        }
        for (int64_t e = 0; e < L; ++e) merge(seen, n, centre[e], squares[e], mean[l + e], m2[l + e]);
      }
    } else {
      const int64_t whole = s_.out_w / L * L;
      V sums = {};
      for (int64_t j = 0; j < whole; j += L) sums += load(y_ + j);
      A sum = sum_of_lanes<A>(sums);
      for (int64_t j = whole; j < s_.out_w; ++j) sum += y_[j];
      const A centre = sum / A(n);
      V squares = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V d = load(y_ + j) - centre;
        squares += d * d;
      }
      A square = sum_of_lanes<A>(squares);
      for (int64_t j = whole; j < s_.out_w; ++j) square += (y_[j] - centre) * (y_[j] - centre);
      merge(seen, n, centre, square, *mean, *m2);
    }
  }

  void row_gradient_sums(const A* g, int64_t part, double* sum, double* dot) const {
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < lanes_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        V sums = {}, dots = {};
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_ + j * lanes_ + l);
          const V grad = masked(load(g + j * lanes_ + l), V(y * scale + shift), activation_);
          sums += grad, dots += grad * ((y - mean) * inv);
        }
        for (int64_t e = 0; e < L; ++e) sum[l + e] += sums[e], dot[l + e] += dots[e];
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const int64_t whole = s_.out_w / L * L;
      V sums = {}, dots = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_ + j);
        const V grad = masked(load(g + j), V(y * scale + shift), activation_);
        sums += grad, dots += grad * ((y - mean) * inv);
      }
      A sum_row = sum_of_lanes<A>(sums), dot_row = sum_of_lanes<A>(dots);
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g[j], y_[j] * scale + shift, activation_);
        sum_row += grad, dot_row += grad * ((y_[j] - mean) * inv);
      }
      *sum += sum_row, *dot += dot_row;
    }
  }

  // ---- backward

  // conv(x) of a row into y_: from y if it was kept, otherwise from the rows in rows_.
  void convolution_row(int64_t i, int64_t part, int64_t rows, const T* y) {
    if (y)
      widened_row(y + out_offset(i, part), y_);
    else
      convolve<true>(plan_.forward, rows, part, Keep{*this, y_});
  }

  // Gradient of conv(x) from the gradient of the activation's output, for row i of one part.
  void fill_grad_row(int64_t i, int64_t part, int64_t rows, A* dst) {
    const T* src = pass_.grad_out + out_offset(i, part);
    if (!pass_.with_norm) {
      widened_row(src, dst);
      return;
    }
    convolution_row(i, part, rows, pass_.y);
    const A* g = grad_row(src);
    const bool batch = pass_.batch_statistics;
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < lanes_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        const V mean_grad = load(pass_.mean_grad + l), mean_dot = load(pass_.mean_dot + l);
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_ + j * lanes_ + l);
          const V grad = masked(load(g + j * lanes_ + l), V(y * scale + shift), activation_);
          store(dst + j * lanes_ + l, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
        }
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const A mean_grad = pass_.mean_grad[part], mean_dot = pass_.mean_dot[part];
      const int64_t whole = s_.out_w / L * L;
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_ + j);
        const V grad = masked(load(g + j), V(y * scale + shift), activation_);
        store(dst + j, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
      }
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g[j], y_[j] * scale + shift, activation_);
        dst[j] = scale * (batch ? grad - mean_grad - (y_[j] - mean) * inv * mean_dot : grad);
      }
    }
  }

  // Row i of every part into the slot, and, where this band owns the row, its share of the weights' gradient.
  void fill_grad_slot(int64_t i, int64_t slot, bool owned) {
    const bool dots = pass_.grad_weight && owned;
    const bool needs_x = dots || (pass_.with_norm && !pass_.y);
    const int64_t rows = needs_x ? x_rows_of(i) : 0;
    for (int64_t part = 0; part < parts_; ++part) {
      A* row = grad_ring_.slot(slot) + part * (grad_ring_.row_size / parts_);
      if constexpr (!kNhwc) row -= plan_.grad_row.origin;
      fill_grad_row(i, part, rows, row);
      if (dots) row_dots(rows, part, row);
    }
    if (!dots) return;
    dot_updates_ += kNhwc ? s_.out_w : s_.out_w / L + 1;
    if (dot_updates_ > 512) flush_dots();  // float sums stay short
  }

  void row_dots(int64_t rows, int64_t part, const A* grad) {
    A* sums = dots_ + part * s_.taps() * dot_lanes();
    for (int64_t i = 0; i < plan_.forward.count; ++i) {
      const Segment& segment = plan_.forward.segments[i];
      // With the sums in the weights' place, the taps say what to multiply and where to add.
      const int64_t taps = collect_dots(segment, rows, sums);
      const A* g = grad + segment.begin * (kNhwc ? lanes_ : 1);
      for (int64_t t = 0; t < taps; t += kMostDots) dots(segment, taps_ + t, smaller(kMostDots, taps - t), g);
    }
  }

  int64_t collect_dots(const Segment& segment, int64_t rows, A* sums) const {
    const int64_t pixel = kNhwc ? lanes_ : 1;
    int64_t n = 0;
    for (int64_t k = 0; k < rows; ++k)
      for (int64_t t = 0; t < segment.taps; ++t) {
        const ColumnTap& tap = plan_.forward.taps[segment.first_tap + t];
        taps_[n++] = {rows_[k].data + tap.input * pixel, sums + (rows_[k].tap * s_.kernel_w + tap.tap) * dot_lanes()};
      }
    return n;
  }

  void dots(const Segment& segment, const Tap<A>* taps, int64_t count, const A* grad) {
    const A* inputs[kMostDots];
    A* sums[kMostDots];
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < lanes_; l += L) {
        for (int64_t t = 0; t < count; ++t) inputs[t] = taps[t].input + l, sums[t] = const_cast<A*>(taps[t].weight) + l;
        dispatch_dots(count, inputs, grad + l, segment.count, plan_.forward.input_step * lanes_, lanes_, sums);
      }
    } else {
      for (int64_t t = 0; t < count; ++t) inputs[t] = taps[t].input, sums[t] = const_cast<A*>(taps[t].weight);
      // A padded segment is the whole row, and the gradient's row is zero beyond its end.
      const int64_t whole = plan_.forward.padded ? (segment.count + L - 1) / L : segment.count / L;
      dispatch_dots(count, inputs, grad, whole, L, L, sums);
      for (int64_t k = whole * L; k < segment.count; ++k)
        for (int64_t t = 0; t < count; ++t) sums[t][0] += grad[k] * inputs[t][k];
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

  void grad_x_row(int64_t h, int64_t band_begin) {
    int64_t count = 0;
    for (int64_t u = 0; u < s_.kernel_h; ++u) {
      const int64_t i = tap_output(h, u, s_.stride_h, s_.rate_h, s_.pad_top, s_.out_h);
      if (i < 0) continue;
      grad_rows_[count].tap = u;
      grad_needed_[count++] = i;
    }
    for (int64_t k = 0; k < count; ++k) {
      int64_t slot = grad_ring_.find(grad_needed_[k]);
      if (slot < 0) {
        slot = grad_ring_.evict(grad_needed_, count);
        fill_grad_slot(grad_needed_[k], slot, owns(grad_needed_[k], band_begin));
        grad_ring_.tags[slot] = grad_needed_[k];
      }
      grad_rows_[k].data = grad_ring_.slot(slot);
    }
    const Columns& columns = plan_.transposed;
    T* out = pass_.grad_x + in_offset(h);
    for (int64_t i = 0; i < columns.count; ++i) {
      const Segment& segment = columns.segments[i];
      int64_t taps = 0;
      for (int64_t part = 0; part < parts_; ++part) {
        taps += collect(columns, segment, grad_rows_, count, weights_ + part * s_.taps(), taps_ + taps);
        if (part + 1 < parts_)
          for (int64_t k = 0; k < count; ++k) grad_rows_[k].data += grad_ring_.row_size / parts_;
      }
      for (int64_t k = 0; k < count; ++k) grad_rows_[k].data -= (parts_ - 1) * (grad_ring_.row_size / parts_);
      if constexpr (kNhwc) {
        if (s_.multiplier == 1)
          run<false>(segment, taps, columns.input_step, StoreGradX{*this, out});
        else
          run<true>(segment, taps, columns.input_step, Keep{*this, dx_});
      } else if (segment.step == 1) {
        run<false>(segment, taps, columns.input_step, StoreGradX{*this, out});
      } else {
        run<true>(segment, taps, columns.input_step, KeepPhase{*this, dx_});
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
    for (int64_t u = 0; u < s_.kernel_h; ++u) {
      const int64_t h = tap_input(i, u, s_.stride_h, s_.rate_h, s_.pad_top);
      if (h >= 0 && h < s_.in_h) return plan_.in_row_position[h] >= band_begin;
    }
    return false;
  }

 public:
  // Chan, Golub and LeVeque's update: (n values with this mean and m2) joins (seen values with mean and m2).
  DK_INLINE static void merge(double seen, double n, double add_mean, double add_m2, double& mean, double& m2) {
    const double delta = add_mean - mean, total = seen + n;
    mean += delta * (n / total);
    m2 += add_m2 + delta * delta * (seen * n / total);
  }

 private:
  const Plan& plan_;
  const DepthwiseShape& s_;
  const T* x_;
  const T* weight_;
  int64_t parts_, row_lanes_, out_row_size_ = 0;
  bool direct_;
  int64_t group_ = -1, image_ = -1, first_ = 0, first_in_ = 0, count_ = 0, lanes_ = 1;
  Activation activation_ = Activation::kNone;
  Ring<A> x_ring_{}, grad_ring_{};
  A *weights_ = nullptr, *scale_ = nullptr, *shift_ = nullptr, *mean_ = nullptr, *inv_std_ = nullptr;
  A *y_ = nullptr, *g_ = nullptr, *dots_ = nullptr, *dx_ = nullptr;
  Tap<A>* taps_ = nullptr;
  Row *rows_ = nullptr, *grad_rows_ = nullptr;
  int64_t *needed_ = nullptr, *grad_needed_ = nullptr;
  GradientPass pass_{};
  int64_t dot_updates_ = 0;
};

// Runs first(task) for every task, between(group) once a group's tasks are done, then second(task). With many groups a
// thread takes a whole group at a time, so that the second pass finds in its caches what the first one read.
template <typename MakeWorker, typename First, typename Between, typename Second>
void two_passes(int64_t groups, int64_t first_tasks, int64_t second_tasks, const Parallel& parallel,
                const MakeWorker& make_worker, const First& first, const Between& between, const Second& second) {
  if (groups >= 2 * parallel.threads()) {
    parallel(groups, [&](int64_t begin, int64_t end) {
      auto worker = make_worker();
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t t = 0; t < first_tasks; ++t) first(worker, g * first_tasks + t);
        between(worker, g);
        for (int64_t t = 0; t < second_tasks; ++t) second(worker, g * second_tasks + t);
      }
    });
    return;
  }
  parallel(groups * first_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t t = begin; t < end; ++t) first(worker, t);
  });
  parallel(groups, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t g = begin; g < end; ++g) between(worker, g);
  });
  parallel(groups * second_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker();
    for (int64_t t = begin; t < end; ++t) second(worker, t);
  });
}

template <typename T, bool kNhwc>
struct Passes {
  using A = typename AccumulateOf<T>::type;
  using W = Worker<T, kNhwc>;

  static void forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,
                      const Parallel& parallel) {
    const int64_t images = plan.shape.batch, bands = plan.out_rows.bands;
    parallel(plan.groups * images * bands, [&](int64_t begin, int64_t end) {
      W worker(plan, x, weight, W::Needs::kForward);
      int64_t group = -1;
      for (int64_t t = begin; t < end; ++t) {
        const Task task = task_of(t, images, bands);
        if (task.group != group) {
          worker.select(group = task.group);
          if (norm) worker.select_norm(*norm);
        }
        worker.forward(task, out, norm != nullptr);
      }
    });
  }

  // Lanes that any group's partial sums may take.
  static int64_t lanes_of(const Plan& plan) {
    const int64_t most = smaller(plan.group_channels, plan.shape.channels) * plan.shape.multiplier;
    return kNhwc ? rounded_up(most, kLanes<A>) : most;
  }

  static void training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y, A* mean,
                       A* var, const Parallel& parallel) {
    const DepthwiseShape& s = plan.shape;
    const int64_t images = s.batch, bands = plan.out_rows.bands, tasks = plan.out_tasks_per_group();
    const int64_t lanes = lanes_of(plan);
    const Workspace partials(size_t(plan.groups * tasks * lanes * 2) * sizeof(double) + 64);
    auto partial = [&](int64_t task) { return partials.as<double>() + task * lanes * 2; };
    two_passes(
        plan.groups, tasks, tasks, parallel, [&] { return W(plan, x, weight, W::Needs::kStatistics); },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, bands);
          worker.select(task.group);
          worker.statistics(task, y, partial(t), partial(t) + lanes);
        },
        [&](W& worker, int64_t group) {
          worker.select(group);
          for (int64_t l = 0; l < worker.channels(); ++l) {
            double seen = 0, centre = 0, m2 = 0;
            for (int64_t t = 0; t < tasks; ++t) {
              const double* part = partial(group * tasks + t);
              const IndexRange band = plan.out_rows.band(t % bands);
              const double n = double(band.end - band.begin) * double(s.out_w);
              if (n == 0) continue;
              W::merge(seen, n, part[l], part[lanes + l], centre, m2);
              seen += n;
            }
            mean[worker.first_channel() + l] = A(centre);
            var[worker.first_channel() + l] = A(m2 / seen);
          }
        },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, bands);
          worker.select(task.group);
          worker.select_norm(norm);
          worker.forward(task, out, true);
        });
  }

  static void backward(const Plan& plan, const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics,
                       const Parallel& parallel) {
    const DepthwiseShape& s = plan.shape;
    const int64_t images = s.batch, lanes = lanes_of(plan), taps = s.taps();
    const int64_t sum_tasks = norm ? plan.out_tasks_per_group() : 0;
    const RowOrder& rows = z.grad_x ? plan.in_rows : plan.out_rows;
    const bool gradients = z.grad_x || z.grad_weight;
    const int64_t tasks = gradients ? images * rows.bands : 0;
    const Workspace sum_partials(size_t(plan.groups * sum_tasks * lanes * 2) * sizeof(double) + 64);
    const Workspace weight_partials(size_t(z.grad_weight ? plan.groups * tasks * taps * lanes : 0) * sizeof(double) +
                                    64);
    const Workspace means(size_t(plan.groups * lanes * 2) * sizeof(A) + 64);
    auto sums_of = [&](int64_t task) { return sum_partials.as<double>() + task * lanes * 2; };
    auto weights_of = [&](int64_t task) { return weight_partials.as<double>() + task * taps * lanes; };
    auto means_of = [&](int64_t group) { return means.as<A>() + group * lanes * 2; };
    const double count = double(images) * double(s.out_h) * double(s.out_w);

    two_passes(
        plan.groups, sum_tasks, tasks, parallel, [&] { return W(plan, z.x, z.weight, W::Needs::kBackward); },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, plan.out_rows.bands);
          worker.select(task.group);
          worker.select_norm(*norm);
          worker.gradient_sums(task, z.grad_out, z.y, sums_of(t), sums_of(t) + lanes);
        },
        [&](W& worker, int64_t group) {
          worker.select(group);
          A* mean_grad = means_of(group);
          for (int64_t l = 0; l < lanes * 2; ++l) mean_grad[l] = 0;
          if (!norm) return;
          for (int64_t l = 0; l < worker.channels(); ++l) {
            double sum = 0, dot = 0;
            for (int64_t t = 0; t < sum_tasks; ++t) {
              const double* part = sums_of(group * sum_tasks + t);
              sum += part[l], dot += part[lanes + l];
            }
            z.grad_beta[worker.first_channel() + l] = A(sum);
            z.grad_gamma[worker.first_channel() + l] = A(dot);
            if (batch_statistics) mean_grad[l] = A(sum / count), mean_grad[lanes + l] = A(dot / count);
          }
        },
        [&](W& worker, int64_t t) {
          const Task task = task_of(t, images, rows.bands);
          worker.select(task.group);
          if (norm) worker.select_norm(*norm);
          double* grad_weight = z.grad_weight ? weights_of(t) : nullptr;
          if (grad_weight) __builtin_memset(grad_weight, 0, size_t(taps * lanes) * sizeof(double));
          worker.gradients(task, {z.grad_out, z.y, norm != nullptr, batch_statistics, means_of(task.group),
                                  means_of(task.group) + lanes, z.grad_x, grad_weight});
        });
    if (!z.grad_weight) return;

    parallel(plan.groups, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * plan.group_channels * s.multiplier;
        const int64_t channels = smaller(plan.group_channels * s.multiplier, s.out_channels() - first);
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t l = 0; l < channels; ++l) {
            double sum = 0;
            for (int64_t i = 0; i < tasks; ++i) sum += weights_of(g * tasks + i)[t * lanes + l];
            narrow(A(sum), z.grad_weight + (first + l) * taps + t);
          }
      }
    });
  }
};

}  // namespace

namespace DK_ISA {

template <typename T>
void Kernels<T>::forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,
                         const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::forward(plan, x, weight, norm, out, parallel);
  else
    Passes<T, false>::forward(plan, x, weight, norm, out, parallel);
}

template <typename T>
void Kernels<T>::training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y,
                          A* mean, A* var, const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::training(plan, x, weight, norm, out, y, mean, var, parallel);
  else
    Passes<T, false>::training(plan, x, weight, norm, out, y, mean, var, parallel);
}

template <typename T>
void Kernels<T>::backward(const Plan& plan, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,
                          bool batch_statistics, const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::backward(plan, tensors, norm, batch_statistics, parallel);
  else
    Passes<T, false>::backward(plan, tensors, norm, batch_statistics, parallel);
}

template struct Kernels<float>;
template struct Kernels<double>;
template struct Kernels<BFloat16Bits>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
