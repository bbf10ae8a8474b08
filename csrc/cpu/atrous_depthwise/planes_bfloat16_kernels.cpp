#include "planes_kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::PlaneKernels<deeplab_kernels::cpu::BFloat16Bits>;
