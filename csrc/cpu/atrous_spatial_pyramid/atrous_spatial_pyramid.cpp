// Runs all rates over planes that hold x once, by the kernels of kernels.cpp, or branch by branch
// where those do not serve: other kernels than 3x3, float64, weights or gradients that are not finite, gradients over
// images that do not fit the caches.
#include "atrous_spatial_pyramid.h"

#include <algorithm>
#include <type_traits>

#include "../finite.h"
#include "../stored.h"
#include "../workspace.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

constexpr int64_t kBlock = 4096;  // values a task converts or adds

int64_t image_values(const PyramidShape& shape) {
  const DepthwiseShape& s = shape.image();
  return s.batch * s.channels * s.in_h * s.in_w;
}

template <typename T>
bool all_finite_weights(const PyramidShape& shape, const T* weight) {
  return all_finite<acc_t<T>>(weight, shape.count * shape.channels() * shape.image().taps());
}

// Whether run(kernels) did the work.
template <typename T, typename Run>
bool by_planes(const PyramidShape& shape, const T* weight, const Run& run) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return false;
  } else {
    if (!all_finite_weights(shape, weight)) return false;
    using S = typename Stored<T>::type;
    bool done = false;
    with_kernels<portable::PyramidKernels<S>, avx2::PyramidKernels<S>, avx512::PyramidKernels<S>>(
        [&](auto kernels) { done = run(kernels); });
    return done;
  }
}

// Calls f(begin, end) over disjoint ranges of [0, count).
template <typename F>
void in_blocks(int64_t count, const Parallel& parallel, const F& f) {
  parallel((count + kBlock - 1) / kBlock,
           [&](int64_t begin, int64_t end) { f(begin * kBlock, std::min(end * kBlock, count)); });
}

template <typename A>
NormParameters<A> branch_norm(const NormParameters<A>& norm, int64_t first) {
  return {norm.gamma ? norm.gamma + first : nullptr, norm.beta ? norm.beta + first : nullptr, norm.eps,
          norm.activation};
}

template <typename T>
void image_mean(const DepthwiseShape& s, const T* x, T* pooled, const Parallel& parallel) {
  if (!pooled) return;
  const int64_t pixels = s.in_h * s.in_w;
  const int64_t together = s.channels_last ? 64 : 1, groups = (s.channels + together - 1) / together;
  parallel(s.batch * groups, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t n = task / groups, first = task % groups * together;
      const int64_t channels = std::min(together, s.channels - first);
      double sum[64] = {};
      const T* values = x + (s.channels_last ? n * pixels * s.channels + first : (n * s.channels + first) * pixels);
      for (int64_t i = 0; i < pixels; ++i)
        for (int64_t c = 0; c < channels; ++c) sum[c] += double(values[(s.channels_last ? i * s.channels : i) + c]);
      for (int64_t c = 0; c < channels; ++c) pooled[n * s.channels + first + c] = T(sum[c] / double(pixels));
    }
  });
}

// grad += grad_pooled / pixels.
template <typename A, typename T>
void add_gradient_of_mean(const DepthwiseShape& s, const T* grad_pooled, A* grad, const Parallel& parallel) {
  const int64_t pixels = s.in_h * s.in_w;
  parallel(s.batch * (s.channels_last ? pixels : s.channels), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      if (s.channels_last) {
        const T* pooled = grad_pooled + task / pixels * s.channels;
        for (int64_t c = 0; c < s.channels; ++c) grad[task * s.channels + c] += A(pooled[c]) / A(pixels);
      } else {
        const A value = A(grad_pooled[task]) / A(pixels);
        for (int64_t i = 0; i < pixels; ++i) grad[task * pixels + i] += value;
      }
    }
  });
}

// Values in the accumulation type: a copy unless they are of that type.
template <typename T>
class Widened {
 public:
  using A = acc_t<T>;
  Widened(const T* values, int64_t count, const Parallel& parallel)
      : values_(values), copy_(kSame ? 0 : size_t(count) * sizeof(A)) {
    if constexpr (!kSame)
      in_blocks(count, parallel, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) copy_.template as<A>()[i] = A(values[i]);
      });
  }
  const A* get() const {
    if constexpr (kSame)
      return values_;
    else
      return copy_.template as<A>();
  }

 private:
  static constexpr bool kSame = std::is_same_v<T, A>;
  const T* values_;
  const Workspace copy_;
};

