// Launches the back-propagation of backward.cuh: how many blocks, how much scratch, which instance.
#pragma once

#include "launch.cuh"
#include "reduce.cuh"

namespace l2l {

// Scratch of a block for the steps of a chunk. With the default network a chunk is 34 steps.
constexpr int64_t kScratchBudget = 2 * 1024 * 1024;  // bytes

struct BackwardPlan {
  int blocks = 0, chunk = 0;
  int64_t scratch_floats = 0;  // of all blocks
  int64_t sums = 0;            // float64, of all blocks
};

template <class F>
LaunchStatus dispatch_backward(const Config& config, const F& f) {
  return dispatch_hidden(config.hidden, [&](auto hidden) {
    return dispatch_layers(config.layers, [&](auto layers) { return f(hidden, layers); });
  });
}

// tiles > 0. A scratch_budget other than the default is for tests of long segments.
inline LaunchStatus plan_backward(const Config& config, int64_t tiles, int steps, BackwardPlan& plan,
                                  int64_t scratch_budget = kScratchBudget) {
  return dispatch_backward(config, [&](auto hidden, auto layers) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value, L = decltype(layers)::value;
    using Layout = BackwardLayout<H, L>;
    int resident = 0;
    const LaunchStatus status =
        resident_blocks(&backward_kernel<H, L, kLargeTable>, Layout::kThreads, Layout::kSharedBytes, &resident);
    if (status != cudaSuccess) return status;
    const int64_t fitting = std::max<int64_t>(1, scratch_budget / (4 * Layout::kStep));
    const int64_t chunks = (steps + fitting - 1) / fitting;
    plan.chunk = static_cast<int>((steps + chunks - 1) / chunks);
    plan.blocks = static_cast<int>(std::min<int64_t>(tiles, resident));
    plan.scratch_floats = plan.blocks * Layout::scratch(steps, plan.chunk);
    plan.sums = static_cast<int64_t>(plan.blocks) * BackwardSums<H, L>::kRow;
    return cudaSuccess;
  });
}

// One launch for all entries, then one that adds the blocks' sums into grad_phi. `words` is the table unless it is in
// device memory already.
inline LaunchStatus launch_backward(BackwardScalars scalars, const std::vector<int64_t>& words,
                                    const BackwardPlan& plan, float* grad_phi, cudaStream_t stream) {
  scalars.chunk = plan.chunk;
  return dispatch_backward(scalars.config, [&](auto hidden, auto layers) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value, L = decltype(layers)::value;
    using Layout = BackwardLayout<H, L>;
    BackwardArguments<kLargeTable> arguments;
    arguments.scalars = scalars;
    if (!scalars.table.device) fill_inline(arguments.table, words);
    const cudaError_t error = launch(&backward_kernel<H, L, kLargeTable>, plan.blocks, Layout::kThreads,
                                     Layout::kSharedBytes, stream, arguments);
    if (error != cudaSuccess) return error;
    return launch(&reduce_kernel<H, L>, (scalars.config.phi_size() + 31) / 32, 32 * kReduceWarps, 0, stream,
                  scalars.config, static_cast<const double*>(scalars.sums), plan.blocks, grad_phi);
  });
}

}  // namespace l2l
