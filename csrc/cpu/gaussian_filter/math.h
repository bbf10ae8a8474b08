// What the kernels of the two Gaussian filters share: exp(-s / 2) of a vector of squared distances, and sums over a
// tile of two vectors of outputs. For the per-instruction-set files only: everything here has internal linkage.
#pragma once

#include "../simd.h"

namespace deeplab_kernels::cpu {
namespace {

// exp(-s / 2) = 2^t with t = -s / (2 ln 2) = n + r, n an integer and |r| <= 1/2; 2^r is a polynomial with constant
// term 1, so that a point's kernel with itself is exactly 1. kShift rounds to integers and leaves n in its lowest bits.
template <typename A>
struct HalfExp;

// Relative error of the polynomial 2e-9, of the whole at most (2 + 2|t|) 2^-24. Above kLimit, which stands for
// infinity, too: 2^-125.
template <>
struct HalfExp<float> {
  using Int = int32_t;
  static constexpr float kLimit = 173.28679f;  // t = -125
  static constexpr float kShift = 12582912.0f;
  static constexpr int kMantissa = 23;
  static constexpr float kFactor = -0.72134752f;
  static constexpr int kDegree = 6;
  static constexpr float kCoefficients[kDegree] = {0x1.62e430p-1f, 0x1.ebfbdcp-3f,  0x1.c6aee8p-5f,
                                                   0x1.3b2d4cp-7f, 0x1.5f3e54p-10f, 0x1.41fbbap-13f};
};

// Relative error of the polynomial 8e-18, of the whole at most (2 + 2|t|) 2^-53. Above kLimit: 2^-1020.
template <>
struct HalfExp<double> {
  using Int = int64_t;
  static constexpr double kLimit = 1414.0202082877014;  // t = -1020
  static constexpr double kShift = 6755399441055744.0;
  static constexpr int kMantissa = 52;
  static constexpr double kFactor = -0.7213475204444817;
  static constexpr int kDegree = 11;
  static constexpr double kCoefficients[kDegree] = {
      0.6931471805599453,     0.24022650695910097,   0.0555041086648216,    0.009618129107606888,
      0.0013333558146416936,  0.0001540353044173605, 1.525273382983612e-05, 1.321544258792169e-06,
      1.0178062445845772e-07, 7.072585949269223e-09, 4.4549605981867755e-10};
};

template <typename A>
DK_INLINE Vec<A> exp_of_minus_half(Vec<A> s) {
  using H = HalfExp<A>;
  using Bits = typename VectorOf<typename H::Int, kLanes<A>>::type;
  const Vec<A> bounded = s < H::kLimit ? s : broadcast(H::kLimit);
  const Vec<A> shifted = bounded * H::kFactor + H::kShift;
  const Vec<A> r = bounded * H::kFactor - (shifted - H::kShift);
  Vec<A> p = broadcast(H::kCoefficients[H::kDegree - 1]);
#pragma GCC unroll 16
  for (int k = H::kDegree - 2; k >= 0; --k) p = p * r + H::kCoefficients[k];
  p = p * r + A(1);
  return reinterpret_cast<Vec<A>>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << H::kMantissa));
}

template <typename A>
constexpr int64_t kTile = 2 * kLanes<A>;

// Chains of sums that `columns` columns of a tile are formed in, by steps that take turns: a vector multiply-add takes
// four cycles and two start in each.
constexpr int chains_of(int columns) { return columns == 1 ? 4 : columns <= 3 ? 2 : 1; }

// sums[c][tile] += the chains of each column
template <typename A, int kChains, int kColumns>
DK_INLINE void add_chains(const Vec<A> (&chains)[kChains][kColumns][2], A* sums) {
  constexpr int64_t L = kLanes<A>;
#pragma GCC unroll 8
  for (int c = 0; c < kColumns; ++c)
#pragma GCC unroll 2
    for (int m = 0; m < 2; ++m) {
      Vec<A> total = chains[0][c][m];
#pragma GCC unroll 4
      for (int s = 1; s < kChains; ++s) total += chains[s][c][m];
      A* p = sums + c * kTile<A> + m * L;
      store(p, load(p) + total);
    }
}

template <int kColumns>
struct Columns {
  static constexpr int kCount = kColumns;
};

// f(Columns<n>(), first) for groups of 1 to 6 columns, as equal as can be.
template <typename F>
DK_INLINE void in_groups_of_columns(int64_t columns, F&& f) {
  constexpr int64_t kMost = 6;
  const int64_t groups = (columns + kMost - 1) / kMost;
  for (int64_t g = 0, c = 0; g < groups; ++g) {
    const int64_t width = (columns - c + groups - g - 1) / (groups - g);
    switch (width) {
      case 1:
        f(Columns<1>(), c);
        break;
      case 2:
        f(Columns<2>(), c);
        break;
      case 3:
        f(Columns<3>(), c);
        break;
      case 4:
        f(Columns<4>(), c);
        break;
      case 5:
        f(Columns<5>(), c);
        break;
      default:
        f(Columns<6>(), c);
    }
    c += width;
  }
}

}  // namespace
}  // namespace deeplab_kernels::cpu
