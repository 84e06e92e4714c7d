// The walk back through a segment of T steps, of one coordinate. With theta_{t+1} = decay_t theta_t + lr_t u_t and the
// recorded gradients g_t held constant, A_t = d loss / d theta_t of the meta-loss sum_s w_s f(theta_s) is
//
//   A_T = w_T g_T        d loss / d u_t = lr_t A_{t+1}        A_t = w_t g_t + decay_t A_{t+1}
//
// (equation 3 of Andrychowicz et al. 2016 without the path through the gradients).
#pragma once

#include "features.h"

namespace l2l {

// Step t of a segment, and after the last one that of theta_T, whose lr and decay are not used.
struct SegmentStep {
  const float* record;  // g_t, as tiles; null for zero
  float weight;         // w_t of f(theta_t); 0 for t = 0
  float lr, decay;
  float unused;
};

// Takes A_{t+1} to A_t; returns d loss / d u_t. Begins with A = 0 at t = T.
L2L_HOST_DEVICE float walk_back(const SegmentStep& step, float g, float& adjoint) {
  const float du = step.lr * adjoint;
  adjoint = step.weight * g + step.decay * adjoint;
  return du;
}

}  // namespace l2l
