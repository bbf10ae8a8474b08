#define DK_ISA avx2
#include "permutohedral_kernels.h"
