// The rows of x and of the gradient that a worker holds packed, and where results read them. For the
// per-instruction-set files only: everything here has internal linkage.
#pragma once

#include "../microkernels.h"
#include "../scratch.h"
#include "../workspace.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

// Every third element of a, b and then c, from element kFirst on.
template <int kFirst, typename V, int... kIndex>
DK_INLINE V every_third(V a, V b, V c, std::integer_sequence<int, kIndex...>) {
  constexpr int n = int(sizeof...(kIndex));
  const V of_two = __builtin_shufflevector(a, b, (3 * kIndex + kFirst < 2 * n ? 3 * kIndex + kFirst : 0)...);
  return __builtin_shufflevector(of_two, c, (3 * kIndex + kFirst < 2 * n ? kIndex : 3 * kIndex + kFirst - n)...);
}
template <int kFirst, typename V>
DK_INLINE V every_third(V a, V b, V c) {
  return every_third<kFirst>(a, b, c, std::make_integer_sequence<int, sizeof(V) / sizeof(a[0])>());
}

struct Task {
  int64_t group, image, band;
};
DK_INLINE Task task_of(int64_t index, int64_t images, int64_t bands) {
  return {index / (images * bands), index / bands % images, index % bands};
}

template <typename T, bool kNhwc>
class RowPacking {
 public:
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  enum class Needs { kForward, kStatistics, kBackward };

