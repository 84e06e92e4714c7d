// The step of step.cuh on tensor cores, of plain networks with float32 states, from compute capability 8.0 on.
//
// Owns: a warp has 8 C coordinates of a tile, so 64 / (8 C) warps have a tile; a lane as mma_products.cuh says.
// Warps stride over the parts of all tiles. The lanes of a warp are at the same place throughout but where one reads
// gradients and writes parameters.
// Registers: large and small parts of a layer's inputs, the gate sums of one unit for C coordinates.
// Shared memory: phi, staged once per block, read by fragments; per warp the features of its coordinates, and per lane
// the new h of a layer until they are inputs of the next.
// Global memory: every number of the state is read once and written once, by the same lane.
#pragma once

#include "mma_weights.cuh"
#include "step.cuh"

namespace l2l {

constexpr int kMmaFeatures = kGradientFeatures;

// Sizes with a kernel. Fewer units leave little to multiply, more would not fit the registers.
constexpr bool has_mma_step(int hidden) { return hidden >= 8 && hidden <= 20; }

// Floats of one warp in shared memory: features, then what its lanes park.
L2L_HOST_DEVICE constexpr int mma_warp_floats(int hidden, int coordinates) {
  return kMmaFeatures * 8 * coordinates + hidden / 4 * 32 * coordinates;
}
constexpr int mma_step_bytes(int quadruples, int hidden, int coordinates) {
  return 16 * quadruples + 4 * (kStepThreads / 32) * mma_warp_floats(hidden, coordinates);
}

// An infinite input has no small part, and would become NaN. This drives gates to their ends as well, and its products
// do not overflow.
constexpr float kLargestMmaInput = 1e30f;

__device__ __forceinline__ float bounded(float x) {
  return DeviceMath::max(-kLargestMmaInput, DeviceMath::min(kLargestMmaInput, x));
}

#if L2L_CUDA_ARCH >= 800

// The rows of a float32 state as a lane goes through them: at its coordinates, of one of its units.
template <int H, int C>
struct MmaRows {
  static constexpr bool kExact = false;
  const float* state;
  float* new_state;

