#define DK_ISA avx512
#include "local_gaussian_filter_kernels.h"
