// The matrix product of the separable convolution, rows of A as they lie in memory, panels of B of kPanel columns side
// by side; and the packing of panels, which the 1 x 1 convolution shares. A block of kBlockRows x kPanel results stays
// in registers over up to kDepth terms; what it needs of B stays in the first level cache. For the per-instruction-set
// files only: everything here has internal linkage.
//
// Sums are formed in groups of kDepth terms whatever the cut into tiles, so that a result does not depend on the number
// of threads.
#pragma once

#include "factor.h"
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

// What a block asks for beside its own work: `count` cache lines from number `first` on, 16 in a row at `data`, then 16
// `step` bytes further.
struct Ahead {
  const char* data;
  int64_t step, first, count;
};

template <bool kAhead, typename A, int R>
DK_INLINE void products(const A* const (&rows)[R], const A* b, int64_t begin, int64_t end, const Ahead& ahead,
                        Vec<A> (&sums)[R][2]) {
  b += begin * kPanel<A>;
  for (int64_t k = begin; k < end; ++k, b += kPanel<A>) {
    if (kAhead) {
      const int64_t line = ahead.first + k;
      __builtin_prefetch(ahead.data + (line >> 4) * ahead.step + (line & 15) * 64, 0, 2);
    }
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
           int64_t partial_step, const Ahead& ahead, const Results<A>& to, int64_t row, int64_t column,
           int64_t columns) {
  Vec<A> sums[R][2];
  const A* rows[R];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) rows[r] = a + r * a_step, sums[r][0] = sums[r][1] = Vec<A>{};
  if (last)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {  // until they are written, the results' lines have arrived
      const A* at = to.out + (row + r) * to.row_step + column;
      __builtin_prefetch(at, 1, 3);
      __builtin_prefetch(at + kPanel<A> - 1, 1, 3);
    }
  const int64_t asking = smaller(ahead.count, depth);
  products<true>(rows, b, 0, asking, ahead, sums);
  products<false>(rows, b, asking, depth, ahead, sums);
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
using Block = void (*)(const A*, int64_t, const A*, int64_t, bool, bool, A*, int64_t, const Ahead&, const Results<A>&,
                       int64_t, int64_t, int64_t);

// By the number of rows, from 1 on.
template <typename A, bool kByColumn, int... kRowsLess1>
DK_INLINE Block<A> block_of(int64_t rows, std::integer_sequence<int, kRowsLess1...>) {
  static constexpr Block<A> kBlocks[] = {&block<A, kByColumn, kRowsLess1 + 1>...};
  return kBlocks[rows - 1];
}

// Terms [begin, end) of the sums over `depth`, cut into runs of at most kDepth.
struct Terms {
  int64_t begin, end, depth;

  static int64_t runs(int64_t depth) { return larger(1, (depth + kDepth - 1) / kDepth); }
  // Those of runs [first, last).
  static Terms of_runs(int64_t depth, int64_t first, int64_t last) {
    return {depth * first / runs(depth), depth * last / runs(depth), depth};
  }
};

// The product's operands from the first of the terms on: rows of a, and panels of b, lie `step` apart.
template <typename A>
struct Operand {
  const A* data;
  int64_t step;
};

// How much one run over kDepth terms takes, and the sums in between: laid out for the whole tile if `whole`, otherwise
// for one group.
template <typename A>
struct Grouping {
  int64_t rows, panels;
  A* sums;
  bool whole;
};

// Adds these terms of A B, for `rows` rows of a and `columns` columns of b; after the last, writes the results.
template <typename A, bool kByColumn>
void multiply(const Operand<A>& a, const Operand<A>& b, int64_t rows, int64_t columns, const Terms& terms,
              const Grouping<A>& group, const Results<A>& to) {
  constexpr auto kAll = std::make_integer_sequence<int, kBlockRows>();
  const int64_t panels = (columns + kPanel<A> - 1) / kPanel<A>;
  const int64_t sums_step = (group.whole ? panels : group.panels) * kPanel<A>;
  const int64_t runs = Terms::runs(terms.end - terms.begin);
  for (int64_t p0 = 0; p0 < panels; p0 += group.panels)
    for (int64_t r0 = 0; r0 < rows; r0 += group.rows) {
      const int64_t p1 = smaller(p0 + group.panels, panels), r1 = smaller(r0 + group.rows, rows);
      A* sums = group.whole ? group.sums + r0 * sums_step + p0 * kPanel<A> : group.sums;
      for (int64_t run = 0; run < runs; ++run) {
        const Terms part = Terms::of_runs(terms.end - terms.begin, run, run + 1);
        const bool first = terms.begin + part.begin == 0, last = terms.begin + part.end == terms.depth;
        // The weights come from far away: what the next run, panel or group takes of them is asked for little by
        // little.
        const int64_t length = part.end - part.begin;
        const int64_t blocks = kByColumn ? (r1 - r0 + kBlockRows - 1) / kBlockRows : p1 - p0;
        const int64_t lines = ((kByColumn ? length : kBlockRows * 16) + blocks - 1) / blocks;
        for (int64_t p = p0; p < p1; ++p) {
          const A* panel = b.data + p * b.step + part.begin * kPanel<A>;
          const A* next = kByColumn ? (p + 1 < p1 ? panel + b.step : panel + length * kPanel<A>)
                                    : a.data + (run + 1 < runs ? r0 * a.step + part.end : (r0 + group.rows) * a.step);
          for (int64_t r = r0; r < r1; r += kBlockRows) {
            const int64_t block = kByColumn ? (r - r0) / kBlockRows : p - p0;
            const Ahead ahead{reinterpret_cast<const char*>(kByColumn ? next : next + (r - r0) * a.step),
                              kByColumn ? 1024 : a.step * int64_t(sizeof(A)), block * lines, lines};
            block_of<A, kByColumn>(smaller(r1 - r, kBlockRows), kAll)(
                a.data + r * a.step + part.begin, a.step, panel, length, first, last,
                sums + (r - r0) * sums_step + (p - p0) * kPanel<A>, sums_step, ahead, to, r, p * kPanel<A>, columns);
          }
        }
      }
    }
}

// Exchanges the blocks beside the diagonal, of kSize x kSize elements, of each 2 kSize x 2 kSize block.
template <int kSize, bool kLower, typename V, int... kIndex>
DK_INLINE V exchanged(V upper, V lower, std::integer_sequence<int, kIndex...>) {
  constexpr int n = int(sizeof...(kIndex));
  if constexpr (kLower) return __builtin_shufflevector(upper, lower, (kIndex & kSize ? n + kIndex : kIndex + kSize)...);
  return __builtin_shufflevector(upper, lower, (kIndex & kSize ? n + kIndex - kSize : kIndex)...);
}

// Rows become columns.
template <int kSize = 1, typename V, int kRows>
DK_INLINE void transpose(V (&rows)[kRows]) {
  constexpr auto kAll = std::make_integer_sequence<int, kRows>();
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    if (i & kSize) continue;
    const V upper = rows[i], lower = rows[i + kSize];
    rows[i] = exchanged<kSize, false>(upper, lower, kAll);
    rows[i + kSize] = exchanged<kSize, true>(upper, lower, kAll);
  }
  if constexpr (2 * kSize < kRows) transpose<2 * kSize>(rows);
}

