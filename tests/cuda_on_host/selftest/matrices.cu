// cp.async, ldmatrix, mma.sync and the approximate functions, through csrc/cuda/ptx.cuh.
#include "cuda/ptx.cuh"
#include "cuda_on_host/harness.h"

using harness::DeviceVector;
using harness::random_values;
namespace ptx = l2l::ptx;

// A pipeline of two buffers: tile k + 1 is under way while tile k is summed up.
template <int Bytes>
__global__ void pipeline(const float* x, float* y, int tiles) {
  constexpr int kPerThread = Bytes / 4, kTile = 64 * kPerThread;
  __shared__ __align__(16) float buffer[2][kTile];
  const int t = static_cast<int>(threadIdx.x);
  const float* source = x + static_cast<size_t>(blockIdx.x) * static_cast<size_t>(tiles) * kTile;
  float sum[kPerThread] = {};
  ptx::cp_async<Bytes>(&buffer[0][t * kPerThread], source + t * kPerThread);
  ptx::cp_async_commit();
  for (int k = 0; k < tiles; ++k) {
    const bool more = k + 1 < tiles;  // the last copy, of nothing, writes zeros
    ptx::cp_async<Bytes>(&buffer[(k + 1) & 1][t * kPerThread], source + (more ? k + 1 : k) * kTile + t * kPerThread,
                         more);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncthreads();
    for (int j = 0; j < kPerThread; ++j) sum[j] += buffer[k & 1][(t * kPerThread + j + kTile / 2) % kTile];
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
  for (int j = 0; j < kPerThread; ++j)
    y[blockIdx.x * kTile + threadIdx.x * kPerThread + static_cast<unsigned>(j)] =
        sum[j] + buffer[tiles & 1][t * kPerThread + j];
}

template <int Bytes>
void check_pipeline() {
  constexpr size_t kTile = 64 * Bytes / 4, kTiles = 5, kBlocks = 3;
  const auto x = random_values(kBlocks * kTiles * kTile);
  DeviceVector<float> in(x), out(kBlocks * kTile);
  LAUNCH(pipeline<Bytes>, kBlocks, 64, 0, in.data(), out.data(), static_cast<int>(kTiles));
  const auto y = out.host();
  for (size_t b = 0; b < kBlocks; ++b)
    for (size_t i = 0; i < kTile; ++i) {
      double sum = 0;
      for (size_t k = 0; k < kTiles; ++k) sum += x[(b * kTiles + k) * kTile + (i + kTile / 2) % kTile];
      EXPECT_NEAR(y[b * kTile + i], sum, 1e-5);
    }
}

CASE(async_copies) {
  check_pipeline<4>();
  check_pipeline<8>();
  check_pipeline<16>();
}

// One warp a tile: d = 1 + a b, a 16 x 8 by rows, b 8 x 8 by rows. Fragments are gathered as the PTX ISA draws them.
__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const unsigned lane = threadIdx.x % 32, group = lane / 4, in_group = lane % 4;
  const unsigned tile = (blockIdx.x * blockDim.x + threadIdx.x) / 32;
  a += tile * 128, b += tile * 64, d += tile * 128;
  const unsigned fa[4] = {__float_as_uint(a[group * 8 + in_group]), __float_as_uint(a[(group + 8) * 8 + in_group]),
                          __float_as_uint(a[group * 8 + in_group + 4]),
                          __float_as_uint(a[(group + 8) * 8 + in_group + 4])};
  const unsigned fb[2] = {__float_as_uint(b[in_group * 8 + group]), __float_as_uint(b[(in_group + 4) * 8 + group])};
  float acc[4] = {1.f, 1.f, 1.f, 1.f};
  ptx::mma_tf32(acc, fa, fb);
  for (unsigned i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + 2 * in_group + i % 2] = acc[i];
}

