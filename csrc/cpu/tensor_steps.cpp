#include "tensor_steps.h"

namespace l2l {

TensorSteps::TensorSteps(const PackedNetwork& net, size_t count) : net_(net.network()), steps_(count) {
  const Config& config = net_.config;
  if (config.tensor_inputs > 0) biases_.resize(count * kGates * config.hidden);
}

void TensorSteps::set(size_t k, const Common& common) {
  const Config& config = net_.config;
  TensorStep& step = steps_[k];
  step.correction = make_correction(config, common.age);
  if (const float* n = common.nominal) step.nominal = {n[0], n[1], n[2], n[3], n[4]};
  if (config.tensor_inputs == 0) return;
  step.inputs = common.inputs;
  float* bias = biases_.data() + k * kGates * config.hidden;
  step.bias = bias;
  const size_t unit = net_.forward_unit(0);
  for (int j = 0; j < config.hidden; j++)
    for (int g = 0; g < kGates; g++) {
      const float* weights = net_.weight_tensor + static_cast<size_t>(kGates) * j * config.tensor_inputs + g;
      double sum = net_.layer[0].forward[j * unit + g];
      for (int i = 0; i < config.tensor_inputs; i++) sum += static_cast<double>(weights[kGates * i]) * common.inputs[i];
      bias[kGates * j + g] = static_cast<float>(sum);
    }
}

}  // namespace l2l
