#include "plan.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace deeplab_kernels::cpu {
namespace {

// Bytes of packed rows that should stay in a core's second-level cache, half of today's smaller ones.
constexpr int64_t kWindowBudget = 224 << 10;
// Packed rows of a single channel fit the first-level cache.
constexpr int64_t kRowsBudget = 24 << 10;
// Rows of x itself, where they are read in place: they lie there anyway.
constexpr int64_t kDirectBudget = 384 << 10;
// Training passes over a group's data more than once: so much of it should stay in the caches in between.
constexpr int64_t kGroupBudget = 1 << 20;
// Rows computed together: they share the setting up, and NHWC ones their inputs in the first-level cache.
constexpr int64_t kRowsTogetherNchw = 16, kRowsTogetherNhwc = 4;
// Whole cache lines for each group.
constexpr int64_t kChannelQuantum = 16;
constexpr int64_t kSmallestGroup = 64;
constexpr int64_t kWantedGroups = 16;
// Pixels this many bytes apart (or a multiple) compete for the same few places in the caches.
constexpr int64_t kAliasingStride = 4096;
// As many tasks as keep the threads of a large machine busy, and no more: each has its halo.
constexpr int64_t kWantedTasks = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

struct Axis {
  int64_t in, out, taps, stride, rate, pad;
};

// A tap as seen from one phase of the results: result k reads source a + step*k, inside the image for k in range.
struct PhaseTap {
  int64_t tap, a;
  IndexRange range;
};

struct ColumnPlan {
  std::vector<Segment> segments;
  std::vector<ColumnTap> taps;
  int64_t cost = 0;  // vector operations, roughly
};

class ColumnPlanner {
 public:
  // transposed: results are inputs, sources are outputs.
  ColumnPlanner(const Axis& axis, bool transposed) : axis_(axis), transposed_(transposed) {
    phases_ = transposed ? axis.stride : 1;
    step_ = transposed ? 1 : axis.stride;
    results_ = transposed ? axis.in : axis.out;
    sources_ = transposed ? axis.out : axis.in;
    phases_ = std::max<int64_t>(1, std::min(phases_, results_));
  }

  int64_t step() const { return step_; }

  // NHWC: sources are addressed by their own column.
  ColumnPlan by_pixel() const {
    return build(true, [&](int64_t source) { return source; });
  }

  PackedRow packed_row() const {
    int64_t origin = 0;
    for (int64_t q = 0; q < phases_; ++q)
      for (const PhaseTap& t : phase_taps(q)) origin = std::min(origin, t.a);
    // The row itself serves as an operand too (weight gradient), hence the sources' own extent.
    int64_t size = ceil_div(sources_ - origin, step_) + kMostLanes;
    uint64_t used = 0;
    for (int64_t q = 0; q < phases_; ++q)
      for (const PhaseTap& t : phase_taps(q)) {
        size = std::max(size, (t.a - origin) / step_ + round_up(phase_count(q), kMostLanes) + kMostLanes);
        if (const int64_t phase = (t.a - origin) % step_; phase < 64) used |= uint64_t(1) << phase;
      }
    return {origin, step_, size, sources_, used};
  }

  ColumnPlan packed(const PackedRow& row, bool clipped) const {
    return build(clipped, [&](int64_t source) {
      const int64_t e = source - row.origin;
      return e % row.phases * row.phase_size + e / row.phases;
    });
  }

 private:
  int64_t phase_count(int64_t q) const { return results_ <= q ? 0 : (results_ - q - 1) / stride_of_results() + 1; }
  int64_t stride_of_results() const { return transposed_ ? axis_.stride : 1; }

  std::vector<PhaseTap> phase_taps(int64_t q) const {
    std::vector<PhaseTap> taps;
    const int64_t count = phase_count(q);
    for (int64_t v = 0; v < axis_.taps; ++v) {
      int64_t a = v * axis_.rate - axis_.pad;
      if (transposed_) {
        if ((q - a) % axis_.stride != 0) continue;
        a = (q - a) / axis_.stride;
      }
      const int64_t begin = a >= 0 ? 0 : ceil_div(-a, step_);
      const int64_t end = sources_ - 1 - a < 0 ? 0 : std::min(count, (sources_ - 1 - a) / step_ + 1);
      if (begin < end) taps.push_back({v, a, {begin, end}});
    }
    return taps;
  }

