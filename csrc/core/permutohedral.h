// Geometry of the permutohedral lattice A*_d (Adams, Baek, Davis: Fast High-Dimensional Filtering Using the
// Permutohedral Lattice, Eurographics 2010, section 3): where a point of R^d lies, which d + 1 vertices enclose it, and
// with what barycentric weights. Host and device; no memory is allocated.
#pragma once

#include <cmath>

#include "macros.h"

namespace deeplab_kernels {

constexpr int kMaxLatticeDimension = 16;

// Blurs are written new = old + (one neighbour + the other) / 2, the taps above times 2, and the filter's result is
// multiplied by one of these.
//
// lattice_exact_scale makes the filter approximate sum_j exp(-|f_i - f_j|^2 / 2) v_j. Points of density r give that sum
// the value r (2 pi)^(d/2). On the lattice, splatting gives each vertex the mass of its cell, r times the cell's
// volume; d + 1 blurs multiply by 2 each; slicing averages. The cell: the points of A*_d, here (d + 1) times its usual
// size, have the volume (d + 1)^d / sqrt(d + 1), and a unit of feature is sqrt(2/3) (d + 1) long, so that a cell takes
// (3/2)^(d/2) / sqrt(d + 1) in units of features. The quotient is
//   (2 pi)^(d/2) / (2^(d+1) (3/2)^(d/2) / sqrt(d + 1)) = (4 pi / 3)^(d/2) sqrt(d + 1) / 2^(d+1).
inline double lattice_exact_scale(int d) {
  return std::pow(4.1887902047863905, 0.5 * d) * std::sqrt(d + 1.0) / std::ldexp(1.0, d + 1);
}

// pydensecrf's constant.
inline double lattice_pydensecrf_scale(int d) { return 1.0 / (1.0 + std::ldexp(1.0, -d)); }

// Scale of a feature axis before embedding: sqrt(2/3) (d + 1) / sqrt((axis + 1) (axis + 2)). `inverse_root` is the last
// factor, which callers compute once per axis (no sqrt here that would differ between host and device). The rotation
// into the hyperplane is then an isometry times sqrt(2/3) (d + 1): splatting and slicing contribute (d + 1)^2 / 12 each
// to the variance and a blur with the taps [1/4, 1/2, 1/4] along every lattice direction (d + 1)^2 / 2, together one
// unit.
template <typename T>
DK_HOST_DEVICE T lattice_scale(int d, T inverse_root) {
  return T(0.81649658092772603) * T(d + 1) * inverse_root;
}

// Embeds `position` (already divided by the standard deviations and multiplied by lattice_scale) and finds its simplex.
//   greedy[d + 1]       the remainder-0 vertex of the simplex: integers, multiples of d + 1, summing to 0
//   rank[d + 1]         order of the residuals, 0 the largest; see lattice_vertex
//   barycentric[d + 2]  weights of vertices 0..d; entry d + 1 is scratch. They sum to 1.
template <typename T>
DK_HOST_DEVICE void lattice_simplex(const T* position, int d, int32_t* greedy, int32_t* rank, T* barycentric) {
  T elevated[kMaxLatticeDimension + 1];
  T tail = T(0);
  for (int i = d; i > 0; --i) {
    const T value = position[i - 1];
    elevated[i] = tail - T(i) * value;
    tail += value;
  }
  elevated[0] = tail;

  const T down = T(1) / T(d + 1);
  int32_t sum = 0;
  for (int i = 0; i <= d; ++i) {
    const T scaled = elevated[i] * down;
    const int32_t floor_index = static_cast<int32_t>(scaled) - (scaled < T(static_cast<int32_t>(scaled)) ? 1 : 0);
    const T below = T(floor_index) * T(d + 1), above = below + T(d + 1);
    const bool up = above - elevated[i] < elevated[i] - below;
    const int32_t nearest = floor_index + (up ? 1 : 0);
    greedy[i] = nearest * (d + 1);
    sum += nearest;
    rank[i] = 0;
  }
  for (int i = 0; i < d; ++i) {
    const T residual = elevated[i] - T(greedy[i]);
    for (int j = i + 1; j <= d; ++j) {
      if (residual < elevated[j] - T(greedy[j])) {
        ++rank[i];
      } else {
        ++rank[j];
      }
    }
  }
  // The rounded point may lie off the hyperplane sum = 0: move the coordinates with the largest (smallest) residuals.
  for (int i = 0; i <= d; ++i) {
    rank[i] += sum;
    if (rank[i] < 0) {
      rank[i] += d + 1;
      greedy[i] += d + 1;
    } else if (rank[i] > d) {
      rank[i] -= d + 1;
      greedy[i] -= d + 1;
    }
  }
  for (int i = 0; i <= d + 1; ++i) barycentric[i] = T(0);
  for (int i = 0; i <= d; ++i) {
    const T delta = (elevated[i] - T(greedy[i])) * down;
    barycentric[d - rank[i]] += delta;
    barycentric[d + 1 - rank[i]] -= delta;
  }
  barycentric[0] += T(1) + barycentric[d + 1];
}

// Gradient with respect to `position` given that with respect to barycentric[d + 1]; rank as lattice_simplex returned
// it.
template <typename T>
DK_HOST_DEVICE void lattice_simplex_backward(const T* grad_barycentric, const int32_t* rank, int d, T* grad_position) {
  const T down = T(1) / T(d + 1);
  T head = T(0);  // sum of the elevated gradients 0 ... j - 1
  for (int j = 0; j <= d; ++j) {
    const int above = rank[j] == 0 ? 0 : d + 1 - rank[j];
    const T elevated = (grad_barycentric[d - rank[j]] - grad_barycentric[above]) * down;
    if (j > 0) grad_position[j - 1] = head - T(j) * elevated;
    head += elevated;
  }
}

// Coordinate i of vertex `remainder` of the simplex.
DK_HOST_DEVICE int32_t lattice_vertex(int32_t greedy, int32_t rank, int remainder, int d) {
  return greedy + remainder - (rank > d - remainder ? d + 1 : 0);
}

}  // namespace deeplab_kernels
