// Chooses the instruction set and makes the plan; the kernels are in atrous_depthwise_kernels.h.
#include "atrous_depthwise.h"

#include "atrous_depthwise_pixels_isa.h"
#include "finite.h"
#include "stored.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, typename F>
void with_depthwise(F&& f) {
  using S = typename Stored<T>::type;
  with_kernels<portable::Kernels<S>, avx2::Kernels<S>, avx512::Kernels<S>>(f);
}

// f(kernels) says whether training pixel by pixel serves.
template <typename T, typename F>
bool by_pixels(const DepthwiseShape& shape, F&& f) {
  bool served = false;
  if constexpr (sizeof(T) < sizeof(double)) {  // float64 is for checking gradients: it does without
    using S = typename Stored<T>::type;
    if (shape.channels_last)
      with_kernels<portable::PixelKernels<S>, avx2::PixelKernels<S>, avx512::PixelKernels<S>>(
          [&](auto kernels) { served = f(kernels); });
  }
  return served;
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
    const PlanBuilder builder = make_plan<T>(shape, Purpose::kBackward, exact);
    with_depthwise<T>(
        [&](auto kernels) { kernels.backward(builder.plan(), tensors, norm, batch_statistics, parallel); });
  };
  const bool exact = !weights_finite(shape, weight);
  run(exact);
  // An infinite gradient times padding would have been NaN: sum again over the image alone.
  if (!exact && grad_weight && !weights_finite(shape, grad_weight)) run(true);
}

}  // namespace

template <typename T>
void atrous_depthwise_conv2d(const DepthwiseShape& shape, const T* x, const T* weight, T* y, const Parallel& parallel) {
  const PlanBuilder builder = make_plan<T>(shape, Purpose::kInference, !weights_finite(shape, weight));
  with_depthwise<T>(
      [&](auto kernels) { kernels.forward(builder.plan(), stored(x), stored(weight), nullptr, stored(y), parallel); });
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
  const PlanBuilder builder = make_plan<T>(shape, Purpose::kInference, !weights_finite(shape, weight));
  with_depthwise<T>([&](auto kernels) {
    kernels.forward(builder.plan(), stored(x), stored(weight), &batch_norm, stored(out), parallel);
  });
}

template <typename T>
void atrous_depthwise_bn_act_training(const DepthwiseShape& shape, const T* x, const T* weight,
                                      const NormParameters<acc_t<T>>& norm, T* out, T* y, acc_t<T>* mean, acc_t<T>* var,
                                      Activation pre_activation, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  if (!y && by_pixels<T>(shape, [&](auto kernels) {
        return kernels.training(shape, stored(x), stored(weight), batch_norm, stored(out), mean, var, pre_activation,
                                parallel);
      }))
    return;
  const PlanBuilder builder = make_plan<T>(shape, Purpose::kTraining, !weights_finite(shape, weight));
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