// In the accumulation type throughout, so that the sum over the branches is rounded once.
template <typename T>
void backward_by_branches(const PyramidShape& shape, const PyramidGradients<T>& z, const NormParameters<acc_t<T>>& norm,
                          const acc_t<T>* mean, const acc_t<T>* var, bool batch_statistics, const Parallel& parallel) {
  using A = acc_t<T>;
  const DepthwiseShape& s = shape.image();
  const int64_t values = image_values(shape), weights = s.channels * s.taps();
  const Widened<T> x(z.x, values, parallel), weight(z.weight, shape.count * weights, parallel);
  const size_t bytes = z.grad_x ? size_t(values) * sizeof(A) : 0;
  const Workspace sum_memory(bytes), one_memory(bytes);
  const Workspace weight_memory(z.grad_weight ? size_t(weights) * sizeof(A) : 0);
  A* const sum = sum_memory.as<A>();
  for (int64_t r = 0; r < shape.count; ++r) {
    const Widened<T> grad(z.grad_out[r], values, parallel);
    A* const grad_x = !z.grad_x ? nullptr : r == 0 ? sum : one_memory.as<A>();
    A* const grad_weight = z.grad_weight ? weight_memory.as<A>() : nullptr;
    const A* const own_weight = weight.get() + r * weights;
    if (mean) {
      const int64_t first = r * s.channels;
      const Widened<T> conv(z.conv ? z.conv[r] : nullptr, z.conv ? values : 0, parallel);
      atrous_depthwise_bn_act_backward<A>(shape.branches[r], grad.get(), x.get(), own_weight,
                                          z.conv ? conv.get() : nullptr, branch_norm(norm, first), mean + first,
                                          var + first, batch_statistics, grad_x, grad_weight, z.grad_gamma + first,
                                          z.grad_beta + first, Activation::kNone, parallel);
    } else {
      atrous_depthwise_conv2d_backward<A>(shape.branches[r], grad.get(), x.get(), own_weight, grad_x, grad_weight,
                                          parallel);
    }
    for (int64_t i = 0; grad_weight && i < weights; ++i) z.grad_weight[r * weights + i] = T(grad_weight[i]);
    if (grad_x && r > 0)
      in_blocks(values, parallel, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sum[i] += grad_x[i];
      });
  }
  if (!z.grad_x) return;
  if (z.grad_pooled) add_gradient_of_mean(s, z.grad_pooled, sum, parallel);
  in_blocks(values, parallel, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) z.grad_x[i] = T(sum[i]);
  });
}

}  // namespace

template <typename T>
void atrous_spatial_pyramid(const PyramidShape& shape, const T* x, const T* weight,
                            const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                            T* const* out, T* pooled, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  if (by_planes<T>(shape, weight, [&](auto kernels) {
        return kernels.inference(shape, stored(x), stored(weight), mean ? &batch_norm : nullptr, stored_all(out),
                                 stored(pooled), parallel);
      }))
    return;
  for (int64_t r = 0; r < shape.count; ++r) {
    const int64_t first = r * shape.channels();
    const T* own = weight + first * shape.image().taps();
    if (mean)
      atrous_depthwise_bn_act_inference<T>(shape.branches[r], x, own, branch_norm(norm, first), mean + first,
                                           var + first, out[r], parallel);
    else
      atrous_depthwise_conv2d<T>(shape.branches[r], x, own, out[r], parallel);
  }
  image_mean(shape.image(), x, pooled, parallel);
}

template <typename T>
void atrous_spatial_pyramid_training(const PyramidShape& shape, const T* x, const T* weight,
                                     const NormParameters<acc_t<T>>& norm, T* const* out, T* const* conv,
                                     acc_t<T>* mean, acc_t<T>* var, T* pooled, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  if (!conv && by_planes<T>(shape, weight, [&](auto kernels) {
        return kernels.training(shape, stored(x), stored(weight), batch_norm, stored_all(out), mean, var,
                                stored(pooled), parallel);
      }))
    return;
  for (int64_t r = 0; r < shape.count; ++r) {
    const int64_t first = r * shape.channels();
    atrous_depthwise_bn_act_training<T>(shape.branches[r], x, weight + first * shape.image().taps(),
                                        branch_norm(norm, first), out[r], conv ? conv[r] : nullptr, mean + first,
                                        var + first, Activation::kNone, parallel);
  }
  image_mean(shape.image(), x, pooled, parallel);
}

template <typename T>
void atrous_spatial_pyramid_backward(const PyramidShape& shape, const PyramidGradients<T>& tensors,
                                     const NormParameters<acc_t<T>>& norm, const acc_t<T>* mean, const acc_t<T>* var,
                                     bool batch_statistics, const Parallel& parallel) {
  const BatchNorm<acc_t<T>> batch_norm{norm.gamma, norm.beta, mean, var, norm.eps, norm.activation};
  const bool done = !tensors.conv && by_planes<T>(shape, tensors.weight, [&](auto kernels) {
    const PyramidGradients<typename Stored<T>::type> z{
        stored_all(tensors.grad_out), stored(tensors.grad_pooled), stored(tensors.x),  stored(tensors.weight), nullptr,
        stored(tensors.grad_x),       stored(tensors.grad_weight), tensors.grad_gamma, tensors.grad_beta};
    return kernels.backward(shape, z, mean ? &batch_norm : nullptr, batch_statistics, parallel);
  });
  // An infinite gradient times padding would have been NaN: sum again over the image alone.
  if (done && (!tensors.grad_weight || all_finite_weights(shape, tensors.grad_weight))) return;
  backward_by_branches(shape, tensors, norm, mean, var, batch_statistics, parallel);
}

#define DK_INSTANTIATE(T)                                                                                             \
  template void atrous_spatial_pyramid<T>(const PyramidShape&, const T*, const T*, const NormParameters<acc_t<T>>&,   \
                                          const acc_t<T>*, const acc_t<T>*, T* const*, T*, const Parallel&);          \
  template void atrous_spatial_pyramid_training<T>(const PyramidShape&, const T*, const T*,                           \
                                                   const NormParameters<acc_t<T>>&, T* const*, T* const*, acc_t<T>*,  \
                                                   acc_t<T>*, T*, const Parallel&);                                   \
  template void atrous_spatial_pyramid_backward<T>(const PyramidShape&, const PyramidGradients<T>&,                   \
                                                   const NormParameters<acc_t<T>>&, const acc_t<T>*, const acc_t<T>*, \
                                                   bool, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)
DK_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace deeplab_kernels::cpu
