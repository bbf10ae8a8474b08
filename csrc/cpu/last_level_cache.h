// What the largest cache of this machine holds.
#pragma once

#include <cstdint>

namespace deeplab_kernels::cpu {

// Bytes of the last-level cache, which cores share; 32 MB where the system does not tell. Asked once.
int64_t last_level_cache_bytes();

}  // namespace deeplab_kernels::cpu
