// The step of the learned optimizer on one tile of 64 coordinates.
//
// Lanes are coordinates. A unit's four gates for all 64 lanes live in registers (AVX-512: 16 accumulators), are turned
// into c' and h' there, and only those are stored. Per coordinate with 2 layers of 20 units: 4,980 multiply-adds, 200
// transcendentals, 320 bytes of state read and 320 written; weights (20 kB) and the tile (20 kB) stay in the L1 cache.
#pragma once

#include "features.h"
#include "products.h"

namespace l2l {
namespace L2L_ISA {

// Accumulators: 4 gates x kStepVectors, in 32 registers (AVX-512) or 16.
constexpr int kStepVectors = kLanes == 16 ? 4 : 2;

// One layer, unit by unit. Where its cells are is the caller's: cells.load(unit, lane) gives c, cells.store(unit, lane,
// c, h) takes the new ones, cells.end(unit) comes behind all lanes of a unit.
template <class Cells>
static L2L_ALWAYS_INLINE void forward_units(const LayerForward& f, Cells& cells) {
  constexpr int width = kStepVectors * kLanes;
  for (int j = 0; j < f.hidden; j++) {
    const float* weights = f.weights + 4L * j * (1 + f.inputs + f.recurrent);
    const float* bias = f.bias ? f.bias + 4L * j : nullptr;
    for (int lane = 0; lane < kTile; lane += width) {
      Wide<kStepVectors> a[1][4];
      gate_preactivations<1, kStepVectors>(weights, bias, {f.x + lane, kTile}, f.inputs, {f.h + lane, kTile},
                                           f.recurrent, a);
      Wide<kStepVectors> cell = cells.load(j, lane);
      const Wide<kStepVectors> out = cell_step<Math<kStepVectors>>(a[0][0], a[0][1], a[0][2], a[0][3], cell);
      cells.store(j, lane, cell, out);
    }
    cells.end(j);
  }
}

// In rows of floats.
struct FloatCells {
  const float* c;
  float *new_c, *new_h;

  L2L_ALWAYS_INLINE Wide<kStepVectors> load(int unit, int lane) const {
    return load_wide<kStepVectors>(c + (long)unit * kTile + lane);
  }
  L2L_ALWAYS_INLINE void store(int unit, int lane, const Wide<kStepVectors>& cell, const Wide<kStepVectors>& h) const {
    store_wide(new_c + (long)unit * kTile + lane, cell);
    store_wide(new_h + (long)unit * kTile + lane, h);
  }
  L2L_ALWAYS_INLINE void end(int) const {}
};

static void layer_forward(const LayerForward& f) {
  FloatCells cells{f.c, f.new_c, f.new_h};
  forward_units(f, cells);
}

// [read_outs][64] from the h of the last layer.
static void read_out(const Network& net, const float* h, float* out) {
  const int hidden = net.config.hidden;
  for (int o = 0; o < net.config.read_outs(); o++)
    for (int lane = 0; lane < kTile; lane += kLanes) {
      vf u = broadcast(net.bias_out[o]);
      for (int j = 0; j < hidden; j++) u += net.weight_out[o * hidden + j] * load(h + (long)j * kTile + lane);
      store(out + o * kTile + lane, u);
    }
}

static void step(const Network& net, const TensorStep& tensor, const float* inputs, const float* state,
                 float* new_state, float* out) {
  const Config& config = net.config;
  const int hidden = config.hidden;
  // New h of a layer: all its units still read the old h, so in place it waits here.
  alignas(64) float waiting[kMaxHidden * kTile];
  const float* below = inputs;
  for (int l = 0; l < config.layers; l++) {
    const long h = (long)config.h_row(l) * kTile, c = (long)config.c_row(l) * kTile;
    float* new_h = state == new_state ? waiting : new_state + h;
    layer_forward({net.layer[l].forward, l == 0 ? tensor.bias : nullptr, hidden, below, config.inputs(l), state + h,
                   hidden, state + c, new_state + c, new_h});
    if (new_h == waiting) __builtin_memcpy(new_state + h, waiting, sizeof(float) * kTile * hidden);
    below = new_state + h;
  }
  read_out(net, below, out);
}

}  // namespace L2L_ISA
}  // namespace l2l