  template <typename Position>
  ColumnPlan build(bool clipped, const Position& position) const {
    ColumnPlan plan;
    for (int64_t q = 0; q < phases_; ++q) {
      const int64_t count = phase_count(q);
      const std::vector<PhaseTap> taps = phase_taps(q);
      std::vector<int64_t> cuts{0, count};
      if (clipped)
        for (const PhaseTap& t : taps) cuts.insert(cuts.end(), {t.range.begin, t.range.end});
      std::sort(cuts.begin(), cuts.end());
      for (size_t i = 0; i + 1 < cuts.size(); ++i) {
        const int64_t begin = cuts[i], length = cuts[i + 1] - begin;
        if (length == 0) continue;
        Segment segment{q + begin * stride_of_results(), stride_of_results(), length, int64_t(plan.taps.size()), 0};
        for (const PhaseTap& t : taps)
          if (!clipped || (t.range.begin <= begin && begin < t.range.end)) {
            plan.taps.push_back({t.tap, position(t.a + begin * step_)});
            ++segment.taps;
          }
        plan.cost += (segment.taps + 2) * ceil_div(length, 8);
        plan.segments.push_back(segment);
      }
    }
    return plan;
  }

  Axis axis_;
  bool transposed_;
  int64_t phases_, step_, results_, sources_;
};

std::vector<int64_t> phase_order(int64_t count, int64_t step) {
  std::vector<int64_t> order;
  order.reserve(count);
  for (int64_t a = 0; a < std::min(step, count); ++a)
    for (int64_t i = a; i < count; i += step) order.push_back(i);
  return order;
}

int64_t bands_for(int64_t units, int64_t rows, int64_t smallest_band) {
  return std::clamp<int64_t>(ceil_div(kWantedTasks, std::max<int64_t>(units, 1)), 1,
                             std::max<int64_t>(1, rows / smallest_band));
}

struct Grouping {
  int64_t channels;
  bool direct;
};

Grouping group_channels(const DepthwiseShape& s, Purpose purpose, int64_t stored_bytes, int64_t computed_bytes,
                        int64_t vector_lanes) {
  if (!s.channels_last) return {1, false};
  const int64_t pixel = s.channels * stored_bytes;
  const bool direct = stored_bytes == computed_bytes && s.multiplier == 1 && s.channels % vector_lanes == 0 &&
                      pixel % kAliasingStride != 0;
  const int64_t row = std::max<int64_t>(1, s.in_w * s.multiplier * computed_bytes);
  int64_t fit =
      direct ? kDirectBudget / (row * (s.kernel_h + kRowsTogetherNhwc)) : kWindowBudget / (row * (s.kernel_h + 4));
  if (purpose != Purpose::kInference) {
    const int64_t image = std::max<int64_t>(1, s.batch * s.in_h * row);
    // Enough groups that each thread can make all passes over some of them.
    fit = std::min(
        {fit, std::max(kGroupBudget / image, kSmallestGroup), std::max(kSmallestGroup, s.channels / kWantedGroups)});
  }
  if (fit >= s.channels) return {std::max<int64_t>(1, s.channels), direct};
  fit = std::max(kSmallestGroup, fit / kChannelQuantum * kChannelQuantum);
  const int64_t groups = ceil_div(s.channels, fit);
  return {round_up(ceil_div(s.channels, groups), kChannelQuantum), direct};
}

struct RowPlan {
  std::vector<ResultRow> rows;
  std::vector<int64_t> class_begin{0}, kernel_rows;
  int64_t source_step;

