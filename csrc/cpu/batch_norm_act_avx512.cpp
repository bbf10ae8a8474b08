#define DK_ISA avx512
#include "batch_norm_act_kernels.h"
