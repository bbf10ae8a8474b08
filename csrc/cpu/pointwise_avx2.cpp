#define DK_ISA avx2
#include "pointwise_kernels.h"
