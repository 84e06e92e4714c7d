// What every instruction set provides: the kernels on one tile of 64 coordinates. Plain data only, because this header
// is read by translation units that may not share inline library code (see simd.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../core/features.h"
#include "../core/packed_layout.h"
#include "../core/state_io.h"

namespace l2l {

// What a layer's forward products read, weights and inputs: floats; floats that are rounded to bfloat16; or pairs of
// bfloat16 in 32 bits, rows 2k (low half) and 2k + 1 of the inputs and of those before in h, the last beside a zero if
// their number is odd. Of pairs, too, the bias of a unit is four floats in front of its weights.
enum class Operands : int { floats, rounded, pairs };

L2L_HOST_DEVICE constexpr int operand_rows(Operands operands, int rows) {
  return operands == Operands::pairs ? (rows + 1) / 2 : rows;
}

// One layer's weights in the order in which the kernels read them.
struct LayerWeights {
  const float* forward;         // as in packed_layout.h, or such operands
  const float* backward_input;  // [ceil(inputs / 4)][4 * hidden][4]: d gates -> d inputs, zero-padded
  const float* backward_h;      // [ceil(hidden / 4)][4 * hidden][4]: d gates -> d previous h, zero-padded
};

struct Network {
  Config config;
  Features features;
  LayerWeights layer[kMaxLayers];
  const float* weight_out;     // [read_outs][hidden], an update's times output_scale
  const float* bias_out;       // [read_outs], an update's times output_scale
  const float* weight_tensor;  // [hidden][tensor_inputs][4]
  Operands operands = Operands::floats;

