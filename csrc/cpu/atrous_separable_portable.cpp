#define DK_ISA portable
#include "atrous_separable_kernels.h"
