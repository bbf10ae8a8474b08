// Chooses the instruction set, and by planes, pixel by pixel or row by row. Each has its own files of kernels.
#include "atrous_depthwise.h"

#include "../finite.h"
#include "../stored.h"
#include "pixels_isa.h"
#include "planes_isa.h"
#include "sampled.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, typename F>
void with_depthwise(F&& f) {
  using S = typename Stored<T>::type;
  with_kernels<portable::Kernels<S>, avx2::Kernels<S>, avx512::Kernels<S>>(f);
}

// f(kernels) says whether these kernels, pixel by pixel or by planes, serve.
template <template <typename> typename Portable, template <typename> typename Avx2, template <typename> typename Avx512,
          typename T, typename F>
bool served_by(F&& f) {
  bool served = false;
  if constexpr (sizeof(T) < sizeof(double)) {  // float64 is for checking gradients: it does without
    using S = typename Stored<T>::type;
    with_kernels<Portable<S>, Avx2<S>, Avx512<S>>([&](auto kernels) { served = f(kernels); });
  }
  return served;
}
template <typename T, typename F>
bool by_pixels(const DepthwiseShape& shape, F&& f) {
  return shape.channels_last && served_by<portable::PixelKernels, avx2::PixelKernels, avx512::PixelKernels, T>(f);
}
template <typename T, typename F>
bool by_planes(F&& f) {
  return served_by<portable::PlaneKernels, avx2::PlaneKernels, avx512::PlaneKernels, T>(f);
}

template <typename T>
PlanBuilder make_plan(const DepthwiseShape& shape, Purpose purpose, bool exact) {
  const int64_t vector_bytes = chosen_instruction_set() == InstructionSet::kAvx512 ? 64
                               : chosen_instruction_set() == InstructionSet::kAvx2 ? 32
                                                                                   : 16;
  return PlanBuilder(shape, purpose, sizeof(T), sizeof(acc_t<T>), vector_bytes / sizeof(acc_t<T>), exact);
}

template <typename T>
bool weights_finite(const DepthwiseShape& shape, const T* weight) {
  return all_finite<acc_t<T>>(weight, shape.out_channels() * shape.taps());
}

template <typename T>
void backward(const DepthwiseShape& shape, const BackwardTensors<typename Stored<T>::type>& tensors, const T* weight,
              const BatchNorm<acc_t<T>>* norm, bool batch_statistics, T* grad_weight, const Parallel& parallel) {
  if (by_pixels<T>(shape,
                   [&](auto kernels) { return kernels.backward(shape, tensors, norm, batch_statistics, parallel); }))
    return;
  auto run = [&](bool exact) {
    if (!exact && !tensors.y &&
        by_planes<T>([&](auto kernels) { return kernels.backward(shape, tensors, norm, batch_statistics, parallel); }))
      return;
    const PlanBuilder builder = make_plan<T>(shape, Purpose::kBackward, exact);
    with_depthwise<T>(
        [&](auto kernels) { kernels.backward(builder.plan(), tensors, norm, batch_statistics, parallel); });
  };
  const bool exact = !weights_finite(shape, weight);
  run(exact);
  // An infinite gradient times padding would have been NaN: sum again over the image alone.
  if (!exact && grad_weight && !weights_finite(shape, grad_weight)) run(true);
}

// Whether planes would be too few for the threads, where rows are long enough to do without them. Of the shape alone,
// so that results do not depend on the number of threads.
bool few_wide_planes(const DepthwiseShape& s) { return s.batch * s.channels < 16 && s.out_w > 48; }

// norm null: the convolution alone.
template <typename T>
void forward(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<acc_t<T>>* norm, T* out,
             const Parallel& parallel) {
  if (can_be_sampled(shape))
    return with_sampled(shape, x, parallel, [&](const DepthwiseShape& sampled_shape, const T* sampled) {
      forward<T>(sampled_shape, sampled, weight, norm, out, parallel);
    });
  const bool exact = !weights_finite(shape, weight);
  if (!exact && !few_wide_planes(shape) && by_planes<T>([&](auto kernels) {
        return kernels.forward(shape, stored(x), stored(weight), norm, stored(out), parallel);
      }))
    return;
  const PlanBuilder builder = make_plan<T>(shape, Purpose::kInference, exact);
  with_depthwise<T>(
      [&](auto kernels) { kernels.forward(builder.plan(), stored(x), stored(weight), norm, stored(out), parallel); });
}

}  // namespace

