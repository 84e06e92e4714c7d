// Products of float32 matrices on tensor cores, whose operands have 11 significant bits (TF32): every number is split
// into a large and a small part, x = large + small up to 2^-22 of it, and of the product of two such sums the three
// largest terms are taken. What is left out is below 2^-21 of the product.
//
// Rows are coordinates, columns gates (the product is [coordinates x inputs] [inputs x gates]), so that a NaN of one
// coordinate stays in its row. Columns are so ordered that a lane ends up with the four gates of its units and
// coordinates, and with their new h just where the next product wants its inputs: nothing is exchanged between lanes.
//
// With g = lane / 4 and t = lane % 4, a lane has C adjacent coordinates, C g .. C g + C - 1 of the 8 C of its warp, and
// of these the units t, t + 4, t + 8, ...: "group" q of inputs or units is 4 q .. 4 q + 3, of which it has 4 q + t. A
// multiplication takes two groups of inputs and 16 coordinates, two of each lane, to 8 columns, half of what the units
// of a group have: gates i and f, or g and o, of unit 4 p + g / 2.
#pragma once

#include "../core/cell.h"
#include "compat.cuh"
#include "ptx.cuh"

namespace l2l {

// phi in shared memory for these products. Of every layer first the weights, [groups of units][pairs of groups of
// inputs][large parts, small parts][lanes]: a lane's four numbers of one multiplication for gates i and f and one for g
// and o; then the biases, [units]. Behind the layers the read-out, weight_out and bias_out. Counted in quadruples.
template <int H, int Features>
struct TensorWeights {
  static constexpr int kGroups = H / 4;
  // Groups of inputs from below; of the first layer's there is an empty one if need be, for their number to be even.
  static constexpr int kFirst = 1 + (kGroups + 1) % 2;
  L2L_HOST_DEVICE static constexpr int below(int layer) { return layer == 0 ? kFirst : kGroups; }
  L2L_HOST_DEVICE static constexpr int pairs(int layer) { return (below(layer) + kGroups) / 2; }
  // From one group of units to the next.
  L2L_HOST_DEVICE static constexpr int group(int layer) { return pairs(layer) * 2 * 32; }
  L2L_HOST_DEVICE static constexpr int biases(int layer) { return kGroups * group(layer); }
  L2L_HOST_DEVICE static constexpr int layer(int layer) {
    return layer == 0 ? 0 : biases(0) + H + (layer - 1) * (biases(1) + H);
  }
  L2L_HOST_DEVICE static constexpr int quadruples(int layers) { return layer(layers) + (H + 1 + 3) / 4; }
  static_assert(H % 4 == 0 && Features <= 4, "units in groups of four, features in one group");
};

#if L2L_CUDA_ARCH >= 800

__device__ __forceinline__ void split(float x, unsigned& large, unsigned& small) {
  large = ptx::to_tf32(x);
  small = ptx::to_tf32(x - __uint_as_float(large));
}

// A lane's part of N groups of inputs for its C coordinates.
template <int N, int C>
struct Inputs {
  unsigned large[N][C], small[N][C];

