#include "checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <limits>

namespace l2l {
namespace {

std::string label(const char* name, int64_t index) {
  return index < 0 ? std::string(name) : std::string(name) + "[" + std::to_string(index) + "]";
}

// Denormal gradients count as zero, so e^p times the largest of them must be below float32's resolution.
constexpr double kMaxP = 70.0;

// ValueError unless the tensor's elements lie within its storage, which its owner may have freed or shrunk;
// NotImplementedError if it carries a tangent, which would be lost.
void check_memory(const at::Tensor& tensor, const char* name, int64_t index = -1) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(), label(name, index),
                              ": the operator has no forward-mode derivative, got a dual tensor; ",
                              "CoordinatewiseLSTM and l2l_fast.reference have one");
  const size_t needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
  TORCH_CHECK_VALUE(needed <= tensor.storage().nbytes(), label(name, index), ": expected a storage of at least ",
                    needed, " bytes, got ", tensor.storage().nbytes(), " (freed?)");
}

}  // namespace

Config make_config(int64_t hidden_size, int64_t num_layers, std::string_view preprocess, double p,
                   double output_scale) {
  TORCH_CHECK_VALUE(hidden_size >= kMinHidden && hidden_size <= kMaxHidden, "hidden_size: expected ", kMinHidden, "..",
                    kMaxHidden, ", got ", hidden_size);
  TORCH_CHECK_VALUE(num_layers >= 1 && num_layers <= kMaxLayers, "num_layers: expected 1..", kMaxLayers, ", got ",
                    num_layers);
  TORCH_CHECK_VALUE(preprocess == "identity" || preprocess == "log_sign",
                    "preprocess: expected 'identity' or 'log_sign', got '", preprocess, "'");
  // As float32, which is what the kernels compute with.
  TORCH_CHECK_VALUE(p >= std::numeric_limits<float>::min() && p <= kMaxP, "p: expected a number in (0, ", kMaxP,
                    "], got ", p);
  TORCH_CHECK_VALUE(std::abs(output_scale) <= std::numeric_limits<float>::max(),
                    "output_scale: expected a finite number, got ", output_scale);
  Config config;
  config.hidden = static_cast<int>(hidden_size);
  config.layers = static_cast<int>(num_layers);
  config.preprocess = preprocess == "identity" ? Preprocess::identity : Preprocess::log_sign;
  config.p = static_cast<float>(p);
  config.output_scale = static_cast<float>(output_scale);
  return config;
}

void check_phi(const Config& config, const at::Tensor& phi) {
  TORCH_CHECK_TYPE(phi.scalar_type() == at::kFloat, "phi: expected dtype float32, got ", phi.scalar_type());
  TORCH_CHECK_VALUE(phi.dim() == 1 && phi.size(0) == config.phi_size(), "phi: expected shape [", config.phi_size(),
                    "] for hidden_size=", config.hidden, ", num_layers=", config.layers, ", got ", phi.sizes());
  check_memory(phi, "phi");
}

void check_coordinates(const at::Tensor& tensor, const char* name, int64_t index) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, label(name, index),
                   ": expected a dense (strided) tensor, got layout ", tensor.layout());
  const auto dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf, label(name, index),
                   ": expected dtype float32, bfloat16 or float16, got ", dtype);
  check_memory(tensor, name, index);
}

void check_state(const Config& config, const at::Tensor& state, int64_t tiles, const char* name, int64_t index) {
  TORCH_CHECK_TYPE(state.scalar_type() == at::kFloat, label(name, index), ": expected dtype float32, got ",
                   state.scalar_type());
  const bool shape = state.dim() == 3 && state.size(1) == config.rows() && state.size(2) == kTile &&
                     (tiles < 0 || state.size(0) == tiles);
  TORCH_CHECK_VALUE(shape, label(name, index), ": expected shape [", tiles < 0 ? "tiles" : std::to_string(tiles), ", ",
                    config.rows(), ", ", kTile, "], got ", state.sizes());
  TORCH_CHECK_VALUE(state.is_contiguous(), label(name, index), ": expected a contiguous tensor, got strides ",
                    state.strides());
  check_memory(state, name, index);
}

void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& reference,
                       const char* reference_name, int64_t index) {
  TORCH_CHECK_VALUE(tensor.device() == reference.device(), label(name, index), ": expected device ", reference.device(),
                    " as ", reference_name, ", got ", tensor.device());
}

void check_written(const at::Tensor& tensor, const char* name, int64_t index) {
  TORCH_CHECK_VALUE(!tensor.is_neg(), label(name, index), ": expected a tensor that is not a lazy negation");
  TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), label(name, index),
              ": is written in place and requires grad: call the operator under torch.no_grad()");
  TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed: ", label(name, index));
  check_memory(tensor, name, index);
}

