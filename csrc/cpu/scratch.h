// What a worker keeps in the calling thread's scratch memory. For the per-instruction-set files only: everything here
// has internal linkage.
#pragma once

#include <cstddef>

#include "simd.h"

namespace deeplab_kernels::cpu {
namespace {

// Packed rows first, first + step, ... of an image, in consecutive slots.
template <typename A>
struct Window {
  A* memory;
  int64_t slots, step, pitch;
  int64_t first, count;

  void clear() { count = 0; }

  // Makes rows low ... high present, filling the missing ones through fill(row, slot) and dropping some below low.
  // While at it, fills rows up to `limit` where there is room: read some rows after they were written, loads across two
  // stores find them in the cache and need not wait.
  template <typename Fill>
  DK_INLINE void require(int64_t low, int64_t high, int64_t limit, const Fill& fill) {
    if (count == 0 || low < first || low > first + count * step || (step > 1 && (low - first) % step != 0))
      first = low, count = 0;
    if (first + (count - 1) * step >= high) return;
    for (int64_t row = first + count * step; row <= high || (row <= limit && count < slots); row += step) {
      if (count == slots) {
        const int64_t dropped = (low - first) / step;
        __builtin_memmove(memory, memory + dropped * pitch, size_t((count - dropped) * pitch) * sizeof(A));
        first = low, count -= dropped;
      }
      fill(row, memory + count * pitch);
      ++count;
    }
  }

  // Where `row` is or would be.
  DK_INLINE const A* at(int64_t row) const { return memory + (step == 1 ? row - first : (row - first) / step) * pitch; }
};

// Hands out parts of one block; with base null it only adds up their sizes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename E>
  E* take(int64_t count) {
    E* result = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
    used_ += size_t(rounded_up(count * int64_t(sizeof(E)), 64)) + 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
