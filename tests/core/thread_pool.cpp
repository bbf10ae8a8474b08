// The numpy module's thread pool: loops cover their range once, from several callers, nested, and in a forked child.
#include "../../csrc/numpy/thread_pool.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

using namespace deeplab_kernels;
using numpy::parallel;

#define REQUIRE(condition)                                              \
  do {                                                                  \
    if (!(condition)) {                                                 \
      std::printf("line %d: %s does not hold\n", __LINE__, #condition); \
      std::exit(1);                                                     \
    }                                                                   \
  } while (false)

void covers_once(int64_t count) {
  std::vector<int> visits(static_cast<size_t>(count), 0);
  parallel()(count, [&](int64_t begin, int64_t end) {
    REQUIRE(0 <= begin && begin < end && end <= count);
    for (int64_t i = begin; i < end; ++i) ++visits[static_cast<size_t>(i)];
  });
  for (const int v : visits) REQUIRE(v == 1);
}

// Enough loops in a row that workers wait, sleep and join late.
void many_loops(int loops) {
  std::vector<int64_t> values(1000, 0);
  for (int loop = 0; loop < loops; ++loop)
    parallel()(1000, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) values[static_cast<size_t>(i)] += i;
    });
  for (int64_t i = 0; i < 1000; ++i) REQUIRE(values[static_cast<size_t>(i)] == i * loops);
}

// Holds every body until as many threads as there should be are inside.
void uses_all_threads(int64_t threads) {
  std::mutex mutex;
  std::set<std::thread::id> inside;
  std::atomic<int64_t> count{0};
  parallel()(threads * 4, [&](int64_t, int64_t) {
    std::unique_lock lock(mutex);
    if (inside.insert(std::this_thread::get_id()).second) ++count;
    lock.unlock();
    while (count < threads) std::this_thread::yield();
  });
  REQUIRE(int64_t(inside.size()) == threads);
}

int main(int argc, char** argv) {
  const bool fork_too = argc > 1 && std::strcmp(argv[1], "--fork") == 0;
  REQUIRE(parallel().threads() == 1);
  covers_once(5);
  for (const int64_t threads : {4, 2, 7, 3}) {
    numpy::set_num_threads(threads);
    REQUIRE(parallel().threads() == threads);
    for (const int64_t count : {0, 1, 2, 3, 5, 16, 17, 127, 1000}) covers_once(count);
    many_loops(300);
    uses_all_threads(threads);
  }
  {
    std::atomic<int64_t> sum{0};
    parallel()(33, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) parallel()(5, [&](int64_t b, int64_t e) { sum += e - b; });
    });
    REQUIRE(sum == 33 * 5);
  }
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; ++c) callers.emplace_back([] { many_loops(300); });
  for (std::thread& caller : callers) caller.join();
  if (fork_too) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // a child that waits for its parent's threads must not hang the test
      many_loops(50);
      uses_all_threads(3);
      _exit(0);
    }
    int status = -1;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    many_loops(50);
  }
  return 0;
}
