// gac_step_backward and gac_segment_backward on CUDA tensors. The arguments are those of csrc/ops.cpp.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../gac_checks.h"
#include "gac_operations.cuh"
#include "tensors.h"

namespace l2l {
namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gac_step_backward(
    const at::Tensor& grad_out, const at::Tensor& grad_new_state, const at::Tensor& grad,
    const std::optional<at::Tensor>& extra, const at::Tensor& state, const at::Tensor& phi, int64_t hidden_size,
    int64_t num_layers, c10::string_view preprocess, double p, double output_scale, int64_t gac_cells,
    int64_t extra_inputs, int64_t num_outputs, int64_t groups) {
  const Config config = make_gac_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p,
                                        output_scale, gac_cells, extra_inputs, num_outputs);
  check_cuda_config(config);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  const int64_t numel = grad.numel();
  check_groups(groups, numel, "grad");
  check_state(config, state, tiles_for(numel), "state");
  check_state(config, grad_new_state, tiles_for(numel), "grad_new_state");
  check_rows(extra, "extra", config.extra, grad.sizes(), phi);
  check_rows(grad_out, "grad_out", config.outputs, grad.sizes(), phi);
  check_same_device(grad, "grad", phi, "phi");
  check_same_device(state, "state", phi, "phi");
  check_same_device(grad_new_state, "grad_new_state", phi, "phi");
  check_aligned(state, "state");

  const c10::cuda::CUDAGuard guard(phi.device());
  std::vector<int64_t> extra_shape{config.extra};
  extra_shape.insert(extra_shape.end(), grad.sizes().begin(), grad.sizes().end());
  const at::Tensor plain_grad = grad.resolve_neg(), dense_phi = phi.resolve_neg().contiguous();
  at::Tensor grad_grad = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_extra = at::empty(extra_shape, phi.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_state = at::empty_like(state);
  if (numel == 0) return {grad_grad, grad_extra, grad_state, at::zeros(phi.sizes(), phi.options())};
  at::Tensor grad_phi = at::empty(phi.sizes(), phi.options().memory_format(at::MemoryFormat::Contiguous));
  TableBuilder<GatherEntry> views;
  const GacStepBackward step{numel,
                             view_of(views, plain_grad),
                             extra ? extra->const_data_ptr<float>() : nullptr,
                             grad_out.const_data_ptr<float>(),
                             state.const_data_ptr<float>(),
                             grad_new_state.const_data_ptr<float>(),
                             {grad_grad.mutable_data_ptr(), dtype_of(grad_grad), -1},
                             grad_extra.mutable_data_ptr<float>(),
                             grad_state.mutable_data_ptr<float>()};
  CallMemory memory(phi);
  check_launch(
      run_gac_step_backward(config, dense_phi.const_data_ptr<float>(), views, step, groups,
                            grad_phi.mutable_data_ptr<float>(), memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "gac_step_backward", config);
  return {grad_grad, grad_extra, grad_state, grad_phi};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> gac_segment_backward(
    at::TensorList start_states, at::IntArrayRef numels, at::IntArrayRef record_tiles, at::TensorList records,
    at::TensorList means, at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs, at::ArrayRef<double> decays,
    const at::Tensor& phi, int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p,
    double output_scale, int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs, int64_t groups,
    at::TensorList grad_end_states, bool need_grad_start) {
  const Config config = make_gac_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p,
                                        output_scale, gac_cells, extra_inputs, num_outputs);
  check_cuda_config(config);
  check_segment_arguments(config, start_states, numels, record_tiles, records, loss_weights, lrs, decays, phi,
                          grad_end_states);
  check_gac_segment(config, numels, records, means, groups, phi);

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  std::vector<at::Tensor> grad_start_states;
  TableBuilder<GacBackwardEntry> builder;
  builder.reserve(start_states.size());
  int64_t tiles = 0;
  for (size_t k = 0; k < start_states.size(); k++) {
    if (need_grad_start) grad_start_states.push_back(at::empty_like(start_states[k]));
    if (numels[k] == 0) continue;
    builder.add({tiles += tiles_for(numels[k]), numels[k], record_tiles[k], start_states[k].const_data_ptr<float>(),
                 grad_end_states.empty() ? nullptr : grad_end_states[k].const_data_ptr<float>(),
                 need_grad_start ? grad_start_states.back().mutable_data_ptr<float>() : nullptr});
  }
  const size_t steps = records.size() - 1;
  std::vector<SegmentStep> segment;
  std::vector<const float*> averages;
  for (size_t t = 0; t <= steps; t++)
    segment.push_back({records[t].const_data_ptr<float>(), t > 0 ? static_cast<float>(loss_weights[t - 1]) : 0.f,
                       t < steps ? static_cast<float>(lrs[t]) : 0.f, t < steps ? static_cast<float>(decays[t]) : 0.f,
                       0.f});
  for (const at::Tensor& mean : means) averages.push_back(mean.const_data_ptr<float>());
  at::Tensor grad_phi = at::empty(phi.sizes(), phi.options().memory_format(at::MemoryFormat::Contiguous));
  CallMemory memory(phi);
  check_launch(run_gac_segment_backward(config, dense_phi.const_data_ptr<float>(), builder, segment, averages, groups,
                                        grad_phi.mutable_data_ptr<float>(), GacBackwardScalars{}, memory.workspace(),
                                        c10::cuda::getCurrentCUDAStream()),
               "gac_segment_backward", config);
  return {grad_phi, grad_start_states};
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CUDA, m) {
  m.impl("gac_step_backward", &gac_step_backward);
  m.impl("gac_segment_backward", &gac_segment_backward);
}

}  // namespace l2l
