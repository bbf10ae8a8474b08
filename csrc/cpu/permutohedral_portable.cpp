#define DK_ISA portable
#include "permutohedral_kernels.h"
