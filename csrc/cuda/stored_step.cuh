// The step where states are not float32 (core/state_io.h), of plain networks and of those with normalized inputs.
//
// Owns: as in step.cuh, a thread has C adjacent coordinates of one tile, so that 64 / C threads of one warp have a
// tile. They exchange one number per row of c in int8: the largest magnitude, which chooses the row's step. Shared
// memory: beside the weights the new h of the layer, which the layer above reads before it is rounded. Global memory: a
// coordinate's codes are read once and written once, gradient and parameter as in step.cuh.
#pragma once

#include "normalized_step.cuh"

namespace l2l {

struct StoredStepEntry {
  int64_t end_tile;  // tiles of this and all previous entries
  int64_t numel;     // > 0
  View param;        // updated in place
  View grad;
  unsigned char* stored;  // 16-byte aligned
  uint64_t seed;          // of the rounding in this step
  float* record;          // receives g, or null
  Correction correction;  // the rest is of networks with averages, see NormalizedStepEntry
  const float* inputs;
  const float* nominal;
};

// C adjacent codes of one thread, loaded and stored at once.
template <int C>
__device__ __forceinline__ void load_codes(const unsigned char* from, uint32_t (&to)[C], StateType type) {
  static_assert(C == 4 || C == 2, "as in the wide mapping");
  if (type == StateType::int8) {
    const uint32_t word = C == 4 ? *reinterpret_cast<const uint32_t*>(from) : *reinterpret_cast<const uint16_t*>(from);
#pragma unroll
    for (int i = 0; i < C; i++) to[i] = (word >> (8 * i)) & 0xffu;
  } else if constexpr (C == 4) {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    to[0] = words.x & 0xffffu, to[1] = words.x >> 16, to[2] = words.y & 0xffffu, to[3] = words.y >> 16;
  } else {
    const uint32_t word = *reinterpret_cast<const uint32_t*>(from);
    to[0] = word & 0xffffu, to[1] = word >> 16;
  }
}

template <int C>
__device__ __forceinline__ void store_codes(unsigned char* to, const uint32_t (&from)[C], StateType type) {
  if (type == StateType::int8) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < C; i++) word |= (from[i] & 0xffu) << (8 * i);
    if constexpr (C == 4)
      *reinterpret_cast<uint32_t*>(to) = word;
    else
      *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(word);
  } else if constexpr (C == 4) {
    *reinterpret_cast<uint2*>(to) = make_uint2(from[0] | from[1] << 16, from[2] | from[3] << 16);
  } else {
    *reinterpret_cast<uint32_t*>(to) = from[0] | from[1] << 16;
  }
}

__device__ __forceinline__ int signed_code(uint32_t code) { return static_cast<int>(code ^ 0x80u) - 128; }

// One tile, as one of its threads sees it.
template <int C, StateType Type>
struct StoredTile {
  const Config& config;  // what is made of it is cheaper to make anew than to hold in registers
  unsigned char* tile;
  const RoundingKey key;
  int lane, rest;  // the thread's first coordinate, and how many the tile has from there on

  __device__ __forceinline__ StoredTile(const Config& config, const StoredStepEntry& entry, int64_t number, int lane)
      : config(config), key(entry.seed, number), lane(lane), rest(lanes_of(entry.numel, number) - lane) {
    tile = global(entry.stored) + number * layout().bytes;
  }

