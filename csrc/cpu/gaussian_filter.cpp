// Sorts and packs the points and chooses the instruction set; the kernels are in gaussian_filter_kernels.h.
#include "gaussian_filter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gaussian_filter_isa.h"
#include "instruction_set.h"
#include "workspace.h"

namespace deeplab_kernels::cpu {
namespace {

// Calls f with the kernels of the instruction set in use.
template <typename T, typename F>
void with_kernels(F&& f) {
#if defined(__x86_64__) && !defined(DEEPLAB_KERNELS_PORTABLE)
  if (chosen_instruction_set() == InstructionSet::kAvx512) return f(avx512::GaussianFilter<T>());
  if (chosen_instruction_set() == InstructionSet::kAvx2) return f(avx2::GaussianFilter<T>());
#endif
  f(portable::GaussianFilter<T>());
}

template <typename T>
bool all_finite(const T* values, int64_t count) {
  return std::all_of(values, values + count, [](T value) { return std::isfinite(value); });
}

// Sorts points by recursive halving along the longest side of their bounding box, into blocks of kBlockPoints and, in
// these, tiles of kLeafPoints: boxes then are small, and as cubic as the points allow.
template <typename T>
class SpatialOrder {
 public:
  SpatialOrder(const T* features, int64_t points, int64_t dimensions, T cutoff, int64_t* order)
      : features_(features), points_(points), dimensions_(dimensions), cutoff_(cutoff), order_(order) {}

  void sort() {
    for (int64_t i = 0; i < points_; ++i) order_[i] = i;
    split(0, points_, true);
  }

 private:
  static constexpr int64_t kLeafPoints = 16;

  void split(int64_t begin, int64_t end, bool whole) {
    while (end - begin > kLeafPoints) {
      T longest = -1, diagonal = 0;
      const T* along = nullptr;
      for (int64_t e = 0; e < dimensions_; ++e) {
        const T* f = features_ + e * points_;
        T low = f[order_[begin]], high = low;
        for (int64_t k = begin + 1; k < end; ++k) {
          const T value = f[order_[k]];
          low = std::min(low, value);
          high = std::max(high, value);
        }
        const T length = high - low;
        diagonal += length * length;
        if (length > longest) longest = length, along = f;
      }
      if (longest <= 0) return;
      if (whole && diagonal <= cutoff_) return;  // no pair will be skipped
      whole = false;
      const int64_t unit = end - begin > kBlockPoints ? kBlockPoints : kLeafPoints;
      const int64_t middle = begin + std::max<int64_t>(1, (end - begin) / (2 * unit)) * unit;
      if (middle >= end) return;
      std::nth_element(order_ + begin, order_ + middle, order_ + end, [along](int64_t a, int64_t b) {
        return along[a] < along[b] || (along[a] == along[b] && a < b);
      });
      split(begin, middle, false);
      begin = middle;
    }
  }

  const T* features_;
  int64_t points_, dimensions_;
  T cutoff_;
  int64_t* order_;
};

// What one call reads and writes, for the whole batch; null where absent.
template <typename T>
struct FilterTensors {
  const T* features;
  const T* rows;  // filtered into out
  T* out;
  const T* values;  // with grad: for grad_features
  const T* grad;
  T* grad_features;
};

template <typename T>
class Filter {
 public:
  Filter(const PointsShape& shape, const FilterTensors<T>& tensors)
      : shape_(shape),
        tensors_(tensors),
        blocks_((shape.points + kBlockPoints - 1) / kBlockPoints),
        padded_(blocks_ * kBlockPoints),
        cutoff_(cutoff_square(T(std::log2(double(std::max<int64_t>(shape.points, 1)))))),
        image_elements_(elements_per_image()),
        memory_(size_t(shape.batch * image_elements_) * sizeof(T)),
        order_(size_t(shape.batch * shape.points)) {}

  void run(const Parallel& parallel) {
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    if (shape_.batch == 0 || n == 0) return;
    std::vector<char> usable(size_t(shape_.batch));
    parallel(shape_.batch, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        usable[size_t(b)] = all_finite(tensors_.features + b * d * n, d * n);
        if (usable[size_t(b)]) pack(b);
      }
    });
    std::vector<SortedImage<T>> images;
    for (int64_t b = 0; b < shape_.batch; ++b)
      if (usable[size_t(b)]) images.push_back(image(b));
    with_kernels<T>([&](auto kernels) {
      const int64_t tiles = (n + kernels.tile_points() - 1) / kernels.tile_points();
      const int64_t pieces = 8 * parallel.threads();  // so many that no thread waits long for the last one
      const int64_t group = std::clamp<int64_t>(int64_t(images.size()) * tiles / pieces, 1, 8);
      kernels.run({images.data(), int64_t(images.size()), c, n, d, blocks_, cutoff_, group}, parallel);
    });
    for (int64_t b = 0; b < shape_.batch; ++b) spread_not_finite(b, usable[size_t(b)]);
  }

