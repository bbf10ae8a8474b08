#define DK_ISA portable
#include "atrous_spatial_pyramid_kernels.h"
