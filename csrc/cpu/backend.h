// The CPU's four functions, see ops/backend.h.
#pragma once

#include "../ops/backend.h"

namespace l2l {

void cpu_step(const StepCall& call);
void cpu_step_backward(const StepBackwardCall& call);
void cpu_segment_backward(const SegmentCall& call);
void cpu_tensor_sums(const SumsCall& call);

// Back-propagation layer by layer over all tiles, for networks whose coordinates communicate, or with extra inputs or
// several outputs.
void layered_step_backward(const StepBackwardCall& call);
void layered_segment_backward(const SegmentCall& call);

// Inputs, nominal and alignments of tensors, see l2l_fast/kernels/tensor_inputs.py.
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> tensor_inputs(
    const at::Tensor& sums, at::TensorList alignments, at::IntArrayRef fan_ins, at::IntArrayRef ages,
    std::optional<int64_t> total_steps, const std::optional<at::Tensor>& weight_nominal, int64_t optimizees);

// Newton-Schulz iterations on each matrix of a stack, see l2l_fast/kernels/orthogonal.py.
at::Tensor orthogonalized(const at::Tensor& updates, int64_t steps);

}  // namespace l2l
