// The step with global averaging cells, extra inputs and several outputs, for all tensors of a launch.
//
// One cooperative launch: layer by layer over all tiles, with a barrier of the whole grid between layers, at which the
// first `gac` units of the layer below are averaged over all coordinates of a problem. The grid is no larger than what
// is resident at once.
//
// Owns: threads and tiles as in step.cuh. The averages enter through the state's rows: each thread writes them to its
// own coordinates when it comes back for the next layer.
// One problem: a thread adds its coordinates of some 64 tiles in float32, warps add their threads, blocks their warps
// and
//   then all blocks in float64, in an order that depends on the size of the grid only. Several problems: a warp adds
//   the coordinates of one problem.
// Shared memory: the packed weights; one float per thread and averaged cell, a double per warp and cell; the averages.
#pragma once

#include <cooperative_groups.h>

#include "step.cuh"

namespace l2l {

// Tiles whose sums are added in float32; those of all tiles that a thread visits, of which there may be hundreds of
// thousands, in float64.
constexpr int kTilesInFloat = 64;

struct LayeredScalars {
  StepScalars step;     // in_place: param = param * decay + lr * update; else there is none
  int64_t problems;     // each tensor's coordinates belong to problems of equal size, one after the other
  int64_t total;        // coordinates: length of a row of `extra` and `out`
  const float* extra;   // [extra][total], or null
  float* out;           // [outputs][total], or null
  float* means;         // [layers][problems][gac]
  double* sums;         // [2][problems][gac], of the last layer that was run: sums and counts of the finite h
  double* block_sums;   // [2][blocks][2][gac], for one problem: sums and how many were left out
  int32_t first_phase;  // phase l < layers: layer l and its sums; phase `layers`: the outputs
  int32_t last_phase;
};

template <int Bytes>
struct LayeredArguments {
  LayeredScalars scalars;
  InlineTable<Bytes> table;
};

// As step_layer, with inputs that are read where they are needed: extra[e] is a row of 64 or more, for this lane.
template <int H, int C, int Inputs>
__device__ __forceinline__ void layered_layer(const float4* weights, const float (&x)[Inputs][C],
                                              const float (&h)[H][C], const float* extra, int64_t extra_stride,
                                              int extras, int count, const float* state, float* new_state) {
#pragma unroll 1
  for (int j = 0; j < H; j++) {
    float cell[C], a[4][C], y[C];
    load_lanes<C>(state + H * kTile, cell);
    const float4 bias = weights[0];
#pragma unroll
    for (int i = 0; i < C; i++) a[0][i] = bias.x, a[1][i] = bias.y, a[2][i] = bias.z, a[3][i] = bias.w;
#pragma unroll
    for (int k = 0; k < Inputs; k++) multiply_add<C>(weights[1 + k], x[k], a);
#pragma unroll 1
    for (int e = 0; e < extras; e++) {
#pragma unroll
      for (int i = 0; i < C; i++) y[i] = i < count ? extra[e * extra_stride + i] : 0.f;
      multiply_add<C>(weights[1 + Inputs + e], y, a);
    }
#pragma unroll
    for (int k = 0; k < H; k++) multiply_add<C>(weights[1 + Inputs + extras + k], h[k], a);
#pragma unroll
    for (int i = 0; i < C; i++) y[i] = cell_step<DeviceMath>(a[0][i], a[1][i], a[2][i], a[3][i], cell[i]);
    store_lanes<C>(new_state + H * kTile, cell);
    store_lanes<C>(new_state, y);
    weights += 1 + Inputs + extras + H;
    state += kTile;
    new_state += kTile;
  }
}

// What a thread does with one tile.
template <int H, int C>
struct LayeredTile {
  const LayeredScalars& s;
  const Table<StepEntry> table;
  const StepEntry& entry;
  const float4* weights;
  const float* shared_means;  // [gac] of the layer below, for one problem
  float* partial;             // the thread's sums of averaged cells, kStepThreads apart
  int* left_out;              // [gac], of the block
  float* parked;
  int64_t begin;  // the thread's first coordinate in the tensor
  int64_t place;  // its first row's float in the states

  __device__ __forceinline__ const Config& config() const { return s.step.config; }
  __device__ __forceinline__ int count() const {
    const int64_t rest = entry.numel - begin;
    return rest < 0 ? 0 : rest < C ? static_cast<int>(rest) : C;
  }
  __device__ __forceinline__ float* new_state(int row) const {
    return global(entry.new_state) + place + static_cast<int64_t>(row) * kTile;
  }

  // The averages of `layer` into the thread's lanes of the state. What is not finite is in no average and stays.
  __device__ __forceinline__ void fill(int layer) const {
    const int n = count();
    const int64_t size = entry.numel / s.problems;
    float* to = new_state(config().h_row(layer));
    for (int i = 0; i < n; i++) {
      const int64_t g = s.problems == 1 ? 0 : (begin + i) / size;
      const float* means = s.problems == 1 ? shared_means : s.means + (layer * s.problems + g) * config().gac;
      for (int k = 0; k < config().gac; k++)
        if (isfinite(to[k * kTile + i])) to[k * kTile + i] = means[k];
    }
  }

