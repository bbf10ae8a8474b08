#define DK_ISA avx512
#include "gaussian_filter_kernels.h"
