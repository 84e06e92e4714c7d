// What an operator call fixes besides its tensors, and where the parts of phi and of a state are. No ATen, no CUDA
// runtime: the CPU, CUDA and Python sides share it.
//
// phi, the learned parameters, flat: per layer weight_ih [4*hidden][inputs], weight_hh [4*hidden][hidden],
// bias [4*hidden]; then weight_out [read_outs][hidden] and bias_out [read_outs]; then weight_tensor
// [4*hidden][tensor_inputs], of what all coordinates of a tensor have in common. Gate order i, f, g, o, as in
// torch.nn.LSTMCell. (How kernels read it: packed_layout.h.)
#pragma once

#include <cmath>
#include <cstdint>

#include "features.h"

namespace l2l {

constexpr int kGates = 4;
constexpr int kMinHidden = 4, kMaxHidden = 64;
constexpr int kMaxLayers = 4;
constexpr int kMaxExtraInputs = 16, kMaxOutputs = 16, kMaxTensorInputs = 16;

struct Config {
  int hidden = 20;
  int layers = 2;
  Preprocess preprocess = Preprocess::log_sign;
  float p = 10.f;             // log-sign threshold exponent: gradients below exp(-p) are passed linearly
  float output_scale = 0.1f;  // a factor of the update
  int gac = 0;                // global averaging cells: the first of every layer's units
  int extra = 0;              // inputs beside the features of the gradient
  int outputs = 1;            // of which the first is the update
  int tensor_inputs = 0;      // inputs per tensor, a part of the first layer's bias
  Rates rates{};              // of kinds with moving averages

  // One gradient in, one update out, every coordinate by itself: what the fastest kernels are for.
  L2L_HOST_DEVICE bool is_plain() const { return gac == 0 && extra == 0 && outputs == 1; }

  L2L_HOST_DEVICE int features() const { return feature_count(preprocess); }
  L2L_HOST_DEVICE int inputs(int layer) const { return layer == 0 ? features() + extra : hidden; }

  L2L_HOST_DEVICE int averages() const { return average_count(preprocess); }
  // Rows of the read-out: the outputs, or what the one update is made of.
  L2L_HOST_DEVICE int read_outs() const { return averages() > 0 ? kNormalizedReadOuts : outputs; }

  // Rows of a state tile, see state_io.h.
  L2L_HOST_DEVICE int rows() const { return average_row() + averages(); }
  L2L_HOST_DEVICE int h_row(int layer) const { return 2 * layer * hidden; }
  L2L_HOST_DEVICE int c_row(int layer) const { return (2 * layer + 1) * hidden; }
  L2L_HOST_DEVICE int average_row() const { return 2 * layers * hidden; }

  // Offsets into phi.
  L2L_HOST_DEVICE int layer_size(int layer) const { return kGates * hidden * (inputs(layer) + hidden + 1); }
  L2L_HOST_DEVICE int layer_begin(int layer) const {
    return layer == 0 ? 0 : layer_size(0) + (layer - 1) * layer_size(1);
  }
  L2L_HOST_DEVICE int weight_ih(int layer) const { return layer_begin(layer); }
  L2L_HOST_DEVICE int weight_hh(int layer) const { return layer_begin(layer) + kGates * hidden * inputs(layer); }
  L2L_HOST_DEVICE int bias(int layer) const { return weight_hh(layer) + kGates * hidden * hidden; }
  L2L_HOST_DEVICE int weight_out() const { return layer_begin(layers); }
  L2L_HOST_DEVICE int bias_out() const { return weight_out() + read_outs() * hidden; }
  L2L_HOST_DEVICE int weight_tensor() const { return bias_out() + read_outs(); }
  L2L_HOST_DEVICE int phi_size() const { return weight_tensor() + kGates * hidden * tensor_inputs; }
};

L2L_HOST_DEVICE Features make_features(const Config& config) {
  return {config.preprocess, std::exp(-config.p), 1.f / config.p, std::exp(config.p)};
}

// Of a tensor's averages after `age` >= 1 steps; in float64, for small ages and long memories.
L2L_HOST_DEVICE Correction make_correction(const Config& config, int64_t age) {
  Correction result{};
  for (int k = 0; k < config.averages(); k++) {
    const double rest = -std::expm1(static_cast<double>(age) * std::log1p(-static_cast<double>(config.rates.of[k])));
    const double factor = 1.0 / rest;
    result.of[k] = static_cast<float>(k < 2 ? factor : std::sqrt(factor));
  }
  return result;
}

}  // namespace l2l
