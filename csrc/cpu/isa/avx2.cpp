// x86 with AVX2 and FMA (2013 and later).
#define L2L_ISA avx2
#define L2L_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
