// One tile of the layered back-propagation: where a block finds it, and its way forward again.
#pragma once

#include <cooperative_groups.h>

#include "backward_layout.cuh"
#include "layered_step.cuh"

namespace l2l {

constexpr int kLayeredThreads = 256;
constexpr int kLayeredParts = kLayeredThreads / kTile;
constexpr int kLayeredRow = kTile + 1;

struct LayeredBackwardScalars {
  Config config;
  Features features;
  const float* phi;
  int64_t tiles, problems;
  int32_t steps, chunk, chunks;
  int32_t segment;  // where in the table the T + 1 SegmentSteps are, in words, and behind them T pointers to averages
  // The functional step: one entry, one step. Rows of `total` coordinates.
  int64_t total;          // 0: a segment
  const float* extra;     // [extra][total]
  const float* grad_out;  // [outputs][total]
  View grad_grad;         // dense
  float* grad_extra;      // [extra][total]
  // Temporary memory.
  float4* weights;       // all layers as [H][1 + inputs + H]; then the read-out
  float* checkpoints;    // [chunks] states of all tiles
  float* states;         // [chunk + 1]
  float* grad_state;     // one
  float* adjoint;        // [tiles][64]: d loss / d theta
  float* problem_means;  // [problems][gac]
  double* block_sums;    // [2][blocks][2][gac]: sums and how many were left out
  double* sums;          // [blocks][phi_size]
  float* grad_phi;
  TableRef table;
};

template <int Bytes>
struct LayeredBackwardArguments {
  LayeredBackwardScalars scalars;
  InlineTable<Bytes> table;
};

// The most inputs and h of a layer.
L2L_HOST_DEVICE int columns_of(const Config& c) { return (c.inputs(0) > c.hidden ? c.inputs(0) : c.hidden) + c.hidden; }

// Places in shared memory, in floats.
struct LayeredShared {
  int gates, sums, inputs, features, means, bytes;  // first float of each

  L2L_HOST_DEVICE explicit LayeredShared(const Config& c) {
    gates = 0;
    sums = gates + 4 * c.hidden * kTile;
    inputs = sums + 4 * c.hidden * (1 + columns_of(c));
    features = inputs + columns_of(c) * kLayeredRow;
    means = features + kGradientFeatures * kTile;
    bytes = 4 * (means + c.hidden);
  }
};

__device__ __forceinline__ void pack_for_backward(const LayeredBackwardScalars& s) {
  const Config& c = s.config;
  const PackedLayout layout(c);
  float* floats = reinterpret_cast<float*>(s.weights);
  const int first = static_cast<int>(blockIdx.x) * kLayeredThreads + static_cast<int>(threadIdx.x);
  const int stride = static_cast<int>(gridDim.x) * kLayeredThreads;
  for (int l = 0; l < c.layers; l++) {
    const int unit = layout.unit(l);
    float* to = floats + 4 * layout.layer(l);
    for (int i = first; i < kGates * c.hidden * unit; i += stride) {
      const int gate = i % kGates, quad = i / kGates;
      to[i] = gate_scale(gate) * s.phi[phi_index(c, l, quad / unit, quad % unit, gate)];
    }
  }
  for (int i = first; i < c.outputs * (c.hidden + 1); i += stride)
    floats[4 * layout.out(c.layers) + i] = read_out_scale(c, i) * s.phi[c.weight_out() + i];
}

// A block's view of the tiles, of which it has one at a time.
struct LayeredTiles {
  const LayeredBackwardScalars& s;
  const Table<BackwardEntry> table;
  float4 *gates, *pass_sums;  // shared
  float *inputs, *features, *means;
  double* cell_sums;  // [2][gac]
  int lane, part;

  // Of the current tile.
  const BackwardEntry* entry = nullptr;
  int64_t at = 0, tile = 0;  // among all tiles, in the tensor
  int count = 0;

  __device__ __forceinline__ const Config& config() const { return s.config; }
  __device__ __forceinline__ PackedLayout layout() const { return PackedLayout(s.config); }
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
    return reinterpret_cast<const float*>(pointers[t]) + layer * s.problems * config().gac;
  }
  __device__ __forceinline__ int64_t problem() const {
    return s.problems == 1 ? 0 : (tile * kTile + lane) / (entry->numel / s.problems);
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

  // ---- one tile on the way forward

  // A state from outside, or nothing; lanes beyond the last coordinate become zero.
  __device__ __forceinline__ void copy_in(const float* from, float* to) const {
    from += from ? tile * tile_floats() + lane : 0;
    for (int r = part; r < config().rows(); r += kLayeredParts)
      to[r * kTile] = from && lane < count ? from[r * kTile] : 0.f;
  }
  __device__ __forceinline__ void copy(const float* from, float* to) const {
    for (int r = part; r < config().rows(); r += kLayeredParts) to[r * kTile] = from[r * kTile];
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
        float x[kGradientFeatures];
        features_of<DeviceMath>(s.features, g, x);
#pragma unroll
        for (int k = 0; k < kGradientFeatures; k++)
          if (k < c.features()) inputs[k * kLayeredRow + lane] = x[k];
      }
      for (int e = part; e < c.extra; e += kLayeredParts)
        inputs[(c.features() + e) * kLayeredRow + lane] =
            lane < count ? s.extra[e * s.total + tile * kTile + lane] : 0.f;
    } else {
      for (int k = part; k < n; k += kLayeredParts)
        inputs[k * kLayeredRow + lane] = after[static_cast<int64_t>(c.h_row(layer - 1) + k) * kTile];
    }
    for (int k = part; k < c.hidden; k += kLayeredParts)
      inputs[(n + k) * kLayeredRow + lane] = before[static_cast<int64_t>(c.h_row(layer) + k) * kTile];
  }

  __device__ __forceinline__ float4 preactivations(int layer, int j) const {
    const int unit = layout().unit(layer);
    const float4* w = global(s.weights) + layout().layer(layer) + j * unit;
    float4 a = w[0];
    for (int k = 1; k < unit; k++) {
      const float4 v = w[k];
      const float x = inputs[(k - 1) * kLayeredRow + lane];
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
      for (int j = part; j < c.hidden; j += kLayeredParts) {
        const float4 a = preactivations(l, j);
        const int64_t row = static_cast<int64_t>(c.c_row(l) + j) * kTile;
        float cell = before[row];
        const float y = cell_step<DeviceMath>(a.x, a.y, a.z, a.w, cell);
        after[row] = cell;
        // What is not finite is in no average and goes on itself.
        h[j * kTile] = j < c.gac && lane < count && isfinite(y) ? averages(t, l)[problem() * c.gac + j] : y;
      }
    }
    __syncthreads();
  }

  // Steps [first, first + n) of the tile; state 0 of the chunk is there.
  __device__ __forceinline__ void forward(int first, int n) const {
    for (int t = 0; t < n; t++) forward_step(first + t, in(s.states, t), in(s.states, t + 1));
  }
};

}  // namespace l2l
