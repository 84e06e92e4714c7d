// Accesses outside of what was allocated, to memory nobody wrote, or misaligned.
#include "planted.h"

// The index of a static array.
template <bool Fixed>
__global__ void static_overrun(float* y) {
  __shared__ float s[64];
  const unsigned t = threadIdx.x;
  s[t] = static_cast<float>(t);
  __syncthreads();
  y[t] = s[Fixed ? (t + 1) % 64 : t + 1];
}
PLANTED(static_shared_overrun) {
  DeviceVector<float> out(64);
  LAUNCH_EITHER(static_overrun, 1, 64, 0, out.data());
  for (size_t i = 0; i < 63; ++i) EXPECT_NEAR(out.host()[i], static_cast<double>(i) + 1, 0);
}

template <bool Fixed>
__global__ void dynamic_overrun(float* y) {
  L2L_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<float>(t);
  __syncthreads();
  y[t] = s[Fixed ? (t + 1) % 64 : t + 1];
}
PLANTED(dynamic_shared_overrun) {
  DeviceVector<float> out(64);
  LAUNCH_EITHER(dynamic_overrun, 1, 64, 64 * sizeof(float), out.data());
  for (size_t i = 0; i < 63; ++i) EXPECT_NEAR(out.host()[i], static_cast<double>(i) + 1, 0);
}

// A write just past an end that is no multiple of 16 bytes.
template <bool Fixed>
__global__ void dynamic_overrun_write(float* y) {
  L2L_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  s[t] = static_cast<float>(t);
  if (!Fixed && t == 0) s[blockDim.x] = 0.f;
  __syncthreads();
  y[t] = s[t];
}
PLANTED(dynamic_shared_overrun_by_a_write) {
  DeviceVector<float> out(63);
  LAUNCH_EITHER(dynamic_overrun_write, 1, 63, 63 * sizeof(float), out.data());
  for (size_t i = 0; i < 63; ++i) EXPECT_NEAR(out.host()[i], static_cast<double>(i), 0);
}

template <bool Fixed>
__global__ void global_overrun(const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (Fixed ? i < n : i <= n) y[i] = x[i];
}
PLANTED(global_overrun) {  // a whole number of 16-byte units
  DeviceVector<float> in(random_values(100)), out(100);
  LAUNCH_EITHER(global_overrun, 1, 128, 0, in.data(), out.data(), 100);
}
PLANTED(global_overrun_by_a_write) {
  DeviceVector<float> in(random_values(102)), out(101);
  LAUNCH_EITHER(global_overrun, 1, 128, 0, in.data(), out.data(), 101);
}

// One row is never written: with poison the result is NaN.
template <bool Fixed>
__global__ void sum_unwritten(const float* x, float* y) {
  L2L_DYNAMIC_SHARED(float, s);
  const unsigned t = threadIdx.x;
  if (Fixed || t < 63) s[t] = x[t];
  __syncthreads();
  float sum = 0.f;
  for (unsigned i = 0; i < 64; ++i) sum += s[i];
  y[blockIdx.x * 64 + t] = sum;
}
PLANTED(uninitialised_shared_memory) {
  const auto x = random_values(64);
  double sum = 0;
  for (float v : x) sum += v;
  DeviceVector<float> in(x), out(128);
  LAUNCH_EITHER(sum_unwritten, 2, 64, 64 * sizeof(float), in.data(), out.data());
  for (float v : out.host()) EXPECT_NEAR(v, sum, 1e-4);
}

// The unwritten value only decides a comparison, where NaN gives the expected answer.
template <bool Fixed>
__global__ void compare_unwritten(const float* x, float* y) {
  __shared__ float limit[64];
  const unsigned t = threadIdx.x;
  if (Fixed || t % 2 == 0) limit[t] = 100.f;
  __syncthreads();
  y[t] = x[t] > limit[t] ? limit[t] : x[t];
}
PLANTED(uninitialised_and_harmless_looking) {
  const auto x = random_values(64);
  DeviceVector<float> in(x), out(64);
  LAUNCH_EITHER(compare_unwritten, 1, 64, 0, in.data(), out.data());
  EXPECT(out.host() == x);
}

// A float4 at an address that is a multiple of 4 only, as in a slice of a tensor.
template <bool Fixed>
__global__ void load_vectors(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  float4 v;
  if (Fixed)
    v = make_float4(x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]);
  else
    v = *reinterpret_cast<const float4*>(x + 4 * i);
  y[i] = v.x + v.y + v.z + v.w;
}
PLANTED(misaligned_float4) {
  const auto x = random_values(129);
  DeviceVector<float> in(x), out(32);
  LAUNCH_EITHER(load_vectors, 1, 32, 0, in.data() + 1, out.data());
  for (size_t i = 0; i < 32; ++i)
    EXPECT_NEAR(out.host()[i], x[4 * i + 1] + x[4 * i + 2] + x[4 * i + 3] + x[4 * i + 4], 1e-5);
}

