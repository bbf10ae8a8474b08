// The header under which the sources of csrc/cuda compile with a plain C++ compiler, for tests: the words of CUDA that
// those sources use, carried out on the CPU. The threads of a block are fibres that meet at barriers; blocks run one
// after the other, in the order the schedule names. What it shows that a GPU would not: reads and writes out of bounds
// of any buffer including shared memory (AddressSanitizer), a missing barrier (results change with the schedule), a
// barrier that some threads of a block never reach (an error), shared memory read before it is written (it is filled
// with NaN).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <set>
#include <string>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};

namespace emulator {

struct Index {
  unsigned x, y, z;
};

enum class Order { kForward, kReverse, kRandom };

// How the next launches run.
struct Schedule {
  Order order = Order::kForward;
  uint64_t seed = 0;
  const char* dropped_barrier = "";  // "file.h:12": the __syncthreads() there does nothing
};
inline Schedule schedule;

// Runs body once for every thread of every block.
void run_grid(dim3 grid, dim3 block, int64_t shared_bytes, const std::function<void()>& body);
// Block barrier; `file` and `line` are where it stands in the source.
void sync_threads(const char* file, int line);
// Waits for the lanes of `mask`, then returns lane `source`'s value.
uint64_t exchange(uint32_t mask, uint64_t value, int source);
uint32_t ballot(uint32_t mask, bool predicate);
int lane();
unsigned char* shared_memory();
// Every __syncthreads() that has run since the program began, as "file.h:12".
const std::set<std::string>& barriers();

template <typename T>
T shuffle(uint32_t mask, T value, int source) {
  uint64_t bits = 0;
  static_assert(sizeof(T) <= sizeof(bits));
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

inline emulator::Index threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

#define __syncthreads() ::emulator::sync_threads(__FILE__, __LINE__)
inline void __syncwarp(uint32_t mask = 0xffffffffu) { emulator::exchange(mask, 0, emulator::lane()); }

template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  const int first = emulator::lane() / width * width;
  return emulator::shuffle(mask, value, first + source % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int other, int width = 32) {
  const int source = emulator::lane() ^ other;
  return emulator::shuffle(mask, value, source / width <= emulator::lane() / width ? source : emulator::lane());
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, int by, int width = 32) {
  const int source = emulator::lane() + by;
  return emulator::shuffle(mask, value, source / width == emulator::lane() / width ? source : emulator::lane());
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, int by, int width = 32) {
  const int source = emulator::lane() - by;
  return emulator::shuffle(mask, value, emulator::lane() % width >= by ? source : emulator::lane());
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) { return emulator::ballot(mask, predicate); }
inline bool __any_sync(uint32_t mask, bool predicate) { return emulator::ballot(mask, predicate) != 0; }
inline bool __all_sync(uint32_t mask, bool predicate) { return emulator::ballot(mask, predicate) == mask; }

// One operating-system thread runs everything, so a plain update is atomic.
template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address += value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  if (value > old) *address = value;
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  if (value < old) *address = value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T compare, T value) {
  const T old = *address;
  if (old == compare) *address = value;
  return old;
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
void __stwb(T* address, const T& value) {
  *address = value;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t(a) * b >> 32); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) {
  _Float16 half;
  std::memcpy(&half, &value, 2);
  return static_cast<float>(half);
}
inline __half __float2half_rn(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &half, 2);
  return result;
}
