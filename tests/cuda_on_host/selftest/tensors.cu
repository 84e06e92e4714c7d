// Two kernels of the shape the project's own have: one launch over many tensors, and a cooperative mean over all
// elements.
#include <cooperative_groups.h>

#include "cuda/compat.cuh"
#include "cuda_on_host/harness.h"

using harness::DeviceVector;
using harness::random_values;
namespace cg = cooperative_groups;

constexpr int kTile = 64, kMaxTensors = 300;

struct Tensor {
  const float* grad;
  float* param;
  long long numel;
};

// By value, as a kernel argument: 300 tensors are 8.4 KB.
struct Table {
  Tensor tensors[kMaxTensors];
  int first_tile[kMaxTensors + 1];
  int count;
};

// Tiles of 64 elements, grid-strided; each finds its tensor by binary search in the table.
__global__ void __launch_bounds__(kTile) scaled_add(const __grid_constant__ Table table, float factor) {
  __shared__ float staged[kTile];
  const int tiles = table.first_tile[table.count];
  for (int tile = static_cast<int>(blockIdx.x); tile < tiles; tile += static_cast<int>(gridDim.x)) {
    int low = 0, high = table.count;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (table.first_tile[middle] <= tile ? low : high) = middle;
    }
    const Tensor tensor = table.tensors[low];
    const long long i = static_cast<long long>(tile - table.first_tile[low]) * kTile + threadIdx.x;
    staged[threadIdx.x] = i < tensor.numel ? tensor.grad[i] : 0.f;
    __syncthreads();
    float largest = 0.f;  // of the tile: something that needs the other lanes
    for (int j = 0; j < kTile; ++j) largest = fmaxf(largest, fabsf(staged[j]));
    if (i < tensor.numel) tensor.param[i] += factor * staged[threadIdx.x] + largest;
    __syncthreads();
  }
}

CASE(many_tensors_one_launch) {
  std::vector<std::vector<float>> grads, params;
  std::vector<std::unique_ptr<DeviceVector<float>>> device_grads, device_params;
  Table table{};
  for (int k = 0; k < kMaxTensors; ++k) {
    const size_t n = 1 + static_cast<size_t>(k) * 37 % 200;
    grads.push_back(random_values(n, static_cast<unsigned>(2 * k)));
    params.push_back(random_values(n, static_cast<unsigned>(2 * k + 1)));
    device_grads.push_back(std::make_unique<DeviceVector<float>>(grads.back()));
    device_params.push_back(std::make_unique<DeviceVector<float>>(params.back()));
    table.tensors[k] = {device_grads.back()->data(), device_params.back()->data(), static_cast<long long>(n)};
    table.first_tile[k + 1] = table.first_tile[k] + static_cast<int>((n + kTile - 1) / kTile);
  }
  table.count = kMaxTensors;
  const auto launches = cuda_on_host_counter("launches"), copies = cuda_on_host_counter("copies");
  LAUNCH(scaled_add, 40, kTile, 0, table, 0.5f);
  EXPECT(cuda_on_host_counter("launches") == launches + 1);
  EXPECT(cuda_on_host_counter("copies") == copies);
  for (size_t k = 0; k < kMaxTensors; ++k) {
    const auto result = device_params[k]->host();
    for (size_t i = 0; i < result.size(); ++i) {
      float largest = 0.f;
      for (size_t j = i / kTile * kTile; j < std::min(result.size(), (i / kTile + 1) * kTile); ++j)
        largest = fmaxf(largest, fabsf(grads[k][j]));
      EXPECT_NEAR(result[i], params[k][i] + 0.5 * grads[k][i] + largest, 1e-5);
    }
  }
}

// Phase one: every block sums its share into a row of the workspace. Phase two: every block adds the rows in the same
// order and subtracts the mean. The same bits whatever the number of threads that run at once.
__global__ void subtract_mean(float* x, float* rows, size_t n) {
  L2L_DYNAMIC_SHARED(float, partial);
  const cg::grid_group grid = cg::this_grid();
  const size_t stride = static_cast<size_t>(gridDim.x) * blockDim.x, first = grid.thread_rank();
  float sum = 0.f;
  for (size_t i = first; i < n; i += stride) sum += x[i];
#pragma unroll
  for (int m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.f;
    for (unsigned w = 0; w < blockDim.x / 32; ++w) total += partial[w];
    rows[blockIdx.x] = total;
  }
  grid.sync();
  float total = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) total += rows[b];
  const float mean = total / static_cast<float>(n);
  for (size_t i = first; i < n; i += stride) x[i] -= mean;
}

CASE(cooperative_mean) {
  const size_t n = 10000;
  const auto x = random_values(n, 5, 0.f, 4.f);
  double mean = 0;
  for (float v : x) mean += v / static_cast<double>(n);
  int blocks = 0, multiprocessors = 0;
  EXPECT(cuda_on_host_set_device("sm_90,multiprocessors=2") == 0);
  CUDA(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, subtract_mean, 128, 4 * sizeof(float)));
  CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  const unsigned grid = static_cast<unsigned>(blocks * multiprocessors);
  EXPECT(grid == 8);
  DeviceVector<float> data(x), rows(grid);
  LAUNCH_COOPERATIVE(subtract_mean, grid, 128, 4 * sizeof(float), data.data(), rows.data(), n);
  const auto result = data.host();
  for (size_t i = 0; i < n; ++i) EXPECT_NEAR(result[i], x[i] - mean, 1e-5);

  // Through an array of pointers to arguments.
  DeviceVector<float> again(x);
  float *px = again.data(), *pr = rows.data();
  size_t count = n;
  void* arguments[] = {&px, &pr, &count};
  CUDA(cudaLaunchCooperativeKernel(subtract_mean, dim3(grid), dim3(128), arguments, 4 * sizeof(float), nullptr));
  EXPECT(again.host() == result);
}

// Each resident block has static shared memory of its own, also across grid.sync().
__global__ void keep_across_grid_sync(int* out) {
  __shared__ int mine[32];
  mine[threadIdx.x] = static_cast<int>(1000 * blockIdx.x + threadIdx.x);
  cg::this_grid().sync();
  out[blockIdx.x * 32 + threadIdx.x] = mine[31 - threadIdx.x];
}

#if !defined(__SANITIZE_THREAD__) || defined(CUDA_ON_HOST_ACCESS_CHECK)  // ThreadSanitizer sees one array, not eight
CASE(static_memory_of_resident_blocks) {
  DeviceVector<int> out(8 * 32);
  LAUNCH_COOPERATIVE(keep_across_grid_sync, 8, 32, 0, out.data());
  for (int i = 0; i < 256; ++i) EXPECT(out.host()[static_cast<size_t>(i)] == 1000 * (i / 32) + 31 - i % 32);
}
#endif
