#include "arguments.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

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
// Beyond, float32 would forget gradients that count: an average of 2^20 steps adds a millionth of each.
constexpr double kMaxBeta = 1.0 - 0x1p-20;

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

at::ScalarType dtype_of(StateType type) {
  return type == StateType::float32 ? at::kFloat : type == StateType::int8 ? at::kChar : at::kBFloat16;
}

// ValueError / TypeError unless `state` is a contiguous [tiles, rows, 64] tensor, or [tiles, bytes] of int8, of the
// device's alignment; tiles < 0 takes any number. type: float32 but for what is stepped in place.
void check_state(const Config& config, const at::Tensor& state, int64_t tiles, int64_t alignment, const char* name,
                 int64_t index = -1, StateType type = StateType::float32) {
  TORCH_CHECK_TYPE(state.scalar_type() == dtype_of(type), label(name, index), ": expected dtype ",
                   type == StateType::float32 ? "float32"
                   : type == StateType::int8  ? "int8"
                                              : "bfloat16",
                   ", got ", state.scalar_type());
  std::vector<int64_t> tile{config.rows(), kTile};
  if (type == StateType::int8) tile = {TileLayout(config, type).bytes};
  const bool shape =
      state.dim() > 0 && state.sizes().slice(1) == at::IntArrayRef(tile) && (tiles < 0 || state.size(0) == tiles);
  std::string rest;
  for (const int64_t size : tile) rest += ", " + std::to_string(size);
  TORCH_CHECK_VALUE(shape, label(name, index), ": expected shape [", tiles < 0 ? "tiles" : std::to_string(tiles), rest,
                    "], got ", state.sizes());
  TORCH_CHECK_VALUE(state.is_contiguous(), label(name, index), ": expected a contiguous tensor, got strides ",
                    state.strides());
  check_memory(state, name, index);
  TORCH_CHECK_VALUE(reinterpret_cast<uintptr_t>(state.const_data_ptr()) % alignment == 0, label(name, index),
                    ": expected memory aligned to ", alignment, " bytes, got a slice that is not; clone it");
}

void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& phi, int64_t index = -1) {
  TORCH_CHECK_VALUE(tensor.device() == phi.device(), label(name, index), ": expected device ", phi.device(),
                    " as phi, got ", tensor.device());
}

// What an operator writes: ValueError for a lazy negation, RuntimeError if autograd would have to know of it.
void check_written(const at::Tensor& tensor, const char* name, int64_t index = -1) {
  TORCH_CHECK_VALUE(!tensor.is_neg(), label(name, index), ": expected a tensor that is not a lazy negation");
  TORCH_CHECK(!at::GradMode::is_enabled() || !tensor.requires_grad(), label(name, index),
              ": is written in place and requires grad: call the operator under torch.no_grad()");
  TORCH_CHECK(!tensor.is_inference() || c10::InferenceMode::is_enabled(),
              "Inplace update to inference tensor outside InferenceMode is not allowed: ", label(name, index));
  check_memory(tensor, name, index);
}

// A contiguous tensor of this dtype and shape on phi's device.
void check_dense(const at::Tensor& tensor, const char* name, at::ScalarType dtype, at::IntArrayRef shape,
                 const at::Tensor& phi, int64_t index = -1) {
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, label(name, index),
                   ": expected a dense (strided) tensor, got layout ", tensor.layout());
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, label(name, index), ": expected dtype ",
                   dtype == at::kFloat ? "float32" : "float64", ", got ", tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.sizes() == shape, label(name, index), ": expected shape ", shape, ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.is_contiguous(), label(name, index), ": expected a contiguous tensor, got strides ",
                    tensor.strides());
  TORCH_CHECK_VALUE(!tensor.is_neg(), label(name, index), ": expected a tensor that is not a lazy negation");
  check_same_device(tensor, name, phi, index);
  check_memory(tensor, name, index);
}

std::vector<int64_t> rows_of(int64_t rows, at::IntArrayRef sizes) {
  std::vector<int64_t> shape{rows};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return shape;
}

