#include "last_level_cache.h"

#include <cstdio>

namespace deeplab_kernels::cpu {
namespace {

// As Linux tells it for the first core. sysconf() knows the sum over all of a processor's caches at most.
int64_t asked() {
  long long kilobytes = 0;
  if (std::FILE* file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%lldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return kilobytes > 0 ? int64_t(kilobytes) << 10 : int64_t{32} << 20;
}

}  // namespace

int64_t last_level_cache_bytes() {
  static const int64_t bytes = asked();
  return bytes;
}

}  // namespace deeplab_kernels::cpu
