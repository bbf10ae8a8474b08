// Plain loops: placeholder until the vectorised kernels land in this file's place.
#include "atrous_depthwise.h"

#include <torch/headeronly/util/BFloat16.h>

#include <cmath>
#include <vector>

namespace deeplab_kernels::cpu {
namespace {

int64_t offset(const DepthwiseShape& s, bool output, int64_t n, int64_t c, int64_t i, int64_t j) {
  const int64_t channels = output ? s.out_channels() : s.channels;
  const int64_t h = output ? s.out_h : s.in_h, w = output ? s.out_w : s.in_w;
  return s.channels_last ? ((n * h + i) * w + j) * channels + c : ((n * channels + c) * h + i) * w + j;
}

template <typename T>
acc_t<T> conv_at(const DepthwiseShape& s, const T* x, const T* weight, int64_t n, int64_t c, int64_t i, int64_t j) {
  acc_t<T> sum = 0;
  for (int64_t u = 0; u < s.kernel_h; ++u) {
    const int64_t h = tap_input(i, u, s.stride_h, s.rate_h, s.pad_top);
    if (h < 0 || h >= s.in_h) continue;
    for (int64_t v = 0; v < s.kernel_w; ++v) {
      const int64_t w = tap_input(j, v, s.stride_w, s.rate_w, s.pad_left);
      if (w < 0 || w >= s.in_w) continue;
      sum += acc_t<T>(x[offset(s, false, n, c / s.multiplier, h, w)]) *
             acc_t<T>(weight[(c * s.kernel_h + u) * s.kernel_w + v]);
    }
  }
  return sum;
}

template <typename F>
void for_outputs(const DepthwiseShape& s, int64_t c, F&& f) {
  for (int64_t n = 0; n < s.batch; ++n)
    for (int64_t i = 0; i < s.out_h; ++i)
      for (int64_t j = 0; j < s.out_w; ++j) f(n, i, j, offset(s, true, n, c, i, j));
}

}  // namespace

template <typename T>
void atrous_depthwise_conv2d(const DepthwiseShape& s, const T* x, const T* weight, T* y, const Parallel& parallel) {
  parallel(s.out_channels(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c)
      for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) { y[o] = T(conv_at(s, x, weight, n, c, i, j)); });
  });
}

template <typename T>
void atrous_depthwise_conv2d_backward(const DepthwiseShape& s, const T* grad, const T* x, const T* weight, T* grad_x,
                                      T* grad_weight, const Parallel& parallel) {
  using A = acc_t<T>;
  const int64_t pixels = s.in_h * s.in_w;
  parallel(s.channels, [&](int64_t begin, int64_t end) {
    std::vector<A> sums(s.batch * pixels), taps(s.taps());
    for (int64_t ci = begin; ci < end; ++ci) {
      std::fill(sums.begin(), sums.end(), A(0));
      for (int64_t q = 0; q < s.multiplier; ++q) {
        const int64_t c = ci * s.multiplier + q;
        std::fill(taps.begin(), taps.end(), A(0));
        for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) {
          for (int64_t u = 0; u < s.kernel_h; ++u)
            for (int64_t v = 0; v < s.kernel_w; ++v) {
              const int64_t h = tap_input(i, u, s.stride_h, s.rate_h, s.pad_top);
              const int64_t w = tap_input(j, v, s.stride_w, s.rate_w, s.pad_left);
              if (h < 0 || h >= s.in_h || w < 0 || w >= s.in_w) continue;
              const A g = A(grad[o]);
              taps[u * s.kernel_w + v] += g * A(x[offset(s, false, n, ci, h, w)]);
              sums[n * pixels + h * s.in_w + w] += g * A(weight[(c * s.kernel_h + u) * s.kernel_w + v]);
            }
        });
        if (grad_weight)
          for (int64_t t = 0; t < s.taps(); ++t) grad_weight[c * s.taps() + t] = T(taps[t]);
      }
      if (grad_x)
        for (int64_t n = 0; n < s.batch; ++n)
          for (int64_t h = 0; h < s.in_h; ++h)
            for (int64_t w = 0; w < s.in_w; ++w)
              grad_x[offset(s, false, n, ci, h, w)] = T(sums[n * pixels + h * s.in_w + w]);
    }
  });
}

