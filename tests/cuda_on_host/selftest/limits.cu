// What must be refused: launch shapes over the limits of the pretend device, and misuse of the host functions.
#include "cuda/launch.cuh"
#include "cuda_on_host/harness.h"

#include <cstring>

// Whether memory lies between inaccessible pages; under the compiler's sanitizers a stray access is theirs to report.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CUDA_ON_HOST_PAGES 0
#else
#define CUDA_ON_HOST_PAGES 1
#endif

using harness::DeviceVector;

__global__ void nothing() {}
__global__ void touch(float* x) {
  L2L_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = 1.f;
  x[threadIdx.x] = s[threadIdx.x];
}
__global__ void touch_static(float* x) {
  __shared__ float s[512];  // 2,048 bytes
  s[threadIdx.x] = 2.f;
  x[threadIdx.x] = s[threadIdx.x];
}
template <int N>
__global__ void touch_both(float* x) {
  __shared__ float fixed[N];
  L2L_DYNAMIC_SHARED(float, s);
  s[threadIdx.x] = 1.f;
  fixed[threadIdx.x % N] = s[threadIdx.x];
  x[threadIdx.x] = s[threadIdx.x];
}
__global__ void misaligned(float* x) { *reinterpret_cast<float4*>(x + 1) = float4{}; }
struct Large {
  char bytes[32768];
};
__global__ void take(Large) {}
template <int N>
struct Bytes {
  char bytes[N];
};
__global__ void take_small(Bytes<4096>) {}
__global__ void take_more(Bytes<4104>) {}
template <int N, int M>
struct Threads {
  static constexpr int count = N * M;
};
template <int N, int M>
__global__ void __launch_bounds__(Threads<N, M>::count, 2) bounded(float* x) {
  x[threadIdx.x] = 1.f;
}
__global__ void __launch_bounds__(128) bounded_128(float* x) { x[threadIdx.x] = 1.f; }
static void host_function(float*) {}

static void expect_refused(cudaError_t actual, cudaError_t expected, const char* words, int line) {
  const cudaError_t pending = cudaGetLastError();
  if (actual != expected || pending != expected || cudaGetLastError() != cudaSuccess)
    harness::fail(__FILE__, line, (std::string("returned ") + cudaGetErrorName(actual)).c_str());
  if (std::strstr(cuda_on_host_message(), words) == nullptr) harness::fail(__FILE__, line, cuda_on_host_message());
}
#define EXPECT_REFUSED(call, error, words) expect_refused((call), error, words, __LINE__)

// An error of device code: every later call returns it, and cudaGetLastError() does not clear it.
static void expect_fatal(cudaError_t actual, cudaError_t expected, int line) {
  void* memory = nullptr;
  int device = 0;
  if (actual != expected || cudaGetLastError() != expected || cudaGetLastError() != expected ||
      cudaMalloc(&memory, 4) != expected || cudaDeviceSynchronize() != expected || cudaGetDevice(&device) != expected ||
      harness::launch(false, nothing, 1, 32, 0) != expected)
    harness::fail(__FILE__, line, (std::string("returned ") + cudaGetErrorName(actual)).c_str());
  if (cuda_on_host_take_error() != expected || cudaGetLastError() != cudaSuccess)
    harness::fail(__FILE__, line, "the error could not be taken");
}
#define EXPECT_FATAL(call, error) expect_fatal((call), error, __LINE__)

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
  EXPECT_FATAL(launch(false, touch, 1, 32, 0, x.data()), cudaErrorInvalidValue);
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

