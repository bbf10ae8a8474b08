// Memory of the CPU kernels. Kept out of the per-instruction-set files, so that no code of the standard library is
// compiled for an instruction set that the CPU may lack.
#pragma once

#include <cstddef>

namespace deeplab_kernels::cpu {

// Uninitialised memory, 64-byte aligned; large blocks in huge pages where the system has them. Released blocks of 256
// KB up to kLargestKept bytes are kept for the next call, kKeptBytes in all: mapping and clearing their pages can take
// as long as the work done in them. release() is given the same number of bytes.
void* allocate(size_t bytes);
void release(void* data, size_t bytes);
constexpr size_t kKeptBytes = size_t{256} << 20, kLargestKept = size_t{32} << 20;

// Uninitialised memory for one call of an operator, 64-byte aligned.
class Workspace {
 public:
  explicit Workspace(size_t bytes) : data_(allocate(bytes)), bytes_(bytes) {}
  ~Workspace() { release(data_, bytes_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_;
  size_t bytes_;
};

// Memory of the calling thread, 64-byte aligned, kept from call to call (a few MB at most for images of usual width);
// valid until the thread asks again.
void* thread_scratch(size_t bytes);

}  // namespace deeplab_kernels::cpu
