// exp2, log, sigmoid and tanh on vectors: within 4 ulp of libm, saturating, NaN in, NaN out. Plain arithmetic, no tables.
#pragma once

#include "../core/cell.h"
#include "../core/preprocess.h"
#include "simd.h"

namespace l2l {
namespace L2L_ISA {

// The arithmetic that core/ asks for, on one vector of this instruction set.
struct Math {
  using V = vf;

  static L2L_ALWAYS_INLINE V broadcast(float x) { return L2L_ISA::broadcast(x); }
  static L2L_ALWAYS_INLINE V min(float bound, V x) { return L2L_ISA::min(bound, x); }
  static L2L_ALWAYS_INLINE V max(float bound, V x) { return L2L_ISA::max(bound, x); }
  static L2L_ALWAYS_INLINE V abs(V x) { return (V)((vi)x & 0x7fffffff); }
  static L2L_ALWAYS_INLINE V copysign_one(V x) { return (V)(((vi)x & (int32_t)0x80000000) | 0x3f800000); }
  static L2L_ALWAYS_INLINE vi greater_equal(V x, float y) { return x >= y; }
  static L2L_ALWAYS_INLINE V select(vi mask, V a, V b) { return (V)((mask & (vi)a) | (~mask & (vi)b)); }

  // n / d for d >= 1, where d may be inf (the quotient is then 0 for finite n).
  static L2L_ALWAYS_INLINE V quotient(V n, V d) { return n / d; }

  // 2^x. Relative error 1e-7; inf above the float range; below it 0 or, without a scaling instruction, 2^-126.
  static L2L_ALWAYS_INLINE V exp2(V x) {
#if L2L_LANES == 16
    // x - floor(x); the scaling instruction takes the floor of x itself.
    const V f = (V)_mm512_reduce_ps((__m512)x, 9);
    V y = broadcast(1.877576695e-3f);
    y = y * f + 8.989340203e-3f;
    y = y * f + 5.582631796e-2f;
    y = y * f + 2.401536171e-1f;
    y = y * f + 6.931530732e-1f;
    y = y * f + 9.999999251e-1f;
    return (V)_mm512_scalef_ps((__m512)y, (__m512)x);
#else
    const V bounded = max(-126.f, min(128.f, x));
    const V shifted = bounded + kRoundingShift;
    const V f = bounded - (shifted - kRoundingShift);
    V y = broadcast(1.326472725e-3f);
    y = y * f + 9.671512688e-3f;
    y = y * f + 5.550733744e-2f;
    y = y * f + 2.402224208e-1f;
    y = y * f + 6.931469776e-1f;
    y = y * f + 1.f;
    return (V)((vi)y + ((vi)shifted << 23));
#endif
  }

  // 2^x - 1 for x <= kTanhBound, accurate relative to itself also near 0.
  static L2L_ALWAYS_INLINE V exp2_minus_1(V x) {
#if L2L_LANES == 16
    const V f = (V)_mm512_reduce_ps((__m512)x, 8);  // x - nearest integer; 0 for -inf
    const V power = (V)_mm512_scalef_ps(_mm512_set1_ps(1.f), (__m512)(x - f));
#else
    const V bounded = max(-126.f, x);
    const V shifted = bounded + kRoundingShift;
    const V f = bounded - (shifted - kRoundingShift);
    const V power = (V)(((vi)shifted << 23) + 0x3f800000);
#endif
    V q = broadcast(1.540351280e-4f);
    q = q * f + 1.339073553e-3f;
    q = q * f + 9.618237494e-3f;
    q = q * f + 5.550357434e-2f;
    q = q * f + 2.402264979e-1f;
    q = q * f + 6.931471879e-1f;
    return power * (f * q) + (power - 1.f);
  }

  // sigmoid(x) from a = -log2(e) x.
  static L2L_ALWAYS_INLINE V sigmoid_scaled(V a) { return bounded_reciprocal(1.f + exp2(a)); }

  // tanh(x) from a = 2 log2(e) x <= kTanhBound.
  static L2L_ALWAYS_INLINE V tanh_scaled(V a) {
    const V e = exp2_minus_1(a);
    return e * bounded_reciprocal(e + 2.f);
  }

  // Natural logarithm of a positive normal number (Cephes' logf); inf and NaN pass.
  static L2L_ALWAYS_INLINE V log(V x) {
    const vi bits = (vi)x;
    const vi exponent = (bits - 0x3f3504f3) >> 23;
    const V m = (V)(bits - (exponent << 23));
    const V e = __builtin_convertvector(exponent, V);
    const V t = m - 1.f;
    const V z = t * t;
    V y = broadcast(7.0376836292e-2f);
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
    return select(x < __builtin_inff(), y, x);
  }

 private:
  static constexpr float kRoundingShift = 12582912.f;  // 1.5 * 2^23: the nearest integer lands in the low bits

  // 1 / x for x >= 1 to 1 ulp; 2^-126 for anything larger than 2^126.
  static L2L_ALWAYS_INLINE V bounded_reciprocal(V x) {
#if L2L_LANES == 16
    const V bounded = min(0x1p126f, x);  // Newton's step must not meet inf * 0
    const V r = (V)_mm512_rcp14_ps((__m512)bounded);
    return r + r * (1.f - bounded * r);
#else
    return 1.f / x;
#endif
  }
};

}  // namespace L2L_ISA
}  // namespace l2l
