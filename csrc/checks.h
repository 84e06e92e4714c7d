// Argument checks that the operators of every device share. Each failure names the argument, what came and what was
// expected, and is raised before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <string_view>

#include "core/layout.h"

namespace l2l {

// ValueError unless the sizes and constants are in range.
Config make_config(int64_t hidden_size, int64_t num_layers, std::string_view preprocess, double p, double output_scale);

// TypeError / ValueError unless phi is a flat float32 vector of the configuration's size.
void check_phi(const Config& config, const at::Tensor& phi);

// TypeError unless the tensor is a dense float32, bfloat16 or float16 tensor.
void check_coordinates(const at::Tensor& tensor, const char* name, int64_t index = -1);

// ValueError / TypeError unless `state` is a contiguous float32 [tiles, rows, 64] tensor; tiles < 0 takes any number.
void check_state(const Config& config, const at::Tensor& state, int64_t tiles, const char* name, int64_t index = -1);

// ValueError unless both are on the same device.
void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& reference,
                       const char* reference_name, int64_t index = -1);

// What an operator writes: ValueError for a lazy negation, RuntimeError if autograd would have to know of it.
void check_written(const at::Tensor& tensor, const char* name, int64_t index = -1);

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

// Counts the tensors that a step is about to write as changed. Before anything is written, as autograd refuses tensors
// made under inference mode here.
void mark_written(at::TensorList params, at::TensorList states,
                  std::initializer_list<std::optional<at::Tensor>> others);

// What the in-place step is given, checked one by one.
void check_step_tensors(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                        const at::Tensor& phi, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles);

// The same, and that they do not share memory.
void check_step_arguments(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                          const at::Tensor& phi, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles);

// What the segment backward is given, checked. numels: coordinates of every tensor, so many as its tiles hold.
void check_segment_arguments(const Config& config, at::TensorList start_states, at::IntArrayRef numels,
                             at::IntArrayRef record_tiles, at::TensorList records, at::ArrayRef<double> loss_weights,
                             at::ArrayRef<double> lrs, at::ArrayRef<double> decays, const at::Tensor& phi,
                             at::TensorList grad_end_states);

}  // namespace l2l
