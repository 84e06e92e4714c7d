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

// The mean squares [tensors], float64, of float32, bfloat16 and float16 tensors.
at::Tensor mean_squares(at::TensorList tensors);

}  // namespace l2l
