// The vectorised kernels of the atrous depthwise convolution. Included once for each instruction set by
// atrous_depthwise_{portable,avx2,avx512}.cpp, which define DK_ISA.
//
// Every pass streams: a row of x is widened and packed once into a window of rows in the fast caches (NHWC float rows
// may be read in place), a row of results is computed from the window in registers and leaves through an epilogue
// (store; scale, shift, activate; statistics; gradients). NCHW vectors run over columns, NHWC vectors over channels.
// Training passes recompute the convolution instead of storing it (nine multiply-adds cost less than eight bytes of
// memory traffic), unless it fits the caches between the two passes of backward.
#include "atrous_depthwise_pixels.h"
#include "atrous_depthwise_planes.h"
#include "microkernels.h"
#include "scratch.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

struct Task {
  int64_t group, image, band;
};
DK_INLINE Task task_of(int64_t index, int64_t images, int64_t bands) {
  return {index / (images * bands), index / bands % images, index % bands};
}

template <typename T, bool kNhwc>
class Worker {
 public:
  using A = acc_t<T>;
  using V = Vec<A>;
  static constexpr int64_t L = kLanes<A>;

  enum class Needs { kForward, kStatistics, kBackward };

  // keep: one worker makes both passes over its groups, so that the first may leave conv(x) for the second.
  Worker(const Plan& plan, const T* x, const T* weight, Needs needs, bool keep = false)
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

