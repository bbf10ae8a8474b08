#define DK_ISA avx2
#include "permutohedral_embed.h"
