// What the kernels of the atrous spatial pyramid know of its branches.
#pragma once

#include <numeric>

#include "atrous_spatial_pyramid.h"
#include "pack.h"

namespace deeplab_kernels::cuda {

constexpr int kMaxBranches = 8;  // of one launch

template <typename T>
struct PyramidBranches {
  int64_t batch, channels;
  int count, height, width;
  int rate_h[kMaxBranches], rate_w[kMaxBranches];
  T* out[kMaxBranches];         // forward
  const T* grad[kMaxBranches];  // backward: grad_out or dy
  const T* y[kMaxBranches];     // backward: conv_r(x), where dy is formed from it
};

// The largest step that divides the vertical rates of all branches whose taps reach other rows of the image at all.
inline int64_t row_step(const PyramidShape& s) {
  int64_t step = 0;
  for (std::size_t r = 0; r < s.rates.size(); r += 2)
    if (s.rates[r] < s.height) step = std::gcd(step, s.rates[r]);
  return step > 0 ? step : s.height;
}

// Branches of a 3x3 pyramid. Rates that leave the image do so by any distance: 32 bits suffice.
template <typename T>
PyramidBranches<T> branches_of(const PyramidShape& s) {
  PyramidBranches<T> b{};
  b.batch = s.batch, b.channels = s.channels;
  b.count = int(s.branches()), b.height = int(s.height), b.width = int(s.width);
  const int64_t step = row_step(s);
  for (int r = 0; r < b.count; ++r) {
    const int64_t rate_h = s.rates[std::size_t(2 * r)], rate_w = s.rates[std::size_t(2 * r + 1)];
    b.rate_h[r] = int(rate_h < s.height ? rate_h : ceil_div(s.height, step) * step);
    b.rate_w[r] = int(at_most(rate_w, s.width));
  }
  return b;
}

}  // namespace deeplab_kernels::cuda
