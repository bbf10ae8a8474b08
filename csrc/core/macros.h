// Host/device annotations, so that one definition of the mathematics serves every compiler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DK_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: a copy compiled for one instruction set must never serve another's file.
#define DK_HOST_DEVICE inline __attribute__((always_inline))
#endif
