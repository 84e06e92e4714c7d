#include "gac_checks.h"

#include <vector>

namespace l2l {

Config make_gac_config(int64_t hidden_size, int64_t num_layers, std::string_view preprocess, double p,
                       double output_scale, int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs) {
  Config config = make_config(hidden_size, num_layers, preprocess, p, output_scale);
  TORCH_CHECK_VALUE(gac_cells >= 0 && gac_cells <= hidden_size, "gac_cells: expected 0..", hidden_size,
                    " (hidden_size), got ", gac_cells);
  TORCH_CHECK_VALUE(extra_inputs >= 0 && extra_inputs <= kMaxExtraInputs, "extra_inputs: expected 0..", kMaxExtraInputs,
                    ", got ", extra_inputs);
  TORCH_CHECK_VALUE(num_outputs >= 1 && num_outputs <= kMaxOutputs, "num_outputs: expected 1..", kMaxOutputs, ", got ",
                    num_outputs);
  config.gac = static_cast<int>(gac_cells);
  config.extra = static_cast<int>(extra_inputs);
  config.outputs = static_cast<int>(num_outputs);
  return config;
}

void check_groups(int64_t groups, int64_t numel, const char* name, int64_t index) {
  TORCH_CHECK_VALUE(groups >= 1, "groups: expected at least 1, got ", groups);
  TORCH_CHECK_VALUE(numel % groups == 0, name, index < 0 ? std::string() : "[" + std::to_string(index) + "]",
                    ": expected a multiple of groups=", groups, " coordinates, got ", numel);
}

void check_rows(const std::optional<at::Tensor>& tensor, const char* name, int64_t rows, at::IntArrayRef sizes,
                const at::Tensor& phi) {
  TORCH_CHECK_VALUE(tensor.has_value() == (rows > 0), name, ": expected ",
                    rows > 0 ? "a tensor of " + std::to_string(rows) + " rows" : std::string("None"),
                    " for this network");
  if (!tensor) return;
  std::vector<int64_t> expected{rows};
  expected.insert(expected.end(), sizes.begin(), sizes.end());
  TORCH_CHECK_TYPE(tensor->scalar_type() == at::kFloat, name, ": expected dtype float32, got ", tensor->scalar_type());
  TORCH_CHECK_VALUE(tensor->sizes() == at::IntArrayRef(expected), name, ": expected shape ", at::IntArrayRef(expected),
                    ", got ", tensor->sizes());
  TORCH_CHECK_VALUE(tensor->is_contiguous() && !tensor->is_neg(), name, ": expected a contiguous tensor, got strides ",
                    tensor->strides());
  check_coordinates(*tensor, name);
  check_same_device(*tensor, name, phi, "phi");
}

}  // namespace l2l
