// The atrous spatial pyramid's kernels of one storage type.
#include "atrous_spatial_pyramid_calls.h"

namespace deeplab_kernels::cuda {
extern template struct Calls<float>;
template struct PyramidCalls<float>;
}  // namespace deeplab_kernels::cuda
