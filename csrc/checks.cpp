#include "checks.h"

#include <ATen/EmptyTensor.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace l2l {
namespace {

std::string label(const char* name, int64_t index) {
  return index < 0 ? std::string(name) : std::string(name) + "[" + std::to_string(index) + "]";
}

// Denormal gradients count as zero, so e^p times the largest of them must be below float32's resolution.
constexpr double kMaxP = 70.0;

// ValueError unless the tensor's elements lie within its storage, which its owner may have freed or shrunk.
void check_memory(const at::Tensor& tensor, const char* name, int64_t index = -1) {
  const size_t needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.itemsize(), tensor.storage_offset());
  TORCH_CHECK_VALUE(needed <= tensor.storage().nbytes(), label(name, index), ": expected a storage of at least ",
                    needed, " bytes, got ", tensor.storage().nbytes(), " (freed?)");
}

// Memory of one tensor; only the first element if the tensor has gaps, which another one may fill.
struct Span {
  Span(const at::Tensor& tensor, const void* data, const char* name, int64_t index)
      : Span(data, tensor.is_non_overlapping_and_dense() ? tensor.nbytes() : tensor.itemsize(), name, index) {}
  Span(const void* data, size_t bytes, const char* name, int64_t index)
      : begin(static_cast<const char*>(data)), end(begin + bytes), name(name), index(index) {}

  const char* begin;
  const char* end;
  const char* name;
  int64_t index;
};

// ValueError if tensors that the step writes share memory with each other or with a gradient of another parameter:
// the result would depend on the order in which threads come to them.
void check_aliasing(at::TensorList params, at::TensorList grads, at::TensorList states,
                    const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles) {
  std::vector<Span> written;
  written.reserve(3 * params.size());
  for (size_t k = 0; k < params.size(); k++) {
    if (params[k].numel() == 0) continue;
    // mutable_data_ptr gives a lazy clone its own memory.
    written.emplace_back(params[k], params[k].mutable_data_ptr(), "params", k);
    written.emplace_back(states[k], states[k].mutable_data_ptr(), "states", k);
    if (record) {
      const size_t tile = kTile * sizeof(float);
      written.emplace_back(static_cast<char*>(record->mutable_data_ptr()) + record_tiles[k] * tile,
                           tiles_for(params[k].numel()) * tile, "record_tiles", k);
    }
  }
  std::sort(written.begin(), written.end(), [](const Span& a, const Span& b) { return a.begin < b.begin; });
  for (size_t i = 1; i < written.size(); i++)
    TORCH_CHECK_VALUE(written[i - 1].end <= written[i].begin, label(written[i].name, written[i].index),
                      ": expected memory of its own, got memory shared with ",
                      label(written[i - 1].name, written[i - 1].index));
  for (size_t k = 0; k < params.size(); k++) {
    if (grads[k].numel() == 0) continue;
    const Span grad(grads[k], grads[k].const_data_ptr(), "grads", k);
    const auto at = std::upper_bound(written.begin(), written.end(), grad.begin,
                                     [](const char* begin, const Span& span) { return begin < span.end; });
    TORCH_CHECK_VALUE(at == written.end() || grad.end <= at->begin ||
                          at::get_overlap_status(grads[k], params[k]) == at::MemOverlapStatus::Full,
                      label("grads", k), ": expected memory of its own or that of params[", k,
                      "] with the same strides, got memory shared with ", label(at->name, at->index));
  }
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

void check_step_arguments(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                          const at::Tensor& phi, const std::optional<at::Tensor>& record,
                          at::IntArrayRef record_tiles) {
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
    TORCH_CHECK_VALUE(!record->is_neg(), "record: expected a tensor that is not a lazy negation");
    check_same_device(*record, "record", phi, "phi");
    check_memory(*record, "record");
  }
  for (size_t k = 0; k < params.size(); k++) {
    check_coordinates(params[k], "params", k);
    check_coordinates(grads[k], "grads", k);
    TORCH_CHECK_VALUE(grads[k].sizes() == params[k].sizes(), label("grads", k), ": expected shape ", params[k].sizes(),
                      " as params, got ", grads[k].sizes());
    check_same_device(params[k], "params", phi, "phi", k);
    check_same_device(grads[k], "grads", phi, "phi", k);
    check_same_device(states[k], "states", phi, "phi", k);
    TORCH_CHECK_VALUE(!params[k].is_neg(), label("params", k), ": expected a tensor that is not a lazy negation");
    TORCH_CHECK_VALUE(!states[k].is_neg(), label("states", k), ": expected a tensor that is not a lazy negation");
    TORCH_CHECK_VALUE(at::has_internal_overlap(params[k]) != at::MemOverlap::Yes, label("params", k),
                      ": expected memory that does not overlap itself (an expanded tensor?), got shape ",
                      params[k].sizes(), " and strides ", params[k].strides());
    const int64_t tiles = tiles_for(params[k].numel());
    check_state(config, states[k], tiles, "states", k);
    if (record) {
      TORCH_CHECK_VALUE(record_tiles[k] >= 0 && record_tiles[k] <= record->numel() / kTile - tiles,
                        label("record_tiles", k), ": expected ", tiles, " tiles from it to lie in record of ",
                        record->numel(), " elements, got offset ", record_tiles[k]);
    }
  }
  check_aliasing(params, grads, states, record, record_tiles);
}

void check_segment_arguments(const Config& config, at::TensorList start_states, at::IntArrayRef record_tiles,
                             at::TensorList records, at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs,
                             at::ArrayRef<double> decays, const at::Tensor& phi, at::TensorList grad_end_states) {
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
