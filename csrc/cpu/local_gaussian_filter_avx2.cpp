#define DK_ISA avx2
#include "local_gaussian_filter_kernels.h"
