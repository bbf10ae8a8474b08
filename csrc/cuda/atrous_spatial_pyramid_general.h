// What the 3x3 kernels of the atrous spatial pyramid do not take: forward runs branch by branch, and the gradient of x
// is gathered here, one input element a thread, from all branches of a launch.
#pragma once

#include "atrous_depthwise_general.h"
#include "atrous_spatial_pyramid_branches.h"

namespace deeplab_kernels::cuda {

// Geometry and gradient of the branches of one launch; tap u of branch r is at row h + pad_h[r] - u * rate_h[r] of dy.
template <typename T>
struct GeneralBranches {
  int64_t batch, channels, height, width, kernel_h, kernel_w;
  int count;
  bool channels_last;
  int64_t rate_h[kMaxBranches], rate_w[kMaxBranches], pad_h[kMaxBranches], pad_w[kMaxBranches];
  const T* grad[kMaxBranches];
};

// grad_x = before + grad_pooled / pixels + the branches' gradients. `before` and `grad_pooled` may be null; `sum`,
// where it is not null, takes the result in place of grad_x, in the accumulation type.
template <typename T>
__global__ void __launch_bounds__(kGeneralThreads, 2)
    pyramid_grad_x_general(GeneralBranches<T> b, const T* weight, const T* grad_pooled, const acc_t<T>* before,
                           acc_t<T>* sum, T* grad_x) {
  using A = acc_t<T>;
  const int64_t index = int64_t(blockIdx.x) * kGeneralThreads + threadIdx.x;
  if (index >= b.batch * b.channels * b.height * b.width) return;
  const Site site = site_of(index, b.channels, b.height, b.width, b.channels_last);
  const Site corner{site.n, site.c, 0, 0};
  const int64_t plane = offset_of(corner, b.channels, b.height, b.width, b.channels_last);
  const int64_t step = b.channels_last ? b.channels : 1;
  A total = before ? before[index] : A(0);
  if (grad_pooled) total += widen(grad_pooled[site.n * b.channels + site.c]) / A(b.height * b.width);
  for (int r = 0; r < b.count; ++r) {
    const T* taps = weight + (r * b.channels + site.c) * b.kernel_h * b.kernel_w;
    for (int64_t u = 0; u < b.kernel_h; ++u) {
      const int64_t i = site.i + b.pad_h[r] - u * b.rate_h[r];
      if (i < 0 || i >= b.height) continue;
      for (int64_t v = 0; v < b.kernel_w; ++v) {
        const int64_t j = site.j + b.pad_w[r] - v * b.rate_w[r];
        if (j < 0 || j >= b.width) continue;
        total += widen(b.grad[r][plane + (i * b.width + j) * step]) * widen(taps[u * b.kernel_w + v]);
      }
    }
  }
  if (sum) {
    sum[index] = total;
  } else {
    grad_x[index] = narrow<T>(total);
  }
}

}  // namespace deeplab_kernels::cuda
