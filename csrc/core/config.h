// What an operator call fixes besides its tensors, and where the parts of phi and of a state are. No ATen, no CUDA
// runtime: the CPU, CUDA and Python sides share it.
//
// phi, the learned parameters, flat: per layer weight_ih [4*hidden][inputs], weight_hh [4*hidden][hidden],
// bias [4*hidden]; then weight_out [outputs][hidden] and bias_out [outputs]. Gate order i, f, g, o, as in
// torch.nn.LSTMCell. (How kernels read it: packed_layout.h.)
#pragma once

#include <cmath>
#include <cstdint>

#include "features.h"

namespace l2l {

constexpr int kGates = 4;
constexpr int kMinHidden = 4, kMaxHidden = 64;
constexpr int kMaxLayers = 4;
constexpr int kMaxExtraInputs = 16, kMaxOutputs = 16;

struct Config {
  int hidden = 20;
  int layers = 2;
  Preprocess preprocess = Preprocess::log_sign;
  float p = 10.f;             // log-sign threshold exponent: gradients below exp(-p) are passed linearly
  float output_scale = 0.1f;  // the update is output_scale times the read-out
  int gac = 0;                // global averaging cells: the first of every layer's units
  int extra = 0;              // inputs beside the features of the gradient
  int outputs = 1;            // of which the first is the update

  // One input, one output, every coordinate by itself: what the fastest kernels are for.
  L2L_HOST_DEVICE bool is_plain() const { return gac == 0 && extra == 0 && outputs == 1; }

  L2L_HOST_DEVICE int features() const { return feature_count(preprocess); }
  L2L_HOST_DEVICE int inputs(int layer) const { return layer == 0 ? features() + extra : hidden; }

  // Rows of a state tile, see state_io.h.
  L2L_HOST_DEVICE int rows() const { return 2 * layers * hidden; }
  L2L_HOST_DEVICE int h_row(int layer) const { return 2 * layer * hidden; }
  L2L_HOST_DEVICE int c_row(int layer) const { return (2 * layer + 1) * hidden; }

  // Offsets into phi.
  L2L_HOST_DEVICE int layer_size(int layer) const { return kGates * hidden * (inputs(layer) + hidden + 1); }
  L2L_HOST_DEVICE int layer_begin(int layer) const {
    return layer == 0 ? 0 : layer_size(0) + (layer - 1) * layer_size(1);
  }
  L2L_HOST_DEVICE int weight_ih(int layer) const { return layer_begin(layer); }
  L2L_HOST_DEVICE int weight_hh(int layer) const { return layer_begin(layer) + kGates * hidden * inputs(layer); }
  L2L_HOST_DEVICE int bias(int layer) const { return weight_hh(layer) + kGates * hidden * hidden; }
  L2L_HOST_DEVICE int weight_out() const { return layer_begin(layers); }
  L2L_HOST_DEVICE int bias_out() const { return weight_out() + outputs * hidden; }
  L2L_HOST_DEVICE int phi_size() const { return bias_out() + outputs; }
};

L2L_HOST_DEVICE Features make_features(const Config& config) {
  return {config.preprocess, std::exp(-config.p), 1.f / config.p, std::exp(config.p)};
}

}  // namespace l2l
