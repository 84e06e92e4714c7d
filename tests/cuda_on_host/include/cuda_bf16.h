// CUDA's <cuda_bf16.h> for g++: storage, conversions and basic arithmetic of bfloat16.
#pragma once

#include "cuda_on_host/half_precision.h"
#include "cuda_runtime.h"

struct __nv_bfloat16_raw {
  unsigned short x;
};

class alignas(2) __nv_bfloat16 {
 public:
  constexpr __nv_bfloat16() : bits_(0) {}  // constant initialization: __shared__ arrays of it need no guard variable
  __nv_bfloat16(float value) : bits_(cuda_on_host::float_to_bfloat16_bits(value)) {}
  __nv_bfloat16(__nv_bfloat16_raw raw) : bits_(raw.x) {}
  operator float() const { return cuda_on_host::bfloat16_bits_to_float(bits_); }
  operator __nv_bfloat16_raw() const { return {bits_}; }

 private:
  unsigned short bits_;
};
using nv_bfloat16 = __nv_bfloat16;

struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

CUDA_ON_HOST_HALF_OPERATORS(__nv_bfloat16)

inline __nv_bfloat16 __float2bfloat16(float v) { return __nv_bfloat16(v); }
inline __nv_bfloat16 __float2bfloat16_rn(float v) { return __nv_bfloat16(v); }
inline float __bfloat162float(__nv_bfloat16 v) { return v; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {__nv_bfloat16(x), __nv_bfloat16(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return {__nv_bfloat16(v.x), __nv_bfloat16(v.y)}; }
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) { return {x, y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {v.x, v.y}; }
inline __nv_bfloat16 __low2bfloat16(__nv_bfloat162 v) { return v.x; }
inline __nv_bfloat16 __high2bfloat16(__nv_bfloat162 v) { return v.y; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 v) { return __nv_bfloat16_raw(v).x; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short v) { return __nv_bfloat16(__nv_bfloat16_raw{v}); }
