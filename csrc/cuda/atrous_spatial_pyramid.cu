// The calls of atrous_spatial_pyramid.h: from a run-time storage type to the kernels of that type.
#include "atrous_spatial_pyramid.h"
#include "atrous_spatial_pyramid_calls.h"
#include "dispatch.h"

namespace deeplab_kernels::cuda {

extern template struct PyramidCalls<float>;
extern template struct PyramidCalls<double>;
extern template struct PyramidCalls<__half>;
extern template struct PyramidCalls<__nv_bfloat16>;

void atrous_spatial_pyramid(const Context& context, Dtype dtype, const PyramidShape& shape, const void* x,
                            const void* weight, const NormParameters& norm, void* const* result, void* pooled) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    const std::vector<T*> results = all<T*>(result, shape.branches());
    PyramidCalls<T>::forward(context, shape, in<T>(x), in<T>(weight), Calls<T>::norm_of(norm), results.data(),
                             out<T>(pooled));
  });
}

void atrous_spatial_pyramid_training(const Context& context, Dtype dtype, const PyramidShape& shape, const void* x,
                                     const void* weight, const NormParameters& norm, void* const* result,
                                     void* const* conv, void* mean, void* var, void* pooled) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    using A = acc_t<T>;
    const std::vector<T*> results = all<T*>(result, shape.branches()), convs = all<T*>(conv, shape.branches());
    PyramidCalls<T>::training(context, shape, in<T>(x), in<T>(weight), Calls<T>::norm_of(norm), results.data(),
                              conv ? convs.data() : nullptr, out<A>(mean), out<A>(var), out<T>(pooled));
  });
}

void atrous_spatial_pyramid_backward(const Context& context, Dtype dtype, const PyramidShape& shape,
                                     const void* const* grad_out, const void* grad_pooled, const void* x,
                                     const void* weight, const void* const* conv, const NormParameters& norm,
                                     bool batch_statistics, void* grad_x, void* grad_weight, void* grad_gamma,
                                     void* grad_beta) {
  dispatch(dtype, [&](auto value) {
    using T = decltype(value);
    using A = acc_t<T>;
    const auto grads = all<const T*>(grad_out, shape.branches()), convs = all<const T*>(conv, shape.branches());
    PyramidCalls<T>::backward(context, shape, grads.data(), in<T>(grad_pooled), in<T>(x), in<T>(weight),
                              conv ? convs.data() : nullptr, Calls<T>::norm_of(norm), batch_statistics, out<T>(grad_x),
                              out<T>(grad_weight), out<A>(grad_gamma), out<A>(grad_beta));
  });
}

}  // namespace deeplab_kernels::cuda
