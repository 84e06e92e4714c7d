// Barriers, cached loads and stores, bit casts and arithmetic intrinsics.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "interface.h"

using std::isfinite;
using std::isinf;
using std::isnan;

// CUDA's min and max take mixed arithmetic types.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmin(T(a), T(b));
  else
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>)
    return std::fmax(T(a), T(b));
  else
    return T(a) < T(b) ? T(b) : T(a);
}

// ---- barriers and fences
inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::block_barrier(cuda_on_host::BlockVote::none, 0, site);
}
inline int __syncthreads_count(int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::BlockVote::count, predicate, site);
}
inline int __syncthreads_and(int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::BlockVote::all, predicate, site);
}
inline int __syncthreads_or(int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return cuda_on_host::block_barrier(cuda_on_host::BlockVote::any, predicate, site);
}
inline void __threadfence_block() { cuda_on_host::yield_at_random(); }
inline void __threadfence() { cuda_on_host::yield_at_random(); }
inline void __threadfence_system() { cuda_on_host::yield_at_random(); }
inline void __nanosleep(unsigned) { cuda_on_host::yield_now(); }
[[noreturn]] inline void __trap(cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::device_error(cudaErrorLaunchFailure, site, "__trap()");
}

// ---- loads and stores with a cache hint: plain ones, at which another thread may get its turn
#define CUDA_ON_HOST_LOAD(name)      \
  template <class T>                 \
  inline T name(const T* address) {  \
    cuda_on_host::yield_at_random(); \
    return *address;                 \
  }
#define CUDA_ON_HOST_STORE(name)          \
  template <class T>                      \
  inline void name(T* address, T value) { \
    cuda_on_host::yield_at_random();      \
    *address = value;                     \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldlu)
CUDA_ON_HOST_LOAD(__ldcv)
CUDA_ON_HOST_STORE(__stwb)
CUDA_ON_HOST_STORE(__stcg)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stwt)
#undef CUDA_ON_HOST_LOAD
#undef CUDA_ON_HOST_STORE

// ---- bits
inline float __uint_as_float(unsigned v) { return cuda_on_host::bit_cast<float>(v); }
inline float __int_as_float(int v) { return cuda_on_host::bit_cast<float>(v); }
inline unsigned __float_as_uint(float v) { return cuda_on_host::bit_cast<unsigned>(v); }
inline int __float_as_int(float v) { return cuda_on_host::bit_cast<int>(v); }
inline long long __double_as_longlong(double v) { return cuda_on_host::bit_cast<long long>(v); }
inline double __longlong_as_double(long long v) { return cuda_on_host::bit_cast<double>(v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(v)); }
inline unsigned __brev(unsigned v) {
  unsigned r = 0;
  for (int i = 0; i < 32; ++i) r |= (v >> i & 1u) << (31 - i);
  return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<unsigned long long>(a) * b >> 32);
}
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// ---- arithmetic
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) {  // never contracted with a product
  float sum = a + b;
  asm volatile("" : "+m"(sum));
  return sum;
}
inline float __fmul_rn(float a, float b) {  // never contracted with a sum
  float product = a * b;
  asm volatile("" : "+m"(product));
  return product;
}
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __saturatef(float a) { return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f; }  // NaN becomes 0
inline float rsqrtf(float a) { return 1.f / std::sqrt(a); }
inline int __float2int_rn(float a) { return static_cast<int>(std::nearbyint(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }

#include "approximate.h"

// glibc declares functions of these names, hence macros.
#define __expf(x) cuda_on_host::ex2_approx(static_cast<float>((x) * 1.44269504f))
#define __exp2f(x) cuda_on_host::ex2_approx(static_cast<float>(x))
#define __log2f(x) cuda_on_host::lg2_approx(static_cast<float>(x))
#define __logf(x) (cuda_on_host::lg2_approx(static_cast<float>(x)) * 0.693147182f)
#define __fdividef(a, b) ((a) * cuda_on_host::rcp_approx(static_cast<float>(b)))
