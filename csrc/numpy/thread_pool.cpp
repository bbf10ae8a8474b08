#include "thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace deeplab_kernels::numpy {
namespace {

using Body = cpu::Parallel::Body;

// A computation is a hundred short parallel loops in a row: waiting in place for about 20 us is cheaper than sleeping
// between them.
constexpr int kSpins = 1000;

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

template <typename Condition>
bool spin_until(const Condition& condition) {
  for (int i = 0; i < kSpins; ++i) {
    if (condition()) return true;
    relax();
  }
  return false;
}

thread_local bool inside_body = false;

// One parallel loop; lives on its caller's stack.
struct Job {
  Body body;
  void* context;
  int64_t count, chunks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> helpers{0};  // workers inside; written under the pool's mutex
  int64_t most_helpers;

  void work() {
    inside_body = true;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      body(context, count / chunks * c + std::min(c, count % chunks),
           count / chunks * (c + 1) + std::min(c + 1, count % chunks));
    inside_body = false;
  }
  bool wants_help() const {
    return helpers.load(std::memory_order_relaxed) < most_helpers && next.load(std::memory_order_relaxed) < chunks;
  }
};

class Pool {
 public:
  void run(Job& job) {
    {
      std::lock_guard lock(mutex_);
      start_workers(job.most_helpers);
      jobs_.push_back(&job);
      news_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock lock(mutex_);
    jobs_.erase(std::find(jobs_.begin(), jobs_.end(), &job));
    lock.unlock();
    // Nobody can join any more; whoever did touches the job last when leaving it.
    const auto left = [&] { return job.helpers.load(std::memory_order_acquire) == 0; };
    if (spin_until(left)) return;
    lock.lock();
    done_.wait(lock, left);
  }

 private:
  void start_workers(int64_t wanted) {
    while (int64_t(workers_.size()) < wanted) try {
        workers_.emplace_back([this] { worker(); });
      } catch (const std::system_error&) {
        return;  // the system grants no more threads: those there are do the work
      }
  }

  [[noreturn]] void worker() {
    for (uint64_t seen = 0;;) {
      spin_until([&] { return news_.load(std::memory_order_acquire) != seen; });
      std::unique_lock lock(mutex_);
      Job* job = nullptr;
      const auto found = [&] {
        seen = news_.load(std::memory_order_relaxed);
        const auto it = std::find_if(jobs_.begin(), jobs_.end(), [](const Job* j) { return j->wants_help(); });
        job = it == jobs_.end() ? nullptr : *it;
        return job != nullptr;
      };
      wake_.wait(lock, found);
      job->helpers.fetch_add(1, std::memory_order_relaxed);
      lock.unlock();
      job->work();
      lock.lock();
      if (job->helpers.fetch_sub(1, std::memory_order_release) == 1) done_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<Job*> jobs_;
  std::vector<std::thread> workers_;
  std::atomic<uint64_t> news_{0};  // jobs that were ever posted
};

// Never destroyed, because its workers may outlive the static objects of a process that ends. A child process leaves
// its parent's pool, whose workers it does not have, behind.
std::atomic<Pool*> current_pool{nullptr};
std::atomic<int64_t> thread_count{1};

Pool& pool() {
  Pool* found = current_pool.load(std::memory_order_acquire);
  if (found) return *found;
  static const int registered = pthread_atfork(nullptr, nullptr, [] {
    current_pool.store(nullptr);
    inside_body = false;
  });
  (void)registered;
  auto* fresh = new Pool;
  if (current_pool.compare_exchange_strong(found, fresh)) return *fresh;
  delete fresh;
  return *found;
}

void run(int64_t count, int64_t grain, Body body, void* context) {
  const int64_t threads = std::min(num_threads(), count / std::max<int64_t>(grain, 1));
  if (threads <= 1 || inside_body) return body(context, 0, count);
  // Several chunks a thread, so that a thread that is held up does not hold up all.
  Job job{.body = body,
          .context = context,
          .count = count,
          .chunks = std::min(count, 4 * threads),
          .most_helpers = threads - 1};
  pool().run(job);
}

}  // namespace

const cpu::Parallel& parallel() {
  static const cpu::Parallel instance(run, num_threads);
  return instance;
}

int64_t num_threads() { return thread_count.load(std::memory_order_relaxed); }
void set_num_threads(int64_t threads) { thread_count.store(std::max<int64_t>(threads, 1), std::memory_order_relaxed); }

}  // namespace deeplab_kernels::numpy
