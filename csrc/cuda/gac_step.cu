// gac_step and gac_step_ on CUDA tensors. The arguments are those of csrc/ops.cpp.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../gac_checks.h"
#include "gac_operations.cuh"
#include "tensors.h"

namespace l2l {
namespace {

std::tuple<at::Tensor, at::Tensor> gac_step(const at::Tensor& grad, const std::optional<at::Tensor>& extra,
                                            const at::Tensor& state, const at::Tensor& phi, int64_t hidden_size,
                                            int64_t num_layers, c10::string_view preprocess, double p,
                                            double output_scale, int64_t gac_cells, int64_t extra_inputs,
                                            int64_t num_outputs, int64_t groups) {
  const Config config = make_gac_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p,
                                        output_scale, gac_cells, extra_inputs, num_outputs);
  check_cuda_config(config);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  const int64_t numel = grad.numel();
  check_groups(groups, numel, "grad");
  check_state(config, state, tiles_for(numel), "state");
  check_rows(extra, "extra", config.extra, grad.sizes(), phi);
  check_same_device(grad, "grad", phi, "phi");
  check_same_device(state, "state", phi, "phi");
  check_aligned(state, "state");

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor plain_grad = grad.resolve_neg(), dense_phi = phi.resolve_neg().contiguous();
  std::vector<int64_t> shape{config.outputs};
  shape.insert(shape.end(), grad.sizes().begin(), grad.sizes().end());
  at::Tensor out = at::empty(shape, phi.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor new_state = at::empty_like(state);
  TableBuilder<GacEntry> builder;
  if (numel > 0)
    builder.add({{tiles_for(numel), numel, view_of(builder, out), view_of(builder, plain_grad),
                  state.const_data_ptr<float>(), new_state.mutable_data_ptr<float>(), nullptr},
                 0});
  CallMemory memory(phi);
  const Workspace workspace = memory.workspace();
  GacOptions options;
  options.groups = groups;
  options.extra = extra ? extra->const_data_ptr<float>() : nullptr;
  options.out = out.mutable_data_ptr<float>();
  options.means = static_cast<float*>(workspace.allocate(sizeof(float) * config.layers * groups * config.gac + 16));
  options.sums = static_cast<double*>(workspace.allocate(sizeof(double) * 2 * groups * config.gac + 16));
  options.last_phase = config.layers + 1;
  check_launch(run_gac_step(config, dense_phi.const_data_ptr<float>(), builder, numel, options, workspace,
                            c10::cuda::getCurrentCUDAStream()),
               "gac_step", config);
  return {out, new_state};
}

void gac_step_(at::TensorList params, at::TensorList grads, at::TensorList states,
               const std::optional<at::Tensor>& extra, const std::optional<at::Tensor>& out, const at::Tensor& phi,
               int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
               int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs, double lr, double weight_decay,
               bool maximize, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles, int64_t groups,
               const at::Tensor& means, const at::Tensor& sums, int64_t first_phase, int64_t last_phase,
               bool check_only) {
  const Config config = make_gac_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p,
                                        output_scale, gac_cells, extra_inputs, num_outputs);
  check_cuda_config(config);
  const int64_t total = check_gac_step_arguments(config, {params, grads, states, extra, out, record, means, sums}, phi,
                                                 record_tiles, groups, first_phase, last_phase);
  for (size_t k = 0; k < params.size(); k++) check_aligned(states[k], "states", static_cast<int64_t>(k));
  if (check_only) return;
  mark_written(params, states, {out, record, means, sums});

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  TableBuilder<GacEntry> builder;
  builder.reserve(params.size());
  std::vector<at::Tensor> plain_grads;
  int64_t tiles = 0, first = 0;
  for (size_t k = 0; k < params.size(); k++) {
    const int64_t numel = params[k].numel();
    if (numel == 0) continue;
    params[k].mutable_data_ptr();  // materializes a lazy clone
    plain_grads.push_back(grads[k].resolve_neg());
    float* const recorded = record ? record->mutable_data_ptr<float>() + record_tiles[k] * kTile : nullptr;
    float* const state = states[k].mutable_data_ptr<float>();
    tiles += tiles_for(numel);
    builder.add(
        {{tiles, numel, view_of(builder, params[k]), view_of(builder, plain_grads.back()), state, state, recorded},
         first});
    first += numel;
  }
  GacOptions options;
  options.lr = static_cast<float>(lr);
  options.decay = static_cast<float>(1.0 - lr * weight_decay);
  options.maximize = maximize;
  options.in_place = true;
  options.groups = groups;
  options.extra = extra ? extra->const_data_ptr<float>() : nullptr;
  options.out = out ? out->mutable_data_ptr<float>() : nullptr;
  options.means = means.mutable_data_ptr<float>();
  options.sums = sums.mutable_data_ptr<double>();
  options.first_phase = static_cast<int>(first_phase);
  options.last_phase = static_cast<int>(last_phase);
  CallMemory memory(phi);
  if (builder.entries().empty() && sums.numel() > 0) {
    const cudaError_t error = cudaMemsetAsync(options.sums, 0, sums.nbytes(), c10::cuda::getCurrentCUDAStream());
    check_launch(error, "gac_step_", config);
  }
  check_launch(run_gac_step(config, dense_phi.const_data_ptr<float>(), builder, total, options, memory.workspace(),
                            c10::cuda::getCurrentCUDAStream()),
               "gac_step_", config);
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CUDA, m) {
  m.impl("gac_step", &gac_step);
  m.impl("gac_step_", &gac_step_);
}

}  // namespace l2l
