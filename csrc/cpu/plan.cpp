#include "plan.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace deeplab_kernels::cpu {
namespace {

// Packed rows of one group stay within this many bytes: half of the second-level cache of today's smaller cores.
constexpr int64_t kRowsBudget = 192 << 10;
// Training passes over a group's data more than once: so much of it should stay in the caches in between.
constexpr int64_t kGroupBudget = 1 << 20;
// Whole cache lines for each group.
constexpr int64_t kChannelQuantum = 16;
constexpr int64_t kSmallestGroup = 64;
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
    for (int64_t q = 0; q < phases_; ++q)
      for (const PhaseTap& t : phase_taps(q))
        size = std::max(size, (t.a - origin) / step_ + round_up(phase_count(q), kMostLanes) + kMostLanes);
    return {origin, step_, size, sources_};
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

int64_t channels_per_group(const DepthwiseShape& s, Purpose purpose, int64_t bytes_per_value) {
  if (!s.channels_last) return 1;
  const int64_t row = std::max<int64_t>(1, s.kernel_h * s.in_w * s.multiplier * bytes_per_value);
  int64_t fit = kRowsBudget / row;
  if (purpose != Purpose::kInference) {
    const int64_t image = std::max<int64_t>(1, s.batch * s.in_h * s.in_w * s.multiplier * bytes_per_value);
    fit = std::min(fit, std::max(kGroupBudget / image, kSmallestGroup));
  }
  if (fit >= s.channels) return std::max<int64_t>(1, s.channels);
  fit = std::max(kSmallestGroup, fit / kChannelQuantum * kChannelQuantum);
  const int64_t groups = ceil_div(s.channels, fit);
  return round_up(ceil_div(s.channels, groups), kChannelQuantum);
}

}  // namespace

struct PlanBuilder::Storage {
  std::vector<int64_t> out_rows, in_rows, in_row_position;
  ColumnPlan forward, transposed;
  Plan plan{};
};

PlanBuilder::~PlanBuilder() { delete storage_; }
const Plan& PlanBuilder::plan() const { return storage_->plan; }

PlanBuilder::PlanBuilder(const DepthwiseShape& s, Purpose purpose, int64_t bytes_per_value, bool exact)
    : storage_(new Storage) {
  Plan& plan = storage_->plan;
  plan.shape = s;
  plan.group_channels = channels_per_group(s, purpose, bytes_per_value);
  plan.groups = ceil_div(s.channels, plan.group_channels);
  const int64_t units = plan.groups * s.batch;

  storage_->out_rows = phase_order(s.out_h, s.rate_h / std::gcd(s.rate_h, s.stride_h));
  plan.out_rows = {storage_->out_rows.data(), s.out_h, bands_for(units, s.out_h, 8)};

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
        if (whole.cost <= kept.cost + kept.cost / 8) kept = std::move(whole), padded = true;
      }
    }
    return {kept.segments.data(), int64_t(kept.segments.size()), kept.taps.data(), s.channels_last ? planner.step() : 1,
            padded};
  };
  plan.forward = columns(ColumnPlanner(width, false), storage_->forward, plan.x_row);
  if (purpose != Purpose::kBackward) return;

  storage_->in_rows = phase_order(s.in_h, s.rate_h);
  plan.in_rows = {storage_->in_rows.data(), s.in_h, bands_for(units, s.in_h, 16)};
  storage_->in_row_position.resize(s.in_h);
  for (int64_t i = 0; i < s.in_h; ++i) storage_->in_row_position[storage_->in_rows[i]] = i;
  plan.in_row_position = storage_->in_row_position.data();
  plan.transposed = columns(ColumnPlanner(width, true), storage_->transposed, plan.grad_row);
}

}  // namespace deeplab_kernels::cpu
