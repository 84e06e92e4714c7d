// The operators on plain pointers: what they launch, in which order, with which temporary memory. The caller checks
// arguments, and provides memory that lives until the stream has done the work.
#pragma once

#include <functional>

#include "backward_launch.cuh"
#include "gather.cuh"
#include "layered_launch.cuh"
#include "step_launch.cuh"
#include "tensor_sums.cuh"

namespace l2l {

struct Workspace {
  // Device memory, 16-byte aligned.
  std::function<void*(size_t bytes)> allocate;
  // A table too long for the kernel arguments, in device memory.
  std::function<const int64_t*(const std::vector<int64_t>& words)> upload;
};

// The words of a table, left to travel as arguments if they fit, else uploaded.
template <class Entry>
std::vector<int64_t> place_table(const TableBuilder<Entry>& builder, const Workspace& workspace, TableRef& ref) {
  std::vector<int64_t> words = builder.words();
  ref = builder.ref();
  if (words.size() * 8 > kLargeTable) ref.device = workspace.upload(words);
  return words;
}

// One launch: the step for all entries. `call` has everything but features, tiles and table; the plain kernel does it
// if no phases are given (last_phase is 0), which is for plain networks only.
inline LaunchStatus run_step(LayeredScalars call, const TableBuilder<StepEntry>& builder, const Workspace& workspace,
                             cudaStream_t stream, StepMapping mapping = StepMapping::automatic) {
  if (builder.entries().empty()) return cudaSuccess;
  call.step.features = make_features(call.step.config);
  call.step.tiles = builder.entries().back().end_tile;
  const std::vector<int64_t> words = place_table(builder, workspace, call.step.table);
  if (call.last_phase == 0) return launch_step(call.step, words, mapping, stream);
  return launch_layered_step(call, words, workspace.allocate, stream);
}

// One launch of a step, and before it one for the biases if there are inputs per tensor: launch_all(scalars, words).
// `scalars` has everything but features, tiles, biases and table.
template <class Entry, class Launch>
LaunchStatus run_step_with_biases(NormalizedStepScalars scalars, const TableBuilder<Entry>& builder,
                                  const Workspace& workspace, cudaStream_t stream, const Launch& launch_all) {
  if (builder.entries().empty()) return cudaSuccess;
  const int entries = static_cast<int>(builder.entries().size());
  scalars.features = make_features(scalars.config);
  scalars.tiles = builder.entries().back().end_tile;
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);
  if (scalars.config.tensor_inputs > 0 && scalars.config.layers > 0) {
    const size_t bytes = sizeof(float4) * scalars.config.hidden * static_cast<size_t>(entries);
    scalars.biases = static_cast<float4*>(workspace.allocate(bytes));
    if (!scalars.biases) return cudaErrorMemoryAllocation;
    const LaunchStatus status = launch_tensor_biases<Entry>(scalars, words, entries, stream);
    if (status != cudaSuccess) return status;
  }
  return launch_all(scalars, words);
}

// The step of a network with averages.
inline LaunchStatus run_normalized_step(const NormalizedStepScalars& scalars,
                                        const TableBuilder<NormalizedStepEntry>& builder, const Workspace& workspace,
                                        cudaStream_t stream, StepMapping mapping = StepMapping::automatic) {
  return run_step_with_biases(scalars, builder, workspace, stream, [&](const auto& filled, const auto& words) {
    return launch_normalized_step(filled, words, mapping, stream);
  });
}

// Sums over every tensor's coordinates, in two launches. `scalars` has rate, sign and out.
inline LaunchStatus run_tensor_sums(SumsScalars scalars, const TableBuilder<SumsEntry>& builder,
                                    const Workspace& workspace, cudaStream_t stream) {
  if (builder.entries().empty()) return cudaSuccess;
  scalars.slices = builder.entries().back().end_tile;
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);
  if (scalars.slices > 0) {
    const size_t bytes = sizeof(double) * kTensorSums * static_cast<size_t>(scalars.slices);
    scalars.partial = static_cast<double*>(workspace.allocate(bytes));
    if (!scalars.partial) return cudaErrorMemoryAllocation;
  }
  return launch_tensor_sums(scalars, words, stream);
}

// The step in place where states are not float32, of a plain network or one with averages.
inline LaunchStatus run_stored_step(const NormalizedStepScalars& scalars, StateType type,
                                    const TableBuilder<StoredStepEntry>& builder, const Workspace& workspace,
                                    cudaStream_t stream) {
  return run_step_with_biases(scalars, builder, workspace, stream, [&](const auto& filled, const auto& words) {
    return launch_stored_step(filled, type, words, stream);
  });
}

