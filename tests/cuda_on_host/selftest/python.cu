// Entry points for the tests in Python: C functions that launch kernels.
#include "cuda/ptx.cuh"

__global__ void scale_kernel(float* x, long long n, float factor) {
  L2L_DYNAMIC_SHARED(float, staged);
  const long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  staged[threadIdx.x] = i < n ? x[i] : 0.f;
  __syncthreads();
  const float mirrored = staged[blockDim.x - 1 - threadIdx.x];
  __syncthreads();
  staged[blockDim.x - 1 - threadIdx.x] = mirrored * factor;
  __syncthreads();
  if (i < n) x[i] = staged[threadIdx.x];
}

// x[0 .. n) *= factor.
extern "C" void scale(float* x, long long n, float factor) {
  cudaLaunchConfig_t config{};
  config.blockDim = 128;
  config.gridDim = static_cast<unsigned>((n + 127) / 128);
  config.dynamicSmemBytes = 128 * sizeof(float);
  cudaLaunchKernelEx(&config, scale_kernel, x, n, factor);
}

// out[1 ..]: the threads of the grid in the order in which they get here; out[0] counts them. No atomic operation, at
// which threads might take turns: here one thread runs at a time.
__global__ void record_order_kernel(int* out) {
  const int place = out[0]++;
  out[1 + place] = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

extern "C" void record_order(int* out) {
  cudaLaunchConfig_t config{};
  config.blockDim = 64;
  config.gridDim = 4;
  cudaLaunchKernelEx(&config, record_order_kernel, out);
}

// Conversions, for tests over all values.
extern "C" void convert_bits(const float* x, unsigned short* half, unsigned short* bfloat16, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    half[i] = __half_as_ushort(__float2half_rn(x[i]));
    bfloat16[i] = __bfloat16_as_ushort(__float2bfloat16_rn(x[i]));
  }
}
extern "C" void expand_bits(const unsigned short* bits, float* from_half, float* from_bfloat16, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    from_half[i] = __half2float(__ushort_as_half(bits[i]));
    from_bfloat16[i] = __bfloat162float(__ushort_as_bfloat16(bits[i]));
  }
}