  // keep: one worker makes both passes over its groups, so that the first may leave conv(x) for the second.
  RowPacking(const Plan& plan, const T* x, const T* weight, Needs needs, bool keep = false)
      : plan_(plan), s_(plan.shape), x_(x), weight_(weight) {
    const int64_t most = smaller(plan.group_channels, s_.channels) * s_.multiplier;
    parts_ = kNhwc ? 1 : s_.multiplier;
    out_pixel_ = s_.out_channels();
    row_lanes_ = kNhwc ? rounded_up(most, L) : 1;
    direct_ = kNhwc && plan.direct;
    Arena measure(nullptr);
    allocate(measure, needs, keep);
    const size_t bytes = measure.used();
    void* memory = thread_scratch(bytes);
    // What is never written must read as zero: padding, and the lanes beyond the last channel.
    if (!kNhwc || most % L != 0 || needs != Needs::kForward) __builtin_memset(memory, 0, smaller(bytes, cleared_));
    Arena arena(memory);
    allocate(arena, needs, keep);
    const int64_t x_step = direct_ ? 1 : x_window_.step, x_pitch = direct_ ? s_.in_w * s_.channels : x_window_.pitch;
    x_advance_ = plan.out_rows.step * s_.stride_h / x_step * x_pitch;
    fill_tables(plan.forward, plan.forward_rows, plan.forward_rows.source_step / x_step * x_pitch, x_pixel(), 1, 0,
                forward_tables_);
    if (needs == Needs::kBackward)
      fill_tables(plan.transposed, plan.transposed_rows,
                  plan.transposed_rows.source_step / grad_window_.step * grad_window_.pitch, lanes_or_one(), parts_,
                  grad_window_.pitch / parts_, transposed_tables_);
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
      active_ = rounded_up(count_, L);
      for (int64_t t = 0; t < taps; ++t) {
        for (int64_t l = 0; l < count_; ++l) weights_[t * lanes_ + l] = widen(weight[l * taps + t]);
        for (int64_t l = count_; l < lanes_; ++l) weights_[t * lanes_ + l] = 0;
      }
      // A narrower last group leaves the previous one's values in the lanes beyond it.
      if (count_ < lanes_ && !direct_)
        __builtin_memset(x_window_.memory, 0, size_t(x_window_.slots * x_window_.pitch) * sizeof(A));
    } else {
      for (int64_t i = 0; i < count_ * taps; ++i) weights_[i] = widen(weight[i]);
    }
    image_ = -1;
  }

  // scale, shift: normalisation and affine map as one multiply-add. Of the selected group, whose mean and variance must
  // be final: its later tasks find the work done.
  void select_norm(const BatchNorm<A>& norm) {
    if (norm_group_ == group_) return;
    norm_group_ = group_;
    activation_ = norm.activation;
    for (int64_t l = 0; l < count_; ++l) {
      const int64_t c = first_ + l;
      mean_[l] = norm.mean[c];
      inv_std_[l] = fold_norm(norm, c, norm.mean[c], norm.var[c], scale_ + l, shift_ + l);
    }
    for (int64_t l = count_; l < row_lanes_; ++l) scale_[l] = shift_[l] = mean_[l] = inv_std_[l] = 0;
  }

 protected:
  void allocate(Arena& arena, Needs needs, bool keep) {
    const int64_t taps = s_.taps(), m = s_.multiplier;
    const int64_t most = kNhwc ? row_lanes_ : m;
    x_window_ = {
        nullptr, plan_.x_window.slots, plan_.x_window.step, kNhwc ? s_.in_w * row_lanes_ : plan_.x_row.size(), 0, 0};
    x_window_.memory = arena.take<A>(direct_ ? 0 : x_window_.slots * x_window_.pitch);
    forward_tables_ = take_tables(arena, plan_.forward, plan_.forward_rows, 1);
    weights_ = arena.take<A>(taps * most);
    scale_ = arena.take<A>(most), shift_ = arena.take<A>(most);
    mean_ = arena.take<A>(most), inv_std_ = arena.take<A>(most);
    if (needs == Needs::kForward) return;
    const int64_t out_row = kNhwc ? s_.out_w * row_lanes_ : rounded_up(s_.out_w, kMostLanes) + kMostLanes;
    y_ = arena.take<A>(plan_.rows_together * out_row);
    if (needs == Needs::kStatistics) return;
    g_ = arena.take<A>(out_row);
    grad_window_ = {
        nullptr, plan_.grad_window.slots, plan_.grad_window.step, (kNhwc ? out_row : plan_.grad_row.size()) * parts_, 0,
        0};
    grad_window_.memory = arena.take<A>(grad_window_.slots * grad_window_.pitch);
    transposed_tables_ = take_tables(arena, plan_.transposed, plan_.transposed_rows, parts_);
    dots_ = arena.take<A>(taps * parts_ * dot_lanes());
    dx_ = arena.take<A>(kNhwc ? (m > 1 ? s_.in_w * row_lanes_ : 0) : rounded_up(s_.in_w, kMostLanes) + kMostLanes);
    cleared_ = arena.used();
    const int64_t kept = s_.batch * s_.out_h * s_.out_w * lanes_or_one() * parts_;
    kept_ = keep && kept * int64_t(sizeof(A)) <= kKeptBytes ? arena.take<A>(kept) : nullptr;
  }

  // One table for each class of rows and segment of columns.
  static TapTable* take_tables(Arena& arena, const Columns& columns, const Rows& rows, int64_t parts) {
    TapTable* tables = arena.take<TapTable>(rows.classes * columns.count);
    for (int64_t q = 0; q < rows.classes; ++q)
      for (int64_t i = 0; i < columns.count; ++i) {
        const int64_t per_row = columns.segments[i].taps * parts;
        const int64_t entries = per_row * (rows.class_begin[q + 1] - rows.class_begin[q]);
        int64_t* offset = arena.take<int64_t>(entries);
        int64_t* weight = arena.take<int64_t>(entries);
        if (tables) tables[q * columns.count + i] = {offset, weight, per_row};
      }
    return tables;
  }

  // pitch: from the source of one kernel row to that of the next; pixel: from one packed column to the next.
  void fill_tables(const Columns& columns, const Rows& rows, int64_t pitch, int64_t pixel, int64_t parts,
                   int64_t part_size, const TapTable* tables) const {
    for (int64_t q = 0; q < rows.classes; ++q)
      for (int64_t i = 0; i < columns.count; ++i) {
        const TapTable& table = tables[q * columns.count + i];
        const Segment& segment = columns.segments[i];
        int64_t n = 0;
        for (int64_t k = 0; k < rows.class_begin[q + 1] - rows.class_begin[q]; ++k)
          for (int64_t part = 0; part < parts; ++part)
            for (int64_t t = 0; t < segment.taps; ++t) {
              const ColumnTap& tap = columns.taps[segment.first_tap + t];
              const int64_t u = rows.kernel_rows[rows.class_begin[q] + k];
              table.offset[n] = k * pitch + part * part_size + tap.input * pixel;
              table.weight[n++] = (part * s_.taps() + u * s_.kernel_w + tap.tap) * lanes_or_one();
            }
      }
  }

  static Taps taps_of(const TapTable* tables, const Columns& columns, int64_t segment, const ResultRow& row) {
    const TapTable& table = tables[row.row_class * columns.count + segment];
    const int64_t begin = row.first * table.per_row;
    return {table.offset + begin, table.weight + begin, (row.last - row.first) * table.per_row};
  }

  int64_t dot_lanes() const { return kNhwc ? row_lanes_ : L; }

  int64_t lanes_or_one() const { return kNhwc ? row_lanes_ : 1; }
  // From one column to the next in what the taps of a forward pass read.
  int64_t x_pixel() const { return direct_ ? s_.channels : lanes_or_one(); }

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
    x_window_.clear();
  }

  // ---- packing

  void pack_x_row(int64_t h, A* dst) const {
    const T* src = x_ + in_offset(h);
    if constexpr (kNhwc) {
      if (s_.multiplier == 1) {
        if (count_ == s_.channels && count_ == lanes_) return copy_widened(src, dst, s_.in_w * count_);
        for (int64_t w = 0; w < s_.in_w; ++w) copy_widened(src + w * s_.channels, dst + w * lanes_, count_);
      } else {
        for (int64_t w = 0; w < s_.in_w; ++w) repeat_channels(src + w * s_.channels, dst + w * lanes_);
      }
    } else {
      const PackedRow& row = plan_.x_row;
      if (row.phases == 1) return copy_widened(src, dst - row.origin, row.columns);
      if (row.phases == 2) return deinterleave<2>(src, dst);
      if (row.phases == 3) return deinterleave<3>(src, dst);
      for (int64_t q = 0; q < row.phases; ++q) {
        if (q < 64 && !(row.used >> q & 1)) continue;
        // The first column at or right of the image's left edge in this phase.
        const int64_t e = (-row.origin - q + row.phases - 1) / row.phases;
        A* column = dst + q * row.phase_size + e;
        for (int64_t w = row.origin + q + e * row.phases; w < row.columns; w += row.phases) *column++ = widen(src[w]);
      }
    }
  }

  // Each channel once for each of its outputs.
  DK_INLINE void repeat_channels(const T* src, A* dst) const {
    const int64_t m = s_.multiplier, channels = count_ / m;
    int64_t c = 0;
    if (m == 2)
      for (; c + L <= channels; c += L) {
        const V v = load(src + c);
        store(dst + 2 * c, doubled<0>(v));
        store(dst + 2 * c + L, doubled<1>(v));
      }
    for (; c < channels; ++c)
      for (int64_t q = 0; q < m; ++q) dst[c * m + q] = widen(src[c]);
  }

  // A row into its phases, of which there are P.
  template <int P>
  void deinterleave(const T* src, A* dst) const {
    const PackedRow& row = plan_.x_row;
    A* phase[P];  // where the image's columns q, q + P, ... begin
    for (int64_t q = 0; q < P; ++q) {
      const int64_t e = q - row.origin;
      phase[q] = dst + e % P * row.phase_size + e / P;
    }
    auto vectors = [&](int64_t w) {  // w: a multiple of P
      V v[P];
#pragma GCC unroll 3
      for (int i = 0; i < P; ++i) v[i] = load(src + w + i * L);
      if constexpr (P == 2) {
        store(phase[0] + w / P, every_second<0>(v[0], v[1]));
        store(phase[1] + w / P, every_second<1>(v[0], v[1]));
      } else {
        store(phase[0] + w / P, every_third<0>(v[0], v[1], v[2]));
        store(phase[1] + w / P, every_third<1>(v[0], v[1], v[2]));
        store(phase[2] + w / P, every_third<2>(v[0], v[1], v[2]));
      }
    };
    int64_t w = 0;
    for (; w + P * L <= row.columns; w += P * L) vectors(w);
    if (w > 0 && w < row.columns) w = row.columns / P * P, vectors(w - P * L);
    for (; w < row.columns; ++w) phase[w % P][w / P] = widen(src[w]);
  }

  // What the taps of the output row at this position are relative to; packs the input rows that it and those after it,
  // count in all, read.
  DK_INLINE const A* x_base(int64_t position, int64_t count) {
    const ResultRow& row = plan_.forward_rows.rows[plan_.out_rows.rows[position]];
    if (count == 1) return x_base(row, row.high);
    return x_base(row, plan_.forward_rows.rows[plan_.out_rows.rows[position + count - 1]].high);
  }
  DK_INLINE const A* x_base(int64_t i) { return x_base(plan_.forward_rows.rows[i], plan_.forward_rows.rows[i].high); }
  DK_INLINE const A* x_base(const ResultRow& row, int64_t high) {
    if (direct_) {
      // T is A here; the cast keeps the other instantiations compiling.
      return reinterpret_cast<const A*>(x_ + in_offset(row.source));
    }
    if (row.first < row.last)
      x_window_.require(row.keep, high, smaller(s_.in_h - 1, high + kRowsAhead * x_window_.step),
                        [this](int64_t h, A* slot) { pack_x_row(h, slot); });
    return x_window_.at(row.source);
  }

  const Plan& plan_;
  const DepthwiseShape& s_;
  const T* x_;
  const T* weight_;
  int64_t parts_, row_lanes_;
  int64_t out_pixel_;
  int64_t x_advance_;  // from one output row to the next of its phase, in what they read
  bool direct_;
  int64_t cleared_ = INT64_MAX;  // bytes of scratch memory that have to start as zero
  int64_t group_ = -1, norm_group_ = -1, image_ = -1, first_ = 0, first_in_ = 0, count_ = 0;
  int64_t lanes_ = 1;   // room for the channels of any group (NHWC)
  int64_t active_ = 1;  // whole vectors of the selected group's channels
  Activation activation_ = Activation::kNone;
  Window<A> x_window_{}, grad_window_{};
  TapTable *forward_tables_ = nullptr, *transposed_tables_ = nullptr;
  A *weights_ = nullptr, *scale_ = nullptr, *shift_ = nullptr, *mean_ = nullptr, *inv_std_ = nullptr;
  A *y_ = nullptr, *kept_ = nullptr, *g_ = nullptr, *dots_ = nullptr, *dx_ = nullptr;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
