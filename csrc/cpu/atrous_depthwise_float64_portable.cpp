#define DK_ISA portable
#define DK_FLOAT64
#include "atrous_depthwise_kernels.h"
