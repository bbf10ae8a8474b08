// The atrous spatial pyramid's kernels of one storage type.
#include "atrous_spatial_pyramid_calls.h"

namespace deeplab_kernels::cuda {
extern template struct Calls<__nv_bfloat16>;
template struct PyramidCalls<__nv_bfloat16>;
}  // namespace deeplab_kernels::cuda