// Of two floats, at a multiple of 4; and a store.
template <bool Fixed>
__global__ void load_pairs(const float* x, float* y) {
  const unsigned i = threadIdx.x;
  float2 v;
  if (Fixed)
    v = make_float2(x[2 * i], x[2 * i + 1]);
  else
    v = *reinterpret_cast<const float2*>(x + 2 * i);
  y[i] = v.x + v.y;
}
PLANTED(misaligned_float2) {
  const auto x = random_values(65);
  DeviceVector<float> in(x), out(32);
  LAUNCH_EITHER(load_pairs, 1, 32, 0, in.data() + 1, out.data());
  for (size_t i = 0; i < 32; ++i) EXPECT_NEAR(out.host()[i], x[2 * i + 1] + x[2 * i + 2], 1e-5);
}
template <bool Fixed>
__global__ void store_integers(int* y) {
  const int i = static_cast<int>(threadIdx.x);
  if (Fixed)
    for (int j = 0; j < 4; ++j) y[4 * i + j] = i;
  else
    *reinterpret_cast<int4*>(y + 4 * i) = make_int4(i, i, i, i);
}
PLANTED(misaligned_store) {
  DeviceVector<int> out(130);
  LAUNCH_EITHER(store_integers, 1, 32, 0, out.data() + 2);
  for (size_t i = 0; i < 128; ++i) EXPECT(out.host()[i + 2] == static_cast<int>(i / 4));
}

// Rows of an ldmatrix 24 bytes apart, of which every other is no multiple of 16.
template <bool Fixed>
__global__ void load_matrix(unsigned* y) {
  constexpr unsigned kRow = Fixed ? 16 : 12;
  __shared__ __align__(16) unsigned short s[8 * 16];
  for (unsigned i = threadIdx.x; i < 8 * 16; i += 32) s[i] = static_cast<unsigned short>(i);
  __syncthreads();
  unsigned d[1];
  l2l::ptx::ldmatrix<1>(d, s + threadIdx.x % 8 * kRow);
  y[threadIdx.x] = d[0];
}
PLANTED(misaligned_matrix) {
  DeviceVector<unsigned> out(32);
  LAUNCH_EITHER(load_matrix, 1, 32, 0, out.data());
  for (unsigned i = 0; i < 32; ++i) {
    const unsigned first = i / 4 * 16 + i % 4 * 2;
    EXPECT(out.host()[i] == (first | (first + 1) << 16));
  }
}

template <bool Fixed>
__global__ void copy_misaligned(const float* x, float* y) {
  __shared__ __align__(16) float s[64];
  const unsigned t = threadIdx.x;
  if (Fixed) {
    for (unsigned j = 0; j < 4; ++j) l2l::ptx::cp_async<4>(&s[4 * t + j], x + 4 * t + j);
  } else {
    l2l::ptx::cp_async<16>(&s[4 * t], x + 4 * t);
  }
  l2l::ptx::cp_async_commit();
  l2l::ptx::cp_async_wait<0>();
  y[t] = s[4 * t];
}
PLANTED(misaligned_async_copy) {
  const auto x = random_values(66);
  DeviceVector<float> in(x), out(16);
  LAUNCH_EITHER(copy_misaligned, 1, 16, 0, in.data() + 1, out.data());
  for (size_t i = 0; i < 16; ++i) EXPECT_NEAR(out.host()[i], x[4 * i + 1], 0);
}

template <bool Fixed>
__global__ void read_optional(const float* optional, float* y) {
  y[threadIdx.x] = !Fixed || optional != nullptr ? optional[threadIdx.x] : 0.f;
}
PLANTED(null_pointer) {
  DeviceVector<float> out(32);
  LAUNCH_EITHER(read_optional, 1, 32, 0, static_cast<const float*>(nullptr), out.data());
}

// A pointer of the host handed to a kernel: works on a CPU, not on a GPU.
PLANTED(host_pointer) {
  std::vector<float> host(32, 1.f);
  DeviceVector<float> device(host), out(32);
  const float* pointer = IS_FIXED ? device.data() : host.data();
  LAUNCH(read_optional<true>, 1, 32, 0, pointer, out.data());
}

// Each call needs more stack than the last.
__device__ int descend(int depth, volatile int* out) {
  volatile int frame[1024];
  for (int& v : const_cast<int (&)[1024]>(frame)) v = depth;
  return depth == 0 ? frame[5] : descend(depth - 1, out) + frame[depth % 1024];
}
template <bool Fixed>
__global__ void recurse(int* out) {
  out[threadIdx.x] = descend(Fixed ? 2 : 100000, out);
}
PLANTED(stack_overflow) {
  DeviceVector<int> out(2);
  LAUNCH_EITHER(recurse, 1, 2, 0, out.data());
}

template <bool Fixed>
__global__ void shift_and_add(const int* x, int* y) {
  const unsigned t = threadIdx.x;
  y[t] = Fixed ? static_cast<int>(static_cast<unsigned>(x[t]) + 2147483647u) : x[t] + 2147483647;
}
PLANTED(signed_overflow) {
  DeviceVector<int> in(std::vector<int>(32, 5)), out(32);
  LAUNCH_EITHER(shift_and_add, 1, 32, 0, in.data(), out.data());
}
