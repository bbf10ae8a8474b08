// Chooses the instruction set; the kernels are in kernels.cpp.
#include "batch_norm_act.h"

#include "../stored.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, typename F>
void with_batch_norm_act(F&& f) {
  using S = typename Stored<T>::type;
  with_kernels<portable::BatchNormAct<S>, avx2::BatchNormAct<S>, avx512::BatchNormAct<S>>(f);
}

}  // namespace

template <typename T>
void batch_norm_act_training(const MapShape& shape, const T* z, const T* residual, const NormParameters<acc_t<T>>& norm,
                             T* out, acc_t<T>* mean, acc_t<T>* var, bool given, const Parallel& parallel) {
  with_batch_norm_act<T>([&](auto kernels) {
    kernels.training(shape, stored(z), stored(residual), norm, stored(out), mean, var, given, parallel);
  });
}

template <typename T>
void batch_norm_act_backward(const MapShape& shape, const T* grad_out, const T* z, const T* out,
                             const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var, T* grad_z,
                             T* grad_residual, acc_t<T>* grad_gamma, acc_t<T>* grad_beta, const Parallel& parallel) {
  using S = typename Stored<T>::type;
  const MapGradients<S> tensors{stored(grad_out),      stored(z),  stored(out), stored(grad_z),
                                stored(grad_residual), grad_gamma, grad_beta};
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  with_batch_norm_act<T>([&](auto kernels) { kernels.backward(shape, tensors, batch_norm, parallel); });
}

#define DK_INSTANTIATE(T)                                                                                             \
  template void batch_norm_act_training<T>(const MapShape&, const T*, const T*, const NormParameters<acc_t<T>>&, T*,  \
                                           acc_t<T>*, acc_t<T>*, bool, const Parallel&);                              \
  template void batch_norm_act_backward<T>(const MapShape&, const T*, const T*, const T*,                             \
                                           const NormParameters<acc_t<T>>&, const acc_t<T>*, const acc_t<T>*, T*, T*, \
                                           acc_t<T>*, acc_t<T>*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace deeplab_kernels::cpu
