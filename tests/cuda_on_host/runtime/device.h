// The pretend device: the limits a launch is checked against. Chosen by CUDA_ON_HOST_DEVICE or cuda_on_host_set_device,
// "sm_90" or "sm_80,multiprocessors=8,registers=64": few multiprocessors by default, so that cooperative grids stay
// small.
#pragma once

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "errors.h"

namespace cuda_on_host {

struct Device {
  int architecture = 90;          // compute capability, times ten
  int shared_optin = 227 * 1024;  // dynamic shared memory a block may ask for
  int shared_multiprocessor = 228 * 1024;
  int threads_multiprocessor = 2048, blocks_multiprocessor = 32;
  int multiprocessors = 4;
  int registers_thread = 128;  // assumed of every kernel, for occupancy only
  static constexpr int shared_default = 48 * 1024, shared_reserved = 1024, registers_multiprocessor = 65536;
};

// Programming guide, table "Technical specifications per compute capability".
inline const Device kDevices[] = {
    {75, 64 * 1024, 64 * 1024, 1024, 16},   {80, 163 * 1024, 164 * 1024, 2048, 32},
    {86, 99 * 1024, 100 * 1024, 1536, 16},  {89, 99 * 1024, 100 * 1024, 1536, 24},
    {90, 227 * 1024, 228 * 1024, 2048, 32}, {100, 227 * 1024, 228 * 1024, 2048, 32},
    {120, 99 * 1024, 100 * 1024, 1536, 24},
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

// Dynamic shared memory allowed to each kernel by cudaFuncSetAttribute, beyond the default.
inline std::map<const void*, int> allowed_shared;

inline int shared_limit(const void* function) {
  const auto found = allowed_shared.find(function);
  return found == allowed_shared.end() ? Device::shared_default : std::max(found->second, Device::shared_default);
}

cudaError_t set_function_attribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || value > device.shared_optin)
    return record_error(
        cudaErrorInvalidValue,
        format("cudaFuncSetAttribute(%d, %d): the device allows up to %d bytes of dynamic shared memory", attribute,
               value, device.shared_optin));
  allowed_shared[function] = value;
  return cudaSuccess;
}

// Resident blocks per multiprocessor, by threads, registers (assumed), shared memory and the number of blocks. Static
// shared memory is not known here and counts as none.
inline int resident_blocks(int threads, size_t dynamic_bytes) {
  const int warps = (threads + 31) / 32;
  const int by_threads = device.threads_multiprocessor / (warps * 32);
  const int by_registers = Device::registers_multiprocessor / (warps * 32 * ((device.registers_thread + 7) / 8 * 8));
  const int by_shared =
      static_cast<int>(static_cast<size_t>(device.shared_multiprocessor) / (dynamic_bytes + Device::shared_reserved));
  return std::min({by_threads, by_registers, by_shared, device.blocks_multiprocessor});
}

cudaError_t occupancy(int* blocks, const void* function, int threads, size_t dynamic_bytes) {
  if (threads <= 0 || threads > 1024)
    return record_error(cudaErrorInvalidValue, format("occupancy of blocks of %d threads", threads));
  *blocks = dynamic_bytes > static_cast<size_t>(shared_limit(function)) ? 0 : resident_blocks(threads, dynamic_bytes);
  return cudaSuccess;
}

cudaError_t device_attribute(int* value, cudaDeviceAttr attribute, int index) {
  if (index != 0) return record_error(cudaErrorInvalidDevice, format("device %d: there is one device, 0", index));
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
      *value = 1;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device.shared_optin;
      break;
    case cudaDevAttrMaxBlocksPerMultiprocessor:
      *value = device.blocks_multiprocessor;
      break;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = Device::shared_reserved;
      break;
    default:
      return record_error(cudaErrorInvalidValue, format("unknown device attribute %d", attribute));
  }
  return cudaSuccess;
}

cudaError_t device_properties(cudaDeviceProp* p, int index) {
  if (index != 0) return record_error(cudaErrorInvalidDevice, format("device %d: there is one device, 0", index));
  *p = cudaDeviceProp{};
  std::snprintf(p->name, sizeof p->name, "CUDA on host (sm_%d)", device.architecture);
  p->totalGlobalMem = size_t{1} << 34;
  p->sharedMemPerBlock = Device::shared_default;
  p->sharedMemPerBlockOptin = static_cast<size_t>(device.shared_optin);
  p->sharedMemPerMultiprocessor = static_cast<size_t>(device.shared_multiprocessor);
  p->reservedSharedMemPerBlock = Device::shared_reserved;
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
  p->cooperativeLaunch = 1;
  return cudaSuccess;
}

}  // namespace cuda_on_host
