// Pads the images and chooses the instruction set; the kernels are in kernels.cpp.
#include "local_gaussian_filter.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "../finite.h"
#include "../gaussian_filter/tensors.h"
#include "../workspace.h"
#include "isa.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, typename F>
void with_filter(F&& f) {
  with_kernels<portable::LocalGaussianFilter<T>, avx2::LocalGaussianFilter<T>, avx512::LocalGaussianFilter<T>>(f);
}

template <typename T>
void run(WindowShape shape, const FilterTensors<T>& tensors, const Parallel& parallel) {
  const int64_t c = shape.channels, d = shape.dimensions, pixels = shape.height * shape.width;
  if (shape.batch == 0 || pixels == 0) return;
  shape.radius_v = clamped_radius(shape.radius_v, shape.height);
  shape.radius_h = clamped_radius(shape.radius_h, shape.width);
  with_filter<T>([&](auto kernels) {
    const int64_t tile = kernels.tile_columns();
    const int64_t margin = shape.radius_h;
    const int64_t pitch =
        (shape.width + tile - 1) / tile * tile + margin;  // a row's right margin is the next one's left
    const int64_t plane = margin + shape.height * pitch;
    const int64_t planes = d + (tensors.rows ? c : 0) + (tensors.grad_features ? 2 * c : 0);
    const Workspace memory(size_t(shape.batch * planes * plane) * sizeof(T));
    std::vector<PaddedImage<T>> images(size_t(shape.batch));
    std::vector<const T*> sources;  // of every plane in memory
    // Takes `count` planes after those of `sources`, to be filled from `source`; returns where pixel (0, 0) of the
    // first is.
    auto take = [&](const T* source, int64_t count) {
      const T* first = memory.template as<T>() + int64_t(sources.size()) * plane + margin;
      for (int64_t k = 0; k < count; ++k) sources.push_back(source + k * pixels);
      return first;
    };
    for (int64_t b = 0; b < shape.batch; ++b) {
      PaddedImage<T>& image = images[size_t(b)];
      image = {};
      image.features = take(tensors.features + b * d * pixels, d);
      if (tensors.rows) {
        image.rows = take(tensors.rows + b * c * pixels, c);
        image.out = tensors.out + b * c * pixels;
      }
      if (tensors.grad_features) {
        image.values = take(tensors.values + b * c * pixels, c);
        image.grad = take(tensors.grad + b * c * pixels, c);
        image.grad_features = tensors.grad_features + b * d * pixels;
      }
    }
    std::vector<char> finite_plane(sources.size());  // of features, which come first in each image
    parallel(int64_t(sources.size()), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const T* source = sources[size_t(k)];
        if (k % planes < d) finite_plane[size_t(k)] = all_finite<T>(source, pixels);
        T* p = std::fill_n(memory.template as<T>() + k * plane, margin, T(0));
        for (int64_t y = 0; y < shape.height; ++y, source += shape.width, p += pitch)
          std::fill(std::copy_n(source, shape.width, p), p + pitch, T(0));
      }
    });
    std::vector<PaddedImage<T>> finite;
    for (int64_t b = 0; b < shape.batch; ++b) {
      constexpr T nan = std::numeric_limits<T>::quiet_NaN();
      const PaddedImage<T>& image = images[size_t(b)];
      const char* features_finite = finite_plane.data() + b * planes;
      if (std::all_of(features_finite, features_finite + d, [](char is) { return is; })) {
        finite.push_back(image);
        continue;
      }
      if (image.out) std::fill_n(image.out, c * pixels, nan);
      if (image.grad_features) std::fill_n(image.grad_features, d * pixels, nan);
    }
    kernels.run({finite.data(), int64_t(finite.size()), shape, pitch, plane}, parallel);
  });
}

}  // namespace

template <typename T>
void local_gaussian_filter(const WindowShape& shape, const T* values, const T* features, T* out,
                           const Parallel& parallel) {
  if (shape.channels == 0) return;
  run(shape, FilterTensors<T>::forward(values, features, out), parallel);
}

template <typename T>
void local_gaussian_filter_backward(const WindowShape& shape, const T* grad_out, const T* values, const T* features,
                                    T* grad_values, T* grad_features, const Parallel& parallel) {
  if (!grad_values && !grad_features) return;
  using Tensors = FilterTensors<T>;
  run(shape, Tensors::backward(shape.channels, grad_out, values, features, grad_values, grad_features), parallel);
}

#define DK_INSTANTIATE(T)                                                                                   \
  template void local_gaussian_filter<T>(const WindowShape&, const T*, const T*, T*, const Parallel&);      \
  template void local_gaussian_filter_backward<T>(const WindowShape&, const T*, const T*, const T*, T*, T*, \
                                                  const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
