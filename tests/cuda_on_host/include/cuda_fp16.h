// CUDA's <cuda_fp16.h> for g++: storage, conversions and basic arithmetic of IEEE half precision.
#pragma once

#include "cuda_on_host/half_precision.h"
#include "cuda_runtime.h"

struct __half_raw {
  unsigned short x;
};

class alignas(2) __half {
 public:
  constexpr __half() : bits_(0) {}  // constant initialization: __shared__ arrays of it need no guard variable
  __half(float value) : bits_(cuda_on_host::float_to_half_bits(value)) {}
  __half(__half_raw raw) : bits_(raw.x) {}
  operator float() const { return cuda_on_host::half_bits_to_float(bits_); }
  operator __half_raw() const { return {bits_}; }

 private:
  unsigned short bits_;
};
using half = __half;

struct alignas(4) __half2 {
  __half x, y;
};
using half2 = __half2;

CUDA_ON_HOST_HALF_OPERATORS(__half)

inline __half __float2half(float v) { return __half(v); }
inline __half __float2half_rn(float v) { return __half(v); }
inline float __half2float(__half v) { return v; }
inline __half2 __floats2half2_rn(float x, float y) { return {__half(x), __half(y)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline __half __low2half(__half2 v) { return v.x; }
inline __half __high2half(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half v) { return __half_raw(v).x; }
inline __half __ushort_as_half(unsigned short v) { return __half(__half_raw{v}); }
