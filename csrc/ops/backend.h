// What a device has to provide: four functions on plain structs. The operators parse and check their arguments once,
// for every device (arguments.h), allocate what they return, and fill these. A new device is one file that defines a
// Backend and registers it.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <vector>

#include "../core/adjoint.h"
#include "../core/state_io.h"

namespace l2l {

// What all coordinates of a tensor have in common in one step, on phi's device; empty for networks without averages.
struct Common {
  int64_t age = 0;                 // steps of the averages, this one included: >= 1
  const float* inputs = nullptr;   // [tensor_inputs], or null
  const float* nominal = nullptr;  // [kNominal], or null for the default
};

// What the products of a layer's weights are computed with: bfloat16 operands (cpu/isa/bfloat16.h) or float32.
enum class Precision : int { float32, bfloat16 };

// One tensor of a step; it has coordinates. States and records are tiles.
struct StepTensor {
  at::Tensor param;  // updated in place; undefined in the functional step
  at::Tensor grad;   // any strides, not a lazy negation
  const float* state;
  float* new_state;  // perhaps the same
  float* record;     // receives g, or null
  int64_t first;     // its first coordinate in the rows of extra inputs and outputs
  Common common;
  void* stored = nullptr;  // the state, read and written, if it is not float32; state and new_state are null then
  uint64_t seed = 0;       // of the rounding of such a state in this step
};

// With g = -grad if maximize else grad and u, new_state = phi(g, extra, state): param = param * decay + lr * u[0].
// Where coordinates communicate (config.gac > 0), phase l < layers is layer l up to the sums of its averaged cells, and
// the last phase is the read-out and the update.
struct StepCall {
  Config config;
  at::Tensor phi;  // contiguous
  std::vector<StepTensor> tensors;
  StateType state_type = StateType::float32;  // of all tensors; another one only of whole plain steps in place
  Precision precision = Precision::float32;   // another one only of whole plain steps in place, on the CPU
  int64_t total = 0;                          // coordinates of all tensors: the length of a row of `extra` and `out`
  const float* extra = nullptr;               // [extra][total], or null
  float* out = nullptr;                       // [outputs][total], or null
  float lr = 1.f, decay = 0.f;
  bool maximize = false;
  int64_t problems = 1;    // a tensor's coordinates belong to so many of equal size, one after the other
  float* means = nullptr;  // [layers][problems][gac], of the finite new h; null if gac is 0
  double* sums = nullptr;  // [2][problems][gac]: sums and counts of the layer that was run last; null if gac is 0
  int first_phase = 0, last_phase = 0;

  bool in_place() const { return tensors.front().param.defined(); }
  bool is_whole() const { return first_phase == 0 && last_phase == config.layers + 1; }
};

// The vector-Jacobian product of the functional step of one tensor with coordinates.
struct StepBackwardCall {
  Config config;
  at::Tensor phi;   // contiguous
  at::Tensor grad;  // any strides, not a lazy negation
  int64_t numel, problems;
  const float *extra, *state;              // as in StepCall
  const float *grad_out, *grad_new_state;  // [outputs][numel]; tiles
  at::Tensor grad_grad;                    // contiguous, of grad's dtype
  float *grad_extra, *grad_state, *grad_phi;
  Common common;
};

struct SegmentTensor {
  int64_t numel;               // > 0
  int64_t record_tile;         // where its tiles start in a record
  const float* state;          // before the first step
  const float* grad_end;       // d loss / d state after the last step, or null for zero
  float* grad_start;           // receives d loss / d state before the first step, or null
  std::vector<Common> common;  // of the T steps; empty for networks without averages
};

// d loss / d phi of a recorded segment, see adjoint.h.
struct SegmentCall {
  Config config;
  at::Tensor phi;  // contiguous
  std::vector<SegmentTensor> tensors;
  std::vector<SegmentStep> steps;   // T + 1
  std::vector<const float*> means;  // of the T steps, [layers][problems][gac] each; empty if gac is 0
  int64_t problems;
  float* grad_phi;

  int length() const { return static_cast<int>(steps.size()) - 1; }
};

// Of one tensor before a step, perhaps without coordinates.
struct SumsTensor {
  at::Tensor param, grad;  // any strides, no lazy negations
  const void* state;       // its tiles, of `type`
  StateType type;
  int64_t age;  // >= 1, of the step

  // Of its averages as they are. After no steps all are zero, and so is all that is made of them.
  Correction before(const Config& config) const { return age > 1 ? make_correction(config, age - 1) : Correction{}; }
};

// Sums over the coordinates of every tensor and their number [tensors][kTensorSums + 1], see tensor_sums in
// l2l_fast/kernels/normalized.py.
struct SumsCall {
  Config config;  // with averages
  std::vector<SumsTensor> tensors;
  bool maximize;
  double* out;
};

struct Backend {
  int64_t alignment;                    // bytes that states have to be aligned to
  void (*check_config)(const Config&);  // ValueError if it is not compiled for this device
  void (*step)(const StepCall&);        // at least one tensor
  void (*step_backward)(const StepBackwardCall&);
  void (*segment_backward)(const SegmentCall&);  // at least one tensor
  void (*tensor_sums)(const SumsCall&);          // at least one tensor
};

// The operators on this backend: what a TORCH_LIBRARY_IMPL(l2l_fast, <device>, m) consists of.
void register_backend(torch::Library& m, at::DeviceType device, const Backend& backend);

}  // namespace l2l
