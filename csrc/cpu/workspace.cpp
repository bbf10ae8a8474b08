#include "workspace.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <new>
#include <vector>

namespace deeplab_kernels::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSmallestKept = size_t{1} << 18, kSmallestHuge = kHugePage;

struct ThreadMemory {
  void* data = nullptr;
  size_t bytes = 0;
  ~ThreadMemory() { ::operator delete(data, kAlignment); }
};

// Sizes of blocks that may be kept are rounded up, mostly by an eighth at most, so that calls on similar images share
// them.
size_t size_class(size_t bytes) {
  size_t step = bytes < kSmallestHuge ? kSmallestKept / 8 : kHugePage;
  while (step * 16 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

std::align_val_t alignment(size_t size) { return size < kSmallestHuge ? kAlignment : std::align_val_t(kHugePage); }

// Released blocks, the oldest first. A thread that finds the list in use does without, rather than waits.
class KeptBlocks {
 public:
  void* take(size_t bytes) {
    if (in_use_.test_and_set(std::memory_order_acquire)) return nullptr;
    void* found = nullptr;
    const auto it = std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block& b) { return b.bytes == bytes; });
    if (it != blocks_.rend()) {
      found = it->data;
      total_ -= bytes;
      blocks_.erase(std::next(it).base());
    }
    in_use_.clear(std::memory_order_release);
    return found;
  }

  // False if the block is not kept.
  bool keep(void* data, size_t bytes) {
    if (bytes > kLargestKept || in_use_.test_and_set(std::memory_order_acquire)) return false;
    bool kept = true;
    try {
      blocks_.push_back({data, bytes});
      total_ += bytes;
    } catch (const std::bad_alloc&) {
      kept = false;
    }
    while (total_ > kKeptBytes) {
      ::operator delete(blocks_.front().data, alignment(blocks_.front().bytes));
      total_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
    in_use_.clear(std::memory_order_release);
    return kept;
  }

 private:
  struct Block {
    void* data;
    size_t bytes;
  };
  std::atomic_flag in_use_ = ATOMIC_FLAG_INIT;
  std::vector<Block> blocks_;
  size_t total_ = 0;
};

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kKeep = false;  // a reused block would hide what the sanitizers look for
#else
constexpr bool kKeep = true;
#endif

// Never destroyed: threads may release blocks while the process ends.
KeptBlocks& kept_blocks() {
  static auto* blocks = new KeptBlocks;
  return *blocks;
}

}  // namespace

void* allocate(size_t bytes) {
  if (bytes < kSmallestKept) return ::operator new(bytes, kAlignment);
  const size_t size = size_class(bytes);
  if (kKeep)
    if (void* kept = kept_blocks().take(size)) return kept;
  void* data = ::operator new(size, alignment(size));
#if defined(__linux__)
  // Rows are visited out of order: with small pages the address translation alone would miss its caches.
  if (size >= kSmallestHuge) madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

void release(void* data, size_t bytes) {
  if (bytes < kSmallestKept) return ::operator delete(data, kAlignment);
  const size_t size = size_class(bytes);
  if (!kKeep || !kept_blocks().keep(data, size)) ::operator delete(data, alignment(size));
}

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
