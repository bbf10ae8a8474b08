// Keys of lattice vertices, packed into as few 64-bit words as the range of the features needs.
//
// Coordinate i of a vertex of remainder k is (d + 1) q_i + k, and the coordinates sum to 0: k and q_0 ... q_{d-1} name
// the vertex. Each gets a field wide enough for all vertices of a lattice and their neighbours, so that the vertices of
// a simplex and the neighbours of a vertex follow by adding to fields, without carries between them. Equal words mean
// equal vertices, whatever the range: nothing is truncated.
#pragma once

#include "permutohedral.h"

namespace deeplab_kernels {

// 16 coordinates of at most 29 bits, two in a word, and the remainder.
constexpr int kMaxLatticeKeyWords = 9;

struct LatticeKeyLayout {
  int d, words;
  int remainder_word, remainder_shift;
  int word[kMaxLatticeDimension], shift[kMaxLatticeDimension];
  int32_t lowest[kMaxLatticeDimension];

  // low and high bound the d positions (features times lattice_scale).
  static LatticeKeyLayout make(int d, const double* low, const double* high) {
    LatticeKeyLayout layout{};
    layout.d = d;
    int used[kMaxLatticeKeyWords] = {};
    int bits[kMaxLatticeDimension + 1];
    double tail_low = 0, tail_high = 0;
    for (int i = d; i >= 0; --i) {
      // Elevated coordinate i: the positions i, i + 1, ... minus i times position i - 1. Coordinate d has no field.
      const double value_low = i > 0 ? low[i - 1] : 0, value_high = i > 0 ? high[i - 1] : 0;
      if (i < d) {
        // Nearest multiple: +-1; off the hyperplane: +-1; the simplex's other vertices: -1; neighbours: +-1; rounding.
        const double down = 1.0 / (d + 1);
        const auto lowest = static_cast<int64_t>(std::floor((tail_low - i * value_high) * down)) - 5;
        const auto highest = static_cast<int64_t>(std::ceil((tail_high - i * value_low) * down)) + 5;
        layout.lowest[i] = static_cast<int32_t>(lowest);
        bits[i] = 0;
        while ((highest - lowest) >> bits[i]) ++bits[i];
      }
      tail_low += value_low, tail_high += value_high;
    }
    bits[d] = 0;
    while (d >> bits[d]) ++bits[d];
    for (int i = 0; i <= d; ++i) {
      int w = 0;
      while (used[w] + bits[i] > 64) ++w;
      (i < d ? layout.word[i] : layout.remainder_word) = w;
      (i < d ? layout.shift[i] : layout.remainder_shift) = used[w];
      used[w] += bits[i];
      if (w >= layout.words) layout.words = w + 1;
    }
    return layout;
  }
};

template <int kWords>
struct LatticeKey {
  uint64_t word[kWords];

  DK_HOST_DEVICE bool operator==(const LatticeKey& other) const {
    uint64_t difference = 0;
    for (int w = 0; w < kWords; ++w) difference |= word[w] ^ other.word[w];
    return difference == 0;
  }
  DK_HOST_DEVICE LatticeKey& operator+=(const LatticeKey& other) {
    for (int w = 0; w < kWords; ++w) word[w] += other.word[w];
    return *this;
  }
  // Evenly spread in the upper bits.
  DK_HOST_DEVICE uint64_t hash() const {
    uint64_t h = word[0] * 0x9e3779b97f4a7c15u;
    for (int w = 1; w < kWords; ++w) h = (h ^ (h >> 32) ^ word[w]) * 0x9e3779b97f4a7c15u;
    return (h ^ (h >> 32)) * 0xd6e8feb86659fd93u;
  }
};

// What to add to keys; kWords >= layout.words.
template <int kWords>
struct LatticeKeySteps {
  using Key = LatticeKey<kWords>;
  const LatticeKeyLayout layout;
  Key lower[kMaxLatticeDimension + 1];  // remainder + 1 and q_i - 1: the simplex's next vertex, i its rank's coordinate
  Key wrap[kMaxLatticeDimension + 1];   // from remainder d to 0, q + 1 in all coordinates but i
  uint64_t remainder_mask;

  explicit LatticeKeySteps(const LatticeKeyLayout& l) : layout(l), lower{}, wrap{} {
    const int d = l.d;
    int bits = 0;
    while (d >> bits) ++bits;
    remainder_mask = ((uint64_t{1} << bits) - 1) << l.remainder_shift;
    for (int i = 0; i <= d; ++i) {
      lower[i].word[l.remainder_word] += uint64_t{1} << l.remainder_shift;
      wrap[i].word[l.remainder_word] -= uint64_t(d) << l.remainder_shift;
      for (int j = 0; j < d; ++j) {
        if (j == i) lower[i].word[l.word[j]] -= uint64_t{1} << l.shift[j];
        if (j != i) wrap[i].word[l.word[j]] += uint64_t{1} << l.shift[j];
      }
    }
  }

  // The vertex of remainder 0, from lattice_simplex's greedy[i] / (d + 1) at quotient[i * stride]. kDimension: d where
  // it is known, else 0.
  template <int kDimension = 0>
  DK_HOST_DEVICE Key first(const int32_t* quotient, int64_t stride) const {
    Key key{};
    for (int i = 0; i < (kDimension ? kDimension : layout.d); ++i)
      key.word[kWords == 1 ? 0 : layout.word[i]] += uint64_t(uint32_t(quotient[i * stride] - layout.lowest[i]))
                                                    << layout.shift[i];
    return key;
  }

  // What to add for the neighbour along direction i (all coordinates + 1, coordinate i - d): element i.
  DK_HOST_DEVICE const Key* to_neighbours(const Key& key) const {
    const bool last = (key.word[layout.remainder_word] & remainder_mask) == uint64_t(layout.d)
                                                                                << layout.remainder_shift;
    return last ? wrap : lower;
  }
};

}  // namespace deeplab_kernels
