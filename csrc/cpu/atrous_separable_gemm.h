// The matrix product of the separable convolution: rows of A as they lie in memory, panels of B of kPanel columns side
// by side. A block of kBlockRows x kPanel results stays in registers over up to kDepth terms; what it needs of B stays
// in the first level cache. For the per-instruction-set files only: everything here has internal linkage.
//
// Sums are formed in groups of kDepth terms whatever the cut into tiles, so that a result does not depend on the number
// of threads.
#pragma once

#include "microkernels.h"

namespace deeplab_kernels::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockRows = 12;
#else
constexpr int kBlockRows = 6;
#endif
template <typename A>
constexpr int kPanel = 2 * kLanes<A>;
constexpr int64_t kDepth = 256;

// Where the results go and what is done to them: out[row * row_step + column]. kByColumn: scale and shift are the
// columns' (NHWC), otherwise the rows' (NCHW).
template <typename A>
struct Results {
  A* out;
  const A* residual;  // laid out as out; may be null
  int64_t row_step;
  const A* scale;
  const A* shift;
  Activation activation;
};

// Sums of a group of rows and panels between two runs over kDepth terms.
template <typename A>
struct Partial {
  A* sums;
  int64_t row_step;
};

template <typename A, int R>
DK_INLINE void products(const A* a, int64_t a_step, const A* b, int64_t depth, Vec<A> (&sums)[R][2]) {
  const A* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = a + r * a_step, sums[r][0] = sums[r][1] = Vec<A>{};
  for (int64_t k = 0; k < depth; ++k, b += kPanel<A>) {
    const Vec<A> b0 = load(b), b1 = load(b + kLanes<A>);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> factor = broadcast(rows[r][k]);
      sums[r][0] += factor * b0;
      sums[r][1] += factor * b1;
    }
  }
}

template <typename A, bool kByColumn, int R>
DK_INLINE void finish(Vec<A> (&sums)[R][2], const Results<A>& to, int64_t row, int64_t column, int64_t columns) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t first = column + h * kLanes<A>, count = smaller(columns - first, kLanes<A>);
    if (count <= 0) return;
    const Vec<A> column_scale = kByColumn ? load(to.scale + first) : Vec<A>{};
    const Vec<A> column_shift = kByColumn ? load(to.shift + first) : Vec<A>{};
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> scale = kByColumn ? column_scale : broadcast(to.scale[row + r]);
      const Vec<A> shift = kByColumn ? column_shift : broadcast(to.shift[row + r]);
      const int64_t at = (row + r) * to.row_step + first;
      Vec<A> z = sums[r][h] * scale + shift;
      if (to.residual) z += count == kLanes<A> ? load(to.residual + at) : load_part(to.residual + at, count);
      z = activated(z, to.activation);
      if (count == kLanes<A>)
        store(to.out + at, z);
      else
        store_part(to.out + at, z, count);
    }
  }
}

// One block: the terms [0, depth) of a and b; first and last tell whether they are the first and last of the sum.
template <typename A, bool kByColumn, int R>
void block(const A* a, int64_t a_step, const A* b, int64_t depth, bool first, bool last, A* partial,
           int64_t partial_step, const Results<A>& to, int64_t row, int64_t column, int64_t columns) {
  Vec<A> sums[R][2];
  products<A, R>(a, a_step, b, depth, sums);
  if (!first)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      sums[r][0] += load(partial + r * partial_step);
      sums[r][1] += load(partial + r * partial_step + kLanes<A>);
    }
  if (last) return finish<A, kByColumn, R>(sums, to, row, column, columns);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    store(partial + r * partial_step, sums[r][0]);
    store(partial + r * partial_step + kLanes<A>, sums[r][1]);
  }
}

template <typename A>
using Block = void (*)(const A*, int64_t, const A*, int64_t, bool, bool, A*, int64_t, const Results<A>&, int64_t,
                       int64_t, int64_t);

// By the number of rows, from 1 on.
template <typename A, bool kByColumn, int... kRowsLess1>
DK_INLINE Block<A> block_of(int64_t rows, std::integer_sequence<int, kRowsLess1...>) {
  static constexpr Block<A> kBlocks[] = {&block<A, kByColumn, kRowsLess1 + 1>...};
  return kBlocks[rows - 1];
}

// to = A B for `rows` rows of a and `columns` columns, b in panels of depth x kPanel. group_rows x group_panels are
// what one run over kDepth terms takes: their sums lie in `sums`, which has room for that many.
template <typename A, bool kByColumn>
void multiply(const A* a, int64_t a_step, const A* b, int64_t rows, int64_t columns, int64_t depth, int64_t group_rows,
              int64_t group_panels, A* sums, const Results<A>& to) {
  constexpr auto kAll = std::make_integer_sequence<int, kBlockRows>();
  const int64_t panels = (columns + kPanel<A> - 1) / kPanel<A>, runs = larger(1, (depth + kDepth - 1) / kDepth);
  const int64_t sums_step = group_panels * kPanel<A>;
  for (int64_t p0 = 0; p0 < panels; p0 += group_panels)
    for (int64_t r0 = 0; r0 < rows; r0 += group_rows) {
      const int64_t p1 = smaller(p0 + group_panels, panels), r1 = smaller(r0 + group_rows, rows);
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t k0 = depth * run / runs, k1 = depth * (run + 1) / runs;
        for (int64_t p = p0; p < p1; ++p)
          for (int64_t r = r0; r < r1; r += kBlockRows)
            block_of<A, kByColumn>(smaller(r1 - r, kBlockRows), kAll)(
                a + r * a_step + k0, a_step, b + (p * depth + k0) * kPanel<A>, k1 - k0, run == 0, run == runs - 1,
                sums + (r - r0) * sums_step + (p - p0) * kPanel<A>, sums_step, to, r, p * kPanel<A>, columns);
      }
    }
}

// Rows [kPanel * panel, ...) of w (rows, depth) as columns of a panel; those beyond the last are zero.
template <typename A>
void pack_panel(const A* w, int64_t rows, int64_t depth, int64_t panel, A* to) {
  const int64_t first = panel * kPanel<A>, count = smaller(kPanel<A>, rows - first);
  for (int64_t r = 0; r < count; ++r) {
    const A* row = w + (first + r) * depth;
    for (int64_t k = 0; k < depth; ++k) to[k * kPanel<A> + r] = row[k];
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t r = count; r < kPanel<A>; ++r) to[k * kPanel<A> + r] = A(0);
}

}  // namespace
}  // namespace deeplab_kernels::cpu
