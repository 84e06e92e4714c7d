// The log-sign preprocessing of a gradient (Andrychowicz et al. 2016, appendix A) and its derivative.
//
//   |g| >= e^-p : (log|g| / p, sign g)        otherwise : (-1, e^p g)
//
// M as in cell.h, with M::abs, M::log (of a positive normal number), M::copysign_one and
// M::select_greater_equal(x, bound, a, b): a where x >= bound, b elsewhere and where x is NaN.
#pragma once

#include "layout.h"

namespace l2l {

struct LogSign {
  float threshold;  // e^-p
  float inverse_p;  // 1 / p
  float exp_p;      // e^p
};

// A NaN takes the linear branch and stays NaN; zero and denormals are linear, so no logarithm of them is used.
template <class M>
L2L_HOST_DEVICE void log_sign(const LogSign& s, typename M::V g, typename M::V& magnitude, typename M::V& sign) {
  const auto a = M::abs(g);
  const auto logarithm = M::log(M::max(s.threshold, a)) * s.inverse_p;
  magnitude = M::select_greater_equal(a, s.threshold, logarithm, M::broadcast(-1.f));
  sign = M::select_greater_equal(a, s.threshold, M::copysign_one(g), g * s.exp_p);
}

// d g from the gradients of both features.
template <class M>
L2L_HOST_DEVICE typename M::V log_sign_backward(const LogSign& s, typename M::V g, typename M::V d_magnitude,
                                                typename M::V d_sign) {
  const auto a = M::abs(g);
  const auto large = d_magnitude * s.inverse_p / (M::copysign_one(g) * M::max(s.threshold, a));
  return M::select_greater_equal(a, s.threshold, large, d_sign * s.exp_p);
}

}  // namespace l2l
