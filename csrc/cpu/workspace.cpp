#include "workspace.h"

#include <new>

namespace deeplab_kernels::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

struct ThreadMemory {
  void* data = nullptr;
  size_t bytes = 0;
  ~ThreadMemory() { ::operator delete(data, kAlignment); }
};

}  // namespace

Workspace::Workspace(size_t bytes) : data_(::operator new(bytes, kAlignment)) {}
Workspace::~Workspace() { ::operator delete(data_, kAlignment); }

void* thread_scratch(size_t bytes) {
  thread_local ThreadMemory memory;
  if (memory.bytes < bytes) {
    ::operator delete(memory.data, kAlignment);
    memory.data = nullptr, memory.bytes = 0;
    memory.data = ::operator new(bytes, kAlignment);
    memory.bytes = bytes;
  }
  return memory.data;
}

}  // namespace deeplab_kernels::cpu
