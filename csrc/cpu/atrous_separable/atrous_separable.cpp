// Folds the normalisations into one scale and shift a channel and chooses the instruction set; the kernels are in
// kernels.cpp.
#include "atrous_separable.h"

#include <cmath>
#include <vector>

#include "../finite.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T>
class Affine {
 public:
  Affine(const ChannelNorm<T>& norm, int64_t channels) : norm_(norm) {
    const int64_t padded = (channels + kChannelPadding - 1) / kChannelPadding * kChannelPadding;
    scale_.assign(size_t(padded), T(1));
    shift_.assign(size_t(padded), T(0));
    for (int64_t c = 0; c < channels; ++c) {
      double scale = norm.gamma ? double(norm.gamma[c]) : 1.0;
      if (norm.var) scale /= std::sqrt(double(norm.var[c]) + norm.eps);
      const double mean = norm.mean ? double(norm.mean[c]) * scale : 0.0;
      scale_[size_t(c)] = T(scale);
      shift_[size_t(c)] = T((norm.beta ? double(norm.beta[c]) : 0.0) - mean);
    }
  }
  ChannelAffine<T> get() const { return {scale_.data(), shift_.data(), norm_.activation}; }

 private:
  const ChannelNorm<T>& norm_;
  std::vector<T> scale_, shift_;
};

template <typename T>
bool nothing(const ChannelNorm<T>& norm) {
  return !norm.gamma && !norm.beta && !norm.mean && !norm.var && norm.activation == Activation::kNone;
}

}  // namespace

template <typename T>
void atrous_separable_conv2d(const DepthwiseShape& shape, int64_t out_channels, const SeparableTensors<T>& tensors,
                             Activation pre_activation, const ChannelNorm<T>& depthwise_norm,
                             const ChannelNorm<T>& pointwise_norm, const Parallel& parallel) {
  const Affine<T> depthwise(depthwise_norm, shape.channels), pointwise(pointwise_norm, out_channels);
  SeparableJob<T> job{shape, out_channels, tensors, pre_activation, depthwise.get(), pointwise.get(), true};
  if (nothing(depthwise_norm)) job.depthwise.scale = nullptr;
  if (tensors.depthwise_weight)
    job.finite_weights = all_finite<T>(tensors.depthwise_weight, shape.channels * shape.taps());
  with_kernels<portable::Separable<T>, avx2::Separable<T>, avx512::Separable<T>>(
      [&](auto kernels) { kernels.run(job, parallel); });
}

#define DK_INSTANTIATE(T)                                                                                          \
  template void atrous_separable_conv2d<T>(const DepthwiseShape&, int64_t, const SeparableTensors<T>&, Activation, \
                                           const ChannelNorm<T>&, const ChannelNorm<T>&, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
