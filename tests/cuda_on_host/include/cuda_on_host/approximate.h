// Twins of the approximate special-function instructions: the exact value, off by a fixed share of the error that the
// PTX ISA documents, with its special values. All flush denormals (the .ftz forms).
#pragma once

#include <cmath>

#include "interface.h"

namespace cuda_on_host {

constexpr double kUlp = 1.0 / 16777216.0;  // 2^-24, the rounding error of a float

inline float flush(float v) { return std::fabs(v) < 1.17549435e-38f ? std::copysign(0.f, v) : v; }

// value (1 + error), where error stays below bound once the result has been rounded to a float.
inline float approximate(double value, double bound, float argument) {
  return flush(static_cast<float>(value * (1.0 + (bound - kUlp) * approximation_error(bit_cast<uint32_t>(argument)))));
}

// ex2.approx.ftz.f32: relative error at most 2^-22.5; 2^0 is exact.
inline float ex2_approx(float x) {
  x = flush(x);
  if (x == 0.f) return 1.f;
  return approximate(std::exp2(static_cast<double>(x)), 2.8 * kUlp, x);
}

// rcp.approx.ftz.f32: relative error at most 2^-23; 1 / denormal is an infinity.
inline float rcp_approx(float x) { return approximate(1.0 / flush(x), 2.0 * kUlp, x); }

// rsqrt.approx.ftz.f32: relative error at most 2^-22.9.
inline float rsqrt_approx(float x) {
  return approximate(1.0 / std::sqrt(static_cast<double>(flush(x))), 2.1 * kUlp, x);
}

// lg2.approx.ftz.f32: error at most 2^-22, absolute for arguments in (0.5, 2), else relative; log of a denormal is
// -inf.
inline float lg2_approx(float x) {
  x = flush(x);
  const double exact = std::log2(static_cast<double>(x));
  if (x > 0.5f && x < 2.f && x != 1.f)
    return static_cast<float>(exact + (4.0 - 1.0) * kUlp * approximation_error(bit_cast<uint32_t>(x)));
  return approximate(exact, 4.0 * kUlp, x);
}

// tanh.approx.f32: relative error at most 2^-10.987.
inline float tanh_approx(float x) { return approximate(std::tanh(static_cast<double>(x)), 4.9e-4, x); }

}  // namespace cuda_on_host
