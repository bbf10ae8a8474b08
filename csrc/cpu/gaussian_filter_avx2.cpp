#define DK_ISA avx2
#include "gaussian_filter_kernels.h"
