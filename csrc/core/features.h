// What the first layer sees of a gradient: the only place that knows the kinds of input, their number and their
// derivatives. A new kind is a new enumerator, its cases in the functions below, and its name.
//
// normalized has moving averages in the state and makes its update of two rows of the read-out: normalized.h.
//
// log_sign is the preprocessing of Andrychowicz et al. 2016, appendix A:
//
//   |g| >= e^-p : (log|g| / p, sign g)        otherwise : (-1, e^p g)
//
// M is the arithmetic of the caller, as in cell.h, with M::abs, M::log (of a positive normal number), M::copysign_one
// and M::select_greater_equal(x, bound, a, b): a where x >= bound, b elsewhere and where x is NaN.
#pragma once

#include "normalized.h"

namespace l2l {

enum class Preprocess : int { identity = 0, log_sign = 1, normalized = 2 };
constexpr int kPreprocessKinds = 3;
constexpr const char* kPreprocessNames[kPreprocessKinds] = {"identity", "log_sign", "normalized"};

constexpr int kGradientFeatures = 2;               // at most, of kinds without averages
constexpr int kMaxFeatures = kNormalizedFeatures;  // of any kind
L2L_HOST_DEVICE constexpr int feature_count(Preprocess kind) {
  return kind == Preprocess::normalized ? kNormalizedFeatures : kind == Preprocess::log_sign ? 2 : 1;
}

// Rows of moving averages in the state. Features and update of a kind with some are those of normalized.h.
L2L_HOST_DEVICE constexpr int average_count(Preprocess kind) { return kind == Preprocess::normalized ? kAverages : 0; }

// What a launch computes once. Made by make_features (config.h), on the host.
struct Features {
  Preprocess kind;
  float threshold;  // e^-p
  float inverse_p;  // 1 / p
  float exp_p;      // e^p
};

// The features of a gradient, of a kind without averages; out[feature_count(kind)...] become zero. A NaN takes the
// linear branch and stays NaN; zero and denormals are linear, so no logarithm of them is used.
template <class M>
L2L_HOST_DEVICE void features_of(const Features& f, typename M::V g, typename M::V (&out)[kGradientFeatures]) {
  if (f.kind == Preprocess::identity) {
    out[0] = g;
    out[1] = M::broadcast(0.f);
    return;
  }
  const auto a = M::abs(g);
  const auto logarithm = M::log(M::max(f.threshold, a)) * f.inverse_p;
  out[0] = M::select_greater_equal(a, f.threshold, logarithm, M::broadcast(-1.f));
  out[1] = M::select_greater_equal(a, f.threshold, M::copysign_one(g), g * f.exp_p);
}

// d g from the gradients of the features, of a kind without averages; that of the others is zero.
template <class M>
L2L_HOST_DEVICE typename M::V features_backward(const Features& f, typename M::V g,
                                                const typename M::V (&d)[kGradientFeatures]) {
  if (f.kind == Preprocess::identity) return d[0];
  const auto a = M::abs(g);
  const auto large = d[0] * f.inverse_p / (M::copysign_one(g) * M::max(f.threshold, a));
  return M::select_greater_equal(a, f.threshold, large, d[1] * f.exp_p);
}

}  // namespace l2l
