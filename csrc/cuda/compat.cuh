// Where device code meets its two compilers: nvcc, and g++ with the headers of tests/cuda_on_host, which run it on the
// CPU.
#pragma once

#include <cuda_runtime.h>

// L2L_CUDA_ARCH: the architecture device code is compiled for (__CUDA_ARCH__); 0 in nvcc's host pass.
//
// L2L_DYNAMIC_SHARED(type, name): declares type* name, the block's dynamic shared memory, aligned to 16 bytes. On the
// CPU it has exactly the size of the launch and every block finds it filled with NaN.
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__)
#define L2L_CUDA_ARCH __CUDA_ARCH__
#else
#define L2L_CUDA_ARCH 0
#endif
#define L2L_DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char l2l_dynamic_shared[]; \
  static_assert(alignof(type) <= 16, "aligned to 16 bytes only");     \
  type* const name = reinterpret_cast<type*>(l2l_dynamic_shared)
#elif defined(CUDA_ON_HOST)
#define L2L_CUDA_ARCH CUDA_ON_HOST_ARCH
#define L2L_DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(cuda_on_host::dynamic_shared_memory(alignof(type), cuda_on_host::Site::here()))
#else
#error "device code needs nvcc, or the headers of tests/cuda_on_host/include"
#endif
