#define DK_ISA avx512
#define DK_FLOAT64
#include "atrous_depthwise_kernels.h"