template <typename T>
void atrous_depthwise_conv2d(const DepthwiseShape& shape, const T* x, const T* weight, T* y, const Parallel& parallel) {
  forward<T>(shape, x, weight, nullptr, y, parallel);
}

template <typename T>
void atrous_depthwise_conv2d_backward(const DepthwiseShape& shape, const T* grad_out, const T* x, const T* weight,
                                      T* grad_x, T* grad_weight, const Parallel& parallel) {
  backward<T>(
      shape,
      {stored(grad_out), stored(x), stored(weight), nullptr, stored(grad_x), stored(grad_weight), nullptr, nullptr},
      weight, nullptr, false, grad_weight, parallel);
}

template <typename T>
void atrous_depthwise_bn_act_inference(const DepthwiseShape& shape, const T* x, const T* weight,
                                       const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                                       T* out, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  forward<T>(shape, x, weight, &batch_norm, out, parallel);
}

template <typename T>
void atrous_depthwise_bn_act_training(const DepthwiseShape& shape, const T* x, const T* weight,
                                      const NormParameters<acc_t<T>>& norm, T* out, T* y, acc_t<T>* mean, acc_t<T>* var,
                                      Activation pre_activation, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  if (by_pixels<T>(shape, [&](auto kernels) {
        return kernels.training(shape, stored(x), stored(weight), batch_norm, stored(out), stored(y), mean, var,
                                pre_activation, parallel);
      }))
    return;
  const bool exact = !weights_finite(shape, weight);
  if (!y && !exact && by_planes<T>([&](auto kernels) {
        return kernels.training(shape, stored(x), stored(weight), batch_norm, stored(out), mean, var, pre_activation,
                                parallel);
      }))
    return;
  const PlanBuilder builder = make_plan<T>(shape, Purpose::kTraining, exact);
  with_depthwise<T>([&](auto kernels) {
    kernels.training(builder.plan(), stored(x), stored(weight), batch_norm, stored(out), stored(y), mean, var,
                     pre_activation, parallel);
  });
}

template <typename T>
void atrous_depthwise_bn_act_backward(const DepthwiseShape& shape, const T* grad_out, const T* x, const T* weight,
                                      const T* y, const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean,
                                      const acc_t<T>* var, bool batch_statistics, T* grad_x, T* grad_weight,
                                      acc_t<T>* grad_gamma, acc_t<T>* grad_beta, Activation pre_activation,
                                      const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  backward<T>(shape,
              {stored(grad_out), stored(x), stored(weight), stored(y), stored(grad_x), stored(grad_weight), grad_gamma,
               grad_beta, pre_activation},
              weight, &batch_norm, batch_statistics, grad_weight, parallel);
}

#define DK_INSTANTIATE(T)                                                                                              \
  template void atrous_depthwise_conv2d<T>(const DepthwiseShape&, const T*, const T*, T*, const Parallel&);            \
  template void atrous_depthwise_conv2d_backward<T>(const DepthwiseShape&, const T*, const T*, const T*, T*, T*,       \
                                                    const Parallel&);                                                  \
  template void atrous_depthwise_bn_act_inference<T>(const DepthwiseShape&, const T*, const T*,                        \
                                                     const NormParameters<acc_t<T>>&, const acc_t<T>*,                 \
                                                     const acc_t<T>*, T*, const Parallel&);                            \
  template void atrous_depthwise_bn_act_training<T>(const DepthwiseShape&, const T*, const T*,                         \
                                                    const NormParameters<acc_t<T>>&, T*, T*, acc_t<T>*, acc_t<T>*,     \
                                                    Activation, const Parallel&);                                      \
  template void atrous_depthwise_bn_act_backward<T>(const DepthwiseShape&, const T*, const T*, const T*, const T*,     \
                                                    const NormParameters<acc_t<T>>&, const acc_t<T>*, const acc_t<T>*, \
                                                    bool, T*, T*, acc_t<T>*, acc_t<T>*, Activation, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace deeplab_kernels::cpu