// Extra inputs: none if the network has none.
void check_extra(const Config& config, const std::optional<at::Tensor>& extra, at::IntArrayRef sizes,
                 const at::Tensor& phi) {
  TORCH_CHECK_VALUE(extra.has_value() == (config.extra > 0), "extra: expected ",
                    config.extra > 0 ? "a tensor of " + std::to_string(config.extra) + " rows" : std::string("None"),
                    " for this network");
  if (extra) check_dense(*extra, "extra", at::kFloat, rows_of(config.extra, sizes), phi);
}

// ValueError unless every problem gets as many of the coordinates.
void check_problems(int64_t problems, int64_t numel, const char* name, int64_t index = -1) {
  TORCH_CHECK_VALUE(problems >= 1, "num_problems: expected at least 1, got ", problems);
  TORCH_CHECK_VALUE(numel % problems == 0, label(name, index), ": expected a multiple of num_problems=", problems,
                    " coordinates, got ", numel);
}

void check_phases(const Config& config, const StepArguments& a) {
  const std::vector<int64_t> means{config.layers, a.problems, config.gac}, sums{2, a.problems, config.gac};
  TORCH_CHECK_VALUE(config.gac == 0 || a.means, "means: expected a tensor of shape ", at::IntArrayRef(means),
                    ", got None");
  TORCH_CHECK_VALUE(config.gac == 0 || a.sums, "sums: expected a tensor of shape ", at::IntArrayRef(sums),
                    ", got None");
  if (a.means) {
    check_dense(*a.means, "means", at::kFloat, means, a.phi);
    check_written(*a.means, "means");
  }
  if (a.sums) {
    check_dense(*a.sums, "sums", at::kDouble, sums, a.phi);
    check_written(*a.sums, "sums");
  }
  TORCH_CHECK_VALUE(a.first_phase >= 0 && a.first_phase <= a.last_phase && a.last_phase <= config.layers + 1,
                    "first_phase, last_phase: expected 0 <= first <= last <= ", config.layers + 1, ", got ",
                    a.first_phase, ", ", a.last_phase);
  const bool whole = a.first_phase == 0 && a.last_phase == config.layers + 1;
  TORCH_CHECK_VALUE(config.averages() == 0 || whole, "first_phase, last_phase: expected 0 and ", config.layers + 1,
                    " for a network with averages, got ", a.first_phase, " and ", a.last_phase);
}

constexpr const char* kPrecisionNames[] = {"float32", "bfloat16"};

void check_precision(const Config& config, const StepArguments& a) {
  const std::string_view name = a.precision_name;
  TORCH_CHECK_VALUE(name == kPrecisionNames[0] || name == kPrecisionNames[1],
                    "precision: expected 'float32' or 'bfloat16', got '", name, "'");
  if (name == kPrecisionNames[0]) return;
  TORCH_CHECK_VALUE(a.phi.is_cpu(), "precision: 'bfloat16' is of the CPU; expected 'float32' for phi on ",
                    a.phi.device());
  TORCH_CHECK_VALUE(config.layers > 0, "precision: expected 'float32' for a network without layers, which has no ",
                    "products, got '", name, "'");
  TORCH_CHECK_VALUE(config.is_plain(), "precision: expected 'float32' for a network with gac_cells, extra_inputs or ",
                    "several outputs, got '", name, "'");
  TORCH_CHECK_VALUE(a.first_phase == 0 && a.last_phase == config.layers + 1,
                    "precision: expected 'float32' for a step of several phases, got '", name, "'");
  TORCH_CHECK_VALUE(!a.record, "precision: expected 'float32' for a step with `record`, whose backward is of ",
                    "float32, got '", name, "'");
}

void check_record(const StepArguments& a) {
  const size_t offsets = a.record ? a.params.size() : 0;
  TORCH_CHECK_VALUE(a.record_tiles.size() == offsets, "record_tiles: expected ", offsets, " offsets, got ",
                    a.record_tiles.size());
  if (!a.record) return;
  TORCH_CHECK_TYPE(a.record->scalar_type() == at::kFloat, "record: expected dtype float32, got ",
                   a.record->scalar_type());
  TORCH_CHECK_VALUE(a.record->dim() == 1 && a.record->is_contiguous(),
                    "record: expected a contiguous vector, got shape ", a.record->sizes(), " and strides ",
                    a.record->strides());
  check_same_device(*a.record, "record", a.phi);
  check_written(*a.record, "record");
}

