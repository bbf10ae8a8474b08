// How the work on planes is cut, and where columns and rows lie in a plane. For the per-instruction-set files only.
#pragma once

#include "../microkernels.h"

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

template <int N>
struct Count {
  static constexpr int value = N;
};

template <typename T, bool kNhwc>
class PlaneLayout {
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
    if (s.kernel_h != 3 || s.kernel_w != 3 || s.multiplier != 1 || s.stride_h != s.stride_w) return kNone;
    if (s.stride_h != 1 && !(s.stride_h == 2 && s.rate_h % 2 == 1 && s.rate_w % 2 == 1)) return kNone;
    if (s.pad_top > 2 * s.rate_h || s.pad_left > 2 * s.rate_w) return kNone;
    const int64_t below = s.stride_h * (s.out_h - 1) + 2 * s.rate_h - s.pad_top - (s.in_h - 1);
    const int64_t right = s.stride_w * (s.out_w - 1) + 2 * s.rate_w - s.pad_left - (s.in_w - 1);
    if (below < 1 - s.stride_h || below > 2 * s.rate_h || right < 1 - s.stride_w || right > 2 * s.rate_w) return kNone;
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

 protected:
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

  PlaneLayout(const DepthwiseShape& shape, const Cut& cut) : s_(shape), g_(shape), cut_(cut) {
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
  }

  static int64_t bands_of(const DepthwiseShape& s, int64_t row_bytes, int64_t halo) {
    // Not below twice the rows that neighbouring bands share.
    const int64_t rows = larger(kBandBytes / row_bytes, 2 * halo);
    return rows * 4 >= s.out_h * 3 ? 1 : (s.out_h + rows - 1) / rows;
  }
  IndexRange band(int64_t b, int64_t rows) const { return {rows * b / cut_.bands, rows * (b + 1) / cut_.bands}; }

  // Rows of x that these results read, and rows of results that these rows of x touch.
  IndexRange inputs_of(IndexRange rows) const {
    const int64_t stride = s_.stride_h;
    return clipped({rows.begin * stride - s_.pad_top, (rows.end - 1) * stride - s_.pad_top + 2 * s_.rate_h + 1},
                   s_.in_h);
  }
  IndexRange outputs_of(IndexRange rows) const {
    return clipped({divided_up(rows.begin + s_.pad_top - 2 * s_.rate_h), divided_up(rows.end + s_.pad_top)}, s_.out_h);
  }
  // By the stride.
  int64_t divided_up(int64_t row) const { return s_.stride_h == 1 ? row : (row + 1) >> 1; }
  static IndexRange clipped(IndexRange r, int64_t rows) {
    const int64_t begin = smaller(larger(r.begin, 0), rows);
    return {begin, larger(begin, smaller(r.end, rows))};
  }

  // Rows that hold the image or zeros.
  IndexRange x_held() const { return {-x_above_, s_.in_h + x_below_}; }
  IndexRange held() const { return {-above_, s_.out_h + below_}; }

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

  // NCHW: whether rows go to memory through a writer, as so many columns stored at once reach beyond them.
  bool collected(int64_t width, int64_t stored) const { return !kNhwc && width < stored; }

  // Resident planes are worked on piece by piece, so that what has been packed or computed is still in the first-level
  // cache when it is used; elsewhere the pieces are the bands.
  int64_t pieces() const { return cut_.resident ? (s_.out_h + piece_rows_ - 1) / piece_rows_ : cut_.bands; }
  IndexRange piece(int64_t i) const {
    if (!cut_.resident) return band(i, s_.out_h);
    return {i * piece_rows_, smaller(s_.out_h, (i + 1) * piece_rows_)};
  }
  // Rows of x that piece i reads and no piece before it has left in the planes.
  IndexRange fresh_inputs(int64_t i) const {
    const IndexRange needed = inputs_of(piece(i));
    if (!cut_.resident || i == 0) return {cut_.resident ? 0 : needed.begin, needed.end};
    return {smaller(inputs_of(piece(i - 1)).end, needed.end), needed.end};
  }
  // Rows of the gradient of x whose results have all been seen after piece i: those of whole tiles (stride 2: of pairs
  // that are computed together), or all.
  int64_t finished_rows(int64_t i) const {
    if (i + 1 == pieces()) return s_.in_h;
    const int64_t rows = larger(0, s_.stride_h * piece(i).end - s_.pad_top), tile = kRows * s_.rate_h;
    return s_.stride_h == 1 ? rows / tile * tile : rows;
  }
  IndexRange finished(int64_t i) const { return {i == 0 ? 0 : finished_rows(i - 1), finished_rows(i)}; }

  DepthwiseShape s_;
  Geometry g_;
  const Cut cut_;
  int64_t images_;                     // held at once
  int64_t rows_, size_, plane_;        // rows held of an image, values of its plane and of the planes of all images
  int64_t x_rows_, x_size_, x_plane_;  // the same of x
  // Rates of 1 (NCHW): rows of zeros above and below the image, so that no row needs to be skipped.
  bool margins_ = false;
  int64_t piece_rows_;
  int64_t above_ = 0, below_ = 0, x_above_ = 0, x_below_ = 0;
  int64_t first_ = 0, count_ = 0, active_ = 0;  // the task's channels and planes
};

}  // namespace
}  // namespace deeplab_kernels::cpu
