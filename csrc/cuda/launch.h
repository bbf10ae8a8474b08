// What every CUDA source includes first: the language (CUDA's, or the emulator's on a CPU), the launch, and dynamic
// shared memory. No kernel is launched anywhere else.
#pragma once

#if defined(DEEPLAB_KERNELS_EMULATOR)
#include "../emulator/emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#endif

#include <cstdint>

namespace deeplab_kernels::cuda {

using Stream = void*;  // a cudaStream_t

constexpr int64_t kMaxSharedBytes = 48 << 10;  // what a block gets without asking the driver for more

// Runs kernel(args...) on every thread of the grid; an empty grid does nothing. Asynchronous on CUDA.
template <typename... Parameters, typename... Args>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, dim3 block, int64_t shared_bytes,
            Stream stream, Args... args) {
  if (blocks == 0) return;
#if defined(DEEPLAB_KERNELS_EMULATOR)
  emulator::run_grid(dim3(static_cast<unsigned>(blocks)), block, shared_bytes, [&] { kernel(args...); });
#else
  if (blocks > 0x7fffffff)
    throw std::runtime_error(std::string("deeplab_kernels: ") + name + ": the tensor is too large");
  // clang-format off
  kernel<<<static_cast<unsigned>(blocks), block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  // clang-format on
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("deeplab_kernels: ") + name + ": " + cudaGetErrorString(error));
#endif
}

// The block's dynamic shared memory, 16-byte aligned.
template <typename T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(DEEPLAB_KERNELS_EMULATOR)
  return reinterpret_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ uint4 deeplab_kernels_shared[];
  return reinterpret_cast<T*>(deeplab_kernels_shared);
#endif
}

}  // namespace deeplab_kernels::cuda