void check_records(const SegmentArguments& a) {
  TORCH_CHECK_VALUE(a.records.size() >= 2, "records: expected the gradients of at least two points (one step), got ",
                    a.records.size());
  const size_t steps = a.records.size() - 1;
  TORCH_CHECK_VALUE(a.loss_weights.size() == steps, "loss_weights: expected ", steps, " numbers (one a step), got ",
                    a.loss_weights.size());
  TORCH_CHECK_VALUE(a.lrs.size() == steps, "lrs: expected ", steps, " numbers (one a step), got ", a.lrs.size());
  TORCH_CHECK_VALUE(a.decays.size() == steps, "decays: expected ", steps, " numbers (one a step), got ",
                    a.decays.size());
  for (size_t t = 0; t < a.records.size(); t++) {
    const at::Tensor& record = a.records[t];
    TORCH_CHECK_TYPE(record.scalar_type() == at::kFloat, label("records", t), ": expected dtype float32, got ",
                     record.scalar_type());
    TORCH_CHECK_VALUE(record.dim() == 1 && record.is_contiguous() && record.numel() % kTile == 0, label("records", t),
                      ": expected a contiguous vector of a multiple of ", kTile, " elements, got shape ",
                      record.sizes());
    TORCH_CHECK_VALUE(record.numel() == a.records[0].numel(), label("records", t), ": expected ", a.records[0].numel(),
                      " elements as records[0], got ", record.numel());
    check_same_device(record, "records", a.phi, t);
    check_memory(record, "records", t);
  }
}

// Sets what only kinds with averages have; ValueError if it does not go together.
void add_averages(const ConfigArguments& a, Config& config) {
  const char* kind = kPreprocessNames[static_cast<int>(config.preprocess)];
  const int averages = config.averages();
  const size_t constants = 2 + averages;
  TORCH_CHECK_VALUE(a.constants.size() == constants, "constants: expected p and output_scale",
                    averages > 0 ? " and four betas" : "", ", got ", a.constants.size(), " numbers");
  if (averages == 0) {
    TORCH_CHECK_VALUE(config.tensor_inputs == 0, "tensor_inputs: expected 0 for preprocess='", kind, "', got ",
                      config.tensor_inputs);
    return;
  }
  const std::pair<const char*, int> none[] = {{"gac_cells", config.gac}, {"extra_inputs", config.extra}};
  for (const auto& [name, value] : none)
    TORCH_CHECK_VALUE(value == 0, name, ": expected 0 for preprocess='", kind, "', got ", value);
  TORCH_CHECK_VALUE(config.outputs == 1, "num_outputs: expected 1 for preprocess='", kind, "', got ", config.outputs);
  for (int k = 0; k < averages; k++) {
    const double beta = a.constants[2 + k];
    TORCH_CHECK_VALUE(beta >= 0.5 && beta <= kMaxBeta, "betas[", k, "]: expected a number in [0.5, ", kMaxBeta,
                      "], got ", beta);
    config.rates.of[k] = static_cast<float>(1.0 - beta);
  }
}

}  // namespace

