// The step of networks with normalized inputs (core/normalized.h): that of step.cuh with the averages' rows before it,
// and the update made of two rows of read-out behind it.
//
// Owns, registers, shared memory: as in step.cuh; the direction of a thread's coordinates waits in shared memory while
// the
//   layers run. Global memory: four more rows of state, read and written once; the biases of a tensor's first layer,
//   from the cache.
#pragma once

#include "step.cuh"

namespace l2l {

constexpr int kBiasThreads = 256;

struct NormalizedStepEntry : StepEntry {
  Correction correction;
  const float* inputs;   // [tensor_inputs], or null
  const float* nominal;  // [kNominal], or null for the default
};

struct NormalizedStepScalars : StepScalars {
  float4* biases;  // [entries][hidden], of the first layer with the inputs per tensor in it; null without such inputs
};

// given: [kNominal], or null.
__device__ __forceinline__ Nominal nominal_of(const float* given) {
  Nominal n;
  if (given) {
    given = global(given);
    n.gain = given[0], n.mu = given[1], n.nu = given[2], n.lam = given[3], n.correction = given[4];
  }
  return n;
}

// The biases of the first layer's units with the inputs per tensor in them; by all threads of the block.
__device__ __forceinline__ void tensor_biases(const Config& config, const float* phi, const float* inputs,
                                              float4* biases) {
  for (int i = static_cast<int>(threadIdx.x); i < kGates * config.hidden; i += static_cast<int>(blockDim.x)) {
    const int unit = i / kGates, gate = i % kGates;
    float sum = phi[config.bias(0) + gate * config.hidden + unit];
    for (int k = 0; k < config.tensor_inputs; k++)
      sum += phi[phi_index_of_tensor_input(config, unit, k, gate)] * inputs[k];
    reinterpret_cast<float*>(biases)[i] = gate_scale(gate) * sum;
  }
}

// A block per tensor.
template <int TableBytes, class Entry>
__global__ void __launch_bounds__(kBiasThreads)
    tensor_bias_kernel(const __grid_constant__ StepArguments<TableBytes, NormalizedStepScalars> arguments) {
  const NormalizedStepScalars& s = arguments.scalars;
  const Config& config = s.config;
  const Table<Entry> table(s.table, arguments.table.words);
  const float* inputs = global(reinterpret_cast<const Entry*>(table.words)[blockIdx.x].inputs);
  tensor_biases(config, s.phi, inputs, s.biases + static_cast<int64_t>(blockIdx.x) * config.hidden);
}

// Takes the gradients into the averages, rows[k] of each; the features, and the direction, which is parked in
// `directions` (kStepThreads apart).
template <int C, class Entry>
__device__ __forceinline__ void take_gradients(const NormalizedStepScalars& s, const Entry& entry, const float (&g)[C],
                                               float (&rows)[kAverages][C], float* directions,
                                               float (&features)[kNormalizedFeatures][C]) {
  const Nominal nominal = nominal_of(entry.nominal);
#pragma unroll
  for (int i = 0; i < C; i++) {
    float own[kAverages], x[kNormalizedFeatures];
#pragma unroll
    for (int k = 0; k < kAverages; k++) own[k] = rows[k][i];
    advance_averages<DeviceMath>(s.config.rates, g[i], own);
    normalized_features<DeviceMath>(entry.correction, g[i], own, x);
    directions[i * kStepThreads] = nominal_direction<DeviceMath>(entry.correction, nominal, g[i], own, x[kLogRatio]);
#pragma unroll
    for (int k = 0; k < kAverages; k++) rows[k][i] = own[k];
#pragma unroll
    for (int k = 0; k < kNormalizedFeatures; k++) features[k][i] = x[k];
  }
}

// u[0] becomes the update, from the rows of the read-out and the parked directions.
template <int C>
__device__ __forceinline__ void make_updates(const Nominal& nominal, float output_scale, const float* directions,
                                             float (&u)[kNormalizedReadOuts][C]) {
#pragma unroll
  for (int i = 0; i < C; i++)
    u[0][i] = normalized_update<DeviceMath>(nominal, output_scale, u[0][i], u[1][i], directions[i * kStepThreads]);
}

template <int C>
__device__ __forceinline__ void read_normalized(const NormalizedStepScalars& s, const Table<NormalizedStepEntry>& table,
                                                const NormalizedStepEntry& entry, int64_t tile, int lane, float* parked,
                                                float* directions, float (&features)[kNormalizedFeatures][C]) {
  float g[C], rows[kAverages][C];
  read_gradients<C>(s, table, entry, tile * kTile + lane, parked, g);
  const int64_t offset = tile * tile_floats(s.config) + static_cast<int64_t>(s.config.average_row()) * kTile + lane;
  const float* state = global(entry.state) + offset;
  float* new_state = global(entry.new_state) + offset;
#pragma unroll
  for (int k = 0; k < kAverages; k++) load_lanes<C>(state + k * kTile, rows[k]);
  take_gradients<C>(s, entry, g, rows, directions, features);
#pragma unroll
  for (int k = 0; k < kAverages; k++) store_lanes<C>(new_state + k * kTile, rows[k]);
}

template <int H, int C>
__device__ __forceinline__ void normalized_step_tile(const NormalizedStepScalars& s,
                                                     const Table<NormalizedStepEntry>& table, const float4* weights,
                                                     float* parked, float* directions, int64_t global_tile, int lane) {
  int64_t first_tile;
  const NormalizedStepEntry& entry = table.find(global_tile, first_tile);
  const int64_t tile = global_tile - first_tile;
  float features[kNormalizedFeatures][C], u[kNormalizedReadOuts][C];
  read_normalized<C>(s, table, entry, tile, lane, parked, directions, features);

  const float* out = reinterpret_cast<const float*>(weights + Packed<H, kNormalizedFeatures>::out(s.config.layers));
#pragma unroll
  for (int r = 0; r < kNormalizedReadOuts; r++)
#pragma unroll
    for (int i = 0; i < C; i++) u[r][i] = out[kNormalizedReadOuts * H + r];
  const int64_t offset = tile * tile_floats(s.config) + lane;
  const int64_t which = &entry - reinterpret_cast<const NormalizedStepEntry*>(table.words);
  step_layers<H, C>(s.config.layers, weights, s.biases ? global(s.biases) + which * H : nullptr, features,
                    global(entry.state) + offset, global(entry.new_state) + offset, out, u);

  // Looked up once more, so as not to hold registers all the while.
  const NormalizedStepEntry& target = table.find(global_tile, first_tile);
  make_updates<C>(nominal_of(target.nominal), s.config.output_scale, directions, u);
  write_parameters<C>(s, table, target, (global_tile - first_tile) * kTile + lane, parked, u[0]);
}

template <int H, int C, int TableBytes>
__global__ void __launch_bounds__(kStepThreads, 2)
    normalized_step_kernel(const __grid_constant__ StepArguments<TableBytes, NormalizedStepScalars> arguments) {
  L2L_DYNAMIC_SHARED(float4, weights);
  __shared__ float parked[C][kStepThreads], directions[C][kStepThreads];
  const NormalizedStepScalars& s = arguments.scalars;
  pack_network<H, kNormalizedFeatures>(s.config, s.phi, weights);
  __syncthreads();
  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<NormalizedStepEntry> table(s.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
  for (; tile < s.tiles; tile += stride)
    normalized_step_tile<H, C>(s, table, weights, &parked[0][threadIdx.x], &directions[0][threadIdx.x], tile, lane);
}

}  // namespace l2l