 private:
  int64_t elements_per_image() const {
    const int64_t d = shape_.dimensions, c = shape_.channels;
    return d * padded_ + 2 * d * blocks_ + (tensors_.rows ? padded_ * c : 0) +
           (tensors_.grad_features ? 2 * c * padded_ : 0);
  }

  // Where image b's arrays lie.
  SortedImage<T> image(int64_t b) const {
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    const T* next = memory_.template as<T>() + b * image_elements_;
    auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    SortedImage<T> result{};
    result.features = take(d * padded_);
    if (tensors_.grad_features) {
      result.values = take(c * padded_);
      result.grad = take(c * padded_);
      result.grad_features = tensors_.grad_features + b * d * n;
    }
    result.low = take(d * blocks_);
    result.high = take(d * blocks_);
    if (tensors_.rows) {
      result.rows = take(padded_ * c);
      result.out = tensors_.out + b * c * n;
    }
    result.order = order_.data() + b * n;
    return result;
  }

  void pack(int64_t b) {
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    const SortedImage<T> packed = image(b);
    int64_t* order = order_.data() + b * n;
    const T* features = tensors_.features + b * d * n;
    SpatialOrder<T>(features, n, d, cutoff_, order).sort();
    auto writable = [](const T* p) { return const_cast<T*>(p); };
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t e = 0; e < d; ++e) {
        T* f = writable(packed.features) + (block * d + e) * kBlockPoints;
        for (int64_t k = 0; k < kBlockPoints; ++k)
          f[k] = features[e * n + order[std::min(block * kBlockPoints + k, n - 1)]];
        const auto [low, high] = std::minmax_element(f, f + kBlockPoints);
        writable(packed.low)[e * blocks_ + block] = *low;
        writable(packed.high)[e * blocks_ + block] = *high;
      }
    if (packed.rows) {
      T* rows = writable(packed.rows);
      const T* source = tensors_.rows + b * c * n;
      for (int64_t k = 0; k < n; ++k)
        for (int64_t channel = 0; channel < c; ++channel) rows[k * c + channel] = source[channel * n + order[k]];
      std::fill(rows + n * c, rows + padded_ * c, T(0));
    }
    if (packed.grad_features) {
      pack_channels(tensors_.values + b * c * n, order, writable(packed.values));
      pack_channels(tensors_.grad + b * c * n, order, writable(packed.grad));
    }
  }

  void pack_channels(const T* source, const int64_t* order, T* packed) const {
    const int64_t n = shape_.points;
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t channel = 0; channel < shape_.channels; ++channel)
        for (int64_t k = block * kBlockPoints; k < (block + 1) * kBlockPoints; ++k)
          *packed++ = k < n ? source[channel * n + order[k]] : T(0);
  }

  // A NaN or infinity shows in every result that depends on it, also where the kernels skipped it.
  void spread_not_finite(int64_t b, bool features_finite) const {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    auto channel = [&](const T* tensor, int64_t k) { return tensor + (b * c + k) * n; };
    bool all = features_finite;
    for (int64_t k = 0; k < c; ++k) {
      if (tensors_.rows && !(features_finite && all_finite(channel(tensors_.rows, k), n)))
        std::fill_n(tensors_.out + (b * c + k) * n, n, nan);
      if (tensors_.grad_features)
        all = all && all_finite(channel(tensors_.values, k), n) && all_finite(channel(tensors_.grad, k), n);
    }
    if (tensors_.grad_features && !all) std::fill_n(tensors_.grad_features + b * d * n, d * n, nan);
  }

  PointsShape shape_;
  FilterTensors<T> tensors_;
  int64_t blocks_, padded_;
  T cutoff_;
  int64_t image_elements_;
  Workspace memory_;
  std::vector<int64_t> order_;
};

}  // namespace

template <typename T>
void gaussian_filter(const PointsShape& shape, const T* values, const T* features, T* out, const Parallel& parallel) {
  if (shape.channels == 0) return;
  Filter<T>(shape, {features, values, out, nullptr, nullptr, nullptr}).run(parallel);
}

template <typename T>
void gaussian_filter_backward(const PointsShape& shape, const T* grad_out, const T* values, const T* features,
                              T* grad_values, T* grad_features, const Parallel& parallel) {
  if (!grad_values && !grad_features) return;
  const T* rows = grad_values && shape.channels > 0 ? grad_out : nullptr;
  Filter<T>(shape, {features, rows, grad_values, values, grad_out, grad_features}).run(parallel);
}

#define DK_INSTANTIATE(T)                                                                        \
  template void gaussian_filter<T>(const PointsShape&, const T*, const T*, T*, const Parallel&); \
  template void gaussian_filter_backward<T>(const PointsShape&, const T*, const T*, const T*, T*, T*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
