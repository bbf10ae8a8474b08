// How one depthwise convolution is cut into tasks and its columns into segments. Depends on shapes alone, never on the
// number of threads, so that sums are formed in the same order on every run.
//
// Rows are processed phase by phase (rows i, i+r, i+2r, ...): consecutive ones share all their input rows but one, so
// that kernel_h packed rows in the fast caches serve any rate.
#pragma once

#include "../core/atrous_depthwise.h"

namespace deeplab_kernels::cpu {

// Most lanes of any vector; packed rows have room for whole vectors of this many.
constexpr int64_t kMostLanes = 16;

struct ColumnTap {
  int64_t tap;    // index along the kernel's width
  int64_t input;  // column of the packed input row that the segment's first output reads
};

// Outputs begin + step*k, k in [0, count); output k reads column input + k*Columns::input_step of every tap.
struct Segment {
  int64_t begin, step, count;
  int64_t first_tap, taps;  // range of Columns::taps
};

struct Columns {
  const Segment* segments;
  int64_t count;
  const ColumnTap* taps;
  int64_t input_step;
  // True if the segments may read zeros left and right of the image; false if every tap of theirs lies inside it.
  bool padded;
};

// Where column w of an image row lies in a packed row of an NCHW kernel: with e = w - origin, at
// (e % phases) * phase_size + e / phases, so that outputs a stride apart read neighbours. Everything else is zero.
struct PackedRow {
  int64_t origin;  // <= 0
  int64_t phases, phase_size;
  int64_t columns;  // how many image columns are packed
  int64_t size() const { return phases * phase_size; }
};

// Rows in the order of processing, cut into bands.
struct RowOrder {
  const int64_t* rows;
  int64_t count;
  int64_t bands;
  IndexRange band(int64_t b) const { return {count * b / bands, count * (b + 1) / bands}; }
};

struct Plan {
  DepthwiseShape shape;
  // The tasks of a group share channels: NCHW, one channel of x; NHWC, group_channels of them.
  int64_t groups, group_channels;
  RowOrder out_rows, in_rows;
  const int64_t* in_row_position;  // position of an input row in in_rows
  Columns forward;                 // outputs from inputs
  Columns transposed;              // gradient of the inputs from gradients of the outputs
  PackedRow x_row, grad_row;       // NCHW only

  int64_t out_tasks_per_group() const { return shape.batch * out_rows.bands; }
  int64_t in_tasks_per_group() const { return shape.batch * in_rows.bands; }
};

enum class Purpose { kInference, kTraining, kBackward };

// Owns what a Plan points to. exact: no kernel may multiply padding with a weight or a gradient, which matters where
// one of them is infinite or NaN.
class PlanBuilder {
 public:
  PlanBuilder(const DepthwiseShape& shape, Purpose purpose, int64_t bytes_per_value, bool exact);
  ~PlanBuilder();
  PlanBuilder(const PlanBuilder&) = delete;
  PlanBuilder& operator=(const PlanBuilder&) = delete;
  const Plan& plan() const;

 private:
  struct Storage;
  Storage* storage_;
};

}  // namespace deeplab_kernels::cpu