  __device__ __forceinline__ void run_layer(int layer) const {
    const float* state = global(entry.state) + place + static_cast<int64_t>(config().h_row(layer)) * kTile;
    float* to = new_state(config().h_row(layer));
    const float4* w = weights + Packed<H>::layout(config().extra).layer(layer);
    if (layer == 0) {
      float features[kGradientFeatures][C], h[H][C];
      read_features<C>(s.step, table, entry, begin, parked, features);
#pragma unroll
      for (int k = 0; k < H; k++) load_lanes<C>(state + k * kTile, h[k]);
      layered_layer<H, C, kGradientFeatures>(w, features, h, s.extra ? s.extra + entry.first + begin : nullptr, s.total,
                                             config().extra, count(), state, to);
    } else {
      fill(layer - 1);
      const float* below = new_state(config().h_row(layer - 1));
      float x[H][C], h[H][C];
#pragma unroll
      for (int k = 0; k < H; k++) load_lanes<C>(below + k * kTile, x[k]);
#pragma unroll
      for (int k = 0; k < H; k++) load_lanes<C>(state + k * kTile, h[k]);
      layered_layer<H, C, H>(w, x, h, nullptr, 0, 0, 0, state, to);
    }
    if (s.problems != 1) return;
    const int n = count();
    for (int k = 0; k < config().gac; k++)
      for (int i = 0; i < n; i++) {
        const float y = to[k * kTile + i];
        if (isfinite(y))
          partial[k * kStepThreads] += y;
        else
          atomicAdd(&left_out[k], 1);
      }
  }

  __device__ __forceinline__ void read_out() const {
    const int layer = config().layers - 1, n = count();
    fill(layer);
    const float* from = new_state(config().h_row(layer));
    const float* out = reinterpret_cast<const float*>(weights + Packed<H>::layout(config().extra).out(config().layers));
    float h[H][C], u[C];
#pragma unroll
    for (int k = 0; k < H; k++) load_lanes<C>(from + k * kTile, h[k]);
#pragma unroll 1
    for (int o = config().outputs - 1; o >= 0; o--) {  // the update last
#pragma unroll
      for (int i = 0; i < C; i++) u[i] = out[config().outputs * H + o];
#pragma unroll
      for (int k = 0; k < H; k++) {
#pragma unroll
        for (int i = 0; i < C; i++) u[i] += out[o * H + k] * h[k][i];
      }
      if (s.out)
#pragma unroll
        for (int i = 0; i < C; i++)
          if (i < n) s.out[o * s.total + entry.first + begin + i] = u[i];
    }
    if (s.step.in_place) write_parameters<C>(s.step, table, entry, begin, parked, u);
  }
};

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) x += __shfl_xor_sync(0xffffffffu, x, other);
  return x;
}

__device__ __forceinline__ float quotient_of(double sum, double count) {
  return static_cast<float>(sum / (count > 1. ? count : 1.));
}

// Adds the sums of a warp's threads to those of the warp, and clears them. partial: the thread's; sums: [gac].
__device__ __forceinline__ void add_threads(int cells, float* partial, double* sums) {
#pragma unroll 1
  for (int k = 0; k < cells; k++) {
    const double sum = warp_sum(static_cast<double>(partial[k * kStepThreads]));
    partial[k * kStepThreads] = 0.f;
    if (threadIdx.x % 32 == 0) sums[k] += sum;
  }
}

// One problem: from the warps' sums, `stride` apart, to those of all blocks. Afterwards every block has the averages in
// shared_means.
__device__ __forceinline__ void add_blocks(const LayeredScalars& s, int layer, const double* warp_sums, int stride,
                                           int* left_out, float* shared_means, bool average) {
  const int cells = s.step.config.gac, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  double* rows = s.block_sums + static_cast<int64_t>(layer % 2) * gridDim.x * 2 * cells;
  __syncthreads();
  for (int k = warp; k < cells; k += kStepThreads / 32) {
    if (lane == 0) {
      double sum = 0.;
      for (int w = 0; w < kStepThreads / 32; w++) sum += warp_sums[w * stride + k];
      rows[static_cast<int64_t>(blockIdx.x) * 2 * cells + k] = sum;
      rows[static_cast<int64_t>(blockIdx.x) * 2 * cells + cells + k] = static_cast<double>(left_out[k]);
      left_out[k] = 0;
    }
  }
  cooperative_groups::this_grid().sync();
  for (int k = warp; k < cells; k += kStepThreads / 32) {
    double sum = 0., missing = 0.;
    for (unsigned i = lane; i < gridDim.x; i += 32) {
      sum += rows[static_cast<int64_t>(i) * 2 * cells + k];
      missing += rows[static_cast<int64_t>(i) * 2 * cells + cells + k];
    }
    sum = warp_sum(sum);
    missing = warp_sum(missing);
    if (lane == 0) {
      const double count = static_cast<double>(s.total) - missing;
      const float mean = quotient_of(sum, count);
      shared_means[k] = mean;
      if (blockIdx.x == 0) {
        s.sums[k] = sum;
        s.sums[cells + k] = count;
        if (average) s.means[layer * cells + k] = mean;
      }
    }
  }
  __syncthreads();
}

