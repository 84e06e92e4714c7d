// Back-propagation with global averaging cells: through T recorded steps of all tensors, or through one functional
// step.
//
// The gradient of an averaged h is the mean of the gradients of its group's coordinates, so the walk back passes over
// all tiles for each layer of each step, with a barrier of the whole grid between passes. One cooperative launch; the
// last pass adds the blocks' sums of d phi.
//
// Owns: a block of 256 threads strides over tiles of 64 coordinates, always the same ones; a thread has one coordinate
//   and every fourth unit or input of it.
// Shared memory: the rows of a layer's inputs, padded against bank conflicts; the gate gradients of the tile; float32
//   sums of the weight gradients of one pass. Weights are read through the cache.
// Global memory: the gradient of the state, read and written in every pass; states: the one before every chunk of
//   steps, and those of one chunk, some 2 sqrt(T) in all.
// d phi: the sums of a pass are added to float64 sums of the block, those of all blocks in order: a number is only ever
//   added to by one thread.
#pragma once

#include <cooperative_groups.h>

#include "backward.cuh"
#include "gac_step.cuh"

namespace l2l {

constexpr int kGacThreads = 256;
constexpr int kGacParts = kGacThreads / kTile;
constexpr int kGacRow = kTile + 1;

struct GacBackwardEntry {
  int64_t end_tile;  // tiles of this and all previous entries
  int64_t numel;
  int64_t record_tile;    // where its tiles start in a record
  const float* state;     // before the first step
  const float* grad_end;  // d loss / d state after the last step, or null for zero
  float* grad_start;      // receives d loss / d state before the first step, or null
};

struct GacBackwardScalars {
  Config config;
  LogSign log_sign;
  const float* phi;
  int64_t tiles, groups;
  int32_t steps, chunk, chunks;
  int32_t segment;  // where in the table the T + 1 SegmentSteps are, in words, and behind them T pointers to averages
  // The functional step: one entry, one step. Rows of `total` coordinates.
  int64_t total;          // 0: a segment
  const float* extra;     // [extra][total]
  const float* grad_out;  // [outputs][total]
  View grad_grad;         // dense
  float* grad_extra;      // [extra][total]
  // Temporary memory.
  float4* weights;     // all layers as [H][1 + inputs + H]; then the read-out
  float* checkpoints;  // [chunks] states of all tiles
  float* states;       // [chunk + 1]
  float* grad_state;   // one
  float* adjoint;      // [tiles][64]: d loss / d theta
  float* group_means;  // [groups][gac]
  double* block_sums;  // [2][blocks][2][gac]: sums and how many were left out
  double* sums;        // [blocks][phi_size]
  float* grad_phi;
  TableRef table;
};

template <int Bytes>
struct GacBackwardArguments {
  GacBackwardScalars scalars;
  InlineTable<Bytes> table;
};

// Sizes, for any network.
L2L_HOST_DEVICE int gac_unit(const Config& c, int layer) { return 1 + c.inputs(layer) + c.hidden; }
L2L_HOST_DEVICE int gac_layer_begin(const Config& c, int layer) {
  return layer == 0 ? 0 : c.hidden * (gac_unit(c, 0) + (layer - 1) * gac_unit(c, 1));
}
L2L_HOST_DEVICE int gac_weight_floats(const Config& c) {
  return 4 * gac_layer_begin(c, c.layers) + c.outputs * (c.hidden + 1);
}
L2L_HOST_DEVICE int gac_columns(const Config& c) {  // the most inputs and h of a layer
  return (c.inputs(0) > c.hidden ? c.inputs(0) : c.hidden) + c.hidden;
}
struct GacShared {
  int gates, sums, inputs, features, means, bytes;  // first float of each

