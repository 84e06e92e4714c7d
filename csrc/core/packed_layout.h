// phi as the kernels read it, and their sums for d phi: per layer [hidden][1 + inputs + hidden] quadruples of the gates
// i, f, g, o, then the read-out, weight_out [read_outs][hidden] and bias_out [read_outs], then the quadruples of the
// inputs per tensor, [hidden][tensor_inputs]. Quadruple 0 of a unit is its bias. So the four gates of a unit lie side
// by side: one pass over the inputs, and one load of 16 bytes, feeds all. Weights are scaled by gate_scale (cell.h),
// the read-out that is the update by output_scale.
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
  // Without the inputs per tensor, which come behind.
  L2L_HOST_DEVICE constexpr int floats(int layers, int read_outs) const {
    return kGates * out(layers) + read_outs * (hidden + 1);
  }
  L2L_HOST_DEVICE int floats(const Config& c) const {
    return floats(c.layers, c.read_outs()) + kGates * hidden * c.tensor_inputs;
  }
};

// Where a layer's parts of phi are: whoever packs a whole layer looks them up once.
struct PhiLayer {
  int hidden, inputs, weight_ih, weight_hh, bias;

  L2L_HOST_DEVICE PhiLayer(const Config& c, int layer)
      : hidden(c.hidden),
        inputs(c.inputs(layer)),
        weight_ih(c.weight_ih(layer)),
        weight_hh(c.weight_hh(layer)),
        bias(c.bias(layer)) {}

  // Where in phi the gate `gate` of quadruple k of a unit comes from, in a layout without empty places.
  L2L_HOST_DEVICE int index(int unit, int k, int gate) const {
    const int row = gate * hidden + unit;
    return k == 0        ? bias + row
           : k <= inputs ? weight_ih + row * inputs + k - 1
                         : weight_hh + row * hidden + k - 1 - inputs;
  }
};

L2L_HOST_DEVICE int phi_index(const Config& c, int layer, int unit, int k, int gate) {
  return PhiLayer(c, layer).index(unit, k, gate);
}

// The same of input k per tensor.
L2L_HOST_DEVICE int phi_index_of_tensor_input(const Config& c, int unit, int k, int gate) {
  return c.weight_tensor() + (gate * c.hidden + unit) * c.tensor_inputs + k;
}

// The factor of element i of the read-out, from weight_out on: only the first output is the update, if any is.
L2L_HOST_DEVICE float read_out_scale(const Config& c, int i) {
  const bool update = c.averages() == 0 && (i < c.hidden || i == c.read_outs() * c.hidden);
  return update ? c.output_scale : 1.f;
}

}  // namespace l2l
