#define DK_ISA avx512
#include "pointwise_kernels.h"