// Several problems: a warp for each.
__device__ __forceinline__ void add_problems(const LayeredScalars& s, const Table<StepEntry>& table, int layer,
                                             bool average) {
  const int cells = s.step.config.gac, lane = threadIdx.x % 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kStepThreads / 32);
  const StepEntry* entries = reinterpret_cast<const StepEntry*>(table.words);
  const int64_t stride = static_cast<int64_t>(s.step.config.rows()) * kTile;
  cooperative_groups::this_grid().sync();
  for (int64_t g = static_cast<int64_t>(blockIdx.x) * (kStepThreads / 32) + threadIdx.x / 32; g < s.problems;
       g += warps)
    for (int k = 0; k < cells; k++) {
      double sum = 0., count = 0.;
      for (int e = 0; e < table.ref.entries; e++) {
        const int64_t size = entries[e].numel / s.problems;
        const float* rows = global(entries[e].new_state) + static_cast<int64_t>(s.step.config.h_row(layer) + k) * kTile;
        for (int64_t i = g * size + lane; i < (g + 1) * size; i += 32) {
          const float y = rows[i / kTile * stride + i % kTile];
          if (isfinite(y)) sum += static_cast<double>(y), count += 1.;
        }
      }
      sum = warp_sum(sum);
      count = warp_sum(count);
      if (lane == 0) {
        s.sums[g * cells + k] = sum;
        s.sums[(s.problems + g) * cells + k] = count;
        if (average) s.means[(layer * s.problems + g) * cells + k] = quotient_of(sum, count);
      }
    }
  if (average) cooperative_groups::this_grid().sync();
}

template <int H, int C, int TableBytes>
__global__ void __launch_bounds__(kStepThreads, 2)
    layered_step_kernel(const __grid_constant__ LayeredArguments<TableBytes> arguments) {
  L2L_DYNAMIC_SHARED(float4, weights);
  __shared__ float parked[C][kStepThreads];
  __shared__ float means[H];
  __shared__ double warp_sums[kStepThreads / 32][H];
  __shared__ int left_out[H];
  const LayeredScalars& s = arguments.scalars;
  const Config& config = s.step.config;
  const int cells = config.gac;
  float* partial = reinterpret_cast<float*>(weights) +
                   Packed<H>::bytes(config.layers, config.extra, config.outputs) / 4 + threadIdx.x;
  pack_network<H>(config, s.step.phi, weights);
  for (int k = threadIdx.x; k < cells; k += kStepThreads) left_out[k] = 0;
  const int below = s.first_phase - 1;
  if (s.problems == 1 && below >= 0)
    for (int k = threadIdx.x; k < cells; k += kStepThreads) means[k] = s.means[below * cells + k];
  __syncthreads();

  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<StepEntry> table(s.step.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  double* own_sums = warp_sums[threadIdx.x / 32];
#pragma unroll 1
  for (int phase = s.first_phase; phase < s.last_phase; phase++) {
    for (int k = 0; k < cells; k++) {
      partial[k * kStepThreads] = 0.f;
      if (threadIdx.x % 32 == 0) own_sums[k] = 0.;
    }
    int held = 0;  // tiles in `partial`; the threads of a warp have the same tiles
    int64_t at = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
#pragma unroll 1
    for (; at < s.step.tiles; at += stride) {
      if (s.problems == 1 && held++ == kTilesInFloat) {
        add_threads(cells, partial, own_sums);
        held = 1;
      }
      int64_t first_tile;
      const StepEntry& entry = table.find(at, first_tile);
      const int64_t tile = at - first_tile;
      const LayeredTile<H, C> work{s,
                                   table,
                                   entry,
                                   weights,
                                   means,
                                   partial,
                                   left_out,
                                   &parked[0][threadIdx.x],
                                   tile * kTile + lane,
                                   tile * (static_cast<int64_t>(config.rows()) * kTile) + lane};
      if (phase < config.layers)
        work.run_layer(phase);
      else
        work.read_out();
    }
    if (phase == config.layers || cells == 0) continue;
    const bool average = phase + 1 < s.last_phase;
    if (s.problems == 1) {
      add_threads(cells, partial, own_sums);
      add_blocks(s, phase, &warp_sums[0][0], H, left_out, means, average);
    } else {
      add_problems(s, table, phase, average);
    }
  }
}

}  // namespace l2l
