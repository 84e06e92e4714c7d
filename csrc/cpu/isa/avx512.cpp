// x86 with AVX-512 F, DQ, BW and VL.
#define L2L_ISA avx512
#define L2L_LANES 16
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#endif
#include "table.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