template <typename T>
void atrous_depthwise_bn_act_inference(const DepthwiseShape& s, const T* x, const T* weight,
                                       const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean,
                                       const acc_t<T>* var, T* out, const Parallel& parallel) {
  using A = acc_t<T>;
  parallel(s.out_channels(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const A scale = (norm.gamma ? norm.gamma[c] : A(1)) / std::sqrt(var[c] + A(norm.eps));
      const A shift = (norm.beta ? norm.beta[c] : A(0)) - mean[c] * scale;
      for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) {
        out[o] = T(activate(scale * conv_at(s, x, weight, n, c, i, j) + shift, norm.activation));
      });
    }
  });
}

template <typename T>
void atrous_depthwise_bn_act_training(const DepthwiseShape& s, const T* x, const T* weight,
                                      const NormParameters<acc_t<T>>& norm, T* out, T* y, acc_t<T>* mean,
                                      acc_t<T>* var, const Parallel& parallel) {
  using A = acc_t<T>;
  parallel(s.out_channels(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0, squares = 0;
      for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) {
        const A value = conv_at(s, x, weight, n, c, i, j);
        sum += value, squares += double(value) * value;
        if (y) y[o] = T(value);
      });
      const double count = double(s.batch) * s.out_h * s.out_w;
      mean[c] = A(sum / count), var[c] = A(squares / count - sum / count * (sum / count));
    }
  });
  atrous_depthwise_bn_act_inference<T>(s, x, weight, norm, mean, var, out, parallel);
}

template <typename T>
void atrous_depthwise_bn_act_backward(const DepthwiseShape& s, const T* grad, const T* x, const T* weight, const T*,
                                      const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean,
                                      const acc_t<T>* var, bool batch_statistics, T* grad_x, T* grad_weight,
                                      acc_t<T>* grad_gamma, acc_t<T>* grad_beta, const Parallel& parallel) {
  using A = acc_t<T>;
  std::vector<T> grad_y(s.batch * s.out_channels() * s.out_h * s.out_w);
  const double count = double(s.batch) * s.out_h * s.out_w;
  parallel(s.out_channels(), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const A invstd = A(1) / std::sqrt(var[c] + A(norm.eps));
      const A gamma = norm.gamma ? norm.gamma[c] : A(1), beta = norm.beta ? norm.beta[c] : A(0);
      double sum = 0, dot = 0;
      auto masked = [&](A g, A xhat) { return g * activation_slope(gamma * xhat + beta, norm.activation); };
      for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) {
        const A xhat = (conv_at(s, x, weight, n, c, i, j) - mean[c]) * invstd, g = masked(A(grad[o]), xhat);
        sum += g, dot += double(g) * xhat;
      });
      grad_beta[c] = A(sum), grad_gamma[c] = A(dot);
      const A mean_g = batch_statistics ? A(sum / count) : A(0), mean_dot = batch_statistics ? A(dot / count) : A(0);
      for_outputs(s, c, [&](int64_t n, int64_t i, int64_t j, int64_t o) {
        const A xhat = (conv_at(s, x, weight, n, c, i, j) - mean[c]) * invstd;
        grad_y[o] = T(gamma * invstd * (masked(A(grad[o]), xhat) - mean_g - xhat * mean_dot));
      });
    }
  });
  atrous_depthwise_conv2d_backward<T>(s, grad_y.data(), x, weight, grad_x, grad_weight, parallel);
}

const char* instruction_set() { return "portable"; }

#define DK_INSTANTIATE(T)                                                                                              \
  template void atrous_depthwise_conv2d<T>(const DepthwiseShape&, const T*, const T*, T*, const Parallel&);            \
  template void atrous_depthwise_conv2d_backward<T>(const DepthwiseShape&, const T*, const T*, const T*, T*, T*,       \
                                                    const Parallel&);                                                  \
  template void atrous_depthwise_bn_act_inference<T>(const DepthwiseShape&, const T*, const T*,                        \
                                                     const NormParameters<acc_t<T>>&, const acc_t<T>*,                 \
                                                     const acc_t<T>*, T*, const Parallel&);                            \
  template void atrous_depthwise_bn_act_training<T>(const DepthwiseShape&, const T*, const T*,                         \
                                                    const NormParameters<acc_t<T>>&, T*, T*, acc_t<T>*, acc_t<T>*,     \
                                                    const Parallel&);                                                  \
  template void atrous_depthwise_bn_act_backward<T>(const DepthwiseShape&, const T*, const T*, const T*, const T*,     \
                                                    const NormParameters<acc_t<T>>&, const acc_t<T>*, const acc_t<T>*, \
                                                    bool, T*, T*, acc_t<T>*, acc_t<T>*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace deeplab_kernels::cpu
