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

#include <type_traits>

#include "microkernels.h"
#include "scratch.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

// Scratch memory of a thread: at most its share of the last level cache for resident planes, of the second level for
// bands.
constexpr int64_t kResidentBytes = 4 << 20;
constexpr int64_t kBandBytes = 384 << 10;
// Of x or of results, worked on at once in the first-level cache.
constexpr int64_t kPieceBytes = 10 << 10;
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
  static constexpr int64_t kTerms = 128;                           // of a sum of floats, about
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
    if (s.kernel_h != 3 || s.kernel_w != 3 || s.multiplier != 1 || s.stride_h != s.stride_w) return kNone;
    if (s.stride_h != 1 && !(s.stride_h == 2 && s.rate_h % 2 == 1 && s.rate_w % 2 == 1)) return kNone;
    if (s.pad_top > 2 * s.rate_h || s.pad_left > 2 * s.rate_w) return kNone;
    const int64_t below = s.stride_h * (s.out_h - 1) + 2 * s.rate_h - s.pad_top - (s.in_h - 1);
    const int64_t right = s.stride_w * (s.out_w - 1) + 2 * s.rate_w - s.pad_left - (s.in_w - 1);
    if (below < 1 - s.stride_h || below > 2 * s.rate_h || right < 1 - s.stride_w || right > 2 * s.rate_w) return kNone;
    if (!kNhwc && smaller(s.in_w, s.out_w) < L) return kNone;
    const Geometry g(s);
    const int64_t x_row = g.x_pitch * int64_t(sizeof(A)), row = g.pitch * int64_t(sizeof(A));
    const int64_t x_image = g.x_slack * int64_t(sizeof(A)) + x_row * s.in_h;
    const int64_t image = g.slack * int64_t(sizeof(A)) + row * s.out_h;
    auto tasks = [&](int64_t planes) { return (s.channels + planes * kChannels - 1) / (planes * kChannels); };
    if (pass == Pass::kInference) {
      const int64_t bands = bands_of(s, x_row * s.stride_h * kMostPlanes, 2 * s.rate_h);
      return {kMostPlanes, tasks(kMostPlanes) * s.batch * bands, bands, false};
    }
    // Which passes run depends on the shape alone, so that the sums are the same for any number of threads; how many
    // planes a task takes does not change them.
    if (tasks(1) < kFewestTasks) return kNone;
    auto bytes = [&](int64_t planes) {
      return s.batch * (planes * (x_image + image) + (pass == Pass::kBackward ? image : 0));
    };
    const bool resident = bytes(1) <= kResidentBytes;
    int64_t planes = kMostPlanes;
    while (planes > 1 && (tasks(planes) < 2 * threads || (resident && bytes(planes) > kResidentBytes))) planes /= 2;
    return {planes, tasks(planes), resident ? 1 : bands_of(s, s.stride_h * x_row + 2 * row, 4 * s.rate_h), resident};
  }

  // further: values of memory for a class derived from this one.
  Planes(const DepthwiseShape& shape, Pass pass, const Cut& cut, int64_t further = 0)
      : s_(shape), g_(shape), cut_(cut), further_size_(further) {
    // Rows held at once: a band's, and those that its results or their gradients touch beyond.
    const int64_t band = (s_.out_h + cut.bands - 1) / cut.bands, x_band = (s_.in_h + cut.bands - 1) / cut.bands;
    rows_ = smaller(s_.out_h, band + 3 + 2 * s_.rate_h);
    x_rows_ = smaller(s_.in_h, larger(x_band, s_.stride_h * band) + 6 + 4 * s_.rate_h);
    images_ = cut.resident ? s_.batch : 1;
    size_ = rows_ * g_.pitch + g_.slack, x_size_ = x_rows_ * g_.x_pitch + g_.x_slack;
    margins_ = !kNhwc && s_.rate_h == 1 && s_.rate_w == 1;
    if (margins_) {
      above_ = s_.stride_h == 1 ? 2 - s_.pad_top : 0, below_ = s_.stride_h == 1 ? s_.in_h + s_.pad_top - s_.out_h : 0;
      x_above_ = s_.pad_top, x_below_ = larger(0, s_.stride_h * (s_.out_h - 1) + 3 - s_.pad_top - s_.in_h);
      size_ += (above_ + below_) * g_.pitch, x_size_ += (x_above_ + x_below_) * g_.x_pitch;
    }
    plane_ = size_ * images_, x_plane_ = x_size_ * images_;
    const int64_t tile_rows = kRows * s_.rate_h,
                  row_bytes = larger(g_.x_pitch * s_.stride_h, g_.pitch) * int64_t(sizeof(A));
    piece_rows_ = larger(1, kPieceBytes / (row_bytes * tile_rows)) * tile_rows;
    if (kNhwc || 4 * piece_rows_ >= 3 * s_.out_h) piece_rows_ = s_.out_h;
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

  // act(norm(conv(x))) of a group's band; norm null: conv(x).
  void inference(int64_t task, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const int64_t n = task / cut_.bands % s_.batch;
    select(task / (cut_.bands * s_.batch));
    if (norm)
      for (int64_t p = 0; p < active_; ++p) prepare_norm(*norm, p, norm->mean, norm->var);
    const Range rows = band(task % cut_.bands, s_.out_h);
    results(n, rows, x, weight, norm, out);
  }

  // out = act(bn(conv(pre(x)))) with the batch's statistics, which it returns too.
  void training(int64_t task, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, A* mean, A* var,
                Activation pre_activation = Activation::kNone) {
    select(task);
    pre_ = pre_activation;
    for (int64_t p = 0; p < active_; ++p) moments_[p] = Moments();
    for (int64_t n = 0; n < s_.batch; ++n)
      for (int64_t i = 0; i < pieces(); ++i) {
        const Range rows = piece(i);
        const A* packed = pack_x(x, n, fresh_inputs(i));
        fetch_for_forward(x, n, i, out);
        for (int64_t p = 0; p < active_; ++p) {
          load_weights(weight, p);
          statistics(packed + p * x_plane_, rows, at_row_0(y_planes_ + p * plane_, n, rows), moments_[p]);
        }
      }
    finish_moments(norm, mean, var);
    for (int64_t n = 0; n < s_.batch; ++n)
      if (cut_.resident)
        write_resident(n, norm.activation, out);
      else
        for (int64_t b = 0; b < cut_.bands; ++b) results(n, band(b, s_.out_h), x, weight, &norm, out);
  }

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
  struct Range {
    int64_t begin, end;
  };
  template <int N>
  struct Count {
    static constexpr int value = N;
  };

  // Row h of an x plane holds pad_left zeros and the image's row; at stride 2 first the even columns of that, then the
  // odd ones. A row of a gradient plane holds grad_left zeros and the gradient's. The zeros right of a row are those
  // left of the next. Rows above and below the image are not stored but skipped.
  struct Geometry {
    int64_t out_vectors, in_vectors;  // in a row
    int64_t x_pitch, x_slack;         // of x planes: from row to row; values read behind the last row
    int64_t pitch, slack;             // of planes of y and of the gradient
    int64_t x_begin, x_odd;           // the image's first column; at stride 2, the odd columns
    int64_t taps[3];                  // of a kernel row, in a row of x
    int64_t grad_left, grad_begin;    // the gradient's first column lies on a vector's boundary
    explicit Geometry(const DepthwiseShape& s) {
      const int64_t right = s.stride_w * (s.out_w - 1) + 2 * s.rate_w - s.pad_left - (s.in_w - 1);
      out_vectors = kNhwc ? s.out_w : (s.out_w + L - 1) / L;
      in_vectors = kNhwc ? s.in_w : (s.in_w + L - 1) / L;
      int64_t x_columns, columns;
      if (s.stride_w == 1) {
        grad_left = 2 * s.rate_w - s.pad_left;
        columns = s.out_w + larger(grad_left, 2 * s.rate_w - right);
        x_columns = columns = larger(columns, s.in_w + larger(s.pad_left, right));
      } else {
        grad_left = s.rate_w;
        columns = larger(s.out_w + grad_left, (s.pad_left + s.in_w) / 2 + 1);
        x_columns = larger((s.in_w + s.pad_left + 1) / 2, s.out_w + s.rate_w);
      }
      // The last vector of a row may reach beyond it, but not into the next.
      if (!kNhwc) columns = rounded_up(larger(columns, larger(out_vectors, s.stride_w == 1 ? in_vectors : 0) * L), L);
      if (!kNhwc) x_columns = s.stride_w == 1 ? columns : rounded_up(x_columns, L);
      pitch = columns * kColumn, x_pitch = x_columns * kColumn * s.stride_w;
      // Neighbouring rows in different sets of the cache.
      if (pitch * int64_t(sizeof(A)) % 1024 == 0) pitch += L;
      if (x_pitch * int64_t(sizeof(A)) % 1024 == 0) x_pitch += L;
      x_begin = s.pad_left * kColumn, x_odd = x_columns * kColumn;
      taps[0] = 0, taps[1] = s.rate_w * kColumn, taps[2] = 2 * s.rate_w * kColumn;
      if (s.stride_w == 2) taps[1] = x_odd + s.rate_w / 2 * kColumn, taps[2] = s.rate_w * kColumn;
      grad_left *= kColumn;
      grad_begin = rounded_up(grad_left, L);
      slack = x_slack = rounded_up((2 * s.rate_w + 2 * L) * kColumn + 2 * L, 16);
    }
  };

  static int64_t bands_of(const DepthwiseShape& s, int64_t row_bytes, int64_t halo) {
    // Not below twice the rows that neighbouring bands share.
    const int64_t rows = larger(kBandBytes / row_bytes, 2 * halo);
    return rows * 4 >= s.out_h * 3 ? 1 : (s.out_h + rows - 1) / rows;
  }
  Range band(int64_t b, int64_t rows) const { return {rows * b / cut_.bands, rows * (b + 1) / cut_.bands}; }

  // Rows of x that these results read, and rows of results that these rows of x touch.
  Range inputs_of(Range rows) const {
    const int64_t stride = s_.stride_h;
    return clipped({rows.begin * stride - s_.pad_top, (rows.end - 1) * stride - s_.pad_top + 2 * s_.rate_h + 1},
                   s_.in_h);
  }
  Range outputs_of(Range rows) const {
    return clipped({divided_up(rows.begin + s_.pad_top - 2 * s_.rate_h), divided_up(rows.end + s_.pad_top)}, s_.out_h);
  }
  // By the stride.
  int64_t divided_up(int64_t row) const { return s_.stride_h == 1 ? row : (row + 1) >> 1; }
  static Range clipped(Range r, int64_t rows) {
    const int64_t begin = smaller(larger(r.begin, 0), rows);
    return {begin, larger(begin, smaller(r.end, rows))};
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

  // Rows that hold the image or zeros.
  Range x_held() const { return {-x_above_, s_.in_h + x_below_}; }
  Range held() const { return {-above_, s_.out_h + below_}; }

  // The memory of image n, of which only `rows` are held, as if it began with row 0.
  A* at_row_0(A* planes, int64_t n, Range rows) const {
    return planes + (cut_.resident ? n * size_ : -rows.begin * g_.pitch);
  }
  A* x_at_row_0(int64_t n, Range rows) const {
    return x_planes_ + (cut_.resident ? n * x_size_ : -rows.begin * g_.x_pitch);
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

  // ---- pieces

  // Resident planes are worked on piece by piece, so that what has been packed or computed is still in the first-level
  // cache when it is used; elsewhere the pieces are the bands.
  int64_t pieces() const { return cut_.resident ? (s_.out_h + piece_rows_ - 1) / piece_rows_ : cut_.bands; }
  Range piece(int64_t i) const {
    if (!cut_.resident) return band(i, s_.out_h);
    return {i * piece_rows_, smaller(s_.out_h, (i + 1) * piece_rows_)};
  }
  // Rows of x that piece i reads and no piece before it has left in the planes.
  Range fresh_inputs(int64_t i) const {
    const Range needed = inputs_of(piece(i));
    if (!cut_.resident || i == 0) return {cut_.resident ? 0 : needed.begin, needed.end};
    return {smaller(inputs_of(piece(i - 1)).end, needed.end), needed.end};
  }
  // Rows of the gradient of x whose results have all been seen after piece i: those of whole tiles, or all.
  int64_t finished_rows(int64_t i) const {
    if (i + 1 == pieces()) return s_.in_h;
    const int64_t tile = kRows * s_.rate_h;
    return larger(0, s_.stride_h * piece(i).end - s_.pad_top) / tile * tile;
  }
  Range finished(int64_t i) const { return {i == 0 ? 0 : finished_rows(i - 1), finished_rows(i)}; }

  // Memory that will be wanted soon, fetched by the loops over tiles a few lines with every vector: more at once would
  // have to wait for one another. The first is as large as x, the second as large as the results.
  struct Ahead {
    const char *at = nullptr, *end = nullptr;
    const char* next(int64_t bytes) {
      if (at >= end) return nullptr;
      const char* begin = at;
      at += bytes;
      return begin;
    }
  };
  // The part for a tile of R rows.
  template <int R, int kStride>
  struct Fetch {
    const char *x = nullptr, *result = nullptr;
    DK_INLINE void operator()(int64_t k) const {
      if constexpr (!kNhwc) {
        constexpr int kBytes = R * int(sizeof(T));
        if (x) lines<kBytes * kStride * kStride>(x, k);
        if (result) lines<kBytes>(result, k);
      }
    }
    template <int kBytes>
    DK_INLINE static void lines(const char* from, int64_t k) {
#pragma GCC unroll 16
      for (int l = 0; l < (kBytes * L + 63) / 64; ++l) __builtin_prefetch(from + k * kBytes + l * 64);
    }
  };
  template <int R, int kStride>
  DK_INLINE Fetch<R, kStride> next_fetch(int64_t tiles) const {
    if constexpr (kNhwc) return {};
    const int64_t bytes = tiles * R * int64_t(sizeof(T));
    return {ahead_[0].next(bytes * kStride * s_.in_w), ahead_[1].next(bytes * s_.out_w)};
  }
  // Of image n.
  void aim(int which, const T* tensor, int64_t channel, int64_t n, Range rows, int64_t height, int64_t width) const {
    if (channel >= s_.channels || tensor == nullptr) return;
    auto at = [&](int64_t row) {
      return reinterpret_cast<const char*>(tensor + ((n * s_.channels + channel) * height + row) * width);
    };
    ahead_[which] = {at(rows.begin), at(rows.end)};
  }
  // What is worked on after piece i of image n: the next piece, image or channel.
  struct Place {
    int64_t channel, image, piece;
  };
  Place following(int64_t n, int64_t i) const {
    if (i + 1 < pieces()) return {first_, n, i + 1};
    if (n + 1 < s_.batch) return {first_, n + 1, 0};
    return {first_ + 1, 0, 0};
  }
  void fetch_for_forward(const T* x, int64_t n, int64_t i, const T* out) const {
    if (kNhwc || !cut_.resident) return;
    const Place next = following(n, i);
    aim(0, x, next.channel, next.image, fresh_inputs(next.piece), s_.in_h, s_.in_w);
    if (n == 0 && i + 1 == pieces()) aim(1, out, first_, 0, piece(0), s_.out_h, s_.out_w);
  }
  void fetch_for_sums(const BackwardTensors<T>& z, int64_t n, int64_t i) const {
    if (kNhwc) return;
    const Place next = following(n, i);
    if (next.channel != first_) return aim(0, z.grad_x, first_, 0, finished(0), s_.in_h, s_.in_w);
    aim_at_inputs(z, next);
  }
  void fetch_for_gradients(const BackwardTensors<T>& z, int64_t n, int64_t i) const {
    if (kNhwc) return;
    const Place next = following(n, i);
    if (next.channel != first_) return aim_at_inputs(z, next);
    aim(0, z.grad_x, first_, next.image, finished(next.piece), s_.in_h, s_.in_w);
  }
  void aim_at_inputs(const BackwardTensors<T>& z, const Place& at) const {
    aim(0, z.x, at.channel, at.image, fresh_inputs(at.piece), s_.in_h, s_.in_w);
    aim(1, z.grad_out, at.channel, at.image, piece(at.piece), s_.out_h, s_.out_w);
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

  // pre(x). Returns where row 0 of the image lies or would lie.
  const A* pack_x(const T* x, int64_t n, Range range) const {
    if (pre_ == Activation::kNone) return pack_x(x, n, range, [](V v) { return v; });
    return pack_x(x, n, range, [pre = pre_](V v) { return activated(v, pre); });
  }
  template <typename F>
  const A* pack_x(const T* x, int64_t n, Range range, const F& f) const {
    A* row_0 = x_at_row_0(n, range);
    for (int64_t h = range.begin; h < range.end; ++h) {
      const T* row = x + offset(n, h, s_.in_h, s_.in_w);
      A* to = row_0 + h * g_.x_pitch;
      if (s_.stride_w == 1) {
        pack_row(row, 1, s_.in_w, to + g_.x_begin, x_plane_, f);
      } else if constexpr (kNhwc) {
        const int64_t even = s_.pad_left % 2, q = s_.pad_left;  // the first even column of the padded row
        pack_row(row + even * s_.channels, 2, (s_.in_w - even + 1) / 2, to + (q + even) / 2 * L, x_plane_, f);
        pack_row(row + (1 - even) * s_.channels, 2, (s_.in_w + even) / 2, to + g_.x_odd + (q + 1 - even) / 2 * L,
                 x_plane_, f);
      } else {
        deinterleave(row, to);
      }
      if constexpr (!kNhwc)
        if (pre_ != Activation::kNone)
          for (int64_t k = 0; k < g_.x_pitch; k += L) store(to + k, f(load(to + k)));  // the padding stays zero
    }
    if (range.end == s_.in_h && !cut_.resident)
      __builtin_memset(row_0 + s_.in_h * g_.x_pitch, 0, size_t(x_below_ * g_.x_pitch) * sizeof(A));
    return row_0;
  }
  // to: the first column of row 0 of the first plane.
  void pack_gradient(const T* grad, int64_t n, Range range, A* to) const {
    for (int64_t i = range.begin; i < range.end; ++i)
      pack_row(grad + offset(n, i, s_.out_h, s_.out_w), 1, s_.out_w, to + i * g_.pitch, plane_, [](V v) { return v; });
    if (range.end == s_.out_h && !cut_.resident)
      __builtin_memset(to + s_.out_h * g_.pitch, 0, size_t(below_ * g_.pitch) * sizeof(A));
  }

  // Every step-th pixel (NHWC), through f, or all as they are (NCHW).
  template <typename F>
  void pack_row(const T* row, int64_t step, int64_t columns, A* to, int64_t distance, const F& f) const {
    if constexpr (kNhwc) {
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
    } else {
      copy_widened(row, to, columns);
    }
  }

  // The even and the odd columns of a padded row (NCHW).
  void deinterleave(const T* row, A* to) const {
    const int64_t q = s_.pad_left;
    A* even = to + (q + 1) / 2;  // of the padded row; the image's column w is its column w + q
    A* odd = to + g_.x_odd + q / 2;
    A *first = q % 2 == 0 ? even : odd, *second = q % 2 == 0 ? odd : even;
    const int64_t pairs = s_.in_w / 2;
    auto vectors = [&](int64_t i) {
      const V a = load(row + 2 * i), b = load(row + 2 * i + L);
      store(first + i, every_second<0>(a, b));
      store(second + i, every_second<1>(a, b));
    };
    int64_t i = 0;
    for (; i + L <= pairs; i += L) vectors(i);
    if (i < pairs && pairs >= L) vectors(pairs - L), i = pairs;
    for (; i < pairs; ++i) first[i] = widen(row[2 * i]), second[i] = widen(row[2 * i + 1]);
    if (s_.in_w % 2 == 1) first[pairs] = widen(row[2 * pairs]);
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
      A scale, shift;
      n.inv_std[l] = fold_norm(norm, c, mean[c], var[c], &scale, &shift);
      n.mean[l] = mean[c], n.scale[l] = scale, n.shift[l] = shift;
    }
    if constexpr (!kNhwc) {
      n.scale = broadcast(n.scale[0]), n.shift = broadcast(n.shift[0]);
      n.mean = broadcast(n.mean[0]), n.inv_std = broadcast(n.inv_std[0]);
    }
  }

  // ---- rows

  // Calls f(Known<activation>()): the loops should not ask again and again.
  template <Activation k>
  struct Known {
    static constexpr Activation value = k;
  };
  template <typename F>
  DK_INLINE static void with_activation(Activation activation, const F& f) {
    switch (activation) {
      case Activation::kNone:
        return f(Known<Activation::kNone>());
      case Activation::kRelu:
        return f(Known<Activation::kRelu>());
      default:
        return f(Known<Activation::kRelu6>());
    }
  }

  // Calls f(Count<R>, row, tiles, vectors) for tiles of R rows row, row + rate, ... and some vectors of columns, few
  // enough for what they read to stay in the first-level cache. Where there are margins, several tiles that follow one
  // another form a run, as setting up costs as much as a short row.
  template <typename F>
  DK_INLINE void tiles(Range range, int64_t vectors, const F& f) const {
    if (margins_) {
      const int64_t most = larger(1, kTerms / (kRows * vectors));
      int64_t row = range.begin;
      for (int64_t tiles; (tiles = smaller(most, (range.end - row) / kRows)) > 0; row += tiles * kRows)
        f(Count<kRows>(), row, tiles, Range{0, vectors});
      if (range.end - row >= 2) f(Count<2>(), row, 1, Range{0, vectors}), row += 2;
      if (range.end > row) f(Count<1>(), row, 1, Range{0, vectors});
      return;
    }
    const int64_t rate = s_.rate_h, most = kNhwc ? kTileColumns : vectors;
    for (int64_t base = range.begin; base < range.end; base += kRows * rate)
      for (int64_t begin = 0; begin < vectors; begin += most) {
        const Range columns{begin, smaller(vectors, begin + most)};
        for (int64_t row = base; row < smaller(range.end, base + rate); ++row)
          for (int64_t r = row, left = smaller(kRows, (range.end - row + rate - 1) / rate); left > 0;) {
            if (left == 4)
              f(Count<4>(), r, 1, columns), left = 0;
            else if (left >= 2)
              f(Count<2>(), r, 1, columns), r += 2 * rate, left -= 2;
            else
              f(Count<1>(), r, 1, columns), left = 0;
          }
      }
  }

  // The rows that a tile of R rows of results reads, a rate apart: row c for kernel row u of result (c - u) / stride.
  // Those in [begin, end) hold the image or zeros.
  struct Sources {
    const A* data;
    int begin, end;
  };
  template <int R, int kStride>
  static bool whole(const Sources& from) {
    return from.begin == 0 && from.end == kStride * (R - 1) + 3;
  }
  // first: the row that kernel row 0 of the first result reads; held: the rows that can be read.
  template <int R, int kStride>
  DK_INLINE Sources sources(const A* plane, int64_t pitch, int64_t first, Range held) const {
    constexpr int kMost = kStride * (R - 1) + 3;
    const int64_t rate = s_.rate_h;
    const A* data = plane + first * pitch;
    if (first >= held.begin && first + (kMost - 1) * rate < held.end) return {data, 0, kMost};  // no divisions, mostly
    auto before = [&](int64_t bound) {
      return bound > first ? int(smaller((bound - first + rate - 1) / rate, kMost)) : 0;
    };
    return {data, before(held.begin), before(held.end)};
  }

  // Rows 0, 1, ... of a tile, a constant number of bytes apart: the few multiples of it that addresses cannot express
  // stay in registers.
  struct Rows {
    int64_t one, three, five, seven;
    explicit Rows(int64_t bytes) : one(bytes), three(3 * one), five(5 * one), seven(7 * one) {}
    template <typename P>
    DK_INLINE P* at(P* row_0, int row) const {
      using Byte = std::conditional_t<std::is_const_v<P>, const char, char>;
      Byte* p = reinterpret_cast<Byte*>(row_0);
      switch (row) {
        case 0:
          break;
        case 3:
          p += three;
          break;
        case 5:
          p += five;
          break;
        case 6:
          p += three * 2;
          break;
        case 7:
          p += seven;
          break;
        default:
          p += one * row;
      }
      return reinterpret_cast<P*>(p);
    }
  };

  // From a row of a plane to the one a rate below.
  int64_t row_bytes(int64_t pitch) const { return s_.rate_h * pitch * int64_t(sizeof(A)); }

  // Calls f(input, taps of the kernel, result) for the products of a vector of columns: input is loaded once for all
  // results it takes part in. rows: those of x, a rate apart.
  template <int R, int kStride, bool kWhole, typename F>
  DK_INLINE static void products(const Sources& from, const Rows& rows, int64_t k, const int64_t* taps, const F& f) {
    constexpr int kSources = kStride * (R - 1) + 3;
    const A* data[3];
#pragma GCC unroll 3
    for (int v = 0; v < 3; ++v) data[v] = from.data + taps[v] + k;
#pragma GCC unroll 9
    for (int c = 0; c < kSources; ++c) {
      if (!kWhole && (c < from.begin || c >= from.end)) continue;
#pragma GCC unroll 3
      for (int v = 0; v < 3; ++v) {
        const V input = load(rows.at(data[v], c));
#pragma GCC unroll 3
        for (int u = 0; u < 3; ++u)
          if (c >= u && (c - u) % kStride == 0 && (c - u) / kStride < R) f(input, 3 * u + v, (c - u) / kStride);
      }
    }
  }

  // emit(t, k, acc): acc[r] is the vector of results at column offset k of row r of tile t. The last vector of a row
  // lies at `last`.
  template <int R, int kStride, typename Emit>
  DK_INLINE void convolve(const Sources& from, int64_t pitch, const int64_t* taps, int64_t count, Range vectors,
                          int64_t last, const Emit& emit) const {
    if ((R == kRows || margins_) && whole<R, kStride>(from))
      convolve<R, kStride, true>(from, pitch, taps, count, vectors, last, emit);
    else
      convolve<R, kStride, false>(from, pitch, taps, count, vectors, last, emit);
  }
  template <int R, int kStride, bool kWhole, typename Emit>
  DK_INLINE void convolve(const Sources& from, int64_t pitch, const int64_t* row_taps, int64_t count, Range vectors,
                          int64_t last, const Emit& emit) const {
    const Rows x_rows(row_bytes(pitch));
    const int64_t taps[3] = {row_taps[0], row_taps[1], row_taps[2]};
    V weight[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) weight[t] = weights_[t];
    const Fetch<R, kStride> fetch = next_fetch<R, kStride>(count);
    Sources tile = from;
    for (int64_t i = 0; i < count; ++i, tile.data += R * kStride * pitch)
      for (int64_t n = vectors.begin; n < vectors.end; ++n) {
        const int64_t k = kNhwc ? n * L : smaller(n * L, last);
        fetch(i * s_.out_w + k);
        V acc[R];
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) acc[r] = V{};
        products<R, kStride, kWhole>(tile, x_rows, k, taps,
                                     [&](V input, int t, int r) { acc[r] += weight[t] * input; });
        emit(i, k, acc);
      }
  }
  // Of x planes; plane: row 0 of the image.
  template <int R, typename Emit>
  DK_INLINE void convolve_x(const A* plane, int64_t row, int64_t count, Range vectors, int64_t last,
                            const Emit& emit) const {
    if (s_.stride_h == 1)  // there the pitches are the same
      convolve<R, 1>(sources<R, 1>(plane, g_.pitch, row - s_.pad_top, x_held()), g_.pitch, g_.taps, count, vectors,
                     last, emit);
    else
      convolve<R, 2>(sources<R, 2>(plane, g_.x_pitch, 2 * row - s_.pad_top, x_held()), g_.x_pitch, g_.taps, count,
                     vectors, last, emit);
  }

  // Sums of floats stay short: they move into doubles after about a hundred terms.
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
      if (terms >= kTerms) flush();
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

  // Lanes beyond the end of the row become zero, whatever they hold. tail: the lanes of the vector at column offset k
  // that lie within; looked up rather than asked for, as branches would part what the compiler should schedule
  // together.
  DK_INLINE static V within(V v, V tail) { return tail > V{} ? v : V{}; }
  DK_INLINE V tail_at(int64_t k, int64_t last) const { return load(lanes_ + (k == last ? L : 0)); }

  // ---- forward

  struct Moments {
    double seen = 0, mean[L] = {}, m2[L] = {};
  };

  // y = conv(x), whose values join the moments.
  void statistics(const A* x, Range rows, A* y, Moments& moments) const {
    const int64_t last = (g_.out_vectors - 1) * L;
    const V tail = load(tail_);
    Sums<1> total;
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* to = y + row * g_.pitch;
      const Rows result_rows(row_bytes(g_.pitch));
      const int64_t tile = R * g_.pitch;
      V sum = total.now[0];
      convolve_x<R>(x, row, count, columns, last, [&](int64_t i, int64_t k, V(&acc)[R]) {
        V together = {};
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store(result_rows.at(to + i * tile + k, r), acc[r]), together += acc[r];
        sum += kNhwc ? together : within(together, tail_at(k, last));
      });
      total.now[0] = sum, total.added(R * count * (columns.end - columns.begin));
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
    for (int64_t l = 0; l < kChannels; ++l)
      join_deviations(moments.seen, count, centre[l], deviations.lane[1][l], deviations.lane[0][l], moments.mean[l],
                      moments.m2[l]);
    moments.seen += count;
  }

  void finish_moments(const BatchNorm<A>& norm, A* mean, A* var) {
    const double count = double(s_.batch) * double(s_.out_h) * double(s_.out_w);
    for (int64_t p = 0; p < active_; ++p) {
      for (int64_t l = 0; l < kChannels && p * kChannels + l < count_; ++l) {
        mean[first_ + p * L + l] = A(moments_[p].mean[l]);
        var[first_ + p * L + l] = A(moments_[p].m2[l] / count);
      }
      prepare_norm(norm, p, mean, var);
    }
  }

  void write_resident(int64_t n, Activation activation, T* out) const {
    for (int64_t i = 0; i < s_.out_h; ++i)
      write_activated(y_planes_ + n * size_ + i * g_.pitch, activation, out + offset(n, i, s_.out_h, s_.out_w));
  }

  // y: a row of the first plane; out: that row in memory.
  void write_activated(const A* y, Activation activation, T* out) const {
    if constexpr (kNhwc) {
      unpack(y, plane_, s_.out_w, out,
             [&](V v, int64_t p, auto...) { return activated(V(v * norm_[p].scale + norm_[p].shift), activation); });
    } else {
      const V scale = norm_[0].scale, shift = norm_[0].shift;
      with_activation(activation, [&](auto known) {
        const int64_t last = s_.out_w - L;
        auto write = [&](int64_t k) {
          store(out + k, activated(V(load(y + k) * scale + shift), decltype(known)::value));
        };
        for (int64_t k = 0; k < last; k += L) write(k);
        write(last);
      });
    }
  }

  void results(int64_t n, Range rows, const T* x, const T* weight, const BatchNorm<A>* norm, T* out) {
    const A* planes = pack_x(x, n, inputs_of(rows));
    if (norm)
      to_memory<true, false>(planes, n, rows, weight, norm->activation, out);
    else
      to_memory<false, false>(planes, n, rows, weight, Activation::kNone, out);
  }

  // The convolution of x planes, or, transposed, of gradient planes, masked by x where that is given; planes: row 0 of
  // the first. NHWC: the rows of a
  // tile go through memory of their own, so that cache lines of the result are written whole.
  template <bool kNorm, bool kTransposed>
  void to_memory(const A* planes, int64_t n, Range rows, const T* weight, Activation activation, T* out,
                 const T* x = nullptr) {
    if constexpr (kNorm)
      with_activation(activation, [&](auto known) {
        to_memory<kNorm, kTransposed, false, decltype(known)::value>(planes, n, rows, weight, out, x);
      });
    else if (kTransposed && x)
      to_memory<kNorm, kTransposed, kTransposed, Activation::kNone>(planes, n, rows, weight, out, x);
    else
      to_memory<kNorm, kTransposed, false, Activation::kNone>(planes, n, rows, weight, out, x);
  }
  template <bool kNorm, bool kTransposed, bool kMasked, Activation kActivation>
  void to_memory(const A* planes, int64_t n, Range rows, const T* weight, T* out, const T* x) {
    const int64_t vectors = kTransposed ? g_.in_vectors : g_.out_vectors;
    const int64_t width = kTransposed ? s_.in_w : s_.out_w, height = kTransposed ? s_.in_h : s_.out_h;
    const int64_t distance = kTransposed ? plane_ : x_plane_;
    const int64_t last = kNhwc ? (vectors - 1) * L : width - L;
    auto load_taps = [&](int64_t p) { kTransposed ? load_flipped_weights(weight, p) : load_weights(weight, p); };
    if (active_ == 1) load_taps(0);
    tiles(rows, vectors, [&](auto rows_at_once, int64_t row, int64_t count, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      T* to = out + offset(n, row, height, width);
      const int64_t step = s_.rate_h * width;
      const Rows out_rows(step * int64_t(sizeof(T)));
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1) load_taps(p);
        const V scale = norm_[p].scale, shift = norm_[p].shift;
        A* tile = tile_ + p * kTile - columns.begin * L;
        auto emit = [&](int64_t i, int64_t k, V(&acc)[R]) {
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) {
            if constexpr (kNorm) acc[r] = activated(V(acc[r] * scale + shift), kActivation);
            if constexpr (kNhwc) {
              store(tile + r * kTileColumns * L + k, acc[r]);
            } else {
              T* result = out_rows.at(to + i * (R * width) + k, r);
              if constexpr (kMasked) acc[r] = before_pre_activation(acc[r], x + (result - out), L);
              store(result, acc[r]);
            }
          }
        };
        const A* plane = planes + p * distance;
        if constexpr (kTransposed)
          convolve<R, 1>(sources<R, 1>(plane, g_.pitch, row + s_.pad_top - 2 * s_.rate_h, held()), g_.pitch, g_.taps,
                         count, columns, last, emit);
        else
          convolve_x<R>(plane, row, count, columns, last, emit);
      }
      if constexpr (kNhwc)
        for (int r = 0; r < R; ++r) {
          const A* tile = tile_ + r * kTileColumns * L;
          T* first = to + (r * step + columns.begin) * s_.channels;
          const int64_t count = columns.end - columns.begin;
          if constexpr (kMasked) {
            const T* row_x = x + (first - out);
            unpack(tile, kTile, count, first, [&](V v, int64_t, int64_t k, int64_t channels) {
              return before_pre_activation(v, row_x + k, channels);
            });
          } else {
            unpack(tile, kTile, count, first, [](V v, auto...) { return v; });
          }
        }
    });
  }

  // ---- backward

  void begin_gradients(const BatchNorm<A>* norm) {
    for (int64_t p = 0; p < active_; ++p) {
      sums_[p] = Sums<2>(), weight_sums_[p] = Sums<9>();
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
        const Range rows = band(b, s_.in_h), touched = outputs_of(rows);
        // Each row's products with x are summed in one band.
        const Range owned{b == 0 ? touched.begin : owner_begins(rows.begin),
                          b + 1 == cut_.bands ? touched.end : owner_begins(rows.end)};
        const A* x = pack_x(z.x, n, inputs_of(touched));
        A* y = at_row_0(y_planes_, n, touched);
        A* grad = at_row_0(grad_planes_, n, touched);
        pack_gradient(z.grad_out, n, touched, grad + g_.grad_begin);
        for (int64_t p = 0; p < active_; ++p) {
          A* g = grad + p * plane_ + g_.grad_begin;
          if (norm) {
            load_weights(z.weight, p);
            const Sums<2> sums = sums_[p];  // these rows have been counted
            gradient_sums(norm->activation, x + p * x_plane_, touched, y, g, p);
            sums_[p] = sums;
          }
          const bool batch = norm && batch_statistics;
          const Sums<9> others = weight_sums_[p];  // rows of neighbouring bands are summed there
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

  void masked_gradient(const BackwardTensors<T>& z, const BatchNorm<A>& norm, int64_t n, Range rows) {
    const A* x = pack_x(z.x, n, inputs_of(rows));
    A* grad = at_row_0(grad_planes_, n, rows) + g_.grad_begin;
    pack_gradient(z.grad_out, n, rows, grad);
    for (int64_t p = 0; p < active_; ++p) {
      load_weights(z.weight, p);
      gradient_sums(norm.activation, x + p * x_plane_, rows, at_row_0(y_planes_, n, rows), grad + p * plane_, p);
    }
  }

  // y = conv(x); grad becomes the gradient g before the activation. Its sums are the gradients of gamma and beta.
  void gradient_sums(Activation activation, const A* x, Range rows, A* y, A* grad, int64_t p) {
    with_activation(activation, [&](auto known) { gradient_sums<decltype(known)::value>(x, rows, y, grad, p); });
  }
  template <Activation kActivation>
  void gradient_sums(const A* x, Range rows, A* y, A* grad, int64_t p) {
    const int64_t last = (g_.out_vectors - 1) * L;
    const Norm norm = norm_[p];
    Sums<2>& sums = sums_[p];
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      A* y_row = y + row * g_.pitch;
      A* grad_row = grad + row * g_.pitch;
      const Rows result_rows(row_bytes(g_.pitch));
      const int64_t tile = R * g_.pitch;
      V sum = sums.now[0], dot = sums.now[1];
      convolve_x<R>(x, row, count, columns, last, [&](int64_t i, int64_t k, V(&acc)[R]) {
        const V tail = tail_at(k, last);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
          A* g = result_rows.at(grad_row + i * tile + k, r);
          const V masked_grad = masked(load(g), V(acc[r] * norm.scale + norm.shift), kActivation);
          V d = acc[r] - norm.mean;
          if constexpr (!kNhwc) d = within(d, tail);
          store(result_rows.at(y_row + i * tile + k, r), acc[r]), store(g, masked_grad);
          sum += masked_grad, dot += masked_grad * d;
        }
      });
      sums.now[0] = sum, sums.now[1] = dot, sums.added(R * count * (columns.end - columns.begin));
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

  // grad becomes the gradient of conv(x): scale * (g - mean_grad - xhat * mean_dot) with batch statistics, scale * g
  // without. Its products with x join the sums of the weights' gradient.
  void gradient_of_convolution(bool batch_statistics, const A* x, Range rows, const A* y, A* grad, int64_t p) {
    if (batch_statistics)
      gradient_of_convolution<true>(x, rows, y, grad, p);
    else
      gradient_of_convolution<false>(x, rows, y, grad, p);
  }
  template <bool kBatch>
  void gradient_of_convolution(const A* x, Range rows, const A* y, A* grad, int64_t p) {
    tiles(rows, g_.out_vectors, [&](auto rows_at_once, int64_t row, int64_t count, Range columns) {
      constexpr int R = decltype(rows_at_once)::value;
      if (s_.stride_h == 1)
        gradient_tile<kBatch, R, 1>(x, row, count, y, grad, columns, p);
      else
        gradient_tile<kBatch, R, 2>(x, row, count, y, grad, columns, p);
    });
  }

  template <bool kBatch, int R, int kStride>
  DK_INLINE void gradient_tile(const A* x, int64_t row, int64_t count, const A* y, A* grad, Range columns, int64_t p) {
    const int64_t pitch = kStride == 1 ? g_.pitch : g_.x_pitch;
    const Sources from = sources<R, kStride>(x, pitch, kStride * row - s_.pad_top, x_held());
    y += row * g_.pitch, grad += row * g_.pitch;
    if ((R == kRows || margins_) && whole<R, kStride>(from))
      gradient_tile<kBatch, R, kStride, true>(from, pitch, count, y, grad, columns, p);
    else
      gradient_tile<kBatch, R, kStride, false>(from, pitch, count, y, grad, columns, p);
  }
  template <bool kBatch, int R, int kStride, bool kWhole>
  DK_INLINE void gradient_tile(const Sources& from, int64_t pitch, int64_t count, const A* y_row, A* grad_row,
                               Range columns, int64_t p) {
    const Rows x_rows(row_bytes(pitch)), result_rows(row_bytes(g_.pitch));
    const int64_t last = (g_.out_vectors - 1) * L;
    const int64_t taps[3] = {g_.taps[0], g_.taps[1], g_.taps[2]};
    const Norm& norm = norm_[p];
    const V scale = norm.scale, mean = norm.mean;
    const V slope = -norm.scale * norm.inv_std * norm.mean_dot, constant = -norm.scale * norm.mean_grad;
    V sum[9];
#pragma GCC unroll 9
    for (int t = 0; t < 9; ++t) sum[t] = weight_sums_[p].now[t];
    const Fetch<R, kStride> fetch = next_fetch<R, kStride>(count);
    Sources tile = from;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t k = columns.begin * L; k < columns.end * L; k += L) {
        fetch(i * s_.out_w + k);
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
        products<R, kStride, kWhole>(tile, x_rows, k, taps, [&](V input, int t, int r) { sum[t] += g[r] * input; });
      }
      tile.data += R * kStride * pitch, y_row += R * g_.pitch, grad_row += R * g_.pitch;
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
  void gradient_of_x(const BackwardTensors<T>& z, int64_t n, Range rows, const A* grad) {
    grad += g_.grad_begin - g_.grad_left;
    if (s_.stride_h == 1)
      to_memory<false, true>(grad, n, rows, z.weight, Activation::kNone, z.grad_x,
                             pre_ == Activation::kNone ? nullptr : z.x);
    else
      gradient_of_strided_x(z, n, rows, grad);
  }

  // Stride 2, odd rates. Padded row a of x met kernel rows 0 and 2 of the result rows a / 2 and a / 2 - rate if a is
  // even, kernel row 1 of (a - rate) / 2 if it is odd; the same holds for columns. At rate 1 an even row and the odd
  // one below share what they read (NCHW).
  void gradient_of_strided_x(const BackwardTensors<T>& z, int64_t n, Range rows, const A* grad) {
    const int64_t size = kNhwc ? both_size() : 0;
    for (int64_t h = rows.begin; h < rows.end; ++h) {
      const int64_t a = h + s_.pad_top;
      T* to = z.grad_x + offset(n, h, s_.in_h, s_.in_w);
      const T* x = z.x + (to - z.grad_x);
      for (int64_t p = 0; p < active_; ++p) {
        if (active_ > 1 || h == rows.begin) load_weights(z.weight, p);
        auto row = [&](int64_t i) { return i < 0 || i >= s_.out_h ? zeros_ : grad + p * plane_ + i * g_.pitch; };
        const bool even = a % 2 == 0;
        const A* near = row(even ? a / 2 : (a - s_.rate_h) / 2);
        const A* far = even ? row(a / 2 - s_.rate_h) : zeros_;
        if constexpr (kNhwc) {
          A* both = both_ + 2 * p * size;
          even ? strided_row<Parity::kEven>(near, far, both) : strided_row<Parity::kOdd>(near, far, both);
        } else if (even && margins_ && h + 1 < rows.end) {
          strided_row_to_memory<Parity::kPair>(near, far, to, x), ++h;
        } else {
          even ? strided_row_to_memory<Parity::kEven>(near, far, to, x)
               : strided_row_to_memory<Parity::kOdd>(near, far, to, x);
        }
      }
      if constexpr (kNhwc) write_both(to, x);
    }
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
  // NCHW.
  template <Parity kParity>
  DK_INLINE void strided_row_to_memory(const A* near, const A* far, T* to, const T* x) const {
    if (pre_ == Activation::kNone)
      strided_row_to_memory<kParity>(near, far, to, [](auto v, int64_t) { return v; });
    else
      strided_row_to_memory<kParity>(near, far, to, [&](auto v, int64_t k) {
        if constexpr (sizeof(v) == sizeof(A))
          return masked(v, A(widen(x[k])), pre_);
        else
          return before_pre_activation(v, x + k, L);
      });
  }
  template <Parity kParity, typename F>
  void strided_row_to_memory(const A* near, const A* far, T* to, const F& f) const {
    constexpr int kRows = Strided<kParity>::kRows;
    const int64_t q = s_.pad_left, width = s_.in_w;
    auto vectors = [&](int64_t w) {  // w: an even padded column
      const auto v = strided_at<kParity>(near, far, (w + q) / 2);
#pragma GCC unroll 2
      for (int r = 0; r < kRows; ++r) {
        const int64_t k = r * width + w;
        store(to + k, f(interleaved<0>(v.even[r], v.odd[r]), k));
        store(to + k + L, f(interleaved<1>(v.even[r], v.odd[r]), k + L));
      }
    };
    auto column = [&](int64_t w) {
      const auto v = strided_at<kParity>(near, far, (w + q) / 2);
      for (int r = 0; r < kRows; ++r) {
        const int64_t k = r * width + w;
        narrow(f((w + q) % 2 == 0 ? v.even[r][0] : v.odd[r][0], k), to + k);
      }
    };
    int64_t w = q % 2;
    if (w == 1) column(0);
    for (; w + 2 * L <= width; w += 2 * L) vectors(w);
    if (w + 1 < width && width >= 2 * L + q % 2) w = width - (width - q) % 2, vectors(w - 2 * L);
    for (; w < width; ++w) column(w);
  }
  // Values of the even or the odd columns of a padded row of x.
  int64_t both_size() const { return rounded_up((s_.pad_left + s_.in_w + 1) / 2 * kColumn, L); }

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

  DepthwiseShape s_;
  Geometry g_;
  const Cut cut_;
  Activation pre_ = Activation::kNone;  // of x
  int64_t images_;                      // held at once
  int64_t rows_, size_, plane_;         // rows held of an image, values of its plane and of the planes of all images
  int64_t x_rows_, x_size_, x_plane_;   // the same of x
  // Rates of 1 (NCHW): rows of zeros above and below the image, so that no row needs to be skipped.
  bool margins_ = false;
  int64_t piece_rows_;
  mutable Ahead ahead_[2];
  int64_t above_ = 0, below_ = 0, x_above_ = 0, x_below_ = 0;
  int64_t first_ = 0, count_ = 0, active_ = 0;
  A *x_planes_ = nullptr, *y_planes_ = nullptr, *grad_planes_ = nullptr;
  A *tile_ = nullptr, *zeros_ = nullptr, *both_ = nullptr, *further_ = nullptr;
  int64_t further_size_;
  Norm* norm_ = nullptr;
  Moments* moments_ = nullptr;
  Sums<2>* sums_ = nullptr;
  Sums<9>* weight_sums_ = nullptr;
  V weights_[9] = {};
  A tail_[L];       // 1 within a row's last vector, 0 beyond
  A lanes_[2 * L];  // the same of any other vector and of the last
};

}  // namespace
}  // namespace deeplab_kernels::cpu
