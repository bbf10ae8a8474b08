#define DK_ISA avx2
#include "atrous_separable_kernels.h"
