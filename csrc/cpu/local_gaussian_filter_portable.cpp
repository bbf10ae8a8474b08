#define DK_ISA portable
#include "local_gaussian_filter_kernels.h"
