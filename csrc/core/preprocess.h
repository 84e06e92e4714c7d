// The log-sign preprocessing of a gradient (Andrychowicz et al. 2016, appendix A) and its derivative.
//
//   |g| >= e^-p : (log|g| / p, sign g)        otherwise : (-1, e^p g)
//
// M as in cell.h, with M::abs, M::log (of a positive normal number), M::copysign_one, M::greater_equal and M::select.
#pragma once

#include "layout.h"

namespace l2l {

struct LogSign {
  float threshold;      // e^-p
  float inverse_p;      // 1 / p
  float exp_p;          // e^p
};

// A NaN takes the linear branch and stays NaN; zero and denormals are linear, so no logarithm of them is used.
template <class M>
L2L_HOST_DEVICE void log_sign(const LogSign& s, typename M::V g, typename M::V& magnitude, typename M::V& sign) {
  const auto a = M::abs(g);
  const auto large = M::greater_equal(a, s.threshold);
  magnitude = M::select(large, M::log(M::max(s.threshold, a)) * s.inverse_p, M::broadcast(-1.f));
  sign = M::select(large, M::copysign_one(g), g * s.exp_p);
}

template <class M>
L2L_HOST_DEVICE typename M::V log_sign_backward(const LogSign& s, typename M::V g, typename M::V d_magnitude,
                                                typename M::V d_sign) {
  const auto large = M::greater_equal(M::abs(g), s.threshold);
  const auto safe = M::select(large, g, M::broadcast(1.f));
  return M::select(large, d_magnitude * s.inverse_p / safe, d_sign * s.exp_p);
}

}  // namespace l2l
