// Back-propagation of networks without averages: what goes into backward_walk.cuh and comes out of it is made of the
// gradient alone.
#pragma once

#include "backward_walk.cuh"

namespace l2l {

template <int H, int L>
struct PlainBackward : BackwardWalk<H, L, kGradientFeatures, BackwardScalars, BackwardEntry, PlainBackward<H, L>> {
  using Base = BackwardWalk<H, L, kGradientFeatures, BackwardScalars, BackwardEntry, PlainBackward<H, L>>;
  using Layout = typename Base::Layout;
  using Base::entry, Base::gate_rows, Base::inputs, Base::s, Base::tile, Base::weights;

  // Fills `inputs` for the tile, on the walk back of adjoint.h.
  __device__ __forceinline__ void prepare_inputs() const {
    for_each_lane<H>([&](int lane) { prepare_inputs(lane); });
  }
  __device__ __forceinline__ void prepare_inputs(int lane) const {
    const int64_t at = (entry->record_tile + tile) * kTile + lane;
    const bool padding = lane >= this->count();
    float adjoint = 0.f;
#pragma unroll 1
    for (int t = s.steps; t >= 0; t--) {
      const SegmentStep& step = this->segment(t);
      const float g = step.record && !padding ? global(step.record)[at] : 0.f;
      const float du = walk_back(step, g, adjoint);
      if (t < s.steps) {
        float* row = inputs + t * (Layout::kInputRows * kTile) + lane;
        float x[kGradientFeatures];
        features_of<DeviceMath>(s.features, g, x);
#pragma unroll
        for (int k = 0; k < kGradientFeatures; k++) row[k * kTile] = x[k];
        row[kGradientFeatures * kTile] = s.functional.numel == 0 ? du : padding ? 0.f : s.functional.grad_update[at];
      }
    }
  }

  // d gradient of the functional step, whose gate gradients of layer 0 are the last in shared memory.
  __device__ __forceinline__ void store_grad_grad() const {
    for_each_lane<H>([&](int lane) { store_grad_grad(lane); });
  }
  __device__ __forceinline__ void store_grad_grad(int lane) const {
    if (lane >= this->count()) return;
    float d[kGradientFeatures] = {};
    for (int j = 0; j < H; j++)
      for (int k = 0; k < kGradientFeatures; k++) {
        const float4 w = weights[j * Packed<H>::unit(0) + 1 + k];
        d[k] += w.x * gate_rows[j * kRow + lane] + w.y * gate_rows[(H + j) * kRow + lane] +
                w.z * gate_rows[(2 * H + j) * kRow + lane] + w.w * gate_rows[(3 * H + j) * kRow + lane];
      }
    const int64_t at = tile * kTile + lane;
    write_dense(s.functional.grad_grad, at, features_backward<DeviceMath>(s.features, this->segment(0).record[at], d));
  }
};

template <int H, int L, int TableBytes>
__global__ void __launch_bounds__(BackwardLayout<H, L>::kThreads, BackwardLayout<H, L>::kMinBlocks)
    backward_kernel(const __grid_constant__ BackwardArguments<TableBytes> arguments) {
  L2L_DYNAMIC_SHARED(float, shared);
  const Table<BackwardEntry> table(arguments.scalars.table, arguments.table.words);
  walk_tiles<PlainBackward<H, L>>(arguments.scalars, table, shared);
}

}  // namespace l2l
