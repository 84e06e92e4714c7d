// The execution model: indices, barriers, shared memory, warp operations, atomics, templates, launches.
#include "cuda/compat.cuh"
#include "cuda_on_host/harness.h"

using harness::DeviceVector;
using harness::random_values;

__global__ void write_indices(int* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] =
      static_cast<int>(blockIdx.x + 10 * blockIdx.y + 100 * blockIdx.z + 1000 * threadIdx.x + 10000 * threadIdx.y +
                       100000 * threadIdx.z);
}

CASE(indices) {
  const dim3 grid(3, 2, 2), block(4, 3, 2);
  DeviceVector<int> out(12 * 24);
  LAUNCH(write_indices, grid, block, 0, out.data());
  const auto values = out.host();
  int at = 0;
  for (int bz = 0; bz < 2; ++bz)
    for (int by = 0; by < 2; ++by)
      for (int bx = 0; bx < 3; ++bx)
        for (int tz = 0; tz < 2; ++tz)
          for (int ty = 0; ty < 3; ++ty)
            for (int tx = 0; tx < 4; ++tx)
              EXPECT(values[static_cast<size_t>(at++)] ==
                     bx + 10 * by + 100 * bz + 1000 * tx + 10000 * ty + 100000 * tz);
}

__global__ void block_sums(const float* __restrict__ x, float* out, int n) {
  L2L_DYNAMIC_SHARED(float, sums);
  const int t = static_cast<int>(threadIdx.x), i = static_cast<int>(blockIdx.x * blockDim.x) + t;
  sums[t] = i < n ? x[i] : 0.f;
  __syncthreads();
  for (int half = static_cast<int>(blockDim.x) / 2; half > 0; half /= 2) {
    if (t < half) sums[t] += sums[t + half];
    __syncthreads();
  }
  if (t == 0) out[blockIdx.x] = sums[0];
}

CASE(dynamic_shared_memory) {
  const auto x = random_values(1000);
  DeviceVector<float> in(x), out(4);
  LAUNCH(block_sums, 4, 256, 256 * sizeof(float), in.data(), out.data(), 1000);
  for (size_t b = 0; b < 4; ++b) {
    double sum = 0;
    for (size_t i = 256 * b; i < 256 * (b + 1) && i < 1000; ++i) sum += x[i];
    EXPECT_NEAR(out.host()[b], sum, 1e-4);
  }
}

// Two static arrays in a template, of a size that depends on its parameter.
template <int N>
__global__ void __launch_bounds__(N) reverse_twice(const float* x, float* y) {
  __shared__ __align__(16) float first[N];
  __shared__ float second[2][N / 2];
  const int t = static_cast<int>(threadIdx.x);
  first[t] = x[blockIdx.x * N + threadIdx.x];
  __syncthreads();
  second[t / (N / 2)][t % (N / 2)] = first[N - 1 - t] + 1.f;
  __syncthreads();
  const int r = N - 1 - t;
  y[blockIdx.x * N + threadIdx.x] = second[r / (N / 2)][r % (N / 2)];
}

CASE(static_shared_memory) {
  const auto x = random_values(640);
  DeviceVector<float> in(x), out(640);
  LAUNCH(reverse_twice<64>, 10, 64, 0, in.data(), out.data());
  const auto first = out.host();
  LAUNCH(reverse_twice<128>, 5, 128, 0, in.data(), out.data());
  const auto second = out.host();
  for (size_t i = 0; i < 640; ++i) {
    EXPECT_NEAR(first[i], x[i] + 1.f, 0);
    EXPECT_NEAR(second[i], x[i] + 1.f, 0);
  }
}

__global__ void shuffles(const float* x, float* all, float* down, float* up, int* broadcast, unsigned* votes) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  const float v = x[i];
  float sum = v;
