// What must be refused: launch shapes over the limits of the pretend device, and misuse of the host functions.
#include "cuda/compat.cuh"
#include "cuda_on_host/harness.h"

#include <cstring>

using harness::DeviceVector;

__global__ void nothing() {}
__global__ void touch(float* x) {
  L2L_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = 1.f;
  x[threadIdx.x] = s[threadIdx.x];
}
struct Large {
  char bytes[32768];
};
__global__ void take(Large) {}

static void expect_refused(cudaError_t actual, cudaError_t expected, const char* words, int line) {
  const cudaError_t pending = cudaGetLastError();
  if (actual != expected || pending != expected || cudaGetLastError() != cudaSuccess)
    harness::fail(__FILE__, line, (std::string("returned ") + cudaGetErrorName(actual)).c_str());
  if (std::strstr(cuda_on_host_message(), words) == nullptr) harness::fail(__FILE__, line, cuda_on_host_message());
}
#define EXPECT_REFUSED(call, error, words) expect_refused((call), error, words, __LINE__)

CASE(launch_shapes) {
  using harness::launch;
  cuda_on_host_set_device("sm_90");
  const auto launches = cuda_on_host_counter("launches");
  EXPECT_REFUSED(launch(false, nothing, 1, 1025, 0), cudaErrorInvalidConfiguration, "at most 1024");
  EXPECT_REFUSED(launch(false, nothing, 1, dim3(64, 32), 0), cudaErrorInvalidConfiguration, "at most 1024");
  EXPECT_REFUSED(launch(false, nothing, 1, dim3(1, 1, 65), 0), cudaErrorInvalidConfiguration, "(1,1,65)");
  EXPECT_REFUSED(launch(false, nothing, 0, 32, 0), cudaErrorInvalidConfiguration, "grid of (0,1,1)");
  EXPECT_REFUSED(launch(false, nothing, dim3(1, 65536), 32, 0), cudaErrorInvalidConfiguration, "65535");
  EXPECT_REFUSED(launch(false, take, 1, 32, 0, Large{}), cudaErrorInvalidValue, "kernel parameters");
  EXPECT(cuda_on_host_counter("launches") == launches);
  EXPECT(launch(false, nothing, 1, 1024, 0) == cudaSuccess);
}

CASE(shared_memory_limits) {
  using harness::launch;
  cuda_on_host_set_device("sm_86");
  DeviceVector<float> x(32);
  EXPECT_REFUSED(launch(false, touch, 1, 32, 60000, x.data()), cudaErrorInvalidValue, "more than the 49152");
  CUDA(cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, 60000));
  CUDA(launch(false, touch, 1, 32, 60000, x.data()));
  EXPECT_REFUSED(launch(false, touch, 1, 32, 60001, x.data()), cudaErrorInvalidValue, "more than the 60000");
  EXPECT_REFUSED(cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, 102400),
                 cudaErrorInvalidValue, "101376");
  EXPECT_REFUSED(launch(false, touch, 1, 32, 0, x.data()), cudaErrorInvalidValue, "no dynamic shared memory");
  cuda_on_host_set_device("sm_90");
  CUDA(cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, 102400));
}

CASE(cooperative_limits) {
  using harness::launch;
  EXPECT(cuda_on_host_set_device("sm_80,multiprocessors=2,registers=64") == 0);
  int blocks = 0;
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch, 256, 40000));
  EXPECT(blocks == 4);  // by registers and shared memory alike
  DeviceVector<float> x(256);
  EXPECT_REFUSED(launch(true, touch, 9, 256, 40000, x.data()), cudaErrorCooperativeLaunchTooLarge, "8 can be resident");
  EXPECT(cuda_on_host_set_device("sm_42") == 1 && cuda_on_host_set_device("sm_90,nonsense=1") == 1);
  cuda_on_host_set_device("sm_90");
}

CASE(memory_functions) {
  DeviceVector<float> x(10);
  std::vector<float> host(20);
  EXPECT_REFUSED(cudaMemcpy(x.data(), host.data(), 44, cudaMemcpyHostToDevice), cudaErrorInvalidValue, "destination");
  EXPECT_REFUSED(cudaMemcpy(host.data(), x.data() + 1, 40, cudaMemcpyDeviceToHost), cudaErrorInvalidValue, "source");
  EXPECT_REFUSED(cudaMemset(x.data(), 0, 41), cudaErrorInvalidValue, "cudaMemset");
  EXPECT_REFUSED(cudaFree(x.data() + 1), cudaErrorInvalidValue, "cudaFree");
  for (float v : x.host()) EXPECT(isnan(v));
  CUDA(cudaMemset(x.data(), 0, 40));
  for (float v : x.host()) EXPECT(v == 0.f);
}

CASE(device_description) {
  EXPECT(cuda_on_host_set_device("sm_75,multiprocessors=7") == 0);
  cudaDeviceProp properties;
  CUDA(cudaGetDeviceProperties(&properties, 0));
  EXPECT(properties.major == 7 && properties.minor == 5 && properties.multiProcessorCount == 7);
  EXPECT(properties.sharedMemPerBlockOptin == 65536);
  int value = 0;
  CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  EXPECT(value == 65536);
  EXPECT_REFUSED(cudaDeviceGetAttribute(&value, cudaDevAttrWarpSize, 1), cudaErrorInvalidDevice, "device 1");
  cuda_on_host_set_device("sm_90");
}
