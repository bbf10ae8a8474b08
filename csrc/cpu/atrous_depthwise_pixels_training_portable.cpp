#define DK_ISA portable
#include "atrous_depthwise_pixels_training.h"
