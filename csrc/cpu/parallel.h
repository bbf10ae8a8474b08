// How a CPU kernel asks for threads: the torch bindings pass torch's pool, the numpy module its own.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

class Parallel {
 public:
  using Body = void (*)(void* context, int64_t begin, int64_t end);
  using Run = void (*)(int64_t count, int64_t grain, Body body, void* context);
  using Threads = int64_t (*)();

  Parallel(Run run, Threads threads) : run_(run), threads_(threads) {}

  int64_t threads() const { return threads_(); }

  // Calls f(begin, end) over disjoint ranges that cover [0, count). f must not throw.
  template <typename F>
  void operator()(int64_t count, F&& f) const {
    if (count <= 0) return;
    auto body = [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); };
    run_(count, 1, body, &f);
  }

 private:
  Run run_;
  Threads threads_;
};

}  // namespace deeplab_kernels::cpu
