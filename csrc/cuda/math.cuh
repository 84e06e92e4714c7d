// The arithmetic that core/ asks for, on one float of one GPU thread: ex2.approx and rcp.approx where they are accurate
// enough, polynomials where they are not. No tanh.approx (its error is 2^-11).
#pragma once

#include "../core/cell.h"
#include "../core/features.h"
#include "ptx.cuh"

namespace l2l {

struct DeviceMath {
  using V = float;

  __device__ __forceinline__ static V broadcast(float x) { return x; }

  // Keeps a NaN of x, unlike fminf.
  __device__ __forceinline__ static V min(float bound, V x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    float y;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(bound), "f"(x));
    return y;
#else
    return x > bound ? bound : x;
#endif
  }
  __device__ __forceinline__ static V max(float bound, V x) { return x < bound ? bound : x; }
  __device__ __forceinline__ static V abs(V x) { return fabsf(x); }
  __device__ __forceinline__ static V sqrt(V x) { return sqrtf(x); }
  __device__ __forceinline__ static V copysign_one(V x) { return copysignf(1.f, x); }
  __device__ __forceinline__ static V select_greater_equal(V x, float bound, V a, V b) { return x >= bound ? a : b; }

  // n / d for d >= 1, where d may be inf (the quotient is then 0 for finite n). 1.5 ulp.
  __device__ __forceinline__ static V quotient(V n, V d) { return n * ptx::rcp(d); }

  // 2^x. 2 ulp; inf above the float range, 0 below it.
  __device__ __forceinline__ static V exp2(V x) { return ptx::ex2(x); }

  // 2^x - 1 for x <= kTanhBound, accurate relative to itself: near 0 by a polynomial (error 2^-23.6 at most), elsewhere
  // the difference loses less than two bits.
  __device__ __forceinline__ static V exp2_minus_1(V x) {
    float q = 1.540346129e-04f;
    q = q * x + 1.344558666e-03f;
    q = q * x + 9.618544951e-03f;
    q = q * x + 5.550206453e-02f;
    q = q * x + 2.402264327e-01f;
    q = q * x + 6.931472421e-01f;
    const float far = ptx::ex2(x) - 1.f;
    return fabsf(x) < 0.7f ? q * x : far;
  }

  // sigmoid(x) from a = -log2(e) x.
  __device__ __forceinline__ static V sigmoid_scaled(V a) { return ptx::rcp(1.f + ptx::ex2(a)); }

  // tanh(x) from a = 2 log2(e) x <= kTanhBound.
  __device__ __forceinline__ static V tanh_scaled(V a) {
    const float e = exp2_minus_1(a);
    return e * ptx::rcp(e + 2.f);
  }

  // Natural logarithm of a positive normal number (Cephes' logf); inf and NaN pass.
  __device__ __forceinline__ static V log(V x) {
    const int bits = __float_as_int(x);
    const int exponent = (bits - 0x3f3504f3) >> 23;
    const float t = __int_as_float(bits - exponent * 0x800000) - 1.f;
    const float e = static_cast<float>(exponent);
    const float z = t * t;
    float y = 7.0376836292e-2f;
    y = y * t - 1.1514610310e-1f;
    y = y * t + 1.1676998740e-1f;
    y = y * t - 1.2420140846e-1f;
    y = y * t + 1.4249322787e-1f;
    y = y * t - 1.6668057665e-1f;
    y = y * t + 2.0000714765e-1f;
    y = y * t - 2.4999993993e-1f;
    y = y * t + 3.3333331174e-1f;
    y = t * z * y - 2.12194440e-4f * e - 0.5f * z;
    y = t + y + 0.693359375f * e;
    return x < __int_as_float(0x7f800000) ? y : x;
  }
};

}  // namespace l2l