  void forward(const Task& task, T* out, bool with_norm) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t i = plan_.out_rows.rows[position];
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        T* row = out + out_offset(i, part);
        if (with_norm)
          convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base, StoreActivated{*this, row, part});
        else
          convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base, Store{*this, row});
      }
      position += count;
    }
  }

  // Adds the band's outputs to mean and m2 (sum of squared deviations) of each channel. kept: where to store them, or
  // null.
  void statistics(const Task& task, T* kept, double* mean, double* m2) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) mean[l] = m2[l] = 0;
    double seen = 0;
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        keep_rows(position, count, part, base);
        for (int64_t r = 0; kept && r < count; ++r)
          store_row(y_row(r), kept + out_offset(plan_.out_rows.rows[position + r], part));
        row_statistics(seen, count * s_.out_w, mean + part, m2 + part);
      }
      seen += double(count * s_.out_w);
      position += count;
    }
  }

  // Sums over the band of g and of g * xhat for each channel; g is the gradient behind the activation.
  void gradient_sums(const Task& task, const T* grad_out, const T* y, double* sum, double* dot) {
    select_image(task.image);
    const IndexRange band = plan_.out_rows.band(task.band);
    for (int64_t l = 0; l < lanes(); ++l) sum[l] = dot[l] = 0;
    for (int64_t position = band.begin; position < band.end;) {
      const int64_t count = smaller(plan_.out_rows.batches[position], band.end - position);
      const A* base = y ? nullptr : x_base(position, count);
      for (int64_t part = 0; part < parts_; ++part) {
        if (!y) keep_rows(position, count, part, base);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t i = plan_.out_rows.rows[position + r], offset = out_offset(i, part);
          if (y) widened_row(y + offset, y_row(r));
          row_gradient_sums(!y && kept_ ? kept_row(i, part) : y_row(r), grad_row(grad_out + offset), part, sum + part,
                            dot + part);
        }
      }
      position += count;
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
    grad_window_.clear();
    pass_ = pass;
    dot_updates_ = 0;
    if (pass.grad_weight) __builtin_memset(dots_, 0, s_.taps() * parts_ * dot_lanes() * sizeof(A));
    if (!pass.grad_x) {
      const IndexRange band = plan_.out_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end; ++position)
        fill_grad_slot(plan_.out_rows.rows[position], grad_window_.memory, true);
    } else {
      const IndexRange band = plan_.in_rows.band(task.band);
      for (int64_t position = band.begin; position < band.end;) {
        // Rows of which every column or channel has to be put in its place come one at a time.
        const bool alone = s_.stride_w > 1 || s_.multiplier > 1;
        const int64_t count = alone ? 1 : smaller(plan_.in_rows.batches[position], band.end - position);
        grad_x_rows(position, count, band.begin);
        position += count;
      }
    }
    if (pass.grad_weight) flush_dots();
  }

 private:
  // ---- memory

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
      if (row.phases == 2) return deinterleave(src, dst);
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
    for (; w < row.columns; ++w) {
      A* half = w % 2 ? odd : even;
      half[w / 2] = widen(src[w]);
    }
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

  // ---- the convolution of some rows

  // Rows computed together, apart by these distances in what they read and, in columns, in what they write.
  struct Batch {
    int64_t rows, source, result;
  };

  // result: distance of the rows in what emit writes, in columns.
  template <bool kWholeVectors, typename Emit>
  DK_INLINE void convolve(int64_t i, int64_t count, int64_t result, int64_t part, const A* base,
                          const Emit& emit) const {
    const Columns& columns = plan_.forward;
    const Batch batch{count, x_advance_, result};
    for (int64_t n = 0; n < columns.count; ++n)
      run<kWholeVectors>(columns.segments[n], taps_of(forward_tables_, columns, n, plan_.forward_rows.rows[i]),
                         weights_ + part * s_.taps(), base, columns.input_step * x_pixel(), batch, emit);
  }

  // conv(x) of a batch into y_, row behind row, or to where it is kept.
  void keep_rows(int64_t position, int64_t count, int64_t part, const A* base) {
    const int64_t i = plan_.out_rows.rows[position];
    if (kept_)
      convolve<false>(i, count, plan_.out_rows.step * s_.out_w, part, base, Keep{*this, kept_row(i, part)});
    else
      convolve<false>(i, count, s_.out_w, part, base, Keep{*this, y_});
  }
  A* kept_row(int64_t i, int64_t part) const {
    return kept_ + ((image_ * parts_ + part) * s_.out_h + i) * s_.out_w * lanes_or_one();
  }
  A* y_row(int64_t r) const { return y_ + r * s_.out_w * lanes_or_one(); }

  // step: from the inputs of one result to those of the next (NHWC).
  template <bool kWholeVectors, typename Emit>
  void run(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step, const Batch& batch,
           const Emit& emit) const {
    switch (taps.count) {
      case 9:
        return run_taps<kWholeVectors, 9>(segment, taps, weights, base, step, batch, emit);
      case 6:
        return run_taps<kWholeVectors, 6>(segment, taps, weights, base, step, batch, emit);
      case 4:
        return run_taps<kWholeVectors, 4>(segment, taps, weights, base, step, batch, emit);
      case 3:
        return run_taps<kWholeVectors, 3>(segment, taps, weights, base, step, batch, emit);
      default:
        return run_taps<kWholeVectors, 0>(segment, taps, weights, base, step, batch, emit);
    }
  }

  // N: number of taps, 0 if known only at run time.
  template <bool kWholeVectors, int N, typename Emit>
  DK_INLINE void run_taps(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step,
                          const Batch& batch, const Emit& emit) const {
    if constexpr (kNhwc) {
      // Results whose distance is the rate share inputs: 3x3 kernels of stride 1 take them together.
      const int64_t apart = N == 9 && segment.step == 1 && s_.stride_w == 1 ? s_.rate_w : 0;
      if (apart > 0 && apart * 4 <= segment.count && taps.offset[1] - taps.offset[0] == apart * step)
        channels<N, N == 9>(segment, taps, weights, base, step, apart, batch, emit);
      else
        channels<N, false>(segment, taps, weights, base, step, 1, batch, emit);
    } else {
      const auto source = source_of<N, false>(taps, weights, base);
      const int64_t n = segment.count;
      // The last vector starts so that it ends with the segment: what it shares with the one before gets the same
      // values.
      const int64_t vectors = (n + L - 1) / L, end = kWholeVectors ? (vectors - 1) * L : n - L;
      for (int64_t r = 0; r < batch.rows; ++r) {
        const int64_t from = r * batch.source, to = segment.begin + r * batch.result;
        if (n < L) {
          block<1>(source, from, to, 0, kWholeVectors ? L : n, emit);
          continue;
        }
        int64_t k = 0;
        for (; k + 6 * L < vectors * L; k += 4 * L) block<4>(source, from + k, to + k, 3 * L, L, emit);
        switch (vectors - k / L) {
          case 6:
            block<6>(source, from + k, to + k, end - k, L, emit);
            break;
          case 5:
            block<5>(source, from + k, to + k, end - k, L, emit);
            break;
          case 4:
            block<4>(source, from + k, to + k, end - k, L, emit);
            break;
          case 3:
            block<3>(source, from + k, to + k, end - k, L, emit);
            break;
          case 2:
            block<2>(source, from + k, to + k, end - k, L, emit);
            break;
          case 1:
            block<1>(source, from + k, to + k, end - k, L, emit);
            break;
        }
      }
    }
  }

  // NHWC: results `apart` columns apart side by side, for each first column.
  template <int N, bool kSliding, typename Emit>
  DK_INLINE void channels(const Segment& segment, const Taps& taps, const A* weights, const A* base, int64_t step,
                          int64_t apart, const Batch& batch, const Emit& emit) const {
    // A vector or two of channels at a time, whose weights stay in registers or close; few columns at a time, so that
    // all that a tile touches stays in the first-level cache.
    const int64_t width = larger(1, kColumnTile / apart) * apart;
    for (int64_t tile = 0; tile < segment.count; tile += width) {
      const int64_t tile_end = smaller(segment.count, tile + width);
      int64_t l = 0;
      if constexpr (N == 9)
        for (; l + 2 * L <= active_; l += 2 * L) {
          lanes<N, kSliding>(TwoVectors<kSliding>(taps, weights + l, base + l), segment, tile, tile_end, step, apart, l,
                             batch, emit);
        }
      for (; l < active_; l += L)
        lanes<N, kSliding>(source_of<N, kSliding>(taps, weights + l, base + l), segment, tile, tile_end, step, apart, l,
                           batch, emit);
    }
  }

  template <int N, bool kSliding, typename From, typename Emit>
  DK_INLINE void lanes(const From& source, const Segment& segment, int64_t tile, int64_t tile_end, int64_t step,
                       int64_t apart, int64_t l, const Batch& batch, const Emit& emit) const {
    const int64_t from_step = apart * step, to_step = apart * segment.step;
    for (int64_t r = 0; r < batch.rows; ++r)
      for (int64_t q = 0; q < apart; ++q) {
        int64_t from = r * batch.source + (tile + q) * step;
        int64_t to = segment.begin + r * batch.result + (tile + q) * segment.step;
        int64_t left = (tile_end - tile - q + apart - 1) / apart;
        for (; left >= 4; left -= 4, from += 4 * from_step, to += 4 * to_step)
          pixels<4>(source, from, from_step, to, to_step, l, emit);
        switch (left) {
          case 3:
            pixels<3>(source, from, from_step, to, to_step, l, emit);
            break;
          case 2:
            pixels<2>(source, from, from_step, to, to_step, l, emit);
            break;
          case 1:
            pixels<1>(source, from, from_step, to, to_step, l, emit);
            break;
        }
      }
  }

  // What the results of one segment are computed from.
  template <int N, bool kSliding>
  struct Source {
    static constexpr bool kTwo = false;
    const A* input[N];
    V weight[N];
    DK_INLINE Source(const Taps& taps, const A* weights, const A* base) {
#pragma GCC unroll 16
      for (int t = 0; t < N; ++t) {
        input[t] = base + taps.offset[t];
        weight[t] = kNhwc ? load(weights + taps.weight[t]) : broadcast(weights[taps.weight[t]]);
      }
    }
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, int64_t last, V (&acc)[B]) const {
      if constexpr (kSliding)
        accumulate_sliding<A, B>(input, weight, offset, step, acc);
      else
        accumulate<A, N, B>(input, weight, offset, step, last, acc);
    }
  };

  // With the number of taps known only at run time.
  struct AnySource {
    static constexpr bool kTwo = false;
    const Taps& taps;
    const A *weights, *base;
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, int64_t last, V (&acc)[B]) const {
      accumulate<A, kNhwc, B>(taps, weights, base + offset, step, last, acc);
    }
  };
  template <int N, bool kSliding>
  DK_INLINE static auto source_of(const Taps& taps, const A* weights, const A* base) {
    if constexpr (N == 0)
      return AnySource{taps, weights, base};
    else
      return Source<N, kSliding>(taps, weights, base);
  }

  template <bool kSliding>
  struct TwoVectors {
    static constexpr bool kTwo = true;
    const A* input[9];
    V weight[2][9];
    DK_INLINE TwoVectors(const Taps& taps, const A* weights, const A* base) {
#pragma GCC unroll 16
      for (int t = 0; t < 9; ++t) {
        input[t] = base + taps.offset[t];
        weight[0][t] = load(weights + taps.weight[t]), weight[1][t] = load(weights + taps.weight[t] + L);
      }
    }
    template <int B>
    DK_INLINE void operator()(int64_t offset, int64_t step, V (&acc)[2][B]) const {
      if constexpr (kSliding)
        accumulate_sliding<A, B>(input, weight, offset, step, acc);
      else
        accumulate<A, B>(input, weight, offset, step, acc);
    }
  };

  // B results side by side, to_step columns apart, of one vector of channels.
  template <int B, typename From, typename Emit>
  DK_INLINE void pixels(const From& source, int64_t from, int64_t step, int64_t to, int64_t to_step, int64_t l,
                        const Emit& emit) const {
    int64_t at[B];
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) at[b] = to + to_step * b;
    if constexpr (From::kTwo) {
      V acc[2][B];
      source.template operator()<B>(from, step, acc);
      emit.template operator()<B>(at, l, acc[0], smaller(L, count_ - l));
      emit.template operator()<B>(at, l + L, acc[1], smaller(L, count_ - l - L));
    } else {
      V acc[B];
      source.template operator()<B>(from, step, (B - 1) * step, acc);
      emit.template operator()<B>(at, l, acc, smaller(L, count_ - l));
    }
  }
  // B vectors of columns, the last one `last` columns behind the first.
  template <int B, typename From, typename Emit>
  DK_INLINE void block(const From& source, int64_t from, int64_t to, int64_t last, int64_t valid,
                       const Emit& emit) const {
    V acc[B];
    source.template operator()<B>(from, L, last, acc);
    int64_t at[B];
#pragma GCC unroll 8
    for (int b = 0; b < B - 1; ++b) at[b] = to + b * L;
    at[B - 1] = to + last;
    emit.template operator()<B>(at, 0, acc, valid);
  }

  // ---- epilogues: acc[b] is column at[b] of the result, channels l ... (NHWC), or columns at[b] ... (NCHW)

  template <int B, typename Out>
  DK_INLINE void write(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid, Out* row,
                       int64_t pixel) const {
    Out* p = kNhwc ? row + l : row;
#pragma GCC unroll 8
    for (int b = 0; b < B; ++b) put(p + (kNhwc ? at[b] * pixel : at[b]), acc[b], valid);
  }

  struct Store {
    const Worker& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, valid, row, w.out_pixel_);
    }
  };

  struct StoreGradX {
    const Worker& w;
    T* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, valid, row, w.s_.channels);
    }
  };

  struct StoreActivated {
    const Worker& w;
    T* row;
    int64_t part;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, V (&acc)[B], int64_t valid) const {
      const V scale = kNhwc ? load(w.scale_ + l) : broadcast(w.scale_[part]);
      const V shift = kNhwc ? load(w.shift_ + l) : broadcast(w.shift_[part]);
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) acc[b] = activated(V(acc[b] * scale + shift), w.activation_);
      w.write(at, l, acc, valid, row, w.out_pixel_);
    }
  };

  // Into rows of A, with all lanes of a group (NHWC).
  struct Keep {
    const Worker& w;
    A* row;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t l, const V (&acc)[B], int64_t valid) const {
      w.write(at, l, acc, kNhwc ? L : valid, row, w.lanes_);
    }
  };

  // Phase of a strided gradient: results of one segment side by side (NCHW).
  struct KeepPhase {
    const Worker& w;
    A* row;
    int64_t begin;
    template <int B>
    DK_INLINE void operator()(const int64_t (&at)[B], int64_t, const V (&acc)[B], int64_t) const {
#pragma GCC unroll 8
      for (int b = 0; b < B; ++b) store(row + at[b] - begin, acc[b]);
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
  template <typename Out>
  DK_INLINE static void put(Out* p, V v, int64_t valid) {
    if (valid == L)
      store(p, v);
    else
      store_part(p, v, valid);
  }

  // A row of the gradient: columns `pixel` apart (NHWC).
  struct GradRow {
    const A* data;
    int64_t pixel;
  };
  // In place where it needs no widening; otherwise valid until the next call.
  GradRow grad_row(const T* src) {
    if constexpr (sizeof(T) == sizeof(A)) {
      if (!kNhwc || count_ == lanes_) return {reinterpret_cast<const A*>(src), out_pixel_};
    }
    return {widened_row(src, g_), lanes_};
  }
  const A* widened_row(const T* src, A* memory) const {
    if constexpr (kNhwc) {
      for (int64_t j = 0; j < s_.out_w; ++j) copy_widened(src + j * s_.out_channels(), memory + j * lanes_, count_);
    } else {
      copy_widened(src, memory, s_.out_w);
    }
    return memory;
  }

  // ---- sums over a row

  // The first `columns` of y_ (NHWC: pixels), NCHW rows lying one behind the other.
  void row_statistics(double seen, int64_t columns, double* mean, double* m2) const {
    const double n = double(columns);
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        V sum = {};
        for (int64_t j = 0; j < columns; ++j) sum += load(y_ + j * lanes_ + l);
        const V centre = sum / A(n);
        V squares = {}, rests = {};
        for (int64_t j = 0; j < columns; ++j) {
          const V d = load(y_ + j * lanes_ + l) - centre;
          squares += d * d, rests += d;
        }
        for (int64_t e = 0; e < L; ++e)
          join_deviations(seen, n, centre[e], rests[e], squares[e], mean[l + e], m2[l + e]);
      }
    } else {
      const int64_t whole = columns / L * L;
      V sums = {};
      for (int64_t j = 0; j < whole; j += L) sums += load(y_ + j);
      A sum = sum_of_lanes<A>(sums);
      for (int64_t j = whole; j < columns; ++j) sum += y_[j];
      const A centre = sum / A(n);
      V squares = {}, rests = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V d = load(y_ + j) - centre;
        squares += d * d, rests += d;
      }
      A square = sum_of_lanes<A>(squares), rest = sum_of_lanes<A>(rests);
      for (int64_t j = whole; j < columns; ++j) {
        const A d = y_[j] - centre;
        square += d * d, rest += d;
      }
      join_deviations(seen, n, centre, rest, square, *mean, *m2);
    }
  }

  void row_gradient_sums(const A* y_row, const GradRow& g, int64_t part, double* sum, double* dot) const {
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        V sums = {}, dots = {};
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_row + j * lanes_ + l);
          const V grad = masked(load(g.data + j * g.pixel + l), V(y * scale + shift), activation_);
          sums += grad, dots += grad * ((y - mean) * inv);
        }
        for (int64_t e = 0; e < L; ++e) sum[l + e] += sums[e], dot[l + e] += dots[e];
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const int64_t whole = s_.out_w / L * L;
      V sums = {}, dots = {};
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_row + j);
        const V grad = masked(load(g.data + j), V(y * scale + shift), activation_);
        sums += grad, dots += grad * ((y - mean) * inv);
      }
      A sum_row = sum_of_lanes<A>(sums), dot_row = sum_of_lanes<A>(dots);
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g.data[j], y_row[j] * scale + shift, activation_);
        sum_row += grad, dot_row += grad * ((y_row[j] - mean) * inv);
      }
      *sum += sum_row, *dot += dot_row;
    }
  }

  // ---- backward

  // conv(x) of a row: from y if the forward pass stored it, from the first pass if that kept it, otherwise from x.
  const A* convolution_row(int64_t i, int64_t part, const A* base, const T* y) {
    if (y) return widened_row(y + out_offset(i, part), y_);
    if (kept_) return kept_row(i, part);
    convolve<false>(i, 1, 0, part, base, Keep{*this, y_});
    return y_;
  }

  // Gradient of conv(x) from the gradient of the activation's output, for row i of one part.
  void fill_grad_row(int64_t i, int64_t part, const A* base, A* dst) {
    const T* src = pass_.grad_out + out_offset(i, part);
    if (!pass_.with_norm) {
      widened_row(src, dst);
      return;
    }
    const A* y_row = convolution_row(i, part, base, pass_.y);
    const GradRow g = grad_row(src);
    const bool batch = pass_.batch_statistics;
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        const V scale = load(scale_ + l), shift = load(shift_ + l), mean = load(mean_ + l), inv = load(inv_std_ + l);
        const V mean_grad = load(pass_.mean_grad + l), mean_dot = load(pass_.mean_dot + l);
        for (int64_t j = 0; j < s_.out_w; ++j) {
          const V y = load(y_row + j * lanes_ + l);
          const V grad = masked(load(g.data + j * g.pixel + l), V(y * scale + shift), activation_);
          store(dst + j * lanes_ + l, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
        }
      }
    } else {
      const A scale = scale_[part], shift = shift_[part], mean = mean_[part], inv = inv_std_[part];
      const A mean_grad = pass_.mean_grad[part], mean_dot = pass_.mean_dot[part];
      const int64_t whole = s_.out_w / L * L;
      for (int64_t j = 0; j < whole; j += L) {
        const V y = load(y_row + j);
        const V grad = masked(load(g.data + j), V(y * scale + shift), activation_);
        store(dst + j, V(scale * (batch ? V(grad - mean_grad - (y - mean) * inv * mean_dot) : grad)));
      }
      for (int64_t j = whole; j < s_.out_w; ++j) {
        const A grad = masked(g.data[j], y_row[j] * scale + shift, activation_);
        dst[j] = scale * (batch ? grad - mean_grad - (y_row[j] - mean) * inv * mean_dot : grad);
      }
    }
  }

  // Row i of every part into the slot, and, where this band owns the row, its share of the weights' gradient.
  void fill_grad_slot(int64_t i, A* slot, bool owned) {
    const bool dots = pass_.grad_weight && owned;
    const A* base = dots || (pass_.with_norm && !pass_.y && !kept_) ? x_base(i) : nullptr;
    for (int64_t part = 0; part < parts_; ++part) {
      A* row = slot + part * (grad_window_.pitch / parts_);
      if constexpr (!kNhwc) row -= plan_.grad_row.origin;
      fill_grad_row(i, part, base, row);
      if (dots) row_dots(i, part, base, row);
    }
    if (!dots) return;
    dot_updates_ += kNhwc ? s_.out_w : s_.out_w / L + 1;
    if (dot_updates_ > 512) flush_dots();  // float sums stay short
  }

  void row_dots(int64_t i, int64_t part, const A* base, const A* grad) {
    A* sums = dots_ + part * s_.taps() * dot_lanes();
    for (int64_t n = 0; n < plan_.forward.count; ++n) {
      const Segment& segment = plan_.forward.segments[n];
      const Taps taps = taps_of(forward_tables_, plan_.forward, n, plan_.forward_rows.rows[i]);
      const A* g = grad + segment.begin * lanes_or_one();
      for (int64_t t = 0; t < taps.count; t += kMostDots)
        dots(segment, {taps.offset + t, taps.weight + t, smaller(kMostDots, taps.count - t)}, base, g, sums);
    }
  }

  void dots(const Segment& segment, const Taps& taps, const A* base, const A* grad, A* row_sums) const {
    const A* inputs[kMostDots];
    A* sums[kMostDots];
    if constexpr (kNhwc) {
      for (int64_t l = 0; l < active_; l += L) {
        for (int64_t t = 0; t < taps.count; ++t)
          inputs[t] = base + taps.offset[t] + l, sums[t] = row_sums + taps.weight[t] + l;
        dispatch_dots(taps.count, inputs, grad + l, segment.count, plan_.forward.input_step * x_pixel(), lanes_, sums);
      }
    } else {
      for (int64_t t = 0; t < taps.count; ++t)
        inputs[t] = base + taps.offset[t], sums[t] = row_sums + taps.weight[t] * L;
      // A padded segment is the whole row, and the gradient's row is zero beyond its end.
      const int64_t whole = plan_.forward.padded ? (segment.count + L - 1) / L : segment.count / L;
      dispatch_dots(taps.count, inputs, grad, whole, L, L, sums);
      for (int64_t k = whole * L; k < segment.count; ++k)
        for (int64_t t = 0; t < taps.count; ++t) sums[t][0] += grad[k] * inputs[t][k];
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

  void grad_x_rows(int64_t position, int64_t count, int64_t band_begin) {
    const int64_t h = plan_.in_rows.rows[position];
    const ResultRow& row = plan_.transposed_rows.rows[h];
    const ResultRow& last = plan_.transposed_rows.rows[plan_.in_rows.rows[position + count - 1]];
    if (row.first < row.last)
      grad_window_.require(row.keep, last.high, last.high,
                           [&](int64_t i, A* slot) { fill_grad_slot(i, slot, owns(i, band_begin)); });
    const int64_t advance =
        count == 1 ? 0 : (last.source - row.source) / (count - 1) / grad_window_.step * grad_window_.pitch;
    const Batch batch{count, advance, plan_.in_rows.step * s_.in_w};
    const A* base = grad_window_.at(row.source);
    const Columns& columns = plan_.transposed;
    T* out = pass_.grad_x + in_offset(h);
    for (int64_t n = 0; n < columns.count; ++n) {
      const Segment& segment = columns.segments[n];
      const Taps taps = taps_of(transposed_tables_, columns, n, row);
      if constexpr (kNhwc) {
        if (s_.multiplier == 1)
          run<false>(segment, taps, weights_, base, lanes_or_one(), batch, StoreGradX{*this, out});
        else
          run<true>(segment, taps, weights_, base, lanes_or_one(), batch, Keep{*this, dx_});
      } else if (segment.step == 1) {
        run<false>(segment, taps, weights_, base, lanes_or_one(), batch, StoreGradX{*this, out});
      } else {
        run<true>(segment, taps, weights_, base, lanes_or_one(), batch, KeepPhase{*this, dx_, segment.begin});
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
    const ResultRow& row = plan_.forward_rows.rows[i];
    return row.first < row.last &&
           plan_.in_row_position[row.source + row.first * plan_.forward_rows.source_step] >= band_begin;
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
      auto worker = make_worker(true);
      for (int64_t g = begin; g < end; ++g) {
        for (int64_t t = 0; t < first_tasks; ++t) first(worker, g * first_tasks + t);
        between(worker, g);
        for (int64_t t = 0; t < second_tasks; ++t) second(worker, g * second_tasks + t);
      }
    });
    return;
  }
  parallel(groups * first_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t t = begin; t < end; ++t) first(worker, t);
  });
  parallel(groups, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t g = begin; g < end; ++g) between(worker, g);
  });
  parallel(groups * second_tasks, [&](int64_t begin, int64_t end) {
    auto worker = make_worker(false);
    for (int64_t t = begin; t < end; ++t) second(worker, t);
  });
}

