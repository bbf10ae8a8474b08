#define DK_ISA avx2
#include "atrous_depthwise_planes_kernels.h"
