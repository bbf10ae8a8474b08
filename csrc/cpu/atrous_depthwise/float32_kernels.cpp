#include "kernels.h"

template struct deeplab_kernels::cpu::DK_ISA::Kernels<float>;
