// Inputs of the first layer on rows of lanes, and, of networks with normalized inputs, the update that is made of the
// read-out: core/features.h and core/normalized.h, vector by vector.
#pragma once

#include "../kernels.h"
#include "math.h"

namespace l2l {
namespace L2L_ISA {

static L2L_ALWAYS_INLINE void load_averages(const float* rows, long stride, Wide<1> (&averages)[kAverages]) {
  for (int k = 0; k < kAverages; k++) averages[k] = load_wide<1>(rows + k * stride);
}

// Takes a vector of gradients into its averages, rows average_stride apart, and gives them and the features.
static L2L_ALWAYS_INLINE void take_gradients(const Network& net, const TensorStep& tensor, const Wide<1>& g,
                                             const float* averages, float* new_averages, long average_stride,
                                             Wide<1> (&own)[kAverages], Wide<1> (&x)[kNormalizedFeatures]) {
  load_averages(averages, average_stride, own);
  advance_averages<Math<1>>(net.config.rates, g, own);
  for (int k = 0; k < kAverages; k++) store_wide(new_averages + k * average_stride, own[k]);
  normalized_features<Math<1>>(tensor.correction, g, own, x);
}

// The features of `lanes` gradients, rows `stride` apart. Averages, if the network has some: rows average_stride apart.
static L2L_ALWAYS_INLINE void features(const Network& net, const TensorStep& tensor, const float* grad, int lanes,
                                       const float* averages, float* new_averages, long average_stride, float* out,
                                       long stride) {
  if (net.config.averages() > 0) {
    for (int v = 0; v < lanes; v += kLanes) {
      Wide<1> own[kAverages], x[kNormalizedFeatures];
      take_gradients(net, tensor, load_wide<1>(grad + v), averages + v, new_averages + v, average_stride, own, x);
      for (int k = 0; k < kNormalizedFeatures; k++) store_wide(out + k * stride + v, x[k]);
    }
    return;
  }
  for (int v = 0; v < lanes; v += kLanes) {
    Wide<1> x[kGradientFeatures];
    features_of<Math<1>>(net.features, load_wide<1>(grad + v), x);
    for (int k = 0; k < net.config.features(); k++) store_wide(out + k * stride + v, x[k]);
  }
}

static void tile_features(const Network& net, const TensorStep& tensor, const float* grad, const float* averages,
                          float* new_averages, float* out) {
  features(net, tensor, grad, kTile, averages, new_averages, kTile, out, kTile);
}

// d loss / d gradient of `lanes` gradients, from rows of d features that are `stride` apart.
static L2L_ALWAYS_INLINE void gradients_of_features(const Network& net, const float* grad, const float* grad_features,
                                                    long stride, int lanes, float* grad_grad) {
  for (int v = 0; v < lanes; v += kLanes) {
    Wide<1> d[kGradientFeatures] = {};
    for (int k = 0; k < net.config.features(); k++) d[k] = load_wide<1>(grad_features + k * stride + v);
    store_wide(grad_grad + v, features_backward<Math<1>>(net.features, load_wide<1>(grad + v), d));
  }
}

static void tile_features_backward(const Network& net, const float* grad, const float* grad_features,
                                   float* grad_grad) {
  gradients_of_features(net, grad, grad_features, kTile, kTile, grad_grad);
}

// The direction of one vector of coordinates; averages and features are those of the step, with the gradient in them.
static L2L_ALWAYS_INLINE Wide<1> direction(const TensorStep& tensor, const float* grad, const float* averages,
                                           long average_stride, const float* log_ratio) {
  Wide<1> own[kAverages];
  load_averages(averages, average_stride, own);
  return nominal_direction<Math<1>>(tensor.correction, tensor.nominal, load_wide<1>(grad), own,
                                    load_wide<1>(log_ratio));
}

static void tile_update(const Network& net, const TensorStep& tensor, const float* grad, const float* averages,
                        const float* features, float* read_out) {
  for (int v = 0; v < kTile; v += kLanes) {
    const Wide<1> n = direction(tensor, grad + v, averages + v, kTile, features + kLogRatio * kTile + v);
    store_wide(read_out + v,
               normalized_update<Math<1>>(tensor.nominal, net.config.output_scale, load_wide<1>(read_out + v),
                                          load_wide<1>(read_out + kTile + v), n));
  }
}

// Without layers the read-out is its bias: features and update at once, with nothing in between going to memory.
static void nominal_step(const Network& net, const TensorStep& tensor, const float* grad, const float* averages,
                         float* new_averages, float* out) {
  const Wide<1> gain = Math<1>::broadcast(net.bias_out[0]), correction = Math<1>::broadcast(net.bias_out[1]);
  for (int v = 0; v < kTile; v += kLanes) {
    const Wide<1> g = load_wide<1>(grad + v);
    Wide<1> own[kAverages], x[kNormalizedFeatures];
    take_gradients(net, tensor, g, averages + v, new_averages + v, kTile, own, x);
    const Wide<1> n = nominal_direction<Math<1>>(tensor.correction, tensor.nominal, g, own, x[kLogRatio]);
    store_wide(out + v, normalized_update<Math<1>>(tensor.nominal, net.config.output_scale, gain, correction, n));
  }
}

}  // namespace L2L_ISA
}  // namespace l2l
