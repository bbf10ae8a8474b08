// The 3x3 atrous depthwise convolution of stride 1 and its training passes, by planes in a core's caches. For the
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

#include "microkernels.h"
#include "scratch.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

// Scratch memory of a thread: at most its share of the last level cache for resident planes, of the second level for
// bands.
constexpr int64_t kResidentBytes = 4 << 20;
constexpr int64_t kBandBytes = 384 << 10;
// Below this the channels alone do not keep the threads busy.
constexpr int64_t kFewestTasks = 8;

template <typename T, bool kNhwc>
class Planes {
 public:
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;
  static constexpr int64_t kColumn = kNhwc ? L : 1;    // values in a column of a plane
  static constexpr int64_t kChannels = kNhwc ? L : 1;  // channels in a plane
  static constexpr int64_t kMostPlanes = kNhwc ? 32 / L : 1;
  static constexpr int kRows = 4;
  static constexpr int64_t kTileColumns = 64;                      // NHWC
  static constexpr int64_t kTile = kRows * kTileColumns * L + 16;  // values, of one plane

  enum class Pass { kInference, kTraining, kBackward };

  // How the work is cut. planes: in a task; 0 where this code does not serve.
  struct Cut {
    int64_t planes, tasks, bands;
    bool resident;
  };

  static Cut cut(const DepthwiseShape& s, Pass pass, int64_t threads) {
    constexpr Cut kNone{0, 0, 0, false};
    if (s.kernel_h != 3 || s.kernel_w != 3 || s.multiplier != 1 || s.stride_h != 1 || s.stride_w != 1) return kNone;
    const int64_t bottom = s.out_h + 2 * s.rate_h - s.pad_top - s.in_h;
    const int64_t right = s.out_w + 2 * s.rate_w - s.pad_left - s.in_w;
    if (s.pad_top > 2 * s.rate_h || bottom < 0 || bottom > 2 * s.rate_h) return kNone;
    if (s.pad_left > 2 * s.rate_w || right < 0 || right > 2 * s.rate_w) return kNone;
    if (kNhwc ? s.out_w > s.in_w : smaller(s.in_w, s.out_w) < L) return kNone;
    const Geometry g(s);
    const int64_t row = g.pitch * int64_t(sizeof(A)),
                  image = g.slack * int64_t(sizeof(A)) + row * larger(s.in_h, s.out_h);
    auto tasks = [&](int64_t planes) { return (s.channels + planes * kChannels - 1) / (planes * kChannels); };
    if (pass == Pass::kInference) {
      const int64_t bands = bands_of(s, row * kMostPlanes, 2 * s.rate_h);
      return {kMostPlanes, tasks(kMostPlanes) * s.batch * bands, bands, false};
    }
    // Which passes run depends on the shape alone, so that the sums are the same for any number of threads; how many
    // planes a task takes does not change them.
    if (tasks(1) < kFewestTasks) return kNone;
    auto bytes = [&](int64_t planes) {
      return (pass == Pass::kBackward ? 2 * planes + 1 : planes + 1) * s.batch * image;
    };
    const bool resident = bytes(1) <= kResidentBytes;
    int64_t planes = kMostPlanes;
    while (planes > 1 && (tasks(planes) < 2 * threads || (resident && bytes(planes) > kResidentBytes))) planes /= 2;
    return {planes, tasks(planes), resident ? 1 : bands_of(s, 3 * row, 4 * s.rate_h), resident};
  }

  Planes(const DepthwiseShape& shape, Pass pass, const Cut& cut) : s_(shape), g_(shape), cut_(cut) {
    const int64_t band = (larger(s_.in_h, s_.out_h) + cut.bands - 1) / cut.bands;
    rows_ = cut.bands == 1 ? larger(s_.in_h, s_.out_h) : smaller(larger(s_.in_h, s_.out_h), band + 1 + 4 * s_.rate_h);
    size_ = rows_ * g_.pitch + g_.slack;
    plane_ = size_ * (cut.resident ? s_.batch : 1);
    Arena measure(nullptr);
    allocate(measure, pass);
    Arena arena(thread_scratch(measure.used()));
    allocate(arena, pass);
    const int64_t images = plane_ / size_;
    clear_padding(y_planes_, images * (pass == Pass::kTraining ? cut.planes + 1 : cut.planes), s_.pad_left, s_.in_w);
    if (pass == Pass::kBackward) clear_padding(grad_planes_, images * cut.planes, g_.grad_begin / kColumn, s_.out_w);
    const int64_t rest = kNhwc ? L : s_.out_w - (g_.out_vectors - 1) * L;
    for (int64_t l = 0; l < L; ++l) tail_[l] = l < rest ? A(1) : A(0);
  }

