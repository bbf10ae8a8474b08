#include "planes_kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::PlaneKernels<float>;
