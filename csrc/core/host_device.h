// For functions that the CPU and the GPU share.
#pragma once

#ifdef __CUDACC__
#define L2L_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define L2L_HOST_DEVICE inline __attribute__((always_inline))
#endif
