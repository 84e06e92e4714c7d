// phi in shared memory for networks with extra inputs and several outputs: as weights.cuh, but a unit of the first
// layer has `extra` more quadruples behind those of the features, and there are several read-outs.
#pragma once

#include "weights.cuh"

namespace l2l {

template <int H>
struct GacPacked {
  L2L_HOST_DEVICE static constexpr int inputs(int layer, int extra) { return layer == 0 ? kMaxFeatures + extra : H; }
  L2L_HOST_DEVICE static constexpr int unit(int layer, int extra) { return 1 + inputs(layer, extra) + H; }
  L2L_HOST_DEVICE static constexpr int layer(int layer, int extra) {
    return layer == 0 ? 0 : H * (unit(0, extra) + (layer - 1) * unit(1, extra));
  }
  L2L_HOST_DEVICE static int out(const Config& c) { return layer(c.layers, c.extra); }  // [outputs][H], [outputs]
  L2L_HOST_DEVICE static int bytes(const Config& c) { return 16 * out(c) + (4 * c.outputs * (H + 1) + 15) / 16 * 16; }
};

// All threads of the block take part; a barrier must follow.
template <int H>
__device__ __forceinline__ void pack_gac_network(const Config& config, const float* phi, float4* packed) {
  float* floats = reinterpret_cast<float*>(packed);
  for (int l = 0; l < config.layers; l++) {
    float* layer = floats + 4 * GacPacked<H>::layer(l, config.extra);
    const int unit = GacPacked<H>::unit(l, config.extra), columns = config.inputs(l);
    pack_matrix<H>(phi + config.bias(l), 1, unit, 0, layer);
    pack_matrix<H>(phi + config.weight_hh(l), H, unit, 1 + GacPacked<H>::inputs(l, config.extra), layer);
    const float* matrix = phi + config.weight_ih(l);
    for (int i = threadIdx.x; i < kGates * H * columns; i += blockDim.x) {
      const int row = i / columns, k = i - row * columns;
      const int gate = row / H, j = row - gate * H;
      // With one feature, the place of the second stays empty.
      const int place = l == 0 && k >= config.features() ? kMaxFeatures + k - config.features() : k;
      layer[4 * (j * unit + 1 + place) + gate] = gate_scale(gate) * matrix[i];
    }
  }
  if (config.features() < kMaxFeatures)
    for (int i = threadIdx.x; i < kGates * H; i += blockDim.x)
      floats[4 * (i / kGates * GacPacked<H>::unit(0, config.extra) + kMaxFeatures) + i % kGates] = 0.f;
  for (int i = threadIdx.x; i < config.outputs * (H + 1); i += blockDim.x) {
    const bool update = i < H || i == config.outputs * H;
    floats[4 * GacPacked<H>::out(config) + i] = (update ? config.output_scale : 1.f) * phi[config.weight_out() + i];
  }
}

}  // namespace l2l
