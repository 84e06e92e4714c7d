// Operator schemas. CPU kernels are registered in csrc/cpu, autograd formulas and fake kernels in l2l_fast/ops.py.
//
// Every operator takes the configuration as the same five arguments: hidden_size, num_layers, preprocess, p,
// output_scale.
#include <torch/library.h>

#include "checks.h"

#define L2L_CONFIG "int hidden_size, int num_layers, str preprocess, float p, float output_scale"
// Global averaging cells, inputs beside the gradient, outputs beside the update.
#define L2L_GAC_CONFIG L2L_CONFIG ", int gac_cells, int extra_inputs, int num_outputs"

TORCH_LIBRARY(l2l_fast, m) {
  m.set_python_module("l2l_fast.ops");
  m.def("lstm_step(Tensor grad, Tensor state, Tensor phi, " L2L_CONFIG ") -> (Tensor update, Tensor new_state)");
  m.def(
      "lstm_step_backward(Tensor grad_update, Tensor grad_new_state, Tensor grad, Tensor state, Tensor phi, " L2L_CONFIG
      ") -> (Tensor grad_grad, Tensor grad_state, Tensor grad_phi)");
  m.def("lstm_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor phi, " L2L_CONFIG
        ", float lr, float weight_decay, bool maximize, Tensor(c!)? record, int[] record_tiles, "
        "bool check_only=False) -> ()");
  m.def(
      "lstm_segment_backward(Tensor[] start_states, int[] numels, int[] record_tiles, Tensor[] records, "
      "float[] loss_weights, float[] lrs, float[] decays, Tensor phi, " L2L_CONFIG
      ", Tensor[] grad_end_states, bool need_grad_start) -> (Tensor grad_phi, Tensor[] grad_start_states)");
  m.def("gac_step(Tensor grad, Tensor? extra, Tensor state, Tensor phi, " L2L_GAC_CONFIG
        ", int groups) -> (Tensor out, Tensor new_state)");
  m.def(
      "gac_step_backward(Tensor grad_out, Tensor grad_new_state, Tensor grad, Tensor? extra, Tensor state, "
      "Tensor phi, " L2L_GAC_CONFIG
      ", int groups) -> (Tensor grad_grad, Tensor grad_extra, Tensor grad_state, Tensor grad_phi)");
  m.def(
      "gac_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor? extra, Tensor(c!)? out, "
      "Tensor phi, " L2L_GAC_CONFIG
      ", float lr, float weight_decay, bool maximize, Tensor(d!)? record, int[] record_tiles, int groups, "
      "Tensor(e!) means, Tensor(f!) sums, int first_phase, int last_phase, bool check_only=False) -> ()");
  m.def(
      "gac_segment_backward(Tensor[] start_states, int[] numels, int[] record_tiles, Tensor[] records, "
      "Tensor[] means, float[] loss_weights, float[] lrs, float[] decays, Tensor phi, " L2L_GAC_CONFIG
      ", int groups, Tensor[] grad_end_states, bool need_grad_start) -> (Tensor grad_phi, Tensor[] grad_start_states)");
  m.def("_check_apart(Tensor[] params, Tensor[] grads, Tensor[] states) -> ()");
  m.def("_vector_math(str function, Tensor x) -> Tensor");
}

namespace {

// The transforms of torch.func wrap tensors and look for derivatives inside of operators; these have none there.
// Without this they would come out as zeros.
void refuse_transforms(const c10::OperatorHandle& op, torch::jit::Stack*) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, op.schema().name(),
                              ": the operator cannot be transformed by torch.func (vmap, jvp, ",
                              "grad, ...); CoordinatewiseLSTM and l2l_fast.reference can");
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CompositeExplicitAutograd, m) { m.impl("_check_apart", &l2l::check_apart); }

TORCH_LIBRARY_IMPL(l2l_fast, FuncTorchDynamicLayerFrontMode, m) {
  for (const char* name : {"lstm_step", "lstm_step_backward", "lstm_step_", "lstm_segment_backward", "gac_step",
                           "gac_step_backward", "gac_step_", "gac_segment_backward", "_vector_math"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_transforms>());
}

// Lazy negations and conjugates reach the checks of the in-place step; PyTorch's fallback would run it, then fail.
TORCH_LIBRARY_IMPL(l2l_fast, Negative, m) {
  m.impl("lstm_step_", torch::CppFunction::makeFallthrough());
  m.impl("gac_step_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(l2l_fast, Conjugate, m) {
  m.impl("lstm_step_", torch::CppFunction::makeFallthrough());
  m.impl("gac_step_", torch::CppFunction::makeFallthrough());
}