// Panels of kWidth rows, (panels, end - begin, kWidth), of rows [first, last) and terms [begin, end). Whatever lies
// beyond the last row is left to chance: no result is made of it.
template <int kWidth, typename A>
class Packer {
 public:
  Packer(const Factor<A>& from, int64_t first, int64_t last, int64_t begin, int64_t end, A* to)
      : from_(from), last_(last), begin_(begin), end_(end), to_(to) {
    if (from.outer == 1)
      for (int64_t k = begin; k < end; k += kTerms) panels(first, k, smaller(end, k + kTerms));
    else
      panels(first, begin, end);
  }

 private:
  static constexpr int64_t L = kLanes<A>;
  // Rows of one term lie side by side: so many terms are read at a time, from as many pages.
  static constexpr int64_t kTerms = 16;

  void panels(int64_t first, int64_t k, int64_t end) const {
    A* to = to_ + (k - begin_) * kWidth;
    for (int64_t row = first; row < last_; row += kWidth, to += (end_ - begin_) * kWidth) {
      part<0>(row, k, end, to);
      if constexpr (L < kWidth) part<L>(row, k, end, to);
      if constexpr (2 * L < kWidth) part<2 * L>(row, k, end, to);
      static_assert(kWidth <= 3 * L);
    }
  }

  // Rows [row + kFirst, ...), a vector or what is left of the panel's width.
  template <int64_t kFirst>
  DK_INLINE void part(int64_t row, int64_t k, int64_t end, A* to) const {
    constexpr int64_t kCount = kWidth - kFirst < L ? kWidth - kFirst : L;
    const int64_t count = smaller(kCount, last_ - row - kFirst);
    if (count <= 0) return;
    from_.outer == 1 ? copy<kFirst, kCount>(row + kFirst, count, k, end, to + kFirst)
                     : transposed<kFirst, kCount>(row + kFirst, count, k, end, to + kFirst);
  }

  template <int64_t kFirst, int64_t kCount>
  DK_INLINE void copy(int64_t row, int64_t count, int64_t k, int64_t end, A* to) const {
    const A* p = from_.data + row;
    // What lies beyond a row belongs to later terms, in memory and in the panel; behind the last term there is nothing.
    const int64_t beyond = row + L - last_, ending = larger(1, (beyond + from_.inner - 1) / from_.inner);
    for (const int64_t most = smaller(end, end_ - ending); k < most; ++k, to += kWidth)
      put<kFirst, kCount>(to, load(p + k * from_.inner));
    for (; k < end; ++k, to += kWidth) store_part(to, load_part(p + k * from_.inner, count), kCount);
  }

  template <int64_t kFirst, int64_t kCount>
  DK_INLINE void transposed(int64_t row, int64_t count, int64_t k, int64_t end, A* to) const {
    const A* p = from_.data + row * from_.outer;
    for (; k + L <= end; k += L) {
      Vec<A> block[L];
#pragma GCC unroll 16
      for (int64_t r = 0; r < L; ++r) block[r] = load(p + (r < count ? r : 0) * from_.outer + k);
      transpose(block);
#pragma GCC unroll 16
      for (int64_t l = 0; l < L; ++l, to += kWidth) put<kFirst, kCount>(to, block[l]);
    }
    for (; k < end; ++k, to += kWidth)
      for (int64_t r = 0; r < count; ++r) to[r] = p[r * from_.outer + k];
  }

  // A whole vector where what lies beyond the panel's row is written later.
  template <int64_t kFirst, int64_t kCount>
  DK_INLINE static void put(A* to, Vec<A> v) {
    if constexpr (kCount == L || kFirst == 0)
      store(to, v);
    else
      store_part(to, v, kCount);
  }

  const Factor<A>& from_;
  int64_t last_, begin_, end_;
  A* to_;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