  __device__ __forceinline__ TileLayout layout() const { return TileLayout(config, Type); }
  __device__ __forceinline__ unsigned char* row(int r) const {
    constexpr int kBytes = Type == StateType::int8 ? 1 : 2;
    return tile + kBytes * (r * kTile + lane);
  }
  __device__ __forceinline__ unsigned char* average(int k) const {
    return tile + layout().averages + 2 * (k * kTile + lane);
  }
  // What is drawn for two rounded rows, `even` and the next, to `parked` (kStepThreads apart).
  __device__ __forceinline__ void draw(int even, float* parked) const {
#pragma unroll
    for (int i = 0; i < C; i++)
      parked[i * kStepThreads] = float_of(key.draw(key.lane(static_cast<uint32_t>(lane + i)), even / 2));
  }
  // The 16 bits of one of the two, half 0 or 1; low bytes come first.
  __device__ __forceinline__ static uint32_t random(const float* parked, int i, int half) {
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const unsigned char*>(parked + i * kStepThreads) + sizeof bits * half, sizeof bits);
    return bits;
  }

  __device__ __forceinline__ void load_h(int r, float (&h)[C]) const {
    uint32_t codes[C];
    load_codes<C>(row(r), codes, Type);
#pragma unroll
    for (int i = 0; i < C; i++)
      h[i] = Type == StateType::int8 ? decode_h(signed_code(codes[i])) : decode_bfloat16(codes[i]);
  }

  // rounded: which of the rounded rows it is.
  __device__ __forceinline__ void load_c(int r, int rounded, float (&c)[C]) const {
    uint32_t codes[C];
    load_codes<C>(row(r), codes, Type);
    float step = 0.f;
    if (Type == StateType::int8) step = power_of_two(signed_code(tile[layout().exponents + rounded]));
#pragma unroll
    for (int i = 0; i < C; i++)
      c[i] = Type == StateType::int8 ? decode_c(signed_code(codes[i]), step) : decode_bfloat16(codes[i]);
  }

  __device__ __forceinline__ void store_h(int r, const float (&h)[C]) const {
    uint32_t codes[C];
#pragma unroll
    for (int i = 0; i < C; i++)
      codes[i] = Type == StateType::int8 ? static_cast<uint32_t>(encode_h(h[i])) : nearest_bfloat16(h[i]);
    store_codes<C>(row(r), codes, Type);
  }

  // parked, half: see draw. All threads of the tile take part.
  __device__ __forceinline__ void store_c(int r, int rounded, const float* parked, int half,
                                          const float (&c)[C]) const {
    uint32_t codes[C];
    if constexpr (Type == StateType::int8) {
      uint32_t largest = 0;
#pragma unroll
      for (int i = 0; i < C; i++) {
        const uint32_t magnitude = i < rest ? finite_magnitude(c[i]) : 0u;
        largest = magnitude > largest ? magnitude : largest;
      }
      constexpr int kThreads = kTile / C;
      const uint32_t mask = kThreads == 32 ? 0xffffffffu : 0xffffu << (threadIdx.x & 16u);
#pragma unroll
      for (int other = kThreads / 2; other > 0; other /= 2) {
        const uint32_t magnitude = __shfl_xor_sync(mask, largest, other);
        largest = magnitude > largest ? magnitude : largest;
      }
      const int e = step_exponent(largest);
      const float inverse = power_of_two(-e);
#pragma unroll
      for (int i = 0; i < C; i++) codes[i] = static_cast<uint32_t>(encode_c(c[i], inverse, random(parked, i, half)));
      if (lane == 0) tile[layout().exponents + rounded] = static_cast<unsigned char>(e);
    } else {
#pragma unroll
      for (int i = 0; i < C; i++) codes[i] = stochastic_bfloat16(c[i], random(parked, i, half));
    }
    store_codes<C>(row(r), codes, Type);
  }

  __device__ __forceinline__ void load_average(int k, float (&x)[C]) const {
    uint32_t codes[C];
    load_codes<C>(average(k), codes, StateType::bfloat16);
#pragma unroll
    for (int i = 0; i < C; i++) x[i] = decode_bfloat16(codes[i]);
  }

  __device__ __forceinline__ void store_average(int k, const float* parked, const float (&x)[C]) const {
    uint32_t codes[C];
#pragma unroll
    for (int i = 0; i < C; i++) codes[i] = stochastic_bfloat16(x[i], random(parked, i, k % 2));
    store_codes<C>(average(k), codes, StateType::bfloat16);
  }
};

// As step_layer of step.cuh. new_h, parked: the thread's, kStepThreads apart. Units go in pairs, for which one number
// is drawn; it is parked so as not to hold registers all the while.
template <int H, int C, int Inputs, int ReadOuts, StateType Type>
__device__ __forceinline__ void stored_layer(const float4* weights, const float4* biases, const float (&x)[Inputs][C],
                                             const StoredTile<C, Type>& tile, int layer, float* new_h, float* parked,
                                             const float* out, float (&u)[ReadOuts][C]) {
  float h[H][C];
#pragma unroll
  for (int k = 0; k < H; k++) tile.load_h(2 * layer * H + k, h[k]);
  static_assert(H % 2 == 0, "a layer's rounded rows are pairs");
#pragma unroll 1
  for (int even = 0; even < H; even += 2) {
    tile.draw(layer * H + even, parked);
#pragma unroll 1
    for (int half = 0; half < 2; half++) {
      const int j = even + half, row = 2 * layer * H + j, rounded = layer * H + j;
      float cell[C];
      tile.load_c(row + H, rounded, cell);
      float a[4][C];
      unit_preactivations<H, C>(weights, biases ? biases[j] : weights[0], x, h, a);
      float y[C];
#pragma unroll
      for (int i = 0; i < C; i++) {
        y[i] = cell_step<DeviceMath>(a[0][i], a[1][i], a[2][i], a[3][i], cell[i]);
        new_h[(j * C + i) * kStepThreads] = y[i];
      }
      tile.store_h(row, y);
      tile.store_c(row + H, rounded, parked, half, cell);
      if (out) add_read_out<H, C>(out, j, y, u);
      weights += 1 + Inputs + H;
    }
  }
}

template <int H, int C, StateType Type, int Inputs, int ReadOuts>
__device__ __forceinline__ void stored_layers(int layers, const float4* weights, const float4* biases,
                                              const float (&x0)[Inputs][C], const StoredTile<C, Type>& tile,
                                              float* new_h, float* parked, const float* out, float (&u)[ReadOuts][C]) {
  stored_layer<H, C>(weights, biases, x0, tile, 0, new_h, parked, layers == 1 ? out : nullptr, u);
#pragma unroll 1
  for (int l = 1; l < layers; l++) {
    float x[H][C];
#pragma unroll
    for (int k = 0; k < H; k++)
#pragma unroll
      for (int i = 0; i < C; i++) x[k][i] = new_h[(k * C + i) * kStepThreads];
    stored_layer<H, C>(weights + Packed<H, Inputs>::layer(l), nullptr, x, tile, l, new_h, parked,
                       l + 1 == layers ? out : nullptr, u);
  }
}

