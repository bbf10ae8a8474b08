// Runs the CUDA sources on the CPU: reads calls from a file, carries each out with csrc/emulator, writes the results.
//
//   driver calls.bin results.bin forward|reverse|random seed dropped_barrier
//
// A call is a Call, then its input tensors (see driver.h). The barriers that ran are printed at the end.
#include "driver.h"

#include "../../csrc/cuda/atrous_depthwise.h"

using namespace deeplab_kernels;

namespace {

enum Operator : int64_t { kConv, kConvBackward, kInference, kTraining, kBackward };

struct Call {
  int64_t op, dtype, misalign;
  int64_t batch, channels, multiplier, in_h, in_w, out_h, out_w, kernel_h, kernel_w, stride_h, stride_w, pad_top,
      pad_left, rate_h, rate_w, channels_last;
  int64_t activation, batch_statistics, want_first, want_second;  // which of two optional outputs are wanted
  double eps;
};

void run(const Call& call, std::FILE* in, std::FILE* out) {
  const DepthwiseShape s{call.batch,    call.channels, call.multiplier, call.in_h,
                         call.in_w,     call.out_h,    call.out_w,      call.kernel_h,
                         call.kernel_w, call.stride_h, call.stride_w,   call.pad_top,
                         call.pad_left, call.rate_h,   call.rate_w,     call.channels_last != 0};
  const auto dtype = static_cast<cuda::Dtype>(call.dtype);
  const int64_t size = dtype == cuda::Dtype::kFloat64 ? 8 : dtype == cuda::Dtype::kFloat32 ? 4 : 2;
  const int64_t acc = dtype == cuda::Dtype::kFloat64 ? 8 : 4;
  const int64_t in_bytes = s.batch * s.channels * s.in_h * s.in_w * size;
  const int64_t out_bytes = s.batch * s.out_channels() * s.out_h * s.out_w * size;
  const cuda::Context context{nullptr, allocate_scratch, nullptr};
  auto input = [&](int64_t misalign) { return read_buffer(in, misalign); };
  auto output = [&](int64_t bytes, bool wanted = true) {
    Buffer buffer;
    if (wanted) buffer.allocate(bytes, call.misalign * size);
    return buffer;
  };
  const int64_t off = call.misalign * size;
  const Buffer x = input(off), weight = input(off);
  std::vector<Buffer> results;
  if (call.op == kConv) {
    results.push_back(output(out_bytes));
    cuda::atrous_depthwise_conv2d(context, dtype, s, x.data, weight.data, results[0].data);
  } else if (call.op == kConvBackward) {
    const Buffer grad = input(off);
    results.push_back(output(in_bytes, call.want_first));
    results.push_back(output(weight.bytes, call.want_second));
    cuda::atrous_depthwise_conv2d_backward(context, dtype, s, grad.data, x.data, weight.data, results[0].data,
                                           results[1].data);
  } else {
    const Buffer gamma = input(0), beta = input(0);
    cuda::NormParameters norm{gamma.data, beta.data, nullptr,
                              nullptr,    call.eps,  static_cast<Activation>(call.activation)};
    if (call.op == kTraining) {
      results.push_back(output(out_bytes));
      results.push_back(output(out_bytes, call.want_first));
      for (int k = 0; k < 2; ++k) results.emplace_back().allocate(s.out_channels() * acc, 0);
      cuda::atrous_depthwise_bn_act_training(context, dtype, s, x.data, weight.data, norm, results[0].data,
                                             results[1].data, results[2].data, results[3].data);
    } else {
      const Buffer mean = input(0), var = input(0);
      norm.mean = mean.data, norm.var = var.data;
      if (call.op == kInference) {
        results.push_back(output(out_bytes));
        cuda::atrous_depthwise_bn_act_inference(context, dtype, s, x.data, weight.data, norm, results[0].data);
      } else {
        const Buffer grad = input(off), y = input(off);
        results.push_back(output(in_bytes, call.want_first));
        results.push_back(output(weight.bytes, call.want_second));
        for (int k = 0; k < 2; ++k) results.emplace_back().allocate(s.out_channels() * acc, 0);
        cuda::atrous_depthwise_bn_act_backward(context, dtype, s, grad.data, x.data, weight.data, y.data, norm,
                                               call.batch_statistics != 0, results[0].data, results[1].data,
                                               results[2].data, results[3].data);
      }
    }
  }
  for (const Buffer& result : results) write_buffer(out, result);
  scratch_buffers.clear();
}

}  // namespace

int main(int argc, char** argv) { return run_calls<Call>(argc, argv, run); }
