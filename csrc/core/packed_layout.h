// phi as the kernels read it, and their sums for d phi: per layer [hidden][1 + inputs + hidden] quadruples of the gates
// i, f, g, o, then the read-out, weight_out [outputs][hidden] and bias_out [outputs]. Quadruple 0 of a unit is its
// bias. So the four gates of a unit lie side by side: one pass over the inputs, and one load of 16 bytes, feeds all.
// Weights are scaled by gate_scale (cell.h), the update's read-out by output_scale.
#pragma once

#include "config.h"

namespace l2l {

struct PackedLayout {
  int hidden, first_inputs;  // inputs of layer 0, perhaps more than the network has: they stay empty

  L2L_HOST_DEVICE constexpr PackedLayout(int hidden, int first_inputs) : hidden(hidden), first_inputs(first_inputs) {}
  // Without empty places.
  L2L_HOST_DEVICE explicit PackedLayout(const Config& c) : PackedLayout(c.hidden, c.inputs(0)) {}

  L2L_HOST_DEVICE constexpr int inputs(int layer) const { return layer == 0 ? first_inputs : hidden; }
  // Quadruples of a unit, and before a layer's first.
  L2L_HOST_DEVICE constexpr int unit(int layer) const { return 1 + inputs(layer) + hidden; }
  L2L_HOST_DEVICE constexpr int layer(int layer) const {
    return layer == 0 ? 0 : hidden * (unit(0) + (layer - 1) * unit(1));
  }
  L2L_HOST_DEVICE constexpr int out(int layers) const { return layer(layers); }
  L2L_HOST_DEVICE constexpr int floats(int layers, int outputs) const {
    return kGates * out(layers) + outputs * (hidden + 1);
  }
};

// Where in phi the gate `gate` of quadruple k of a unit comes from, in a layout without empty places.
L2L_HOST_DEVICE int phi_index(const Config& c, int layer, int unit, int k, int gate) {
  const int row = gate * c.hidden + unit, inputs = c.inputs(layer);
  return k == 0        ? c.bias(layer) + row
         : k <= inputs ? c.weight_ih(layer) + row * inputs + k - 1
                       : c.weight_hh(layer) + row * c.hidden + k - 1 - inputs;
}

// The factor of element i of the read-out, from weight_out on: only the first output is the update.
L2L_HOST_DEVICE float read_out_scale(const Config& c, int i) {
  return i < c.hidden || i == c.outputs * c.hidden ? c.output_scale : 1.f;
}

}  // namespace l2l