  __device__ __forceinline__ void set(int q, const float (&x)[C]) {
#pragma unroll
    for (int i = 0; i < C; i++) split(x[i], large[q][i], small[q][i]);
  }
};

// acc[i] += w x for coordinates 2 i and 2 i + 1 of every lane: one column block of 8 and two groups of inputs, `below`
// and `above`, for which w has a number each.
template <int C>
__device__ __forceinline__ void multiply_add(float (&acc)[C / 2][4], const unsigned (&below)[C],
                                             const unsigned (&above)[C], unsigned w_below, unsigned w_above) {
#pragma unroll
  for (int i = 0; i < C / 2; i++) {
    const unsigned a[4] = {below[2 * i], below[2 * i + 1], above[2 * i], above[2 * i + 1]};
    const unsigned b[2] = {w_below, w_above};
    ptx::mma_tf32(acc[i], a, b);
  }
}

// The same for gates i and f, and for g and o.
template <int C>
__device__ __forceinline__ void multiply_add(float (&acc)[2][C / 2][4], const unsigned (&below)[C],
                                             const unsigned (&above)[C], const uint4& w) {
  multiply_add<C>(acc[0], below, above, w.x, w.y);
  multiply_add<C>(acc[1], below, above, w.z, w.w);
}

// The pre-activations of one unit of the lane, from its biases and all inputs; weights: of the group, the lane's first.
// Coordinate c has gates i, f in acc[0][c / 2][c % 2 * 2 ...] and g, o in acc[1].
template <int C, int Below, int Own>
__device__ __forceinline__ void unit_products(const uint4* weights, const float4& bias, const Inputs<Below, C>& x,
                                              const Inputs<Own, C>& h, float (&acc)[2][C / 2][4]) {
#pragma unroll
  for (int i = 0; i < C / 2; i++) {
    acc[0][i][0] = acc[0][i][2] = bias.x;
    acc[0][i][1] = acc[0][i][3] = bias.y;
    acc[1][i][0] = acc[1][i][2] = bias.z;
    acc[1][i][1] = acc[1][i][3] = bias.w;
  }
#pragma unroll
  for (int q = 0; q < Below + Own; q += 2) {
    const uint4 large = weights[32 * q], small = weights[32 * q + 32];
    const unsigned(&below)[C] = q < Below ? x.large[q] : h.large[q - Below];
    const unsigned(&above)[C] = q + 1 < Below ? x.large[q + 1] : h.large[q + 1 - Below];
    const unsigned(&small_below)[C] = q < Below ? x.small[q] : h.small[q - Below];
    const unsigned(&small_above)[C] = q + 1 < Below ? x.small[q + 1] : h.small[q + 1 - Below];
    multiply_add<C>(acc, small_below, small_above, large);
    multiply_add<C>(acc, below, above, small);
    multiply_add<C>(acc, below, above, large);
  }
}

// The weight by which input `column` of the groups, of those from below and of the layer's own, goes into a gate.
template <int H>
__device__ __forceinline__ float weight_of(const Config& config, const float* phi, int layer, int below, int column,
                                           int row) {
  const int inputs = config.inputs(layer), own = column - 4 * below;
  if (own >= 0) return phi[config.weight_hh(layer) + row * H + own];
  return column < inputs ? phi[config.weight_ih(layer) + row * inputs + column] : 0.f;
}

// All threads of the block take part; a barrier must follow.
template <int H, int Features>
__device__ __forceinline__ void pack_tensor_network(const Config& config, const float* phi, float4* packed) {
  using Weights = TensorWeights<H, Features>;
  for (int l = 0; l < config.layers; l++) {
    const int below = Weights::below(l), pairs = Weights::pairs(l);
    unsigned* const weights = reinterpret_cast<unsigned*>(packed + Weights::layer(l));
    for (int i = static_cast<int>(threadIdx.x); i < 4 * 32 * Weights::kGroups * pairs;
         i += static_cast<int>(blockDim.x)) {
      const int number = i % 4, lane = i / 4 % 32, block = i / 128;  // block: of a group of units and a pair
      const int group = block / pairs, pair = block - group * pairs;
      const int unit = 4 * group + lane / 8, gate = number / 2 * 2 + lane / 4 % 2;
      const int column = 8 * pair + number % 2 * 4 + lane % 4;
      const float w = gate_scale(gate) * weight_of<H>(config, phi, l, below, column, gate * H + unit);
      split(w, weights[256 * block + i % 128], weights[256 * block + 128 + i % 128]);
    }
    float* const biases = reinterpret_cast<float*>(packed + Weights::layer(l) + Weights::biases(l));
    for (int i = static_cast<int>(threadIdx.x); i < kGates * H; i += static_cast<int>(blockDim.x))
      biases[i] = gate_scale(i % kGates) * phi[config.bias(l) + i % kGates * H + i / kGates];
  }
  float* const out = reinterpret_cast<float*>(packed + Weights::layer(config.layers));
  for (int i = static_cast<int>(threadIdx.x); i <= H; i += static_cast<int>(blockDim.x))
    out[i] = read_out_scale(config, i) * phi[config.weight_out() + i];
}
#endif

}  // namespace l2l
