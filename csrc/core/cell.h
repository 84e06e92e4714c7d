// One LSTM cell from its pre-activations on, forward and backward. Shared by the CPU (V a SIMD vector) and the GPU
// (V a float). M is the arithmetic of the caller: M::V and M::exp2, exp2_minus_1, quotient, sigmoid_scaled,
// tanh_scaled, min(float, V).
//
// Pre-activations come scaled, a = -log2(e) x for the gates i, f, o and a = 2 log2(e) x for g, so that sigmoid(x) =
// 1 / (1 + 2^a) and tanh(x) = (2^a - 1) / (2^a + 1): the scale is folded into the weights once per launch.
#pragma once

#include "host_device.h"

namespace l2l {

constexpr float kLog2E = 1.44269504088896341f;
// From 2^30 on, tanh rounds to 1; cutting its exponential there keeps products of two denominators finite.
constexpr float kTanhBound = 30.f;

L2L_HOST_DEVICE constexpr float gate_scale(int gate) { return gate == 2 ? 2.f * kLog2E : -kLog2E; }

// What the backward pass reads: activations and tanh(c').
template <class V>
struct Gates {
  V i, f, g, o, tanh_c;
};

template <class V>
struct GateGradients {
  V i, f, g, o;
};

// Forward without a trace: c is replaced by c', h' is returned. i * g and o * tanh(c') take one division each.
template <class M>
L2L_HOST_DEVICE typename M::V cell_step(typename M::V i, typename M::V f, typename M::V g, typename M::V o,
                                        typename M::V& c) {
  using V = typename M::V;
  const V one_i = 1.f + M::exp2(i);
  const V one_f = 1.f + M::exp2(f);
  const V one_o = 1.f + M::exp2(o);
  const V e = M::exp2_minus_1(M::min(kTanhBound, g));
  c = M::quotient(c, one_f) + M::quotient(e, (e + 2.f) * one_i);
  const V ec = M::exp2_minus_1(M::min(kTanhBound, c * (2.f * kLog2E)));
  return M::quotient(ec, (ec + 2.f) * one_o);
}

// Forward that keeps what the backward pass needs: fills the activations of gates, replaces c, returns h'.
template <class M>
L2L_HOST_DEVICE typename M::V cell_forward(typename M::V i, typename M::V f, typename M::V g, typename M::V o,
                                           typename M::V& c, Gates<typename M::V>& gates) {
  gates.i = M::sigmoid_scaled(i);
  gates.f = M::sigmoid_scaled(f);
  gates.g = M::tanh_scaled(M::min(kTanhBound, g));
  gates.o = M::sigmoid_scaled(o);
  c = gates.f * c + gates.i * gates.g;
  gates.tanh_c = M::tanh_scaled(M::min(kTanhBound, c * (2.f * kLog2E)));
  return gates.o * gates.tanh_c;
}

// Backward: from d loss / d h' and d loss / d c' (in dc) to the gradients of the unscaled pre-activations; dc becomes
// the gradient of the previous c.
template <class V>
L2L_HOST_DEVICE GateGradients<V> cell_backward(const Gates<V>& gates, V c_previous, V dh, V& dc) {
  const V through_o = dh * gates.o;
  const V d = dc + through_o * (1.f - gates.tanh_c * gates.tanh_c);
  const V df = d * gates.f;
  const V di = d * gates.i;
  dc = df;
  return {di * gates.g * (1.f - gates.i), df * c_previous * (1.f - gates.f), di * (1.f - gates.g * gates.g),
          through_o * gates.tanh_c * (1.f - gates.o)};
}

}  // namespace l2l
