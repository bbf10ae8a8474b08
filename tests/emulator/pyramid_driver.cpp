// Runs the CUDA sources of the atrous spatial pyramid on the CPU: see driver.h.
//
//   pyramid_driver calls.bin results.bin forward|reverse|random seed dropped_barrier
#include "../../csrc/cuda/atrous_spatial_pyramid.h"
#include "driver.h"

using namespace deeplab_kernels;

namespace {

enum Operator : int64_t { kForward, kTraining, kBackward };
constexpr int kMostBranches = 10;

struct Call {
  int64_t op, dtype, misalign;
  int64_t batch, channels, height, width, kernel_h, kernel_w, channels_last, branches;
  int64_t rates[2 * kMostBranches];
  int64_t activation, batch_statistics, pool, keep_conv, want_first, want_second;  // which optional outputs are wanted
  double eps;
};

void run(const Call& call, std::FILE* in, std::FILE* out) {
  const cuda::PyramidShape s{call.batch,
                             call.channels,
                             call.height,
                             call.width,
                             call.kernel_h,
                             call.kernel_w,
                             call.channels_last != 0,
                             {call.rates, call.rates + 2 * call.branches}};
  const auto dtype = static_cast<cuda::Dtype>(call.dtype);
  const int64_t size = dtype == cuda::Dtype::kFloat64 ? 8 : dtype == cuda::Dtype::kFloat32 ? 4 : 2;
  const int64_t vectors = s.branches() * s.channels * (dtype == cuda::Dtype::kFloat64 ? 8 : 4);
  const int64_t images = s.count() * size, means = s.batch * s.channels * size, off = call.misalign * size;
  const cuda::Context context{nullptr, allocate_scratch, nullptr};
  std::vector<Buffer> results;
  results.reserve(size_t(4 + 2 * call.branches));
  auto output = [&](int64_t bytes, bool wanted, int64_t misalign) {
    results.emplace_back();
    if (wanted) results.back().allocate(bytes, misalign);
    return static_cast<void*>(results.back().data);
  };
  auto vector = [&](bool wanted = true) { return output(vectors, wanted, 0); };
  auto outputs = [&](bool wanted = true) {
    std::vector<void*> pointers;
    for (int64_t r = 0; r < call.branches; ++r) pointers.push_back(output(images, wanted, off));
    return pointers;
  };
  const Buffer x = read_buffer(in, off), weight = read_buffer(in, off);
  const Buffer gamma = read_buffer(in, 0), beta = read_buffer(in, 0), mean = read_buffer(in, 0),
               var = read_buffer(in, 0);
  const cuda::NormParameters norm{gamma.data, beta.data, mean.data,
                                  var.data,   call.eps,  static_cast<Activation>(call.activation)};
  if (call.op == kForward) {
    const std::vector<void*> out_of = outputs();
    cuda::atrous_spatial_pyramid(context, dtype, s, x.data, weight.data, norm, out_of.data(),
                                 output(means, call.pool != 0, off));
  } else if (call.op == kTraining) {
    const std::vector<void*> out_of = outputs(), conv = outputs(call.keep_conv != 0);
    void *mean_out = vector(), *var_out = vector();
    cuda::atrous_spatial_pyramid_training(context, dtype, s, x.data, weight.data, norm, out_of.data(),
                                          call.keep_conv ? conv.data() : nullptr, mean_out, var_out,
                                          output(means, call.pool != 0, off));
  } else {
    const Buffer grad_pooled = read_buffer(in, off);
    std::vector<Buffer> kept;
    std::vector<const void*> grads, conv;
    for (int64_t k = 0; k < 2 * call.branches; ++k) {
      kept.push_back(read_buffer(in, off));
      (k < call.branches ? grads : conv).push_back(kept.back().data);
    }
    void *grad_x = output(images, call.want_first, off), *grad_weight = output(weight.bytes, call.want_second, off);
    void *grad_gamma = vector(mean.data), *grad_beta = vector(mean.data);
    cuda::atrous_spatial_pyramid_backward(context, dtype, s, grads.data(), grad_pooled.data, x.data, weight.data,
                                          call.keep_conv ? conv.data() : nullptr, norm, call.batch_statistics != 0,
                                          grad_x, grad_weight, grad_gamma, grad_beta);
  }
  for (const Buffer& result : results) write_buffer(out, result);
  scratch_buffers.clear();
}

}  // namespace

int main(int argc, char** argv) { return run_calls<Call>(argc, argv, run); }