  // act(norm(conv(x))) of a group's band; norm null: conv(x).
  void inference(int64_t task, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const int64_t n = task / cut_.bands % s_.batch;
    select(task / (cut_.bands * s_.batch));
    if (norm)
      for (int64_t p = 0; p < active_; ++p) prepare_norm(*norm, p, norm->mean, norm->var);
    const Range rows = band(task % cut_.bands, s_.out_h);
    results(n, rows, x, weight, norm, out);
  }

  // out = act(bn(conv(x))) with the batch's statistics, which it returns too.
  void training(int64_t task, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, A* mean, A* var) {
    select(task);
    for (int64_t p = 0; p < active_; ++p) moments_[p] = Moments();
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t b = 0; b < cut_.bands; ++b) {
        const Range rows = band(b, s_.out_h), needed = inputs_of(rows);
        A* packed = at_row_0(x_planes_, n, needed);
        pack(x, n, needed, s_.in_h, s_.in_w, packed + s_.pad_left * kColumn);
        for (int64_t p = 0; p < active_; ++p) {
          load_weights(weight, p);
          // Over x of the plane before, which is no longer needed; not over its padding.
          statistics(packed + p * plane_, rows, at_row_0(y_planes_ + p * plane_, n, rows) + y_left(), moments_[p]);
        }
      }
    const double count = double(s_.batch) * double(s_.out_h) * double(s_.out_w);
    for (int64_t p = 0; p < active_; ++p) {
      for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l) {
        mean[first_ + p * L + l] = A(moments_[p].mean[l]);
        var[first_ + p * L + l] = A(moments_[p].m2[l] / count);
      }
      prepare_norm(norm, p, mean, var);
    }
    for (int64_t n = 0; n < s_.batch; ++n)
      if (cut_.resident)
        for (int64_t i = 0; i < s_.out_h; ++i)
          write_activated(at_row_0(y_planes_, n, {0, 0}) + y_left() + i * g_.pitch, norm.activation,
                          out + offset(n, i, s_.out_h, s_.out_w));
      else
        for (int64_t b = 0; b < cut_.bands; ++b) results(n, band(b, s_.out_h), x, weight, &norm, out);
  }

  // norm null: gradients of the convolution alone.
  void backward(int64_t task, const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    select(task);
    for (int64_t p = 0; p < active_; ++p) {
      sums_[p] = Sums<2>(), weight_sums_[p] = Sums<9>();
      if (norm) prepare_norm(*norm, p, norm->mean, norm->var);
    }
    if (cut_.resident)
      backward_resident(z, norm, batch_statistics);
    else
      backward_by_bands(z, norm, batch_statistics);
    if (z.grad_weight)
      for (int64_t p = 0; p < active_; ++p) write_grad_weight(p, z.grad_weight);
  }

 private:
  struct Range {
    int64_t begin, end;
  };
  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  // Row h of an x plane holds pad_left zeros and the image's row, a row of a gradient plane grad_left zeros and the
  // gradient's: the zeros right of a row are those left of the next. Rows above and below the image are not stored but
  // skipped.
  struct Geometry {
    int64_t out_vectors, in_vectors;  // in a row
    int64_t pitch;                    // from row to row, in values
    int64_t slack;                    // values read behind the last row
    int64_t grad_left, grad_begin;    // the gradient's first column lies on a vector's boundary
    explicit Geometry(const DepthwiseShape& s) {
      const int64_t right = s.out_w + 2 * s.rate_w - s.pad_left - s.in_w, grad_right = 2 * s.rate_w - right;
      grad_left = (2 * s.rate_w - s.pad_left) * kColumn;
      grad_begin = rounded_up(grad_left, L);
      out_vectors = kNhwc ? s.out_w : (s.out_w + L - 1) / L;
      in_vectors = kNhwc ? s.in_w : (s.in_w + L - 1) / L;
      int64_t columns = larger(s.in_w + larger(s.pad_left, right), s.out_w + larger(grad_left / kColumn, grad_right));
      // The last vector of a row may reach beyond it, but not into the next.
      if (!kNhwc) columns = rounded_up(larger(columns, larger(out_vectors, in_vectors) * L), L);
      pitch = columns * kColumn;
      if (pitch * int64_t(sizeof(A)) % 1024 == 0) pitch += L;  // neighbouring rows in different sets of the cache
      slack = rounded_up((2 * s.rate_w + 2 * L) * kColumn + 2 * L, 16);
    }
  };

  static int64_t bands_of(const DepthwiseShape& s, int64_t row_bytes, int64_t halo) {
    // Not below twice the rows that neighbouring bands share.
    const int64_t rows = larger(kBandBytes / row_bytes, 2 * halo), most = larger(s.in_h, s.out_h);
    return rows * 4 >= most * 3 ? 1 : (most + rows - 1) / rows;
  }
  Range band(int64_t b, int64_t rows) const { return {rows * b / cut_.bands, rows * (b + 1) / cut_.bands}; }

  // Rows of x that these results read, and rows of results that these rows of x touch.
  Range inputs_of(Range rows) const {
    return clipped({rows.begin - s_.pad_top, rows.end - s_.pad_top + 2 * s_.rate_h}, s_.in_h);
  }
  Range outputs_of(Range rows) const {
    return clipped({rows.begin + s_.pad_top - 2 * s_.rate_h, rows.end + s_.pad_top}, s_.out_h);
  }
  static Range clipped(Range r, int64_t rows) {
    const int64_t begin = smaller(larger(r.begin, 0), rows);
    return {begin, larger(begin, smaller(r.end, rows))};
  }

  void allocate(Arena& arena, Pass pass) {
    const bool backward = pass == Pass::kBackward;
    // Training: one more, from which on y is written while x is still read one plane further.
    y_planes_ = arena.take<A>(plane_ * (pass == Pass::kTraining ? cut_.planes + 1 : cut_.planes));
    x_planes_ = pass == Pass::kTraining ? y_planes_ + plane_ : y_planes_;
    grad_planes_ = arena.take<A>(backward ? plane_ * cut_.planes : 0);
    y_plane_ = arena.take<A>(backward ? plane_ : 0);
    tile_ = arena.take<A>(kNhwc ? cut_.planes * kTile : 0);
    norm_ = arena.take<Norm>(cut_.planes);
    moments_ = arena.take<Moments>(cut_.planes);
    sums_ = arena.take<Sums<2>>(cut_.planes);
    weight_sums_ = arena.take<Sums<9>>(cut_.planes);
  }

  void clear_padding(A* planes, int64_t images, int64_t left, int64_t columns) const {
    const int64_t begin = left * kColumn, end = begin + columns * kColumn;
    for (int64_t i = 0; i < images; ++i) {
      A* image = planes + i * size_;
      for (int64_t h = 0; h < rows_; ++h) {
        __builtin_memset(image + h * g_.pitch, 0, size_t(begin) * sizeof(A));
        if (end < g_.pitch) __builtin_memset(image + h * g_.pitch + end, 0, size_t(g_.pitch - end) * sizeof(A));
      }
      __builtin_memset(image + rows_ * g_.pitch, 0, size_t(g_.slack) * sizeof(A));
    }
  }

  // The memory of image n, of which only `rows` are held, as if it began with row 0.
  A* at_row_0(A* planes, int64_t n, Range rows) const {
    return planes + (cut_.resident ? n * size_ : -rows.begin * g_.pitch);
  }

  void select(int64_t group) {
    first_ = group * cut_.planes * kChannels;
    count_ = smaller(cut_.planes * kChannels, s_.channels - first_);
    active_ = (count_ + kChannels - 1) / kChannels;
  }

  // Of an image's row in memory, at the task's first channel.
  int64_t offset(int64_t n, int64_t row, int64_t rows, int64_t columns) const {
    return kNhwc ? (n * rows + row) * columns * s_.channels + first_
                 : ((n * s_.channels + first_) * rows + row) * columns;
  }

  // ---- between memory and planes

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

  // to: the first column of row 0 of the first plane.
  void pack(const T* src, int64_t n, Range range, int64_t rows, int64_t columns, A* to) const {
    for (int64_t h = range.begin; h < range.end; ++h) {
      const T* row = src + offset(n, h, rows, columns);
      A* plane_row = to + h * g_.pitch;
      if constexpr (kNhwc) {
        const int64_t pixel = s_.channels;
        whole_planes([&](auto planes_at_once, int64_t first) {
          constexpr int P = decltype(planes_at_once)::value;
          const T* from = row + first * L;
          A* column = plane_row + first * plane_;
          for (int64_t w = 0; w < columns; ++w, from += pixel, column += L)
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) store(column + p * plane_, load(from + p * L));
        });
        if (const int64_t rest = count_ % L) {
          const int64_t p = count_ / L;
          for (int64_t w = 0; w < columns; ++w)
            store(plane_row + p * plane_ + w * L, load_part(row + p * L + w * pixel, rest));
        }
      } else {
        copy_widened(row, plane_row, columns);
      }
    }
  }

  // A row of the planes, `distance` apart, to memory; each vector through f(v, plane).
  template <typename F>
  DK_INLINE void unpack(const A* planes, int64_t distance, int64_t columns, T* row, const F& f) const {
    const int64_t pixel = s_.channels;
    whole_planes([&](auto planes_at_once, int64_t first) {
      constexpr int P = decltype(planes_at_once)::value;
      const A* from = planes + first * distance;
      T* to = row + first * L;
      for (int64_t w = 0; w < columns; ++w, from += L, to += pixel)
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) store(to + p * L, f(load(from + p * distance), first + p));
    });
    if (const int64_t rest = count_ % L) {
      const int64_t p = count_ / L;
      for (int64_t w = 0; w < columns; ++w)
        store_part(row + p * L + w * pixel, f(load(planes + p * distance + w * L), p), rest);
    }
  }

  // ---- weights and normalisation of one plane

  void load_weights(const T* weight, int64_t p) {
    for (int t = 0; t < 9; ++t) {
      if constexpr (kNhwc) {
        for (int64_t l = 0; l < L; ++l) {
          const int64_t c = first_ + p * L + l;
          weights_[t][l] = c < s_.channels ? widen(weight[c * 9 + t]) : A(0);
        }
      } else {
        weights_[t] = broadcast(widen(weight[first_ * 9 + t]));
      }
    }
  }
  // For the transposed convolution.
  void load_flipped_weights(const T* weight, int64_t p) {
    load_weights(weight, p);
    for (int t = 0; t < 4; ++t) {
      const V first = weights_[t];
      weights_[t] = weights_[8 - t], weights_[8 - t] = first;
    }
  }

  struct Norm {
    V scale, shift, mean, inv_std;  // z = y * scale + shift
    V mean_grad, mean_dot;          // sums of g and of g * xhat over the batch, divided by its size
  };

  void prepare_norm(const BatchNorm<A>& norm, int64_t p, const A* mean, const A* var) {
    Norm& n = norm_[p];
    for (int64_t l = 0; l < kChannels; ++l) {
      const int64_t c = first_ + p * kChannels + l;
      if (c >= s_.channels) {
        n.scale[l] = n.shift[l] = n.mean[l] = n.inv_std[l] = 0;
        continue;
      }
      const A inv = A(1) / __builtin_sqrt(var[c] + A(norm.eps));
      n.inv_std[l] = inv, n.mean[l] = mean[c];
      n.scale[l] = norm.gamma ? norm.gamma[c] * inv : inv;
      n.shift[l] = (norm.beta ? norm.beta[c] : A(0)) - mean[c] * n.scale[l];
    }
    if constexpr (!kNhwc) {
      n.scale = broadcast(n.scale[0]), n.shift = broadcast(n.shift[0]);
      n.mean = broadcast(n.mean[0]), n.inv_std = broadcast(n.inv_std[0]);
    }
  }

  // ---- rows

  // Calls f(Count<R>, row, vectors) for tiles of R rows row, row + rate, ... and some vectors of columns, few enough
  // for what they read to stay in the first-level cache.
  template <typename F>
  DK_INLINE void tiles(Range range, int64_t vectors, const F& f) const {
    const int64_t rate = s_.rate_h, most = kNhwc ? kTileColumns : vectors;
    for (int64_t base = range.begin; base < range.end; base += kRows * rate)
      for (int64_t begin = 0; begin < vectors; begin += most) {
        const Range columns{begin, smaller(vectors, begin + most)};
        for (int64_t row = base; row < smaller(range.end, base + rate); ++row)
          switch (smaller(kRows, (range.end - row + rate - 1) / rate)) {
            case 4:
              f(Count<4>(), row, columns);
              break;
            case 3:
              f(Count<3>(), row, columns);
              break;
            case 2:
              f(Count<2>(), row, columns);
              break;
            default:
              f(Count<1>(), row, columns);
          }
      }
  }

  // The source rows first, first + rate ... that R rows of results read; those in [begin, end) lie inside the image.
  template <int R>
  struct Sources {
    const A* data;
    int64_t step;
    int begin, end;
    bool whole() const { return begin == 0 && end == R + 2; }
  };
  template <int R>
  DK_INLINE Sources<R> sources(const A* plane, int64_t first, int64_t rows) const {
    const int64_t rate = s_.rate_h;
    const int64_t below = first < 0 ? (-first + rate - 1) / rate : 0;
    const int64_t inside = first < rows ? (rows - first + rate - 1) / rate : 0;
    return {plane + first * g_.pitch, rate * g_.pitch, int(smaller(below, R + 2)), int(smaller(inside, R + 2))};
  }

  // emit(k, acc): acc[r] is the vector of results at column offset k of row r. The last vector of a row lies at `last`.
  template <int R, typename Emit>
  DK_INLINE void convolve(const Sources<R>& from, Range vectors, int64_t last, const Emit& emit) const {
    if (R == kRows && from.whole())
      convolve<R, R == kRows>(from, vectors, last, emit);
    else
      convolve<R, false>(from, vectors, last, emit);
  }
  template <int R, bool kWhole, typename Emit>
  DK_INLINE void convolve(const Sources<R>& from, Range vectors, int64_t last, const Emit& emit) const {
    const int64_t tap = s_.rate_w * kColumn;
    V weight[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight[t] = weights_[t];
    for (int64_t n = vectors.begin; n < vectors.end; ++n) {
      const int64_t k = kNhwc ? n * L : smaller(n * L, last);
      V acc[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) acc[r] = V{};
#pragma GCC unroll 6
      for (int c = 0; c < R + 2; ++c) {
        if (!kWhole && (c < from.begin || c >= from.end)) continue;
        const A* row = from.data + c * from.step + k;
#pragma GCC unroll 3
        for (int v = 0; v < 3; ++v) {
          const V input = load(row + v * tap);
#pragma GCC unroll 3
          for (int u = 0; u < 3; ++u)
            if (c - u >= 0 && c - u < R) acc[c - u] += weight[3 * u + v] * input;
        }
      }
      emit(k, acc);
    }
  }

  // Sums of floats stay short: they move into doubles after some hundred terms.
  template <int N>
  struct Sums {
    V now[N];
    double lane[N][L];
    int64_t terms = 0;
    Sums() {
      for (int i = 0; i < N; ++i) {
        now[i] = V{};
        for (int64_t l = 0; l < L; ++l) lane[i][l] = 0;
      }
    }
    DK_INLINE void added(int64_t count) {
      terms += count;
      if (terms >= 512) flush();
    }
    __attribute__((noinline)) void flush() {
      for (int i = 0; i < N; ++i) {
        for (int64_t l = 0; l < L; ++l) lane[i][l] += double(now[i][l]);
        now[i] = V{};
      }
      terms = 0;
    }
    // NCHW: the lanes are columns of one channel.
    void finish() {
      flush();
      if constexpr (!kNhwc)
        for (int i = 0; i < N; ++i) {
          double sum = 0;
          for (int64_t l = 0; l < L; ++l) sum += lane[i][l];
          for (int64_t l = 0; l < L; ++l) lane[i][l] = sum;
        }
    }
  };

  // Lanes beyond the end of the row become zero, whatever they hold.
  DK_INLINE static V within(V v, V tail) { return tail > V{} ? v : V{}; }

  // ---- forward

  // Where in a row of an x plane y lies (NHWC, where it replaces x; NCHW planes of y have no padding to keep).
  int64_t y_left() const { return kNhwc ? s_.pad_left * kColumn : 0; }

  struct Moments {
    double seen = 0, mean[L] = {}, m2[L] = {};
  };

  // y = conv(x), whose values join the moments.
  void statistics(const A* x, Range rows, A* y, Moments& moments) const {
    const int64_t last = (g_.out_vectors - 1) * L;
    const V tail = load(tail_);
    Sums<1> total;
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* to = y + row * g_.pitch;
      const int64_t step = s_.rate_h * g_.pitch;
      V sum = total.now[0];
      convolve<R>(sources<R>(x, row - s_.pad_top, s_.in_h), columns, last, [&](int64_t k, V(&acc)[R]) {
        V together = {};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store(to + r * step + k, acc[r]), together += acc[r];
        sum += kNhwc || k < last ? together : within(together, tail);
      });
      total.now[0] = sum, total.added(R * (columns.end - columns.begin));
    });
    total.finish();
    // The squares about the mean, which is rounded: what is left of it is subtracted.
    const double count = double(rows.end - rows.begin) * double(s_.out_w);
    V centre;
    for (int64_t l = 0; l < L; ++l) centre[l] = A(total.lane[0][l] / count);
    Sums<2> deviations;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      const A* row = y + i * g_.pitch;
      V square[2] = {}, rest[2] = {};
      int64_t k = 0;
      for (; k + L < last; k += 2 * L)
