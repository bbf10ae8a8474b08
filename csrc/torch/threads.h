// Torch's own pool, as the CPU kernels ask for threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

#include "../cpu/parallel.h"

namespace deeplab_kernels {

// Each thread takes the next piece when it is done with one: of cores that others use too, some are a third slower for
// a while, and equal shares would wait for the slowest. Few and large tasks are pieces themselves; of many, a piece has
// several, which share what they read and prepare.
constexpr int64_t kFewTasks = 8, kPieces = 4;  // a thread

inline const cpu::Parallel& torch_threads() {
  static const cpu::Parallel pool(
      [](int64_t count, int64_t grain, cpu::Parallel::Body body, void* context) {
        const int64_t threads = torch::stable::get_num_threads();
        if (threads == 1 || count <= threads) {
          torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          return;
        }
        const int64_t pieces = count <= kFewTasks * threads ? count : kPieces * threads;
        std::atomic<int64_t> next{0};
        torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
          for (int64_t p; (p = next.fetch_add(1, std::memory_order_relaxed)) < pieces;)
            body(context, count * p / pieces, count * (p + 1) / pieces);
        });
      },
      [] { return int64_t(torch::stable::get_num_threads()); });
  return pool;
}

}  // namespace deeplab_kernels