#pragma unroll
  for (int m = 16; m > 0; m /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, m);
  all[i] = sum;
  down[i] = __shfl_down_sync(0xffffffffu, v, 3, 16);
  up[i] = __shfl_up_sync(0xffffffffu, v, 3);
  broadcast[i] = __shfl_sync(0xffffffffu, static_cast<int>(i), 5, 8);
  votes[i] = __ballot_sync(0xffffffffu, v > 0.f);
  if (__any_sync(0xffffffffu, v > 100.f) || !__all_sync(0xffffffffu, v < 100.f)) votes[i] = 0xdeadbeefu;
  if (lane < 16) {  // half a warp on its own
    const unsigned same = __match_any_sync(0x0000ffffu, static_cast<int>(lane / 4));
    if (same != 0xfu << (lane / 4 * 4)) votes[i] = 0xdeadbeefu;
  } else if (__reduce_add_sync(0xffff0000u, lane) != 376u) {
    votes[i] = 0xdeadbeefu;
  }
}

CASE(warp_operations) {
  const size_t n = 256;
  const auto x = random_values(n);
  DeviceVector<float> in(x), all(n), down(n), up(n);
  DeviceVector<int> broadcast(n);
  DeviceVector<unsigned> votes(n);
  LAUNCH(shuffles, 2, 128, 0, in.data(), all.data(), down.data(), up.data(), broadcast.data(), votes.data());
  const auto a = all.host(), d = down.host(), u = up.host();
  for (size_t i = 0; i < n; ++i) {
    const size_t warp = i / 32 * 32, lane = i % 32;
    double sum = 0;
    unsigned positive = 0;
    for (size_t l = 0; l < 32; ++l) {
      sum += x[warp + l];
      if (x[warp + l] > 0.f) positive |= 1u << l;
    }
    EXPECT_NEAR(a[i], sum, 1e-4);
    EXPECT_NEAR(d[i], lane % 16 < 13 ? x[i + 3] : x[i], 0);
    EXPECT_NEAR(u[i], lane >= 3 ? x[i - 3] : x[i], 0);
    EXPECT(broadcast.host()[i] == static_cast<int>(i / 8 * 8 + 5));
    EXPECT(votes.host()[i] == positive);
  }
}

__global__ void count_and_vote(const int* x, int* out) {
  const int v = x[threadIdx.x];
  const int count = __syncthreads_count(v), any = __syncthreads_or(v), all = __syncthreads_and(v);
  if (threadIdx.x == 0) out[0] = count, out[1] = any, out[2] = all;
}

CASE(barrier_votes) {
  std::vector<int> x(96, 0);
  DeviceVector<int> out(3);
  for (size_t ones : {0u, 40u, 96u}) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = i < ones;
    DeviceVector<int> in(x);
    LAUNCH(count_and_vote, 1, 96, 0, in.data(), out.data());
    EXPECT(out.host() == (std::vector<int>{static_cast<int>(ones), ones > 0, ones == 96}));
  }
}

__global__ void histogram(const float* x, float* sums, int* counts, unsigned* largest, unsigned long long* total) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  atomicAdd(&sums[i % 8], x[i]);
  atomicAdd(&counts[i % 8], 1);
  atomicMax(largest, i);
  atomicAdd(total, 1ull << 33);
}

CASE(atomics) {
  const auto x = random_values(4096);
  DeviceVector<float> in(x), sums(std::vector<float>(8, 0.f));
  DeviceVector<int> counts(std::vector<int>(8, 0));
  DeviceVector<unsigned> largest(std::vector<unsigned>(1, 0));
  DeviceVector<unsigned long long> total(std::vector<unsigned long long>(1, 0));
  LAUNCH(histogram, 16, 256, 0, in.data(), sums.data(), counts.data(), largest.data(), total.data());
  for (size_t b = 0; b < 8; ++b) {
    double sum = 0;
    for (size_t i = b; i < x.size(); i += 8) sum += x[i];
    EXPECT_NEAR(sums.host()[b], sum, 1e-3);
    EXPECT(counts.host()[b] == 512);
  }
  EXPECT(largest.host()[0] == 4095);
  EXPECT(total.host()[0] == 4096ull << 33);
}

