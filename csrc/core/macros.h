// Host/device annotations, so that one definition of the mathematics serves every compiler.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DK_HOST_DEVICE inline
#endif
