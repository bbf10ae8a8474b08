#define DK_ISA portable
#include "pointwise_kernels.h"