Config make_config(const ConfigArguments& a) {
  TORCH_CHECK_VALUE(a.sizes.size() == 5 || a.sizes.size() == 6,
                    "sizes: expected hidden_size, num_layers, gac_cells, extra_inputs, num_outputs and perhaps "
                    "tensor_inputs, got ",
                    a.sizes.size(), " numbers");
  TORCH_CHECK_VALUE(a.constants.size() >= 2, "constants: expected p and output_scale, got ", a.constants.size(),
                    " numbers");
  const auto in_range = [](const char* name, int64_t value, int64_t low, int64_t high, const char* what = "") {
    TORCH_CHECK_VALUE(value >= low && value <= high, name, ": expected ", low, "..", high, what, ", got ", value);
    return static_cast<int>(value);
  };
  Config config;
  const bool without_layers =
      a.sizes[1] == 0 && a.sizes[0] == 0 && a.preprocess == kPreprocessNames[static_cast<int>(Preprocess::normalized)];
  if (!without_layers) {
    config.hidden = in_range("hidden_size", a.sizes[0], kMinHidden, kMaxHidden);
    config.layers = in_range("num_layers", a.sizes[1], 1, kMaxLayers, " (0 with hidden_size 0 and normalized inputs)");
  } else {
    config.hidden = config.layers = 0;
  }
  config.gac = in_range("gac_cells", a.sizes[2], 0, config.hidden, " (hidden_size)");
  config.extra = in_range("extra_inputs", a.sizes[3], 0, kMaxExtraInputs);
  config.outputs = in_range("num_outputs", a.sizes[4], 1, kMaxOutputs);
  if (a.sizes.size() > 5) config.tensor_inputs = in_range("tensor_inputs", a.sizes[5], 0, kMaxTensorInputs);
  std::string names;
  int kind = 0;
  for (; kind < kPreprocessKinds && a.preprocess != kPreprocessNames[kind]; kind++)
    names += (kind == 0 ? "'" : ", '") + std::string(kPreprocessNames[kind]) + "'";
  TORCH_CHECK_VALUE(kind < kPreprocessKinds, "preprocess: expected one of ", names, ", got '", a.preprocess, "'");
  config.preprocess = static_cast<Preprocess>(kind);
  // As float32, which is what the kernels compute with.
  const double p = a.constants[0], output_scale = a.constants[1];
  TORCH_CHECK_VALUE(p >= std::numeric_limits<float>::min() && p <= kMaxP, "p: expected a number in (0, ", kMaxP,
                    "], got ", p);
  TORCH_CHECK_VALUE(std::abs(output_scale) <= std::numeric_limits<float>::max(),
                    "output_scale: expected a finite number, got ", output_scale);
  config.p = static_cast<float>(p);
  config.output_scale = static_cast<float>(output_scale);
  add_averages(a, config);
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

Common CommonArguments::of(size_t k, size_t t) const {
  const auto row = [&](const std::optional<at::Tensor>& rows) {
    return rows ? rows->const_data_ptr<float>() + (t * ages.size() + k) * rows->size(-1) : nullptr;
  };
  return {ages[k] + static_cast<int64_t>(t), row(inputs), row(nominal)};
}

void check_common(const Config& config, const CommonArguments& a, size_t tensors, int64_t problems,
                  const at::Tensor& phi, std::optional<size_t> steps) {
  const bool averages = config.averages() > 0;
  const size_t ages = averages ? tensors : 0;
  TORCH_CHECK_VALUE(a.ages.size() == ages, "ages: expected ", ages, " numbers (one a tensor, of a network with ",
                    "averages), got ", a.ages.size());
  for (size_t k = 0; k < ages; k++)
    TORCH_CHECK_VALUE(a.ages[k] >= 1, label("ages", k), ": expected a number of steps >= 1, got ", a.ages[k]);
  TORCH_CHECK_VALUE(!averages || problems == 1, "num_problems: expected 1 for a network with averages, whose tensors ",
                    "have one vector each, got ", problems);
  const auto check = [&](const std::optional<at::Tensor>& rows, const char* name, int64_t size, bool needed) {
    std::vector<int64_t> shape{static_cast<int64_t>(tensors), size};
    if (steps) shape.insert(shape.begin(), static_cast<int64_t>(*steps));
    TORCH_CHECK_VALUE(rows || !needed, name, ": expected a tensor of shape ", at::IntArrayRef(shape), ", got None");
    if (!rows) return;
    TORCH_CHECK_VALUE(size > 0, name, ": expected None for this network, got a tensor of shape ", rows->sizes());
    check_dense(*rows, name, at::kFloat, shape, phi);
  };
  check(a.inputs, "tensor_inputs", config.tensor_inputs, config.tensor_inputs > 0);
  check(a.nominal, "nominal", averages ? kNominal : 0, false);
}

void check_step_inputs(const Config& config, const at::Tensor& grad, const std::optional<at::Tensor>& extra,
                       const at::Tensor& state, const at::Tensor& phi, int64_t problems, int64_t alignment) {
  check_coordinates(grad, "grad");
  check_problems(problems, grad.numel(), "grad");
  check_state(config, state, tiles_for(grad.numel()), alignment, "state");
  check_same_device(grad, "grad", phi);
  check_same_device(state, "state", phi);
  check_extra(config, extra, grad.sizes(), phi);
}

void check_upstream(const Config& config, const at::Tensor& grad, const at::Tensor& phi, const at::Tensor& grad_out,
                    const at::Tensor& grad_new_state, int64_t alignment) {
  check_dense(grad_out, "grad_out", at::kFloat, rows_of(config.outputs, grad.sizes()), phi);
  check_state(config, grad_new_state, tiles_for(grad.numel()), alignment, "grad_new_state");
  check_same_device(grad_new_state, "grad_new_state", phi);
}

StateType state_type_of(const at::Tensor& state, const char* name, int64_t index) {
  const at::ScalarType dtype = state.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kChar, label(name, index),
                   ": expected dtype float32, bfloat16 or int8, got ", dtype);
  return dtype == at::kFloat ? StateType::float32 : dtype == at::kChar ? StateType::int8 : StateType::bfloat16;
}

