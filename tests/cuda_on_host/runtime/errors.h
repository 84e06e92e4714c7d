// The error state, as cudaGetLastError() and cuda_on_host_message() see it. What a call refuses is its own error only:
// cudaGetLastError() clears it, and later calls work. An error of device code is the end of the context: every later
// call returns it, until cuda_on_host_take_error() stands for a new process.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "../include/cuda_runtime.h"

namespace cuda_on_host {

struct ErrorState {
  cudaError_t code = cudaSuccess;
  std::string message;  // of the last error, kept when the code is cleared
  bool sticky = false;  // device code failed
};
inline ErrorState error_state;

inline cudaError_t record_error(cudaError_t code, std::string message) {
  if (error_state.sticky) return error_state.code;
  error_state.code = code;
  error_state.message = std::move(message);
  static const bool echo = std::getenv("CUDA_ON_HOST_ECHO") != nullptr;
  if (echo) std::fprintf(stderr, "cuda_on_host: %s: %s\n", error_name(code), error_state.message.c_str());
  return code;
}

cudaError_t get_last_error(bool clear) {
  const cudaError_t code = error_state.code;
  if (clear && !error_state.sticky) error_state.code = cudaSuccess;
  return code;
}

// What every call returns once device code has failed.
inline cudaError_t context_error() { return error_state.sticky ? error_state.code : cudaSuccess; }

inline std::string format_list(const char* format, va_list arguments) {
  va_list copy;
  va_copy(copy, arguments);
  const int length = std::vsnprintf(nullptr, 0, format, copy);
  va_end(copy);
  std::string text(static_cast<size_t>(length), '\0');
  std::vsnprintf(text.data(), text.size() + 1, format, arguments);
  return text;
}

__attribute__((format(printf, 1, 2))) inline std::string format(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::string text = format_list(format, arguments);
  va_end(arguments);
  return text;
}

inline std::string at(Site site) { return format("%s:%d", site.file, site.line); }
inline std::string text_of(uint3 v) { return format("(%u,%u,%u)", v.x, v.y, v.z); }

// "file:line" of a machine instruction, by binutils' addr2line, which comes with g++. Of inlined calls, the innermost
// that is not in the headers of this runtime.
inline std::string line_of(const void* instruction) {
  Dl_info info;
  if (instruction == nullptr || dladdr(instruction, &info) == 0 || info.dli_fname == nullptr) return "?";
  // The address within the file: every module here is position-independent.
  const auto offset = static_cast<const char*>(instruction) - static_cast<const char*>(info.dli_fbase);
  const std::string command = format("addr2line -i -e '%s' 0x%tx 2>/dev/null", info.dli_fname, offset);
  std::string line;
  if (FILE* pipe = popen(command.c_str(), "r")) {
    char buffer[1024];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) {
      line = buffer;
      line = line.substr(0, line.find_first_of(" \n"));
      if (line.find("/cuda_on_host/include/") == std::string::npos) break;
    }
    pclose(pipe);
  }
  return line.empty() || line[0] == '?' ? format("%s+0x%tx", info.dli_fname, offset) : line;
}

inline std::string kernel_name(const void* function) {
  Dl_info info;
  if (dladdr(function, &info) == 0 || info.dli_sname == nullptr) return "kernel at " + line_of(function);
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : info.dli_sname;
  std::free(readable);
  return name.substr(0, name.find('('));
}

const char* error_name(cudaError_t error) {
  switch (error) {
#define CUDA_ON_HOST_NAME(name) \
  case name:                    \
    return #name;
    CUDA_ON_HOST_NAME(cudaSuccess)
    CUDA_ON_HOST_NAME(cudaErrorInvalidValue)
    CUDA_ON_HOST_NAME(cudaErrorMemoryAllocation)
    CUDA_ON_HOST_NAME(cudaErrorInvalidConfiguration)
    CUDA_ON_HOST_NAME(cudaErrorInvalidDevicePointer)
    CUDA_ON_HOST_NAME(cudaErrorInvalidMemcpyDirection)
    CUDA_ON_HOST_NAME(cudaErrorInvalidDeviceFunction)
    CUDA_ON_HOST_NAME(cudaErrorInvalidDevice)
    CUDA_ON_HOST_NAME(cudaErrorInvalidResourceHandle)
    CUDA_ON_HOST_NAME(cudaErrorIllegalAddress)
    CUDA_ON_HOST_NAME(cudaErrorLaunchOutOfResources)
    CUDA_ON_HOST_NAME(cudaErrorLaunchTimeout)
    CUDA_ON_HOST_NAME(cudaErrorAssert)
    CUDA_ON_HOST_NAME(cudaErrorMisalignedAddress)
    CUDA_ON_HOST_NAME(cudaErrorLaunchFailure)
    CUDA_ON_HOST_NAME(cudaErrorCooperativeLaunchTooLarge)
    CUDA_ON_HOST_NAME(cudaErrorNotSupported)
#undef CUDA_ON_HOST_NAME
  }
  return "unknown error";
}

}  // namespace cuda_on_host
