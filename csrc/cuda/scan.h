// Exclusive prefix sums of small counts, in three launches: sums of blocks, their prefix sums by one block, and the
// caller's kernel, which adds its block's to block_scan's.
#pragma once

#include "launch.h"

namespace deeplab_kernels::cuda {

constexpr int kScanThreads = 256;
constexpr int kScanWarps = kScanThreads / 32;

struct Scan {
  int32_t before, total;  // sum over the threads before this one; over all of the block
};

// shared: kScanWarps + 1 values, free to be written when all threads of the block are here and again afterwards.
__device__ __forceinline__ Scan block_scan(int32_t value, int32_t* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t inclusive = value;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int32_t other = __shfl_up_sync(0xffffffffu, inclusive, by);
    if (lane >= by) inclusive += other;
  }
  if (lane == 31) shared[warp] = inclusive;
  __syncthreads();
  Scan scan{inclusive - value, 0};
#pragma unroll
  for (int w = 0; w < kScanWarps; ++w) {
    if (w < warp) scan.before += shared[w];
    scan.total += shared[w];
  }
  __syncthreads();
  return scan;
}

// sums[count] -> their exclusive prefix sums, in place, and the total. One block.
static __global__ void __launch_bounds__(kScanThreads) scan_sums(int32_t* sums, int64_t count, int32_t* total) {
  int32_t carry = 0;
  for (int64_t first = 0; first < count; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    const Scan scan = block_scan(i < count ? sums[i] : 0, dynamic_shared<int32_t>());
    if (i < count) sums[i] = carry + scan.before;
    carry += scan.total;
  }
  if (threadIdx.x == 0) *total = carry;
}

}  // namespace deeplab_kernels::cuda
