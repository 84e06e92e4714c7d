// Argument checks that the operators of every device share. Each failure names the argument, what came and what was
// expected, and is raised before anything is written.
#pragma once

#include <ATen/core/Tensor.h>

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

// What the in-place step is given, checked.
void check_step_arguments(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                          const at::Tensor& phi, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles);

// What the segment backward is given, checked.
void check_segment_arguments(const Config& config, at::TensorList start_states, at::IntArrayRef record_tiles,
                             at::TensorList records, at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs,
                             at::ArrayRef<double> decays, const at::Tensor& phi, at::TensorList grad_end_states);

}  // namespace l2l