  RowPlan() = default;
  RowPlan(const Axis& axis, bool transposed) {
    const int64_t results = transposed ? axis.in : axis.out, sources = transposed ? axis.out : axis.in;
    const int64_t classes = transposed ? std::max<int64_t>(1, std::min(axis.stride, results)) : 1;
    source_step = transposed ? -(axis.rate / std::gcd(axis.rate, axis.stride)) : axis.rate;
    for (int64_t q = 0; q < classes; ++q) {
      for (int64_t u = 0; u < axis.taps; ++u)
        if (!transposed || (q + axis.pad - u * axis.rate) % axis.stride == 0) kernel_rows.push_back(u);
      class_begin.push_back(kernel_rows.size());
    }
    rows.reserve(results);
    for (int64_t i = 0; i < results; ++i) {
      const int64_t q = i % classes, begin = class_begin[q], count = class_begin[q + 1] - begin;
      if (count == 0) {
        rows.push_back({0, q, 0, 0, 0, -1});
        continue;
      }
      const int64_t source = transposed ? (i + axis.pad - kernel_rows[begin] * axis.rate) / axis.stride
                                        : tap_input(i, 0, axis.stride, axis.rate, axis.pad);
      int64_t first = 0, last = count;
      while (first < count && outside(source + first * source_step, sources)) ++first;
      while (last > first && outside(source + (last - 1) * source_step, sources)) --last;
      const int64_t a = source + first * source_step, b = source + (last - 1) * source_step;
      rows.push_back({source, q, first, last, std::min(a, b), first < last ? std::max(a, b) : -1});
    }
  }

  // Completes ResultRow::keep for rows processed in this order (phases of rows order_step apart); returns how many
  // slots, `step` source rows apart, the rows kept at once take.
  int64_t keep_for_later(const std::vector<int64_t>& order, int64_t order_step, int64_t step) {
    int64_t slots = 1;
    for (int64_t p = int64_t(order.size()) - 1; p >= 0; --p) {
      ResultRow& row = rows[order[p]];
      const bool phase_goes_on = p + 1 < int64_t(order.size()) && order[p + 1] == order[p] + order_step;
      if (phase_goes_on) {
        const ResultRow& next = rows[order[p + 1]];
        if (row.first == row.last) row.keep = next.keep;
        if (next.keep >= 0) row.keep = std::min(row.keep, next.keep);
      } else if (row.first == row.last) {
        row.keep = -1;  // nothing to keep
      }
      if (row.first < row.last) slots = std::max(slots, (row.high - row.keep) / step + 1);
    }
    return slots;
  }

  // How many rows from each position on can be computed together.
  std::vector<int64_t> batches(const std::vector<int64_t>& order, int64_t order_step, const WindowSize& window,
                               int64_t most) const {
    std::vector<int64_t> lengths(order.size());
    for (size_t p = 0; p < order.size(); ++p) {
      const ResultRow& start = rows[order[p]];
      int64_t n = 1;
      while (n < most && p + n < order.size() && order[p + n] == order[p] + n * order_step) {
        const ResultRow& row = rows[order[p + n]];
        if (row.row_class != start.row_class || row.first != start.first || row.last != start.last) break;
        if ((row.high - start.keep) / window.step >= window.slots) break;
        ++n;
      }
      lengths[p] = n;
    }
    return lengths;
  }

  static bool outside(int64_t row, int64_t rows) { return row < 0 || row >= rows; }
  Rows view() const {
    return {rows.data(), int64_t(class_begin.size()) - 1, class_begin.data(), kernel_rows.data(), source_step};
  }
};

}  // namespace

struct PlanBuilder::Storage {
  std::vector<int64_t> out_rows, in_rows, in_row_position, out_batches, in_batches;
  ColumnPlan forward, transposed;
  RowPlan forward_rows, transposed_rows;
  Plan plan{};
};

PlanBuilder::~PlanBuilder() { delete storage_; }
const Plan& PlanBuilder::plan() const { return storage_->plan; }

