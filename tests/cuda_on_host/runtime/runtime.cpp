// The runtime, in one translation unit: compiled without sanitizer instrumentation, linked with instrumented device
// code.
#include "access_hooks.h"
#include "control.h"
#include "launch.h"
#if !defined(CUDA_ON_HOST_ADDRESS) && !defined(CUDA_ON_HOST_THREAD)
#include "undefined_behaviour.h"
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
