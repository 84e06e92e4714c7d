// Launches the kernels of layered_step.cuh and layered_backward.cuh: cooperative grids, no larger than what is resident
// at once.
#pragma once

#include <cmath>

#include "launch.cuh"
#include "layered_backward.cuh"

namespace l2l {

// Registers hold the inputs of two layers' worth of units for each coordinate of a thread.
constexpr int layered_coordinates(int hidden) { return hidden <= 20 ? 2 : 1; }

// allocate(bytes): device memory that lives until the stream has done the work.
template <int H, class Allocate>
LaunchStatus launch_layered_kernel(LayeredScalars scalars, const std::vector<int64_t>& words, const Allocate& allocate,
                                   cudaStream_t stream) {
  constexpr int C = layered_coordinates(H), kTilesPerBlock = kStepThreads / (kTile / C);
  const Config& config = scalars.step.config;
  const size_t shared =
      Packed<H>::bytes(config.layers, config.extra, config.outputs) + sizeof(float) * config.gac * kStepThreads;
  int resident = 0;
  const LaunchStatus status = resident_blocks(&layered_step_kernel<H, C, kLargeTable>, kStepThreads, shared, &resident);
  if (status != cudaSuccess) return status;
  const int64_t needed = (scalars.step.tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  const int blocks = static_cast<int>(std::min<int64_t>(needed, resident));
  scalars.block_sums = static_cast<double*>(allocate(sizeof(double) * 4 * blocks * std::max(config.gac, 1)));
  if (!scalars.block_sums) return cudaErrorMemoryAllocation;
  LayeredArguments<kLargeTable> arguments;
  arguments.scalars = scalars;
  if (!scalars.step.table.device) fill_inline(arguments.table, words);
  return launch<true>(&layered_step_kernel<H, C, kLargeTable>, blocks, kStepThreads, shared, stream, arguments);
}

// One launch for all entries. `words` is the table unless it is in device memory already.
template <class Allocate>
LaunchStatus launch_layered_step(const LayeredScalars& scalars, const std::vector<int64_t>& words,
                                 const Allocate& allocate, cudaStream_t stream) {
  if (scalars.step.tiles == 0) return cudaSuccess;
  return dispatch_hidden(scalars.step.config.hidden, [&](auto hidden) {
    return launch_layered_kernel<decltype(hidden)::value>(scalars, words, allocate, stream);
  });
}

// Back-propagation for all entries: one launch. The pointers to temporary memory are filled in here.
template <class Allocate>
LaunchStatus launch_layered_backward(LayeredBackwardScalars scalars, const std::vector<int64_t>& words,
                                     const Allocate& allocate, cudaStream_t stream) {
  const Config& c = scalars.config;
  const size_t shared = static_cast<size_t>(LayeredShared(c).bytes);
  int resident = 0;
  const LaunchStatus status =
      resident_blocks(&layered_backward_kernel<kLargeTable>, kLayeredThreads, shared, &resident);
  if (status != cudaSuccess) return status;
  const int blocks = static_cast<int>(std::min<int64_t>(scalars.tiles, resident));
  scalars.chunk = static_cast<int>(std::ceil(std::sqrt(static_cast<double>(scalars.steps))));
  scalars.chunks = (scalars.steps + scalars.chunk - 1) / scalars.chunk;
  const int64_t state = scalars.tiles * c.rows() * kTile;
  const auto floats = [&](int64_t n) { return static_cast<float*>(allocate(sizeof(float) * std::max<int64_t>(n, 4))); };
  const auto doubles = [&](int64_t n) {
    return static_cast<double*>(allocate(sizeof(double) * std::max<int64_t>(n, 2)));
  };
  scalars.weights = reinterpret_cast<float4*>(floats(PackedLayout(c).floats(c.layers, c.outputs)));
  scalars.checkpoints = floats(scalars.chunks * state);
  scalars.states = floats((scalars.chunk + 1) * state);
  scalars.grad_state = floats(state);
  scalars.adjoint = floats(scalars.tiles * kTile);
  scalars.problem_means = floats(scalars.problems * c.gac);
  scalars.block_sums = doubles(4 * static_cast<int64_t>(blocks) * c.gac);
  scalars.sums = doubles(static_cast<int64_t>(blocks) * c.phi_size());
  for (const void* p : {static_cast<const void*>(scalars.weights), static_cast<const void*>(scalars.checkpoints),
                        static_cast<const void*>(scalars.states), static_cast<const void*>(scalars.grad_state),
                        static_cast<const void*>(scalars.adjoint), static_cast<const void*>(scalars.problem_means),
                        static_cast<const void*>(scalars.block_sums), static_cast<const void*>(scalars.sums)})
    if (!p) return cudaErrorMemoryAllocation;
  LayeredBackwardArguments<kLargeTable> arguments;
  arguments.scalars = scalars;
  if (!scalars.table.device) fill_inline(arguments.table, words);
  return launch<true>(&layered_backward_kernel<kLargeTable>, blocks, kLayeredThreads, shared, stream, arguments);
}

}  // namespace l2l
