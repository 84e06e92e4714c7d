// Back-propagation through T steps of the learned optimizer on one tile, from gradients and start state alone.
//
// A tile is done in sub-tiles of 32 lanes. The steps run forward once more; their states, gate activations and tanh(c)
// stay in scratch (T = 20, 2 layers of 20 units: 720 kB, sized for a level-2 cache). The walk back turns the
// activations into gate gradients in place, and weight gradients are formed for all steps at once, of a short segment
// for both sub-tiles, so that each sum is loaded and stored once, not once per step. Multiply-adds per coordinate and
// step: 4,820 again forward, 4,800 to the inputs, 4,980 to the weights.
//
// Long segments are cut into chunks that fit the scratch: a first pass forward leaves the state at the start of each.
// The last chunk alone needs no second pass, so it is as long as any and the rest that is shorter comes first. Lengths
// depend on the network and on T only, so results do not depend on the machine's threads.
#pragma once

#include "step.h"

namespace l2l {
namespace L2L_ISA {

constexpr int kSub = 32;
constexpr int kSubVectors = kSub / kLanes;
constexpr int kUnits = kLanes == 16 ? 2 : 1;    // units whose gates are in registers together
constexpr int kVectors = 2;                     // with vectors of lanes each
constexpr int kColumns = kLanes == 16 ? 5 : 3;  // inputs per block of a weight gradient
constexpr size_t kScratchBudget = 768 * 1024;   // bytes for the steps of a chunk
constexpr long kWidth = kVectors * kLanes;

static L2L_ALWAYS_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

// Where things are in the scratch of one sub-tile, in floats.
struct Scratch {
  int steps;                                            // per chunk
  int together;                                         // sub-tiles that are in the scratch at once: R = 1 or 2
  long features, states, gates, tanh_c;                 // [steps][R][...], states [steps + 1][R][...]
  long feature_size, state_size, gate_size, cell_size;  // of one step
  long upstream_size;
  long checkpoints;  // [chunks][state_size]
  long dh, dc;       // [layers][hidden rounded up][kSub], [layers][hidden][kSub]
  long dx;           // [4][kSub]: d features
  long upstream;     // [steps][R][read_outs][kSub], of networks with averages
  long dh_layer;     // size of one layer in dh
  long total;

