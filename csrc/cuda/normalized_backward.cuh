// Back-propagation of networks with normalized inputs (core/normalized.h): what goes into backward_walk.cuh and comes
// out of it. Moving averages, inputs and directions are made of recorded gradients, once per tile for all steps; the
// update is made of two rows of read-out, whose gradients are known once a step has been run again; and the first
// layer's bias is the tensor's own in every step.
//
// Owns: as in backward_walk.cuh; in the phases on inputs and read-outs 64 threads (or 32) have one coordinate each (or
// two), and behind the
//   weights of layer 0 a thread has every eighth input per tensor of its unit.
// Shared memory: that of the walk; four sums of a thread for each of its inputs per tensor. 2 layers of 20 units: 21.6
// kB
//   of weights, 34.3 of rows, 9.0 of sums.
// Scratch of the block: that of the walk; 28 bytes per coordinate and step for inputs and read-outs (plain: 12).
// Before it a launch computes what every tensor is told in every step: 48 + 16 H bytes of each, read through the cache.
#pragma once

#include "backward_walk.cuh"
#include "normalized_step.cuh"

namespace l2l {

struct NormalizedBackwardEntry : BackwardEntry {
  int64_t age;           // of its averages in the first step, that one included
  const float* inputs;   // [tensor_inputs] in the first step, or null
  const float* nominal;  // [kNominal] in the first step, or null for the default
};

// What the coordinates of a tensor have in common in one step.
struct TensorAtStep {
  Correction correction;
  Nominal nominal;
  const float* inputs;  // [tensor_inputs]
};

struct NormalizedBackwardScalars : BackwardScalars {
  int64_t inputs_stride, nominal_stride;  // from a tensor's row in one step to that in the next
  // Temporary memory.
  TensorAtStep* tensors;  // [entries][steps]
  float4* biases;         // [entries][steps][hidden], of the first layer with the inputs per tensor in it
};

// A block per tensor and step.
template <int TableBytes>
__global__ void __launch_bounds__(kBiasThreads)
    tensor_steps_kernel(const __grid_constant__ BackwardArguments<TableBytes, NormalizedBackwardScalars> arguments) {
  const NormalizedBackwardScalars& s = arguments.scalars;
  const Table<NormalizedBackwardEntry> table(s.table, arguments.table.words);
  const int64_t count = static_cast<int64_t>(s.table.entries) * s.steps;
  for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
    const NormalizedBackwardEntry& entry = reinterpret_cast<const NormalizedBackwardEntry*>(table.words)[i / s.steps];
    const int64_t t = i % s.steps;
    const float* inputs = entry.inputs ? entry.inputs + t * s.inputs_stride : nullptr;
    if (threadIdx.x == 0)
      s.tensors[i] = {make_correction(s.config, entry.age + t),
                      nominal_of(entry.nominal ? entry.nominal + t * s.nominal_stride : nullptr), inputs};
    tensor_biases(s.config, s.phi, inputs, s.biases + i * s.config.hidden);
  }
}

