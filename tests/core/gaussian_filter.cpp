// The CPU kernels of the Gaussian filters by themselves, without torch: against plain loops in double, with several
// threads, for a run under sanitizers.
#include "../../csrc/cpu/gaussian_filter/gaussian_filter.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/cpu/local_gaussian_filter/local_gaussian_filter.h"

using namespace deeplab_kernels::cpu;

namespace {

constexpr int64_t kThreads = 3;

void run_on_threads(int64_t count, int64_t, Parallel::Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t)
    threads.emplace_back([=] { body(context, count * t / kThreads, count * (t + 1) / kThreads); });
  for (std::thread& thread : threads) thread.join();
}

const Parallel kParallel(run_on_threads, [] { return kThreads; });

template <typename T>
std::vector<T> random(int64_t count, double spread) {
  std::vector<T> result(static_cast<size_t>(count));
  for (T& value : result) value = T(spread * (2.0 * std::rand() / RAND_MAX - 1));
  return result;
}

struct Sums {
  std::vector<double> out, grad_values, grad_features;
};

// All pairs of pixels (height 1: points) inside the window.
template <typename T>
Sums plain(const WindowShape& s, const std::vector<T>& grad, const std::vector<T>& values,
           const std::vector<T>& features) {
  const int64_t n = s.height * s.width, c = s.channels, d = s.dimensions;
  Sums sums{std::vector<double>(values.size()), std::vector<double>(values.size()),
            std::vector<double>(features.size())};
  for (int64_t b = 0; b < s.batch; ++b)
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < n; ++j) {
        if (std::abs(i / s.width - j / s.width) > s.radius_v || std::abs(i % s.width - j % s.width) > s.radius_h)
          continue;
        auto at = [n](int64_t plane, int64_t point) { return size_t(plane * n + point); };
        double square = 0, pull = 0;
        for (int64_t e = b * d; e < (b + 1) * d; ++e)
          square += std::pow(double(features[at(e, i)]) - double(features[at(e, j)]), 2);
        const double kernel = std::exp(-square / 2);
        for (int64_t k = b * c; k < (b + 1) * c; ++k) {
          sums.out[at(k, i)] += kernel * double(values[at(k, j)]);
          sums.grad_values[at(k, i)] += kernel * double(grad[at(k, j)]);
          pull += kernel * (double(grad[at(k, i)]) * double(values[at(k, j)]) +
                            double(values[at(k, i)]) * double(grad[at(k, j)]));
        }
        for (int64_t e = b * d; e < (b + 1) * d; ++e)
          sums.grad_features[at(e, i)] += pull * (double(features[at(e, j)]) - double(features[at(e, i)]));
      }
  return sums;
}

template <typename T>
void compare(const char* what, const std::vector<T>& ours, const std::vector<double>& exact) {
  double error = 0, scale = 1e-3;
  for (size_t k = 0; k < ours.size(); ++k) {
    error = std::fmax(error, std::isfinite(ours[k]) ? std::fabs(double(ours[k]) - exact[k]) : HUGE_VAL);
    scale = std::fmax(scale, std::fabs(exact[k]));
  }
  if (error <= (sizeof(T) == 4 ? 5e-6 : 1e-13) * scale) return;
  std::printf("%s: error %g of %g\n", what, error, scale);
  std::exit(1);
}

template <typename T>
void check(const WindowShape& s, bool exact, double spread) {
  const int64_t points = s.batch * s.height * s.width;
  const auto values = random<T>(points * s.channels, 1), grad = random<T>(points * s.channels, 1);
  const auto features = random<T>(points * s.dimensions, spread);
  std::vector<T> out(values.size()), grad_values(values.size()), grad_features(features.size());
  if (exact) {
    const PointsShape shape{s.batch, s.channels, s.height * s.width, s.dimensions};
    gaussian_filter(shape, values.data(), features.data(), out.data(), kParallel);
    gaussian_filter_backward(shape, grad.data(), values.data(), features.data(), grad_values.data(),
                             grad_features.data(), kParallel);
  } else {
    local_gaussian_filter(s, values.data(), features.data(), out.data(), kParallel);
    local_gaussian_filter_backward(s, grad.data(), values.data(), features.data(), grad_values.data(),
                                   grad_features.data(), kParallel);
  }
  WindowShape window = s;
  if (exact) window.radius_v = window.radius_h = s.height * s.width;
  const Sums expected = plain(window, grad, values, features);
  compare("out", out, expected.out);
  compare("gradient of values", grad_values, expected.grad_values);
  compare("gradient of features", grad_features, expected.grad_features);
}

template <typename T>
void check_all() {
  for (int64_t points : {1, 5, 33, 64, 127, 300})
    for (int64_t channels : {0, 1, 2, 3, 7, 21})
      check<T>({2, channels, 1, points, 1 + points % 6, 0, 0}, true, points % 2 ? 1.0 : 30.0);
  for (int64_t width : {1, 5, 33})
    for (int64_t channels : {0, 1, 4, 13})
      for (int64_t radius : {0, 1, 6}) check<T>({2, channels, 7, width, 1 + width % 6, radius, 3}, false, 1.0);
  check<T>({1, 2, 13, 3, 16, 1 << 20, int64_t(1) << 40}, false, 0.5);
}

}  // namespace

int main() {
  check_all<float>();
  check_all<double>();
}
