// The step of the learned optimizer for all tensors of a launch.
//
// Owns: a thread has C adjacent coordinates of one tile of 64, so 64 / C threads have a tile; blocks stride over the
// tiles
//   of all tensors. Nothing is exchanged between threads, so there is no barrier after the weights are staged.
// Registers: the inputs of a layer (below and previous h) for the C coordinates, the 4 C gate sums of one unit.
// Shared memory: the packed weights (weights.cuh), staged once per block and read as broadcasts: one 16-byte load per
//   4 C multiply-adds.
// Global memory: a coordinate's state is read once and written once, in whole 128-byte lines; the new h of a layer is
// read
//   back by the thread that wrote it (from cache) as input of the next layer. Gradient and parameter: once each.
// Per coordinate, 2 layers of 20 units: 4,980 multiply-adds, 320 special functions, 640 bytes of state, 12 of the rest.
#pragma once

#include "math.cuh"
#include "table.cuh"
#include "weights.cuh"

namespace l2l {

constexpr int kStepThreads = 128;

struct StepEntry {
  int64_t end_tile;  // tiles of this and all previous entries
  int64_t numel;     // > 0
  View param;        // updated in place; or the update, written, in the functional step
  View grad;
  const float* state;  // 16-byte aligned
  float* new_state;    // may be state
  float* record;       // receives g, or null
  int64_t first;       // its first coordinate in the rows of extra inputs and outputs
};

struct StepScalars {
  Config config;
  Features features;
  const float* phi;
  int64_t tiles;  // of all entries
  float lr, decay;
  bool maximize;
  bool in_place;  // param = param * decay + lr * update; else param = update
  TableRef table;
};

template <int Bytes, class Scalars = StepScalars>
struct StepArguments {
  Scalars scalars;
  InlineTable<Bytes> table;
};

// C adjacent floats of one thread, loaded and stored at once.
template <int C>
__device__ __forceinline__ void load_lanes(const float* from, float (&to)[C]) {
  if constexpr (C == 4) {
    const float4 v = *reinterpret_cast<const float4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (C == 2) {
    const float2 v = *reinterpret_cast<const float2*>(from);
    to[0] = v.x, to[1] = v.y;
  } else {
    to[0] = *from;
  }
}

template <int C>
__device__ __forceinline__ void store_lanes(float* to, const float (&from)[C]) {
  if constexpr (C == 4)
    *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
  else if constexpr (C == 2)
    *reinterpret_cast<float2*>(to) = make_float2(from[0], from[1]);
  else
    *to = from[0];
}

template <int C>
__device__ __forceinline__ void multiply_add(const float4& w, const float (&x)[C], float (&a)[4][C]) {
#pragma unroll
  for (int i = 0; i < C; i++) {
    a[0][i] += w.x * x[i];
    a[1][i] += w.y * x[i];
    a[2][i] += w.z * x[i];
    a[3][i] += w.w * x[i];
  }
}

// The pre-activations of one unit. weights: its quadruples, of which the bias is not read.
template <int H, int C, int Inputs>
__device__ __forceinline__ void unit_preactivations(const float4* weights, const float4& bias,
                                                    const float (&x)[Inputs][C], const float (&h)[H][C],
                                                    float (&a)[4][C]) {
#pragma unroll
  for (int i = 0; i < C; i++) a[0][i] = bias.x, a[1][i] = bias.y, a[2][i] = bias.z, a[3][i] = bias.w;
#pragma unroll
  for (int k = 0; k < Inputs; k++) multiply_add<C>(weights[1 + k], x[k], a);
#pragma unroll
  for (int k = 0; k < H; k++) multiply_add<C>(weights[1 + Inputs + k], h[k], a);
}

// Adds what one unit's new h gives to the rows of the read-out.
template <int H, int C, int ReadOuts>
__device__ __forceinline__ void add_read_out(const float* out, int unit, const float (&y)[C], float (&u)[ReadOuts][C]) {
#pragma unroll
  for (int r = 0; r < ReadOuts; r++)
#pragma unroll
    for (int i = 0; i < C; i++) u[r][i] += out[r * H + unit] * y[i];
}

// One layer for one thread's coordinates. x: its inputs, h: its previous h; state, new_state: the thread's lanes of the
// layer's rows, h and then c. Adds the rows of the read-out to u if `out` is not null. biases: of the units, in the
// place of the weights' own, or null.
template <int H, int C, int Inputs, int ReadOuts>
__device__ __forceinline__ void step_layer(const float4* weights, const float4* biases, const float (&x)[Inputs][C],
                                           const float (&h)[H][C], const float* state, float* new_state,
                                           const float* out, float (&u)[ReadOuts][C]) {
#pragma unroll(Inputs <= kGradientFeatures && C > 1 ? 2 : 1)
  for (int j = 0; j < H; j++) {
    float cell[C];
    load_lanes<C>(state + H * kTile, cell);
    float a[4][C];
    unit_preactivations<H, C>(weights, biases ? biases[j] : weights[0], x, h, a);
    float y[C];
#pragma unroll
    for (int i = 0; i < C; i++) y[i] = cell_step<DeviceMath>(a[0][i], a[1][i], a[2][i], a[3][i], cell[i]);
    store_lanes<C>(new_state + H * kTile, cell);
    store_lanes<C>(new_state, y);
    if (out) add_read_out<H, C>(out, j, y, u);
    weights += 1 + Inputs + H;
    state += kTile;
    new_state += kTile;
  }
}

// The gradients of a thread's coordinates, through `parked` (kStepThreads apart): a rolled loop has the code for every
// dtype and for strides once, and registers have no index.
template <int C, class Entry>
__device__ __forceinline__ void read_gradients(const StepScalars& s, const Table<Entry>& table, const Entry& entry,
                                               int64_t begin, float* parked, float (&g)[C]) {
  const View view = entry.grad;
  const int64_t numel = entry.numel;
  float* const record = entry.record ? global(entry.record) + begin : nullptr;
#pragma unroll 1
  for (int i = 0; i < C; i++) {
    float x = begin + i < numel ? table.read(view, begin + i) : 0.f;
    if (s.maximize) x = -x;
    if (record) record[i] = x;
    parked[i * kStepThreads] = x;
  }
#pragma unroll
  for (int i = 0; i < C; i++) g[i] = parked[i * kStepThreads];
}

template <int C, class Entry>
__device__ __forceinline__ void read_features(const StepScalars& s, const Table<Entry>& table, const Entry& entry,
                                              int64_t begin, float* parked, float (&features)[kGradientFeatures][C]) {
  float g[C];
  read_gradients<C>(s, table, entry, begin, parked, g);
#pragma unroll
  for (int i = 0; i < C; i++) {
    float x[kGradientFeatures];
    features_of<DeviceMath>(s.features, g[i], x);
#pragma unroll
    for (int k = 0; k < kGradientFeatures; k++) features[k][i] = x[k];
  }
}

template <int C, class Entry>
__device__ __forceinline__ void write_parameters(const StepScalars& s, const Table<Entry>& table, const Entry& entry,
                                                 int64_t begin, float* parked, const float (&u)[C]) {
#pragma unroll
  for (int i = 0; i < C; i++) parked[i * kStepThreads] = u[i];
  const View view = entry.param;
  const int64_t rest = entry.numel - begin;
  const int count = rest < C ? static_cast<int>(rest) : C;
#pragma unroll 1
  for (int i = 0; i < count; i++) {
    const int64_t at = table.element(view, begin + i);
    float x = parked[i * kStepThreads];
    if (s.in_place) x = read_dense(view, at) * s.decay + s.lr * x;
    write_dense(view, at, x);
  }
}

// All layers for one thread's coordinates, from the inputs of the first; state, new_state: its lanes of the tile.
template <int H, int C, int Inputs, int ReadOuts>
__device__ __forceinline__ void step_layers(int layers, const float4* weights, const float4* biases,
                                            const float (&x0)[Inputs][C], const float* state, float* new_state,
                                            const float* out, float (&u)[ReadOuts][C]) {
  float h[H][C];
#pragma unroll
  for (int k = 0; k < H; k++) load_lanes<C>(state + k * kTile, h[k]);
  step_layer<H, C>(weights, biases, x0, h, state, new_state, layers == 1 ? out : nullptr, u);
#pragma unroll 1
  for (int l = 1; l < layers; l++) {
    state += 2 * H * kTile;
    float x[H][C];
#pragma unroll
    for (int k = 0; k < H; k++) load_lanes<C>(new_state + k * kTile, x[k]);
    new_state += 2 * H * kTile;
#pragma unroll
    for (int k = 0; k < H; k++) load_lanes<C>(state + k * kTile, h[k]);
    step_layer<H, C>(weights + Packed<H, Inputs>::layer(l), nullptr, x, h, state, new_state,
                     l + 1 == layers ? out : nullptr, u);
  }
}

template <int H, int C>
__device__ __forceinline__ void step_tile(const StepScalars& s, const Table<StepEntry>& table, const float4* weights,
                                          float* parked, int64_t global_tile, int lane) {
  int64_t first_tile;
  const StepEntry& entry = table.find(global_tile, first_tile);
  const int64_t tile = global_tile - first_tile;

  float features[kGradientFeatures][C], u[1][C];
  const float* out = reinterpret_cast<const float*>(weights + Packed<H>::out(s.config.layers));
  read_features<C>(s, table, entry, tile * kTile + lane, parked, features);
#pragma unroll
  for (int i = 0; i < C; i++) u[0][i] = out[H];

  const int64_t offset = tile * (2 * s.config.layers * H * kTile) + lane;
  step_layers<H, C>(s.config.layers, weights, nullptr, features, global(entry.state) + offset,
                    global(entry.new_state) + offset, out, u);

  // Looked up once more, so as not to hold registers all the while.
  const StepEntry& target = table.find(global_tile, first_tile);
  write_parameters<C>(s, table, target, (global_tile - first_tile) * kTile + lane, parked, u[0]);
}

template <int H, int C, int TableBytes>
__global__ void __launch_bounds__(kStepThreads, 2)
    step_kernel(const __grid_constant__ StepArguments<TableBytes> arguments) {
  L2L_DYNAMIC_SHARED(float4, weights);
  __shared__ float parked[C][kStepThreads];
  const StepScalars& s = arguments.scalars;
  pack_network<H>(s.config, s.phi, weights);
  __syncthreads();
  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<StepEntry> table(s.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
  for (; tile < s.tiles; tile += stride) step_tile<H, C>(s, table, weights, &parked[0][threadIdx.x], tile, lane);
}

}  // namespace l2l
