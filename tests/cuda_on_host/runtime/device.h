// The pretend device: the limits a launch is checked against. Chosen by CUDA_ON_HOST_DEVICE or cuda_on_host_set_device,
// "sm_90" or "sm_80,multiprocessors=8,registers=64": few multiprocessors by default, so that cooperative grids stay
// small. devices=2 makes it two alike, cooperative=0 takes cooperative launches away, parameters=4096 is the limit of
// CUDA before 12.1.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <string>
#include <utility>

#include "errors.h"
#include "kernel_info.h"

namespace cuda_on_host {

struct Device {
  int architecture = 90;          // compute capability, times ten
  int shared_optin = 227 * 1024;  // static and dynamic shared memory of a block at most
  int shared_multiprocessor = 228 * 1024;
  int threads_multiprocessor = 2048, blocks_multiprocessor = 32;
  int multiprocessors = 4;
  int registers_thread = 0;  // of every kernel; 0: 128, or fewer where a block has too many threads for that
  int devices = 1, cooperative = 1;
  int parameters = 32764;  // bytes of kernel parameters, from compute capability 7.0 and CUDA 12.1 on
  static constexpr int shared_default = 48 * 1024, registers_multiprocessor = 65536;
  static constexpr size_t memory = size_t{1} << 34;
  int shared_reserved() const { return architecture >= 80 ? 1024 : 0; }
};

// Programming guide, table "Technical specifications per compute capability".
inline const Device kDevices[] = {
    {75, 64 * 1024, 64 * 1024, 1024, 16},    {80, 163 * 1024, 164 * 1024, 2048, 32},
    {86, 99 * 1024, 100 * 1024, 1536, 16},   {87, 163 * 1024, 164 * 1024, 1536, 16},
    {89, 99 * 1024, 100 * 1024, 1536, 24},   {90, 227 * 1024, 228 * 1024, 2048, 32},
    {100, 227 * 1024, 228 * 1024, 2048, 32}, {103, 227 * 1024, 228 * 1024, 2048, 32},
    {110, 227 * 1024, 228 * 1024, 1536, 24}, {120, 99 * 1024, 100 * 1024, 1536, 24},
    {121, 99 * 1024, 100 * 1024, 1536, 24},
};

// False if the text is not understood; the device is then unchanged.
inline bool parse_device(const char* text, Device* device) {
  Device result;
  std::string rest = text;
  for (size_t begin = 0; begin <= rest.size();) {
    const size_t end = std::min(rest.find(',', begin), rest.size());
    const std::string item = rest.substr(begin, end - begin);
    int value = 0;
    if (std::sscanf(item.c_str(), "sm_%d", &value) == 1) {
      const auto* found = std::find_if(std::begin(kDevices), std::end(kDevices),
                                       [&](const Device& d) { return d.architecture == value; });
      if (found == std::end(kDevices)) return false;
      result = *found;
    } else if (std::sscanf(item.c_str(), "multiprocessors=%d", &value) == 1 && value > 0) {
      result.multiprocessors = value;
    } else if (std::sscanf(item.c_str(), "registers=%d", &value) == 1 && value > 0 && value <= 255) {
      result.registers_thread = value;
    } else if (std::sscanf(item.c_str(), "devices=%d", &value) == 1 && value > 0) {
      result.devices = value;
    } else if (std::sscanf(item.c_str(), "cooperative=%d", &value) == 1 && (value == 0 || value == 1)) {
      result.cooperative = value;
    } else if (std::sscanf(item.c_str(), "parameters=%d", &value) == 1 && value > 0) {
      result.parameters = value;
    } else {
      return false;
    }
    begin = end + 1;
  }
  *device = result;
  return true;
}

inline Device initial_device() {
  Device device;
  const char* text = std::getenv("CUDA_ON_HOST_DEVICE");
  if (text != nullptr && !parse_device(text, &device)) {
    std::fprintf(stderr, "cuda_on_host: CUDA_ON_HOST_DEVICE=%s is not understood\n", text);
    std::abort();
  }
  return device;
}
inline Device device = initial_device();

// ---- which device

inline int current_device = 0;

inline cudaError_t check_device(int index) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (index >= 0 && index < device.devices) return cudaSuccess;
  return record_error(cudaErrorInvalidDevice, format("device %d: there are %d, from 0 on", index, device.devices));
}
cudaError_t device_count(int* count) {
  *count = device.devices;
  return context_error();
}
cudaError_t get_device(int* index) {
  *index = current_device;
  return context_error();
}
cudaError_t set_current_device(int index) {
  const cudaError_t error = check_device(index);
  if (error == cudaSuccess) current_device = index;
  return error;
}

// ---- kernels

// What cudaFuncSetAttribute has allowed a kernel on a device, instead of the default.
inline std::map<std::pair<int, const void*>, int> allowed_shared, carveouts;

inline cudaError_t check_kernel(const void* function, const char* call) {
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (function != nullptr && kernel_table.find(function).known) return cudaSuccess;
  return record_error(cudaErrorInvalidDeviceFunction, format("%s: %p is no kernel", call, function));
}

// Dynamic shared memory that the static one leaves to a block, on a device that can give it `most` in all.
inline int shared_left(const void* function, int most) {
  return std::max(most - static_cast<int>(kernel_table.find(function).static_shared), 0);
}

