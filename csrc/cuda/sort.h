// Stable sort of 32-bit keys with 32-bit values: CUB's radix sort on a GPU, std::stable_sort in the emulator. The one
// place besides launch.h that starts kernels, CUB's own.
#pragma once

#include "context.h"

namespace deeplab_kernels::cuda {

// Sorts `count` pairs by the lowest `bits` bits of the keys; inputs are left as they are.
void sort_pairs(const Context& context, const uint32_t* keys, const uint32_t* values, uint32_t* sorted_keys,
                uint32_t* sorted_values, int64_t count, int bits);

}  // namespace deeplab_kernels::cuda
