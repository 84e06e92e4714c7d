// Argument checks that the operators of every device share. Each failure names the argument, what came and what was
// expected, and is raised before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string_view>

#include "backend.h"

namespace l2l {

// How every operator takes its configuration.
struct ConfigArguments {
  at::IntArrayRef sizes;  // hidden_size, num_layers, gac_cells, extra_inputs, num_outputs, perhaps tensor_inputs
  std::string_view preprocess;
  at::ArrayRef<double> constants;  // p, output_scale, and betas where there are averages
};

// ValueError unless the sizes and constants are in range.
Config make_config(const ConfigArguments& arguments);

// TypeError / ValueError unless phi is a flat float32 vector of the configuration's size; the checks below take it as
// checked.
void check_phi(const Config& config, const at::Tensor& phi);

// TypeError unless the tensor is a dense float32, bfloat16 or float16 tensor.
void check_coordinates(const at::Tensor& tensor, const char* name, int64_t index = -1);

// What all coordinates of a tensor have in common, see Common: rows [tensors, ...] of a step, [steps, tensors, ...] of
// a segment.
struct CommonArguments {
  at::IntArrayRef ages;  // of every tensor; of a segment in its first step
  const std::optional<at::Tensor>&inputs, &nominal;

  // Of tensor k in step t, for a checked call of a network with averages.
  Common of(size_t k, size_t t = 0) const;
};

// ValueError / TypeError unless there is what the network takes: nothing, if it has no averages. steps: of a segment.
void check_common(const Config& config, const CommonArguments& arguments, size_t tensors, int64_t problems,
                  const at::Tensor& phi, std::optional<size_t> steps = std::nullopt);

// What the functional step is given, checked one by one.
void check_step_inputs(const Config& config, const at::Tensor& grad, const std::optional<at::Tensor>& extra,
                       const at::Tensor& state, const at::Tensor& phi, int64_t problems, int64_t alignment);

// The gradients that its backward is given beside them.
void check_upstream(const Config& config, const at::Tensor& grad, const at::Tensor& phi, const at::Tensor& grad_out,
                    const at::Tensor& grad_new_state, int64_t alignment);

// What the in-place step is given.
struct StepArguments {
  at::TensorList params, grads, states;
  const at::Tensor& phi;
  const std::optional<at::Tensor>& record;
  at::IntArrayRef record_tiles;
  const std::optional<at::Tensor>&extra, &out, &means, &sums;
  int64_t problems, first_phase, last_phase;
  const CommonArguments& common;
  at::IntArrayRef seeds;
  std::string_view precision_name;

  // Of all states; of float32 if there are none.
  StateType state_type() const;
  // Of a checked call.
  Precision precision() const;
};

// TypeError if no type has this dtype.
StateType state_type_of(const at::Tensor& state, const char* name, int64_t index);

// TypeError / ValueError unless it all fits together, of a network with averages.
void check_tensor_sums(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                       at::IntArrayRef ages, int64_t alignment);

// What the default inputs of tensors are made of, see l2l_fast/kernels/tensor_inputs.py.
struct TensorInputsArguments {
  const at::Tensor& sums;
  at::TensorList alignments;
  at::IntArrayRef fan_ins, ages;
  std::optional<int64_t> total_steps;
  const std::optional<at::Tensor>& weight_nominal;  // of every optimizee, or of all
  int64_t optimizees;
};

// Columns of such sums, inputs, and rows of weight_nominal.
constexpr int kSumColumns = 6, kDefaultInputs = 15, kNominalRows = 4;

// TypeError / ValueError unless it all fits together.
void check_tensor_inputs(const TensorInputsArguments& arguments);

// More is no closer: the singular values keep moving around 1.
constexpr int64_t kMaxOrthogonalSteps = 100;

// TypeError / ValueError unless updates are a contiguous float32 stack of matrices [K, rows, cols].
void check_orthogonalized(const at::Tensor& updates, int64_t steps);

// TypeError / ValueError unless it all fits together and what is written shares no memory.
void check_step(const Config& config, const StepArguments& arguments, int64_t alignment);

// Counts the tensors that a step is about to write as changed. Before anything is written, as autograd refuses tensors
// made under inference mode here.
void mark_written(const StepArguments& arguments);

// What the segment backward is given. numels: coordinates of every tensor, so many as its tiles hold.
struct SegmentArguments {
  at::TensorList start_states;
  at::IntArrayRef numels, record_tiles;
  at::TensorList records, means;
  at::ArrayRef<double> loss_weights, lrs, decays;
  const at::Tensor& phi;
  int64_t problems;
  at::TensorList grad_end_states;
  const CommonArguments& common;
};
void check_segment(const Config& config, const SegmentArguments& arguments, int64_t alignment);

// ---- aliasing.cpp

// A tensor beside those of the plain step, for check_aliasing.
struct NamedTensor {
  const char* name;
  const at::Tensor* tensor;  // or null
  bool written;
};

// ValueError if a tensor that the step writes may share memory with itself, with another one or with one that is read:
// the result would depend on the order in which threads come to them. Accepted is what is provably apart, and a
// gradient that is its parameter, element for element. phi may be undefined.
void check_aliasing(at::TensorList params, at::TensorList grads, at::TensorList states, const at::Tensor& phi,
                    const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles,
                    at::ArrayRef<NamedTensor> others);

// The same of tensors of any dtype that several steps write one after the other, and that they may be written: a later
// step must not find its gradient overwritten, nor fail when an earlier one is done.
void check_apart(at::TensorList params, at::TensorList grads, at::TensorList states);

}  // namespace l2l