  L2L_HOST_DEVICE explicit GacShared(const Config& c) {
    gates = 0;
    sums = gates + 4 * c.hidden * kTile;
    inputs = sums + 4 * c.hidden * (1 + gac_columns(c));
    features = inputs + gac_columns(c) * kGacRow;
    means = features + kMaxFeatures * kTile;
    bytes = 4 * (means + c.hidden);
  }
};

// Element i of phi below the read-out: its layer's quadruple and gate.
__device__ __forceinline__ void pack_for_backward(const GacBackwardScalars& s) {
  const Config& c = s.config;
  float* floats = reinterpret_cast<float*>(s.weights);
  const int first = static_cast<int>(blockIdx.x) * kGacThreads + static_cast<int>(threadIdx.x);
  const int stride = static_cast<int>(gridDim.x) * kGacThreads;
  for (int l = 0; l < c.layers; l++) {
    const int unit = gac_unit(c, l), inputs = c.inputs(l);
    float* to = floats + 4 * gac_layer_begin(c, l);
    for (int i = first; i < kGates * c.hidden * unit; i += stride) {
      const int gate = i % kGates, quad = i / kGates, j = quad / unit, k = quad % unit, row = gate * c.hidden + j;
      const float w = k == 0        ? s.phi[c.bias(l) + row]
                      : k <= inputs ? s.phi[c.weight_ih(l) + row * inputs + k - 1]
                                    : s.phi[c.weight_hh(l) + row * c.hidden + k - 1 - inputs];
      to[i] = gate_scale(gate) * w;
    }
  }
  float* out = floats + 4 * gac_layer_begin(c, c.layers);
  for (int i = first; i < c.outputs * (c.hidden + 1); i += stride) {
    const bool update = i < c.hidden || i == c.outputs * c.hidden;
    out[i] = (update ? c.output_scale : 1.f) * s.phi[c.weight_out() + i];
  }
}

struct GacWalk {
  const GacBackwardScalars& s;
  const Table<GacBackwardEntry> table;
  float4 *gates, *pass_sums;  // shared
  float *inputs, *features, *means;
  double* cell_sums;  // [2][gac]
  int lane, part;

  // Of the current tile.
  const GacBackwardEntry* entry = nullptr;
  int64_t at = 0, tile = 0;  // among all tiles, in the tensor
  int count = 0;

  __device__ __forceinline__ const Config& config() const { return s.config; }
  __device__ __forceinline__ int64_t tile_floats() const { return static_cast<int64_t>(config().rows()) * kTile; }
  // The lane's row 0 of the current tile in a set of states.
  __device__ __forceinline__ float* in(float* states, int64_t slot = 0) const {
    return global(states) + (slot * s.tiles + at) * tile_floats() + lane;
  }
  __device__ __forceinline__ const SegmentStep& step(int t) const {
    return reinterpret_cast<const SegmentStep*>(table.words + s.segment)[t];
  }
  __device__ __forceinline__ const float* averages(int t, int layer) const {
    const int64_t* pointers = table.words + s.segment + (s.steps + 1) * static_cast<int64_t>(sizeof(SegmentStep) / 8);
    return reinterpret_cast<const float*>(pointers[t]) + layer * s.groups * config().gac;
  }
  __device__ __forceinline__ int64_t group() const {
    return s.groups == 1 ? 0 : (tile * kTile + lane) / (entry->numel / s.groups);
  }

  __device__ __forceinline__ void go_to(int64_t global_tile) {
    int64_t first_tile;
    entry = &table.find(global_tile, first_tile);
    at = global_tile;
    tile = global_tile - first_tile;
    const int64_t rest = entry->numel - tile * kTile;
    count = rest < kTile ? static_cast<int>(rest) : kTile;
  }
  template <class Visit>
  __device__ __forceinline__ void for_each_tile(const Visit& visit) {
    for (int64_t t = blockIdx.x; t < s.tiles; t += gridDim.x) {
      go_to(t);
      visit();
    }
  }

