// What a call of either Gaussian filter reads and writes, for the whole batch; null where absent.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

template <typename T>
struct FilterTensors {
  const T* features;
  const T* rows;  // filtered into out
  T* out;
  const T* values;  // with grad: for grad_features
  const T* grad;
  T* grad_features;

  static FilterTensors forward(const T* values, const T* features, T* out) {
    return {features, values, out, nullptr, nullptr, nullptr};
  }
  // The filter is symmetric: it makes grad_values of grad_out. grad_values and grad_features may be null.
  static FilterTensors backward(int64_t channels, const T* grad_out, const T* values, const T* features, T* grad_values,
                                T* grad_features) {
    return {features, grad_values && channels > 0 ? grad_out : nullptr, grad_values, values, grad_out, grad_features};
  }
};

}  // namespace deeplab_kernels::cpu
