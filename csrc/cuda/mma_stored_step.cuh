// The step of stored_step.cuh on tensor cores, of plain networks with bfloat16 states: as mma_step.cuh, but for the
// rows.
//
// Stored h has 8 significant bits and needs no small part; that of the layer below is used before it is rounded. int8
// stays with stored_step.cuh: the step of a row of c is one for a whole tile, of which a warp here has a half.
#pragma once

#include "mma_step.cuh"
#include "stored_step.cuh"

namespace l2l {

#if L2L_CUDA_ARCH >= 800

// As MmaRows.
template <int H, int C>
struct MmaBfloat16Rows {
  static constexpr bool kExact = true;
  unsigned char* row;  // of h
  RoundingKey key;
  int lane;     // the first coordinate
  int rounded;  // which of the rounded rows that of c is

  __device__ __forceinline__ void load(int rows, float (&x)[C]) const {
    uint32_t codes[C];
    load_codes<C>(row + 2 * rows * kTile, codes, StateType::bfloat16);
#pragma unroll
    for (int i = 0; i < C; i++) x[i] = decode_bfloat16(codes[i]);
  }
  __device__ __forceinline__ void load_h(int q, float (&h)[C]) const { load(4 * q, h); }
  __device__ __forceinline__ void load_c(float (&c)[C]) const { load(H, c); }
  __device__ __forceinline__ void store(const float (&h)[C], const float (&c)[C]) const {
    uint32_t codes[C];
#pragma unroll
    for (int i = 0; i < C; i++) codes[i] = nearest_bfloat16(h[i]);
    store_codes<C>(row, codes, StateType::bfloat16);
#pragma unroll
    for (int i = 0; i < C; i++) {
      const uint32_t drawn = key.draw(key.lane(static_cast<uint32_t>(lane + i)), rounded / 2);
      codes[i] = stochastic_bfloat16(c[i], (drawn >> (rounded % 2 * 16)) & 0xffffu);
    }
    store_codes<C>(row + 2 * H * kTile, codes, StateType::bfloat16);
  }
  __device__ __forceinline__ void next_unit() { row += 2 * 4 * kTile, rounded += 4; }
  __device__ __forceinline__ void next_layer() { row += 2 * 2 * H * kTile, rounded += H; }
};
#endif

template <int H, int C>
__global__ void __launch_bounds__(kStepThreads, 3)
    mma_stored_step_kernel(const __grid_constant__ StepArguments<kLargeTable, NormalizedStepScalars> arguments) {
#if L2L_CUDA_ARCH >= 800
  L2L_DYNAMIC_SHARED(float4, packed);
  const StepScalars& s = arguments.scalars;
  const Table<StoredStepEntry> table(s.table, arguments.table.words);
  mma_step_parts<H, C>(s, table, packed, [&](const StoredStepEntry& entry, int64_t tile, int first, int unit) {
    unsigned char* const rows = global(entry.stored) + tile * (2 * 2 * s.config.layers * H * kTile);
    return MmaBfloat16Rows<H, C>{rows + 2 * (unit * kTile + first), RoundingKey(entry.seed, tile), first, unit};
  });
#endif
}

}  // namespace l2l