void check_tensor_sums(const Config& config, at::TensorList params, at::TensorList grads, at::TensorList states,
                       at::IntArrayRef ages, int64_t alignment) {
  const auto as_many = [&](const char* name, size_t found) {
    TORCH_CHECK_VALUE(found == params.size(), name, ": expected ", params.size(), " as of params, got ", found);
  };
  as_many("grads", grads.size());
  as_many("states", states.size());
  as_many("ages", ages.size());
  for (size_t k = 0; k < params.size(); k++) {
    const auto index = static_cast<int64_t>(k);
    check_coordinates(params[k], "params", index);
    check_coordinates(grads[k], "grads", index);
    TORCH_CHECK_VALUE(grads[k].sizes() == params[k].sizes(), label("grads", index), ": expected shape ",
                      params[k].sizes(), ", got ", grads[k].sizes());
    check_state(config, states[k], tiles_for(params[k].numel()), alignment, "states", index,
                state_type_of(states[k], "states", index));
    for (const auto& [name, tensor] : {std::pair("params", &params[k]), {"grads", &grads[k]}, {"states", &states[k]}})
      TORCH_CHECK_VALUE(tensor->device() == params[0].device(), label(name, index), ": expected device ",
                        params[0].device(), " as params[0], got ", tensor->device());
    TORCH_CHECK_VALUE(ages[k] >= 1, "ages: expected at least 1, got ", ages[k]);
  }
}

StateType StepArguments::state_type() const {
  return states.empty() ? StateType::float32 : state_type_of(states[0], "states", 0);
}

Precision StepArguments::precision() const {
  return precision_name == kPrecisionNames[1] ? Precision::bfloat16 : Precision::float32;
}

