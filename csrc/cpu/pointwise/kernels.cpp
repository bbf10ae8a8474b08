// Matrix products with both operands packed, tile by tile.
//
// A tile of results belongs to one thread. For every kDepth terms of its sums it packs the right operand of the tile,
// which stays in the second level cache, and kRowPanels panels of the left one at a time; a panel of the right one
// stays in the first level cache while those pass by. Sums grow in the results' own memory. Packing costs two to five
// per cent of the product and spares it every stride, misaligned line and page that a map may have.
#include "../matrix_product.h"
#include "../scratch.h"
#include "../workspace.h"
#include "isa.h"
#include "statistics.h"

namespace deeplab_kernels::cpu {
namespace {

// Of a tile: at most, and at least where it is cut for the threads' sake; panels of the left operand at a time.
constexpr int64_t kTileColumns = 256, kTileRows = 768, kFewest = 96, kRowPanels = 16;
// A sum of this many terms is cut where there are few results; the partial sums are added up in the end.
constexpr int64_t kLongSum = 1024, kMostChunks = 16, kFewResults = 1024 * 1024;

// R x kPanel results at out, kPanel or fewer columns of them, from one panel of each operand. kGather: takes note of
// them, the first of a group or not.
template <typename A, bool kGather, int R>
void panel_product(const A* left, const A* right, int64_t depth, bool first, A* out, int64_t step, int64_t columns,
                   Deviations<A>& gathered, bool first_of_group) {
  constexpr int64_t L = kLanes<A>;
  Vec<A> sums[R][2];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    sums[r][0] = sums[r][1] = Vec<A>{};
    __builtin_prefetch(out + r * step, 1, 3);
    __builtin_prefetch(out + r * step + kPanel<A> - 1, 1, 3);
  }
  for (int64_t k = 0; k < depth; ++k, left += kBlockRows, right += kPanel<A>) {
    const Vec<A> b0 = load(right), b1 = load(right + L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> factor = broadcast(left[r]);
      sums[r][0] += factor * b0;
      sums[r][1] += factor * b1;
    }
  }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const int64_t count = smaller(columns - h * L, L);
    if (count <= 0) break;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      A* p = out + r * step + h * L;
      if (!first) sums[r][h] += count == L ? load(p) : load_part(p, count);
      count == L ? store(p, sums[r][h]) : store_part(p, sums[r][h], count);
    }
  }
  if constexpr (kGather) gathered.add(sums, first_of_group);
}

template <typename A, bool kGather, int... kRowsLess1>
DK_INLINE auto panel_product_of(int64_t rows, std::integer_sequence<int, kRowsLess1...>) {
  static constexpr decltype(&panel_product<A, kGather, 1>) kProducts[] = {
      &panel_product<A, kGather, kRowsLess1 + 1>...};
  return kProducts[rows - 1];
}

// How the results, and long sums, are cut. Runs of terms, chunks of runs and groups of results whose statistics are
// gathered depend on the sizes alone, so that the number of threads does not change a result.
struct Tiling {
  int64_t row_panels, column_panels;
  int64_t row_units;  // groups of row panels where these must stay together, otherwise row panels
  int64_t runs, chunks, row_tiles, column_tiles;
  int64_t count(int64_t images) const { return images * chunks * row_tiles * column_tiles; }
  int64_t first_row_unit(int64_t tile) const { return row_units * tile / row_tiles; }
  int64_t first_row_panel(int64_t unit) const { return row_panels * unit / row_units; }
  int64_t first_column_panel(int64_t tile) const { return column_panels * tile / column_tiles; }
  template <typename A>
  int64_t rows(const MatrixProduct<A>& m, int64_t unit) const {
    return smaller(m.rows, first_row_panel(unit + 1) * kBlockRows) - first_row_panel(unit) * kBlockRows;
  }

  template <typename A>
  Tiling(const MatrixProduct<A>& m, int64_t threads)
      : row_panels((m.rows + kBlockRows - 1) / kBlockRows), column_panels((m.columns + kPanel<A> - 1) / kPanel<A>) {
    const int64_t sums = m.one_sum ? m.images : 1, products = m.one_sum ? 1 : m.images;
    runs = sums * Terms::runs(m.depth);
    const bool long_sum = m.one_sum && m.rows * m.columns <= kFewResults;
    chunks = long_sum ? larger(1, smaller(sums * m.depth / kLongSum, kMostChunks)) : 1;
    row_tiles = (m.rows + kTileRows - 1) / kTileRows;
    column_tiles = (m.columns + kTileColumns - 1) / kTileColumns;
    row_units = m.mean ? (row_panels + kRowPanels - 1) / kRowPanels : row_panels;
    const auto few = [&] { return threads > 1 && count(products) < 3 * threads; };
    while (few() && m.rows > (row_tiles + 1) * kFewest && row_units > row_tiles) ++row_tiles;
    while (few() && m.columns > (column_tiles + 1) * kFewest) ++column_tiles;
  }
};

template <typename A>
class Multiplier {
 public:
  Multiplier(const MatrixProduct<A>& m, const Tiling& tiling, A* partial, const Moments& moments)
      : m_(m), tiling_(tiling), partial_(partial), moments_(moments) {
    Arena measure(nullptr);
    take(measure);
    Arena arena(thread_scratch(measure.used()));
    take(arena);
  }

