#include "packing.h"

#include "../core/cell.h"

namespace l2l {
namespace {

int round_up_4(int n) { return (n + 3) / 4 * 4; }

}  // namespace

PackedNetwork::PackedNetwork(const Config& config, const float* phi) {
  const int hidden = config.hidden, rows = kGates * hidden;
  const PackedLayout layout(config);
  network_.config = config;
  network_.features = make_features(config);

  size_t size = layout.floats(config);
  for (int l = 0; l < config.layers; l++)
    size += static_cast<size_t>(rows) * (round_up_4(config.inputs(l)) + round_up_4(hidden));
  storage_.assign(size, 0.f);
  float* next = storage_.data();
  const auto take = [&next](size_t n) {
    float* begin = next;
    next += n;
    return begin;
  };

  for (int l = 0; l < config.layers; l++) {
    const int inputs = config.inputs(l), unit = layout.unit(l);
    const PhiLayer from(config, l);
    float* forward = take(static_cast<size_t>(rows) * unit);
    float* backward_input = take(static_cast<size_t>(rows) * round_up_4(inputs));
    float* backward_h = take(static_cast<size_t>(rows) * round_up_4(hidden));
    for (int j = 0; j < hidden; j++)
      for (int k = 0; k < unit; k++)
        for (int g = 0; g < kGates; g++) {
          const float w = phi[from.index(j, k, g)];
          forward[(static_cast<size_t>(j) * unit + k) * kGates + g] = gate_scale(g) * w;
          if (k == 0) continue;
          float* backward = k <= inputs ? backward_input : backward_h;
          const int input = k <= inputs ? k - 1 : k - 1 - inputs;
          backward[(static_cast<size_t>(input / 4) * rows + kGates * j + g) * 4 + input % 4] = w;
        }
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
      for (int g = 0; g < kGates; g++) *tensor++ = gate_scale(g) * phi[phi_index_of_tensor_input(config, j, k, g)];
}

void unpack_gradient(const Config& config, const double* sums, float* grad_phi) {
  const PackedLayout layout(config);
  for (int l = 0; l < config.layers; l++) {
    const PhiLayer to(config, l);
    const int unit = layout.unit(l);
    const double* from = sums + kGates * layout.layer(l);
    for (int j = 0; j < config.hidden; j++)
      for (int k = 0; k < unit; k++)
        for (int g = 0; g < kGates; g++) grad_phi[to.index(j, k, g)] = static_cast<float>(*from++);
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
