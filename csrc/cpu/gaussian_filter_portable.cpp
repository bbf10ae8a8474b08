#define DK_ISA portable
#include "gaussian_filter_kernels.h"