void check_step_tensors(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                        const at::Tensor& phi, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles) {
  check_phi(config, phi);
  TORCH_CHECK_VALUE(grads.size() == params.size(), "grads: expected ", params.size(), " tensors as params, got ",
                    grads.size());
  TORCH_CHECK_VALUE(states.size() == params.size(), "states: expected ", params.size(), " tensors as params, got ",
                    states.size());
  const size_t records = record ? params.size() : 0;
  TORCH_CHECK_VALUE(record_tiles.size() == records, "record_tiles: expected ", records, " offsets, got ",
                    record_tiles.size());
  if (record) {
    TORCH_CHECK_TYPE(record->scalar_type() == at::kFloat, "record: expected dtype float32, got ",
                     record->scalar_type());
    TORCH_CHECK_VALUE(record->dim() == 1 && record->is_contiguous(), "record: expected a contiguous vector, got shape ",
                      record->sizes(), " and strides ", record->strides());
    check_same_device(*record, "record", phi, "phi");
    check_written(*record, "record");
  }
  for (size_t k = 0; k < params.size(); k++) {
    check_coordinates(params[k], "params", k);
    check_coordinates(grads[k], "grads", k);
    TORCH_CHECK_VALUE(grads[k].sizes() == params[k].sizes(), label("grads", k), ": expected shape ", params[k].sizes(),
                      " as params, got ", grads[k].sizes());
    check_same_device(params[k], "params", phi, "phi", k);
    check_same_device(grads[k], "grads", phi, "phi", k);
    check_same_device(states[k], "states", phi, "phi", k);
    check_written(params[k], "params", k);
    check_written(states[k], "states", k);
    const int64_t tiles = tiles_for(params[k].numel());
    check_state(config, states[k], tiles, "states", k);
    if (record) {
      TORCH_CHECK_VALUE(record_tiles[k] >= 0 && record_tiles[k] <= record->numel() / kTile - tiles,
                        label("record_tiles", k), ": expected ", tiles, " tiles from it to lie in record of ",
                        record->numel(), " elements, got offset ", record_tiles[k]);
    }
  }
}

void mark_written(at::TensorList params, at::TensorList states,
                  std::initializer_list<std::optional<at::Tensor>> others) {
  for (const at::Tensor& param : params) param.unsafeGetTensorImpl()->bump_version();
  for (const at::Tensor& state : states) state.unsafeGetTensorImpl()->bump_version();
  for (const std::optional<at::Tensor>& tensor : others)
    if (tensor) tensor->unsafeGetTensorImpl()->bump_version();
}

void check_apart(at::TensorList params, at::TensorList grads, at::TensorList states) {
  for (size_t k = 0; k < params.size(); k++) {
    check_written(params[k], "params", k);
    check_written(states[k], "states", k);
  }
  check_aliasing(params, grads, states, {}, std::nullopt, {}, {});
}

void check_step_arguments(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                          const at::Tensor& phi, const std::optional<at::Tensor>& record,
                          at::IntArrayRef record_tiles) {
  check_step_tensors(config, params, grads, states, phi, record, record_tiles);
  check_aliasing(params, grads, states, phi, record, record_tiles, {});
}

void check_segment_arguments(const Config& config, at::TensorList start_states, at::IntArrayRef numels,
                             at::IntArrayRef record_tiles, at::TensorList records, at::ArrayRef<double> loss_weights,
                             at::ArrayRef<double> lrs, at::ArrayRef<double> decays, const at::Tensor& phi,
                             at::TensorList grad_end_states) {
  check_phi(config, phi);
  TORCH_CHECK_VALUE(records.size() >= 2, "records: expected the gradients of at least two points (one step), got ",
                    records.size());
  const size_t steps = records.size() - 1;
  TORCH_CHECK_VALUE(loss_weights.size() == steps, "loss_weights: expected ", steps, " numbers (one a step), got ",
                    loss_weights.size());
  TORCH_CHECK_VALUE(lrs.size() == steps, "lrs: expected ", steps, " numbers (one a step), got ", lrs.size());
  TORCH_CHECK_VALUE(decays.size() == steps, "decays: expected ", steps, " numbers (one a step), got ", decays.size());
  for (size_t t = 0; t < records.size(); t++) {
    TORCH_CHECK_TYPE(records[t].scalar_type() == at::kFloat, label("records", t), ": expected dtype float32, got ",
                     records[t].scalar_type());
    TORCH_CHECK_VALUE(records[t].dim() == 1 && records[t].is_contiguous() && records[t].numel() % kTile == 0,
                      label("records", t), ": expected a contiguous vector of a multiple of ", kTile,
                      " elements, got shape ", records[t].sizes());
    TORCH_CHECK_VALUE(records[t].numel() == records[0].numel(), label("records", t), ": expected ", records[0].numel(),
                      " elements as records[0], got ", records[t].numel());
    check_same_device(records[t], "records", phi, "phi", t);
    check_memory(records[t], "records", t);
  }
  TORCH_CHECK_VALUE(numels.size() == start_states.size(), "numels: expected ", start_states.size(),
                    " numbers as start_states, got ", numels.size());
  TORCH_CHECK_VALUE(record_tiles.size() == start_states.size(), "record_tiles: expected ", start_states.size(),
                    " offsets as start_states, got ", record_tiles.size());
  TORCH_CHECK_VALUE(grad_end_states.empty() || grad_end_states.size() == start_states.size(),
                    "grad_end_states: expected none or ", start_states.size(), " tensors as start_states, got ",
                    grad_end_states.size());
  const int64_t all_tiles = records[0].numel() / kTile;
  for (size_t k = 0; k < start_states.size(); k++) {
    check_state(config, start_states[k], -1, "start_states", k);
    check_same_device(start_states[k], "start_states", phi, "phi", k);
    const int64_t tiles = start_states[k].size(0);
    TORCH_CHECK_VALUE(numels[k] >= 0 && numels[k] <= tiles * kTile && tiles_for(numels[k]) == tiles, label("numels", k),
                      ": expected the coordinates of ", tiles, " tiles as start_states, got ", numels[k]);
    TORCH_CHECK_VALUE(record_tiles[k] >= 0 && record_tiles[k] <= all_tiles - tiles, label("record_tiles", k),
                      ": expected ", tiles, " tiles from it to lie in records of ", all_tiles, " tiles, got offset ",
                      record_tiles[k]);
    if (!grad_end_states.empty()) {
      check_state(config, grad_end_states[k], tiles, "grad_end_states", k);
      check_same_device(grad_end_states[k], "grad_end_states", phi, "phi", k);
    }
  }
}

}  // namespace l2l
