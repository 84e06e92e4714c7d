// The step of networks without layers: moving averages (core/normalized.h), and an update that they make alone. States
// of any type: without layers those of int8 are those of bfloat16.
//
// Owns: a thread has C adjacent coordinates of one tile. Registers hold all of them. Global memory: averages, gradient
// and parameter are read once and written once, which is what bounds it.
#pragma once

#include "stored_step.cuh"

namespace l2l {

template <bool Stored>
using NominalStepEntry = std::conditional_t<Stored, StoredStepEntry, NormalizedStepEntry>;

// rows: the averages before the gradient, and with it.
template <int C, class Entry>
__device__ __forceinline__ void nominal_updates(const NormalizedStepScalars& s, const Entry& entry, const float (&g)[C],
                                                float (&rows)[kAverages][C], float (&u)[C]) {
  const Nominal nominal = nominal_of(entry.nominal);
  const float* bias = global(s.phi) + s.config.bias_out();
  const float gain = bias[0], correction = bias[1];
#pragma unroll
  for (int i = 0; i < C; i++) {
    float own[kAverages], x[kNormalizedFeatures];
#pragma unroll
    for (int k = 0; k < kAverages; k++) own[k] = rows[k][i];
    advance_averages<DeviceMath>(s.config.rates, g[i], own);
    normalized_features<DeviceMath>(entry.correction, g[i], own, x);
    const float n = nominal_direction<DeviceMath>(entry.correction, nominal, g[i], own, x[kLogRatio]);
    u[i] = normalized_update<DeviceMath>(nominal, s.config.output_scale, gain, correction, n);
#pragma unroll
    for (int k = 0; k < kAverages; k++) rows[k][i] = own[k];
  }
}

template <int C, bool Stored>
__device__ __forceinline__ void nominal_step_tile(const NormalizedStepScalars& s,
                                                  const Table<NominalStepEntry<Stored>>& table, float* parked,
                                                  int64_t global_tile, int lane) {
  int64_t first_tile;
  const NominalStepEntry<Stored>& entry = table.find(global_tile, first_tile);
  const int64_t number = global_tile - first_tile;
  float g[C], rows[kAverages][C], u[C];
  read_gradients<C>(s, table, entry, number * kTile + lane, parked, g);
  if constexpr (Stored) {
    const StoredTile<C, StateType::bfloat16> tile(s.config, entry, number, lane);
#pragma unroll
    for (int k = 0; k < kAverages; k++) tile.load_average(k, rows[k]);
    nominal_updates<C>(s, entry, g, rows, u);
#pragma unroll
    for (int k = 0; k < kAverages; k += 2) {
      tile.draw(k, parked);
      tile.store_average(k, parked, rows[k]);
      tile.store_average(k + 1, parked, rows[k + 1]);
    }
  } else {
    const int64_t offset = number * tile_floats(s.config) + lane;
    const float* state = global(entry.state) + offset;
    float* new_state = global(entry.new_state) + offset;
#pragma unroll
    for (int k = 0; k < kAverages; k++) load_lanes<C>(state + k * kTile, rows[k]);
    nominal_updates<C>(s, entry, g, rows, u);
#pragma unroll
    for (int k = 0; k < kAverages; k++) store_lanes<C>(new_state + k * kTile, rows[k]);
  }
  write_parameters<C>(s, table, entry, number * kTile + lane, parked, u);
}

template <int C, bool Stored, int TableBytes>
__global__ void __launch_bounds__(kStepThreads)
    nominal_step_kernel(const __grid_constant__ StepArguments<TableBytes, NormalizedStepScalars> arguments) {
  __shared__ float parked[C][kStepThreads];
  const NormalizedStepScalars& s = arguments.scalars;
  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<NominalStepEntry<Stored>> table(s.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
  for (; tile < s.tiles; tile += stride) nominal_step_tile<C, Stored>(s, table, &parked[0][threadIdx.x], tile, lane);
}

}  // namespace l2l
