#include "packing.h"

#include "../core/cell.h"

namespace l2l {
namespace {

int round_up_4(int n) { return (n + 3) / 4 * 4; }

// Walks one layer of phi unit by unit, along the rows of its four gates: visit(quadruple, gate, index in phi).
template <class Visit>
void for_each_quadruple(const Config& config, int layer, const Visit& visit) {
  const PhiLayer phi(config, layer);
  const int hidden = config.hidden, inputs = config.inputs(layer);
  int at = 0;
  for (int j = 0; j < hidden; j++) {
    for (int g = 0; g < kGates; g++) visit(at, g, phi.bias + g * hidden + j);
    at++;
    for (int k = 0; k < inputs; k++, at++)
      for (int g = 0; g < kGates; g++) visit(at, g, phi.weight_ih + (g * hidden + j) * inputs + k);
    for (int k = 0; k < hidden; k++, at++)
      for (int g = 0; g < kGates; g++) visit(at, g, phi.weight_hh + (g * hidden + j) * hidden + k);
  }
}

// A matrix [rows][columns] of one layer, whose rows are the units of each gate in turn, as the kernels read it
// backward: [ceil(columns / 4)][units, four gates each][4].
void pack_transposed(const float* from, int hidden, int columns, float* to) {
  const size_t block = 4 * static_cast<size_t>(kGates) * hidden;
  for (int g = 0; g < kGates; g++)
    for (int j = 0; j < hidden; j++, from += columns) {
      float* row = to + 4 * (kGates * j + g);
      for (int k = 0; k < columns; k++) row[k / 4 * block + k % 4] = from[k];
    }
}

}  // namespace

PackedNetwork::PackedNetwork(const Config& config, const float* phi, Direction direction) {
  const int hidden = config.hidden, rows = kGates * hidden;
  const PackedLayout layout(config);
  network_.config = config;
  network_.features = make_features(config);

  size_t size = layout.floats(config);
  if (direction == Direction::backward)
    for (int l = 0; l < config.layers; l++)
      size += static_cast<size_t>(rows) * (round_up_4(config.inputs(l)) + round_up_4(hidden));
  storage_.assign(size, 0.f);
  float* next = storage_.data();
  const auto take = [&next](size_t n) {
    float* begin = next;
    next += n;
    return begin;
  };

  float scales[kGates];
  for (int g = 0; g < kGates; g++) scales[g] = gate_scale(g);
  for (int l = 0; l < config.layers; l++) {
    const int inputs = config.inputs(l);
    float* forward = take(static_cast<size_t>(rows) * layout.unit(l));
    for_each_quadruple(config, l, [&](int at, int g, int from) { forward[kGates * at + g] = scales[g] * phi[from]; });
    network_.layer[l] = {forward, nullptr, nullptr};
    if (direction == Direction::forward) continue;
    float* backward_input = take(static_cast<size_t>(rows) * round_up_4(inputs));
    float* backward_h = take(static_cast<size_t>(rows) * round_up_4(hidden));
    pack_transposed(phi + config.weight_ih(l), hidden, inputs, backward_input);
    pack_transposed(phi + config.weight_hh(l), hidden, hidden, backward_h);
    network_.layer[l] = {forward, backward_input, backward_h};
  }
  const int read_outs = config.read_outs();
  float* out = take(static_cast<size_t>(read_outs) * (hidden + 1));
  for (int i = 0; i < read_outs * (hidden + 1); i++) out[i] = read_out_scale(config, i) * phi[config.weight_out() + i];
  network_.weight_out = out;
  network_.bias_out = out + read_outs * hidden;
  float* tensor = take(static_cast<size_t>(rows) * config.tensor_inputs);
  network_.weight_tensor = tensor;
  for (int j = 0; j < hidden; j++)
    for (int k = 0; k < config.tensor_inputs; k++)
      for (int g = 0; g < kGates; g++) *tensor++ = scales[g] * phi[phi_index_of_tensor_input(config, j, k, g)];
}

void unpack_gradient(const Config& config, const double* sums, float* grad_phi) {
  const PackedLayout layout(config);
  for (int l = 0; l < config.layers; l++) {
    const double* from = sums + kGates * layout.layer(l);
    for_each_quadruple(config, l,
                       [&](int at, int g, int to) { grad_phi[to] = static_cast<float>(from[kGates * at + g]); });
  }
  const double* out = sums + kGates * layout.out(config.layers);
  const int read_out = config.read_outs() * (config.hidden + 1);
  for (int i = 0; i < read_out; i++)
    grad_phi[config.weight_out() + i] = static_cast<float>(read_out_scale(config, i) * out[i]);
  const double* tensor = out + read_out;
  for (int j = 0; j < config.hidden; j++)
    for (int k = 0; k < config.tensor_inputs; k++)
      for (int g = 0; g < kGates; g++)
        grad_phi[phi_index_of_tensor_input(config, j, k, g)] = static_cast<float>(*tensor++);
}

}  // namespace l2l
