// What AVX-512 BF16 adds to avx512.cpp: the steps with bfloat16 products. All else is avx512's (dispatch.cpp).
#define L2L_ISA avx512bf16
#define L2L_LANES 16
#define L2L_BFLOAT16_DOT
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,prefer-vector-width=512")
#pragma GCC diagnostic ignored "-Wunused-function"  // the float32 kernels in the headers
#endif
#include "bfloat16.h"

namespace l2l {
namespace L2L_ISA {

extern const Bfloat16Kernels bfloat16 = {kBfloat16Operands, bfloat16_step, bfloat16_stored_step};

}  // namespace L2L_ISA
}  // namespace l2l
#if defined(__clang__)
#pragma clang attribute pop
#endif