// The limit is one of static and dynamic shared memory together: of 48 KiB, of what the attribute may allow, of what a
// launch may ask for, of what is resident.
CASE(static_shared_memory_counts) {
  using harness::launch;
  cuda_on_host_set_device("sm_86,multiprocessors=1");
  DeviceVector<float> x(64);
  cudaFuncAttributes attributes;
  CUDA(cudaFuncGetAttributes(&attributes, touch));
  EXPECT(attributes.sharedSizeBytes == 0);
  CUDA(cudaFuncGetAttributes(&attributes, touch_static));
  EXPECT(attributes.sharedSizeBytes == 2048 && attributes.maxDynamicSharedSizeBytes == 49152 - 2048);
  CUDA(cudaFuncGetAttributes(&attributes, touch_both<64>));
  EXPECT(attributes.sharedSizeBytes == 256);
  CUDA(cudaFuncGetAttributes(&attributes, touch_both<1024>));  // another instance, with its own
  EXPECT(attributes.sharedSizeBytes == 4096);
  CUDA(launch(false, touch_both<64>, 1, 64, 49152 - 256, x.data()));
  EXPECT_REFUSED(launch(false, touch_both<64>, 1, 64, 49152 - 255, x.data()), cudaErrorInvalidValue, "256 of static");
  constexpr int kMost = 99 * 1024;
  const auto most_dynamic = cudaFuncAttributeMaxDynamicSharedMemorySize;
  EXPECT_REFUSED(cudaFuncSetAttribute(touch_both<64>, most_dynamic, kMost), cudaErrorInvalidValue, "256 of static");
  EXPECT_REFUSED(cudaFuncSetAttribute(touch_both<64>, most_dynamic, kMost - 255), cudaErrorInvalidValue, "leaves");
  CUDA(cudaFuncSetAttribute(touch_both<64>, most_dynamic, kMost - 256));
  CUDA(launch(false, touch_both<64>, 1, 64, kMost - 256, x.data()));
  int blocks = 0;
  CUDA(cudaFuncSetAttribute(touch_both<1024>, most_dynamic, 48 * 1024));
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch_both<1024>, 64, 48 * 1024));
  EXPECT(blocks == 1);  // 48 + 4 + 1 KiB twice are more than 100
  EXPECT_REFUSED(launch(true, touch_both<1024>, 2, 64, 48 * 1024, x.data()), cudaErrorCooperativeLaunchTooLarge,
                 "1 can be resident");
  CUDA(cudaFuncSetAttribute(touch_both<64>, most_dynamic, 48 * 1024));
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch_both<64>, 64, 48 * 1024));
  EXPECT(blocks == 2);
  cuda_on_host_set_device("sm_90");
}

CASE(function_attributes) {
  EXPECT_REFUSED(cudaFuncSetAttribute(touch, cudaFuncAttributeMaxDynamicSharedMemorySize, -1), cudaErrorInvalidValue,
                 "-1 bytes");
  EXPECT_REFUSED(cudaFuncSetAttribute(touch, static_cast<cudaFuncAttribute>(99), 1), cudaErrorInvalidValue,
                 "unknown attribute 99");
  EXPECT_REFUSED(cudaFuncSetAttribute(touch, cudaFuncAttributePreferredSharedMemoryCarveout, 101),
                 cudaErrorInvalidValue, "carveout");
  CUDA(cudaFuncSetAttribute(touch, cudaFuncAttributePreferredSharedMemoryCarveout, 100));
  cudaFuncAttributes attributes;
  EXPECT_REFUSED(cudaFuncGetAttributes(&attributes, host_function), cudaErrorInvalidDeviceFunction, "no kernel");
  int blocks = 0;
  EXPECT_REFUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch, 0, 0), cudaErrorInvalidValue,
                 "blocks of 0 threads");
  EXPECT_REFUSED(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch, 2048, 0), cudaErrorInvalidValue,
                 "blocks of 2048 threads");
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, touch, 32, 60 * 1024 * 1024));
  EXPECT(blocks == 0);  // not an error, as in the driver: the launch would be
}

CASE(launches_of_what_is_no_kernel) {
  DeviceVector<float> x(32);
  EXPECT_REFUSED(harness::launch(false, host_function, 1, 32, 0, x.data()), cudaErrorInvalidDeviceFunction,
                 "no kernel");
  EXPECT_REFUSED(harness::launch(false, static_cast<void (*)(float*)>(nullptr), 1, 32, 0, x.data()),
                 cudaErrorInvalidDeviceFunction, "no kernel");
}

