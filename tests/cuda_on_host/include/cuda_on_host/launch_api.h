// Launching kernels. g++ knows no <<< >>>, so a kernel is launched by cudaLaunchKernelEx, cudaLaunchKernel or
// cudaLaunchCooperativeKernel with its typed function pointer. The launch has run, or failed, when the call returns.
#pragma once

#include <tuple>
#include <type_traits>
#include <utility>

#include "host_api.h"
#include "interface.h"
#include "qualifiers.h"
#include "vector_types.h"

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0,
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative;
  int programmaticStreamSerializationAllowed;
  struct {
    unsigned int x, y, z;
  } clusterDim;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned int numAttrs = 0;
};

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9,
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, cacheModeCA;
  int maxDynamicSharedSizeBytes, preferredShmemCarveout;
};

namespace cuda_on_host {

struct KernelCall {
  const void* function;
  void (*invoke)(const void* data);  // runs the kernel as the current thread, with its own copy of the arguments
  const void* data;
  size_t data_bytes;
  size_t parameter_bytes;
};
cudaError_t launch(const KernelCall& call, const cudaLaunchConfig_t& config, Site site);
cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value);
cudaError_t function_attributes(cudaFuncAttributes* attributes, const void* function);
cudaError_t occupancy(int* blocks, const void* function, int threads, size_t dynamic_bytes);

template <class... P>
struct BoundKernel {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are copied bytewise to the device");
  static_assert(!(std::is_reference_v<P> || ...), "a kernel parameter cannot be a reference to host memory");
  void (*kernel)(P...);
  std::tuple<P...> arguments;
  static void invoke(const void* data) {
    const auto* self = static_cast<const BoundKernel*>(data);
    std::apply(self->kernel, self->arguments);
  }
};

template <class... P, class... A>
cudaError_t bind_and_launch(Site site, const cudaLaunchConfig_t& config, void (*kernel)(P...), A&&... arguments) {
  static_assert(sizeof...(P) == sizeof...(A), "the kernel takes another number of arguments");
  const BoundKernel<P...> bound{kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(arguments))...)};
  size_t bytes = 0;
  ((bytes = (bytes + alignof(P) - 1) / alignof(P) * alignof(P) + sizeof(P)), ...);
  return launch({reinterpret_cast<const void*>(kernel), &BoundKernel<P...>::invoke, &bound, sizeof bound, bytes},
                config, site);
}

template <class... P, size_t... I>
cudaError_t launch_pointers(Site site, const cudaLaunchConfig_t& config, void (*kernel)(P...), void** arguments,
                            std::index_sequence<I...>) {
  return bind_and_launch(site, config, kernel, *static_cast<P*>(arguments[I])...);
}

// Carries the line of the launch along with its configuration.
struct ConfigAt {
  const cudaLaunchConfig_t* config;
  Site site;
  ConfigAt(const cudaLaunchConfig_t* c, Site s = Site::here()) : config(c), site(s) {}
};

}  // namespace cuda_on_host

template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(cuda_on_host::ConfigAt at, void (*kernel)(P...), A&&... arguments) {
  return cuda_on_host::bind_and_launch(at.site, *at.config, kernel, std::forward<A>(arguments)...);
}

template <class... P>
cudaError_t cudaLaunchKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes = 0,
                             cudaStream_t stream = nullptr, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const cudaLaunchConfig_t config{grid, block, dynamic_bytes, stream, nullptr, 0};
  return cuda_on_host::launch_pointers(site, config, kernel, arguments, std::index_sequence_for<P...>{});
}

template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(P...), dim3 grid, dim3 block, void** arguments,
                                        size_t dynamic_bytes = 0, cudaStream_t stream = nullptr,
                                        cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  const cudaLaunchConfig_t config{grid, block, dynamic_bytes, stream, &cooperative, 1};
  return cuda_on_host::launch_pointers(site, config, kernel, arguments, std::index_sequence_for<P...>{});
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  return cuda_on_host::set_function_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... P>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*kernel)(P...)) {
  const cudaError_t error = cuda_on_host::function_attributes(attributes, reinterpret_cast<const void*>(kernel));
  // Of the device's architecture at most; of a lower one where device code was compiled for that alone.
  if (error == cudaSuccess && attributes->ptxVersion > CUDA_ON_HOST_ARCH / 10)
    attributes->ptxVersion = CUDA_ON_HOST_ARCH / 10;
  return error;
}

template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*kernel)(P...), int threads,
                                                          size_t dynamic_bytes) {
  return cuda_on_host::occupancy(blocks, reinterpret_cast<const void*>(kernel), threads, dynamic_bytes);
}
