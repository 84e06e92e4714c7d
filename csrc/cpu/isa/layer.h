// Back-propagation through one layer of one step, for networks whose coordinates meet between layers (global averaging
// cells): there a tile cannot go through all layers and steps on its own, as it does in backward.h.
//
// The same products on sub-tiles of 32 lanes. Weight gradients are formed for several tiles at once, so that each sum
// is loaded and stored once for all of them.
#pragma once

#include "backward.h"

namespace l2l {
namespace L2L_ISA {

// Scratch, in floats: of every sub-tile what the weight gradients read, of one sub-tile the rest.
struct LayerScratch {
  long x, h, gates, step;  // [sub-tile][step]
  long c, new_h, new_c, tanh_c, dh, dc, dx, total;

  explicit LayerScratch(const Config& config) {
    const int hidden = config.hidden;
    const int widest = config.inputs(0) > hidden ? config.inputs(0) : hidden;
    x = 0;
    h = x + (long)widest * kSub;
    gates = h + (long)hidden * kSub;
    step = gates + 4L * hidden * kSub;
    c = step * kLayerTiles * (kTile / kSub);
    new_h = c + (long)hidden * kSub;
    new_c = new_h + (long)hidden * kSub;
    tanh_c = new_c + (long)hidden * kSub;
    dc = tanh_c + (long)hidden * kSub;
    dh = dc + (long)hidden * kSub;
    dx = dh + (long)round_up(hidden, 4 * kUnits) * kSub;
    total = dx + (long)round_up(widest, 4 * kUnits) * kSub;
  }
};

static size_t layer_backward_scratch(const Config& config) { return sizeof(float) * LayerScratch(config).total; }

static void add_rows(const float* from, float* to, int rows) {
  for (int r = 0; r < rows; r++) L2L_UNROLL for (int v = 0; v < kSub; v += kLanes)
      store(to + (long)r * kTile + v, load(to + (long)r * kTile + v) + load(from + (long)r * kSub + v));
}

static void layer_backward(const Network& net, int layer, const LayerBackward* tiles, int count, double* grad_phi,
                           float* scratch) {
  const Config& config = net.config;
  const LayerWeights& w = net.layer[layer];
  const LayerScratch s(config);
  const int hidden = config.hidden, inputs = config.inputs(layer);
  const auto rest = [&](long at) __attribute__((always_inline)) { return scratch + at; };

  int steps = 0;
  for (int i = 0; i < count; i++)
    for (int lane = 0; lane < tiles[i].lanes; lane += kSub, steps++) {
      const LayerBackward& tile = tiles[i];
      float* base = scratch + steps * s.step;
      float *x = base + s.x, *h = base + s.h, *gates = base + s.gates;
      copy_rows(tile.x + lane, kTile, x, kSub, inputs);
      copy_rows(tile.h + lane, kTile, h, kSub, hidden);
      copy_rows(tile.c + lane, kTile, rest(s.c), kSub, hidden);
      copy_rows(tile.dh + lane, kTile, rest(s.dh), kSub, hidden);
      copy_rows(tile.dc + lane, kTile, rest(s.dc), kSub, hidden);

      int j = 0;
      for (; j + kUnits <= hidden; j += kUnits)
        forward_units<kUnits>(w, nullptr, hidden, j, x, inputs, h, rest(s.c), rest(s.new_h), rest(s.new_c), gates, rest(s.tanh_c));
      for (; j < hidden; j++)
        forward_units<1>(w, nullptr, hidden, j, x, inputs, h, rest(s.c), rest(s.new_h), rest(s.new_c), gates, rest(s.tanh_c));
      backward_cells(hidden, gates, rest(s.tanh_c), rest(s.c), rest(s.dh), rest(s.dc));
      input_gradients<false>(w.backward_h, gates, hidden, hidden, rest(s.dh));
      copy_rows(rest(s.dh), kSub, tile.dh + lane, kTile, hidden);
      copy_rows(rest(s.dc), kSub, tile.dc + lane, kTile, hidden);
      if (tile.dx) {
        input_gradients<false>(w.backward_input, gates, hidden, inputs, rest(s.dx));
        add_rows(rest(s.dx), tile.dx + lane, inputs);
      }
    }

  layer_weight_gradients(config, layer, {scratch + s.gates, s.step, kSub}, {scratch + s.x, s.step, kSub},
                         {scratch + s.h, s.step, kSub}, steps, grad_phi);
}

static void read_out_backward(const Network& net, const float* h, const float* grad_out, float* dh, double* grad_phi) {
  const int hidden = net.config.hidden, outputs = net.config.read_outs();
  double* out = grad_phi + 4L * PackedLayout(net.config).out(net.config.layers);
  for (int o = 0; o < outputs; o++) {
    const float* d = grad_out + (long)o * kTile;
    for (int j = 0; j < hidden; j++) {
      const float weight = net.weight_out[o * hidden + j];
      vf sum{};
      for (int v = 0; v < kTile; v += kLanes) {
        float* at = dh + (long)j * kTile + v;
        store(at, load(at) + load(d + v) * weight);
        sum += load(d + v) * load(h + (long)j * kTile + v);
      }
      out[o * hidden + j] += (double)sum_lanes(sum, vf{}, vf{}, vf{})[0];
    }
    vf sum{};
    for (int v = 0; v < kTile; v += kLanes) sum += load(d + v);
    out[outputs * hidden + o] += (double)sum_lanes(sum, vf{}, vf{}, vf{})[0];
  }
}

}  // namespace L2L_ISA
}  // namespace l2l
