// Argument checks of the operators with global averaging cells, extra inputs and several outputs.
#pragma once

#include "checks.h"

namespace l2l {

// ValueError unless the sizes and constants are in range.
Config make_gac_config(int64_t hidden_size, int64_t num_layers, std::string_view preprocess, double p,
                       double output_scale, int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs);

// ValueError unless every group gets as many of the coordinates.
void check_groups(int64_t groups, int64_t numel, const char* name, int64_t index = -1);

// Extra inputs: none if the network has none, else contiguous float32 with `inputs` rows of `sizes`.
void check_rows(const std::optional<at::Tensor>& tensor, const char* name, int64_t rows, at::IntArrayRef sizes,
                const at::Tensor& phi);

// The tensors of the in-place step.
struct GacStepTensors {
  at::TensorList params, grads, states;
  const std::optional<at::Tensor>&extra, &out, &record;
  const at::Tensor &means, &sums;
};

// What the in-place step is given, checked; returns the coordinates of all parameters.
int64_t check_gac_step_arguments(const Config& config, const GacStepTensors& tensors, const at::Tensor& phi,
                                 at::IntArrayRef record_tiles, int64_t groups, int64_t first_phase, int64_t last_phase);

// What the segment backward is given beyond check_segment_arguments.
void check_gac_segment(const Config& config, at::IntArrayRef numels, at::TensorList records, at::TensorList means,
                       int64_t groups, const at::Tensor& phi);

}  // namespace l2l
