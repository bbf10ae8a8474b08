// The emulator's scheduler: fibres, barriers, warp exchanges.
#include "emulator.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define DK_ASAN 1
#else
#define DK_ASAN 0
#endif

#if defined(__x86_64__)
// Saves the registers that a call must preserve on this stack, and goes on where `next` left off. swapcontext does the
// same with a system call, which takes most of the time of a short thread.
extern "C" void emulator_switch_stack(void** saved, void* next);
asm(R"(
.text
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

namespace emulator {
namespace {

#if defined(__x86_64__)
struct Context {
  void* stack_pointer;

  void start(char* stack, size_t bytes, void (*function)()) {
    uintptr_t top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t(15);
    void** slot = reinterpret_cast<void**>(top) - 1;  // where a function finds its return address; it never returns
    slot[0] = nullptr;
    *--slot = reinterpret_cast<void*>(function);
    for (int k = 0; k < 6; ++k) *--slot = nullptr;
    stack_pointer = slot;
  }
  void switch_to(Context& next) { emulator_switch_stack(&stack_pointer, next.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;

  void start(char* stack, size_t bytes, void (*function)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, function, 0);
  }
  void switch_to(Context& next) { swapcontext(&context, &next.context); }
};
#endif

constexpr size_t kStackBytes = 256 << 10;

enum class State { kReady, kAtBarrier, kInExchange, kDone };

struct Fibre {
  Context context;
  std::unique_ptr<char[]> stack;
  State state;
  Index index;
  const char* barrier_file;
  int barrier_line;
  int exchanges;      // warp exchanges entered so far
  uint32_t mask;      // of the current one
  uint64_t slots[2];  // values given to the current one and the one before
  void* fake_stack;
};

std::vector<Fibre> fibres;
Context scheduler;
Fibre* current = nullptr;
int current_number = 0, alive = 0;
const std::function<void()>* current_body = nullptr;
std::vector<unsigned char> shared;
std::set<std::string> seen_barriers;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "emulator: block (%u, %u, %u) thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z,
               current_number, what);
  std::abort();
}

void to_scheduler() {
#if DK_ASAN
  __sanitizer_start_switch_fiber(&current->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  current->context.switch_to(scheduler);
#if DK_ASAN
  __sanitizer_finish_switch_fiber(current->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

void entry() {
#if DK_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  for (;;) {  // one turn a block
    (*current_body)();
    current->state = State::kDone;
    to_scheduler();
  }
}

void resume(int number) {
  current_number = number;
  current = &fibres[number];
  threadIdx = current->index;
#if DK_ASAN
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, current->stack.get(), kStackBytes);
#endif
  scheduler.switch_to(current->context);
#if DK_ASAN
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// All lanes of the mask have entered exchange number `count`.
bool exchange_complete(int number, uint32_t mask, int count) {
  const int first = number / 32 * 32;
  for (int l = 0; l < 32; ++l)
    if (mask >> l & 1)
      if (first + l < alive && fibres[first + l].exchanges < count) return false;
  return true;
}

void prepare(int threads, dim3 block) {
  if (static_cast<int>(fibres.size()) < threads) fibres.resize(threads);
  alive = threads;
  for (int t = 0; t < threads; ++t) {
    Fibre& f = fibres[t];
    if (!f.stack) {
      f.stack.reset(new char[kStackBytes]);
      f.context.start(f.stack.get(), kStackBytes, entry);
      f.fake_stack = nullptr;
    }
    f.state = State::kReady;
    f.exchanges = 0;
    f.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  }
}

void run_block(int threads, std::mt19937_64& random) {
  std::vector<int> order(threads);
  std::iota(order.begin(), order.end(), 0);
  if (schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  std::vector<bool> visited((threads + 31) / 32);
  for (;;) {
    if (schedule.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
    bool progress = false;
    int done = 0, waiting = 0;
    // A warp runs until all its threads wait at a block barrier or are done, before the next one starts: the widest
    // lead that one warp can have over another.
    std::fill(visited.begin(), visited.end(), false);
    for (int leader : order) {
      const int warp = leader / 32;
      if (visited[warp]) continue;
      visited[warp] = true;
      for (bool moved = true; moved;) {
        moved = false;
        for (int t : order) {
          Fibre& f = fibres[t];
          if (t / 32 != warp) continue;
          if (f.state == State::kInExchange && exchange_complete(t, f.mask, f.exchanges)) f.state = State::kReady;
          if (f.state != State::kReady) continue;
          progress = moved = true;
          resume(t);
        }
      }
    }
    for (int t : order) {
      done += fibres[t].state == State::kDone;
      waiting += fibres[t].state == State::kAtBarrier;
    }
    if (done == threads) return;
    if (waiting == threads) {
      for (int t : order) {
        if (fibres[t].barrier_line != fibres[0].barrier_line || fibres[t].barrier_file != fibres[0].barrier_file)
          fail("threads wait at different __syncthreads()");
        fibres[t].state = State::kReady;
      }
    } else if (!progress) {
      fail("some threads never reach a __syncthreads() or a warp exchange that others wait at");
    }
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body) {
  const int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024) fail("a block must have 1 to 1024 threads");
  if (shared_bytes > 48 << 10) fail("more than 48 KB of shared memory");
  if (grid.y > 65535 || grid.z > 65535) fail("the grid's y and z are at most 65535");
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(schedule.seed);
  if (schedule.order == Order::kReverse) std::reverse(order.begin(), order.end());
  if (schedule.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random);
  gridDim = grid, blockDim = block;
  current_body = &body;
  for (int64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::vector<unsigned char>(shared_bytes, 0xff).swap(shared);
    prepare(threads, block);
    run_block(threads, random);
  }
}

void sync_threads(const char* file, int line) {
  const char* slash = std::strrchr(file, '/');
  const std::string name = std::string(slash ? slash + 1 : file) + ":" + std::to_string(line);
  seen_barriers.insert(name);
  if (name == schedule.dropped_barrier) return;
  current->barrier_file = file;
  current->barrier_line = line;
  current->state = State::kAtBarrier;
  to_scheduler();
}

uint64_t exchange(uint32_t mask, uint64_t value, int source) {
  const int number = current_number, first = number / 32 * 32;
  if (!(mask >> (number - first) & 1)) fail("a lane outside the mask takes part in a warp exchange");
  current->slots[current->exchanges++ % 2] = value;
  current->mask = mask;
  const int count = current->exchanges;
  current->state = State::kInExchange;
  to_scheduler();
  const Fibre& from = fibres[std::min(first + source, alive - 1)];
  return from.slots[(count - 1) % 2];
}

uint32_t ballot(uint32_t mask, bool predicate) {
  const int first = current_number / 32 * 32, slot = current->exchanges % 2;
  exchange(mask, predicate, lane());
  uint32_t result = 0;
  for (int l = 0; l < 32 && first + l < alive; ++l)
    if (mask >> l & 1) result |= uint32_t(fibres[first + l].slots[slot]) << l;
  return result;
}

int lane() { return current_number % 32; }

unsigned char* shared_memory() { return shared.data(); }

const std::set<std::string>& barriers() { return seen_barriers; }

}  // namespace emulator
