#include "packing.h"

#include <cmath>

#include "../core/cell.h"

namespace l2l {
namespace {

int round_up_4(int n) { return (n + 3) / 4 * 4; }

// Element (gate, unit, k) of one layer's weights on [inputs, previous h].
struct LayerView {
  const Config& config;
  const float* phi;
  int layer;

  float weight(int gate, int unit, int k) const {
    const int row = gate * config.hidden + unit, inputs = config.inputs(layer);
    return k < inputs ? phi[config.weight_ih(layer) + row * inputs + k]
                      : phi[config.weight_hh(layer) + row * config.hidden + (k - inputs)];
  }
  float bias(int gate, int unit) const { return phi[config.bias(layer) + gate * config.hidden + unit]; }
};

}  // namespace

PackedNetwork::PackedNetwork(const Config& config, const float* phi) {
  const int hidden = config.hidden;
  network_.config = config;
  network_.log_sign = {std::exp(-config.p), 1.f / config.p, std::exp(config.p)};

  size_t size = 0;
  for (int l = 0; l < config.layers; l++)
    size += (size_t)4 * hidden * (config.inputs(l) + hidden + 1 + round_up_4(config.inputs(l)) + round_up_4(hidden));
  storage_.assign(size + (size_t)config.outputs * (hidden + 1), 0.f);
  float* next = storage_.data();
  const auto take = [&next](size_t n) {
    float* begin = next;
    next += n;
    return begin;
  };

  for (int l = 0; l < config.layers; l++) {
    const LayerView view{config, phi, l};
    const int inputs = config.inputs(l), rows = 4 * hidden;
    float* forward = take((size_t)rows * (inputs + hidden));
    float* bias = take(rows);
    float* backward_input = take((size_t)rows * round_up_4(inputs));
    float* backward_h = take((size_t)rows * round_up_4(hidden));
    for (int j = 0; j < hidden; j++)
      for (int g = 0; g < 4; g++) {
        const int row = 4 * j + g;
        bias[row] = gate_scale(g) * view.bias(g, j);
        for (int k = 0; k < inputs + hidden; k++) {
          const float w = view.weight(g, j, k);
          forward[((size_t)j * (inputs + hidden) + k) * 4 + g] = gate_scale(g) * w;
          float* backward = k < inputs ? backward_input : backward_h;
          const int input = k < inputs ? k : k - inputs;
          backward[((size_t)(input / 4) * rows + row) * 4 + input % 4] = w;
        }
      }
    network_.layer[l] = {forward, bias, backward_input, backward_h};
  }
  float* weight_out = take((size_t)config.outputs * hidden);
  float* bias_out = take(config.outputs);
  for (int o = 0; o < config.outputs; o++) {
    const float scale = o == 0 ? config.output_scale : 1.f;
    for (int j = 0; j < hidden; j++) weight_out[o * hidden + j] = scale * phi[config.weight_out() + o * hidden + j];
    bias_out[o] = scale * phi[config.bias_out() + o];
  }
  network_.weight_out = weight_out;
  network_.bias_out = bias_out;
}

void unpack_gradient(const Config& config, const double* sums, float* grad_phi) {
  const int hidden = config.hidden;
  for (int l = 0; l < config.layers; l++) {
    const int inputs = config.inputs(l);
    const double* weight = sums + gradient_layer(config, l);
    const double* bias = sums + gradient_bias(config, l);
    for (int j = 0; j < hidden; j++)
      for (int g = 0; g < 4; g++) {
        const int row = g * hidden + j;
        const double* unit = weight + 4L * j * (inputs + hidden) + g;
        for (int k = 0; k < inputs; k++) grad_phi[config.weight_ih(l) + row * inputs + k] = (float)unit[4 * k];
        for (int k = 0; k < hidden; k++)
          grad_phi[config.weight_hh(l) + row * hidden + k] = (float)unit[4 * (inputs + k)];
        grad_phi[config.bias(l) + row] = (float)bias[4 * j + g];
      }
  }
  const double* out = sums + gradient_out(config);
  for (int o = 0; o < config.outputs; o++) {
    const double scale = o == 0 ? config.output_scale : 1.0;
    for (int j = 0; j < hidden; j++)
      grad_phi[config.weight_out() + o * hidden + j] = (float)(scale * out[o * hidden + j]);
    grad_phi[config.bias_out() + o] = (float)(scale * out[config.outputs * hidden + o]);
  }
}

}  // namespace l2l
