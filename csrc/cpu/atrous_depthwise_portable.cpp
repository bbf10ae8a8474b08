#define DK_ISA portable
#include "atrous_depthwise_kernels.h"