template <typename T, bool kNhwc>
struct Passes {
  using A = acc_t<T>;
  using W = Worker<T, kNhwc>;
  using P = Planes<T, kNhwc>;

  static void forward(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>* norm, T* out,
                      const Parallel& parallel) {
    if constexpr (kNhwc) {
      if (Pixels<T>::serve(plan.shape)) {
        const auto cut = Pixels<T>::cut(plan.shape);
        return parallel(cut.pieces, [&](int64_t begin, int64_t end) {
          Pixels<T>(plan.shape, weight, norm).run(cut, begin, end, x, out);
        });
      }
    } else if (plan.shape.stride_w == 1 && plan.shape.out_w <= 6 * kLanes<A>) {  // one pass gains where rows are short
      if (by_planes(plan, P::Pass::kInference, parallel,
                    [&](auto& planes, int64_t task) { planes.inference(task, x, weight, norm, out); }))
        return;
    }
    const int64_t images = plan.shape.batch, bands = plan.out_rows.bands;
    parallel(plan.groups * images * bands, [&](int64_t begin, int64_t end) {
      W worker(plan, x, weight, W::Needs::kForward);
      for (int64_t t = begin; t < end; ++t) {
        const Task task = task_of(t, images, bands);
        worker.select(task.group);
        if (norm) worker.select_norm(*norm);
        worker.forward(task, out, norm != nullptr);
      }
    });
  }

