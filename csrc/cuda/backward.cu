// lstm_step_backward and lstm_segment_backward on CUDA tensors. The arguments are those of csrc/ops.cpp.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "tensors.h"

namespace l2l {
namespace {

at::Tensor empty_phi(const at::Tensor& phi) {
  return at::empty(phi.sizes(), phi.options().memory_format(at::MemoryFormat::Contiguous));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_step_backward(const at::Tensor& grad_update,
                                                                  const at::Tensor& grad_new_state,
                                                                  const at::Tensor& grad, const at::Tensor& state,
                                                                  const at::Tensor& phi, int64_t hidden_size,
                                                                  int64_t num_layers, c10::string_view preprocess,
                                                                  double p, double output_scale) {
  const Config config = make_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p, output_scale);
  check_cuda_config(config);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  check_coordinates(grad_update, "grad_update");
  TORCH_CHECK_VALUE(grad_update.sizes() == grad.sizes(), "grad_update: expected shape ", grad.sizes(), " as grad, got ",
                    grad_update.sizes());
  const int64_t tiles = tiles_for(grad.numel());
  check_state(config, state, tiles, "state");
  const at::Tensor end = grad_new_state.contiguous();
  check_state(config, end, tiles, "grad_new_state");
  check_same_device(grad, "grad", phi, "phi");
  check_same_device(grad_update, "grad_update", phi, "phi");
  check_same_device(state, "state", phi, "phi");
  check_same_device(end, "grad_new_state", phi, "phi");
  check_aligned(state, "state");
  check_aligned(end, "grad_new_state");

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor plain_grad = grad.resolve_neg(), plain_upstream = grad_update.resolve_neg();
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  at::Tensor grad_grad = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_state = at::empty_like(state);
  if (grad.numel() == 0) return {grad_grad, grad_state, at::zeros(phi.sizes(), phi.options())};
  at::Tensor grad_phi = empty_phi(phi);
  TableBuilder<GatherEntry> views;
  const StepBackward step{grad.numel(),
                          view_of(views, plain_grad),
                          view_of(views, plain_upstream),
                          {grad_grad.mutable_data_ptr(), dtype_of(grad_grad), -1},
                          state.const_data_ptr<float>(),
                          end.const_data_ptr<float>(),
                          grad_state.mutable_data_ptr<float>()};
  CallMemory memory(phi);
  check_launch(
      run_step_backward(config, dense_phi.const_data_ptr<float>(), views, step, grad_phi.mutable_data_ptr<float>(),
                        memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "lstm_step_backward", config);
  return {grad_grad, grad_state, grad_phi};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> lstm_segment_backward(
    at::TensorList start_states, at::IntArrayRef numels, at::IntArrayRef record_tiles, at::TensorList records,
    at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs, at::ArrayRef<double> decays, const at::Tensor& phi,
    int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
    at::TensorList grad_end_states, bool need_grad_start) {
  const Config config = make_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p, output_scale);
  check_cuda_config(config);
  check_segment_arguments(config, start_states, numels, record_tiles, records, loss_weights, lrs, decays, phi,
                          grad_end_states);
  for (size_t k = 0; k < start_states.size(); k++) {
    check_aligned(start_states[k], "start_states", static_cast<int64_t>(k));
    if (!grad_end_states.empty()) check_aligned(grad_end_states[k], "grad_end_states", static_cast<int64_t>(k));
  }

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  std::vector<at::Tensor> grad_start_states;
  TableBuilder<BackwardEntry> builder;
  builder.reserve(start_states.size());
  int64_t tiles = 0;
  for (size_t k = 0; k < start_states.size(); k++) {
    if (need_grad_start) grad_start_states.push_back(at::empty_like(start_states[k]));
    if (start_states[k].size(0) == 0) continue;
    tiles += start_states[k].size(0);
    builder.add({tiles, numels[k], record_tiles[k], start_states[k].const_data_ptr<float>(),
                 grad_end_states.empty() ? nullptr : grad_end_states[k].const_data_ptr<float>(),
                 need_grad_start ? grad_start_states.back().mutable_data_ptr<float>() : nullptr});
  }
  const size_t steps = records.size() - 1;
  std::vector<SegmentStep> segment;
  for (size_t t = 0; t <= steps; t++)
    segment.push_back({records[t].const_data_ptr<float>(), t > 0 ? static_cast<float>(loss_weights[t - 1]) : 0.f,
                       t < steps ? static_cast<float>(lrs[t]) : 0.f, t < steps ? static_cast<float>(decays[t]) : 0.f,
                       0.f});
  at::Tensor grad_phi = empty_phi(phi);
  CallMemory memory(phi);
  check_launch(
      run_segment_backward(config, dense_phi.const_data_ptr<float>(), builder, segment,
                           grad_phi.mutable_data_ptr<float>(), memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "lstm_segment_backward", config);
  return {grad_phi, grad_start_states};
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CUDA, m) {
  m.impl("lstm_step_backward", &lstm_step_backward);
  m.impl("lstm_segment_backward", &lstm_segment_backward);
}

}  // namespace l2l
