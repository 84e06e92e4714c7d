// phi as the kernels read it from shared memory: per layer [hidden][1 + inputs + hidden] quadruples of the gates i, f,
// g, o; quadruple 0 of a unit is its bias. So one 16-byte load, the same for all threads of a warp, feeds the four
// gates of a unit. Gates are scaled by gate_scale, the read-out by output_scale. The first layer always has
// kMaxFeatures inputs: with one feature the other weight is zero.
#pragma once

#include "../core/cell.h"
#include "compat.cuh"

namespace l2l {

template <int H>
struct Packed {
  // inputs[0] of a layer: features, padded, or the units of the layer below.
  L2L_HOST_DEVICE static constexpr int inputs(int layer) { return layer == 0 ? kMaxFeatures : H; }
  L2L_HOST_DEVICE static constexpr int unit(int layer) { return 1 + inputs(layer) + H; }  // quadruples of a unit
  L2L_HOST_DEVICE static constexpr int layer(int layer) {                                 // first quadruple of a layer
    return layer == 0 ? 0 : H * (unit(0) + (layer - 1) * unit(1));
  }
  L2L_HOST_DEVICE static constexpr int out(int layers) { return layer(layers); }  // weight_out [H], bias_out
  L2L_HOST_DEVICE static constexpr int quadruples(int layers) { return out(layers) + H / 4 + 1; }
  L2L_HOST_DEVICE static constexpr int bytes(int layers) { return 16 * quadruples(layers); }
};

// One weight matrix of a layer, rows gate * H + unit of `columns` numbers, into the quadruples from `first` of each
// unit.
template <int H>
__device__ __forceinline__ void pack_matrix(const float* matrix, int columns, int unit_quadruples, int first,
                                            float* packed) {
  for (int i = threadIdx.x; i < kGates * H * columns; i += blockDim.x) {
    const int row = i / columns, k = i - row * columns;
    const int gate = row / H, unit = row - gate * H;
    packed[4 * (unit * unit_quadruples + first + k) + gate] = gate_scale(gate) * matrix[i];
  }
}

// All threads of the block take part; a barrier must follow.
template <int H>
__device__ __forceinline__ void pack_network(const Config& config, const float* phi, float4* packed) {
  float* out = reinterpret_cast<float*>(packed);
  for (int l = 0; l < config.layers; l++) {
    float* layer = out + 4 * Packed<H>::layer(l);
    const int unit = Packed<H>::unit(l);
    pack_matrix<H>(phi + config.bias(l), 1, unit, 0, layer);
    pack_matrix<H>(phi + config.weight_ih(l), config.inputs(l), unit, 1, layer);
    pack_matrix<H>(phi + config.weight_hh(l), H, unit, 1 + Packed<H>::inputs(l), layer);
  }
  if (config.features() < kMaxFeatures)
    for (int i = threadIdx.x; i < kGates * H; i += blockDim.x)
      out[4 * (i / kGates * Packed<H>::unit(0) + kMaxFeatures) + i % kGates] = 0.f;
  for (int i = threadIdx.x; i <= H; i += blockDim.x)
    out[4 * Packed<H>::out(config.layers) + i] = config.output_scale * phi[config.weight_out() + i];
}

}  // namespace l2l
