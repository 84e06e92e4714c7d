// What the kernels have to know of every tensor in every step, beside its coordinates: computed once, from what came
// with the call.
#pragma once

#include <vector>

#include "../ops/backend.h"
#include "packing.h"

namespace l2l {

class TensorSteps {
 public:
  // `count` steps of tensors; all empty, as networks without averages have them.
  TensorSteps(const PackedNetwork& net, size_t count);

  void set(size_t k, const Common& common);
  const TensorStep& operator[](size_t k) const { return steps_[k]; }

 private:
  const Network& net_;
  std::vector<TensorStep> steps_;
  std::vector<float> biases_;  // [count][hidden][4], if there are inputs per tensor
};

}  // namespace l2l
