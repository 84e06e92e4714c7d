// exp2, log, sigmoid and tanh on vectors: within 4 ulp of libm, saturating, NaN in, NaN out. Plain arithmetic, no
// tables.
#pragma once

#include "../../core/cell.h"
#include "../../core/features.h"
#include "wide.h"

namespace l2l {
namespace L2L_ISA {

// The arithmetic that core/ asks for, on N vectors of this instruction set.
template <int N>
struct Math {
  using V = Wide<N>;

  static L2L_ALWAYS_INLINE V broadcast(float x) {
    return map(V{}, [&](vf) L2L_LAMBDA { return L2L_ISA::broadcast(x); });
  }
  static L2L_ALWAYS_INLINE V min(float bound, V x) {
    return map(x, [&](vf a) L2L_LAMBDA { return L2L_ISA::min(bound, a); });
  }
  static L2L_ALWAYS_INLINE V max(float bound, V x) {
    return map(x, [&](vf a) L2L_LAMBDA { return L2L_ISA::max(bound, a); });
  }
  static L2L_ALWAYS_INLINE V abs(V x) {
    return map(x, [](vf a) L2L_LAMBDA { return (vf)((vi)a & 0x7fffffff); });
  }
  static L2L_ALWAYS_INLINE V sqrt(V x) {
    return map(x, [](vf a) L2L_LAMBDA { return L2L_ISA::sqrt(a); });
  }
  static L2L_ALWAYS_INLINE V copysign_one(V x) {
    return map(x, [](vf a) L2L_LAMBDA { return (vf)(((vi)a & (int32_t)0x80000000) | 0x3f800000); });
  }

  // where_large(x, bound): a where x >= bound, b elsewhere and where x is NaN.
  static L2L_ALWAYS_INLINE V select_greater_equal(V x, float bound, V a, V b) {
    V r;
    L2L_UNROLL for (int i = 0; i < N; i++) {
      const vi mask = x.v[i] >= bound;
      r.v[i] = (vf)((mask & (vi)a.v[i]) | (~mask & (vi)b.v[i]));
    }
    return r;
  }

  // n / d for d >= 1, where d may be inf (the quotient is then 0 for finite n).
  static L2L_ALWAYS_INLINE V quotient(V n, V d) { return n / d; }

  // 2^x. Relative error 1e-7; inf above the float range; below it 0 or, without a scaling instruction, 2^-126.
  static L2L_ALWAYS_INLINE V exp2(V x) {
#if L2L_LANES == 16
    // x - floor(x); the scaling instruction takes the floor of x itself.
    const V f = map(x, [](vf a) L2L_LAMBDA { return (vf)_mm512_reduce_ps((__m512)a, 9); });
    V y = 1.877576695e-3f * f + 8.989340203e-3f;
    y = y * f + 5.582631796e-2f;
    y = y * f + 2.401536171e-1f;
    y = y * f + 6.931530732e-1f;
    y = y * f + 9.999999251e-1f;
    return zip(y, x, [](vf a, vf b) L2L_LAMBDA { return (vf)_mm512_scalef_ps((__m512)a, (__m512)b); });
#else
    const V bounded = max(-126.f, min(128.f, x));
    const V whole = map(bounded, [](vf a) L2L_LAMBDA { return (vf)nearest(a); });
    const V f = zip(bounded, whole, [](vf a, vf n) L2L_LAMBDA { return a - __builtin_convertvector((vi)n, vf); });
    V y = 1.326472725e-3f * f + 9.671512688e-3f;
    y = y * f + 5.550733744e-2f;
    y = y * f + 2.402224208e-1f;
    y = y * f + 6.931469776e-1f;
    y = y * f + 1.f;
    return zip(y, whole, [](vf a, vf n) L2L_LAMBDA { return (vf)((vi)a + ((vi)n << 23)); });
#endif
  }

  // 2^x - 1 for x <= kTanhBound, accurate relative to itself also near 0.
  static L2L_ALWAYS_INLINE V exp2_minus_1(V x) {
#if L2L_LANES == 16
    // x - nearest integer; 0 for -inf
    const V f = map(x, [](vf a) L2L_LAMBDA { return (vf)_mm512_reduce_ps((__m512)a, 8); });
    const V power = map(x - f, [](vf a) L2L_LAMBDA { return (vf)_mm512_scalef_ps(_mm512_set1_ps(1.f), (__m512)a); });
#else
    const V bounded = max(-126.f, x);
    const V whole = map(bounded, [](vf a) L2L_LAMBDA { return (vf)nearest(a); });
    const V f = zip(bounded, whole, [](vf a, vf n) L2L_LAMBDA { return a - __builtin_convertvector((vi)n, vf); });
    const V power = map(whole, [](vf n) L2L_LAMBDA { return (vf)(((vi)n << 23) + 0x3f800000); });
#endif
    V q = 1.540351280e-4f * f + 1.339073553e-3f;
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
    return map(x, [](vf a) L2L_LAMBDA {
      const vi bits = (vi)a;
      const vi exponent = (bits - 0x3f3504f3) >> 23;
      const vf m = (vf)(bits - (exponent << 23));
      const vf e = __builtin_convertvector(exponent, vf);
      const vf t = m - 1.f;
      const vf z = t * t;
      vf y = 7.0376836292e-2f * t - 1.1514610310e-1f;
      y = y * t + 1.1676998740e-1f;
      y = y * t - 1.2420140846e-1f;
      y = y * t + 1.4249322787e-1f;
      y = y * t - 1.6668057665e-1f;
      y = y * t + 2.0000714765e-1f;
      y = y * t - 2.4999993993e-1f;
      y = y * t + 3.3333331174e-1f;
      y = t * z * y - 2.12194440e-4f * e - 0.5f * z;
      y = t + y + 0.693359375f * e;
      const vi finite = a < __builtin_inff();
      return (vf)((finite & (vi)y) | (~finite & bits));
    });
  }

 private:
  // 1 / x for x >= 1 to 1 ulp; 2^-126 for anything larger than 2^126.
  static L2L_ALWAYS_INLINE V bounded_reciprocal(V x) {
#if L2L_LANES == 16
    const V bounded = min(0x1p126f, x);  // Newton's step must not meet inf * 0
    const V r = map(bounded, [](vf a) L2L_LAMBDA { return (vf)_mm512_rcp14_ps((__m512)a); });
    return r + r * (1.f - bounded * r);
#else
    return 1.f / x;
#endif
  }
};

}  // namespace L2L_ISA
}  // namespace l2l
