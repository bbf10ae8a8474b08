// The atrous spatial pyramid's kernels of one storage type.
#include "atrous_spatial_pyramid_calls.h"

namespace deeplab_kernels::cuda {
extern template struct Calls<double>;
template struct PyramidCalls<double>;
}  // namespace deeplab_kernels::cuda