  __device__ __forceinline__ void load_h(int q, float (&h)[C]) const { load_lanes<C>(state + 4 * q * kTile, h); }
  __device__ __forceinline__ void load_c(float (&c)[C]) const { load_lanes<C>(state + H * kTile, c); }
  __device__ __forceinline__ void store(const float (&h)[C], const float (&c)[C]) const {
    store_lanes<C>(new_state + H * kTile, c);
    store_lanes<C>(new_state, h);
  }
  __device__ __forceinline__ void next_unit() { state += 4 * kTile, new_state += 4 * kTile; }
  __device__ __forceinline__ void next_layer() { state += 2 * H * kTile, new_state += 2 * H * kTile; }
};

// One layer for a warp's coordinates. rows: at the lane's first unit of the layer. The new h goes to `parked`, or the
// last layer's to the update.
template <int H, int C, int Below, class Rows>
__device__ __forceinline__ void mma_layer(const uint4* weights, const float4* biases, int stride,
                                          const MmaInputs<Below, C>& x, Rows rows, float* parked, const float* out,
                                          float (&u)[C]) {
  MmaInputs<H / 4, C, Rows::kExact> h;
#pragma unroll
  for (int q = 0; q < H / 4; q++) {
    float values[C];
    rows.load_h(q, values);
    h.set(q, values);
  }
#pragma unroll 1
  for (int p = 0; p < H / 4; p++) {
    float cell[C];
    rows.load_c(cell);
    float acc[2][C / 2][4];
    unit_products<C>(weights, *biases, x, h, acc);
    float y[C];
#pragma unroll
    for (int i = 0; i < C; i++) {
      const float (&first)[4] = acc[0][i / 2], (&second)[4] = acc[1][i / 2];
      const int at = i % 2 * 2;
      y[i] = cell_step<DeviceMath>(first[at], first[at + 1], second[at], second[at + 1], cell[i]);
    }
    rows.store(y, cell);
    if (out) {
#pragma unroll
      for (int i = 0; i < C; i++) u[i] += *out * y[i];
      out += 4;
    } else {
      store_lanes<C>(parked + p * 32 * C, y);
    }
    weights += stride;
    biases += 4;
    rows.next_unit();
  }
}

// All layers for a warp's coordinates. u: what the lane's units give to the update of its coordinates.
template <int H, int C, class Rows>
__device__ __forceinline__ void mma_layers(const Config& config, const float4* packed, const float* features,
                                           float* parked, int lane, Rows rows, float (&u)[C]) {
  using Weights = MmaWeights<H, kMmaFeatures>;
  const int t = lane % 4;
  const float* const out = reinterpret_cast<const float*>(packed + Weights::layer(config.layers)) + t;
  const auto layer_at = [&](int l) { return packed + Weights::layer(l); };
  const auto weights_at = [&](int l) { return reinterpret_cast<const uint4*>(layer_at(l)) + lane; };
  {
    MmaInputs<Weights::kFirst, C> x{};
    float values[C] = {};
    if (t < kMmaFeatures) load_lanes<C>(features + t * 8 * C + lane / 4 * C, values);
    x.set(0, values);
    mma_layer<H, C>(weights_at(0), layer_at(0) + Weights::biases(0) + t, Weights::group(0), x, rows, parked,
                    config.layers == 1 ? out : nullptr, u);
  }
#pragma unroll 1
  for (int l = 1; l < config.layers; l++) {
    rows.next_layer();
    MmaInputs<H / 4, C> x;
#pragma unroll
    for (int q = 0; q < H / 4; q++) {
      float values[C];
      load_lanes<C>(parked + q * 32 * C, values);
      x.set(q, values);
    }
    mma_layer<H, C>(weights_at(l), layer_at(l) + Weights::biases(1) + t, Weights::group(1), x, rows, parked,
                    l + 1 == config.layers ? out : nullptr, u);
  }
}

// One part of a tile. Lanes with t < C also have a coordinate of their own, C g + t, whose gradient they read and whose
// parameter they write. rows_of(entry, number of the tile, the lane's first coordinate in it, its first unit).
template <int H, int C, class Entry, class RowsOf>
__device__ __forceinline__ void mma_step_part(const StepScalars& s, const Table<Entry>& table, const float4* packed,
                                              float* features, float* parked, int64_t part, const RowsOf& rows_of) {
  constexpr int kPart = 8 * C, kParts = kTile / kPart;
  const int lane = static_cast<int>(threadIdx.x) % 32, t = lane % 4;
  const int first = static_cast<int>(part % kParts) * kPart + lane / 4 * C;  // the lane's first coordinate in the tile
  const int64_t global_tile = part / kParts;
  int64_t first_tile;
  {
    const Entry& entry = table.find(global_tile, first_tile);
    const int64_t own = (global_tile - first_tile) * kTile + first + t;
    if (t < C) {
      float g = own < entry.numel ? table.read(entry.grad, own) : 0.f;
      if (s.maximize) g = -g;
      if (entry.record) global(entry.record)[own] = g;
      float x[kMmaFeatures];
      features_of<DeviceMath>(s.features, g, x);
#pragma unroll
      for (int k = 0; k < kMmaFeatures; k++) features[k * kPart + lane / 4 * C + t] = bounded(x[k]);
    }
    __syncwarp();
  }
  float u[C] = {};
  {
    const Entry& entry = table.find(global_tile, first_tile);
    mma_layers<H, C>(s.config, packed, features, parked, lane, rows_of(entry, global_tile - first_tile, first, t), u);
  }
#pragma unroll
  for (int i = 0; i < C; i++) {
    u[i] += __shfl_xor_sync(0xffffffffu, u[i], 1);
    u[i] += __shfl_xor_sync(0xffffffffu, u[i], 2);
  }
  float update = u[0];
#pragma unroll
  for (int i = 1; i < C; i++) update = t == i ? u[i] : update;
  using Weights = MmaWeights<H, kMmaFeatures>;
  update += reinterpret_cast<const float*>(packed + Weights::layer(s.config.layers))[H];
  // Looked up once more, so as not to hold registers all the while.
  const Entry& target = table.find(global_tile, first_tile);
  const int64_t own = (global_tile - first_tile) * kTile + first + t;
  if (t < C && own < target.numel) {
    const View view = target.param;
    const int64_t at = table.element(view, own);
    if (s.in_place) update = read_dense(view, at) * s.decay + s.lr * update;
    write_dense(view, at, update);
  }
  __syncwarp();
}

// A block's share of all parts.
template <int H, int C, class Entry, class RowsOf>
__device__ __forceinline__ void mma_step_parts(const StepScalars& s, const Table<Entry>& table, float4* packed,
                                               const RowsOf& rows_of) {
  pack_mma_network<H, kMmaFeatures>(s.config, s.phi, packed);
  __syncthreads();
  constexpr int kParts = kTile / (8 * C), kWarps = kStepThreads / 32;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* const features = reinterpret_cast<float*>(packed + MmaWeights<H, kMmaFeatures>::quadruples(s.config.layers)) +
                          warp * mma_warp_floats(H, C);
  float* const parked = features + kMmaFeatures * 8 * C + lane * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kWarps;
  int64_t part = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  for (; part < s.tiles * kParts; part += stride)
    mma_step_part<H, C>(s, table, packed, features, parked, part, rows_of);
}
#endif

// On a device below 8.0 there is nothing to run: launch_mma_kernel asks what the kernel was compiled for.
template <int H, int C, int TableBytes>
__global__ void __launch_bounds__(kStepThreads, 3)
    mma_step_kernel(const __grid_constant__ StepArguments<TableBytes> arguments) {
#if L2L_CUDA_ARCH >= 800
  L2L_DYNAMIC_SHARED(float4, packed);
  const StepScalars& s = arguments.scalars;
  const Table<StepEntry> table(s.table, arguments.table.words);
  mma_step_parts<H, C>(s, table, packed, [&](const StepEntry& entry, int64_t tile, int first, int unit) {
    const int64_t offset = (tile * (2 * s.config.layers * H) + unit) * kTile + first;
    return MmaRows<H, C>{global(entry.state) + offset, global(entry.new_state) + offset};
  });
#endif
}

}  // namespace l2l
