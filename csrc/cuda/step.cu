// lstm_step and lstm_step_ on CUDA tensors. The arguments are those of csrc/ops.cpp.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "tensors.h"

namespace l2l {
namespace {

std::tuple<at::Tensor, at::Tensor> lstm_step(const at::Tensor& grad, const at::Tensor& state, const at::Tensor& phi,
                                             int64_t hidden_size, int64_t num_layers, c10::string_view preprocess,
                                             double p, double output_scale) {
  const Config config = make_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p, output_scale);
  check_cuda_config(config);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  check_state(config, state, tiles_for(grad.numel()), "state");
  check_same_device(grad, "grad", phi, "phi");
  check_same_device(state, "state", phi, "phi");
  check_aligned(state, "state");

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor plain_grad = grad.resolve_neg(), dense_phi = phi.resolve_neg().contiguous();
  at::Tensor update = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor new_state = at::empty_like(state);
  TableBuilder<StepEntry> builder;
  if (grad.numel() > 0)
    builder.add({tiles_for(grad.numel()), grad.numel(), view_of(builder, update), view_of(builder, plain_grad),
                 state.const_data_ptr<float>(), new_state.mutable_data_ptr<float>(), nullptr});
  CallMemory memory(phi);
  check_launch(run_step(config, dense_phi.const_data_ptr<float>(), builder, StepOptions{}, memory.workspace(),
                        c10::cuda::getCurrentCUDAStream()),
               "lstm_step", config);
  return {update, new_state};
}

void lstm_step_(at::TensorList params, at::TensorList grads, at::TensorList states, const at::Tensor& phi,
                int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
                double lr, double weight_decay, bool maximize, const std::optional<at::Tensor>& record,
                at::IntArrayRef record_tiles, bool check_only) {
  const Config config = make_config(hidden_size, num_layers, {preprocess.data(), preprocess.size()}, p, output_scale);
  check_cuda_config(config);
  check_step_arguments(config, params, grads, states, phi, record, record_tiles);
  for (size_t k = 0; k < states.size(); k++) check_aligned(states[k], "states", static_cast<int64_t>(k));
  if (check_only) return;
  mark_written(params, states, {record});

  const c10::cuda::CUDAGuard guard(phi.device());
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  TableBuilder<StepEntry> builder;
  builder.reserve(params.size());
  std::vector<at::Tensor> plain_grads;
  int64_t tiles = 0;
  for (size_t k = 0; k < params.size(); k++) {
    if (params[k].numel() == 0) continue;
    params[k].mutable_data_ptr();  // materializes a lazy clone
    plain_grads.push_back(grads[k].resolve_neg());
    float* const recorded = record ? record->mutable_data_ptr<float>() + record_tiles[k] * kTile : nullptr;
    float* const state = states[k].mutable_data_ptr<float>();
    tiles += tiles_for(params[k].numel());
    builder.add({tiles, params[k].numel(), view_of(builder, params[k]), view_of(builder, plain_grads.back()), state,
                 state, recorded});
  }
  StepOptions options;
  options.lr = static_cast<float>(lr);
  options.decay = static_cast<float>(1.0 - lr * weight_decay);
  options.maximize = maximize;
  options.in_place = true;
  CallMemory memory(phi);
  check_launch(run_step(config, dense_phi.const_data_ptr<float>(), builder, options, memory.workspace(),
                        c10::cuda::getCurrentCUDAStream()),
               "lstm_step_", config);
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CUDA, m) {
  m.impl("lstm_step", &lstm_step);
  m.impl("lstm_step_", &lstm_step_);
}

}  // namespace l2l