  // The same with sums over the tiles: in float32 over a few, in float64 over all that the block visits, which may be
  // hundreds of thousands.
  template <class Visit, class Flush>
  __device__ __forceinline__ void sum_over_tiles(int quadruples, const Visit& visit, const Flush& flush) {
    int held = 0;
    clear_sums(quadruples);
    for_each_tile([&] {
      if (held == kTilesInFloat) {
        flush();
        clear_sums(quadruples);
        held = 0;
      }
      visit();
      held++;
    });
    flush();
  }

  // ---- one tile on the way forward

  // A state from outside, or nothing; lanes beyond the last coordinate become zero.
  __device__ __forceinline__ void copy_in(const float* from, float* to) const {
    from += from ? tile * tile_floats() + lane : 0;
    for (int r = part; r < config().rows(); r += kGacParts)
      to[r * kTile] = from && lane < count ? from[r * kTile] : 0.f;
  }
  __device__ __forceinline__ void copy(const float* from, float* to) const {
    for (int r = part; r < config().rows(); r += kGacParts) to[r * kTile] = from[r * kTile];
  }

  __device__ __forceinline__ float gradient(int t) const {
    const float* record = step(t).record;
    return record && lane < count ? record[(entry->record_tile + tile) * kTile + lane] : 0.f;
  }

  // The inputs of a layer in step t, and its h before it. Barriers before and after are the caller's.
  __device__ __forceinline__ void load_inputs(int t, int layer, const float* before, const float* after) const {
    const Config& c = config();
    const int n = c.inputs(layer);
    if (layer == 0) {
      if (part == 0) {
        const float g = gradient(t);
        float magnitude = g, sign = 0.f;
        if (c.preprocess == Preprocess::log_sign) log_sign<DeviceMath>(s.log_sign, g, magnitude, sign);
        inputs[lane] = magnitude;
        if (c.features() > 1) inputs[kGacRow + lane] = sign;
      }
      for (int e = part; e < c.extra; e += kGacParts)
        inputs[(c.features() + e) * kGacRow + lane] = lane < count ? s.extra[e * s.total + tile * kTile + lane] : 0.f;
    } else {
      for (int k = part; k < n; k += kGacParts)
        inputs[k * kGacRow + lane] = after[static_cast<int64_t>(c.h_row(layer - 1) + k) * kTile];
    }
    for (int k = part; k < c.hidden; k += kGacParts)
      inputs[(n + k) * kGacRow + lane] = before[static_cast<int64_t>(c.h_row(layer) + k) * kTile];
  }

  __device__ __forceinline__ float4 preactivations(int layer, int j) const {
    const int unit = gac_unit(config(), layer);
    const float4* w = global(s.weights) + gac_layer_begin(config(), layer) + j * unit;
    float4 a = w[0];
    for (int k = 1; k < unit; k++) {
      const float4 v = w[k];
      const float x = inputs[(k - 1) * kGacRow + lane];
      a.x += v.x * x;
      a.y += v.y * x;
      a.z += v.z * x;
      a.w += v.w * x;
    }
    return a;
  }

  __device__ __forceinline__ void forward_step(int t, const float* before, float* after) const {
    const Config& c = config();
    for (int l = 0; l < c.layers; l++) {
      __syncthreads();
      load_inputs(t, l, before, after);
      __syncthreads();
      float* h = after + static_cast<int64_t>(c.h_row(l)) * kTile;
      for (int j = part; j < c.hidden; j += kGacParts) {
        const float4 a = preactivations(l, j);
        const int64_t row = static_cast<int64_t>(c.c_row(l) + j) * kTile;
        float cell = before[row];
        const float y = cell_step<DeviceMath>(a.x, a.y, a.z, a.w, cell);
        after[row] = cell;
        // What is not finite is in no average and goes on itself.
        h[j * kTile] = j < c.gac && lane < count && isfinite(y) ? averages(t, l)[group() * c.gac + j] : y;
      }
    }
    __syncthreads();
  }