CASE(mma_tf32) {
  const size_t tiles = 4;
  auto a = random_values(tiles * 128, 1), b = random_values(tiles * 64, 2);
  for (float& v : a) v = __uint_as_float(ptx::to_tf32(v));
  for (float& v : b) v = __uint_as_float(ptx::to_tf32(v));
  DeviceVector<float> da(a), db(b), dd(tiles * 128);
  LAUNCH(multiply_tf32, 2, 64, 0, da.data(), db.data(), dd.data());
  const auto d = dd.host();
  for (size_t q = 0; q < tiles; ++q)
    for (size_t i = 0; i < 16; ++i)
      for (size_t j = 0; j < 8; ++j) {
        double sum = 1;
        for (size_t k = 0; k < 8; ++k) sum += static_cast<double>(a[q * 128 + i * 8 + k]) * b[q * 64 + k * 8 + j];
        EXPECT_NEAR(d[q * 128 + i * 8 + j], sum, 1e-5);
      }
}

// What is below the 11 significant bits of an operand is not read; what is below the last bit of the largest term, or
// of the sum, is cut off; a row of a and a column of b reach nothing but that row and that column of d.
CASE(mma_tf32_as_the_hardware_does_it) {
  std::vector<float> a(128, 0.f), b(64, 0.f);
  a[0] = __uint_as_float(0x3f800fffu);  // 1, and bits that are not read
  b[0] = __uint_as_float(0xbf801fffu);
  for (size_t k = 0; k < 8; ++k)
    a[8 + k] = 0x1p-24f, b[8 * k + 1] = 1.f;  // row 1, column 1: eight times less than a bit
  a[2 * 8] = 3.f, b[2] = 0x1p-23f;            // row 2, column 2: three bits
  a[4 * 8] = 1.75f, b[3] = 0x1p-23f;          // row 4, column 3: a bit and three quarters
  a[3 * 8 + 5] = NAN, b[5 * 8 + 4] = INFINITY;
  DeviceVector<float> da(a), db(b), dd(128);
  LAUNCH(multiply_tf32, 1, 32, 0, da.data(), db.data(), dd.data());
  const auto d = dd.host();
  EXPECT(d[0] == 0.f);
  EXPECT(d[8 + 1] == 1.f);
  EXPECT(d[2 * 8 + 2] == 1.f + 0x3p-23f);
  EXPECT(d[4 * 8 + 3] == 1.f + 0x1p-23f);
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) EXPECT(isfinite(d[i * 8 + j]) == (i != 3 && j != 4));
}

// a 16 x 16 by rows and b 16 x 8 by rows, through shared memory and ldmatrix: a as four matrices, b transposed as two.
template <class T>
__global__ void multiply_16bit(const T* a, const T* b, float* d) {
  __shared__ __align__(16) T sa[16][16];
  __shared__ __align__(16) T sb[16][8];
  const unsigned lane = threadIdx.x;
  for (unsigned i = lane; i < 256; i += 32) sa[i / 16][i % 16] = a[blockIdx.x * 256 + i];
  for (unsigned i = lane; i < 128; i += 32) sb[i / 8][i % 8] = b[blockIdx.x * 128 + i];
  __syncwarp();
  unsigned fa[4], fb[2];
  ptx::ldmatrix<4>(fa, &sa[lane % 16][lane / 16 * 8]);
  ptx::ldmatrix<2, true>(fb, &sb[lane % 16][0]);
  float acc[4] = {};
  if constexpr (std::is_same_v<T, __half>)
    ptx::mma_fp16(acc, fa, fb);
  else
    ptx::mma_bf16(acc, fa, fb);
  for (unsigned i = 0; i < 4; ++i) d[blockIdx.x * 128 + (lane / 4 + i / 2 * 8) * 8 + 2 * (lane % 4) + i % 2] = acc[i];
}

template <class T>
void check_16bit() {
  const size_t tiles = 3;
  std::vector<T> a, b;
  for (float v : random_values(tiles * 256, 1)) a.push_back(T(v));
  for (float v : random_values(tiles * 128, 2)) b.push_back(T(v));
  DeviceVector<T> da(a), db(b);
  DeviceVector<float> dd(tiles * 128);
  LAUNCH(multiply_16bit<T>, tiles, 32, 0, da.data(), db.data(), dd.data());
  const auto d = dd.host();
  for (size_t q = 0; q < tiles; ++q)
    for (size_t i = 0; i < 16; ++i)
      for (size_t j = 0; j < 8; ++j) {
        double sum = 0;
        for (size_t k = 0; k < 16; ++k)
          sum += static_cast<double>(static_cast<float>(a[q * 256 + i * 16 + k])) *
                 static_cast<float>(b[q * 128 + k * 8 + j]);
        EXPECT_NEAR(d[q * 128 + i * 8 + j], sum, 1e-5);
      }
}

