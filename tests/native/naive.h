// The learned optimizer once more, in double precision and one coordinate at a time: what the kernels are compared
// with.
#pragma once

#include <cmath>
#include <vector>

#include "core/config.h"

namespace naive {

using l2l::Config;
using Vector = std::vector<double>;

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// What one step of one coordinate leaves for the way back.
struct Trace {
  double grad;
  Vector features, old_state, new_state;
  std::vector<Vector> gates;  // per layer: i, f, g, o of all units
};

// Log-sign preprocessing (Andrychowicz et al. 2016, appendix A), or the gradient itself.
inline Vector features(const Config& c, double g) {
  if (c.preprocess == l2l::Preprocess::identity) return {g};
  if (std::abs(g) >= std::exp(-(double)c.p)) return {std::log(std::abs(g)) / c.p, g > 0 ? 1.0 : -1.0};
  return {-1, std::exp((double)c.p) * g};
}

// One step; `state` is replaced. Returns the outputs, of which the first is the update.
inline Vector step(const Config& c, const Vector& phi, double grad, const Vector& extra, Vector& state, Trace& trace) {
  const int hidden = c.hidden;
  trace = {grad, features(c, grad), state, {}, {}};
  trace.features.insert(trace.features.end(), extra.begin(), extra.end());
  Vector x = trace.features;
  for (int l = 0; l < c.layers; l++) {
    const int inputs = c.inputs(l);
    Vector gates(4 * hidden);
    for (int row = 0; row < 4 * hidden; row++) {
      double a = phi[c.bias(l) + row];
      for (int k = 0; k < inputs; k++) a += phi[c.weight_ih(l) + row * inputs + k] * x[k];
      for (int k = 0; k < hidden; k++) a += phi[c.weight_hh(l) + row * hidden + k] * trace.old_state[c.h_row(l) + k];
      gates[row] = row / hidden == 2 ? std::tanh(a) : sigmoid(a);
    }
    x.assign(hidden, 0);
    for (int j = 0; j < hidden; j++) {
      double& cell = state[c.c_row(l) + j];
      cell = gates[hidden + j] * cell + gates[j] * gates[2 * hidden + j];
      x[j] = state[c.h_row(l) + j] = gates[3 * hidden + j] * std::tanh(cell);
    }
    trace.gates.push_back(gates);
  }
  trace.new_state = state;
  Vector outputs(c.outputs);
  for (int o = 0; o < c.outputs; o++) {
    outputs[o] = phi[c.bias_out() + o];
    for (int j = 0; j < hidden; j++) outputs[o] += phi[c.weight_out() + o * hidden + j] * x[j];
  }
  outputs[0] *= c.output_scale;
  return outputs;
}

// Back through one step of a network with one output: `d_state` (of the new state) becomes the gradient of the old one;
// adds to d_phi; returns d grad.
inline double step_backward(const Config& c, const Vector& phi, const Trace& trace, double d_update, Vector& d_state,
                            Vector& d_phi) {
  const int hidden = c.hidden;
  Vector d_old(d_state.size()), d_below;
  const double out = c.output_scale * d_update;
  for (int j = 0; j < hidden; j++) {
    d_phi[c.weight_out() + j] += out * trace.new_state[c.h_row(c.layers - 1) + j];
    d_state[c.h_row(c.layers - 1) + j] += out * phi[c.weight_out() + j];
  }
  d_phi[c.bias_out()] += out;
  for (int l = c.layers - 1; l >= 0; l--) {
    const int inputs = c.inputs(l);
    const Vector& gates = trace.gates[l];
    Vector d_gates(4 * hidden);
    for (int j = 0; j < hidden; j++) {
      const double i = gates[j], f = gates[hidden + j], g = gates[2 * hidden + j], o = gates[3 * hidden + j];
      const double tanh_c = std::tanh(trace.new_state[c.c_row(l) + j]), dh = d_state[c.h_row(l) + j];
      const double dc = d_state[c.c_row(l) + j] + dh * o * (1 - tanh_c * tanh_c);
      d_gates[j] = dc * g * i * (1 - i);
      d_gates[hidden + j] = dc * trace.old_state[c.c_row(l) + j] * f * (1 - f);
      d_gates[2 * hidden + j] = dc * i * (1 - g * g);
      d_gates[3 * hidden + j] = dh * tanh_c * o * (1 - o);
      d_old[c.c_row(l) + j] = dc * f;
    }
    d_below.assign(inputs, 0);
    for (int row = 0; row < 4 * hidden; row++) {
      d_phi[c.bias(l) + row] += d_gates[row];
      for (int k = 0; k < inputs; k++) {
        const double x = l == 0 ? trace.features[k] : trace.new_state[c.h_row(l - 1) + k];
        d_phi[c.weight_ih(l) + row * inputs + k] += d_gates[row] * x;
        d_below[k] += d_gates[row] * phi[c.weight_ih(l) + row * inputs + k];
      }
      for (int k = 0; k < hidden; k++) {
        d_phi[c.weight_hh(l) + row * hidden + k] += d_gates[row] * trace.old_state[c.h_row(l) + k];
        d_old[c.h_row(l) + k] += d_gates[row] * phi[c.weight_hh(l) + row * hidden + k];
      }
    }
    if (l > 0)
      for (int k = 0; k < hidden; k++) d_state[c.h_row(l - 1) + k] += d_below[k];
  }
  d_state = d_old;
  if (c.preprocess == l2l::Preprocess::identity) return d_below[0];
  if (std::abs(trace.grad) >= std::exp(-(double)c.p)) return d_below[0] / (c.p * trace.grad);
  return d_below[1] * std::exp((double)c.p);
}

}  // namespace naive
