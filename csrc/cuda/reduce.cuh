// d phi from the sums of the threads of all blocks of the backward kernel, added in a fixed order.
//
// Owns: a warp has 32 adjacent elements of phi; the 8 warps of a block have every eighth row of sums each. Shared
// memory:
//   their partial sums, which the first warp adds in order. Global memory: every sum that belongs to phi is read once.
#pragma once

#include "backward_layout.cuh"

namespace l2l {

constexpr int kReduceWarps = 8;

// Which of a block's sums belongs to element `index` of phi, and the factor it lacks.
template <int H, int L, int Features>
__device__ __forceinline__ int sum_of_phi(const Config& config, int index, float& factor) {
  using Sums = BackwardSums<H, L, Features>;
  using Layout = BackwardLayout<H, L, Features>;
  constexpr int kThreads = Layout::kThreads;
  if constexpr (Layout::kNormalized) {
    if (index >= config.weight_tensor()) {
      const int at = index - config.weight_tensor();
      const int row = at / config.tensor_inputs, input = at % config.tensor_inputs;
      factor = gate_scale(row / H);
      return Sums::tensor(input / kSlots, row / H) * kThreads + input % kSlots * H + row % H;
    }
    if (index >= config.weight_out()) {
      constexpr int kUnits = Layout::kReadOuts * H;
      const int at = index - config.weight_out(), unit = at % H;
      factor = 1.f;
      return at < kUnits ? Sums::out(unit % 2, at / H) * kThreads + unit / 2 * kQuads
                         : Sums::out_bias(at - kUnits) * kThreads;
    }
  }
  if (index >= config.weight_out()) {
    factor = config.output_scale;
    const int unit = index - config.weight_out();
    return unit < H ? Sums::out(unit % 2) * kThreads + unit / 2 * kQuads : Sums::out_bias() * kThreads;
  }
  int layer = 0;
  while (layer + 1 < L && index >= config.layer_begin(layer + 1)) layer++;
  // The inputs in the order of the weight phase: in layer 0 ones (its weight is the bias), features, h; above it the
  // units of the layer below, h.
  int row, input;
  if (index < config.weight_hh(layer)) {
    const int columns = config.inputs(layer), at = index - config.weight_ih(layer);
    row = at / columns;
    input = at % columns + (layer == 0 ? 1 : 0);
  } else if (index < config.bias(layer)) {
    const int at = index - config.weight_hh(layer);
    row = at / H;
    input = at % H + (layer == 0 ? 1 + Features : H);
  } else {
    row = index - config.bias(layer);
    input = layer == 0 ? 0 : -1;
  }
  const int gate = row / H, unit = row % H;
  factor = gate_scale(gate);
  if (input < 0) return Sums::bias(layer, gate) * kThreads + unit;
  return Sums::weight(layer, gate, input / kSlots) * kThreads + input % kSlots * H + unit;
}

template <int H, int L, int Features>
__global__ void __launch_bounds__(32 * kReduceWarps)
    reduce_kernel(const Config config, const double* __restrict__ sums, int blocks, float* __restrict__ grad_phi) {
  __shared__ double partial[kReduceWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int index = static_cast<int>(blockIdx.x) * 32 + lane;
  const bool inside = index < config.phi_size();
  float factor = 0.f;
  double sum = 0.;
  if (inside) {
    const double* column = sums + sum_of_phi<H, L, Features>(config, index, factor);
    for (int block = warp; block < blocks; block += kReduceWarps)
      sum += column[block * static_cast<int64_t>(BackwardSums<H, L, Features>::kRow)];
  }
  partial[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || !inside) return;
  for (int w = 1; w < kReduceWarps; w++) sum += partial[w][lane];
  grad_phi[index] = static_cast<float>(sum * static_cast<double>(factor));
}

}  // namespace l2l
