// Runs the passes by planes.
#pragma once

#include "planes.h"
#include "planes_isa.h"

namespace deeplab_kernels::cpu {
namespace {

// Calls run(planes, task) for all tasks; false where this code does not serve.
template <typename P, typename Run>
bool by_planes(const DepthwiseShape& shape, typename P::Pass pass, const Parallel& parallel, const Run& run) {
  const auto cut = P::cut(shape, pass, parallel.threads());
  if (cut.planes == 0) return false;
  parallel(cut.tasks, [&](int64_t begin, int64_t end) {
    P planes(shape, pass, cut);
    for (int64_t task = begin; task < end; ++task) run(planes, task);
  });
  return true;
}

// Calls f(null pointer to the class of planes) for the shape's layout.
template <typename T, typename F>
bool in_layout(const DepthwiseShape& shape, const F& f) {
  return shape.channels_last ? f(static_cast<Planes<T, true>*>(nullptr)) : f(static_cast<Planes<T, false>*>(nullptr));
}

}  // namespace

namespace DK_ISA {

template <typename T>
bool PlaneKernels<T>::forward(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<A>* norm,
                              T* out, const Parallel& parallel) {
  // One pass gains in NCHW; at stride 2 where rows are short.
  if (shape.channels_last || (shape.stride_w != 1 && shape.out_w > 6 * kLanes<A>)) return false;
  using P = Planes<T, false>;
  return by_planes<P>(shape, P::Pass::kInference, parallel,
                      [&](P& planes, int64_t task) { planes.inference(task, x, weight, norm, out); });
}

template <typename T>
bool PlaneKernels<T>::training(const DepthwiseShape& shape, const T* x, const T* weight, const BatchNorm<A>& norm,
                               T* out, A* mean, A* var, Activation pre_activation, const Parallel& parallel) {
  return in_layout<T>(shape, [&]<typename P>(P*) {
    return by_planes<P>(shape, P::Pass::kTraining, parallel, [&](P& planes, int64_t task) {
      planes.training(task, x, weight, norm, out, mean, var, pre_activation);
    });
  });
}

template <typename T>
bool PlaneKernels<T>::backward(const DepthwiseShape& shape, const BackwardTensors<T>& tensors, const BatchNorm<A>* norm,
                               bool batch_statistics, const Parallel& parallel) {
  return in_layout<T>(shape, [&]<typename P>(P*) {
    return by_planes<P>(shape, P::Pass::kBackward, parallel,
                        [&](P& planes, int64_t task) { planes.backward(task, tensors, norm, batch_statistics); });
  });
}

}  // namespace DK_ISA
}  // namespace deeplab_kernels::cpu