  Scratch(const Config& c, int all_steps, int sub_tiles) {
    feature_size = (long)c.features() * kSub;
    state_size = (long)c.rows() * kSub;
    gate_size = 4L * c.layers * c.hidden * kSub;
    cell_size = (long)c.layers * c.hidden * kSub;
    upstream_size = c.averages() > 0 ? (long)c.read_outs() * kSub : 0;
    const long step = feature_size + state_size + gate_size + cell_size + upstream_size;
    const long fitting = (long)(kScratchBudget / sizeof(float)) / step;
    steps = fitting < 1 ? 1 : fitting < all_steps ? (int)fitting : all_steps;
    const long chunks = (all_steps + steps - 1) / steps;
    together = (long)sub_tiles * all_steps <= fitting ? sub_tiles : 1;
    const long slots = (long)steps * together;
    dh_layer = (long)round_up(c.hidden, 4) * kSub;
    features = 0;
    states = features + slots * feature_size;
    gates = states + (slots + together) * state_size;
    tanh_c = gates + slots * gate_size;
    checkpoints = tanh_c + slots * cell_size;
    dh = checkpoints + chunks * state_size;
    dc = dh + c.layers * dh_layer;
    dx = dc + c.layers * cell_size;
    upstream = dx + 4 * kSub;
    total = upstream + slots * upstream_size;
  }
};

static size_t backward_scratch(const Config& config, int steps) {
  const long both = Scratch(config, steps, kTile / kSub).total, one = Scratch(config, steps, 1).total;
  return sizeof(float) * (both > one ? both : one);
}

// Units [j, j + Units) of one layer, keeping the activations. bias: [hidden][4] in the place of w's, or null.
template <int Units>
static L2L_ALWAYS_INLINE void forward_units(const LayerWeights& w, const float* bias, int hidden, int j, const float* x,
                                            int inputs, const float* h, const float* c, float* new_h, float* new_c,
                                            float* gates, float* tanh_c) {
  for (long lane = 0; lane < kSub; lane += kWidth) {
    Wide<kVectors> a[Units][4];
    gate_preactivations<Units, kVectors>(w.forward + 4L * j * (1 + inputs + hidden), bias ? bias + 4L * j : nullptr,
                                         {x + lane, kSub}, inputs, {h + lane, kSub}, hidden, a);
    // The units' lanes side by side: one unit alone would leave the multipliers waiting.
    constexpr int N = Units * kVectors;
    Wide<N> i, f, g, o, cell;
  L2L_UNROLL for (int u = 0; u < Units; u++)
      L2L_UNROLL for (int v = 0; v < kVectors; v++) {
        i.v[u * kVectors + v] = a[u][0].v[v];
        f.v[u * kVectors + v] = a[u][1].v[v];
        g.v[u * kVectors + v] = a[u][2].v[v];
        o.v[u * kVectors + v] = a[u][3].v[v];
        cell.v[u * kVectors + v] = load(c + (j + u) * kSub + lane + v * kLanes);
      }
    Gates<Wide<N>> kept;
    const Wide<N> out = cell_forward<Math<N>>(i, f, g, o, cell, kept);
    L2L_UNROLL for (int u = 0; u < Units; u++)
      L2L_UNROLL for (int v = 0; v < kVectors; v++) {
        const int n = u * kVectors + v;
        const long at = (j + u) * kSub + lane + v * kLanes;
        store(new_c + at, cell.v[n]);
        store(new_h + at, out.v[n]);
        store(tanh_c + at, kept.tanh_c.v[n]);
        float* gate = gates + 4L * (j + u) * kSub + lane + v * kLanes;
        store(gate, kept.i.v[n]);
        store(gate + kSub, kept.f.v[n]);
        store(gate + 2 * kSub, kept.g.v[n]);
        store(gate + 3 * kSub, kept.o.v[n]);
      }
  }
}

// One step of all layers: x are its features; state -> new_state, gates [layers][4 * hidden][kSub], tanh_c.
static void forward_step(const Network& net, const TensorStep& tensor, const float* x, const float* state,
                         float* new_state, float* gates, float* tanh_c) {
  const int hidden = net.config.hidden;
  for (int l = 0; l < net.config.layers; l++) {
    const int inputs = net.config.inputs(l);
    const float* bias = l == 0 ? tensor.bias : nullptr;
    const long h = (long)net.config.h_row(l) * kSub, c = (long)net.config.c_row(l) * kSub;
    float* layer_gates = gates + 4L * l * hidden * kSub;
    float* layer_tanh = tanh_c + (long)l * hidden * kSub;
    int j = 0;
    for (; j + kUnits <= hidden; j += kUnits)
      forward_units<kUnits>(net.layer[l], bias, hidden, j, x, inputs, state + h, state + c, new_state + h,
                            new_state + c, layer_gates, layer_tanh);
    for (; j < hidden; j++)
      forward_units<1>(net.layer[l], bias, hidden, j, x, inputs, state + h, state + c, new_state + h, new_state + c,
                       layer_gates, layer_tanh);
    x = new_state + h;
  }
}

// Activations -> gradients of the pre-activations, in place; dc: gradient of c' -> gradient of c.
static void backward_cells(int hidden, float* gates, const float* tanh_c, const float* c, const float* dh, float* dc) {
  for (int j = 0; j < hidden; j++)
    L2L_UNROLL for (int v = 0; v < kSubVectors; v++) {
      const long at = j * kSub + v * kLanes;
      float* gate = gates + 4L * j * kSub + v * kLanes;
      const Gates<vf> g{load(gate), load(gate + kSub), load(gate + 2 * kSub), load(gate + 3 * kSub), load(tanh_c + at)};
      vf d = load(dc + at);
      const GateGradients<vf> da = cell_backward<vf>(g, load(c + at), load(dh + at), d);
      store(dc + at, d);
      store(gate, da.i);
      store(gate + kSub, da.f);
      store(gate + 2 * kSub, da.g);
      store(gate + 3 * kSub, da.o);
    }
}

// out[k] (+)= gradient of input k, for `inputs` rounded up to 4.
template <bool Add>
static void input_gradients(const float* weights, const float* gates, int hidden, int inputs, float* out) {
  const int rows = 4 * hidden;
  for (long lane = 0; lane < kSub; lane += kWidth) {
    int k = 0;
    for (; k + 4 * kUnits <= round_up(inputs, 4); k += 4 * kUnits)
      transposed_product<kUnits, kVectors, Add>(weights + (long)k * rows, gates + lane, kSub, rows, out + k * kSub + lane);
    for (; k < inputs; k += 4)
      transposed_product<1, kVectors, Add>(weights + (long)k * rows, gates + lane, kSub, rows, out + k * kSub + lane);
  }
}

// Weight gradients of all units with respect to `inputs` inputs, cut into nearly equal blocks of at most kColumns.
//   out [hidden][out_stride]: the sums of one unit start every out_stride doubles, 4 per input.
static void weight_gradients(StepRows gates, StepRows x, int steps, int hidden, int inputs, double* out, long out_stride) {
  const int blocks = (inputs + kColumns - 1) / kColumns;
  for (int b = 0, k = 0; b < blocks; b++) {
    const int columns = (inputs - k) / (blocks - b);
    const StepRows xs{x.data + k * x.stride, x.step, x.stride};
    for (int j = 0; j < hidden; j++) {
      const StepRows d{gates.data + 4L * j * gates.stride, gates.step, gates.stride};
      double* sums = out + j * out_stride + 4L * k;
      switch (columns) {
        case 1: weight_gradient<1, kSubVectors>(d, xs, steps, sums); break;
        case 2: weight_gradient<2, kSubVectors>(d, xs, steps, sums); break;
        case 3: weight_gradient<3, kSubVectors>(d, xs, steps, sums); break;
#if L2L_LANES == 16
        case 4: weight_gradient<4, kSubVectors>(d, xs, steps, sums); break;
        default: weight_gradient<5, kSubVectors>(d, xs, steps, sums); break;
#endif
      }
    }
    k += columns;
  }
}

// d phi of one layer of `steps` steps: the gate gradients times its inputs and previous h.
static L2L_ALWAYS_INLINE void layer_weight_gradients(const Config& config, int layer, StepRows gates, StepRows x,
                                                     StepRows h, int steps, double* grad_phi) {
  const PackedLayout layout(config);
  const int hidden = config.hidden, inputs = config.inputs(layer);
  double* out = grad_phi + 4L * layout.layer(layer);
  const long unit = 4L * layout.unit(layer);
  weight_gradients(gates, x, steps, hidden, inputs, out + 4, unit);
  weight_gradients(gates, h, steps, hidden, hidden, out + 4 + 4L * inputs, unit);
  for (int j = 0; j < hidden; j++)
    row_sums<kSubVectors>({gates.data + 4L * j * gates.stride, gates.step, gates.stride}, steps, out + j * unit);
}

// d of the weights of the inputs per tensor: in every step the sums over the lanes, times what was the same for all.
static void tensor_weight_gradients(const Config& config, StepRows gates, const TensorStep* tensor, int together,
                                    int slots, double* out) {
  for (int t = 0; t < slots; t++)
    for (int j = 0; j < config.hidden; j++) {
      double sums[4] = {};
      row_sums<kSubVectors>({gates.data + t * gates.step + 4L * j * gates.stride, 0, gates.stride}, 1, sums);
      double* quadruple = out + 4L * j * config.tensor_inputs;
      for (int k = 0; k < config.tensor_inputs; k++, quadruple += 4)
        L2L_UNROLL for (int g = 0; g < 4; g++) quadruple[g] += sums[g] * (double)tensor[t / together].inputs[k];
    }
}

// d phi of a chunk: `gates` now holds gate gradients. upstream: of the rows of the read-out, as `gates` step after step
// of the sub-tiles together.
static void chunk_weight_gradients(const Network& net, const Scratch& s, const float* base, StepRows upstream,
                                   const TensorStep* tensor, int steps, double* grad_phi) {
  const Config& config = net.config;
  const int slots = steps * s.together;
  const float* after = base + s.states + s.together * s.state_size;
  const int hidden = config.hidden;
  for (int l = 0; l < config.layers; l++) {
    const StepRows gates{base + s.gates + 4L * l * hidden * kSub, s.gate_size, kSub};
    const StepRows below = l == 0 ? StepRows{base + s.features, s.feature_size, kSub}
                                  : StepRows{after + (long)config.h_row(l - 1) * kSub, s.state_size, kSub};
    const StepRows previous{base + s.states + (long)config.h_row(l) * kSub, s.state_size, kSub};
    layer_weight_gradients(config, l, gates, below, previous, slots, grad_phi);
  }
  // The read-out: weight_out . h + bias_out.
  const float* last = after + (long)config.h_row(config.layers - 1) * kSub;
  double* out = grad_phi + 4L * PackedLayout(config).out(config.layers);
  const int read_outs = config.read_outs();
  for (int r = 0; r < read_outs; r++)
    for (int j = 0; j <= hidden; j++) {
      vf sum{};
      for (int t = 0; t < slots; t++)
        L2L_UNROLL for (int v = 0; v < kSubVectors; v++) {
          const vf d = load(upstream.data + t * upstream.step + r * upstream.stride + v * kLanes);
          sum += j < hidden ? d * load(last + t * s.state_size + j * kSub + v * kLanes) : d;
        }
      out[j < hidden ? r * hidden + j : read_outs * hidden + r] += (double)sum_lanes(sum, vf{}, vf{}, vf{})[0];
    }
  if (config.tensor_inputs > 0)
    tensor_weight_gradients(config, {base + s.gates, s.gate_size, kSub}, tensor, s.together, slots,
                            out + read_outs * (hidden + 1));
}

// Of networks with averages: d loss / d read-out [2][kSub], from that of the update, as the head computes it from the
// new state.
static void read_out_gradients(const Network& net, const TensorStep& tensor, const float* grad, const float* features,
                               const float* new_state, const float* du, float* out) {
  const Config& config = net.config;
  const float* h = new_state + (long)config.h_row(config.layers - 1) * kSub;
  for (int v = 0; v < kSub; v += kLanes) {
    Wide<1> row[kNormalizedReadOuts];
    for (int r = 0; r < kNormalizedReadOuts; r++) {
      vf sum = broadcast(net.bias_out[r]);
      for (int j = 0; j < config.hidden; j++) sum += net.weight_out[r * config.hidden + j] * load(h + j * kSub + v);
      row[r].v[0] = sum;
    }
    const Wide<1> n = direction(tensor, grad + v, new_state + (long)config.average_row() * kSub + v, kSub,
                                features + kLogRatio * kSub + v);
    normalized_update_backward<Math<1>>(tensor.nominal, config.output_scale, n, load_wide<1>(du + v), row[0], row[1]);
    for (int r = 0; r < kNormalizedReadOuts; r++) store_wide(out + r * kSub + v, row[r]);
  }
}

static void copy_rows(const float* from, long from_stride, float* to, long to_stride, int rows) {
  for (int r = 0; r < rows; r++) __builtin_memcpy(to + r * to_stride, from + r * from_stride, sizeof(float) * kSub);
}

static void backward_sub_tile(const Network& net, const BackwardTile& tile, int lane, const Scratch& s, float* base) {
  const Config& config = net.config;
  const int hidden = config.hidden, layers = config.layers, read_outs = config.read_outs();
  const long averages = (long)config.average_row() * kSub;
  const int chunks = (tile.steps + s.steps - 1) / s.steps;
  float* dh = base + s.dh;
  float* dc = base + s.dc;
  const int own = s.together > 1 ? lane / kSub : 0;
  const auto slot = [&](int t) __attribute__((always_inline)) { return (long)t * s.together + own; };
  const auto state = [&](int t) __attribute__((always_inline)) { return base + s.states + slot(t) * s.state_size; };
  const auto begin = [&](int chunk) __attribute__((always_inline)) {
    return chunk == 0 ? 0 : tile.steps - (chunks - chunk) * s.steps;
  };

  const auto forward = [&](int first, int steps) __attribute__((always_inline)) {
    for (int t = 0; t < steps; t++) {
      float* x = base + s.features + slot(t) * s.feature_size;
      const TensorStep& tensor = tile.tensor[first + t];
      features(net, tensor, tile.grads[first + t] + lane, kSub, state(t) + averages, state(t + 1) + averages, kSub, x,
               kSub);
      forward_step(net, tensor, x, state(t), state(t + 1), base + s.gates + slot(t) * s.gate_size,
                   base + s.tanh_c + slot(t) * s.cell_size);
    }
  };

  copy_rows(tile.state + lane, kTile, base + s.checkpoints, kSub, config.rows());
  for (int chunk = 0; chunk + 1 < chunks; chunk++) {
    __builtin_memcpy(state(0), base + s.checkpoints + chunk * s.state_size, sizeof(float) * s.state_size);
    const int steps = begin(chunk + 1) - begin(chunk);
    forward(begin(chunk), steps);
    __builtin_memcpy(base + s.checkpoints + (chunk + 1) * s.state_size, state(steps), sizeof(float) * s.state_size);
  }

  for (int l = 0; l < layers; l++) {
    float* dh_l = dh + l * s.dh_layer;
    float* dc_l = dc + (long)l * hidden * kSub;
    if (tile.grad_end_state) {
      copy_rows(tile.grad_end_state + (long)config.h_row(l) * kTile + lane, kTile, dh_l, kSub, hidden);
      copy_rows(tile.grad_end_state + (long)config.c_row(l) * kTile + lane, kTile, dc_l, kSub, hidden);
    } else {
      __builtin_memset(dh_l, 0, sizeof(float) * s.dh_layer);
      __builtin_memset(dc_l, 0, sizeof(float) * hidden * kSub);
    }
  }

  for (int chunk = chunks - 1; chunk >= 0; chunk--) {
    const int first = begin(chunk), steps = begin(chunk + 1) - first;
    __builtin_memcpy(state(0), base + s.checkpoints + chunk * s.state_size, sizeof(float) * s.state_size);
    forward(first, steps);

    // Of the rows of the read-out: of the update itself, unless that is made of them.
    StepRows upstream{tile.grad_updates + (long)first * kTile + lane, kTile, kTile};
    if (config.averages() > 0) {
      upstream = {base + s.upstream + own * s.upstream_size, s.together * s.upstream_size, kSub};
      for (int t = 0; t < steps; t++)
        read_out_gradients(net, tile.tensor[first + t], tile.grads[first + t] + lane,
                           base + s.features + slot(t) * s.feature_size, state(t + 1),
                           tile.grad_updates + (long)(first + t) * kTile + lane,
                           base + s.upstream + slot(t) * s.upstream_size);
    }

    for (int t = steps - 1; t >= 0; t--) {
      float* top = dh + (layers - 1) * s.dh_layer;
      for (int r = 0; r < read_outs; r++) {
        const float* d = upstream.data + t * upstream.step + r * upstream.stride;
        for (int j = 0; j < hidden; j++)
          L2L_UNROLL for (int v = 0; v < kSubVectors; v++) {
            float* at = top + j * kSub + v * kLanes;
            store(at, load(at) + load(d + v * kLanes) * net.weight_out[r * hidden + j]);
          }
      }
      for (int l = layers - 1; l >= 0; l--) {
        float* gates = base + s.gates + slot(t) * s.gate_size + 4L * l * hidden * kSub;
        float* dh_l = dh + l * s.dh_layer;
        backward_cells(hidden, gates, base + s.tanh_c + slot(t) * s.cell_size + (long)l * hidden * kSub,
                       state(t) + (long)config.c_row(l) * kSub, dh_l, dc + (long)l * hidden * kSub);
        input_gradients<false>(net.layer[l].backward_h, gates, hidden, hidden, dh_l);
        if (l > 0) input_gradients<true>(net.layer[l].backward_input, gates, hidden, hidden, dh_l - s.dh_layer);
      }
      if (tile.grad_grads && config.averages() > 0) {
        __builtin_memset(tile.grad_grads + (long)(first + t) * kTile + lane, 0, sizeof(float) * kSub);
      } else if (tile.grad_grads) {
        float* dx = base + s.dx;
        input_gradients<false>(net.layer[0].backward_input, base + s.gates + slot(t) * s.gate_size, hidden,
                               config.features(), dx);
        gradients_of_features(net, tile.grads[first + t] + lane, dx, kSub, kSub,
                              tile.grad_grads + (long)(first + t) * kTile + lane);
      }
    }
    if (s.together == 1)
      chunk_weight_gradients(net, s, base, upstream, tile.tensor + first, steps, tile.grad_phi);
  }

  if (tile.grad_state) {
    for (int l = 0; l < layers; l++) {
      copy_rows(dh + l * s.dh_layer, kSub, tile.grad_state + (long)config.h_row(l) * kTile + lane, kTile, hidden);
      copy_rows(dc + (long)l * hidden * kSub, kSub, tile.grad_state + (long)config.c_row(l) * kTile + lane, kTile, hidden);
    }
    for (int k = 0; k < config.averages(); k++)  // constants
      __builtin_memset(tile.grad_state + (long)(config.average_row() + k) * kTile + lane, 0, sizeof(float) * kSub);
  }
}

// Of a sub-tile without coordinates.
static void clear_gradients(const Config& config, const BackwardTile& tile, int lane) {
  for (int r = 0; tile.grad_state && r < config.rows(); r++)
    __builtin_memset(tile.grad_state + (long)r * kTile + lane, 0, sizeof(float) * kSub);
  for (int t = 0; tile.grad_grads && t < tile.steps; t++)
    __builtin_memset(tile.grad_grads + (long)t * kTile + lane, 0, sizeof(float) * kSub);
}

static void backward(const Network& net, const BackwardTile& tile, float* base) {
  const Scratch s(net.config, tile.steps, tile.count > kSub ? kTile / kSub : 1);
  for (int lane = 0; lane < kTile; lane += kSub) {
    if (lane < tile.count)
      backward_sub_tile(net, tile, lane, s, base);
    else
      clear_gradients(net.config, tile, lane);
  }
  if (s.together == 1) return;
  const StepRows upstream = net.config.averages() > 0 ? StepRows{base + s.upstream, s.upstream_size, kSub}
                                                      : StepRows{tile.grad_updates, kSub, kTile};
  chunk_weight_gradients(net, s, base, upstream, tile.tensor, tile.steps, tile.grad_phi);
}

}  // namespace L2L_ISA
}  // namespace l2l
