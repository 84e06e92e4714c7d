// Launches the step of step.cuh: how many blocks, which instance.
#pragma once

#include "launch.cuh"
#include "step.cuh"

namespace l2l {

// How coordinates are spread over threads. Few coordinates: one per thread, to keep all processors busy; many: as many
// per thread as its registers hold, to load each weight less often.
enum class StepMapping { automatic, narrow, wide };

// Coordinates of a thread in the wide mapping.
constexpr int wide_coordinates(int hidden) { return hidden <= 20 ? 4 : 2; }
// Tiles per multiprocessor from which the wide mapping is faster: two warps on each of four schedulers.
constexpr int kWideTiles = 16;

template <int H, int C, int TableBytes>
LaunchStatus launch_step_kernel(const StepScalars& scalars, const std::vector<int64_t>& words, cudaStream_t stream) {
  constexpr int kTilesPerBlock = kStepThreads / (kTile / C);
  const size_t shared = Packed<H>::bytes(scalars.config.layers);
  int resident = 0;
  const LaunchStatus status = resident_blocks(&step_kernel<H, C, TableBytes>, kStepThreads, shared, &resident);
  if (status != cudaSuccess) return status;
  const int64_t needed = (scalars.tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  const int blocks = static_cast<int>(std::min<int64_t>(needed, resident));
  StepArguments<TableBytes> arguments;
  arguments.scalars = scalars;
  if (!scalars.table.device) fill_inline(arguments.table, words);
  return launch(&step_kernel<H, C, TableBytes>, blocks, kStepThreads, shared, stream, arguments);
}

// One launch for all entries. `words` is the table unless it is in device memory already.
inline LaunchStatus launch_step(const StepScalars& scalars, const std::vector<int64_t>& words, StepMapping mapping,
                                cudaStream_t stream) {
  if (scalars.tiles == 0) return cudaSuccess;
  if (mapping == StepMapping::automatic) {
    int processors = 0;
    const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
    if (error != cudaSuccess) return error;
    mapping = scalars.tiles >= static_cast<int64_t>(kWideTiles) * processors ? StepMapping::wide : StepMapping::narrow;
  }
  const bool large = !scalars.table.device && words.size() * 8 > kSmallTable;
  return dispatch_hidden(scalars.config.hidden, [&](auto hidden) {
    constexpr int H = decltype(hidden)::value;
    if (mapping == StepMapping::narrow && !large) return launch_step_kernel<H, 1, kSmallTable>(scalars, words, stream);
    return launch_step_kernel<H, wide_coordinates(H), kLargeTable>(scalars, words, stream);
  });
}

}  // namespace l2l
