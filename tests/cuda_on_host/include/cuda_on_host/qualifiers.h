// CUDA's declaration qualifiers.
//
// A __shared__ variable becomes a thread_local one: the module's thread-local segment then holds nothing else, so the
// runtime can find it, poison it when a block starts and keep a copy per block when several are resident. Hence host
// code in the same library must not declare thread_local variables of its own. "used" keeps the compiler from reasoning
// about a variable that nobody seems to write.
//
// __global__ leaves a no-operation before the kernel's entry and lists it in a section of its own, so that the runtime
// knows what is a kernel (../../runtime/kernel_info.h). The bounds of __launch_bounds__ are not known to it: no
// attribute of GCC takes a number that depends on a template's arguments and keeps it.
#pragma once

#define CUDA_ON_HOST 1

// The architecture that device code may assume, as __CUDA_ARCH__ would say it.
#ifndef CUDA_ON_HOST_ARCH
#define CUDA_ON_HOST_ARCH 900
#endif

#define __global__ __attribute__((patchable_function_entry(1, 1)))
#define __device__
#define __host__
#define __constant__
#define __shared__ static thread_local __attribute__((used))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
