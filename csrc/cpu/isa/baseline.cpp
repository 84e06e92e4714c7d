// Any processor: 128-bit vectors that every 64-bit x86 and ARM has.
#define L2L_ISA baseline
#define L2L_LANES 4
#include "table.h"
