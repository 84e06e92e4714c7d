// Operator schemas. CPU kernels are registered in csrc/cpu, autograd formulas and fake kernels in l2l_fast/ops.py.
//
// Every operator takes the configuration as the same five arguments: hidden_size, num_layers, preprocess, p,
// output_scale.
#include <torch/library.h>

#define L2L_CONFIG "int hidden_size, int num_layers, str preprocess, float p, float output_scale"

TORCH_LIBRARY(l2l_fast, m) {
  m.set_python_module("l2l_fast.ops");
  m.def("lstm_step(Tensor grad, Tensor state, Tensor phi, " L2L_CONFIG ") -> (Tensor update, Tensor new_state)");
  m.def(
      "lstm_step_backward(Tensor grad_update, Tensor grad_new_state, Tensor grad, Tensor state, Tensor phi, " L2L_CONFIG
      ") -> (Tensor grad_grad, Tensor grad_state, Tensor grad_phi)");
  m.def("lstm_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor phi, " L2L_CONFIG
        ", float lr, float weight_decay, bool maximize, Tensor(c!)? record, int[] record_tiles) -> ()");
  m.def(
      "lstm_segment_backward(Tensor[] start_states, int[] record_tiles, Tensor[] records, float[] loss_weights, "
      "float[] lrs, float[] decays, Tensor phi, " L2L_CONFIG
      ", Tensor[] grad_end_states, bool need_grad_start) -> (Tensor grad_phi, Tensor[] grad_start_states)");
  m.def("_vector_math(str function, Tensor x) -> Tensor");
}

// Lazy negations and conjugates reach the checks of the in-place step; PyTorch's fallback would run it, then fail.
TORCH_LIBRARY_IMPL(l2l_fast, Negative, m) { m.impl("lstm_step_", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(l2l_fast, Conjugate, m) { m.impl("lstm_step_", torch::CppFunction::makeFallthrough()); }
