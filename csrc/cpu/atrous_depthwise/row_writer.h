// Rows narrower than what is stored at once, on their way to memory. For the per-instruction-set files only: everything
// here has internal linkage.
#pragma once

#include "../simd.h"

namespace deeplab_kernels::cpu {
namespace {

// Rows are put into memory of the writer's own, where a vector may reach beyond the end of its row as the next one
// overwrites it, and go from there to a stretch of memory from front to back.
template <typename T>
class RowWriter {
  static constexpr int64_t kHeld = 1024;

 public:
  // Values of memory that a writer needs to which at most `most` are added at once, by stores that reach at most
  // `beyond` values further.
  static int64_t size(int64_t most, int64_t beyond) { return kHeld + most + beyond; }

  RowWriter() = default;
  explicit RowWriter(T* memory) : memory_(memory) {}

  void begin(T* to) { to_ = to, held_ = 0; }
  // Where the next values belong.
  T* room() const { return memory_ + held_; }
  void add(int64_t values) {
    held_ += values;
    if (held_ >= kHeld) end();
  }
  void end() {
    spread(to_, 0, 1, held_);
    to_ += held_, held_ = 0;
  }
  // Rows that lie one behind the other in room(), to places `step` apart; instead of begin(), add() and end().
  void spread(T* to, int64_t step, int64_t rows, int64_t width) const {
    for (int64_t r = 0; r < rows; ++r) __builtin_memcpy(to + r * step, memory_ + r * width, size_t(width) * sizeof(T));
  }

 private:
  T* memory_ = nullptr;
  T* to_ = nullptr;
  int64_t held_ = 0;
};

}  // namespace
}  // namespace deeplab_kernels::cpu
