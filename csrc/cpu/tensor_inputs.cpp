// The default inputs of a tensor, from the sums of tensor_sums.cpp, and what a network makes of them for its nominal
// term; the oracle is l2l_fast/kernels/tensor_inputs.py. A few numbers of each tensor: as operations on small tensors
// they took longer than the step of a small network. float64 throughout, rounded once.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "backend.h"
#include "tiles.h"

namespace l2l {
namespace {

constexpr int kInputs = 15, kNominalRows = 4, kColumns = kTensorSums + 1;
// gain, mu, nu, lam
constexpr double kLow[kNominalRows] = {-INFINITY, -0.8, -0.8, -0.5}, kHigh[kNominalRows] = {INFINITY, 1.0, 0.8, 1.0};

// As torch.clamp: a NaN stays one.
double clamp(double low, double high, double x) { return x < low ? low : x > high ? high : x; }

// What tells of time alone.
struct Timed {
  double of[7];

  Timed(int64_t age, std::optional<int64_t> total_steps) {
    const double a = static_cast<double>(age);
    const double steps = total_steps ? static_cast<double>(*total_steps) : std::max(1000.0, 4.0 * a);
    const double p = std::min((a - 1.0) / steps, 1.0);
    const double cosine = std::log(0.998 * (1.0 + std::cos(M_PI * p)) / 2.0 + 0.002);
    const double found[] = {1.0,
                            p - 0.5,
                            p * p * p - 0.25,
                            std::exp(-a / 30.0),
                            std::log(1.02 - p) / 2.0,
                            cosine / 3.0,
                            std::log(steps / 1000.0) / 2.0};
    std::copy(std::begin(found), std::end(found), of);
  }
};

double aligned(const double* sums, double before) {
  const double cosine = -sums[4] / std::max(std::sqrt(sums[1]) * std::sqrt(sums[3]), 1e-290);
  return 0.9 * before + (1.0 - 0.9) * clamp(-1.0, 1.0, cosine);
}

double numel(const double* sums) { return std::max(sums[5], 1.0); }

// ln of the mean square q, of one tensor or of all.
double log_q(double sum, double count) { return std::log(sum / count + 1e-200); }

void inputs_of(const double* sums, const Timed& timed, int64_t age, int64_t fan_in, double alignment, double all_q,
               float* out) {
  const double count = numel(sums), vector = fan_in == 0 ? 1.0 : 0.0, matrix = 1.0 - vector;
  const double fan = fan_in == 0 ? 0.0 : std::log(static_cast<double>(fan_in) / 32.0) / 2.0;
  const double size = clamp(-4.0, 4.0, std::log(std::sqrt(sums[0] / count) * 10.0 + 1e-3));
  const double direction = std::max(sums[3] / count, age == 1 ? 1.0 : 0.0);
  const double found[] = {vector,
                          vector * timed.of[1],
                          fan,
                          matrix * size / 2.0,
                          vector * size / 3.0,
                          3.0 * alignment,
                          std::log(direction + 1e-4) / 4.0 + 0.5,
                          clamp(-9.0, 9.0, (log_q(sums[2], count) - all_q) / 2.0) / 3.0};
  static_assert(std::size(decltype(timed.of){}) + std::size(found) == kInputs);
  out = std::copy(std::begin(timed.of), std::end(timed.of), out);
  std::copy(std::begin(found), std::end(found), out);
}

// weights: [4][inputs], or null for the default.
void nominal_of(const float* weights, const float* inputs, float* out) {
  double found[kNominalRows] = {};
  for (int r = 0; weights && r < kNominalRows; r++) {
    for (int i = 0; i < kInputs; i++) found[r] += static_cast<double>(weights[r * kInputs + i]) * inputs[i];
    found[r] = clamp(kLow[r], kHigh[r], found[r]);
  }
  std::copy(std::begin(found), std::end(found), out);
  out[kNominalRows] = static_cast<float>(0.5 * std::exp(clamp(kLowestGain, kHighestGain, found[0])));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> tensor_inputs(
    const at::Tensor& sums, at::TensorList alignments, at::IntArrayRef fan_ins, at::IntArrayRef ages,
    std::optional<int64_t> total_steps, const std::optional<at::Tensor>& weight_nominal, int64_t optimizees) {
  const auto count = static_cast<int64_t>(ages.size());
  TORCH_CHECK_VALUE(sums.dim() == 2 && sums.size(0) == count && sums.size(1) == kColumns, "sums: expected shape [",
                    count, ", ", kColumns, "], got ", sums.sizes());
  TORCH_CHECK_TYPE(sums.scalar_type() == at::kDouble, "sums: expected float64, got ", sums.scalar_type());
  TORCH_CHECK_VALUE(alignments.size() == ages.size() && fan_ins.size() == ages.size(), "ages: expected as many as ",
                    "alignments and fan-ins, got ", count, ", ", alignments.size(), " and ", fan_ins.size());
  TORCH_CHECK_VALUE(optimizees >= 1 && count % optimizees == 0, "optimizees: expected a divisor of ", count, ", got ",
                    optimizees);
  TORCH_CHECK_VALUE(!total_steps || *total_steps >= 1, "total_steps: expected at least 1, got ", *total_steps);
  at::Tensor weights;
  if (weight_nominal) {
    const int64_t one = kNominalRows * kInputs, given = weight_nominal->numel();
    TORCH_CHECK_VALUE(given == one || given == optimizees * one, "weight_nominal: expected shape [4, ", kInputs,
                      "], of each optimizee or of all, got ", weight_nominal->sizes());
    TORCH_CHECK_VALUE(weight_nominal->is_cpu(), "weight_nominal: expected device cpu, got ", weight_nominal->device());
    weights = weight_nominal->to(at::kFloat).contiguous();
  }
  for (size_t k = 0; k < ages.size(); k++) {
    TORCH_CHECK_VALUE(ages[k] >= 1, "ages: expected at least 1, got ", ages[k]);
    TORCH_CHECK_VALUE(fan_ins[k] >= 0, "fan_ins: expected at least 0, got ", fan_ins[k]);
    const at::Tensor& before = alignments[k];
    TORCH_CHECK_VALUE(before.is_cpu() && before.scalar_type() == at::kDouble && before.numel() == 1, "alignments[", k,
                      "]: expected a number in float64, got ", before.scalar_type(), " of shape ", before.sizes());
  }

  const at::Tensor rows = sums.contiguous();
  const double* row = rows.const_data_ptr<double>();
  at::Tensor inputs = at::empty({count, kInputs}, at::TensorOptions().dtype(at::kFloat));
  at::Tensor nominal = at::empty({count, kNominal}, at::TensorOptions().dtype(at::kFloat));
  float *x = inputs.mutable_data_ptr<float>(), *n = nominal.mutable_data_ptr<float>();
  std::vector<at::Tensor> after;
  after.reserve(ages.size());
  const float* weight = weights.defined() ? weights.const_data_ptr<float>() : nullptr;
  const int64_t each = count / optimizees;
  std::optional<Timed> timed;
  for (int64_t o = 0; o < optimizees; o++) {
    double squares = 0.0, numels = 0.0;
    for (int64_t k = 0; k < each; k++) {
      squares += row[k * kColumns + 2];
      numels += numel(row + k * kColumns);
    }
    const double all_q = log_q(squares, numels);
    for (int64_t k = o * each; k < (o + 1) * each; k++, row += kColumns, x += kInputs, n += kNominal) {
      if (!timed || ages[k] != ages[k - 1]) timed.emplace(ages[k], total_steps);
      const double alignment = aligned(row, *alignments[k].const_data_ptr<double>());
      after.push_back(at::empty({}, at::TensorOptions().dtype(at::kDouble)));
      *after.back().mutable_data_ptr<double>() = alignment;
      inputs_of(row, *timed, ages[k], fan_ins[k], alignment, all_q, x);
      nominal_of(weight, x, n);
    }
    if (weight && weights.numel() > kNominalRows * kInputs) weight += kNominalRows * kInputs;
  }
  return {inputs, nominal, after};
}

}  // namespace l2l
