#define DK_ISA avx512
#include "atrous_depthwise_pixels_training.h"
