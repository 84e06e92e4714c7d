// CUDA's declaration qualifiers.
//
// A __shared__ variable becomes a thread_local one: the module's thread-local segment then holds nothing else, so the
// runtime can find it, poison it when a block starts and keep a copy per block when several are resident. Hence host
// code in the same library must not declare thread_local variables of its own. "used" keeps the compiler from reasoning
// about a variable that nobody seems to write.
//
// __global__ leaves a no-operation before the kernel's entry, __launch_bounds__(n) n of them, and the compiler lists
// them in a section of its own: so the runtime knows what is a kernel and how many threads its blocks may have
// (../../runtime/kernel_info.h). Of two such attributes the later counts.
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
namespace cuda_on_host {
constexpr int launch_bound(int threads, int = 0, int = 0) { return threads; }
}  // namespace cuda_on_host
#define __launch_bounds__(...) \
  __attribute__((              \
      patchable_function_entry(::cuda_on_host::launch_bound(__VA_ARGS__), ::cuda_on_host::launch_bound(__VA_ARGS__))))
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
