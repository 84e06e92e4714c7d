// phi in shared memory, as packed_layout.h has it. The first layer always has room for `Features` inputs that are made
// of the gradient, kGradientFeatures without averages: with one feature the other weight is zero.
#pragma once

#include "../core/cell.h"
#include "../core/packed_layout.h"
#include "../core/state_io.h"
#include "compat.cuh"

namespace l2l {

template <int H, int Features = kGradientFeatures>
struct Packed {
  static constexpr int kReadOuts = Features == kNormalizedFeatures ? kNormalizedReadOuts : 1;
  L2L_HOST_DEVICE static constexpr PackedLayout layout(int extra = 0) { return PackedLayout(H, Features + extra); }
  // Of a network without extra inputs: quadruples of a unit, and before a layer.
  L2L_HOST_DEVICE static constexpr int unit(int layer) { return layout().unit(layer); }
  L2L_HOST_DEVICE static constexpr int layer(int layer) { return layout().layer(layer); }
  L2L_HOST_DEVICE static constexpr int out(int layers) { return layout().out(layers); }
  L2L_HOST_DEVICE static constexpr int bytes(int layers, int extra = 0, int outputs = kReadOuts) {
    return (4 * layout(extra).floats(layers, outputs) + 15) / 16 * 16;
  }
};

// One weight matrix of a layer, rows gate * H + unit of `columns` numbers, into the quadruples from `first` of each
// unit; columns from `gap` on `skip` quadruples further.
template <int H>
__device__ __forceinline__ void pack_matrix(const float* matrix, int columns, int unit_quadruples, int first,
                                            float* packed, int gap = 0, int skip = 0) {
  for (int i = threadIdx.x; i < kGates * H * columns; i += blockDim.x) {
    const int row = i / columns, k = i - row * columns;
    const int gate = row / H, unit = row - gate * H;
    const int place = first + k + (k >= gap ? skip : 0);
    packed[4 * (unit * unit_quadruples + place) + gate] = gate_scale(gate) * matrix[i];
  }
}

// All threads of the block take part; a barrier must follow.
template <int H, int Features = kGradientFeatures>
__device__ __forceinline__ void pack_network(const Config& config, const float* phi, float4* packed) {
  const PackedLayout layout = Packed<H, Features>::layout(config.extra);
  const int empty = Features - config.features();
  float* floats = reinterpret_cast<float*>(packed);
  for (int l = 0; l < config.layers; l++) {
    float* layer = floats + 4 * layout.layer(l);
    const int unit = layout.unit(l);
    pack_matrix<H>(phi + config.bias(l), 1, unit, 0, layer);
    pack_matrix<H>(phi + config.weight_ih(l), config.inputs(l), unit, 1, layer, config.features(), l == 0 ? empty : 0);
    pack_matrix<H>(phi + config.weight_hh(l), H, unit, 1 + layout.inputs(l), layer);
  }
  if (empty > 0)
    for (int i = threadIdx.x; i < kGates * H; i += blockDim.x)
      floats[4 * (i / kGates * layout.unit(0) + Features) + i % kGates] = 0.f;
  const int read_outs = Features == kNormalizedFeatures ? kNormalizedReadOuts : config.outputs;
  for (int i = threadIdx.x; i < read_outs * (H + 1); i += blockDim.x)
    floats[4 * layout.out(config.layers) + i] = read_out_scale(config, i) * phi[config.weight_out() + i];
}

}  // namespace l2l
