#define DK_ISA avx512
#include "atrous_spatial_pyramid_kernels.h"
