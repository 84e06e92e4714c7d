// The CUDA backend: the operators' calls as entries of a table, launched on the current stream of phi's device.
#include "tensors.h"

namespace l2l {
namespace {

// Of a network with averages: the update goes to the parameters or, in the functional step, to `out`.
void normalized_step(const StepCall& call) {
  const bool in_place = call.in_place();
  TORCH_CHECK_NOT_IMPLEMENTED(!(in_place && call.out), "out: expected None for a network with averages on CUDA");
  TableBuilder<NormalizedStepEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t tiles = 0;
  for (const StepTensor& tensor : call.tensors) {
    const int64_t numel = tensor.grad.numel();
    const View to = in_place ? view_of(builder, tensor.param) : View{call.out, Dtype::float32, -1};
    builder.add({{tiles += tiles_for(numel), numel, to, view_of(builder, tensor.grad), tensor.state, tensor.new_state,
                  tensor.record, tensor.first},
                 make_correction(call.config, tensor.common.age),
                 tensor.common.inputs,
                 tensor.common.nominal});
  }
  const NormalizedStepScalars scalars{
      {call.config, {}, call.phi.const_data_ptr<float>(), 0, call.lr, call.decay, call.maximize, in_place, {}},
      nullptr};
  CallMemory memory(call.phi);
  check_launch(run_normalized_step(scalars, builder, memory.workspace(), c10::cuda::getCurrentCUDAStream()),
               in_place ? "step_" : "step", call.config);
}

// In place, where states are not float32.
void stored_step(const StepCall& call) {
  const int largest = largest_stored_hidden(call.config.averages() > 0);
  TORCH_CHECK_NOT_IMPLEMENTED(call.config.hidden <= largest, "states: on CUDA, bfloat16 and int8 have kernels up to ",
                              "hidden_size=", largest, call.config.averages() > 0 ? " for normalized networks" : "",
                              ", got ", call.config.hidden, "; expected dtype float32");
  TableBuilder<StoredStepEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t tiles = 0;
  const bool averages = call.config.averages() > 0;
  for (const StepTensor& tensor : call.tensors) {
    const int64_t numel = tensor.grad.numel();
    builder.add({tiles += tiles_for(numel), numel, view_of(builder, tensor.param), view_of(builder, tensor.grad),
                 static_cast<unsigned char*>(tensor.stored), tensor.seed, tensor.record,
                 averages ? make_correction(call.config, tensor.common.age) : Correction{}, tensor.common.inputs,
                 tensor.common.nominal});
  }
  const NormalizedStepScalars scalars{
      {call.config, {}, call.phi.const_data_ptr<float>(), 0, call.lr, call.decay, call.maximize, true, {}}, nullptr};
  CallMemory memory(call.phi);
  check_launch(
      run_stored_step(scalars, call.state_type, builder, memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "step_", call.config);
}

void step(const StepCall& call) {
  const c10::cuda::CUDAGuard guard(call.phi.device());
  if (call.state_type != StateType::float32) return stored_step(call);
  if (call.config.averages() > 0) return normalized_step(call);
  const bool in_place = call.in_place();
  // Only the layered kernel has outputs beside the update, or phases.
  const bool plain = call.config.is_plain() && call.is_whole() && !(in_place && call.out);
  TableBuilder<StepEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t tiles = 0;
  for (const StepTensor& tensor : call.tensors) {
    const int64_t numel = tensor.grad.numel();
    const View to = in_place ? view_of(builder, tensor.param) : View{call.out, Dtype::float32, -1};
    builder.add({tiles += tiles_for(numel), numel, to, view_of(builder, tensor.grad), tensor.state, tensor.new_state,
                 tensor.record, tensor.first});
  }
  if (!plain && call.first_phase == call.last_phase) return;
  const StepScalars scalars{call.config, {}, call.phi.const_data_ptr<float>(), 0, call.lr, call.decay, call.maximize,
                            in_place,    {}};
  CallMemory memory(call.phi);
  check_launch(run_step({scalars, call.problems, call.total, call.extra, call.out, call.means, call.sums, nullptr,
                         plain ? 0 : call.first_phase, plain ? 0 : call.last_phase},
                        builder, memory.workspace(), c10::cuda::getCurrentCUDAStream()),
               in_place ? "step_" : "step", call.config);
}

void refuse_without_layers(const Config& config, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(config.layers > 0, name,
                              ": num_layers: on CUDA a network without layers has no backward "
                              "kernel, expected 1, 2, 3, got 0; meta-train it by estimator='evolution', or on the CPU");
}

void step_backward(const StepBackwardCall& call) {
  refuse_without_layers(call.config, "step_backward");
  const c10::cuda::CUDAGuard guard(call.phi.device());
  TableBuilder<GatherEntry> views;
  const StepBackward step{call.numel,
                          call.problems,
                          view_of(views, call.grad),
                          call.extra,
                          call.grad_out,
                          call.state,
                          call.grad_new_state,
                          {call.grad_grad.mutable_data_ptr(), dtype_of(call.grad_grad), -1},
                          call.grad_extra,
                          call.grad_state};
  CallMemory memory(call.phi);
  const float* const phi = call.phi.const_data_ptr<float>();
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  const Common& common = call.common;
  check_launch(call.config.averages() > 0
                   ? run_normalized_step_backward(call.config, phi, views, step, common.age, common.inputs,
                                                  common.nominal, call.grad_phi, memory.workspace(), stream)
                   : run_step_backward(call.config, phi, views, step, call.grad_phi, memory.workspace(), stream),
               "step_backward", call.config);
}

BackwardEntry entry_of(const SegmentTensor& tensor, int64_t& tiles) {
  return {tiles += tiles_for(tensor.numel),
          tensor.numel,
          tensor.record_tile,
          tensor.state,
          tensor.grad_end,
          tensor.grad_start};
}

// Of a network with averages.
void normalized_segment_backward(const SegmentCall& call) {
  NormalizedBackwardScalars scalars{};
  scalars.config = call.config;
  scalars.phi = call.phi.const_data_ptr<float>();
  TableBuilder<NormalizedBackwardEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t tiles = 0;
  for (const SegmentTensor& tensor : call.tensors) {
    const std::vector<Common>& common = tensor.common;
    builder.add({entry_of(tensor, tiles), common[0].age, common[0].inputs, common[0].nominal});
    if (common.size() < 2) continue;
    // The rows of a step lie behind those of the step before, the same distance for all tensors.
    if (common[0].inputs) scalars.inputs_stride = common[1].inputs - common[0].inputs;
    if (common[0].nominal) scalars.nominal_stride = common[1].nominal - common[0].nominal;
  }
  CallMemory memory(call.phi);
  check_launch(
      run_backward(scalars, builder, call.steps, call.grad_phi, memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "segment_backward", call.config);
}

void segment_backward(const SegmentCall& call) {
  refuse_without_layers(call.config, "segment_backward");
  const c10::cuda::CUDAGuard guard(call.phi.device());
  if (call.config.averages() > 0) return normalized_segment_backward(call);
  TableBuilder<BackwardEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t tiles = 0;
  for (const SegmentTensor& tensor : call.tensors) builder.add(entry_of(tensor, tiles));
  CallMemory memory(call.phi);
  check_launch(
      run_segment_backward(call.config, call.phi.const_data_ptr<float>(), builder, call.steps, call.means,
                           call.problems, call.grad_phi, memory.workspace(), c10::cuda::getCurrentCUDAStream()),
      "segment_backward", call.config);
}

void tensor_sums(const SumsCall& call) {
  const c10::cuda::CUDAGuard guard(call.tensors.front().param.device());
  TableBuilder<SumsEntry> builder;
  builder.reserve(call.tensors.size());
  int64_t slices = 0;
  for (const SumsTensor& tensor : call.tensors) {
    const int64_t numel = tensor.param.numel();
    const TileLayout layout(call.config, tensor.type);
    builder.add({slices += slices_of(numel), numel, slice_of(numel), view_of(builder, tensor.param),
                 view_of(builder, tensor.grad), static_cast<const unsigned char*>(tensor.state) + layout.averages,
                 layout.bytes, tensor.before(call.config), tensor.type != StateType::float32,
                 make_correction(call.config, tensor.age).of[2]});
  }
  const SumsScalars scalars{0, {}, call.config.rates.of[2], call.maximize ? -1. : 1., nullptr, call.out};
  CallMemory memory(call.tensors.front().param);
  check_launch(run_tensor_sums(scalars, builder, memory.workspace(), c10::cuda::getCurrentCUDAStream()), "_tensor_sums",
               call.config);
}

constexpr Backend kCuda{16, &check_cuda_config, &step, &step_backward, &segment_backward, &tensor_sums};

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CUDA, m) { register_backend(m, at::kCUDA, kCuda); }

}  // namespace l2l