  // Steps [first, first + n) of the tile; state 0 of the chunk is there.
  __device__ __forceinline__ void forward(int first, int n) const {
    for (int t = 0; t < n; t++) forward_step(first + t, in(s.states, t), in(s.states, t + 1));
  }

  // ---- passes on the way back

  // Adds the tile's gradients of the averaged cells of `layer`, which are complete, of the coordinates that are in the
  // averages of the states `slot` + 1.
  __device__ __forceinline__ void add_cells(int slot, int layer) const {
    if (s.groups != 1) return;
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32, half = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = static_cast<int64_t>(config().h_row(layer)) * kTile;
    const float* rows = global(s.grad_state) + at * tile_floats() + row;
    const float* h = global(s.states) + ((slot + 1) * s.tiles + at) * tile_floats() + row;
    for (int k = warp; k < config().gac; k += kGacThreads / 32) {
      double sum = 0.;
      int left_out = 0;
      for (int i = half; i < kTile; i += 32) {
        const bool in = i < count && isfinite(h[k * kTile + i]);
        sum += in ? static_cast<double>(rows[k * kTile + i]) : 0.;
        left_out += __popc(__ballot_sync(0xffffffffu, i < count && !in));
      }
      sum = warp_sum(sum);
      if (half == 0) {
        cell_sums[k] += sum;
        cell_sums[config().gac + k] += static_cast<double>(left_out);
      }
    }
  }

  // After a pass that called add_cells(slot, layer) for every tile: the averages in `means`, or in group_means. `turn`
  // alternates between 0 and 1.
  __device__ __forceinline__ void average(int slot, int layer, int turn, double coordinates) const {
    const int cells = config().gac, warp = static_cast<int>(threadIdx.x) / 32;
    const int half = static_cast<int>(threadIdx.x) % 32;
    if (cells == 0) return;
    __syncthreads();
    if (s.groups == 1) {
      double* rows = s.block_sums + static_cast<int64_t>(turn) * gridDim.x * 2 * cells;
      for (int k = static_cast<int>(threadIdx.x); k < 2 * cells; k += kGacThreads) {
        rows[static_cast<int64_t>(blockIdx.x) * 2 * cells + k] = cell_sums[k];
        cell_sums[k] = 0.;
      }
      cooperative_groups::this_grid().sync();
      for (int k = warp; k < cells; k += kGacThreads / 32) {
        double sum = 0., left_out = 0.;
        for (unsigned i = half; i < gridDim.x; i += 32) {
          sum += rows[static_cast<int64_t>(i) * 2 * cells + k];
          left_out += rows[static_cast<int64_t>(i) * 2 * cells + cells + k];
        }
        sum = warp_sum(sum);
        left_out = warp_sum(left_out);
        if (half == 0) means[k] = quotient_of(sum, coordinates - left_out);
      }
      __syncthreads();
      return;
    }
    cooperative_groups::this_grid().sync();
    const GacBackwardEntry* entries = reinterpret_cast<const GacBackwardEntry*>(table.words);
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kGacThreads / 32);
    for (int64_t g = static_cast<int64_t>(blockIdx.x) * (kGacThreads / 32) + warp; g < s.groups; g += warps)
      for (int k = 0; k < cells; k++) {
        double sum = 0., members = 0.;
        for (int e = 0; e < table.ref.entries; e++) {
          const int64_t size = entries[e].numel / s.groups, begin = e == 0 ? 0 : entries[e - 1].end_tile;
          const int64_t row = static_cast<int64_t>(config().h_row(layer) + k) * kTile;
          const float* rows = global(s.grad_state) + begin * tile_floats() + row;
          const float* h = global(s.states) + ((slot + 1) * s.tiles + begin) * tile_floats() + row;
          for (int64_t i = g * size + half; i < (g + 1) * size; i += 32) {
            const int64_t place = i / kTile * tile_floats() + i % kTile;
            if (isfinite(h[place])) sum += static_cast<double>(rows[place]), members += 1.;
          }
        }
        sum = warp_sum(sum);
        members = warp_sum(members);
        if (half == 0) s.group_means[g * cells + k] = quotient_of(sum, members);
      }
    cooperative_groups::this_grid().sync();
  }

