#define DK_ISA portable
#include "batch_norm_act_kernels.h"