  // Tiles side by side share the left operand.
  void tile(int64_t index) const {
    const int64_t j = index % tiling_.column_tiles, i = index / tiling_.column_tiles % tiling_.row_tiles;
    const int64_t rest = index / (tiling_.column_tiles * tiling_.row_tiles);
    const int64_t chunk = rest % tiling_.chunks, image = rest / tiling_.chunks;
    A* out = m_.out + image * m_.next_out;
    if (chunk > 0) out = partial_ + (chunk - 1) * m_.rows * m_.columns;
    const int64_t first = tiling_.runs * chunk / tiling_.chunks, last = tiling_.runs * (chunk + 1) / tiling_.chunks;
    for (int64_t run = first; run < last; ++run)
      if (m_.mean && run + 1 == last)
        add<true>(run, image, i, j, run == first, out);
      else
        add<false>(run, image, i, j, run == first, out);
  }

 private:
  void take(Arena& arena) {
    const int64_t panels = (tiling_.column_panels + tiling_.column_tiles - 1) / tiling_.column_tiles;
    right_ = arena.take<A>((panels * kPanel<A> + 1) * kDepth);
    left_ = arena.take<A>((kRowPanels + 1) * kBlockRows * kDepth);
  }

  template <bool kGather>
  void add(int64_t run, int64_t image, int64_t i, int64_t j, bool first, A* out) const {
    const int64_t per_image = Terms::runs(m_.depth);
    if (m_.one_sum) image = run / per_image;
    const int64_t begin = m_.depth * (run % per_image) / per_image, end = m_.depth * (run % per_image + 1) / per_image;
    const int64_t depth = end - begin;
    Factor<A> left = m_.left, right = m_.right;
    left.data += image * left.next, right.data += image * right.next;
    const int64_t p0 = tiling_.first_column_panel(j), p1 = tiling_.first_column_panel(j + 1);
    int64_t unit = tiling_.first_row_unit(i);
    const int64_t r1 = tiling_.first_row_panel(tiling_.first_row_unit(i + 1));
    Packer<kPanel<A>, A>(right, p0 * kPanel<A>, smaller(m_.columns, p1 * kPanel<A>), begin, end, right_);
    Deviations<A> gathered;
    for (int64_t r = tiling_.first_row_panel(unit), next; r < r1; r = next, ++unit) {
      next = m_.mean ? tiling_.first_row_panel(unit + 1) : smaller(r + kRowPanels, r1);
      const int64_t row = r * kBlockRows, rows = smaller(m_.rows, next * kBlockRows) - row;
      Packer<kBlockRows, A>(left, row, row + rows, begin, end, left_);
      for (int64_t p = p0; p < p1; ++p) {
        for (int64_t k = 0; k < rows; k += kBlockRows)
          panel_product_of<A, kGather>(smaller(rows - k, kBlockRows), std::make_integer_sequence<int, kBlockRows>())(
              left_ + k * depth, right_ + (p - p0) * kPanel<A> * depth, depth, first,
              out + (row + k) * m_.columns + p * kPanel<A>, m_.columns, m_.columns - p * kPanel<A>, gathered, k == 0);
        if constexpr (kGather) gathered.write(rows, moments_, unit, p * kPanel<A>);
      }
    }
  }

  const MatrixProduct<A>& m_;
  const Tiling& tiling_;
  A* partial_;
  const Moments& moments_;
  A* left_;
  A* right_;
};

template <typename A>
void multiply(const MatrixProduct<A>& m, const Parallel& parallel) {
  const Tiling tiling(m, parallel.threads());
  const int64_t results = m.rows * m.columns;
  if (m.one_sum && m.images == 0) __builtin_memset(m.out, 0, size_t(results) * sizeof(A));
  const Workspace memory(size_t(tiling.chunks - 1) * size_t(results) * sizeof(A));
  A* partial = memory.as<A>();
  const int64_t groups = m.mean ? tiling.row_units : 0, padded = rounded_up(m.columns, kPanel<A>);
  const Workspace gathered(size_t(2 * groups * padded) * sizeof(double));
  const Moments moments{gathered.as<double>(), padded};
  parallel(tiling.count(m.one_sum ? 1 : m.images), [&](int64_t begin, int64_t end) {
    const Multiplier<A> multiplier(m, tiling, partial, moments);
    for (int64_t t = begin; t < end; ++t) multiplier.tile(t);
  });
  if (m.mean)
    join_groups<A>(moments, groups, [&](int64_t g) { return tiling.rows(m, g); }, m.columns, m.mean, m.var, parallel);
  if (tiling.chunks == 1) return;
  constexpr int64_t kGrain = 1024;
  parallel((results + kGrain - 1) / kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t c = 0; c < tiling.chunks - 1; ++c)
      for (int64_t k = begin * kGrain; k < smaller(results, end * kGrain); ++k) m.out[k] += partial[c * results + k];
  });
}

}  // namespace

namespace DK_ISA {

template <typename A>
void Pointwise<A>::run(const MatrixProduct<A>& product, const Parallel& parallel) {
  multiply(product, parallel);
}

template struct Pointwise<float>;
template struct Pointwise<double>;

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
