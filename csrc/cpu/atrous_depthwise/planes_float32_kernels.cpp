#include "../atrous_spatial_pyramid/kernels.h"
#include "planes_kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::PlaneKernels<float>;
template struct deeplab_kernels::cpu::DK_ISA::PyramidKernels<float>;