#pragma GCC unroll 2
        for (int e = 0; e < 2; ++e) {
          const V d = load(row + k + e * L) - centre;
          square[e] += d * d, rest[e] += d;
        }
      for (; k <= last; k += L) {
        V d = load(row + k) - centre;
        if (!kNhwc && k == last) d = within(d, tail);
        square[0] += d * d, rest[0] += d;
      }
      deviations.now[0] += square[0] + square[1], deviations.now[1] += rest[0] + rest[1];
      deviations.added(g_.out_vectors);
    }
    deviations.finish();
    for (int64_t l = 0; l < kChannels; ++l) {
      const double rest = deviations.lane[1][l] / count, m2 = deviations.lane[0][l] - rest * rest * count;
      merge(moments.seen, count, double(centre[l]) + rest, m2 < 0 ? 0 : m2, moments.mean[l], moments.m2[l]);
    }
    moments.seen += count;
  }

  // y: a row of the first plane; out: that row in memory.
  void write_activated(const A* y, Activation activation, T* out) const {
    if constexpr (kNhwc) {
      unpack(y, plane_, s_.out_w, out,
             [&](V v, int64_t p) { return activated(V(v * norm_[p].scale + norm_[p].shift), activation); });
    } else {
      const V scale = norm_[0].scale, shift = norm_[0].shift;
      for (int64_t n = 0; n < g_.out_vectors; ++n) {
        const int64_t k = n + 1 < g_.out_vectors ? n * L : s_.out_w - L;
        store(out + k, activated(V(load(y + k) * scale + shift), activation));
      }
    }
  }

  void results(int64_t n, Range rows, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const Range needed = inputs_of(rows);
    A* planes = at_row_0(x_planes_, n, needed);
    pack(x, n, needed, s_.in_h, s_.in_w, planes + s_.pad_left * kColumn);
    const Convolution c{planes, s_.in_h, -s_.pad_top, g_.out_vectors, s_.out_w, s_.out_h};
    if (norm)
      convolve_to_memory<true>(c, n, rows, weight, out, false, norm->activation);
    else
      convolve_to_memory<false>(c, n, rows, weight, out, false, Activation::kNone);
  }

  struct Convolution {
    const A* planes;                 // row 0 of the source
    int64_t source_rows;             // of the image
    int64_t first;                   // the first row that result 0 reads
    int64_t vectors, columns, rows;  // of the result
  };

  // NHWC: the rows of a tile go through memory of their own, so that cache lines of the result are written whole.
  template <bool kNorm>
  void convolve_to_memory(const Convolution& c, int64_t n, Range rows, const T* weight, T* out, bool flipped,
                          Activation activation) {
    if (active_ == 1) flipped ? load_flipped_weights(weight, 0) : load_weights(weight, 0);
    tiles(rows, c.vectors, [&](auto rows_at_once, int64_t row, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      T* to = out + offset(n, row, c.rows, c.columns);
      const int64_t step = s_.rate_h * c.columns;
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1) flipped ? load_flipped_weights(weight, p) : load_weights(weight, p);
        const V scale = norm_[p].scale, shift = norm_[p].shift;
        A* tile = tile_ + p * kTile - columns.begin * L;
        convolve<R>(sources<R>(c.planes + p * plane_, row + c.first, c.source_rows), columns,
                    kNhwc ? (c.vectors - 1) * L : c.columns - L, [&](int64_t k, V(&acc)[R]) {
#pragma GCC unroll 4
                      for (int r = 0; r < R; ++r) {
                        if constexpr (kNorm) acc[r] = activated(V(acc[r] * scale + shift), activation);
                        if constexpr (kNhwc)
                          store(tile + r * kTileColumns * L + k, acc[r]);
                        else
                          store(to + r * step + k, acc[r]);
                      }
                    });
      }
      if constexpr (kNhwc)
        for (int r = 0; r < R; ++r)
          unpack(tile_ + r * kTileColumns * L, kTile, columns.end - columns.begin,
                 to + (r * step + columns.begin) * s_.channels, [](V v, int64_t) { return v; });
    });
  }

  // ---- backward

  void backward_resident(const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    const Range in{0, s_.in_h}, out{0, s_.out_h};
    for (int64_t n = 0; n < s_.batch; ++n) {
      pack(z.x, n, in, s_.in_h, s_.in_w, x_planes_ + n * size_ + s_.pad_left * kColumn);
      pack(z.grad_out, n, out, s_.out_h, s_.out_w, grad_planes_ + n * size_ + g_.grad_begin);
    }
    for (int64_t p = 0; p < active_; ++p) {
      const A* x = x_planes_ + p * plane_;
      A* grad = grad_planes_ + p * plane_ + g_.grad_begin;
      if (norm) {
        load_weights(z.weight, p);
        for (int64_t n = 0; n < s_.batch; ++n)
          gradient_sums(norm->activation, x + n * size_, out, y_plane_ + n * size_, grad + n * size_, p);
        finish_sums(p, batch_statistics, z);
      }
      for (int64_t n = 0; n < s_.batch; ++n)
        gradient_of_convolution<true>(norm, batch_statistics, x + n * size_, out, y_plane_ + n * size_,
                                      grad + n * size_, p);
    }
    if (z.grad_x)
      for (int64_t n = 0; n < s_.batch; ++n) gradient_of_x(z, n, in, grad_planes_ + n * size_);
  }

  void backward_by_bands(const BackwardTensors<T>& z, const BatchNorm<A>* norm, bool batch_statistics) {
    if (norm) {
      for (int64_t n = 0; n < s_.batch; ++n)
        for (int64_t b = 0; b < cut_.bands; ++b) masked_gradient(z, *norm, n, band(b, s_.out_h));
      for (int64_t p = 0; p < active_; ++p) finish_sums(p, batch_statistics, z);
    }
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t b = 0; b < cut_.bands; ++b) {
        const Range rows = band(b, s_.in_h), touched = outputs_of(rows), needed = inputs_of(touched);
        // Each row's products with x are summed in one band.
        const Range owned{b == 0 ? touched.begin : owner_begins(rows.begin),
                          b + 1 == cut_.bands ? touched.end : owner_begins(rows.end)};
        const A* x = at_row_0(x_planes_, n, needed);
        A* y = at_row_0(y_plane_, n, touched);
        A* grad = at_row_0(grad_planes_, n, touched);
        pack(z.x, n, needed, s_.in_h, s_.in_w, at_row_0(x_planes_, n, needed) + s_.pad_left * kColumn);
        pack(z.grad_out, n, touched, s_.out_h, s_.out_w, grad + g_.grad_begin);
        for (int64_t p = 0; p < active_; ++p) {
          A* g = grad + p * plane_ + g_.grad_begin;
          if (norm) {
            load_weights(z.weight, p);
            const Sums<2> sums = sums_[p];  // these rows have been counted
            gradient_sums(norm->activation, x + p * plane_, touched, y, g, p);
            sums_[p] = sums;
          }
          gradient_of_convolution<false>(norm, batch_statistics, x + p * plane_, {touched.begin, owned.begin}, y, g, p);
          gradient_of_convolution<true>(norm, batch_statistics, x + p * plane_, owned, y, g, p);
          gradient_of_convolution<false>(norm, batch_statistics, x + p * plane_, {owned.end, touched.end}, y, g, p);
        }
        if (z.grad_x) gradient_of_x(z, n, rows, grad);
      }
  }
  int64_t owner_begins(int64_t row) const { return smaller(larger(row + s_.pad_top - s_.rate_h, 0), s_.out_h); }

  void masked_gradient(const BackwardTensors<T>& z, const BatchNorm<A>& norm, int64_t n, Range rows) {
    const Range needed = inputs_of(rows);
    A* x = at_row_0(x_planes_, n, needed);
    A* grad = at_row_0(grad_planes_, n, rows) + g_.grad_begin;
    pack(z.x, n, needed, s_.in_h, s_.in_w, x + s_.pad_left * kColumn);
    pack(z.grad_out, n, rows, s_.out_h, s_.out_w, grad);
    for (int64_t p = 0; p < active_; ++p) {
      load_weights(z.weight, p);
      gradient_sums(norm.activation, x + p * plane_, rows, at_row_0(y_plane_, n, rows), grad + p * plane_, p);
    }
  }

  // y = conv(x); grad becomes the gradient g before the activation. Its sums are the gradients of gamma and beta.
  void gradient_sums(Activation activation, const A* x, Range rows, A* y, A* grad, int64_t p) {
    const int64_t last = (g_.out_vectors - 1) * L;
    const V tail = load(tail_);
    const Norm norm = norm_[p];
    Sums<2>& sums = sums_[p];
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* y_row = y + row * g_.pitch;
      A* grad_row = grad + row * g_.pitch;
      const int64_t step = s_.rate_h * g_.pitch;
      V sum = sums.now[0], dot = sums.now[1];
      convolve<R>(sources<R>(x, row - s_.pad_top, s_.in_h), columns, last, [&](int64_t k, V(&acc)[R]) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A* g = grad_row + r * step + k;
          const V masked_grad = masked(load(g), V(acc[r] * norm.scale + norm.shift), activation);
          V d = acc[r] - norm.mean;
          if (!kNhwc && k == last) d = within(d, tail);
          store(y_row + r * step + k, acc[r]), store(g, masked_grad);
          sum += masked_grad, dot += masked_grad * d;
        }
      });
      sums.now[0] = sum, sums.now[1] = dot, sums.added(R * (columns.end - columns.begin));
    });
  }

  void finish_sums(int64_t p, bool batch_statistics, const BackwardTensors<T>& z) {
    Sums<2>& sums = sums_[p];
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

  // grad becomes the gradient of conv(x): scale * (g - mean_grad - xhat * mean_dot) with batch statistics. kDots: its
  // products with x join the sums of the weights' gradient.
  template <bool kDots>
  void gradient_of_convolution(const BatchNorm<A>* norm, bool batch_statistics, const A* x, Range rows, const A* y,
                               A* grad, int64_t p) {
    if (!norm)
      gradient_of_convolution<kDots, false, false>(x, rows, y, grad, p);
    else if (batch_statistics)
      gradient_of_convolution<kDots, true, true>(x, rows, y, grad, p);
    else
      gradient_of_convolution<kDots, true, false>(x, rows, y, grad, p);
  }
  template <bool kDots, bool kNorm, bool kBatch>
  void gradient_of_convolution(const A* x, Range rows, const A* y, A* grad, int64_t p) {
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      const auto from = sources<R>(x, row - s_.pad_top, s_.in_h);
      if (R == kRows && from.whole())
        gradient_tile<kDots, kNorm, kBatch, R, R == kRows>(from, y + row * g_.pitch, grad + row * g_.pitch, columns, p);
      else
        gradient_tile<kDots, kNorm, kBatch, R, false>(from, y + row * g_.pitch, grad + row * g_.pitch, columns, p);
    });
  }

  template <bool kDots, bool kNorm, bool kBatch, int R, bool kWhole>
  DK_INLINE void gradient_tile(const Sources<R>& from, const A* y_row, A* grad_row, Range columns, int64_t p) {
    const int64_t step = s_.rate_h * g_.pitch, tap = s_.rate_w * kColumn, last = (g_.out_vectors - 1) * L;
    const Norm& norm = norm_[p];
    const V tail = load(tail_), scale = norm.scale, mean = norm.mean;
    const V slope = -norm.scale * norm.inv_std * norm.mean_dot, constant = -norm.scale * norm.mean_grad;
    V sum[9];
    if constexpr (kDots)
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) sum[t] = weight_sums_[p].now[t];
    for (int64_t k = columns.begin * L; k < columns.end * L; k += L) {
      V g[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        g[r] = load(grad_row + r * step + k);
        if constexpr (kNorm) {
          g[r] *= scale;
          if constexpr (kBatch) {
            g[r] += (load(y_row + r * step + k) - mean) * slope + constant;
            if (!kNhwc && k == last) g[r] = within(g[r], tail);
          }
          store(grad_row + r * step + k, g[r]);
        }
      }
      if constexpr (kDots)
#pragma GCC unroll 6
        for (int c = 0; c < R + 2; ++c) {
          if (!kWhole && (c < from.begin || c >= from.end)) continue;
          const A* source = from.data + c * from.step + k;
#pragma GCC unroll 3
          for (int v = 0; v < 3; ++v) {
            const V input = load(source + v * tap);
#pragma GCC unroll 3
            for (int u = 0; u < 3; ++u)
              if (c - u >= 0 && c - u < R) sum[3 * u + v] += g[c - u] * input;
          }
        }
    }
    if constexpr (kDots) {
#pragma GCC unroll 9
      for (int t = 0; t < 9; ++t) weight_sums_[p].now[t] = sum[t];
      weight_sums_[p].added(R * (columns.end - columns.begin));
    }
  }

  void write_grad_weight(int64_t p, T* grad_weight) const {
    weight_sums_[p].finish();
    for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l)
      for (int t = 0; t < 9; ++t)
        narrow(A(weight_sums_[p].lane[t][l]), grad_weight + (first_ + p * kChannels + l) * 9 + t);
  }

  // The transposed convolution of the gradient planes, whose row 0 is given.
  void gradient_of_x(const BackwardTensors<T>& z, int64_t n, Range rows, const A* grad) {
    const Convolution c{
        grad + g_.grad_begin - g_.grad_left, s_.out_h, s_.pad_top - 2 * s_.rate_h, g_.in_vectors, s_.in_w, s_.in_h};
    convolve_to_memory<false>(c, n, rows, z.weight, z.grad_x, true, Activation::kNone);
  }

  // Chan, Golub and LeVeque's update: (n values with this mean and m2) joins (seen values with mean and m2).
  DK_INLINE static void merge(double seen, double n, double add_mean, double add_m2, double& mean, double& m2) {
    const double delta = add_mean - mean, total = seen + n;
    mean += delta * (n / total);
    m2 += add_m2 + delta * delta * (seen * n / total);
  }

  const DepthwiseShape& s_;
  const Geometry g_;
  const Cut cut_;
  int64_t rows_, size_, plane_;  // rows held of an image, values of its plane, values of the planes of all images held
  int64_t first_ = 0, count_ = 0, active_ = 0;
  A *x_planes_ = nullptr, *y_planes_ = nullptr, *grad_planes_ = nullptr, *y_plane_ = nullptr, *tile_ = nullptr;
  Norm* norm_ = nullptr;
  Moments* moments_ = nullptr;
  Sums<2>* sums_ = nullptr;
  Sums<9>* weight_sums_ = nullptr;
  V weights_[9] = {};
  A tail_[L];
};

}  // namespace
}  // namespace deeplab_kernels::cpu