template <int H, int L>
struct NormalizedBackward : BackwardWalk<H, L, kNormalizedFeatures, NormalizedBackwardScalars, NormalizedBackwardEntry,
                                         NormalizedBackward<H, L>> {
  using Base = BackwardWalk<H, L, kNormalizedFeatures, NormalizedBackwardScalars, NormalizedBackwardEntry,
                            NormalizedBackward<H, L>>;
  using Layout = typename Base::Layout;
  using Sums = typename Base::Sums;
  using Base::entry, Base::first, Base::gate_rows, Base::inputs, Base::own, Base::read_out, Base::s, Base::table,
      Base::tile;

  // Registers are scarce, and behind the 64 coordinates of the rows of gate gradients there is room for four floats. Of
  // the thread's unit: its gate gradients in the last step, summed over the tile, in layer 0; those of all steps since
  // the last flush above.
  __device__ __forceinline__ float4& unit_gradients(int l) const {
    static_assert(L < kGates, "a row for each layer, and one more");
    return *reinterpret_cast<float4*>(gate_rows + (l * H + own.unit) * kRow + kTile);
  }
  // Of the tile's tensor: its first step among [entries][steps], of which no memory holds 2^31.
  __device__ __forceinline__ int& first_step() const {
    return *reinterpret_cast<int*>(gate_rows + L * H * kRow + kTile);
  }
  __device__ __forceinline__ const TensorAtStep& tensor(int t) const { return global(s.tensors)[first_step() + t]; }
  __device__ __forceinline__ const float4* biases(int t) const {
    return global(s.biases) + static_cast<int64_t>(first_step() + t) * H;
  }

  // Behind the read-out's sums: the thread's for gate g of input slot + 8 i per tensor.
  __device__ __forceinline__ float& tensor_sum(int i, int g) const {
    return read_out[Layout::kReadOut + (kGates * i + g) * Layout::kThreads];
  }

  // Fills `inputs` for the tile: forward for what is made of averages, then on the walk back of adjoint.h.
  __device__ __forceinline__ void prepare_inputs() const {
    __syncthreads();  // all have done with the tile before
    const int64_t number = entry - reinterpret_cast<const NormalizedBackwardEntry*>(table.words);
    const int first_step = static_cast<int>(number) * s.steps;
    if (threadIdx.x == 0) this->first_step() = first_step;
    for_each_lane<H>([&](int lane) { prepare_inputs(lane, first_step); });
  }
  __device__ __forceinline__ void prepare_inputs(int lane, int first_step) const {
    const int64_t at = (entry->record_tile + tile) * kTile + lane;
    const bool padding = lane >= this->count();
    const auto gradient = [&](int t) {
      const float* record = this->segment(t).record;
      return record && !padding ? global(record)[at] : 0.f;
    };
    const float* state = global(entry->state) + tile * Layout::kState + 2 * Layout::kHalfState + lane;
    float averages[kAverages];
#pragma unroll
    for (int k = 0; k < kAverages; k++) averages[k] = padding ? 0.f : state[k * kTile];
    float* row = inputs + lane;
#pragma unroll 1
    for (int t = 0; t < s.steps; t++, row += Layout::kInputRows * kTile) {
      const TensorAtStep& told = global(s.tensors)[first_step + t];
      const float g = gradient(t);
      float x[kNormalizedFeatures];
      advance_averages<DeviceMath>(s.config.rates, g, averages);
      normalized_features<DeviceMath>(told.correction, g, averages, x);
#pragma unroll
      for (int k = 0; k < kNormalizedFeatures; k++) row[k * kTile] = x[k];
      this->upstream(t, lane)[kTile] =
          nominal_direction<DeviceMath>(told.correction, told.nominal, g, averages, x[kLogRatio]);
    }
    float adjoint = 0.f;
#pragma unroll 1
    for (int t = s.steps; t >= 0; t--) {
      const float du = walk_back(this->segment(t), gradient(t), adjoint);
      if (t < s.steps)
        *this->upstream(t, lane) = s.functional.numel == 0 ? du : padding ? 0.f : s.functional.grad_update[at];
    }
  }

  // The head once more, by the threads that prepared the inputs: from d loss / d update and the direction to the
  // gradients of its rows, in their places.
  __device__ __forceinline__ void find_upstream(int t, const float* h) const {
    for_each_lane<H>([&](int lane) { find_upstream(t, h, lane); });
  }
  __device__ __forceinline__ void find_upstream(int t, const float* h, int lane) const {
    const float* out = this->weight_out();
    float gain = out[2 * H], correction = out[2 * H + 1];
#pragma unroll(H > 20 ? 8 : 4)
    for (int k = 0; k < H; k++) {
      const float x = h[k * kRow + lane];
      gain += out[k] * x;
      correction += out[H + k] * x;
    }
    float* at = this->upstream(t, lane);
    normalized_update_backward<DeviceMath>(tensor(t).nominal, s.config.output_scale, at[kTile], at[0], gain,
                                           correction);
    at[0] = gain;
    at[kTile] = correction;
  }
  __device__ __forceinline__ void wait_for_upstream() const { __syncthreads(); }

  // The weight of the row of ones, which slot 0 has, is summed by itself: it is what the inputs per tensor are
  // multiplied with. Meanwhile its sum over other steps is where it goes.
  __device__ __forceinline__ void first_weight_gradients(const float* d, const float* x) {
    float unused[kGates];
    float4& shared = unit_gradients(0);
    if (own.slot == 0) {
      shared = make_float4(first[0][0], first[1][0], first[2][0], first[3][0]);
#pragma unroll
      for (int g = 0; g < kGates; g++) first[g][0] = 0.f;
    }
    weight_gradients<H, false>(d, x, false, first, unused);
    if (own.slot == 0) {
      const float4 before = shared;
      shared = make_float4(first[0][0], first[1][0], first[2][0], first[3][0]);
      first[0][0] += before.x, first[1][0] += before.y, first[2][0] += before.z, first[3][0] += before.w;
    }
  }

  __device__ __forceinline__ void upper_weight_gradients(int l, const float* d, const float* x) {
    float sums[kGates] = {};
    weight_gradients<H, true>(d, x, own.slot == 0, this->others[l - 1], sums);
    if (own.slot > 0) return;
    float4& shared = unit_gradients(l);
    shared = make_float4(shared.x + sums[0], shared.y + sums[1], shared.z + sums[2], shared.w + sums[3]);
  }

  __device__ __forceinline__ void add_tensor_inputs(int t) const {
    if (s.config.tensor_inputs == 0) return;
    const float* x = global(tensor(t).inputs);
    const float4 d = unit_gradients(0);
#pragma unroll
    for (int i = 0; i < Sums::kTensorInputs; i++) {
      const int k = own.slot + kSlots * i;
      if (k >= s.config.tensor_inputs) break;
      tensor_sum(i, 0) += d.x * x[k];
      tensor_sum(i, 1) += d.y * x[k];
      tensor_sum(i, 2) += d.z * x[k];
      tensor_sum(i, 3) += d.w * x[k];
    }
  }

  __device__ __forceinline__ void clear() {
    Base::clear();
#pragma unroll
    for (int l = 1; l < L; l++) {
      if (own.slot == 0) unit_gradients(l) = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
      for (int g = 0; g < kGates; g++) this->sums()[Sums::bias(l, g) * Layout::kThreads] = 0.;
    }
#pragma unroll
    for (int i = 0; i < Sums::kTensorInputs; i++)
#pragma unroll
      for (int g = 0; g < kGates; g++) {
        tensor_sum(i, g) = 0.f;
        this->sums()[Sums::tensor(i, g) * Layout::kThreads] = 0.;
      }
  }

  __device__ __forceinline__ void flush() {
    Base::flush();
    const auto add = [&](int sum, float& x) {
      atomicAdd(&this->sums()[sum * Layout::kThreads], static_cast<double>(x));
      x = 0.f;
    };
#pragma unroll
    for (int l = 1; l < L; l++) {
      if (own.slot > 0) break;
      float4& shared = unit_gradients(l);
      add(Sums::bias(l, 0), shared.x);
      add(Sums::bias(l, 1), shared.y);
      add(Sums::bias(l, 2), shared.z);
      add(Sums::bias(l, 3), shared.w);
    }
#pragma unroll
    for (int i = 0; i < Sums::kTensorInputs; i++)
#pragma unroll
      for (int g = 0; g < kGates; g++) add(Sums::tensor(i, g), tensor_sum(i, g));
  }

  // Gradients and averages are constants.
  __device__ __forceinline__ void store_grad_grad() const {
    for_each_lane<H>([&](int lane) {
      if (lane < this->count()) write_dense(s.functional.grad_grad, tile * kTile + lane, 0.f);
    });
  }
  __device__ __forceinline__ void store_state_gradient(float* to) const {
    Base::store_state_gradient(to);
    for (int i = static_cast<int>(threadIdx.x); i < kAverages * kTile; i += Layout::kThreads)
      to[2 * Layout::kHalfState + i] = 0.f;
  }
};

template <int H, int L, int TableBytes>
__global__ void __launch_bounds__(BackwardLayout<H, L, kNormalizedFeatures>::kThreads,
                                  BackwardLayout<H, L, kNormalizedFeatures>::kMinBlocks)
    normalized_backward_kernel(
        const __grid_constant__ BackwardArguments<TableBytes, NormalizedBackwardScalars> arguments) {
  L2L_DYNAMIC_SHARED(float, shared);
  const Table<NormalizedBackwardEntry> table(arguments.scalars.table, arguments.table.words);
  walk_tiles<NormalizedBackward<H, L>>(arguments.scalars, table, shared);
}

}  // namespace l2l