// Appends the T + 1 steps of a segment, and T pointers to averages, to a table; returns which word is the first.
template <class Entry>
int32_t append_segment(TableBuilder<Entry>& builder, const std::vector<SegmentStep>& segment,
                       const std::vector<const float*>& means) {
  static_assert(sizeof(SegmentStep) % 8 == 0, "made of words");
  std::vector<int64_t> words(segment.size() * sizeof(SegmentStep) / 8);
  std::memcpy(words.data(), segment.data(), words.size() * 8);
  for (const float* pointer : means) words.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)));
  return static_cast<int32_t>(builder.append(words.data(), words.size()));
}

// Of a network with averages: memory for what tensors are told in every step, and the launch that fills it.
inline LaunchStatus run_tensor_steps(NormalizedBackwardScalars& scalars, const std::vector<int64_t>& words,
                                     const Workspace& workspace, cudaStream_t stream) {
  const size_t count = static_cast<size_t>(scalars.table.entries) * static_cast<size_t>(scalars.steps);
  scalars.tensors = static_cast<TensorAtStep*>(workspace.allocate(sizeof(TensorAtStep) * count));
  scalars.biases = static_cast<float4*>(workspace.allocate(sizeof(float4) * count * scalars.config.hidden));
  if (!scalars.tensors || !scalars.biases) return cudaErrorMemoryAllocation;
  return launch_tensor_steps(scalars, words, stream);
}

// Coordinates by themselves: two launches, back-propagation and the sum of d phi, and one before them for a network
// with averages. The table holds entries only; `scalars` has config and phi, of the functional step what it is given,
// and the strides of a network with averages.
template <class Scalars, class Entry>
LaunchStatus run_backward(Scalars scalars, TableBuilder<Entry> builder, const std::vector<SegmentStep>& segment,
                          float* grad_phi, const Workspace& workspace, cudaStream_t stream,
                          int64_t scratch_budget = 0) {
  const Config& config = scalars.config;
  if (builder.entries().empty()) return cudaMemsetAsync(grad_phi, 0, sizeof(float) * config.phi_size(), stream);
  scalars.features = make_features(config);
  scalars.tiles = builder.entries().back().end_tile;
  scalars.steps = static_cast<int32_t>(segment.size()) - 1;
  scalars.segment = append_segment(builder, segment, {});
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);

  BackwardPlan plan;
  LaunchStatus status = plan_backward(scalars, plan, scratch_budget);
  if (status != cudaSuccess) return status;
  if constexpr (std::is_same_v<Scalars, NormalizedBackwardScalars>) {
    status = run_tensor_steps(scalars, words, workspace, stream);
    if (status != cudaSuccess) return status;
  }
  scalars.scratch = static_cast<float*>(workspace.allocate(sizeof(float) * plan.scratch_floats));
  scalars.sums = static_cast<double*>(workspace.allocate(sizeof(double) * plan.sums));
  if (!scalars.scratch || !scalars.sums) return cudaErrorMemoryAllocation;
  return launch_backward(scalars, words, plan, grad_phi, stream);
}

// Any network: one launch. means[t]: [layers][problems][gac] of step t; functional: its own members of the scalars.
inline LaunchStatus run_layered_backward(const Config& config, const float* phi, TableBuilder<BackwardEntry> builder,
                                         const std::vector<SegmentStep>& segment,
                                         const std::vector<const float*>& means, int64_t problems,
                                         const LayeredBackwardScalars& functional, float* grad_phi,
                                         const Workspace& workspace, cudaStream_t stream) {
  if (builder.entries().empty()) return cudaMemsetAsync(grad_phi, 0, sizeof(float) * config.phi_size(), stream);
  LayeredBackwardScalars scalars = functional;
  scalars.config = config;
  scalars.features = make_features(config);
  scalars.phi = phi;
  scalars.tiles = builder.entries().back().end_tile;
  scalars.problems = problems;
  scalars.steps = static_cast<int32_t>(segment.size()) - 1;
  scalars.grad_phi = grad_phi;
  scalars.segment = append_segment(builder, segment, means);
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);
  return launch_layered_backward(scalars, words, workspace.allocate, stream);
}

inline LaunchStatus run_segment_backward(const Config& config, const float* phi,
                                         const TableBuilder<BackwardEntry>& builder,
                                         const std::vector<SegmentStep>& segment,
                                         const std::vector<const float*>& means, int64_t problems, float* grad_phi,
                                         const Workspace& workspace, cudaStream_t stream, int64_t scratch_budget = 0) {
  if (config.is_plain()) {
    BackwardScalars scalars{};
    scalars.config = config;
    scalars.phi = phi;
    return run_backward(scalars, builder, segment, grad_phi, workspace, stream, scratch_budget);
  }
  return run_layered_backward(config, phi, builder, segment, means, problems, {}, grad_phi, workspace, stream);
}

// The functional step's backward. grad may have any strides (a view of `views`).
struct StepBackward {
  int64_t numel, problems;  // numel > 0
  View grad;
  const float* extra;     // [extra][numel], or null
  const float* grad_out;  // [outputs][numel]
  const float* state;
  const float* grad_new_state;
  View grad_grad;     // dense
  float* grad_extra;  // [extra][numel], or null
  float* grad_state;
};