CASE(launch_bounds) {
  using harness::launch;
  DeviceVector<float> x(256);
  cudaFuncAttributes attributes;
  CUDA(cudaFuncGetAttributes(&attributes, nothing));
  EXPECT(attributes.maxThreadsPerBlock == 1024);
  CUDA(cudaFuncGetAttributes(&attributes, bounded<8, 20>));
  EXPECT(attributes.maxThreadsPerBlock == 160);
  CUDA(cudaFuncGetAttributes(&attributes, bounded<8, 8>));
  EXPECT(attributes.maxThreadsPerBlock == 64);
  CUDA(launch(false, bounded<8, 20>, 1, 160, 0, x.data()));
  EXPECT_REFUSED(launch(false, bounded<8, 20>, 1, 161, 0, x.data()), cudaErrorInvalidConfiguration, "bound of 160");
  CUDA(launch(false, bounded_128, 1, 128, 0, x.data()));
  EXPECT_REFUSED(launch(false, bounded_128, 1, 256, 0, x.data()), cudaErrorInvalidConfiguration, "bound of 128");
  int blocks = -1;
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, bounded_128, 256, 0));
  EXPECT(blocks == 0);
}

// The package's own use of these calls: it fills what static shared memory leaves, to the byte, and says what it lacks.
CASE(resident_blocks) {
  EXPECT(cuda_on_host_set_device("sm_75,multiprocessors=3") == 0);
  l2l::Config config{};
  config.hidden = 20, config.layers = 2;
  DeviceVector<float> x(64);
  constexpr int kMost = 64 * 1024 - 8 * 128;
  int blocks = 0;
  l2l::LaunchStatus status = l2l::resident_blocks(&touch_both<256>, 64, kMost, &blocks);
  EXPECT(status == cudaSuccess && blocks == 3);
  CUDA(l2l::launch(&touch_both<256>, 1, 64, kMost, nullptr, x.data()));
  status = l2l::resident_blocks(&touch_both<256>, 64, kMost + 1, &blocks);
  EXPECT(status != cudaSuccess && status.shared_needed == 65537 && status.shared_available == 65536);
  const std::string lack = l2l::launch_failure(status, config);
  EXPECT(lack.find("needs 65537 bytes of shared memory") != std::string::npos && lack.find("has 65536") != lack.npos);
  // Other errors keep their names, that of shared memory's code too.
  EXPECT(l2l::launch_failure(cudaErrorInvalidConfiguration, config).find("shared memory") == std::string::npos);
  EXPECT(l2l::launch_failure(cudaErrorCooperativeLaunchTooLarge, config).find("CooperativeLaunchTooLarge") !=
         std::string::npos);
  // A block that never fits is an error, not one block.
  status = l2l::resident_blocks(&bounded_128, 256, 0, &blocks);
  EXPECT(status == cudaErrorLaunchOutOfResources && status.shared_needed == 0);
  EXPECT(cudaGetLastError() == cudaSuccess);
  cuda_on_host_set_device("sm_90");
}

CASE(registers) {
  using harness::launch;
  EXPECT(cuda_on_host_set_device("sm_80,registers=128") == 0);
  CUDA(launch(false, nothing, 1, 512, 0));
  EXPECT_REFUSED(launch(false, nothing, 1, 1024, 0), cudaErrorLaunchOutOfResources, "128 registers");
  cuda_on_host_set_device("sm_90");
}

CASE(kernel_parameters) {
  using harness::launch;
  EXPECT(cuda_on_host_set_device("sm_90,parameters=4096") == 0);  // CUDA before 12.1
  CUDA(launch(false, take_small, 1, 32, 0, Bytes<4096>{}));
  EXPECT_REFUSED(launch(false, take_more, 1, 32, 0, Bytes<4104>{}), cudaErrorInvalidValue, "more than 4096");
  cuda_on_host_set_device("sm_90");
  CUDA(launch(false, take_more, 1, 32, 0, Bytes<4104>{}));
}

CASE(cooperative_launches_need_a_device_that_has_them) {
  EXPECT(cuda_on_host_set_device("sm_90,cooperative=0") == 0);
  int value = 1;
  CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrCooperativeLaunch, 0));
  EXPECT(value == 0);
  EXPECT_REFUSED(harness::launch(true, nothing, 1, 32, 0), cudaErrorNotSupported, "no cooperative launches");
  CUDA(harness::launch(false, nothing, 1, 32, 0));
  cuda_on_host_set_device("sm_90");
}