  __device__ __forceinline__ void clear_sums(int quadruples) const {
    __syncthreads();
    for (int q = static_cast<int>(threadIdx.x); q < quadruples; q += kGacThreads)
      pass_sums[q] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  // The outputs of step t: their gradients into d h of the last layer.
  __device__ __forceinline__ void read_out_tile(int t, int slot) const {
    const Config& c = config();
    const int top = c.layers - 1;
    float* upstream = reinterpret_cast<float*>(gates);  // [outputs][kGacRow]
    __syncthreads();
    const float* h = in(s.states, slot + 1) + static_cast<int64_t>(c.h_row(top)) * kTile;
    for (int k = part; k < c.hidden; k += kGacParts) inputs[k * kGacRow + lane] = h[k * kTile];
    if (s.total > 0) {
      for (int o = part; o < c.outputs; o += kGacParts)
        upstream[o * kGacRow + lane] = lane < count ? s.grad_out[o * s.total + tile * kTile + lane] : 0.f;
    } else if (part == 0) {
      // A_T = w_T g_T, A_t = w_t g_t + decay_t A_{t+1}; d loss / d u_t = lr_t A_{t+1}.
      float* adjoint = s.adjoint + at * kTile + lane;
      const SegmentStep& now = step(t);
      upstream[lane] = now.lr * *adjoint;
      *adjoint = now.weight * gradient(t) + now.decay * *adjoint;
    }
    __syncthreads();
    const float* out = reinterpret_cast<const float*>(s.weights + gac_layer_begin(c, c.layers));
    float* dh = in(s.grad_state) + static_cast<int64_t>(c.h_row(top)) * kTile;
    for (int k = part; k < c.hidden; k += kGacParts) {
      float d = dh[k * kTile];
      for (int o = 0; o < c.outputs; o++) d += out[o * c.hidden + k] * upstream[o * kGacRow + lane];
      dh[k * kTile] = d;
    }
    float* sums = reinterpret_cast<float*>(pass_sums);
    for (int i = static_cast<int>(threadIdx.x); i < c.outputs * (c.hidden + 1); i += kGacThreads) {
      const int o = i < c.outputs * c.hidden ? i / c.hidden : i - c.outputs * c.hidden;
      const float* x = i < c.outputs * c.hidden ? inputs + i % c.hidden * kGacRow : nullptr;
      float sum = 0.f;
      for (int k = 0; k < kTile; k++) sum += upstream[o * kGacRow + k] * (x ? x[k] : 1.f);
      sums[i] += sum;
    }
    add_cells(slot, top);
  }

  __device__ __forceinline__ void flush_read_out() const {
    const Config& c = config();
    double* to = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size() + c.weight_out();
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < c.outputs * (c.hidden + 1); i += kGacThreads) {
      const bool update = i < c.hidden || i == c.outputs * c.hidden;
      to[i] += static_cast<double>((update ? c.output_scale : 1.f) * reinterpret_cast<float*>(pass_sums)[i]);
    }
  }