void check_step(const Config& config, const StepArguments& a, int64_t alignment) {
  const StateType type = a.state_type();
  if (type != StateType::float32) {
    TORCH_CHECK_NOT_IMPLEMENTED(config.is_plain(), "states: expected dtype float32 for a network with gac_cells, ",
                                "extra_inputs or several outputs, got ", a.states[0].scalar_type());
    TORCH_CHECK_NOT_IMPLEMENTED(!a.out && a.first_phase == 0 && a.last_phase == config.layers + 1,
                                "states: expected dtype float32 for a step with `out` or of several phases, got ",
                                a.states[0].scalar_type());
  }
  const size_t seeds = type == StateType::float32 ? 0 : a.params.size();
  TORCH_CHECK_VALUE(a.seeds.size() == seeds, "seeds: expected ", seeds, " numbers (one a tensor, where states are not ",
                    "float32), got ", a.seeds.size());
  TORCH_CHECK_VALUE(a.grads.size() == a.params.size(), "grads: expected ", a.params.size(), " tensors as params, got ",
                    a.grads.size());
  TORCH_CHECK_VALUE(a.states.size() == a.params.size(), "states: expected ", a.params.size(),
                    " tensors as params, got ", a.states.size());
  check_record(a);
  check_problems(a.problems, 0, "params");
  check_phases(config, a);
  check_precision(config, a);
  int64_t total = 0;
  for (size_t k = 0; k < a.params.size(); k++) {
    const at::Tensor &param = a.params[k], &grad = a.grads[k], &state = a.states[k];
    check_coordinates(param, "params", k);
    check_coordinates(grad, "grads", k);
    TORCH_CHECK_VALUE(grad.sizes() == param.sizes(), label("grads", k), ": expected shape ", param.sizes(),
                      " as params, got ", grad.sizes());
    check_same_device(param, "params", a.phi, k);
    check_same_device(grad, "grads", a.phi, k);
    check_same_device(state, "states", a.phi, k);
    check_written(param, "params", k);
    check_written(state, "states", k);
    const int64_t tiles = tiles_for(param.numel());
    check_state(config, state, tiles, alignment, "states", k, type);
    check_problems(a.problems, param.numel(), "params", k);
    total += param.numel();
    if (a.record)
      TORCH_CHECK_VALUE(a.record_tiles[k] >= 0 && a.record_tiles[k] <= a.record->numel() / kTile - tiles,
                        label("record_tiles", k), ": expected ", tiles, " tiles from it to lie in record of ",
                        a.record->numel(), " elements, got offset ", a.record_tiles[k]);
  }
  check_extra(config, a.extra, {total}, a.phi);
  check_common(config, a.common, a.params.size(), a.problems, a.phi);
  TORCH_CHECK_VALUE(a.out || config.outputs == 1, "out: expected a tensor of ", config.outputs, " rows, got None");
  if (a.out) {
    check_dense(*a.out, "out", at::kFloat, rows_of(config.outputs, {total}), a.phi);
    check_written(*a.out, "out");
  }
  const auto tensor = [](const std::optional<at::Tensor>& one) { return one ? &*one : nullptr; };
  const NamedTensor others[] = {{"out", tensor(a.out), true},
                                {"means", tensor(a.means), true},
                                {"sums", tensor(a.sums), true},
                                {"extra", tensor(a.extra), false},
                                {"tensor_inputs", tensor(a.common.inputs), false},
                                {"nominal", tensor(a.common.nominal), false}};
  check_aliasing(a.params, a.grads, a.states, a.phi, a.record, a.record_tiles, others);
}

void mark_written(const StepArguments& a) {
  for (const at::Tensor& param : a.params) param.unsafeGetTensorImpl()->bump_version();
  for (const at::Tensor& state : a.states) state.unsafeGetTensorImpl()->bump_version();
  for (const std::optional<at::Tensor>* tensor : {&a.record, &a.out, &a.means, &a.sums})
    if (*tensor) (*tensor)->unsafeGetTensorImpl()->bump_version();
}

void check_apart(at::TensorList params, at::TensorList grads, at::TensorList states) {
  for (size_t k = 0; k < params.size(); k++) {
    check_written(params[k], "params", k);
    check_written(states[k], "states", k);
  }
  check_aliasing(params, grads, states, {}, std::nullopt, {}, {});
}

