// phi in the order in which the CPU kernels read it, and their gradient sums back in phi's order.
#pragma once

#include <vector>

#include "kernels.h"

namespace l2l {

// What a Network is for: a step reads half of what goes back through it.
enum class Direction { forward, backward };

// Owns the packed weights that its Network points to.
class PackedNetwork {
 public:
  // operands: of the forward products, in the direction forward.
  PackedNetwork(const Config& config, const float* phi, Direction direction, Operands operands = Operands::floats);
  PackedNetwork(const PackedNetwork&) = delete;
  PackedNetwork& operator=(const PackedNetwork&) = delete;

  const Network& network() const { return network_; }

 private:
  Network network_;
  std::vector<float> storage_;
};

// From the kernels' sums, as in packed_layout.h, to the gradient of phi.
void unpack_gradient(const Config& config, const double* sums, float* grad_phi);

}  // namespace l2l
