// Sorts and packs the points and chooses the instruction set; the kernels are in kernels.cpp.
#include "gaussian_filter.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "../finite.h"
#include "../workspace.h"
#include "isa.h"
#include "tensors.h"

namespace deeplab_kernels::cpu {
namespace {

template <typename T, typename F>
void with_filter(F&& f) {
  with_kernels<portable::GaussianFilter<T>, avx2::GaussianFilter<T>, avx512::GaussianFilter<T>>(f);
}

// A run of one image's points in their order so far.
struct Run {
  int64_t image, begin, end;
  int64_t size() const { return end - begin; }
};

// Sorts points by halving along the longest side of their bounding box, again and again, into blocks of kBlockPoints
// and, in these, tiles of kLeafPoints: boxes then are small, and as cubic as the points allow.
template <typename T>
class SpatialOrder {
 public:
  // features (B, d, N), order (B, N); only the images that `usable` names.
  SpatialOrder(const PointsShape& shape, const T* features, T cutoff, const std::vector<char>& usable, int64_t* order)
      : shape_(shape), features_(features), cutoff_(cutoff), order_(order) {
    for (int64_t b = 0; b < shape.batch; ++b)
      if (usable[size_t(b)]) runs_.push_back({b, 0, shape.points});
  }

  void sort(const Parallel& parallel) {
    parallel(int64_t(runs_.size()), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const Run run = runs_[size_t(k)];
        std::iota(first(run), first(run) + run.size(), int64_t{0});
      }
    });
    // All long runs are halved side by side; a short one goes to its end at once.
    while (!runs_.empty()) {
      std::vector<Run> halves(2 * runs_.size(), Run{0, 0, 0});
      parallel(int64_t(runs_.size()), [&](int64_t begin, int64_t end) {
        for (int64_t k = begin; k < end; ++k) {
          const Run run = runs_[size_t(k)];
          if (run.size() <= kShort)
            finish(run);
          else
            halve(run, halves[size_t(2 * k)], halves[size_t(2 * k + 1)]);
        }
      });
      std::erase_if(halves, [](const Run& run) { return run.size() <= kLeafPoints; });
      runs_ = std::move(halves);
    }
  }

 private:
  static constexpr int64_t kLeafPoints = 16;
  static constexpr int64_t kShort = 4096;

  int64_t* first(const Run& run) const { return order_ + run.image * shape_.points + run.begin; }

  void finish(const Run& run) const {
    Run low, high;
    if (run.size() <= kLeafPoints || !halve(run, low, high)) return;
    finish(low);
    finish(high);
  }

  // False, with the halves untouched, where there is nothing to gain.
  bool halve(const Run& run, Run& low_half, Run& high_half) const {
    int64_t* const points = first(run);
    const T* const features = features_ + run.image * shape_.dimensions * shape_.points;
    T longest = -1, diagonal = 0;
    const T* along = nullptr;
    for (int64_t e = 0; e < shape_.dimensions; ++e) {
      const T* f = features + e * shape_.points;
      T low = f[points[0]], high = low;
      for (int64_t k = 1; k < run.size(); ++k) {
        low = std::min(low, f[points[k]]);
        high = std::max(high, f[points[k]]);
      }
      const T length = high - low;
      diagonal += length * length;
      if (length > longest) longest = length, along = f;
    }
    if (longest <= 0 || (run.size() == shape_.points && diagonal <= cutoff_)) return false;  // no pair will be skipped
    const int64_t unit = run.size() > kBlockPoints ? kBlockPoints : kLeafPoints;
    const int64_t half = std::max<int64_t>(1, run.size() / (2 * unit)) * unit;
    std::nth_element(points, points + half, points + run.size(),
                     [along](int64_t a, int64_t b) { return along[a] < along[b] || (along[a] == along[b] && a < b); });
    low_half = {run.image, run.begin, run.begin + half};
    high_half = {run.image, run.begin + half, run.end};
    return true;
  }