// The step once more, for its averages: to `means`, [layers][problems][gac].
inline LaunchStatus run_forward_again(const Config& config, const float* phi, const StepBackward& b, float* gathered,
                                      float* means, const Workspace& workspace, cudaStream_t stream) {
  const int64_t tiles = tiles_for(b.numel);
  const auto floats = [&](int64_t n) { return static_cast<float*>(workspace.allocate(sizeof(float) * (n + 4))); };
  float* const new_state = floats(tiles * kTile * config.rows());
  LayeredScalars call{};
  call.step.config = config;
  call.step.phi = phi;
  call.total = b.numel;
  call.problems = b.problems;
  call.extra = b.extra;
  call.out = floats(config.outputs * b.numel);
  call.means = means;
  call.sums = static_cast<double*>(workspace.allocate(sizeof(double) * (2 * b.problems * config.gac + 2)));
  call.last_phase = config.layers + 1;
  if (!new_state || !call.out || !call.sums) return cudaErrorMemoryAllocation;
  TableBuilder<StepEntry> step;
  step.add({tiles, b.numel, {}, {gathered, Dtype::float32, -1}, b.state, new_state, nullptr, 0});
  return run_step(call, step, workspace, stream);
}

// The gradient as tiles, one launch; null if there is no memory for it or `status` is not cudaSuccess.
inline float* gather_gradient(TableBuilder<GatherEntry> views, const StepBackward& b, const Workspace& workspace,
                              cudaStream_t stream, LaunchStatus& status) {
  const int64_t tiles = tiles_for(b.numel);
  float* const gathered = static_cast<float*>(workspace.allocate(sizeof(float) * tiles * kTile));
  status = cudaErrorMemoryAllocation;
  if (!gathered) return nullptr;
  views.add({tiles, b.numel, b.grad, gathered});
  status = launch_gather(views, stream);
  return status == cudaSuccess ? gathered : nullptr;
}

// A functional step as a segment of one step.
inline std::vector<SegmentStep> one_step(const float* record) {
  return {{record, 0.f, 0.f, 0.f, 0.f}, {nullptr, 0.f, 0.f, 0.f, 0.f}};
}
inline BackwardEntry entry_of(const StepBackward& b) {
  return {tiles_for(b.numel), b.numel, 0, b.state, b.grad_new_state, b.grad_state};
}

// Of a network with averages: what the tensor is told. The gradient gathered, and then as a segment.
inline LaunchStatus run_normalized_step_backward(const Config& config, const float* phi,
                                                 const TableBuilder<GatherEntry>& views, const StepBackward& b,
                                                 int64_t age, const float* inputs, const float* nominal,
                                                 float* grad_phi, const Workspace& workspace, cudaStream_t stream) {
  LaunchStatus status = cudaSuccess;
  float* const gathered = gather_gradient(views, b, workspace, stream, status);
  if (!gathered) return status;
  TableBuilder<NormalizedBackwardEntry> builder;
  builder.add({entry_of(b), age, inputs, nominal});
  NormalizedBackwardScalars scalars{};
  scalars.config = config;
  scalars.phi = phi;
  scalars.functional = {b.numel, b.grad_out, b.grad_grad};
  return run_backward(scalars, builder, one_step(gathered), grad_phi, workspace, stream);
}

// Two or three launches: the gradient gathered into tiles, the step again for averages, back-propagation.
inline LaunchStatus run_step_backward(const Config& config, const float* phi, const TableBuilder<GatherEntry>& views,
                                      const StepBackward& b, float* grad_phi, const Workspace& workspace,
                                      cudaStream_t stream) {
  LaunchStatus status = cudaSuccess;
  float* const gathered = gather_gradient(views, b, workspace, stream, status);
  if (!gathered) return status;
  TableBuilder<BackwardEntry> builder;
  builder.add(entry_of(b));
  const std::vector<SegmentStep> segment = one_step(gathered);
  if (config.is_plain()) {
    BackwardScalars scalars{};
    scalars.config = config;
    scalars.phi = phi;
    scalars.functional = {b.numel, b.grad_out, b.grad_grad};
    return run_backward(scalars, builder, segment, grad_phi, workspace, stream);
  }
  float* const means =
      static_cast<float*>(workspace.allocate(sizeof(float) * (config.layers * b.problems * config.gac + 4)));
  if (!means) return cudaErrorMemoryAllocation;
  if (config.gac > 0) status = run_forward_again(config, phi, b, gathered, means, workspace, stream);
  if (status != cudaSuccess) return status;
  LayeredBackwardScalars functional{};
  functional.total = b.numel;
  functional.extra = b.extra;
  functional.grad_out = b.grad_out;
  functional.grad_grad = b.grad_grad;
  functional.grad_extra = b.grad_extra;
  return run_layered_backward(config, phi, builder, segment, {means}, b.problems, functional, grad_phi, workspace,
                              stream);
}

}  // namespace l2l
