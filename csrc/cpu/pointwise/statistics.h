// Mean and biased variance of the columns of a matrix product, gathered while its results are in registers: what the
// batch normalisation that follows would otherwise read them once more for. For the per-instruction-set files only:
// everything here has internal linkage.
//
// Results are gathered in groups of kRowPanels panels of rows at most, which depend on the sizes alone. In a group,
// deviations are taken from the mean of the first few values: were all others far from these, the group's own variance
// would be large as well, so that the squares never cancel by more than the size of a group. Groups are joined in their
// order, in double (join_deviations).
#pragma once

#include "../microkernels.h"
#include "../parallel.h"

namespace deeplab_kernels::cpu {
namespace {

// What the groups say of the columns: their means and, kept apart, their squared deviations.
struct Moments {
  double* data;
  int64_t padded;  // columns, in whole panels

  double* means(int64_t group) const { return data + 2 * group * padded; }
  double* squares(int64_t group) const { return means(group) + padded; }
};

// Deviations of one group in a panel's columns, lane by lane.
template <typename A>
class Deviations {
 public:
  // R rows of the panel; first: the first of the group.
  template <int R>
  DK_INLINE void add(const Vec<A> (&values)[R][2], bool first) {
    if (first) start(values);
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vec<A> sums[2] = {}, squares[2] = {};  // by turns: half the latency
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Vec<A> d = values[r][h] - centre_[h];
        sums[r % 2] += d, squares[r % 2] += d * d;
      }
      rest_[h] += sums[0] + sums[1], squares_[h] += squares[0] + squares[1];
    }
  }

  // After `rows` rows; column: the panel's first.
  void write(int64_t rows, const Moments& moments, int64_t group, int64_t column) const {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = column + h * kLanes<A>;
      Doubles<A> mean = {}, squares = {};
      join_deviations(0, double(rows), in_double<A>(centre_[h]), in_double<A>(rest_[h]), in_double<A>(squares_[h]),
                      mean, squares);
      store_doubles<A>(moments.means(group) + at, mean), store_doubles<A>(moments.squares(group) + at, squares);
    }
  }

 private:
  template <int R>
  DK_INLINE void start(const Vec<A> (&values)[R][2]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      Vec<A> sum = values[0][h];
#pragma GCC unroll 16
      for (int r = 1; r < R; ++r) sum += values[r][h];
      centre_[h] = sum * (A(1) / A(R)), rest_[h] = squares_[h] = Vec<A>{};
    }
  }

  Vec<A> centre_[2], rest_[2], squares_[2];
};

// Over all groups; rows(g): the number of rows in one.
template <typename A, typename Rows>
void join_groups(const Moments& moments, int64_t groups, const Rows& rows, int64_t columns, A* mean, A* var,
                 const Parallel& parallel) {
  constexpr int64_t L = kLanes<A>;
  parallel((columns + L - 1) / L, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin * L; c < smaller(columns, end * L); c += L) {
      Doubles<A> centre = {}, squares = {};
      double seen = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const double n = double(rows(g));
        join_moments(seen, n, load_doubles<A>(moments.means(g) + c), load_doubles<A>(moments.squares(g) + c), centre,
                     squares);
        seen += n;
      }
      for (int64_t l = 0; l < smaller(L, columns - c); ++l)
        mean[c + l] = A(centre[l]), var[c + l] = A(squares[l] / seen);
    }
  });
}

}  // namespace
}  // namespace deeplab_kernels::cpu
