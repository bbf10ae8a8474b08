// Torch's own pool, as the CPU kernels ask for threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/parallel.h"

namespace deeplab_kernels {

inline const cpu::Parallel& torch_threads() {
  static const cpu::Parallel pool(
      [](int64_t count, int64_t grain, cpu::Parallel::Body body, void* context) {
        torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
      },
      [] { return int64_t(torch::stable::get_num_threads()); });
  return pool;
}

}  // namespace deeplab_kernels
