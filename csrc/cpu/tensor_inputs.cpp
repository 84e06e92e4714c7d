// The default inputs of a tensor, from the sums of tensor_sums.cpp, and what a network makes of them for its nominal
// term; the oracle is l2l_fast/kernels/tensor_inputs.py. A few numbers of each tensor: as operations on small tensors
// they took longer than the step of a small network. float64 throughout, rounded once.
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>

#include "../ops/arguments.h"
#include "backend.h"

namespace l2l {
namespace {

constexpr int kInputs = kDefaultInputs;
constexpr double kMemory = 0.9;  // of the alignment
// gain, mu, nu, lam
constexpr double kLow[kNominalRows] = {-INFINITY, -0.8, -0.8, -0.5}, kHigh[kNominalRows] = {INFINITY, 1.0, 0.8, 1.0};

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
  return kMemory * before + (1.0 - kMemory) * std::clamp(cosine, -1.0, 1.0);
}

double numel(const double* sums) { return std::max(sums[5], 1.0); }

// ln of the mean square q, of one tensor or of all.
double log_q(double sum, double count) { return std::log(sum / count + 1e-200); }

void inputs_of(const double* sums, const Timed& timed, int64_t age, int64_t fan_in, double alignment, double all_q,
               float* out) {
  const double count = numel(sums), vector = fan_in == 0 ? 1.0 : 0.0, matrix = 1.0 - vector;
  const double fan = fan_in == 0 ? 0.0 : std::log(static_cast<double>(fan_in) / 32.0) / 2.0;
  const double size = std::clamp(std::log(std::sqrt(sums[0] / count) * 10.0 + 1e-3), -4.0, 4.0);
  const double direction = std::max(sums[3] / count, age == 1 ? 1.0 : 0.0);
  const double found[] = {vector,
                          vector * timed.of[1],
                          fan,
                          matrix * size / 2.0,
                          vector * size / 3.0,
                          3.0 * alignment,
                          std::log(direction + 1e-4) / 4.0 + 0.5,
                          std::clamp((log_q(sums[2], count) - all_q) / 2.0, -9.0, 9.0) / 3.0};
  static_assert(std::size(decltype(timed.of){}) + std::size(found) == kInputs);
  out = std::copy(std::begin(timed.of), std::end(timed.of), out);
  std::copy(std::begin(found), std::end(found), out);
}

// weights: [4][inputs], or null for the default.
void nominal_of(const double* weights, const float* inputs, float* out) {
  double found[kNominalRows] = {};
  for (int r = 0; weights && r < kNominalRows; r++) {
    for (int i = 0; i < kInputs; i++) found[r] += weights[r * kInputs + i] * static_cast<double>(inputs[i]);
    found[r] = std::clamp(found[r], kLow[r], kHigh[r]);
  }
  std::copy(std::begin(found), std::end(found), out);
  out[kNominalRows] = static_cast<float>(0.5 * std::exp(std::clamp<double>(found[0], kLowestGain, kHighestGain)));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> tensor_inputs(
    const at::Tensor& sums, at::TensorList alignments, at::IntArrayRef fan_ins, at::IntArrayRef ages,
    std::optional<int64_t> total_steps, const std::optional<at::Tensor>& weight_nominal, int64_t optimizees) {
  check_tensor_inputs({sums, alignments, fan_ins, ages, total_steps, weight_nominal, optimizees});
  const auto count = static_cast<int64_t>(ages.size());
  const double* row = sums.const_data_ptr<double>();
  const at::Tensor weights = weight_nominal ? weight_nominal->to(at::kDouble) : at::Tensor();
  at::Tensor inputs = at::empty({count, kInputs}, at::TensorOptions().dtype(at::kFloat));
  at::Tensor nominal = at::empty({count, kNominal}, at::TensorOptions().dtype(at::kFloat));
  float *x = inputs.mutable_data_ptr<float>(), *n = nominal.mutable_data_ptr<float>();
  std::vector<at::Tensor> after;
  after.reserve(ages.size());
  const double* weight = weights.defined() ? weights.const_data_ptr<double>() : nullptr;
  const int64_t each = count / optimizees;
  std::optional<Timed> timed;
  for (int64_t o = 0; o < optimizees; o++) {
    double squares = 0.0, numels = 0.0;
    for (int64_t k = 0; k < each; k++) {
      squares += row[k * kSumColumns + 2];
      numels += numel(row + k * kSumColumns);
    }
    const double all_q = log_q(squares, numels);
    for (int64_t k = o * each; k < (o + 1) * each; k++, row += kSumColumns, x += kInputs, n += kNominal) {
      if (!timed || ages[k] != ages[k - 1]) timed.emplace(ages[k], total_steps);
      const double alignment = aligned(row, *alignments[k].const_data_ptr<double>());
      after.push_back(at::empty({}, at::TensorOptions().dtype(at::kDouble)));
      *after.back().mutable_data_ptr<double>() = alignment;
      inputs_of(row, *timed, ages[k], fan_ins[k], alignment, all_q, x);
      nominal_of(weight, x, n);
    }
    if (weight && weights.dim() == 3) weight += kNominalRows * kInputs;
  }
  return {inputs, nominal, after};
}

}  // namespace l2l