  // Floats of one unit of a layer's forward weights.
  L2L_HOST_DEVICE long forward_unit(int l) const {
    return 4L * (1 + operand_rows(operands, config.inputs(l)) + operand_rows(operands, config.hidden));
  }
};

// What all coordinates of a tensor have in common in one step. All empty for networks that know nothing of tensors.
struct TensorStep {
  const float* inputs;  // [tensor_inputs]
  const float* bias;    // [hidden][4], of the first layer with those inputs in it; null for the network's own
  Correction correction;
  Nominal nominal;
};

// Back-propagation through `steps` steps of one tile. Arrays of lanes hold 64 floats; state tiles are [rows][64].
struct BackwardTile {
  int steps;
  int count;                    // coordinates; beyond them all rows but the states' hold zeros
  const float* const* grads;    // [steps] rows of gradients, the inputs of the steps
  const TensorStep* tensor;     // [steps]
  const float* grad_updates;    // [steps][64] d loss / d update
  const float* state;           // before the first step
  const float* grad_end_state;  // d loss / d state after the last step, or null for zero
  float* grad_state;            // d loss / d state before the first step, or null
  float* grad_grads;            // [steps][64] d loss / d gradient, or null
  double* grad_phi;             // sums as in packed_layout.h, added to
};

// One layer of one tile, for networks whose coordinates meet between layers. All rows have 64 lanes.
struct LayerForward {
  const float* weights;  // [hidden][1 + inputs + recurrent][4], as in packed_layout.h
  const float* bias;     // [hidden][4] in the place of theirs, or null
  int hidden;
  const float* x;  // [inputs]
  int inputs;
  const float* h;  // [recurrent], previous
  int recurrent;
  const float* c;                // [hidden], previous
  float* new_c;                  // may be c
  float* new_h;                  // may not be h
  int lanes;                     // of coordinates; in what is written, those beyond their vectors become zero
  const float *next_h, *next_c;  // where the same will be read next, to be fetched meanwhile, or null
};

// The same backward: activations are recomputed.
struct LayerBackward {
  int lanes;       // of coordinates; nothing beyond them
  const float* x;  // [inputs]
  const float* h;  // [hidden], previous
  const float* c;  // [hidden], previous
  float* dh;       // [hidden]: of the new h -> of the previous one
  float* dc;       // [hidden]: of the new c -> of the previous one
  float* dx;       // [inputs], added to, or null
};

// sigmoid_scaled(a) = 1 / (1 + 2^a), tanh_scaled(a) = (2^a - 1) / (2^a + 1): the scale of the pre-activations.
enum class VectorFunction : int { exp2, sigmoid_scaled, tanh_scaled, log };

// The steps with bfloat16 products, of a network that was packed for these operands; otherwise as in Kernels.
struct Bfloat16Kernels {
  Operands operands;
  void (*step)(const Network&, const TensorStep&, const float* inputs, const float* state, float* new_state, int count,
               const float* next_state, float* out);
  void (*stored_step)(const Network&, const TensorStep&, StateType, const float* inputs, void* tile, int count,
                      uint64_t seed, int64_t number, const void* next, const float* grad, const float* averages,
                      float* out);
};

// One block of a product of matrices that are stored in panels (csrc/cpu/panels.h):
//   out[i][j] = factor * sum_k left[k][i] right[k][j] + base_factor * base[i][j].
struct PanelProduct {
  const float *left, *right;
  long left_stride, right_stride;  // from one k to the next
  int64_t depth;                   // of k, at least one
  int rows, vectors;               // of the block: i up to a panel's width, j in whole vectors
  const float* base;               // or null
  float* out;                      // not one of the others
  long stride;                     // of out and base, from one i to the next; rows up to padded_rows are written
  float factor, base_factor;
};

// What products of whole matrices are made of. What is not finite counts as zero where numbers come in.
struct PanelKernels {
  int width;       // of a panel
  int block_rows;  // that a product computes at once; it divides the width
  void (*product)(const PanelProduct&);
  // to[c][r] = from[r][c] for c < columns and r < width, both widths multiples of 4; rows of `from` from `rows` on
  // count as zero.
  void (*transpose)(const float* from, long from_stride, int rows, int columns, float* to, long to_stride, int width);
  double (*squares)(const float* x, int64_t n);  // their sum
  void (*scale)(const float* x, int64_t n, double factor, float* out);
};

struct Kernels {
  const char* name;
  int lanes;
  // Of 64 gradients, as rows of 64; and d loss / d gradient from that of the features. Of kinds with moving averages
  // [averages][64], the gradient is taken into them first: to new_averages, which may be the same.
  void (*features)(const Network&, const TensorStep&, const float* grad, const float* averages, float* new_averages,
                   float* out);
  void (*features_backward)(const Network&, const float* grad, const float* grad_features, float* grad_grad);
  // One step of all layers for a tile of `count` coordinates: reads inputs [inputs(0)][64] and state, writes new_state
  // (may be state itself) and out [read_outs][64]. next_state: the tile that comes next, to be fetched, or null.
  void (*step)(const Network&, const TensorStep&, const float* inputs, const float* state, float* new_state, int count,
               const float* next_state, float* out);
  // Of kinds with moving averages: the update [64], in the place of the first row, from the read-out [read_outs][64],
  // the features and averages of the step and its gradient.
  void (*update)(const Network&, const TensorStep&, const float* grad, const float* averages, const float* features,
                 float* read_out);
  // The whole step of a network without layers: takes the gradient into the averages [averages][64] (new_averages may
  // be the same) and gives the update [64].
  void (*nominal_step)(const Network&, const TensorStep&, const float* grad, const float* averages, float* new_averages,
                       float* out);
  // Adds to sums [kTensorSums][kSumLanes] the products theta^2, g^2, r1^2, d^2 and g d of a tile's first `count`
  // coordinates, d = m1^ / (r2^ + eps): of rows of 64 of theta and gradient, zero beyond those, and of averages before
  // the step.
  void (*tile_sums)(const Correction&, const float* theta, const float* grad, const float* averages, int count,
                    double* sums);
  // The step on tile `number` of its tensor, whose state is not float32 (state_io.h) and is updated in place. count:
  // coordinates in the tile. seed: of the step for the tensor. next: the tile that comes next, to be fetched, or null.
  // Of kinds with moving averages, those with the gradient in them [averages][64] are stored too, and out is the
  // update.
  void (*stored_step)(const Network&, const TensorStep&, StateType, const float* inputs, void* tile, int count,
                      uint64_t seed, int64_t number, const void* next, const float* grad, const float* averages,
                      float* out);
  // The moving averages [averages][64] of such a tile.
  void (*decode_averages)(const Config&, StateType, const void* tile, float* rows);
  void (*encode_averages)(const Config&, StateType, const float* rows, uint64_t seed, int64_t number, void* tile);
  // Bytes of scratch that backward needs, and the kernel.
  size_t (*backward_scratch)(const Config&, int steps);
  void (*backward)(const Network&, const BackwardTile&, float* scratch);
  // Layer by layer. layer_backward takes up to kLayerTiles tiles at once.
  void (*layer_forward)(const LayerForward&);
  void (*read_out)(const Network&, const float* h, float* out);
  size_t (*layer_backward_scratch)(const Config&);
  void (*layer_backward)(const Network&, int layer, const LayerBackward*, int tiles, double* grad_phi, float* scratch);
  // dh is added to; grad_out [outputs][64].
  void (*read_out_backward)(const Network&, const float* h, const float* grad_out, float* dh, double* grad_phi);
  Bfloat16Kernels bfloat16;
  PanelKernels panels;
  // For tests: y = function(x). For the roofline: `repeats` rounds of independent multiply-adds, returns how many.
  void (*vector_function)(VectorFunction, const float* x, float* y, int64_t n);
  int64_t (*multiply_adds)(int64_t repeats, float* sink);
};

constexpr int kLayerTiles = 8;
constexpr int kSumLanes = 8;  // that they are added up in

namespace baseline { extern const Kernels kernels; }
#if defined(__x86_64__)
namespace avx2 { extern const Kernels kernels; }
namespace avx512 { extern const Kernels kernels; }
namespace avx512bf16 { extern const Bfloat16Kernels bfloat16; }
#endif

}  // namespace l2l