  // Runs the tasks by planes where that serves; otherwise returns false.
  template <typename Run>
  static bool by_planes(const Plan& plan, typename P::Pass pass, const Parallel& parallel, const Run& run) {
    // float64 is for checking gradients: it does without.
    if constexpr (sizeof(T) == sizeof(double)) {
      return false;
    } else {
      if (plan.exact) return false;
      const auto cut = P::cut(plan.shape, pass, parallel.threads());
      if (cut.planes == 0) return false;
      parallel(cut.tasks, [&](int64_t begin, int64_t end) {
        P planes(plan.shape, pass, cut);
        for (int64_t task = begin; task < end; ++task) run(planes, task);
      });
      return true;
    }
  }

  // Lanes that any group's partial sums may take.
  static int64_t lanes_of(const Plan& plan) {
    const int64_t most = smaller(plan.group_channels, plan.shape.channels) * plan.shape.multiplier;
    return kNhwc ? rounded_up(most, kLanes<A>) : most;
  }

  // Values of x, or of its gradient.
  static int64_t size_of_x(const Plan& plan) {
    const DepthwiseShape& s = plan.shape;
    return s.batch * s.channels * s.in_h * s.in_w;
  }
  // Calls f(first value, number of values) for the vectors of x.
  template <typename F>
  static void vectors_of_x(const Plan& plan, const Parallel& parallel, const F& f) {
    constexpr int64_t kBlock = 1 << 14, L = kLanes<A>;
    const int64_t size = size_of_x(plan);
    parallel((size + kBlock - 1) / kBlock, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin * kBlock; k < smaller(size, end * kBlock); k += L) f(k, smaller(L, size - k));
    });
  }
  static Vec<A> part_or_whole(const T* p, int64_t n) { return n == kLanes<A> ? load(p) : load_part(p, n); }
  // Where the pre-activation cannot be part of the passes: activated(x) is written to memory and used there.
  static void activate_x(const Plan& plan, const T* x, Activation activation, T* result, const Parallel& parallel) {
    vectors_of_x(plan, parallel, [&](int64_t k, int64_t n) {
      const Vec<A> v = activated(part_or_whole(x + k, n), activation);
      n == kLanes<A> ? store(result + k, v) : store_part(result + k, v, n);
    });
  }

  static void training(const Plan& plan, const T* x, const T* weight, const BatchNorm<A>& norm, T* out, T* y, A* mean,
                       A* var, Activation pre_activation, const Parallel& parallel) {
    const DepthwiseShape& s = plan.shape;
    if (!y && by_planes(plan, P::Pass::kTraining, parallel, [&](auto& planes, int64_t task) {
          planes.training(task, x, weight, norm, out, mean, var, pre_activation);
        }))
      return;
    if (pre_activation != Activation::kNone) {
      const Workspace activated_x(size_t(size_of_x(plan)) * sizeof(T));
      activate_x(plan, x, pre_activation, activated_x.as<T>(), parallel);
      return training(plan, activated_x.as<T>(), weight, norm, out, y, mean, var, Activation::kNone, parallel);
    }
    const int64_t images = s.batch, bands = plan.out_rows.bands, tasks = plan.out_tasks_per_group();
    const int64_t lanes = lanes_of(plan);
    const Workspace partials(size_t(plan.groups * tasks * lanes * 2) * sizeof(double) + 64);
    auto partial = [&](int64_t task) { return partials.as<double>() + task * lanes * 2; };
    two_passes(
        plan.groups, tasks, tasks, parallel, [&](bool) { return W(plan, x, weight, W::Needs::kStatistics); },
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
              join_moments(seen, n, part[l], part[lanes + l], centre, m2);
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
    if (!z.y && by_planes(plan, P::Pass::kBackward, parallel,
                          [&](auto& planes, int64_t task) { planes.backward(task, z, norm, batch_statistics); }))
      return;
    if (z.pre_activation != Activation::kNone) {
      const Workspace activated_x(size_t(size_of_x(plan)) * sizeof(T));
      activate_x(plan, z.x, z.pre_activation, activated_x.as<T>(), parallel);
      BackwardTensors<T> tensors = z;
      tensors.x = activated_x.as<T>(), tensors.pre_activation = Activation::kNone;
      backward(plan, tensors, norm, batch_statistics, parallel);
      if (!z.grad_x) return;
      return vectors_of_x(plan, parallel, [&](int64_t k, int64_t n) {
        const Vec<A> v = masked(part_or_whole(z.grad_x + k, n), part_or_whole(z.x + k, n), z.pre_activation);
        n == kLanes<A> ? store(z.grad_x + k, v) : store_part(z.grad_x + k, v, n);
      });
    }
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
        plan.groups, sum_tasks, tasks, parallel,
        [&](bool whole_groups) {
          return W(plan, z.x, z.weight, W::Needs::kBackward, whole_groups && norm && !z.y && gradients);
        },
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
                          A* mean, A* var, Activation pre_activation, const Parallel& parallel) {
  if (plan.shape.channels_last)
    Passes<T, true>::training(plan, x, weight, norm, out, y, mean, var, pre_activation, parallel);
  else
    Passes<T, false>::training(plan, x, weight, norm, out, y, mean, var, pre_activation, parallel);
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