  // One layer of step t: from the gradients of its new h and c to those of the previous ones and of its inputs.
  __device__ __forceinline__ void layer_tile(int t, int slot, int layer) const {
    const Config& c = config();
    const int n = c.inputs(layer), unit = gac_unit(c, layer);
    const float *before = in(s.states, slot), *after = in(s.states, slot + 1);
    float* grad = in(s.grad_state);
    __syncthreads();
    load_inputs(t, layer, before, after);
    __syncthreads();
    for (int j = part; j < c.hidden; j += kGacParts) {
      const float4 a = preactivations(layer, j);
      const int64_t h_row = static_cast<int64_t>(c.h_row(layer) + j) * kTile;
      const int64_t c_row = static_cast<int64_t>(c.c_row(layer) + j) * kTile;
      const float previous = before[c_row];
      float cell = previous, dc = grad[c_row], dh = grad[h_row];
      if (j < c.gac && lane < count && isfinite(after[h_row]))
        dh = s.groups == 1 ? means[j] : s.group_means[group() * c.gac + j];
      Gates<float> kept;
      cell_forward<DeviceMath>(a.x, a.y, a.z, a.w, cell, kept);
      const GateGradients<float> d = cell_backward<float>(kept, previous, dh, dc);
      grad[c_row] = dc;
      // Divided by the scale that the packed weights have.
      gates[j * kTile + lane] =
          make_float4(d.i / gate_scale(0), d.f / gate_scale(1), d.g / gate_scale(2), d.o / gate_scale(3));
    }
    __syncthreads();
    const float4* w = global(s.weights) + gac_layer_begin(c, layer) + 1;
    for (int k = part; k < n + c.hidden; k += kGacParts) {
      if (layer == 0 && k < n && s.total == 0) continue;
      float sum = 0.f;
      for (int j = 0; j < c.hidden; j++) {
        const float4 v = w[j * unit + k], d = gates[j * kTile + lane];
        sum += (v.x * d.x + v.y * d.y) + (v.z * d.z + v.w * d.w);
      }
      if (k >= n)
        grad[static_cast<int64_t>(c.h_row(layer) + k - n) * kTile] = sum;
      else if (layer > 0)
        grad[static_cast<int64_t>(c.h_row(layer - 1) + k) * kTile] += sum;
      else if (k < c.features())
        features[k * kTile + lane] = sum;
      else if (lane < count)
        s.grad_extra[(k - c.features()) * s.total + tile * kTile + lane] = sum;
    }
    for (int q = static_cast<int>(threadIdx.x); q < c.hidden * unit; q += kGacThreads) {
      const float* x = q % unit > 0 ? inputs + (q % unit - 1) * kGacRow : nullptr;
      const float4* d = gates + q / unit * kTile;
      float4 sum = pass_sums[q];
      for (int k = 0; k < kTile; k++) {
        const float v = x ? x[k] : 1.f;
        sum.x += d[k].x * v;
        sum.y += d[k].y * v;
        sum.z += d[k].z * v;
        sum.w += d[k].w * v;
      }
      pass_sums[q] = sum;
    }
    if (layer > 0) return add_cells(slot, layer - 1);
    __syncthreads();
    if (s.total > 0 && part == 0 && lane < count) {
      const float second = c.features() > 1 ? features[kTile + lane] : 0.f;
      const float d = c.preprocess == Preprocess::log_sign
                          ? log_sign_backward<DeviceMath>(s.log_sign, gradient(t), features[lane], second)
                          : features[lane];
      write_dense(s.grad_grad, tile * kTile + lane, d);
    }
  }

  __device__ __forceinline__ void flush_layer(int layer) const {
    const Config& c = config();
    const int unit = gac_unit(c, layer), n = c.inputs(layer);
    double* to = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size();
    __syncthreads();
    for (int q = static_cast<int>(threadIdx.x); q < c.hidden * unit; q += kGacThreads) {
      const int j = q / unit, k = q % unit;
      const float4 sum = pass_sums[q];
      for (int g = 0; g < kGates; g++) {
        const int row = g * c.hidden + j;
        const int place = k == 0   ? c.bias(layer) + row
                          : k <= n ? c.weight_ih(layer) + row * n + k - 1
                                   : c.weight_hh(layer) + row * c.hidden + k - 1 - n;
        const float part_sum = g == 0 ? sum.x : g == 1 ? sum.y : g == 2 ? sum.z : sum.w;
        to[place] += static_cast<double>(gate_scale(g) * part_sum);
      }
    }
  }

