// The step of networks without layers: moving averages (core/normalized.h), and an update that they make alone. States
// of any type: without layers those of int8 are those of bfloat16.
//
// Owns: a thread has C adjacent coordinates of one tile. Global memory: averages, gradient and parameter are read once
// and written once, which is what bounds it.
#pragma once

#include "stored_step.cuh"

namespace l2l {

template <bool Stored>
using NominalStepEntry = std::conditional_t<Stored, StoredStepEntry, NormalizedStepEntry>;

// directions: the thread's in shared memory.
template <int C, bool Stored>
__device__ __forceinline__ void nominal_step_tile(const NormalizedStepScalars& s,
                                                  const Table<NominalStepEntry<Stored>>& table, float* parked,
                                                  float* directions, int64_t global_tile, int lane) {
  int64_t first_tile;
  const NominalStepEntry<Stored>& entry = table.find(global_tile, first_tile);
  const int64_t number = global_tile - first_tile;
  float features[kNormalizedFeatures][C], u[kNormalizedReadOuts][C];  // no layer sees the former
  if constexpr (Stored) {
    const StoredTile<C, StateType::bfloat16> tile(s.config, entry, number, lane);
    read_stored_averages<C>(s, table, entry, tile, number, 0, parked, directions, features);
  } else {
    read_normalized<C>(s, table, entry, number, lane, parked, directions, features);
  }
  const float* bias = global(s.phi) + s.config.bias_out();
#pragma unroll
  for (int r = 0; r < kNormalizedReadOuts; r++)
#pragma unroll
    for (int i = 0; i < C; i++) u[r][i] = bias[r];
  make_updates<C>(nominal_of(entry.nominal), s.config.output_scale, directions, u);
  write_parameters<C>(s, table, entry, number * kTile + lane, parked, u[0]);
}

// Four blocks: left to itself the compiler stops at 64 registers, and spills.
template <int C, bool Stored, int TableBytes>
__global__ void __launch_bounds__(kStepThreads, 4)
    nominal_step_kernel(const __grid_constant__ StepArguments<TableBytes, NormalizedStepScalars> arguments) {
  __shared__ float parked[C][kStepThreads], directions[C][kStepThreads];
  const NormalizedStepScalars& s = arguments.scalars;
  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<NominalStepEntry<Stored>> table(s.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
  for (; tile < s.tiles; tile += stride)
    nominal_step_tile<C, Stored>(s, table, &parked[0][threadIdx.x], &directions[0][threadIdx.x], tile, lane);
}

}  // namespace l2l
