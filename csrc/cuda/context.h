// What every call of csrc/cuda takes: the storage type, the stream, and memory to work in.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cuda {

enum class Dtype : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

struct Context {
  void* stream;                                   // cudaStream_t
  void* (*allocate)(void* owner, int64_t bytes);  // device memory that lives until the call's kernels have run
  void* owner;

  void* scratch(int64_t bytes) const { return allocate(owner, bytes); }
  // At least one element, so that an empty tensor needs no special case.
  template <typename T>
  T* scratch_array(int64_t count) const {
    return static_cast<T*>(allocate(owner, (count > 0 ? count : 1) * int64_t(sizeof(T))));
  }
};

}  // namespace deeplab_kernels::cuda
