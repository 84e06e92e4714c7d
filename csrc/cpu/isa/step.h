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

// How a layer is computed, here in float32; bfloat16.h has the other way. `operands` gives the rows that the products
// read, made of rows of floats: these are such.
struct FloatProducts {
  static constexpr bool kCopies = false;  // whether operands are copies of the rows
  struct Buffer {};

  static L2L_ALWAYS_INLINE const float* operands(const float* rows, int, int, Buffer&) { return rows; }

  template <int Units, int Vectors>
  static L2L_ALWAYS_INLINE void preactivations(const LayerForward& f, int j, int lane, Wide<Vectors> (&a)[Units][4]) {
    gate_preactivations<Units, Vectors>(f.weights + 4L * j * (1 + f.inputs + f.recurrent),
                                        f.bias ? f.bias + 4L * j : nullptr, {f.x + lane, kTile}, f.inputs,
                                        {f.h + lane, kTile}, f.recurrent, a);
  }
  template <int N>
  static L2L_ALWAYS_INLINE Wide<N> cell(const Wide<N> (&a)[4], Wide<N>& c) {
    return cell_step<Math<N>>(a[0], a[1], a[2], a[3], c);
  }
};

// Units [j, j + Units) of one layer for Vectors vectors of coordinates.
template <class Products, int Units, int Vectors, class Cells>
static L2L_ALWAYS_INLINE void forward_block(const LayerForward& f, int j, int lane, Cells& cells) {
  Wide<Vectors> a[Units][4];
  Products::template preactivations<Units, Vectors>(f, j, lane, a);
  L2L_UNROLL for (int u = 0; u < Units; u++) {
    Wide<Vectors> cell = cells.template load<Vectors>(j + u, lane);
    const Wide<Vectors> out = Products::cell(a[u], cell);
    cells.store(j + u, lane, cell, out);
  }
}

template <class Products, int Units, int Vectors, class Cells>
static L2L_ALWAYS_INLINE void forward_units(const LayerForward& f, Cells& cells) {
  int j = 0;
  for (; j + Units <= f.hidden; j += Units) {
    for (int lane = 0; lane < f.lanes; lane += Vectors * kLanes)
      forward_block<Products, Units, Vectors>(f, j, lane, cells);
    for (int u = 0; u < Units; u++) cells.end(j + u);
  }
  for (; Units > 1 && j < f.hidden; j++) {
    for (int lane = 0; lane < f.lanes; lane += Vectors * kLanes) forward_block<Products, 1, Vectors>(f, j, lane, cells);
    cells.end(j);
  }
}

// The lanes that a layer computes for so many coordinates: whole vectors.
static L2L_ALWAYS_INLINE int computed_lanes(int lanes) {
  const int width = (lanes <= kLanes ? 1 : lanes <= 2 * kLanes ? 2 : kStepVectors) * kLanes;
  return (lanes + width - 1) / width * width;
}

// One layer, unit by unit, of as few vectors as hold its coordinates; a single one leaves registers for two units, whose
// multiply-adds hide each other's latency. Where its cells are is the caller's: cells.load<Vectors>(unit, lane) gives c,
// cells.store(unit, lane, c, h) takes the new ones, cells.end(unit) comes behind all lanes of a unit.
template <class Products, class Cells>
static L2L_ALWAYS_INLINE void forward_units(const LayerForward& f, Cells& cells) {
  if (f.lanes <= kLanes)
    forward_units<Products, 2, 1>(f, cells);
  else if (kStepVectors > 2 && f.lanes <= 2 * kLanes)
    forward_units<Products, 1, 2>(f, cells);
  else
    forward_units<Products, 1, kStepVectors>(f, cells);
}

// Behind the lanes that a layer computes there are zeros: rows of h and c hold no garbage.
static L2L_ALWAYS_INLINE void clear_lanes(float* row, int computed) {
  if (computed < kTile) __builtin_memset(row + computed, 0, sizeof(float) * (kTile - computed));
}

// A row of the next tile: a stream of tiles has too many rows for the processor to foresee.
static L2L_ALWAYS_INLINE void prefetch_row(const float* row) {
  L2L_UNROLL for (int i = 0; i < kTile; i += 16) __builtin_prefetch(row + i, 1, 3);
}

// In rows of floats.
struct FloatCells {
  const float* c;
  float *new_c, *new_h;
  const float *next_h, *next_c;
  int computed;

  template <int N>
  L2L_ALWAYS_INLINE Wide<N> load(int unit, int lane) const {
    return load_wide<N>(c + (long)unit * kTile + lane);
  }
  template <int N>
  L2L_ALWAYS_INLINE void store(int unit, int lane, const Wide<N>& cell, const Wide<N>& h) const {
    store_wide(new_c + (long)unit * kTile + lane, cell);
    store_wide(new_h + (long)unit * kTile + lane, h);
  }
  L2L_ALWAYS_INLINE void end(int unit) const {
    clear_lanes(new_c + (long)unit * kTile, computed);
    clear_lanes(new_h + (long)unit * kTile, computed);
    if (!next_h) return;
    prefetch_row(next_h + (long)unit * kTile);
    prefetch_row(next_c + (long)unit * kTile);
  }
};

template <class Products>
static L2L_ALWAYS_INLINE void float_layer(const LayerForward& f) {
  FloatCells cells{f.c, f.new_c, f.new_h, f.next_h, f.next_c, computed_lanes(f.lanes)};
  forward_units<Products>(f, cells);
}

static void layer_forward(const LayerForward& f) { float_layer<FloatProducts>(f); }

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

template <class Products>
static L2L_ALWAYS_INLINE void step_with(const Network& net, const TensorStep& tensor, const float* inputs,
                                        const float* state, float* new_state, int count, const float* next_state,
                                        float* out) {
  const Config& config = net.config;
  const int hidden = config.hidden, lanes = computed_lanes(count);
  // New h of a layer: all its units still read the old h, so in place it waits here.
  alignas(64) float waiting[Products::kCopies ? 1 : kMaxHidden * kTile];
  const bool waits = !Products::kCopies && state == new_state;
  typename Products::Buffer x_buffer, h_buffer;
  const float* below = inputs;
  for (int l = 0; l < config.layers; l++) {
    const long h = (long)config.h_row(l) * kTile, c = (long)config.c_row(l) * kTile;
    float* new_h = waits ? waiting : new_state + h;
    const float *next_h = next_state ? next_state + h : nullptr, *next_c = next_state ? next_state + c : nullptr;
    const float* x = Products::operands(below, config.inputs(l), lanes, x_buffer);
    const float* old_h = Products::operands(state + h, hidden, lanes, h_buffer);
    float_layer<Products>({net.layer[l].forward, l == 0 ? tensor.bias : nullptr, hidden, x, config.inputs(l), old_h,
                           hidden, state + c, new_state + c, new_h, count, next_h, next_c});
    if (waits) __builtin_memcpy(new_state + h, waiting, sizeof(float) * kTile * hidden);
    below = new_state + h;
  }
  for (int r = 0; next_state && r < config.averages(); r++)
    prefetch_row(next_state + (config.average_row() + r) * kTile);
  read_out(net, below, out);
}

static void step(const Network& net, const TensorStep& tensor, const float* inputs, const float* state,
                 float* new_state, int count, const float* next_state, float* out) {
  step_with<FloatProducts>(net, tensor, inputs, state, new_state, count, next_state, out);
}

}  // namespace L2L_ISA
}  // namespace l2l
