// Checks csrc/core/atrous_depthwise.h against its definitions, by enumeration where sizes are small and at the bounds
// that csrc/torch/tensors.h allows where they are not. Prints what fails; built with UBSan by test_tap_geometry.py.
#include <cmath>
#include <cstdio>
#include <initializer_list>
#include <limits>

#include "../../csrc/core/atrous_depthwise.h"

using namespace deeplab_kernels;

namespace {

int failures = 0;

void expect(bool good, const char* what, int64_t tap, int64_t stride, int64_t rate, int64_t pad, int64_t in,
            int64_t out) {
  if (good) return;
  if (++failures <= 10)
    std::printf("%s: tap %lld stride %lld rate %lld pad %lld in %lld out %lld\n", what, (long long)tap,
                (long long)stride, (long long)rate, (long long)pad, (long long)in, (long long)out);
}

void enumerate() {
  for (int64_t in = 1; in <= 7; ++in)
    for (int64_t out = 1; out <= 7; ++out)
      for (int64_t stride = 1; stride <= 4; ++stride)
        for (int64_t rate : {1, 2, 3, 9})
          for (int64_t pad = 0; pad <= 12; pad += pad < 4 ? 1 : 4)
            for (int64_t tap = 0; tap < 4; ++tap) {
              const IndexRange range = tap_outputs(tap, stride, rate, pad, in, out);
              for (int64_t i = 0; i < out; ++i) {
                const int64_t input = tap_input(i, tap, stride, rate, pad);
                const bool inside = input >= 0 && input < in;
                expect(inside == (i >= range.begin && i < range.end), "tap_outputs", tap, stride, rate, pad, in, out);
                if (inside)
                  expect(tap_output(input, tap, stride, rate, pad, out) == i, "tap_output", tap, stride, rate, pad, in,
                         out);
              }
              for (int64_t input = 0; input < in; ++input) {
                const int64_t i = tap_output(input, tap, stride, rate, pad, out);
                const bool good = i == -1 || (i >= 0 && i < out && tap_input(i, tap, stride, rate, pad) == input);
                expect(good, "tap_output's range", tap, stride, rate, pad, in, out);
              }
            }
}

void bounds() {
  const int64_t largest = (int64_t{1} << 31) - 1, side = int64_t{1} << 40;
  for (int64_t stride : {int64_t{1}, int64_t{2}, largest})
    for (int64_t rate : {int64_t{1}, largest})
      for (int64_t pad : {int64_t{0}, largest})
        for (int64_t tap : {int64_t{0}, int64_t{1}, largest - 1})
          for (int64_t in : {int64_t{1}, side}) {
            const int64_t available = in + 2 * pad - (tap * rate + 1);
            if (available < 0) continue;
            const int64_t out = available / stride + 1;
            const IndexRange range = tap_outputs(tap, stride, rate, pad, in, out);
            for (int64_t i : {range.begin - 1, range.begin, range.end - 1, range.end}) {
              if (i < 0 || i >= out) continue;
              const int64_t input = tap_input(i, tap, stride, rate, pad);
              const bool inside = input >= 0 && input < in;
              expect(inside == (i >= range.begin && i < range.end), "bounds", tap, stride, rate, pad, in, out);
              if (!inside) continue;
              const bool good = tap_output(input, tap, stride, rate, pad, out) == i;
              expect(good, "bounds of tap_output", tap, stride, rate, pad, in, out);
            }
          }
  DepthwiseShape shape{};
  shape.channels = int64_t{1} << 20, shape.multiplier = 1 << 13, shape.kernel_h = 1 << 17, shape.kernel_w = 1 << 16;
  expect(shape.out_channels() == int64_t{1} << 33, "out_channels", 0, 0, 0, 0, 0, 0);
  expect(shape.taps() == int64_t{1} << 33, "taps", 0, 0, 0, 0, 0, 0);
}

template <typename T>
void activations() {
  const T nan = std::numeric_limits<T>::quiet_NaN(), inf = std::numeric_limits<T>::infinity();
  struct Row {
    T z, relu, relu6, slope, slope6;
  };
  const Row rows[] = {{-1, 0, 0, 0, 0},  {0, 0, 0, 0, 0}, {T(0.5), T(0.5), T(0.5), 1, 1},
                      {6, 6, 6, 1, 0},   {7, 7, 6, 1, 0}, {inf, inf, 6, 1, 0},
                      {-inf, 0, 0, 0, 0}};
  for (const Row& row : rows) {
    expect(activate(row.z, Activation::kNone) == row.z, "none", 0, 0, 0, 0, 0, 0);
    expect(activate(row.z, Activation::kRelu) == row.relu, "relu", 0, 0, 0, 0, 0, 0);
    expect(activate(row.z, Activation::kRelu6) == row.relu6, "relu6", 0, 0, 0, 0, 0, 0);
    expect(activation_slope(row.z, Activation::kNone) == 1, "slope of none", 0, 0, 0, 0, 0, 0);
    expect(activation_slope(row.z, Activation::kRelu) == row.slope, "slope of relu", 0, 0, 0, 0, 0, 0);
    expect(activation_slope(row.z, Activation::kRelu6) == row.slope6, "slope of relu6", 0, 0, 0, 0, 0, 0);
  }
  for (Activation a : {Activation::kNone, Activation::kRelu, Activation::kRelu6})
    expect(std::isnan(activate(nan, a)), "NaN", 0, 0, 0, 0, 0, 0);
}

}  // namespace

int main() {
  enumerate();
  bounds();
  activations<float>();
  activations<double>();
  return failures != 0;
}
