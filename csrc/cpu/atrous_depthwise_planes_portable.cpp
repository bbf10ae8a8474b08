#define DK_ISA portable
#include "atrous_depthwise_planes_kernels.h"