  PointsShape shape_;
  const T* features_;
  T cutoff_;
  int64_t* order_;
  std::vector<Run> runs_;
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
        usable[size_t(b)] = all_finite<T>(tensors_.features + b * d * n, d * n);
      }
    });
    SpatialOrder<T>(shape_, tensors_.features, cutoff_, usable, order_.data()).sort(parallel);
    parallel(shape_.batch * blocks_, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k)
        if (usable[size_t(k / blocks_)]) pack(k / blocks_, k % blocks_);
    });
    std::vector<SortedImage<T>> images;
    for (int64_t b = 0; b < shape_.batch; ++b)
      if (usable[size_t(b)]) images.push_back(image(b));
    with_filter<T>([&](auto kernels) {
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

  void pack(int64_t b, int64_t block) const {
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    const int64_t count = std::min(kBlockPoints, n - block * kBlockPoints);
    const int64_t* order = order_.data() + b * n + block * kBlockPoints;
    const SortedImage<T> packed = image(b);
    auto writable = [](const T* p) { return const_cast<T*>(p); };
    for (int64_t e = 0; e < d; ++e) {
      const T* source = tensors_.features + (b * d + e) * n;
      T* f = writable(packed.features) + (block * d + e) * kBlockPoints;
      for (int64_t k = 0; k < kBlockPoints; ++k) f[k] = source[order[std::min(k, count - 1)]];
      const auto [low, high] = std::minmax_element(f, f + kBlockPoints);
      writable(packed.low)[e * blocks_ + block] = *low;
      writable(packed.high)[e * blocks_ + block] = *high;
    }
    for (int64_t channel = 0; channel < c; ++channel) {
      const int64_t plane = (b * c + channel) * n, columns = (block * c + channel) * kBlockPoints;
      for (int64_t k = 0; k < kBlockPoints; ++k) {
        const bool exists = k < count;
        if (packed.rows)
          writable(packed.rows)[(block * kBlockPoints + k) * c + channel] =
              exists ? tensors_.rows[plane + order[k]] : T(0);
        if (!packed.grad_features) continue;
        writable(packed.values)[columns + k] = exists ? tensors_.values[plane + order[k]] : T(0);
        writable(packed.grad)[columns + k] = exists ? tensors_.grad[plane + order[k]] : T(0);
      }
    }
  }

  // A NaN or infinity shows in every result that depends on it, also where the kernels skipped it.
  void spread_not_finite(int64_t b, bool features_finite) const {
    constexpr T nan = std::numeric_limits<T>::quiet_NaN();
    const int64_t n = shape_.points, c = shape_.channels, d = shape_.dimensions;
    auto channel = [&](const T* tensor, int64_t k) { return tensor + (b * c + k) * n; };
    bool all = features_finite;
    for (int64_t k = 0; k < c; ++k) {
      if (tensors_.rows && !(features_finite && all_finite<T>(channel(tensors_.rows, k), n)))
        std::fill_n(tensors_.out + (b * c + k) * n, n, nan);
      if (tensors_.grad_features)
        all = all && all_finite<T>(channel(tensors_.values, k), n) && all_finite<T>(channel(tensors_.grad, k), n);
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
  Filter<T>(shape, FilterTensors<T>::forward(values, features, out)).run(parallel);
}

template <typename T>
void gaussian_filter_backward(const PointsShape& shape, const T* grad_out, const T* values, const T* features,
                              T* grad_values, T* grad_features, const Parallel& parallel) {
  if (!grad_values && !grad_features) return;
  using Tensors = FilterTensors<T>;
  Filter<T>(shape, Tensors::backward(shape.channels, grad_out, values, features, grad_values, grad_features))
      .run(parallel);
}

#define DK_INSTANTIATE(T)                                                                        \
  template void gaussian_filter<T>(const PointsShape&, const T*, const T*, T*, const Parallel&); \
  template void gaussian_filter_backward<T>(const PointsShape&, const T*, const T*, const T*, T*, T*, const Parallel&);
DK_INSTANTIATE(float)
DK_INSTANTIATE(double)

}  // namespace deeplab_kernels::cpu