  __device__ __forceinline__ void step_back(int t, int slot, double coordinates, int& turn) {
    const Config& c = config();
    sum_over_tiles((c.outputs * (c.hidden + 1) + 3) / 4, [&] { read_out_tile(t, slot); }, [&] { flush_read_out(); });
    for (int layer = c.layers - 1; layer >= 0; layer--) {
      average(slot, layer, turn, coordinates);
      turn ^= 1;
      sum_over_tiles(c.hidden * gac_unit(c, layer), [&] { layer_tile(t, slot, layer); }, [&] { flush_layer(layer); });
    }
  }
};

template <int TableBytes>
__global__ void __launch_bounds__(kGacThreads, 2)
    gac_backward_kernel(const __grid_constant__ GacBackwardArguments<TableBytes> arguments) {
  L2L_DYNAMIC_SHARED(float4, shared);
  __shared__ double cell_sums[2 * kMaxHidden];
  const GacBackwardScalars& s = arguments.scalars;
  const GacShared layout(s.config);
  float* floats = reinterpret_cast<float*>(shared);
  GacWalk walk{s,
               {s.table, arguments.table.words},
               reinterpret_cast<float4*>(floats + layout.gates),
               reinterpret_cast<float4*>(floats + layout.sums),
               floats + layout.inputs,
               floats + layout.features,
               floats + layout.means,
               cell_sums,
               static_cast<int>(threadIdx.x) % kTile,
               static_cast<int>(threadIdx.x) / kTile};
  const Config& c = s.config;
  pack_for_backward(s);
  for (int i = threadIdx.x; i < 2 * kMaxHidden; i += kGacThreads) cell_sums[i] = 0.;
  double* own_sums = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size();
  for (int i = threadIdx.x; i < c.phi_size(); i += kGacThreads) own_sums[i] = 0.;
  cooperative_groups::this_grid().sync();

  int64_t coordinates = 0;
  const GacBackwardEntry* entries = reinterpret_cast<const GacBackwardEntry*>(walk.table.words);
  for (int e = 0; e < s.table.entries; e++) coordinates += entries[e].numel;
  const double group = static_cast<double>(coordinates / s.groups);

  walk.for_each_tile([&] {
    walk.copy_in(walk.entry->grad_end, walk.in(s.grad_state));
    if (walk.part == 0 && s.total == 0)
      s.adjoint[walk.at * kTile + walk.lane] = walk.step(s.steps).weight * walk.gradient(s.steps);
    walk.copy_in(walk.entry->state, walk.in(s.states));
    walk.copy_in(walk.entry->state, walk.in(s.checkpoints));
    for (int k = 0; k + 1 < s.chunks; k++) {
      __syncthreads();
      walk.forward(k * s.chunk, s.chunk);
      walk.copy(walk.in(s.states, s.chunk), walk.in(s.checkpoints, k + 1));
      walk.copy(walk.in(s.states, s.chunk), walk.in(s.states));
    }
  });
  int turn = 0;
  for (int k = s.chunks - 1; k >= 0; k--) {
    const int first = k * s.chunk, n = s.steps - first < s.chunk ? s.steps - first : s.chunk;
    walk.for_each_tile([&] {
      __syncthreads();
      walk.copy(walk.in(s.checkpoints, k), walk.in(s.states));
      __syncthreads();
      walk.forward(first, n);
    });
    for (int t = first + n - 1; t >= first; t--) walk.step_back(t, t - first, group, turn);
  }
  __syncthreads();
  walk.for_each_tile([&] {
    if (!walk.entry->grad_start) return;
    float* to = walk.entry->grad_start + walk.tile * walk.tile_floats() + walk.lane;
    walk.copy(walk.in(s.grad_state), to);
  });
  cooperative_groups::this_grid().sync();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kGacThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kGacThreads + threadIdx.x; i < c.phi_size(); i += stride) {
    double sum = 0.;
    for (unsigned b = 0; b < gridDim.x; b++) sum += s.sums[static_cast<int64_t>(b) * c.phi_size() + i];
    s.grad_phi[i] = static_cast<float>(sum);
  }
}

}  // namespace l2l