PlanBuilder::PlanBuilder(const DepthwiseShape& s, Purpose purpose, int64_t stored_bytes, int64_t computed_bytes,
                         int64_t vector_lanes, bool exact)
    : storage_(new Storage) {
  Plan& plan = storage_->plan;
  plan.shape = s;
  plan.exact = exact;
  const bool backward = purpose == Purpose::kBackward;
  const Grouping grouping = group_channels(s, purpose, stored_bytes, computed_bytes, vector_lanes);
  plan.group_channels = grouping.channels;
  plan.direct = grouping.direct;
  plan.groups = ceil_div(s.channels, plan.group_channels);

  const Axis width{s.in_w, s.out_w, s.kernel_w, s.stride_w, s.rate_w, s.pad_left};
  auto columns = [&](const ColumnPlanner& planner, ColumnPlan& kept, PackedRow& row) -> Columns {
    bool padded = false;
    if (s.channels_last) {
      kept = planner.by_pixel();
    } else {
      row = planner.packed_row();
      kept = planner.packed(row, true);
      if (!exact) {
        // Short segments cost more than the padding they avoid, unless the rate is large.
        ColumnPlan whole = planner.packed(row, false);
        if (whole.cost <= kept.cost + kept.cost / 2) kept = std::move(whole), padded = true;
      }
    }
    return {kept.segments.data(), int64_t(kept.segments.size()), kept.taps.data(), s.channels_last ? planner.step() : 1,
            padded};
  };
  plan.forward = columns(ColumnPlanner(width, false), storage_->forward, plan.x_row);
  if (backward) plan.transposed = columns(ColumnPlanner(width, true), storage_->transposed, plan.grad_row);

  const Axis height{s.in_h, s.out_h, s.kernel_h, s.stride_h, s.rate_h, s.pad_top};
  storage_->forward_rows = RowPlan(height, false);
  plan.forward_rows = storage_->forward_rows.view();
  if (backward) {
    storage_->transposed_rows = RowPlan(height, true);
    plan.transposed_rows = storage_->transposed_rows.view();
  }

  const int64_t lanes = round_up(plan.group_channels * s.multiplier, kMostLanes);
  const int64_t x_row = (s.channels_last ? s.in_w * lanes : plan.x_row.size()) * computed_bytes;
  const int64_t grad_row = (s.channels_last ? s.out_w * lanes : plan.grad_row.size() * s.multiplier) * computed_bytes;
  const int64_t units = plan.groups * s.batch;
  const int64_t out_bands = bands_for(units, s.out_h, 8), in_bands = bands_for(units, s.in_h, 16);
  // Bands of rows in their natural order share 2*rate rows with their neighbours, bands of phases few or none.
  const bool natural = s.rate_h == 1 || (out_bands == 1 && in_bands == 1 && s.in_h * x_row <= kWindowBudget &&
                                         (!backward || s.out_h * grad_row <= kWindowBudget));
  const int64_t budget = s.channels_last ? kWindowBudget : kRowsBudget;
  // Distances within a phase, of inputs and of outputs.
  const int64_t in_step = natural ? 1 : s.rate_h, out_step = natural ? 1 : s.rate_h / std::gcd(s.rate_h, s.stride_h);
  auto window = [&](RowPlan& rows, const std::vector<int64_t>& order, int64_t order_step, int64_t sources,
                    int64_t row_bytes, int64_t step) -> WindowSize {
    const int64_t needed = rows.keep_for_later(order, order_step, step);
    // Room for some rows more, so that moving those still needed to the front is rare; for all of them where they fit
    // anyway.
    const int64_t roomy =
        natural && s.rate_h > 1 ? sources : std::max(needed + 8, budget / std::max<int64_t>(1, row_bytes));
    return {std::max(needed, std::min(sources, roomy)), step};
  };
  storage_->out_rows = phase_order(s.out_h, out_step);
  plan.x_window = window(storage_->forward_rows, storage_->out_rows, out_step, s.in_h, x_row, in_step);
  const int64_t most = s.channels_last ? kRowsTogetherNhwc : kRowsTogetherNchw;
  plan.rows_together = most;
  storage_->out_batches = storage_->forward_rows.batches(storage_->out_rows, out_step,
                                                         plan.direct ? WindowSize{s.in_h, 1} : plan.x_window, most);
  plan.out_rows = {storage_->out_rows.data(), s.out_h, out_bands, out_step, storage_->out_batches.data()};
  if (!backward) return;
  storage_->in_rows = phase_order(s.in_h, in_step);
  plan.grad_window = window(storage_->transposed_rows, storage_->in_rows, in_step, s.out_h, grad_row, out_step);
  storage_->in_batches = storage_->transposed_rows.batches(storage_->in_rows, in_step, plan.grad_window, most);
  plan.in_rows = {storage_->in_rows.data(), s.in_h, in_bands, in_step, storage_->in_batches.data()};
  storage_->in_row_position.resize(s.in_h);
  for (int64_t i = 0; i < s.in_h; ++i) storage_->in_row_position[storage_->in_rows[i]] = i;
  plan.in_row_position = storage_->in_row_position.data();
}

}  // namespace deeplab_kernels::cpu
