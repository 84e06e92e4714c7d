// The only place with inline PTX: thin wrappers, and the host twins that stand in for them on the CPU.
//
// ex2 and rcp flush denormals (.ftz). Their errors, from the PTX ISA: ex2 2^-22.5 relative; rcp 2^-23 relative.
#pragma once

#include "compat.cuh"

#if defined(__CUDACC__)

namespace l2l {
namespace ptx {

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if L2L_CUDA_ARCH >= 800
// d += a b, of 16 x 8, 16 x 8 and 8 x 8 numbers, by all lanes of a warp. With g = lane / 4, t = lane % 4 a lane has
// rows g, g + 8, g, g + 8 in columns t, t, t + 4, t + 4 of a; rows t, t + 4 in column g of b; columns 2t, 2t + 1 of row
// g, then of row g + 8, of d. Of a and b the lowest 13 bits are not read.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
}  // namespace ptx
}  // namespace l2l

#else
#include <cuda_on_host/ptx.h>
#endif
