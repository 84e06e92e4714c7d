// The step with global averaging cells on plain pointers; see operations.cuh.
#pragma once

#include "gac_launch.cuh"
#include "operations.cuh"

namespace l2l {

struct GacOptions {
  float lr = 1.f, decay = 0.f;
  bool maximize = false, in_place = false;
  int64_t groups = 1;
  const float* extra = nullptr;  // [extra][coordinates of all entries]
  float* out = nullptr;          // [outputs][coordinates of all entries], may be null in place
  float* means = nullptr;        // [layers][groups][gac]
  double* sums = nullptr;        // [2][groups][gac]
  int first_phase = 0, last_phase = 0;
};

// One launch for all entries, or nothing if there are none.
inline LaunchStatus run_gac_step(const Config& config, const float* phi, const TableBuilder<GacEntry>& builder,
                                 int64_t coordinates, const GacOptions& options, const Workspace& workspace,
                                 cudaStream_t stream) {
  if (builder.entries().empty()) return cudaSuccess;
  GacScalars scalars{};
  scalars.step.config = config;
  scalars.step.log_sign = log_sign_constants(config);
  scalars.step.phi = phi;
  scalars.step.tiles = builder.entries().back().end_tile;
  scalars.step.lr = options.lr;
  scalars.step.decay = options.decay;
  scalars.step.maximize = options.maximize;
  scalars.step.in_place = options.in_place;
  scalars.groups = options.groups;
  scalars.total = coordinates;
  scalars.extra = options.extra;
  scalars.out = options.out;
  scalars.means = options.means;
  scalars.sums = options.sums;
  scalars.first_phase = options.first_phase;
  scalars.last_phase = options.last_phase;
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.step.table);
  return launch_gac_step(scalars, words, workspace.allocate, stream);
}

// One launch: d phi of a segment. averages[t]: [layers][groups][gac] of step t.
inline LaunchStatus run_gac_segment_backward(const Config& config, const float* phi,
                                             TableBuilder<GacBackwardEntry> builder,
                                             const std::vector<SegmentStep>& segment,
                                             const std::vector<const float*>& averages, int64_t groups, float* grad_phi,
                                             GacBackwardScalars functional, const Workspace& workspace,
                                             cudaStream_t stream) {
  if (builder.entries().empty()) return cudaMemsetAsync(grad_phi, 0, sizeof(float) * config.phi_size(), stream);
  GacBackwardScalars scalars = functional;
  scalars.config = config;
  scalars.log_sign = log_sign_constants(config);
  scalars.phi = phi;
  scalars.tiles = builder.entries().back().end_tile;
  scalars.groups = groups;
  scalars.steps = static_cast<int32_t>(segment.size()) - 1;
  scalars.grad_phi = grad_phi;
  std::vector<int64_t> rest(segment.size() * sizeof(SegmentStep) / 8);
  std::memcpy(rest.data(), segment.data(), rest.size() * 8);
  for (const float* pointer : averages) rest.push_back(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)));
  scalars.segment = static_cast<int32_t>(builder.append(rest.data(), rest.size()));
  const std::vector<int64_t> words = place_table(builder, workspace, scalars.table);
  return launch_gac_backward(scalars, words, workspace.allocate, stream);
}

struct GacStepBackward {
  int64_t numel;  // > 0
  View grad;
  const float* extra;     // [extra][numel], or null
  const float* grad_out;  // [outputs][numel]
  const float* state;
  const float* grad_new_state;
  View grad_grad;     // dense
  float* grad_extra;  // [extra][numel], or null
  float* grad_state;
};

// Three launches: the gradient gathered into tiles, the step again for its averages, back-propagation.
inline LaunchStatus run_gac_step_backward(const Config& config, const float* phi, TableBuilder<GatherEntry> views,
                                          const GacStepBackward& b, int64_t groups, float* grad_phi,
                                          const Workspace& workspace, cudaStream_t stream) {
  const int64_t tiles = tiles_for(b.numel), cells = config.gac;
  const auto floats = [&](int64_t n) { return static_cast<float*>(workspace.allocate(sizeof(float) * (n + 4))); };
  float* const gathered = floats(tiles * kTile);
  float* const new_state = floats(tiles * kTile * config.rows());
  float* const out = floats(config.outputs * b.numel);
  float* const means = floats(config.layers * groups * cells);
  double* const sums = static_cast<double*>(workspace.allocate(sizeof(double) * (2 * groups * cells + 2)));
  if (!gathered || !new_state || !out || !means || !sums) return cudaErrorMemoryAllocation;
  views.add({tiles, b.numel, b.grad, gathered});
  LaunchStatus status = launch_gather(views, stream);
  if (status != cudaSuccess) return status;

  TableBuilder<GacEntry> step;
  step.add(
      {{tiles, b.numel, {out, Dtype::float32, -1}, {gathered, Dtype::float32, -1}, b.state, new_state, nullptr}, 0});
  GacOptions options;
  options.groups = groups;
  options.extra = b.extra;
  options.out = out;
  options.means = means;
  options.sums = sums;
  options.last_phase = config.layers + 1;
  status = run_gac_step(config, phi, step, b.numel, options, workspace, stream);
  if (status != cudaSuccess) return status;

  TableBuilder<GacBackwardEntry> builder;
  builder.add({tiles, b.numel, 0, b.state, b.grad_new_state, b.grad_state});
  GacBackwardScalars functional{};
  functional.total = b.numel;
  functional.extra = b.extra;
  functional.grad_out = b.grad_out;
  functional.grad_grad = b.grad_grad;
  functional.grad_extra = b.grad_extra;
  const std::vector<SegmentStep> segment{{gathered, 0.f, 0.f, 0.f, 0.f}, {nullptr, 0.f, 0.f, 0.f, 0.f}};
  return run_gac_segment_backward(config, phi, builder, segment, {means}, groups, grad_phi, functional, workspace,
                                  stream);
}

}  // namespace l2l
