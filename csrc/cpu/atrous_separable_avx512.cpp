#define DK_ISA avx512
#include "atrous_separable_kernels.h"
