// The bodies of the operators: arguments are parsed and checked, results allocated, versions bumped; then the backend
// of phi's device does the work on plain structs.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "arguments.h"

namespace l2l {
namespace {

std::array<const Backend*, at::COMPILE_TIME_MAX_DEVICE_TYPES> backends{};

const Backend& backend_of(const at::Tensor& phi, const Config& config) {
  check_phi(config, phi);
  const Backend* backend = backends[static_cast<size_t>(phi.device().type())];
  TORCH_CHECK_NOT_IMPLEMENTED(backend, "phi: no kernels for device ", phi.device());
  backend->check_config(config);
  return *backend;
}

at::Tensor dense(const at::Tensor& phi) { return phi.resolve_neg().contiguous(); }

at::Tensor empty_contiguous(const at::Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().memory_format(at::MemoryFormat::Contiguous));
}

// [rows, *grad's shape], float32.
at::Tensor empty_rows(int64_t rows, const at::Tensor& grad, const at::Tensor& phi) {
  std::vector<int64_t> shape{rows};
  shape.insert(shape.end(), grad.sizes().begin(), grad.sizes().end());
  return empty_contiguous(phi, shape);
}

const float* floats_of(const std::optional<at::Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<float>() : nullptr;
}

std::tuple<at::Tensor, at::Tensor> step(const at::Tensor& grad, const std::optional<at::Tensor>& extra,
                                        const at::Tensor& state, const at::Tensor& phi, at::IntArrayRef sizes,
                                        c10::string_view preprocess, at::ArrayRef<double> constants,
                                        int64_t num_problems, at::IntArrayRef ages,
                                        const std::optional<at::Tensor>& tensor_inputs,
                                        const std::optional<at::Tensor>& nominal) {
  const Config config = make_config({sizes, preprocess, constants});
  const Backend& backend = backend_of(phi, config);
  check_step_inputs(config, grad, extra, state, phi, num_problems, backend.alignment);
  const CommonArguments common{ages, tensor_inputs, nominal};
  check_common(config, common, 1, num_problems, phi);
  at::Tensor out = empty_rows(config.outputs, grad, phi), new_state = at::empty_like(state);
  if (grad.numel() == 0) return {out, new_state};
  StepCall call;
  call.config = config;
  call.phi = dense(phi);
  call.tensors.push_back(
      {{}, grad.resolve_neg(), state.const_data_ptr<float>(), new_state.mutable_data_ptr<float>(), nullptr, 0, {}});
  if (config.averages() > 0) call.tensors.back().common = common.of(0);
  call.total = grad.numel();
  call.extra = floats_of(extra);
  call.out = out.mutable_data_ptr<float>();
  call.problems = num_problems;
  call.last_phase = config.layers + 1;
  at::Tensor means, sums;
  if (config.gac > 0) {
    means = empty_contiguous(phi, {config.layers, num_problems, config.gac});
    sums = at::empty({2, num_problems, config.gac}, phi.options().dtype(at::kDouble));
    call.means = means.mutable_data_ptr<float>();
    call.sums = sums.mutable_data_ptr<double>();
  }
  backend.step(call);
  return {out, new_state};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> step_backward(
    const at::Tensor& grad_out, const at::Tensor& grad_new_state, const at::Tensor& grad,
    const std::optional<at::Tensor>& extra, const at::Tensor& state, const at::Tensor& phi, at::IntArrayRef sizes,
    c10::string_view preprocess, at::ArrayRef<double> constants, int64_t num_problems, at::IntArrayRef ages,
    const std::optional<at::Tensor>& tensor_inputs, const std::optional<at::Tensor>& nominal) {
  const Config config = make_config({sizes, preprocess, constants});
  const Backend& backend = backend_of(phi, config);
  check_step_inputs(config, grad, extra, state, phi, num_problems, backend.alignment);
  const CommonArguments common{ages, tensor_inputs, nominal};
  check_common(config, common, 1, num_problems, phi);
  check_upstream(config, grad, phi, grad_out, grad_new_state, backend.alignment);
  at::Tensor grad_grad = empty_contiguous(grad, grad.sizes()), grad_extra = empty_rows(config.extra, grad, phi);
  at::Tensor grad_state = at::empty_like(state);
  if (grad.numel() == 0) return {grad_grad, grad_extra, grad_state, at::zeros(phi.sizes(), phi.options())};
  at::Tensor grad_phi = empty_contiguous(phi, phi.sizes());
  backend.step_backward({config, dense(phi), grad.resolve_neg(), grad.numel(), num_problems, floats_of(extra),
                         state.const_data_ptr<float>(), grad_out.const_data_ptr<float>(),
                         grad_new_state.const_data_ptr<float>(), grad_grad, grad_extra.mutable_data_ptr<float>(),
                         grad_state.mutable_data_ptr<float>(), grad_phi.mutable_data_ptr<float>(),
                         config.averages() > 0 ? common.of(0) : Common{}});
  return {grad_grad, grad_extra, grad_state, grad_phi};
}

void step_(at::TensorList params, at::TensorList grads, at::TensorList states, const at::Tensor& phi,
           at::IntArrayRef sizes, c10::string_view preprocess, at::ArrayRef<double> constants, double lr,
           double weight_decay, bool maximize, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles,
           const std::optional<at::Tensor>& extra, const std::optional<at::Tensor>& out, int64_t num_problems,
           const std::optional<at::Tensor>& means, const std::optional<at::Tensor>& sums, int64_t first_phase,
           int64_t last_phase, bool check_only, at::IntArrayRef ages, const std::optional<at::Tensor>& tensor_inputs,
           const std::optional<at::Tensor>& nominal, at::IntArrayRef seeds, c10::string_view precision) {
  const Config config = make_config({sizes, preprocess, constants});
  const Backend& backend = backend_of(phi, config);
  const CommonArguments common{ages, tensor_inputs, nominal};
  const StepArguments arguments{params, grads, states,       phi,         record,     record_tiles, extra, out,
                                means,  sums,  num_problems, first_phase, last_phase, common,       seeds, precision};
  check_step(config, arguments, backend.alignment);
  if (check_only) return;
  mark_written(arguments);

  StepCall call;
  call.config = config;
  call.state_type = arguments.state_type();
  call.precision = arguments.precision();
  const bool stored = call.state_type != StateType::float32;
  call.tensors.reserve(params.size());
  for (size_t k = 0; k < params.size(); k++) {
    if (params[k].numel() == 0) continue;
    params[k].mutable_data_ptr();  // materializes a lazy clone
    float* const recorded = record ? record->mutable_data_ptr<float>() + record_tiles[k] * kTile : nullptr;
    float* const state = stored ? nullptr : states[k].mutable_data_ptr<float>();
    call.tensors.push_back({params[k], grads[k].resolve_neg(), state, state, recorded, call.total, {}});
    if (config.averages() > 0) call.tensors.back().common = common.of(k);
    if (stored) {
      call.tensors.back().stored = states[k].mutable_data_ptr();
      call.tensors.back().seed = static_cast<uint64_t>(seeds[k]);
    }
    call.total += params[k].numel();
  }
  if (call.tensors.empty()) {
    if (sums) sums->zero_();
    return;
  }
  call.phi = dense(phi);
  call.extra = floats_of(extra);
  call.out = out ? out->mutable_data_ptr<float>() : nullptr;
  call.lr = static_cast<float>(lr);
  call.decay = static_cast<float>(1.0 - lr * weight_decay);
  call.maximize = maximize;
  call.problems = num_problems;
  call.means = means && config.gac > 0 ? means->mutable_data_ptr<float>() : nullptr;
  call.sums = sums && config.gac > 0 ? sums->mutable_data_ptr<double>() : nullptr;
  call.first_phase = static_cast<int>(first_phase);
  call.last_phase = static_cast<int>(last_phase);
  backend.step(call);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> segment_backward(
    at::TensorList start_states, at::IntArrayRef numels, at::IntArrayRef record_tiles, at::TensorList records,
    at::TensorList means, at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs, at::ArrayRef<double> decays,
    const at::Tensor& phi, at::IntArrayRef sizes, c10::string_view preprocess, at::ArrayRef<double> constants,
    int64_t num_problems, at::TensorList grad_end_states, bool need_grad_start, at::IntArrayRef ages,
    const std::optional<at::Tensor>& tensor_inputs, const std::optional<at::Tensor>& nominal) {
  const Config config = make_config({sizes, preprocess, constants});
  const Backend& backend = backend_of(phi, config);
  const CommonArguments common{ages, tensor_inputs, nominal};
  check_segment(config,
                {start_states, numels, record_tiles, records, means, loss_weights, lrs, decays, phi, num_problems,
                 grad_end_states, common},
                backend.alignment);

  const size_t steps = records.size() - 1;
  SegmentCall call{config, dense(phi), {}, {}, {}, num_problems, nullptr};
  std::vector<at::Tensor> grad_start_states;
  for (size_t k = 0; k < start_states.size(); k++) {
    if (need_grad_start) grad_start_states.push_back(at::empty_like(start_states[k]));
    if (numels[k] == 0) continue;
    call.tensors.push_back({numels[k],
                            record_tiles[k],
                            start_states[k].const_data_ptr<float>(),
                            grad_end_states.empty() ? nullptr : grad_end_states[k].const_data_ptr<float>(),
                            need_grad_start ? grad_start_states.back().mutable_data_ptr<float>() : nullptr,
                            {}});
    for (size_t t = 0; config.averages() > 0 && t < steps; t++) call.tensors.back().common.push_back(common.of(k, t));
  }
  if (call.tensors.empty()) return {at::zeros(phi.sizes(), phi.options()), grad_start_states};
  for (size_t t = 0; t <= steps; t++)
    call.steps.push_back({records[t].const_data_ptr<float>(), t > 0 ? static_cast<float>(loss_weights[t - 1]) : 0.f,
                          t < steps ? static_cast<float>(lrs[t]) : 0.f, t < steps ? static_cast<float>(decays[t]) : 0.f,
                          0.f});
  if (config.gac > 0)
    for (const at::Tensor& mean : means) call.means.push_back(mean.const_data_ptr<float>());
  at::Tensor grad_phi = empty_contiguous(phi, phi.sizes());
  call.grad_phi = grad_phi.mutable_data_ptr<float>();
  backend.segment_backward(call);
  return {grad_phi, grad_start_states};
}

at::Tensor tensor_sums(at::TensorList params, at::TensorList grads, at::TensorList states, at::IntArrayRef sizes,
                       c10::string_view preprocess, at::ArrayRef<double> constants, bool maximize,
                       at::IntArrayRef ages) {
  const Config config = make_config({sizes, preprocess, constants});
  TORCH_CHECK_VALUE(config.averages() > 0, "preprocess: expected 'normalized', got '", preprocess, "'");
  const at::Device device = params.empty() ? at::Device(at::kCPU) : params[0].device();
  const Backend* const backend = backends[static_cast<size_t>(device.type())];
  TORCH_CHECK_NOT_IMPLEMENTED(backend, "params[0]: no kernels for device ", device);
  check_tensor_sums(config, params, grads, states, ages, backend->alignment);
  const auto count = static_cast<int64_t>(params.size());
  at::Tensor out = at::empty({count, kSumColumns}, at::TensorOptions().dtype(at::kDouble).device(device));
  if (count == 0) return out;
  static_assert(kSumColumns == kTensorSums + 1);
  SumsCall call{config, {}, maximize, out.mutable_data_ptr<double>()};
  call.tensors.reserve(params.size());
  for (size_t k = 0; k < params.size(); k++)
    call.tensors.push_back({params[k].resolve_neg(), grads[k].resolve_neg(), states[k].const_data_ptr(),
                            state_type_of(states[k], "states", static_cast<int64_t>(k)), ages[k]});
  backend->tensor_sums(call);
  return out;
}

}  // namespace

void register_backend(torch::Library& m, at::DeviceType device, const Backend& backend) {
  backends[static_cast<size_t>(device)] = &backend;
  m.impl("step", &step);
  m.impl("step_backward", &step_backward);
  m.impl("step_", &step_);
  m.impl("segment_backward", &segment_backward);
  m.impl("_tensor_sums", &tensor_sums);
}

}  // namespace l2l
