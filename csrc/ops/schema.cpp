// The operators' schemas. Their bodies are in operators.cpp, the same for every device; autograd formulas and fake
// kernels in l2l_fast/kernels.
//
// Every operator takes the configuration as the same three arguments, see make_config in arguments.h.
#include <torch/library.h>

#include "arguments.h"

#define L2L_CONFIG "int[] sizes, str preprocess, float[] constants"
// Symbolic ages: a compiled step must not be compiled anew for each.
#define L2L_COMMON "SymInt[] ages=[], Tensor? tensor_inputs=None, Tensor? nominal=None"

TORCH_LIBRARY(l2l_fast, m) {
  m.set_python_module("l2l_fast.kernels.operators");
  m.def("step(Tensor grad, Tensor? extra, Tensor state, Tensor phi, " L2L_CONFIG ", int num_problems, " L2L_COMMON
        ") -> (Tensor out, Tensor new_state)");
  m.def(
      "step_backward(Tensor grad_out, Tensor grad_new_state, Tensor grad, Tensor? extra, Tensor state, Tensor "
      "phi, " L2L_CONFIG ", int num_problems, " L2L_COMMON
      ") -> (Tensor grad_grad, Tensor grad_extra, Tensor grad_state, Tensor grad_phi)");
  m.def("step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor phi, " L2L_CONFIG
        ", float lr, float weight_decay, bool maximize, Tensor(c!)? record, int[] record_tiles, Tensor? extra, "
        "Tensor(d!)? out, int num_problems, Tensor(e!)? means, Tensor(f!)? sums, int first_phase, int last_phase, "
        "bool check_only, " L2L_COMMON ", SymInt[] seeds=[], str precision='float32') -> ()");
  m.def(
      "segment_backward(Tensor[] start_states, int[] numels, int[] record_tiles, Tensor[] records, Tensor[] means, "
      "float[] loss_weights, float[] lrs, float[] decays, Tensor phi, " L2L_CONFIG
      ", int num_problems, Tensor[] grad_end_states, bool need_grad_start, " L2L_COMMON
      ") "
      "-> (Tensor grad_phi, Tensor[] grad_start_states)");
  m.def("_check_apart(Tensor[] params, Tensor[] grads, Tensor[] states) -> ()");
  m.def("_vector_math(str function, Tensor x) -> Tensor");
  m.def("_tensor_sums(Tensor[] params, Tensor[] grads, Tensor[] states, " L2L_CONFIG
        ", bool maximize, SymInt[] ages) -> Tensor");
  m.def(
      "_tensor_inputs(Tensor sums, Tensor[] alignments, int[] fan_ins, SymInt[] ages, int? total_steps, Tensor? "
      "weight_nominal, int optimizees) -> (Tensor inputs, Tensor nominal, Tensor[] alignments_after)");
  m.def("_orthogonalized(Tensor updates, int steps) -> Tensor");
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
  for (const char* name : {"step", "step_backward", "step_", "segment_backward", "_vector_math", "_tensor_sums",
                           "_tensor_inputs", "_orthogonalized"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_transforms>());
}

// Lazy negations and conjugates reach the checks of the in-place step; PyTorch's fallback would run it, then fail.
TORCH_LIBRARY_IMPL(l2l_fast, Negative, m) { m.impl("step_", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(l2l_fast, Conjugate, m) { m.impl("step_", torch::CppFunction::makeFallthrough()); }