CASE(mma_and_ldmatrix) {
  check_16bit<__half>();
  check_16bit<__nv_bfloat16>();
}

__global__ void evaluate(const float* x, float* ex2, float* rcp, float* lg2, size_t n) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  ex2[i] = ptx::ex2(x[i]);
  rcp[i] = ptx::rcp(x[i]);
  lg2[i] = ptx::lg2(fabsf(x[i]));
}

// Errors within the documented bounds, but not always zero; special values as documented.
CASE(approximate_functions) {
  const size_t n = 4096;
  const auto x = random_values(n, 3, -20.f, 20.f);
  DeviceVector<float> in(x), ex2(n), rcp(n), lg2(n);
  LAUNCH(evaluate, 16, 256, 0, in.data(), ex2.data(), rcp.data(), lg2.data(), n);
  const auto e = ex2.host(), r = rcp.host(), l = lg2.host();
  double worst[3] = {};
  for (size_t i = 0; i < n; ++i) {
    const double v = x[i], log = std::log2(std::fabs(v));
    worst[0] = std::fmax(worst[0], std::fabs(e[i] / std::exp2(v) - 1));
    worst[1] = std::fmax(worst[1], std::fabs(r[i] * v - 1));
    worst[2] = std::fmax(worst[2], std::fabs(l[i] - log) / (std::fabs(log) < 1 ? 1 : std::fabs(log)));
  }
  const double bounds[3] = {std::exp2(-22.5), std::exp2(-23), std::exp2(-22)};
  for (int i = 0; i < 3; ++i) {
    EXPECT(worst[i] <= bounds[i]);
    EXPECT(worst[i] >= 0.8 * bounds[i]);
  }
  const float infinity = INFINITY;
  EXPECT(ptx::ex2(0.f) == 1.f && ptx::ex2(-infinity) == 0.f && ptx::ex2(infinity) == infinity && isnan(ptx::ex2(NAN)));
  EXPECT(ptx::ex2(200.f) == infinity && ptx::ex2(-127.5f) == 0.f && ptx::ex2(1e-40f) == 1.f);
  EXPECT(ptx::rcp(0.f) == infinity && ptx::rcp(-0.f) == -infinity && ptx::rcp(1e-40f) == infinity &&
         ptx::rcp(infinity) == 0.f);
  EXPECT(ptx::lg2(1.f) == 0.f && ptx::lg2(0.f) == -infinity && ptx::lg2(1e-40f) == -infinity && isnan(ptx::lg2(-1.f)));
}

__global__ void convert(const __half* h, const __nv_bfloat162* b, __half2* oh, __nv_bfloat162* ob, size_t n) {
  const size_t i = static_cast<size_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float2 f = __bfloat1622float2(b[i]);
  oh[i] = __floats2half2_rn(f.x * __half2float(h[2 * i]), f.y * __half2float(h[2 * i + 1]));
  ob[i] = __floats2bfloat162_rn(f.x + 1.f, f.y + 1.f);
}

CASE(half_types) {
  const size_t n = 200;
  std::vector<__half> h;
  std::vector<__nv_bfloat162> b;
  for (float v : random_values(2 * n, 1)) h.push_back(__float2half(v));
  const auto values = random_values(2 * n, 2);
  for (size_t i = 0; i < n; ++i) b.push_back(__floats2bfloat162_rn(values[2 * i], values[2 * i + 1]));
  DeviceVector<__half> dh(h);
  DeviceVector<__nv_bfloat162> db(b), ob(n);
  DeviceVector<__half2> oh(n);
  LAUNCH(convert, 2, 128, 0, dh.data(), db.data(), oh.data(), ob.data(), n);
  for (size_t i = 0; i < n; ++i) {
    const double product = static_cast<double>(static_cast<float>(b[i].x)) * static_cast<float>(h[2 * i]);
    EXPECT_NEAR(static_cast<float>(oh.host()[i].x), product, std::fabs(product) / 2048 + 1e-7);
    const double sum = 1.0 + static_cast<float>(b[i].y);
    EXPECT_NEAR(static_cast<float>(ob.host()[i].y), sum, std::fabs(sum) / 256 + 1e-7);
  }
}
