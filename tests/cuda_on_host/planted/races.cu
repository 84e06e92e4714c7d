// Missing barriers and other unordered accesses.
#include "planted.h"

// Every thread reads what a later one writes: wrong in order, right in reverse.
template <bool Fixed>
__global__ void read_after_write(const float* x, float* y) {
  __shared__ float s[256];
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (Fixed) __syncthreads();
  y[t] = s[255 - t];
}
PLANTED(missing_barrier_read_after_write) {
  const auto x = random_values(256);
  DeviceVector<float> in(x), out(256);
  LAUNCH_EITHER(read_after_write, 1, 256, 0, in.data(), out.data());
  for (size_t i = 0; i < 256; ++i) EXPECT_NEAR(out.host()[i], x[255 - i], 0);
}

// Reads the left neighbour only, which an in-order schedule has already run.
template <bool Fixed>
__global__ void left_neighbour(const float* x, float* y) {
  L2L_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  if (Fixed) __syncthreads();
  y[t] = t > 0 ? s[t - 1] : 0.f;
}
PLANTED(missing_barrier_hidden_by_order) {
  const auto x = random_values(256);
  DeviceVector<float> in(x), out(256);
  LAUNCH_EITHER(left_neighbour, 1, 256, 1024, in.data(), out.data());
  for (size_t i = 1; i < 256; ++i) EXPECT_NEAR(out.host()[i], x[i - 1], 0);
}

// The second barrier of a loop: without it the next round overwrites what others still read.
template <bool Fixed>
__global__ void write_after_read(const float* x, float* y, int rounds) {
  __shared__ float s[256];
  const unsigned t = threadIdx.x;
  float v = x[t];
  for (int k = 0; k < rounds; ++k) {
    s[t] = v;
    __syncthreads();
    v = s[(t + 1) % 256];
    if (Fixed) __syncthreads();
  }
  y[t] = v;
}
PLANTED(missing_barrier_write_after_read) {
  const auto x = random_values(256);
  DeviceVector<float> in(x), out(256);
  LAUNCH_EITHER(write_after_read, 1, 256, 0, in.data(), out.data(), 4);
  for (size_t i = 0; i < 256; ++i) EXPECT_NEAR(out.host()[i], x[(i + 4) % 256], 0);
}

// Lanes exchange values through shared memory. A shuffle in between makes them meet, but does not order memory.
template <bool Fixed>
__global__ void exchange_in_warp(const float* x, float* y) {
  L2L_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  s[t] = x[t];
  const float other = __shfl_xor_sync(0xffffffffu, x[t], 1);
  if (Fixed) __syncwarp();
  y[t] = s[t ^ 1u] - other;
}
PLANTED(missing_syncwarp) {
  DeviceVector<float> in(random_values(64)), out(64);
  LAUNCH_EITHER(exchange_in_warp, 1, 64, 256, in.data(), out.data());
  for (float v : out.host()) EXPECT(v == 0.f);
}

// Blocks read each other's results of the first phase.
template <bool Fixed>
__global__ void two_phases(const float* x, float* rows, float* y) {
  if (threadIdx.x == 0) rows[blockIdx.x] = x[blockIdx.x];
  if (Fixed)
    cg::this_grid().sync();
  else
    __syncthreads();
  y[blockIdx.x * blockDim.x + threadIdx.x] = rows[(blockIdx.x + 1) % gridDim.x];
}
PLANTED(missing_grid_sync) {
  const auto x = random_values(8);
  DeviceVector<float> in(x), rows(8), out(8 * 32);
  LAUNCH_EITHER_COOPERATIVE(two_phases, 8, 32, 0, in.data(), rows.data(), out.data());
  for (size_t i = 0; i < 256; ++i) EXPECT_NEAR(out.host()[i], x[(i / 32 + 1) % 8], 0);
}