// As read_normalized of normalized_step.cuh. rounded: the first of the averages' rounded rows.
template <int C, StateType Type>
__device__ __forceinline__ void read_stored_averages(const NormalizedStepScalars& s,
                                                     const Table<StoredStepEntry>& table, const StoredStepEntry& entry,
                                                     const StoredTile<C, Type>& tile, int64_t number, int rounded,
                                                     float* parked, float* directions,
                                                     float (&features)[kNormalizedFeatures][C]) {
  float g[C], rows[kAverages][C];
  read_gradients<C>(s, table, entry, number * kTile + tile.lane, parked, g);
#pragma unroll
  for (int k = 0; k < kAverages; k++) tile.load_average(k, rows[k]);
  take_gradients<C>(s, entry, g, rows, directions, features);
  static_assert(kAverages % 2 == 0, "averages are pairs of rounded rows");
#pragma unroll
  for (int k = 0; k < kAverages; k += 2) {
    tile.draw(rounded + k, parked);
    tile.store_average(k, parked, rows[k]);
    tile.store_average(k + 1, parked, rows[k + 1]);
  }
}

// new_h, directions: the thread's in shared memory.
template <int H, int C, int Features, StateType Type>
__device__ __forceinline__ void stored_step_tile(const NormalizedStepScalars& s, const Table<StoredStepEntry>& table,
                                                 const float4* weights, float* parked, float* new_h, float* directions,
                                                 int64_t global_tile, int lane) {
  constexpr bool kNormalized = Features == kNormalizedFeatures;
  constexpr int kReadOuts = Packed<H, Features>::kReadOuts;
  int64_t first_tile;
  const StoredStepEntry& entry = table.find(global_tile, first_tile);
  const int64_t number = global_tile - first_tile;
  const StoredTile<C, Type> tile(s.config, entry, number, lane);
  float features[Features][C], u[kReadOuts][C];
  if constexpr (kNormalized) {
    read_stored_averages<C>(s, table, entry, tile, number, s.config.layers * H, parked, directions, features);
  } else {
    read_features<C>(s, table, entry, number * kTile + lane, parked, features);
  }
  const float* out = reinterpret_cast<const float*>(weights + Packed<H, Features>::out(s.config.layers));
#pragma unroll
  for (int r = 0; r < kReadOuts; r++)
#pragma unroll
    for (int i = 0; i < C; i++) u[r][i] = out[kReadOuts * H + r];
  const float4* biases = nullptr;
  if constexpr (kNormalized)
    if (s.biases) biases = global(s.biases) + (&entry - reinterpret_cast<const StoredStepEntry*>(table.words)) * H;
  stored_layers<H, C>(s.config.layers, weights, biases, features, tile, new_h, parked, out, u);

  // Looked up once more, so as not to hold registers all the while.
  const StoredStepEntry& target = table.find(global_tile, first_tile);
  if constexpr (kNormalized) make_updates<C>(nominal_of(target.nominal), s.config.output_scale, directions, u);
  write_parameters<C>(s, table, target, (global_tile - first_tile) * kTile + lane, parked, u[0]);
}

// Dynamic shared memory of a block: weights, the new h of a layer, and directions.
template <int H, int C, int Features>
L2L_HOST_DEVICE constexpr int stored_step_bytes(int layers) {
  return Packed<H, Features>::bytes(layers) + 4 * kStepThreads * C * (H + (Features == kNormalizedFeatures ? 1 : 0));
}

// Type: a StateType as a number, which names of symbols show.
template <int H, int C, int Features, int Type>
__global__ void __launch_bounds__(kStepThreads, 2)
    stored_step_kernel(const __grid_constant__ StepArguments<kLargeTable, NormalizedStepScalars> arguments) {
  L2L_DYNAMIC_SHARED(float4, weights);
  __shared__ float parked[C][kStepThreads];
  const NormalizedStepScalars& s = arguments.scalars;
  float* const new_h =
      reinterpret_cast<float*>(weights) + Packed<H, Features>::bytes(s.config.layers) / 4 + threadIdx.x;
  pack_network<H, Features>(s.config, s.phi, weights);
  __syncthreads();
  constexpr int kLanes = kTile / C, kTilesPerBlock = kStepThreads / kLanes;
  const Table<StoredStepEntry> table(s.table, arguments.table.words);
  const int lane = static_cast<int>(threadIdx.x) % kLanes * C;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kTilesPerBlock;
  int64_t tile = static_cast<int64_t>(blockIdx.x) * kTilesPerBlock + threadIdx.x / kLanes;
  for (; tile < s.tiles; tile += stride)
    stored_step_tile<H, C, Features, static_cast<StateType>(Type)>(s, table, weights, &parked[0][threadIdx.x], new_h,
                                                                   new_h + H * C * kStepThreads, tile, lane);
}

}  // namespace l2l