// Dynamic shared memory that a launch may ask for: what was set, or what is left of 48 KiB.
inline int shared_limit(const void* function) {
  const auto found = allowed_shared.find({current_device, function});
  if (found == allowed_shared.end()) return shared_left(function, Device::shared_default);
  return std::min(found->second, shared_left(function, device.shared_optin));
}

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (const cudaError_t error = check_kernel(function, "cudaFuncSetAttribute"); error != cudaSuccess) return error;
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) {
    if (value < -1 || value > 100)
      return record_error(cudaErrorInvalidValue, format("cudaFuncSetAttribute: a carveout of %d percent", value));
    carveouts[{current_device, function}] = value;
    return cudaSuccess;
  }
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize)
    return record_error(cudaErrorInvalidValue, format("cudaFuncSetAttribute: unknown attribute %d", attribute));
  const int most = shared_left(function, device.shared_optin);
  if (value < 0 || value > most)
    return record_error(
        cudaErrorInvalidValue,
        format("cudaFuncSetAttribute: %d bytes of dynamic shared memory; the device has %d for a block, and %s has %zu "
               "of static shared memory, which leaves %d",
               value, device.shared_optin, kernel_name(function).c_str(), kernel_table.find(function).static_shared,
               most));
  allowed_shared[{current_device, function}] = value;
  return cudaSuccess;
}

// Registers of a thread, in a block of so many. How many a kernel takes, only nvcc knows: bench/sass.py reads it.
inline int registers_of(int threads) {
  if (device.registers_thread > 0) return device.registers_thread;
  return std::min(128, Device::registers_multiprocessor / ((threads + 31) / 32 * 32) / 8 * 8);
}

// Resident blocks per multiprocessor, by threads, registers (in units of 256 of a warp, a quarter of them for each of
// the four schedulers), shared memory (static, dynamic and the system's, in units of 128 bytes) and number of blocks.
inline int resident_blocks(const void* function, int threads, size_t dynamic_bytes) {
  const int warps = (threads + 31) / 32;
  const int by_threads = device.threads_multiprocessor / (warps * 32);
  const int registers_warp = (registers_of(threads) * 32 + 255) / 256 * 256;
  const int by_registers = Device::registers_multiprocessor / 4 / registers_warp * 4 / warps;
  const size_t asked = dynamic_bytes + kernel_table.find(function).static_shared;
  const size_t shared = (asked + 127) / 128 * 128 + static_cast<size_t>(device.shared_reserved());
  const int by_shared =
      shared == 0 ? by_threads : static_cast<int>(static_cast<size_t>(device.shared_multiprocessor) / shared);
  return std::min({by_threads, by_registers, by_shared, device.blocks_multiprocessor});
}

cudaError_t occupancy(int* blocks, const void* function, int threads, size_t dynamic_bytes) {
  const char* call = "cudaOccupancyMaxActiveBlocksPerMultiprocessor";
  if (const cudaError_t error = check_kernel(function, call); error != cudaSuccess) return error;
  if (threads <= 0 || threads > 1024)
    return record_error(cudaErrorInvalidValue, format("%s: blocks of %d threads", call, threads));
  const bool fits = dynamic_bytes <= static_cast<size_t>(shared_limit(function)) &&
                    threads <= kernel_table.find(function).most_threads;
  *blocks = fits ? resident_blocks(function, threads, dynamic_bytes) : 0;
  return cudaSuccess;
}

cudaError_t function_attributes(cudaFuncAttributes* attributes, const void* function) {
  if (const cudaError_t error = check_kernel(function, "cudaFuncGetAttributes"); error != cudaSuccess) return error;
  const KernelInfo& info = kernel_table.find(function);
  const auto carveout = carveouts.find({current_device, function});
  *attributes = cudaFuncAttributes{};
  attributes->sharedSizeBytes = info.static_shared;
  attributes->numRegs = registers_of(1);
  attributes->maxThreadsPerBlock = info.most_threads;
  attributes->ptxVersion = attributes->binaryVersion = device.architecture;
  attributes->maxDynamicSharedSizeBytes = shared_limit(function);
  attributes->preferredShmemCarveout = carveout == carveouts.end() ? -1 : carveout->second;
  return cudaSuccess;
}

// ---- the device's own attributes

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int index) {
  if (const cudaError_t error = check_device(index); error != cudaSuccess) return error;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = Device::shared_default;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMaxRegistersPerBlock:
      *value = Device::registers_multiprocessor;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      break;
    case cudaDevAttrMaxThreadsPerMultiProcessor:
      *value = device.threads_multiprocessor;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.architecture / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.architecture % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device.shared_multiprocessor;
      break;
    case cudaDevAttrMaxRegistersPerMultiprocessor:
      *value = Device::registers_multiprocessor;
      break;
    case cudaDevAttrCooperativeLaunch:
      *value = device.cooperative;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_optin;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = device.blocks_multiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = device.shared_reserved();
      break;
    default:
      return record_error(cudaErrorInvalidValue, format("unknown device attribute %d", attribute));
  }
  return cudaSuccess;
}

cudaError_t device_properties(cudaDeviceProp* p, int index) {
  if (const cudaError_t error = check_device(index); error != cudaSuccess) return error;
  *p = cudaDeviceProp{};
  std::snprintf(p->name, sizeof p->name, "CUDA on host (sm_%d)", device.architecture);
  p->totalGlobalMem = Device::memory;
  p->sharedMemPerBlock = Device::shared_default;
  p->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_optin);
  p->sharedMemPerMultiprocessor = static_cast<size_t>(device.shared_multiprocessor);
  p->reservedSharedMemPerBlock = static_cast<size_t>(device.shared_reserved());
  p->regsPerBlock = p->regsPerMultiprocessor = Device::registers_multiprocessor;
  p->warpSize = 32;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsPerMultiProcessor = device.threads_multiprocessor;
  p->maxBlocksPerMultiProcessor = device.blocks_multiprocessor;
  p->major = device.architecture / 10, p->minor = device.architecture % 10;
  p->multiProcessorCount = device.multiprocessors;
  p->cooperativeLaunch = device.cooperative;
  return cudaSuccess;
}

}  // namespace cuda_on_host
