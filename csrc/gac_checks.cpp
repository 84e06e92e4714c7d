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
  check_coordinates(*tensor, name);
  TORCH_CHECK_VALUE(tensor->is_contiguous(), name, ": expected a contiguous tensor, got strides ", tensor->strides());
  TORCH_CHECK_VALUE(!tensor->is_neg(), name, ": expected a tensor that is not a lazy negation");
  check_same_device(*tensor, name, phi, "phi");
}

namespace {

void check_phases(const Config& config, const at::Tensor& phi, const at::Tensor& means, const at::Tensor& sums,
                  int64_t groups, int64_t first, int64_t last) {
  const std::vector<int64_t> means_shape{config.layers, groups, config.gac}, sums_shape{2, groups, config.gac};
  TORCH_CHECK_TYPE(means.scalar_type() == at::kFloat, "means: expected dtype float32, got ", means.scalar_type());
  TORCH_CHECK_TYPE(sums.scalar_type() == at::kDouble, "sums: expected dtype float64, got ", sums.scalar_type());
  TORCH_CHECK_VALUE(means.sizes() == at::IntArrayRef(means_shape) && means.is_contiguous(),
                    "means: expected a contiguous tensor of shape ", at::IntArrayRef(means_shape), ", got shape ",
                    means.sizes());
  TORCH_CHECK_VALUE(sums.sizes() == at::IntArrayRef(sums_shape) && sums.is_contiguous(),
                    "sums: expected a contiguous tensor of shape ", at::IntArrayRef(sums_shape), ", got shape ",
                    sums.sizes());
  check_same_device(means, "means", phi, "phi");
  check_same_device(sums, "sums", phi, "phi");
  check_written(means, "means");
  check_written(sums, "sums");
  TORCH_CHECK_VALUE(first >= 0 && first <= last && last <= config.layers + 1,
                    "first_phase, last_phase: expected 0 <= first <= last <= ", config.layers + 1, ", got ", first,
                    ", ", last);
}

void check_outputs(const Config& config, const std::optional<at::Tensor>& out, int64_t coordinates,
                   const at::Tensor& phi) {
  TORCH_CHECK_VALUE(out || config.outputs == 1, "out: expected a tensor of ", config.outputs, " rows, got None");
  if (!out) return;
  check_rows(out, "out", config.outputs, {coordinates}, phi);
  check_written(*out, "out");
}

}  // namespace

int64_t check_gac_step_arguments(const Config& config, const GacStepTensors& t, const at::Tensor& phi,
                                 at::IntArrayRef record_tiles, int64_t groups, int64_t first_phase,
                                 int64_t last_phase) {
  check_step_tensors(config, t.params, t.grads, t.states, phi, t.record, record_tiles);
  check_groups(groups, 0, "params");
  check_phases(config, phi, t.means, t.sums, groups, first_phase, last_phase);
  int64_t total = 0;
  for (size_t k = 0; k < t.params.size(); k++) {
    check_groups(groups, t.params[k].numel(), "params", static_cast<int64_t>(k));
    total += t.params[k].numel();
  }
  check_rows(t.extra, "extra", config.extra, {total}, phi);
  check_outputs(config, t.out, total, phi);
  check_aliasing(t.params, t.grads, t.states, phi, t.record, record_tiles,
                 {{"out", t.out ? &*t.out : nullptr, true},
                  {"means", &t.means, true},
                  {"sums", &t.sums, true},
                  {"extra", t.extra ? &*t.extra : nullptr, false}});
  return total;
}

void check_gac_segment(const Config& config, at::IntArrayRef numels, at::TensorList records, at::TensorList means,
                       int64_t groups, const at::Tensor& phi) {
  TORCH_CHECK_VALUE(
      config.extra == 0 && config.outputs == 1,
      "extra_inputs, num_outputs: expected 0 and 1 for a segment (others go through the functional step), "
      "got ",
      config.extra, " and ", config.outputs);
  check_groups(groups, 0, "numels");
  for (size_t k = 0; k < numels.size(); k++) check_groups(groups, numels[k], "numels", static_cast<int64_t>(k));
  TORCH_CHECK_VALUE(means.size() + 1 == records.size(), "means: expected ", records.size() - 1,
                    " tensors (one a step), got ", means.size());
  const std::vector<int64_t> shape{config.layers, groups, config.gac};
  for (const at::Tensor& mean : means) {
    TORCH_CHECK_TYPE(mean.scalar_type() == at::kFloat, "means: expected dtype float32, got ", mean.scalar_type());
    TORCH_CHECK_VALUE(mean.sizes() == at::IntArrayRef(shape) && mean.is_contiguous(),
                      "means: expected contiguous tensors of shape ", at::IntArrayRef(shape), ", got shape ",
                      mean.sizes());
    check_coordinates(mean, "means");
    check_same_device(mean, "means", phi, "phi");
  }
}

}  // namespace l2l
