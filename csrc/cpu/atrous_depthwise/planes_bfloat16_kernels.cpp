#include "../atrous_spatial_pyramid/kernels.h"
#include "planes_kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::PlaneKernels<deeplab_kernels::cpu::BFloat16Bits>;
template struct deeplab_kernels::cpu::DK_ISA::PyramidKernels<deeplab_kernels::cpu::BFloat16Bits>;
