// The atrous depthwise kernels of one storage type.
#include "atrous_depthwise_calls.h"

namespace deeplab_kernels::cuda {
template struct Calls<__nv_bfloat16>;
}  // namespace deeplab_kernels::cuda