CASE(streams_and_devices) {
  EXPECT(cuda_on_host_set_device("sm_90,devices=2") == 0);
  EXPECT_REFUSED(cudaSetDevice(2), cudaErrorInvalidDevice, "device 2");
  cudaStream_t first, second;
  CUDA(cudaStreamCreate(&first));
  CUDA(cudaSetDevice(1));
  CUDA(cudaStreamCreate(&second));
  const auto launch_on = [](cudaStream_t stream) {
    cudaLaunchConfig_t config{};
    config.gridDim = 1, config.blockDim = 32, config.stream = stream;
    return cudaLaunchKernelEx(&config, nothing);
  };
  CUDA(launch_on(second));
  EXPECT_REFUSED(launch_on(first), cudaErrorInvalidResourceHandle, "belongs to device 0");
  DeviceVector<float> here(32);
  EXPECT_REFUSED(cudaMemsetAsync(here.data(), 0, 4, first), cudaErrorInvalidResourceHandle, "belongs to device 0");
  CUDA(cudaMemsetAsync(here.data(), 0, 4, second));
  CUDA(cudaSetDevice(0));
  CUDA(launch_on(first));
  CUDA(launch_on(nullptr));
  if (CUDA_ON_HOST_PAGES) {  // the memory of another device, without peer access
    EXPECT_FATAL(harness::launch(false, touch_static, 1, 32, 0, here.data()), cudaErrorIllegalAddress);
  }
  CUDA(cudaStreamDestroy(first));
  EXPECT_REFUSED(launch_on(first), cudaErrorInvalidResourceHandle, "was destroyed");
  EXPECT_REFUSED(cudaStreamDestroy(first), cudaErrorInvalidResourceHandle, "was destroyed");
  CUDA(cudaStreamDestroy(second));
  cuda_on_host_set_device("sm_90");
}

CASE(errors_of_device_code_end_the_context) {
  if (!CUDA_ON_HOST_PAGES) return;
  DeviceVector<float> x(std::vector<float>(32, 5.f)), y(32);
  EXPECT_FATAL(harness::launch(false, misaligned, 1, 1, 0, x.data()), cudaErrorMisalignedAddress);
  for (float v : x.host()) EXPECT(isnan(v));  // nothing of it can be relied on, so nothing is left of it
  CUDA(harness::launch(false, touch_static, 1, 32, 0, y.data()));
  for (float v : y.host()) EXPECT(v == 2.f);
}

CASE(a_refused_launch_has_written_nothing) {
  DeviceVector<float> x(std::vector<float>(32, 5.f));
  EXPECT_REFUSED(harness::launch(false, touch, 1, 32, 1 << 20, x.data()), cudaErrorInvalidValue, "dynamic shared");
  for (float v : x.host()) EXPECT(v == 5.f);
}

CASE(stale_pointers) {
  if (!CUDA_ON_HOST_PAGES) return;
  float* freed = nullptr;
  CUDA(cudaMalloc(&freed, 128));
  CUDA(cudaFree(freed));
  EXPECT_REFUSED(cudaMemset(freed, 0, 4), cudaErrorInvalidValue, "cudaMemset");
  EXPECT_REFUSED(cudaFree(freed), cudaErrorInvalidValue, "cudaFree");
  EXPECT_FATAL(harness::launch(false, touch_static, 1, 32, 0, freed), cudaErrorIllegalAddress);
}

CASE(every_architecture) {
  const struct {
    const char* name;
    int optin, multiprocessor;
  } known[] = {{"sm_75", 64, 64},    {"sm_80", 163, 164}, {"sm_86", 99, 100},   {"sm_87", 163, 164},
               {"sm_89", 99, 100},   {"sm_90", 227, 228}, {"sm_100", 227, 228}, {"sm_103", 227, 228},
               {"sm_110", 227, 228}, {"sm_120", 99, 100}, {"sm_121", 99, 100}};
  for (const auto& each : known) {
    EXPECT(cuda_on_host_set_device(each.name) == 0);
    int value = 0;
    CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
    EXPECT(value == each.optin * 1024);
    CUDA(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerMultiprocessor, 0));
    EXPECT(value == each.multiprocessor * 1024);
  }
  cuda_on_host_set_device("sm_90");
}