// Threads of a block and blocks of a grid add to one number. Run one after the other they add up right all the same.
template <bool Fixed>
__global__ void add_without_atomics(int* sum) {
  if (Fixed)
    atomicAdd(sum, 1);
  else
    *sum += 1;
}
PLANTED(unsynchronized_sum) {
  DeviceVector<int> sum(std::vector<int>(1, 0));
  LAUNCH_EITHER(add_without_atomics, 4, 32, 0, sum.data());
  EXPECT(sum.host()[0] == 128);
}

// Two blocks write the same word: the last of a tensor's tiles computed with one element too many.
template <bool Fixed>
__global__ void overlapping_tiles(float* y, int n) {
  const int width = static_cast<int>(blockDim.x) - 1, t = static_cast<int>(threadIdx.x);
  const int i = static_cast<int>(blockIdx.x) * width + t;
  if (i < n && (!Fixed || t < width)) y[i] = static_cast<float>(i);
}
PLANTED(blocks_write_one_word) {
  DeviceVector<float> out(93);
  LAUNCH_EITHER(overlapping_tiles, 3, 32, 0, out.data(), 93);
  for (size_t i = 0; i < 93; ++i) EXPECT_NEAR(out.host()[i], static_cast<double>(i), 0);
}

// The block that counts itself last adds up; but only thread 0 publishes, before the others have written.
template <bool Fixed>
__global__ void last_block(const float* x, float* partial, unsigned* arrived, float* out) {
  __shared__ bool last;
  const unsigned t = threadIdx.x, i = blockIdx.x * blockDim.x + t;
  partial[i] = 2.f * x[i];
  if (Fixed) __syncthreads();
  if (t == 0) {
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  out[t] = 0.f;
  for (unsigned b = 0; b < gridDim.x; ++b) out[t] += partial[b * blockDim.x + (t + 1) % blockDim.x];
}
PLANTED(published_too_early) {
  const auto x = random_values(256);
  DeviceVector<float> in(x), partial(256), out(64);
  DeviceVector<unsigned> arrived(std::vector<unsigned>(1, 0));
  LAUNCH_EITHER(last_block, 4, 64, 0, in.data(), partial.data(), arrived.data(), out.data());
  for (size_t t = 0; t < 64; ++t) {
    double sum = 0;
    for (size_t b = 0; b < 4; ++b) sum += 2.0 * x[b * 64 + (t + 1) % 64];
    EXPECT_NEAR(out.host()[t], sum, 1e-5);
  }
}

// Reads a copy before waiting for it.
template <bool Fixed>
__global__ void copy_and_read(const float* x, float* y) {
  __shared__ __align__(16) float s[128];
  const unsigned t = threadIdx.x;
  l2l::ptx::cp_async<16>(&s[4 * t], x + 4 * t);
  l2l::ptx::cp_async_commit();
  if (Fixed) l2l::ptx::cp_async_wait<0>();
  for (unsigned j = 0; j < 4; ++j) y[4 * t + j] = s[4 * t + j];
}
PLANTED(unawaited_async_copy) {
  const auto x = random_values(128);
  DeviceVector<float> in(x), out(128);
  LAUNCH_EITHER(copy_and_read, 1, 32, 0, in.data(), out.data());
  for (size_t i = 0; i < 128; ++i) EXPECT_NEAR(out.host()[i], x[i], 0);
}

// Waits, but for its own copy only, and reads that of another thread.
template <bool Fixed>
__global__ void copy_for_others(const float* x, float* y) {
  __shared__ __align__(16) float s[256];
  const unsigned t = threadIdx.x;
  l2l::ptx::cp_async<16>(&s[4 * t], x + 4 * t);
  l2l::ptx::cp_async_commit();
  l2l::ptx::cp_async_wait<0>();
  if (Fixed) __syncthreads();
  y[t] = s[255 - t];
}
PLANTED(async_copy_without_barrier) {
  const auto x = random_values(256);
  DeviceVector<float> in(x), out(64);
  LAUNCH_EITHER(copy_for_others, 1, 64, 0, in.data(), out.data());
  for (size_t i = 0; i < 64; ++i) EXPECT_NEAR(out.host()[i], x[255 - i], 0);
}
