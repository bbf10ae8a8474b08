#define DK_ISA avx2
#include "atrous_depthwise_pixels_training.h"
