#define DK_ISA portable
#include "permutohedral_embed.h"
