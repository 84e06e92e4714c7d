// Sizes and memory layouts that the CPU, CUDA and Python sides share. No ATen, no CUDA runtime.
//
// State of one tensor: [tiles][2 * layers * hidden][kTile] float32. A tile holds 64 consecutive coordinates; row r of a
// tile holds one number of each: for layer l, rows [2*l*hidden, ...) are h and rows [(2*l+1)*hidden, ...) are c. A row
// is contiguous, so it is read by SIMD lanes or by the threads of two warps at once; a tile is contiguous, so it
// streams.
//
// phi, the learned parameters, flat: per layer weight_ih [4*hidden][inputs], weight_hh [4*hidden][hidden],
// bias [4*hidden]; then weight_out [outputs][hidden] and bias_out [outputs]. Gate order i, f, g, o, as in
// torch.nn.LSTMCell.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define L2L_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define L2L_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace l2l {

constexpr int kTile = 64;
constexpr int kGates = 4;
constexpr int kMinHidden = 4, kMaxHidden = 64;
constexpr int kMaxLayers = 4;
constexpr int kMaxFeatures = 2;
constexpr int kMaxExtraInputs = 16, kMaxOutputs = 16;

enum class Preprocess : int { identity = 0, log_sign = 1 };

// What an operator call fixes besides the tensors.
struct Config {
  int hidden = 20;
  int layers = 2;
  Preprocess preprocess = Preprocess::log_sign;
  float p = 10.f;             // log-sign threshold exponent: gradients below exp(-p) are passed linearly
  float output_scale = 0.1f;  // the update is output_scale times the read-out
  int gac = 0;                // global averaging cells: the first of every layer's units
  int extra = 0;              // inputs beside the features of the gradient
  int outputs = 1;            // of which the first is the update

  L2L_HOST_DEVICE int features() const { return preprocess == Preprocess::log_sign ? 2 : 1; }
  L2L_HOST_DEVICE int inputs(int layer) const { return layer == 0 ? features() + extra : hidden; }
  L2L_HOST_DEVICE int rows() const { return 2 * layers * hidden; }  // of a state tile
  L2L_HOST_DEVICE int h_row(int layer) const { return 2 * layer * hidden; }
  L2L_HOST_DEVICE int c_row(int layer) const { return (2 * layer + 1) * hidden; }

  // Offsets into phi.
  L2L_HOST_DEVICE int layer_size(int layer) const { return kGates * hidden * (inputs(layer) + hidden + 1); }
  L2L_HOST_DEVICE int layer_begin(int layer) const {
    return layer == 0 ? 0 : layer_size(0) + (layer - 1) * layer_size(1);
  }
  L2L_HOST_DEVICE int weight_ih(int layer) const { return layer_begin(layer); }
  L2L_HOST_DEVICE int weight_hh(int layer) const { return layer_begin(layer) + kGates * hidden * inputs(layer); }
  L2L_HOST_DEVICE int bias(int layer) const { return weight_hh(layer) + kGates * hidden * hidden; }
  L2L_HOST_DEVICE int weight_out() const { return layer_begin(layers); }
  L2L_HOST_DEVICE int bias_out() const { return weight_out() + outputs * hidden; }
  L2L_HOST_DEVICE int phi_size() const { return bias_out() + outputs; }
};

L2L_HOST_DEVICE int64_t tiles_for(int64_t numel) { return (numel + kTile - 1) / kTile; }

}  // namespace l2l
