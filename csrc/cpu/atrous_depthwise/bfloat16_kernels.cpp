#include "kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::Kernels<deeplab_kernels::cpu::BFloat16Bits>;
