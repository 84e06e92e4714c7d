// The CPU's three functions, see ops/backend.h.
#pragma once

#include "../ops/backend.h"

namespace l2l {

void cpu_step(const StepCall& call);
void cpu_step_backward(const StepBackwardCall& call);
void cpu_segment_backward(const SegmentCall& call);

// Back-propagation layer by layer over all tiles, for networks whose coordinates communicate, or with extra inputs or
// several outputs.
void layered_step_backward(const StepBackwardCall& call);
void layered_segment_backward(const SegmentCall& call);

// Sums over the coordinates of every tensor [tensors, 5], float64, see tensor_sums in l2l_fast/kernels/normalized.py.
at::Tensor tensor_sums(at::TensorList params, at::TensorList grads, at::TensorList states, at::IntArrayRef sizes,
                       c10::string_view preprocess, at::ArrayRef<double> constants, bool maximize,
                       at::IntArrayRef ages);

}  // namespace l2l
