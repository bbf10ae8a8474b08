// The calls of atrous_depthwise.h: from a run-time storage type to the kernels of that type.
#include "atrous_depthwise.h"
#include "atrous_depthwise_calls.h"
#include "dispatch.h"

namespace deeplab_kernels::cuda {

extern template struct Calls<float>;
extern template struct Calls<double>;
extern template struct Calls<__half>;
extern template struct Calls<__nv_bfloat16>;

void atrous_depthwise_conv2d(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                             const void* weight, void* y) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    Calls<T>::conv(context, shape, in<T>(x), in<T>(weight), Calls<T>::no_norm(), out<T>(y));
  });
}

void atrous_depthwise_conv2d_backward(const Context& context, Dtype dtype, const DepthwiseShape& shape,
                                      const void* grad_out, const void* x, const void* weight, void* grad_x,
                                      void* grad_weight) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    Calls<T>::conv_backward(context, shape, in<T>(grad_out), in<T>(x), in<T>(weight), out<T>(grad_x),
                            out<T>(grad_weight));
  });
}

void atrous_depthwise_bn_act_inference(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                                       const void* weight, const NormParameters& norm, void* result) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    Calls<T>::conv(context, shape, in<T>(x), in<T>(weight), Calls<T>::norm_of(norm), out<T>(result));
  });
}

void atrous_depthwise_bn_act_training(const Context& context, Dtype dtype, const DepthwiseShape& shape, const void* x,
                                      const void* weight, const NormParameters& norm, void* result, void* y, void* mean,
                                      void* var) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    using A = acc_t<T>;
    Calls<T>::training(context, shape, in<T>(x), in<T>(weight), Calls<T>::norm_of(norm), out<T>(result), out<T>(y),
                       out<A>(mean), out<A>(var));
  });
}

void atrous_depthwise_bn_act_backward(const Context& context, Dtype dtype, const DepthwiseShape& shape,
                                      const void* grad_out, const void* x, const void* weight, const void* y,
                                      const NormParameters& norm, bool batch_statistics, void* grad_x,
                                      void* grad_weight, void* grad_gamma, void* grad_beta) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    using A = acc_t<T>;
    Calls<T>::backward(context, shape, in<T>(grad_out), in<T>(x), in<T>(weight), in<T>(y), Calls<T>::norm_of(norm),
                       batch_statistics, out<T>(grad_x), out<T>(grad_weight), out<A>(grad_gamma), out<A>(grad_beta));
  });
}

}  // namespace deeplab_kernels::cuda
