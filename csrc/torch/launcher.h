// Where the CUDA bindings run: the device, the current stream and scratch memory of one call.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cuda/context.h"
#include "tensors.h"

namespace deeplab_kernels {

// The device and stream of one call, and its scratch memory: freed when the call returns, which torch's allocator
// allows because the memory is handed out again on the same stream only.
class Launcher {
 public:
  explicit Launcher(const Tensor& x) : x_(x), guard_(x.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream_));
  }
  cuda::Context context() { return {stream_, &Launcher::allocate, this}; }

 private:
  static void* allocate(void* self, int64_t bytes) {
    Launcher& launcher = *static_cast<Launcher*>(self);
    launcher.scratch_.push_back(empty_vector(bytes, launcher.x_, ScalarType::Byte));
    return launcher.scratch_.back().mutable_data_ptr();
  }

  Tensor x_;
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> scratch_;
};

}  // namespace deeplab_kernels
