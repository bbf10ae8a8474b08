// The 1 x 1 convolution's products and statistics with memory of the exact size: every read beyond an operand shows
// under AddressSanitizer. Compared with sums in double.
#include "../../csrc/cpu/pointwise/pointwise.h"

#include <cmath>
#include <cstdio>
#include <vector>

using namespace deeplab_kernels::cpu;

namespace {

const Parallel kOneThread([](int64_t count, int64_t, Parallel::Body body, void* context) { body(context, 0, count); },
                          [] { return int64_t(1); });

template <typename T>
std::vector<T> values(int64_t count, int64_t seed) {
  std::vector<T> v(static_cast<size_t>(count));
  for (size_t i = 0; i < v.size(); ++i) v[i] = T(int64_t(i * 7919 + size_t(seed) * 104729) % 201 - 100) / T(100);
  return v;
}

template <typename T>
double largest_error(const PointwiseShape& s) {
  const int64_t N = s.batch, C = s.channels, O = s.out_channels, P = s.pixels;
  const auto at = [&](int64_t n, int64_t c, int64_t p, int64_t channels) {
    return size_t(s.channels_last ? (n * P + p) * channels + c : (n * channels + c) * P + p);
  };
  const auto x = values<T>(N * C * P, 1), grad = values<T>(N * O * P, 2), weight = values<T>(O * C, 3);
  std::vector<T> out(grad.size()), grad_x(x.size()), grad_weight(weight.size()), again(grad.size());
  std::vector<T> mean(static_cast<size_t>(O)), var(mean.size());
  pointwise_conv2d<T>(s, x.data(), weight.data(), out.data(), nullptr, nullptr, kOneThread);
  if (s.channels_last) {
    pointwise_conv2d<T>(s, x.data(), weight.data(), again.data(), mean.data(), var.data(), kOneThread);
    if (again != out) return INFINITY;
  }
  pointwise_grad_x<T>(s, grad.data(), weight.data(), grad_x.data(), kOneThread);
  pointwise_grad_weight<T>(s, grad.data(), x.data(), grad_weight.data(), kOneThread);
  std::vector<double> weight_sums(weight.size());
  double error = 0;
  const auto compare = [&](double expected, T found) {
    error = std::fmax(error, std::fabs(expected - double(found)) / (1 + std::fabs(expected)));
  };
  for (int64_t n = 0; n < N; ++n)
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t o = 0; o < O; ++o) {
        double sum = 0;
        for (int64_t c = 0; c < C; ++c) {
          sum += double(weight[size_t(o * C + c)]) * double(x[at(n, c, p, C)]);
          weight_sums[size_t(o * C + c)] += double(grad[at(n, o, p, O)]) * double(x[at(n, c, p, C)]);
        }
        compare(sum, out[at(n, o, p, O)]);
      }
      for (int64_t c = 0; c < C; ++c) {
        double sum = 0;
        for (int64_t o = 0; o < O; ++o) sum += double(weight[size_t(o * C + c)]) * double(grad[at(n, o, p, O)]);
        compare(sum, grad_x[at(n, c, p, C)]);
      }
    }
  for (size_t i = 0; i < weight_sums.size(); ++i) compare(weight_sums[i], grad_weight[i]);
  for (int64_t o = 0; o < O && s.channels_last; ++o) {
    double sum = 0, squares = 0;
    const auto over_batch = [&](const auto& f) {
      for (int64_t n = 0; n < N; ++n)
        for (int64_t p = 0; p < P; ++p) f(double(out[at(n, o, p, O)]));
    };
    over_batch([&](double z) { sum += z; });
    const double centre = sum / double(N * P);
    over_batch([&](double z) { squares += (z - centre) * (z - centre); });
    compare(centre, mean[size_t(o)]);
    compare(squares / double(N * P), var[size_t(o)]);
  }
  return error;
}

}  // namespace

int main() {
  double worst_float = 0, worst_double = 0;
  for (const bool channels_last : {false, true})
    for (const int64_t channels : {1, 5, 17, 37, 259})
      for (const int64_t out_channels : {1, 6, 31, 100})
        for (const int64_t pixels : {1, 7, 40, 300}) {
          const PointwiseShape shape{2, channels, out_channels, pixels, channels_last};
          worst_float = std::fmax(worst_float, largest_error<float>(shape));
          worst_double = std::fmax(worst_double, largest_error<double>(shape));
        }
  std::printf("largest error: float %.1e, double %.1e\n", worst_float, worst_double);
  return worst_float < 1e-4 && worst_double < 1e-13 ? 0 : 1;
}
