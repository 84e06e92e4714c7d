// Networks with normalized inputs: moving averages of a coordinate's gradients, inputs without a scale that are made of
// them, and an update that is a nominal direction times a bounded gain, plus a bounded correction. The mathematics, and
// what its constants are for, is in l2l_fast/kernels/normalized.py, the oracle of this header.
//
// Second moments are kept as their roots, so that no gradient of float32 leaves the range. Everything here is made of
// gradients, which count as constants: the only derivative is that of the update in the two rows of the head.
//
// M is the arithmetic of the caller, as in cell.h and features.h, with M::sqrt.
#pragma once

#include "cell.h"

namespace l2l {

constexpr int kAverages = 4;  // m1, m2, r1, r2
constexpr int kNormalizedFeatures = 5;
constexpr int kNormalizedReadOuts = 2;  // gain, correction
constexpr int kLogRatio = 4;            // which feature it is
constexpr int kTensorSums = 5;          // over a tensor's coordinates: of theta^2, g^2, q^2, d^2 and g d

constexpr float kLargestGradient = 0x1p125f, kSmallestRoot = 1e-30f, kSmallestNormal = 0x1p-126f;
constexpr float kFeatureBound = 5.f, kDirectionBound = 20.f, kLowestGain = -8.f, kHighestGain = 3.f;
constexpr float kLargestRatio = 20.0855369f, kSmallestRatio = 0.0497870684f;  // e^3, e^-3
constexpr float kAdamEps = 1e-8f;

// 1 - beta of the averages, and not beta: of a beta near 1, float32 keeps the rest to few digits. Every formula below
// is written in it, so that what is used is the beta that was meant.
struct Rates {
  float of[kAverages];
};

// What a tensor's age makes of its averages: hat = average * factor.
struct Correction {
  float of[kAverages];
};

// What a tensor is told in one step, see the oracle.
struct Nominal {
  float gain = 0.f, mu = 0.f, nu = 0.f, lam = 0.f, correction = 0.5f;
};
constexpr int kNominal = 5;

template <class M>
L2L_HOST_DEVICE typename M::V clip(float low, float high, typename M::V x) {
  return M::min(high, M::max(low, x));
}

template <class M>
L2L_HOST_DEVICE typename M::V bounded_gradient(typename M::V g) {
  return clip<M>(-kLargestGradient, kLargestGradient, g);
}

// sqrt((1 - rate) r^2 + rate a^2) for r, a >= 0 without squares of either. Where r falls, which is nearly always, the
// change is computed on its own: a factor near 1, rounded, would be off by as much in every step.
template <class M>
L2L_HOST_DEVICE typename M::V advance_root(float rate, typename M::V r, typename M::V a) {
  const auto fall = r - a;  // >= 0 where r falls; a NaN of either ends up in the result
  const auto large = M::select_greater_equal(fall, 0.f, r, a);
  const auto ratio = M::select_greater_equal(fall, 0.f, a, r) / M::max(kSmallestNormal, large);
  const auto square = ratio * ratio, change = rate * (1.f - square);
  const auto root = M::sqrt(M::select_greater_equal(fall, 0.f, 1.f - change, square + change));
  return M::select_greater_equal(fall, 0.f, r - r * (change / (1.f + root)), a * root);
}

// Takes a gradient into the averages.
template <class M>
L2L_HOST_DEVICE void advance_averages(const Rates& rates, typename M::V gradient,
                                      typename M::V (&averages)[kAverages]) {
  const auto g = bounded_gradient<M>(gradient), a = M::abs(g);
  for (int k = 0; k < 2; k++) averages[k] = averages[k] + rates.of[k] * (g - averages[k]);
  for (int k = 2; k < kAverages; k++) averages[k] = advance_root<M>(rates.of[k], averages[k], a);
}

// The inputs of the first layer, from the averages that the gradient is already in.
template <class M>
L2L_HOST_DEVICE void normalized_features(const Correction& c, typename M::V gradient,
                                         const typename M::V (&averages)[kAverages],
                                         typename M::V (&out)[kNormalizedFeatures]) {
  const auto q = M::max(kSmallestRoot, averages[2] * c.of[2]);
  const auto inverse = 1.f / q;
  out[0] = clip<M>(-kFeatureBound, kFeatureBound, bounded_gradient<M>(gradient) * inverse);
  out[1] = clip<M>(-kFeatureBound, kFeatureBound, averages[0] * c.of[0] * inverse);
  out[2] = clip<M>(-kFeatureBound, kFeatureBound, averages[1] * c.of[1] * inverse);
  out[3] = out[1] * out[2] * (1.f / kFeatureBound);
  const auto ratio = q / M::max(kSmallestRoot, averages[3] * c.of[3]);
  out[kLogRatio] = M::log(clip<M>(kSmallestRatio, kLargestRatio, ratio));
}

// n, from the averages that the gradient is already in and the last of its features.
template <class M>
L2L_HOST_DEVICE typename M::V nominal_direction(const Correction& c, const Nominal& nominal, typename M::V gradient,
                                                const typename M::V (&averages)[kAverages], typename M::V log_ratio) {
  // Each over the root: their differences stay in range for any mu and nu that is.
  const auto inverse = 1.f / (averages[3] * c.of[3] + kAdamEps);
  const auto g = bounded_gradient<M>(gradient) * inverse;
  const auto m1 = averages[0] * c.of[0] * inverse, m2 = averages[1] * c.of[1] * inverse;
  const auto uphill = m1 + nominal.mu * (m2 - m1) + nominal.nu * (g - m1);
  const auto factor = M::exp2((-kLog2E * nominal.lam) * log_ratio);
  return clip<M>(-kDirectionBound, kDirectionBound, -1.f * (uphill * factor));
}

template <class M>
L2L_HOST_DEVICE typename M::V bounded_gain(typename M::V shifted) {
  return M::exp2(kLog2E * clip<M>(kLowestGain, kHighestGain, shifted));
}

template <class M>
L2L_HOST_DEVICE typename M::V tanh_of(typename M::V x) {
  return M::tanh_scaled(M::min(kTanhBound, 2.f * kLog2E * x));
}

// From the rows (a, o) of the head, and n.
template <class M>
L2L_HOST_DEVICE typename M::V normalized_update(const Nominal& nominal, float output_scale, typename M::V a,
                                                typename M::V o, typename M::V n) {
  return output_scale * (bounded_gain<M>(a + nominal.gain) * n + nominal.correction * tanh_of<M>(o));
}

// The gradients of a and o, in their places, from that of the update.
template <class M>
L2L_HOST_DEVICE void normalized_update_backward(const Nominal& nominal, float output_scale, typename M::V n,
                                                typename M::V du, typename M::V& a, typename M::V& o) {
  const auto scaled = output_scale * du, shifted = a + nominal.gain, zero = M::broadcast(0.f);
  const auto d = scaled * n * bounded_gain<M>(shifted);
  const auto below = M::select_greater_equal(shifted, kLowestGain, d, zero);
  a = M::select_greater_equal(-1.f * shifted, -kHighestGain, below, zero);
  const auto t = tanh_of<M>(o);
  o = scaled * nominal.correction * (1.f - t * t);
}

}  // namespace l2l
