// Memory of the CPU kernels. Kept out of the per-instruction-set files, so that no code of the standard library is
// compiled for an instruction set that the CPU may lack.
#pragma once

#include <cstddef>

namespace deeplab_kernels::cpu {

// Uninitialised memory for one call of an operator, 64-byte aligned.
class Workspace {
 public:
  explicit Workspace(size_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
};

// Memory of the calling thread, 64-byte aligned, kept from call to call (a few MB at most for images of usual width);
// valid until the thread asks again.
void* thread_scratch(size_t bytes);

}  // namespace deeplab_kernels::cpu
