// Launch configuration: how many blocks a device holds, dispatch on the hidden size, tables too long for the arguments.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "table.cuh"

namespace l2l {

// The sizes that are compiled; tests build fewer.
#ifndef L2L_CUDA_HIDDEN_SIZES
#define L2L_CUDA_HIDDEN_SIZES(X) X(4) X(8) X(16) X(20) X(32)
#define L2L_CUDA_LAYERS(X) X(1) X(2) X(3)
#endif

// What came of a launch. Lack of shared memory is told apart from all other errors, with the numbers; it has the error
// code that a launch would have had.
struct LaunchStatus {
  cudaError_t error = cudaSuccess;
  size_t shared_needed = 0, shared_available = 0;  // bytes of a block, static and dynamic; 0 unless they are the reason

  LaunchStatus(cudaError_t code) : error(code) {}
  LaunchStatus(size_t needed, size_t available)
      : error(cudaErrorInvalidConfiguration), shared_needed(needed), shared_available(available) {}
  operator cudaError_t() const { return error; }
};

template <class F>
LaunchStatus dispatch_hidden(int hidden, const F& f) {
  switch (hidden) {
#define L2L_CASE(n) \
  case n:           \
    return f(std::integral_constant<int, n>{});
    L2L_CUDA_HIDDEN_SIZES(L2L_CASE)
    default:
      return cudaErrorInvalidValue;
  }
}

template <class F>
LaunchStatus dispatch_layers(int layers, const F& f) {
  switch (layers) {
    L2L_CUDA_LAYERS(L2L_CASE)
#undef L2L_CASE
    default:
      return cudaErrorInvalidValue;
  }
}

// Whether a configuration is compiled; without layers there is a step alone.
inline bool cuda_supports(const Config& config) {
  if (config.layers == 0) return true;
  const auto known = [](auto) -> LaunchStatus { return cudaSuccess; };
  return dispatch_hidden(config.hidden, known) == cudaSuccess && dispatch_layers(config.layers, known) == cudaSuccess;
}

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

// Blocks of a kernel that the current device runs at a time, 1 at least; lets the kernel use as much dynamic shared
// memory as a block may have. Asked of the driver once per kernel, size and device.
template <class... P>
LaunchStatus resident_blocks(void (*kernel)(P...), int threads, size_t shared_bytes, int* blocks) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int, size_t>, int> known;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{reinterpret_cast<const void*>(kernel), device, threads, shared_bytes}];
  if (found == 0) {
    int most = 0, processors = 0, each = 0;
    cudaFuncAttributes attributes{};
    error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    // The limit is one of static and dynamic shared memory together.
    const size_t limit = static_cast<size_t>(most), fixed = attributes.sharedSizeBytes;
    if (fixed + shared_bytes > limit) return {fixed + shared_bytes, limit};
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit - fixed));
    if (error == cudaSuccess) error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
    if (error == cudaSuccess)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes);
    if (error == cudaSuccess && each < 1) error = cudaErrorLaunchOutOfResources;  // registers, or too many threads
    if (error != cudaSuccess) return error;
    found = processors * each;
  }
  *blocks = found;
  return cudaSuccess;
}

// The virtual architecture, 80 for 8.0, that the code was compiled for which the current device would run. Asked of the
// driver once per kernel and device.
template <class... P>
cudaError_t compiled_for(void (*kernel)(P...), int* version) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> known;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& found = known[{reinterpret_cast<const void*>(kernel), device}];
  if (found == 0) {
    cudaFuncAttributes attributes{};
    const cudaError_t asked = cudaFuncGetAttributes(&attributes, kernel);
    if (asked != cudaSuccess) return asked;
    found = attributes.ptxVersion;
  }
  *version = found;
  return cudaSuccess;
}

// Why a launch failed, for people. status: not cudaSuccess.
inline std::string launch_failure(const LaunchStatus& status, const Config& config) {
  if (status.shared_needed == 0) return std::string(cudaGetErrorName(status)) + ": " + cudaGetErrorString(status);
  return "a network with hidden_size=" + std::to_string(config.hidden) +
         ", num_layers=" + std::to_string(config.layers) + " needs " + std::to_string(status.shared_needed) +
         " bytes of shared memory per block, but a block of this GPU has " + std::to_string(status.shared_available) +
         "; it runs on the CPU and in l2l_fast.reference";
}

// Cooperative: the blocks, which must all be resident, may wait for one another.
template <bool Cooperative = false, class... P, class... A>
cudaError_t launch(void (*kernel)(P...), int blocks, int threads, size_t shared_bytes, cudaStream_t stream,
                   const A&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cooperative[1];
  cooperative[0].id = cudaLaunchAttributeCooperative;
  cooperative[0].val.cooperative = 1;
  config.attrs = cooperative;
  config.numAttrs = Cooperative ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int Bytes>
void fill_inline(InlineTable<Bytes>& table, const std::vector<int64_t>& words) {
  std::copy(words.begin(), words.end(), table.words);
}

__global__ static void upload_table_kernel(const __grid_constant__ InlineTable<kLargeTable> chunk, int64_t* to,
                                           int words) {
  for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) to[i] = chunk.words[i];
}

// Brings a table to device memory by way of kernel arguments: unlike a copy from the host's memory this needs neither
// pinned memory nor a wait, and a captured graph replays it.
inline cudaError_t upload_table(const std::vector<int64_t>& words, int64_t* to, cudaStream_t stream) {
  constexpr size_t kChunk = kLargeTable / 8;
  InlineTable<kLargeTable> chunk;
  for (size_t begin = 0; begin < words.size(); begin += kChunk) {
    const size_t count = std::min(kChunk, words.size() - begin);
    std::copy_n(words.begin() + begin, count, chunk.words);
    const cudaError_t error =
        launch(&upload_table_kernel, 1, 256, 0, stream, chunk, to + begin, static_cast<int>(count));
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace l2l
