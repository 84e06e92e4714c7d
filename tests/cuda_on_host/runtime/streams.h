// Streams: handles that belong to a device. Work on them is carried out at once.
#pragma once

#include <set>

#include "device.h"
#include "memory.h"

struct CUstream_st {
  int device;
};

namespace cuda_on_host {

inline std::set<cudaStream_t> streams;

// null, cudaStreamLegacy and cudaStreamPerThread are the current device's.
inline bool is_default(cudaStream_t stream) { return reinterpret_cast<uintptr_t>(stream) <= 2; }

cudaError_t check_stream(cudaStream_t stream, const char* call) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (is_default(stream)) return cudaSuccess;
  if (streams.count(stream) == 0)
    return record_error(cudaErrorInvalidResourceHandle,
                        format("%s: %p is no stream, or was destroyed", call, static_cast<void*>(stream)));
  if (stream->device == current_device) return cudaSuccess;
  return record_error(
      cudaErrorInvalidResourceHandle,
      format("%s: the stream belongs to device %d, the current one is %d", call, stream->device, current_device));
}

cudaError_t create_stream(cudaStream_t* stream) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  *stream = new CUstream_st{current_device};
  streams.insert(*stream);
  return cudaSuccess;
}

cudaError_t destroy_stream(cudaStream_t stream) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (streams.erase(stream) == 0)
    return record_error(cudaErrorInvalidResourceHandle,
                        format("cudaStreamDestroy: %p is no stream, or was destroyed", static_cast<void*>(stream)));
  delete stream;
  return cudaSuccess;
}

cudaError_t synchronize(cudaStream_t stream) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (!is_default(stream) && streams.count(stream) == 0)
    return record_error(cudaErrorInvalidResourceHandle,
                        format("cudaStreamSynchronize: %p is no stream", static_cast<void*>(stream)));
  ++counters.synchronizations;
  return cudaSuccess;
}

}  // namespace cuda_on_host
