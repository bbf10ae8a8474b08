#define DK_ISA avx2
#include "atrous_spatial_pyramid_kernels.h"
