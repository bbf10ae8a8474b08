// Threads of the numpy module, which has no torch to borrow them from.
#pragma once

#include <cstdint>

#include "../cpu/parallel.h"

namespace deeplab_kernels::numpy {

// Runs on the calling thread and up to num_threads() - 1 workers, which are started when first needed and shared by all
// callers: two threads may compute at once. A call from within a body runs on the calling thread alone. After a fork
// the child starts workers of its own.
const cpu::Parallel& parallel();

int64_t num_threads();
void set_num_threads(int64_t threads);  // at least 1

}  // namespace deeplab_kernels::numpy
