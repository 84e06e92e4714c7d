// The operators on plain pointers: what they launch, in which order, with which temporary memory. The caller checks
// arguments, and provides memory that lives until the stream has done the work.
#pragma once

#include <cmath>
#include <functional>

#include "backward_launch.cuh"
#include "gather.cuh"
#include "step_launch.cuh"

namespace l2l {

struct Workspace {
  // Device memory, 16-byte aligned.
  std::function<void*(size_t bytes)> allocate;
  // A table too long for the kernel arguments, in device memory.
  std::function<const int64_t*(const std::vector<int64_t>& words)> upload;
};

inline LogSign log_sign_constants(const Config& config) {
  return {std::exp(-config.p), 1.f / config.p, std::exp(config.p)};
}

// The words of a table, left to travel as arguments if they fit, else uploaded.
template <class Entry>
std::vector<int64_t> place_table(const TableBuilder<Entry>& builder, const Workspace& workspace, TableRef& ref) {
  std::vector<int64_t> words = builder.words();
  ref = builder.ref();
  if (words.size() * 8 > kLargeTable) ref.device = workspace.upload(words);
  return words;
}

struct StepOptions {
  float lr = 1.f, decay = 0.f;
  bool maximize = false, in_place = false;
  StepMapping mapping = StepMapping::automatic;
};

// One launch: the step for all entries, or nothing if there are none.
inline LaunchStatus run_step(const Config& config, const float* phi, const TableBuilder<StepEntry>& builder,
                             const StepOptions& options, const Workspace& workspace, cudaStream_t stream) {
  if (builder.entries().empty()) return cudaSuccess;
  StepScalars scalars{};
  scalars.config = config;
  scalars.log_sign = log_sign_constants(config);
  scalars.phi = phi;
  scalars.tiles = builder.entries().back().end_tile;
  scalars.lr = options.lr;
  scalars.decay = options.decay;
  scalars.maximize = options.maximize;
  scalars.in_place = options.in_place;
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);
  return launch_step(scalars, words, options.mapping, stream);
}

// Two launches: back-propagation, and the sum of d phi. The table holds entries only; functional: see FunctionalStep.
inline LaunchStatus run_backward(const Config& config, const float* phi, TableBuilder<BackwardEntry> builder,
                                 const std::vector<SegmentStep>& segment, const FunctionalStep& functional,
                                 float* grad_phi, const Workspace& workspace, int64_t scratch_budget,
                                 cudaStream_t stream) {
  if (builder.entries().empty()) return cudaMemsetAsync(grad_phi, 0, sizeof(float) * config.phi_size(), stream);
  BackwardScalars scalars{};
  scalars.config = config;
  scalars.log_sign = log_sign_constants(config);
  scalars.phi = phi;
  scalars.tiles = builder.entries().back().end_tile;
  scalars.steps = static_cast<int32_t>(segment.size()) - 1;
  scalars.functional = functional;
  static_assert(sizeof(SegmentStep) % 8 == 0, "made of words");
  std::vector<int64_t> steps(segment.size() * sizeof(SegmentStep) / 8);
  std::memcpy(steps.data(), segment.data(), steps.size() * 8);
  scalars.segment = static_cast<int32_t>(builder.append(steps.data(), steps.size()));
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);

  BackwardPlan plan;
  const LaunchStatus status = plan_backward(config, scalars.tiles, scalars.steps, plan, scratch_budget);
  if (status != cudaSuccess) return status;
  scalars.scratch = static_cast<float*>(workspace.allocate(sizeof(float) * plan.scratch_floats));
  scalars.sums = static_cast<double*>(workspace.allocate(sizeof(double) * plan.sums));
  if (!scalars.scratch || !scalars.sums) return cudaErrorMemoryAllocation;
  return launch_backward(scalars, words, plan, grad_phi, stream);
}

inline LaunchStatus run_segment_backward(const Config& config, const float* phi,
                                         const TableBuilder<BackwardEntry>& builder,
                                         const std::vector<SegmentStep>& segment, float* grad_phi,
                                         const Workspace& workspace, cudaStream_t stream,
                                         int64_t scratch_budget = kScratchBudget) {
  return run_backward(config, phi, builder, segment, FunctionalStep{}, grad_phi, workspace, scratch_budget, stream);
}

// The functional step's backward. grad and grad_update may have any strides (views of `views`); grad_grad is dense.
struct StepBackward {
  int64_t numel;  // > 0
  View grad, grad_update, grad_grad;
  const float* state;
  const float* grad_new_state;
  float* grad_state;
};

// Three launches: gradients gathered into tiles, back-propagation, the sum of d phi.
inline LaunchStatus run_step_backward(const Config& config, const float* phi, TableBuilder<GatherEntry> views,
                                      const StepBackward& step, float* grad_phi, const Workspace& workspace,
                                      cudaStream_t stream) {
  const int64_t tiles = tiles_for(step.numel);
  float* const gathered = static_cast<float*>(workspace.allocate(sizeof(float) * 2 * tiles * kTile));
  if (!gathered) return cudaErrorMemoryAllocation;
  float* const updates = gathered + tiles * kTile;
  views.add({tiles, step.numel, step.grad, gathered});
  views.add({2 * tiles, step.numel, step.grad_update, updates});
  const LaunchStatus status = launch_gather(views, stream);
  if (status != cudaSuccess) return status;
  TableBuilder<BackwardEntry> builder;
  builder.add({tiles, step.numel, 0, step.state, step.grad_new_state, step.grad_state});
  const std::vector<SegmentStep> segment{{gathered, 0.f, 0.f, 0.f, 0.f}, {nullptr, 0.f, 0.f, 0.f, 0.f}};
  return run_backward(config, phi, builder, segment, {step.numel, updates, step.grad_grad}, grad_phi, workspace,
                      kScratchBudget, stream);
}

}  // namespace l2l
