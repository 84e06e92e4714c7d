// The part of the CUDA runtime API that host code around the kernels uses: errors, memory, streams, the device.
// Everything is carried out at once. "Device memory" is host memory, allocated to its exact size and filled with 0xFF
// (NaN), behind which any access faults. The functions have C++ linkage, so they never meet a real libcudart.
#pragma once

#include <cstddef>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevicePointer = 17,
  cudaErrorInvalidMemcpyDirection = 21,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorInvalidDevice = 101,
  cudaErrorInvalidResourceHandle = 400,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchOutOfResources = 701,
  cudaErrorLaunchTimeout = 702,
  cudaErrorAssert = 710,
  cudaErrorMisalignedAddress = 716,
  cudaErrorLaunchFailure = 719,
  cudaErrorCooperativeLaunchTooLarge = 720,
  cudaErrorNotSupported = 801,
};

enum cudaMemcpyKind {
  cudaMemcpyHostToHost = 0,
  cudaMemcpyHostToDevice = 1,
  cudaMemcpyDeviceToHost = 2,
  cudaMemcpyDeviceToDevice = 3,
  cudaMemcpyDefault = 4,
};

using cudaStream_t = struct CUstream_st*;

enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82,
  cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
  cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};

struct cudaDeviceProp {
  char name[256];
  size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  size_t reservedSharedMemPerBlock;
  int regsPerBlock, regsPerMultiprocessor, warpSize;
  int maxThreadsPerBlock, maxThreadsDim[3], maxGridSize[3], maxThreadsPerMultiProcessor, maxBlocksPerMultiProcessor;
  int major, minor, multiProcessorCount, cooperativeLaunch;
};

namespace cuda_on_host {
cudaError_t get_last_error(bool clear);
const char* error_name(cudaError_t);
cudaError_t allocate(void** pointer, size_t bytes);
cudaError_t release(void* pointer);
cudaError_t copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind);
cudaError_t set(void* pointer, int value, size_t bytes);
cudaError_t synchronize();
cudaError_t synchronize(cudaStream_t stream);
cudaError_t create_stream(cudaStream_t* stream);
cudaError_t destroy_stream(cudaStream_t stream);
cudaError_t check_stream(cudaStream_t stream, const char* call);  // exists, and belongs to the current device
cudaError_t copy_to_symbol(void* symbol, size_t size, const void* source, size_t bytes, size_t offset);
cudaError_t device_count(int* count);
cudaError_t get_device(int* device);
cudaError_t set_current_device(int device);
cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t device_properties(cudaDeviceProp* properties, int device);
}  // namespace cuda_on_host

inline cudaError_t cudaGetLastError() { return cuda_on_host::get_last_error(true); }
inline cudaError_t cudaPeekAtLastError() { return cuda_on_host::get_last_error(false); }
// The detailed message of an error is that of cuda_on_host_message().
inline const char* cudaGetErrorName(cudaError_t error) { return cuda_on_host::error_name(error); }
inline const char* cudaGetErrorString(cudaError_t error) { return cuda_on_host::error_name(error); }

template <class T>
cudaError_t cudaMalloc(T** pointer, size_t bytes) {
  void* p = nullptr;
  const cudaError_t error = cuda_on_host::allocate(&p, bytes);
  *pointer = static_cast<T*>(p);
  return error;
}
template <class T>
cudaError_t cudaMallocAsync(T** pointer, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cuda_on_host::check_stream(stream, "cudaMallocAsync");
  return error != cudaSuccess ? error : cudaMalloc(pointer, bytes);
}
inline cudaError_t cudaFree(void* pointer) { return cuda_on_host::release(pointer); }
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  const cudaError_t error = cuda_on_host::check_stream(stream, "cudaFreeAsync");
  return error != cudaSuccess ? error : cuda_on_host::release(pointer);
}
inline cudaError_t cudaMemcpy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  return cuda_on_host::copy(destination, source, bytes, kind);
}
inline cudaError_t cudaMemcpyAsync(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind,
                                   cudaStream_t stream = nullptr) {
  const cudaError_t error = cuda_on_host::check_stream(stream, "cudaMemcpyAsync");
  return error != cudaSuccess ? error : cuda_on_host::copy(destination, source, bytes, kind);
}
inline cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
  return cuda_on_host::set(pointer, value, bytes);
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream = nullptr) {
  const cudaError_t error = cuda_on_host::check_stream(stream, "cudaMemsetAsync");
  return error != cudaSuccess ? error : cuda_on_host::set(pointer, value, bytes);
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* source, size_t bytes, size_t offset = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice) {
  return cuda_on_host::copy_to_symbol(&symbol, sizeof symbol, source, bytes, offset);
}
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) { return cuda_on_host::create_stream(stream); }
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cuda_on_host::destroy_stream(stream); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return cuda_on_host::synchronize(stream); }
inline cudaError_t cudaDeviceSynchronize() { return cuda_on_host::synchronize(); }
inline cudaError_t cudaGetDeviceCount(int* count) { return cuda_on_host::device_count(count); }
inline cudaError_t cudaGetDevice(int* device) { return cuda_on_host::get_device(device); }
inline cudaError_t cudaSetDevice(int device) { return cuda_on_host::set_current_device(device); }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  return cuda_on_host::device_attribute(value, attribute, device);
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
  return cuda_on_host::device_properties(properties, device);
}