void check_segment(const Config& config, const SegmentArguments& a, int64_t alignment) {
  check_records(a);
  TORCH_CHECK_VALUE(config.extra == 0 && config.outputs == 1,
                    "extra_inputs, num_outputs: expected 0 and 1 for a segment (others go through the functional "
                    "step), got ",
                    config.extra, " and ", config.outputs);
  check_problems(a.problems, 0, "numels");
  const size_t tensors = a.start_states.size(), steps = a.records.size() - 1;
  TORCH_CHECK_VALUE(a.numels.size() == tensors, "numels: expected ", tensors, " numbers as start_states, got ",
                    a.numels.size());
  TORCH_CHECK_VALUE(a.record_tiles.size() == tensors, "record_tiles: expected ", tensors,
                    " offsets as start_states, got ", a.record_tiles.size());
  TORCH_CHECK_VALUE(a.grad_end_states.empty() || a.grad_end_states.size() == tensors,
                    "grad_end_states: expected none or ", tensors, " tensors as start_states, got ",
                    a.grad_end_states.size());
  const int64_t all_tiles = a.records[0].numel() / kTile;
  for (size_t k = 0; k < tensors; k++) {
    check_state(config, a.start_states[k], -1, alignment, "start_states", k);
    check_same_device(a.start_states[k], "start_states", a.phi, k);
    const int64_t tiles = a.start_states[k].size(0), numel = a.numels[k];
    TORCH_CHECK_VALUE(numel >= 0 && numel <= tiles * kTile && tiles_for(numel) == tiles, label("numels", k),
                      ": expected the coordinates of ", tiles, " tiles as start_states, got ", numel);
    check_problems(a.problems, numel, "numels", k);
    TORCH_CHECK_VALUE(a.record_tiles[k] >= 0 && a.record_tiles[k] <= all_tiles - tiles, label("record_tiles", k),
                      ": expected ", tiles, " tiles from it to lie in records of ", all_tiles, " tiles, got offset ",
                      a.record_tiles[k]);
    if (!a.grad_end_states.empty()) {
      check_state(config, a.grad_end_states[k], tiles, alignment, "grad_end_states", k);
      check_same_device(a.grad_end_states[k], "grad_end_states", a.phi, k);
    }
  }
  TORCH_CHECK_VALUE(a.means.size() == steps || (config.gac == 0 && a.means.empty()), "means: expected ", steps,
                    " tensors (one a step), got ", a.means.size());
  for (size_t t = 0; t < a.means.size(); t++)
    check_dense(a.means[t], "means", at::kFloat, {config.layers, a.problems, config.gac}, a.phi, t);
  check_common(config, a.common, tensors, a.problems, a.phi, steps);
}

void check_tensor_inputs(const TensorInputsArguments& a) {
  const auto count = static_cast<int64_t>(a.ages.size());
  check_dense(a.sums, "sums", at::kDouble, {count, kSumColumns}, a.sums);
  TORCH_CHECK_VALUE(a.alignments.size() == a.ages.size(), "alignments: expected ", count, " as of ages, got ",
                    a.alignments.size());
  TORCH_CHECK_VALUE(a.fan_ins.size() == a.ages.size(), "fan_ins: expected ", count, " as of ages, got ",
                    a.fan_ins.size());
  TORCH_CHECK_VALUE(a.optimizees >= 1 && count % a.optimizees == 0, "optimizees: expected a divisor of ", count,
                    ", got ", a.optimizees);
  if (a.total_steps) TORCH_CHECK_VALUE(*a.total_steps >= 1, "total_steps: expected at least 1, got ", *a.total_steps);
  for (int64_t k = 0; k < count; k++) {
    TORCH_CHECK_VALUE(a.ages[k] >= 1, "ages: expected at least 1, got ", a.ages[k]);
    TORCH_CHECK_VALUE(a.fan_ins[k] >= 0, "fan_ins: expected at least 0, got ", a.fan_ins[k]);
    check_dense(a.alignments[k], "alignments", at::kDouble, {}, a.sums, k);
  }
  if (!a.weight_nominal) return;
  const at::Tensor& weight = *a.weight_nominal;
  const at::ScalarType dtype = weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  std::vector<int64_t> shape{kNominalRows, kDefaultInputs};
  if (weight.dim() == 3) shape.insert(shape.begin(), a.optimizees);
  check_dense(weight, "weight_nominal", dtype, shape, a.sums);
}

void check_orthogonalized(const at::Tensor& updates, int64_t steps) {
  TORCH_CHECK_VALUE(updates.layout() != at::kStrided || updates.dim() == 3,
                    "updates: expected shape [K, rows, cols], got ", updates.sizes());
  check_dense(updates, "updates", at::kFloat, updates.sizes(), updates);
  TORCH_CHECK_VALUE(steps >= 0 && steps <= kMaxOrthogonalSteps, "steps: expected 0..", kMaxOrthogonalSteps, ", got ",
                    steps);
}

}  // namespace l2l