// The block that arrives last adds up what the others left: ordered by a fence and an atomic counter.
__global__ void last_block_sums(const float* x, float* partial, unsigned* arrived, float* out) {
  L2L_DYNAMIC_SHARED(float, sums);
  __shared__ bool last;
  const unsigned t = threadIdx.x;
  sums[t] = x[blockIdx.x * blockDim.x + t];
  __syncthreads();
  if (t == 0) {
    float sum = 0.f;
    for (unsigned i = 0; i < blockDim.x; ++i) sum += sums[i];
    partial[blockIdx.x] = sum;
    __threadfence();
    last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && t == 0) {
    __threadfence();
    float sum = 0.f;
    for (unsigned b = 0; b < gridDim.x; ++b) sum += partial[b];
    *out = sum;
  }
}

CASE(last_block) {
  const auto x = random_values(640);
  DeviceVector<float> in(x), partial(10), out(1);
  DeviceVector<unsigned> arrived(std::vector<unsigned>(1, 0));
  LAUNCH(last_block_sums, 10, 64, 64 * sizeof(float), in.data(), partial.data(), arrived.data(), out.data());
  double sum = 0;
  for (float v : x) sum += v;
  EXPECT_NEAR(out.host()[0], sum, 1e-4);
}

// Waits for a flag that another thread sets: needs threads to take turns.
__global__ void hand_over(int* flag, int* out) {
  if (threadIdx.x == 63) {
    *out = 42;
    __threadfence();
    atomicExch(flag, 1);
  } else if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(20);
    __threadfence();
    out[1] = out[0] + 1;
  }
}

CASE(spinning) {
  DeviceVector<int> flag(std::vector<int>(1, 0)), out(2);
  LAUNCH(hand_over, 1, 64, 0, flag.data(), out.data());
  EXPECT(out.host() == (std::vector<int>{42, 43}));
}

__global__ void scale4(const float4* x, float4* y, float s, size_t n) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float4 v = __ldg(x + i);
  v.x *= s, v.y *= s + 1, v.z *= s + 2, v.w *= s + 3;
  __stcs(y + i, v);
}

CASE(vector_loads) {
  const auto x = random_values(400);
  DeviceVector<float> in(x), out(400);
  LAUNCH(scale4, 2, 64, 0, reinterpret_cast<const float4*>(in.data()), reinterpret_cast<float4*>(out.data()), 2.f,
         size_t{100});
  for (size_t i = 0; i < 400; ++i) EXPECT_NEAR(out.host()[i], x[i] * (2.f + static_cast<float>(i % 4)), 1e-6);
}

__constant__ float factors[4];

template <int R, bool Square>
__global__ void polynomial(const float* x, float* y, const __grid_constant__ int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float sum = 0.f;
#pragma unroll
  for (int r = R - 1; r >= 0; --r) sum = fmaf(sum, x[i], factors[r]);
  if constexpr (Square) sum *= sum;
  y[i] = sum;
}

CASE(templates_and_constants) {
  const float values[4] = {1.f, 2.f, 3.f, 4.f};
  CUDA(cudaMemcpyToSymbol(factors, values, sizeof values));
  const auto x = random_values(300);
  DeviceVector<float> in(x), out(300);
  LAUNCH((polynomial<4, true>), 3, 128, 0, in.data(), out.data(), 300);
  for (size_t i = 0; i < 300; ++i) {
    const double p = 1 + x[i] * (2 + x[i] * (3 + x[i] * 4.0));
    EXPECT_NEAR(out.host()[i], p * p, 1e-3 * (1 + p * p));
  }
}

// Shared memory starts as NaN in every block, whatever the one before left there.
__global__ void look_at_fresh_memory(const float* x, int* nans) {
  L2L_DYNAMIC_SHARED(float, dynamic);
  __shared__ float fixed[32];
  const unsigned t = threadIdx.x;
  nans[blockIdx.x * 32 + t] = isnan(dynamic[t]) + isnan(fixed[t]);
  dynamic[t] = fixed[t] = x[t];
}

#if !defined(CUDA_ON_HOST_ACCESS_CHECK)  // which refuses such a read
CASE(poison) {
  DeviceVector<float> in(random_values(32));
  DeviceVector<int> nans(320);
  LAUNCH(look_at_fresh_memory, 10, 32, 32 * sizeof(float), in.data(), nans.data());
  EXPECT(nans.host() == std::vector<int>(320, 2));
}
#endif
