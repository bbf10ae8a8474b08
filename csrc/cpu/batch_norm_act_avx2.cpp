#define DK_ISA avx2
#include "batch_norm_act_kernels.h"
