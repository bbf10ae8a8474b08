// How one depthwise convolution is cut into tasks and its columns into segments. Depends on shapes alone, never on the
// number of threads, so that sums are formed in the same order on every run.
//
// "Results" below are the outputs in a forward pass and the inputs in the transposed one (gradient of x); "sources" are
// what they are computed from.
#pragma once

#include "../../core/atrous_depthwise.h"

namespace deeplab_kernels::cpu {

// Most lanes of any vector; packed rows have room for whole vectors of this many.
constexpr int64_t kMostLanes = 16;

struct ColumnTap {
  int64_t tap;    // index along the kernel's width
  int64_t input;  // column of the packed source row that the segment's first result reads
};

// Results begin + step*k, k in [0, count); result k reads column input + k*Columns::input_step of every tap.
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

// A result row belongs to a class, whose kernel rows u[0], u[1], ... read the rows source, source + source_step, ... of
// the sources; those in [first, last) lie inside the image. keep ... high: the source rows that this row and those
// after it in its phase need, up to this row's last.
struct ResultRow {
  int64_t source;
  int64_t row_class;
  int64_t first, last;
  int64_t keep, high;
};

struct Rows {
  const ResultRow* rows;
  int64_t classes;
  const int64_t* class_begin;  // classes + 1 offsets into kernel_rows
  const int64_t* kernel_rows;
  int64_t source_step;
};

// Where column w of an image row lies in a packed row of an NCHW kernel: with e = w - origin, at
// (e % phases) * phase_size + e / phases, so that outputs a stride apart read neighbours. Everything else is zero.
struct PackedRow {
  int64_t origin;  // <= 0
  int64_t phases, phase_size;
  int64_t columns;  // how many image columns are packed
  uint64_t used;    // bit q: some tap reads phase q (of the first 64)
  int64_t size() const { return phases * phase_size; }
};

// Rows in the order of processing, cut into bands: the natural order where the packed image fits the caches, otherwise
// phase by phase (rows i, i+r, i+2r, ...), so that consecutive rows share all their sources but one and few packed rows
// serve any rate.
// A batch is a run of rows that read the same taps and whose sources fit the window together.
struct RowOrder {
  const int64_t* rows;
  int64_t count;
  int64_t bands;
  int64_t step;            // from one row to the next within a phase
  const int64_t* batches;  // rows from this position to the end of its batch
  IndexRange band(int64_t b) const { return {count * b / bands, count * (b + 1) / bands}; }
};

// Packed rows held at once. step: distance of neighbouring slots in rows of the image.
struct WindowSize {
  int64_t slots, step;
};

struct Plan {
  DepthwiseShape shape;
  bool exact;  // no kernel may multiply padding with a weight or a gradient
  // The tasks of a group share channels: NCHW, one channel of x; NHWC, group_channels of them.
  int64_t groups, group_channels;
  RowOrder out_rows, in_rows;
  int64_t rows_together;           // the longest batch
  const int64_t* in_row_position;  // position of an input row in in_rows
  bool direct;                     // NHWC: the taps read x itself where it needs no conversion
  Rows forward_rows, transposed_rows;
  Columns forward, transposed;
  PackedRow x_row, grad_row;  // NCHW only
  WindowSize x_window, grad_window;

  int64_t out_tasks_per_group() const { return shape.batch * out_rows.bands; }
};

enum class Purpose { kInference, kTraining, kBackward };

// Owns what a Plan points to. exact: no kernel may multiply padding with a weight or a gradient, which matters where
// one of them is infinite or NaN.
class PlanBuilder {
 public:
  // stored_bytes, computed_bytes: of a value in memory and in the kernels' arithmetic.
  PlanBuilder(const DepthwiseShape& shape, Purpose purpose, int64_t stored_bytes, int64_t computed_bytes,
              int64_t vector_lanes, bool exact);
  ~PlanBuilder();
  PlanBuilder(const PlanBuilder&) = delete;
  PlanBuilder& operator=(const PlanBuilder&) = delete;
  const Plan& plan() const;

 private:
  struct Storage;
  Storage* storage_;
};

}  // namespace deeplab_kernels::cpu
