#include "packing.h"

#include <algorithm>

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

// The forward weights of a layer, packed as floats, as other operands. from: [hidden][1 + inputs + hidden][4].
void round_weights(const float* from, const Config& config, int layer, Operands operands, float* to) {
  const int inputs = config.inputs(layer), hidden = config.hidden;
  const auto pack = [&](int rows) {
    const int step = operands == Operands::pairs ? 2 : 1;
    for (int k = 0; k < rows; k += step, from += step * kGates, to += kGates)
      for (int g = 0; g < kGates; g++) {
        const uint32_t low = nearest_bfloat16(from[g]), high = k + 1 < rows ? nearest_bfloat16(from[kGates + g]) : 0;
        to[g] = operands == Operands::pairs ? float_of(low | high << 16) : decode_bfloat16(low);
      }
    if (step == 2 && rows % 2 == 1) from -= kGates;
  };
  for (int j = 0; j < hidden; j++) {
    to = std::copy_n(from, kGates, to);
    from += kGates;
    pack(inputs);
    pack(hidden);
  }
}

}  // namespace

PackedNetwork::PackedNetwork(const Config& config, const float* phi, Direction direction, Operands operands) {
  const int hidden = config.hidden, rows = kGates * hidden;
  const PackedLayout layout(config);
  network_.config = config;
  network_.features = make_features(config);
  network_.operands = operands;

  size_t size = layout.floats(config);
  if (operands != Operands::floats)
    for (int l = 0; l < config.layers; l++) size += static_cast<size_t>(hidden) * network_.forward_unit(l);
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
    if (operands != Operands::floats) {
      float* rounded = take(static_cast<size_t>(hidden) * network_.forward_unit(l));
      round_weights(forward, config, l, operands, rounded);
      forward = rounded;
    }
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
