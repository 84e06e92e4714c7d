// phi in shared memory as mma_products.cuh reads it: split, and in the order of fragments.
#pragma once

#include "../core/cell.h"
#include "../core/packed_layout.h"
#include "mma_products.cuh"

namespace l2l {

// phi in shared memory for these products. Of every layer first the weights, [groups of units][pairs of groups of
// inputs][large parts, small parts][lanes]: a lane's four numbers of one multiplication for gates i and f and one for g
// and o; then the biases, [units]. Behind the layers the read-out, weight_out and bias_out. Counted in quadruples.
template <int H, int Features>
struct MmaWeights {
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
__device__ __forceinline__ void pack_mma_network(const Config& config, const float* phi, float4* packed) {
  using Weights = MmaWeights<H, Features>;
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
      const unsigned large = nearest_tf32(w);
      weights[256 * block + i % 128] = large;
      weights[256 * block + 128 + i % 128] = nearest_tf32(w - __uint_as_float(large));
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
