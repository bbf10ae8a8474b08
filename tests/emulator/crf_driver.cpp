// Runs the CUDA sources of the permutohedral filter and the dense CRF on the CPU: see driver.h.
//
//   crf_driver calls.bin results.bin forward|reverse|random seed dropped_barrier
#include "../../csrc/cuda/dense_crf.h"
#include "driver.h"

using namespace deeplab_kernels;

namespace {

enum Operator : int64_t { kFilter, kFilterBackward, kMeanField, kMeanFieldBackward };
constexpr int kMostKernels = 6;

struct Call {
  int64_t op, dtype, batch, channels, points, iterations, transpose, want_first, want_second, kernel_count;
  int64_t dimension[kMostKernels], normalization[kMostKernels];
};

void run(const Call& call, std::FILE* in, std::FILE* out) {
  const auto dtype = static_cast<cuda::Dtype>(call.dtype);
  const int64_t size = dtype == cuda::Dtype::kFloat64 ? 8 : 4, rows = call.batch * call.points * size;
  const cuda::Context context{nullptr, allocate_scratch, nullptr};
  std::vector<Buffer> results;
  auto output = [&](int64_t bytes, bool wanted = true) {
    results.emplace_back();
    if (wanted) results.back().allocate(bytes, 0);
    return results.back().data;
  };
  auto normalization = [&](int m) { return static_cast<cuda::Normalization>(call.normalization[m]); };
  const Buffer values = read_buffer(in, 0), grad = read_buffer(in, 0);
  if (call.op == kFilter || call.op == kFilterBackward) {
    const Buffer features = read_buffer(in, 0);
    const cuda::LatticeShape shape{call.batch, int(call.dimension[0]), call.points};
    Buffer lattice;
    lattice.allocate(cuda::lattice_bytes(dtype, shape), 0);
    cuda::lattice_build(context, dtype, shape, features.data, lattice.data);
    scratch_buffers.clear();
    if (call.op == kFilter)
      cuda::permutohedral_filter(context, dtype, shape, lattice.data, call.channels, values.data, normalization(0),
                                 call.transpose, output(call.channels * rows));
    else {
      void* grad_values = output(call.channels * rows, call.want_first);
      void* grad_features = output(features.bytes, call.want_second);
      cuda::permutohedral_filter_backward(context, dtype, shape, lattice.data, call.channels, grad.data, values.data,
                                          features.data, normalization(0), call.transpose, grad_values, grad_features);
    }
  } else {
    const Buffer mask = read_buffer(in, 0), saved = read_buffer(in, 0);
    std::vector<Buffer> inputs;
    std::vector<cuda::PairwiseKernel> kernels;
    const bool backward = call.op == kMeanFieldBackward;
    void* first = output(values.bytes);
    for (int m = 0; m < call.kernel_count; ++m) {
      inputs.push_back(read_buffer(in, 0));
      inputs.push_back(read_buffer(in, 0));
      const Buffer &features = inputs[2 * m], &matrix = inputs[2 * m + 1];
      kernels.push_back(
          {int(call.dimension[m]), features.data, nullptr, matrix.data, normalization(m), nullptr, nullptr});
      if (backward) {
        kernels.back().grad_features = output(features.bytes, call.want_first);
        kernels.back().grad_compatibility = output(matrix.bytes, call.want_second);
      }
    }
    const cuda::MeanFieldProblem problem{call.batch,  call.channels, call.points,    int(call.iterations),
                                         values.data, mask.data,     kernels.data(), int(call.kernel_count)};
    if (backward)
      cuda::dense_crf_mean_field_backward(context, dtype, problem, grad.data, saved.data, first);
    else
      cuda::dense_crf_mean_field(context, dtype, problem, first, output(problem.saved_size() * size, call.want_first));
  }
  for (const Buffer& result : results) write_buffer(out, result);
  scratch_buffers.clear();
}

}  // namespace

int main(int argc, char** argv) { return run_calls<Call>(argc, argv, run); }
