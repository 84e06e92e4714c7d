// The only place with inline PTX: thin wrappers, and the host twins that stand in for them on the CPU.
//
// They flush denormals (.ftz). Their errors, from the PTX ISA: ex2 2^-22.5 relative; rcp 2^-23 relative.
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
}  // namespace ptx
}  // namespace l2l

#else
#include <cuda_on_host/ptx.h>
#endif
