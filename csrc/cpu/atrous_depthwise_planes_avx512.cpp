#define DK_ISA avx512
#include "atrous_depthwise_planes_kernels.h"
