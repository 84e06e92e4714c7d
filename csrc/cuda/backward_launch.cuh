// Launches the back-propagation of backward.cuh and normalized_backward.cuh: how many blocks, how much scratch, which
// instance.
#pragma once

#include "backward.cuh"
#include "launch.cuh"
#include "normalized_backward.cuh"
#include "reduce.cuh"

namespace l2l {

// Scratch for the steps of a chunk, in bytes for each thread of a block: a multiprocessor has as many threads whatever
// the hidden size, and a chunk is 69 steps of one layer, 34 of two, 23 of three.
constexpr int64_t kScratchPerThread = 13 * 1024;

struct BackwardPlan {
  int blocks = 0, chunk = 0;
  int64_t scratch_floats = 0;  // of all blocks
  int64_t sums = 0;            // float64, of all blocks
};

// The kernel of a network with or without averages.
template <int H, int L>
constexpr auto backward_instance(const BackwardScalars&) {
  return &backward_kernel<H, L, kLargeTable>;
}
template <int H, int L>
constexpr auto backward_instance(const NormalizedBackwardScalars&) {
  return &normalized_backward_kernel<H, L, kLargeTable>;
}
template <class Scalars>
constexpr int kFeaturesOf = std::is_same_v<Scalars, BackwardScalars> ? kGradientFeatures : kNormalizedFeatures;

template <class F>
LaunchStatus dispatch_backward(const Config& config, const F& f) {
  return dispatch_hidden(config.hidden, [&](auto hidden) {
    return dispatch_layers(config.layers, [&](auto layers) { return f(hidden, layers); });
  });
}

// scalars: with tiles > 0. scratch_budget: bytes of a block for the steps of a chunk, in tests; 0: see above.
template <class Scalars>
LaunchStatus plan_backward(const Scalars& scalars, BackwardPlan& plan, int64_t scratch_budget = 0) {
  return dispatch_backward(scalars.config, [&](auto hidden, auto layers) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value, L = decltype(layers)::value;
    using Layout = BackwardLayout<H, L, kFeaturesOf<Scalars>>;
    const int steps = scalars.steps;
    int resident = 0;
    const LaunchStatus status =
        resident_blocks(backward_instance<H, L>(scalars), Layout::kThreads, Layout::kSharedBytes, &resident);
    if (status != cudaSuccess) return status;
    const int64_t budget = scratch_budget > 0 ? scratch_budget : kScratchPerThread * Layout::kThreads;
    const int64_t fitting = std::max<int64_t>(1, budget / (4 * Layout::kStep));
    plan.chunk = static_cast<int>(std::min<int64_t>(steps, fitting));
    plan.blocks = static_cast<int>(std::min<int64_t>(scalars.tiles, resident));
    plan.scratch_floats = plan.blocks * Layout::scratch(steps, plan.chunk);
    plan.sums = static_cast<int64_t>(plan.blocks) * BackwardSums<H, L, kFeaturesOf<Scalars>>::kRow;
    return cudaSuccess;
  });
}

// One launch for all entries, then one that adds the blocks' sums into grad_phi. `words` is the table unless it is in
// device memory already.
template <class Scalars>
LaunchStatus launch_backward(Scalars scalars, const std::vector<int64_t>& words, const BackwardPlan& plan,
                             float* grad_phi, cudaStream_t stream) {
  scalars.chunk = plan.chunk;
  return dispatch_backward(scalars.config, [&](auto hidden, auto layers) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value, L = decltype(layers)::value;
    constexpr int kFeatures = kFeaturesOf<Scalars>;
    using Layout = BackwardLayout<H, L, kFeatures>;
    BackwardArguments<kLargeTable, Scalars> arguments;
    arguments.scalars = scalars;
    if (!scalars.table.device) fill_inline(arguments.table, words);
    const cudaError_t error = launch(backward_instance<H, L>(scalars), plan.blocks, Layout::kThreads,
                                     Layout::kSharedBytes, stream, arguments);
    if (error != cudaSuccess) return error;
    return launch(&reduce_kernel<H, L, kFeatures>, (scalars.config.phi_size() + 31) / 32, 32 * kReduceWarps, 0, stream,
                  scalars.config, static_cast<const double*>(scalars.sums), plan.blocks, grad_phi);
  });
}

// Fills scalars.tensors and scalars.biases.
inline LaunchStatus launch_tensor_steps(const NormalizedBackwardScalars& scalars, const std::vector<int64_t>& words,
                                        cudaStream_t stream) {
  int resident = 0;
  const LaunchStatus status = resident_blocks(&tensor_steps_kernel<kLargeTable>, kBiasThreads, 0, &resident);
  if (status != cudaSuccess) return status;
  const int64_t needed = static_cast<int64_t>(scalars.table.entries) * scalars.steps;
  BackwardArguments<kLargeTable, NormalizedBackwardScalars> arguments;
  arguments.scalars = scalars;
  if (!scalars.table.device) fill_inline(arguments.table, words);
  return launch(&tensor_steps_kernel<kLargeTable>, static_cast<int>(std::min<int64_t>(needed, resident)), kBiasThreads,
                0, stream, arguments);
}

}  // namespace l2l
