// CUDA's <cuda_runtime.h> for g++: device code that includes it runs on the CPU, one fiber per CUDA thread.
// See ../README.md.
#pragma once

#include "cuda_on_host/atomics.h"
#include "cuda_on_host/host_api.h"
#include "cuda_on_host/interface.h"
#include "cuda_on_host/intrinsics.h"
#include "cuda_on_host/launch_api.h"
#include "cuda_on_host/qualifiers.h"
#include "cuda_on_host/vector_types.h"
#include "cuda_on_host/warp_intrinsics.h"
