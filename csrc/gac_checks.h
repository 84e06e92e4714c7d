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

// What a step may be cut into, and where it leaves the averages.
void check_phases(const Config& config, const at::Tensor& phi, const at::Tensor& means, const at::Tensor& sums,
                  int64_t groups, double count, int64_t first, int64_t last);

// Where the in-place step writes its outputs: none is needed where there is one only.
void check_outputs(const Config& config, const std::optional<at::Tensor>& out, int64_t coordinates,
                   const at::Tensor& phi);

// What the segment backward is given beyond check_segment_arguments.
void check_gac_segment(const Config& config, at::TensorList start_states, at::IntArrayRef numels,
                       at::TensorList records, at::TensorList means, int64_t groups, const at::Tensor& phi);

}  // namespace l2l
