#include "launch.h"
#include "sort.h"

#if defined(DEEPLAB_KERNELS_EMULATOR)
#include <algorithm>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace deeplab_kernels::cuda {

#if defined(DEEPLAB_KERNELS_EMULATOR)

void sort_pairs(const Context&, const uint32_t* keys, const uint32_t* values, uint32_t* sorted_keys,
                uint32_t* sorted_values, int64_t count, int) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return keys[a] < keys[b]; });
  for (int64_t i = 0; i < count; ++i) sorted_keys[i] = keys[order[i]], sorted_values[i] = values[order[i]];
}

#else

void sort_pairs(const Context& context, const uint32_t* keys, const uint32_t* values, uint32_t* sorted_keys,
                uint32_t* sorted_values, int64_t count, int bits) {
  size_t bytes = 0;
  void* scratch = nullptr;
  // The first call only says how much memory the second one needs.
  for (int call = 0; call < 2; ++call) {
    const cudaError_t error =
        cub::DeviceRadixSort::SortPairs(scratch, bytes, keys, sorted_keys, values, sorted_values, count, 0, bits,
                                        static_cast<cudaStream_t>(context.stream));
    if (error != cudaSuccess)
      throw std::runtime_error(std::string("deeplab_kernels: sort_pairs: ") + cudaGetErrorString(error));
    if (call == 0) scratch = context.scratch(int64_t(bytes) + 1);
  }
}

#endif

}  // namespace deeplab_kernels::cuda
