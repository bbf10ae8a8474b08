// Batch normalisation and activation per element, forward and backward:
//   out  = act(z),  z = scale * (y - mean) + beta,  scale = gamma / sqrt(var + eps)
//   g    = grad_out * act'(z)
//   dy   = scale * (g - mean(g) - xhat * mean(g * xhat)),  xhat = (y - mean) / sqrt(var + eps)
// The last two means are left out where the statistics were given. Subtracting the mean first keeps a channel whose
// mean is large beside its deviation exact.
#pragma once

#include "pack.h"

namespace deeplab_kernels::cuda {

// As NormParameters, with the accumulation type; mean == nullptr means no normalisation and no activation.
template <typename A>
struct Norm {
  const A* gamma;
  const A* beta;
  const A* mean;
  const A* var;
  A eps;
  Activation activation;
};

template <typename A>
struct Affine {
  A mean, scale, beta;

  __device__ __forceinline__ A operator()(A y) const { return scale * (y - mean) + beta; }
};

template <typename A>
__device__ __forceinline__ A inverse_deviation(A var, A eps) {
  return A(1) / sqrt(var + eps);
}

template <typename A>
__device__ __forceinline__ Affine<A> affine(const Norm<A>& norm, int64_t c) {
  const A inverse = inverse_deviation(norm.var[c], norm.eps);
  return {norm.mean[c], norm.gamma ? norm.gamma[c] * inverse : inverse, norm.beta ? norm.beta[c] : A(0)};
}

// The normalisation of the V channels from c on, those at or above `end` left at zero.
template <typename A, int V>
struct Affines {
  Affine<A> channel[V];

  __device__ __forceinline__ void load(const Norm<A>& norm, int64_t c, int64_t end) {
#pragma unroll
    for (int e = 0; e < V; ++e) channel[e] = c + e < end ? affine(norm, c + e) : Affine<A>{A(0), A(0), A(0)};
  }
};

// What the gradient w.r.t. y needs besides Norm. sum_g and sum_g_xhat are over (N, H, W), which is also what beta's and
// gamma's gradients are.
template <typename A>
struct NormGrad {
  Norm<A> norm;
  const A* sum_g;
  const A* sum_g_xhat;
  A inverse_count;  // 0 where the statistics were given
};

template <typename A>
struct AffineGrad {
  Affine<A> forward;
  A mean_g, slope;

  __device__ __forceinline__ A operator()(A grad_out, A y, Activation activation) const {
    const A g = activation_slope(forward(y), activation) == A(0) ? A(0) : grad_out;
    // With given statistics slope is 0, and an infinite y must not turn it into NaN.
    return forward.scale * (g - mean_g - (slope == A(0) ? A(0) : (y - forward.mean) * slope));
  }
};

template <typename A>
__device__ __forceinline__ AffineGrad<A> affine_grad(const NormGrad<A>& n, int64_t c) {
  const A inverse = inverse_deviation(n.norm.var[c], n.norm.eps);
  const Affine<A> forward = affine(n.norm, c);
  if (n.inverse_count == A(0)) return {forward, A(0), A(0)};
  return {forward, n.sum_g[c] * n.inverse_count, n.sum_g_xhat[c] * n.inverse_count * inverse};
}

}  // namespace deeplab_kernels::cuda
