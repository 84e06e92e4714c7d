// What networks with inputs per tensor are told of its coordinates as a whole: sums over each tensor of a list, in
// float64, before the step. The same products as in cpu/isa/sums.h.
//
// Owns: a block has a slice of one tensor, a thread every 256th coordinate of it; then a block has a tensor, a warp one
// of its sums, a thread every 32nd slice. Shared memory: their partial sums, added in a fixed tree. Global memory:
// parameter, gradient and three averages of a coordinate, read once. Slices depend on the number of coordinates alone,
// so that every GPU adds up in one order.
#pragma once

#include "launch.cuh"

namespace l2l {

constexpr int kSumThreads = 256, kMaxSlices = 1024;
constexpr int64_t kSliceTiles = 64;  // at least: 16 coordinates of a thread

struct SumsEntry {
  int64_t end_tile;  // slices, not tiles, of this and all previous entries: what the table is searched by
  int64_t numel;     // perhaps 0
  int64_t slice;     // coordinates
  View param, grad;
  const unsigned char* averages;  // of the first tile
  int64_t tile_bytes;             // from one tile to the next
  Correction correction;          // of the averages before the step; zero if there were no steps
  int32_t stored;                 // whether they are bfloat16
  float factor;                   // of the root with the gradient in it
};

struct SumsScalars {
  int64_t slices;
  TableRef table;
  double rate;      // of the root of squares
  double sign;      // of the gradient
  double* partial;  // [slices][kTensorSums]
  double* out;      // [entries][kTensorSums + 1]
};

template <int TableBytes>
struct SumsArguments {
  SumsScalars scalars;
  InlineTable<TableBytes> table;
};

inline int64_t slice_of(int64_t numel) {
  const int64_t tiles = tiles_for(numel), each = (tiles + kMaxSlices - 1) / kMaxSlices;
  return kTile * (each > kSliceTiles ? each : kSliceTiles);
}

inline int64_t slices_of(int64_t numel) { return (numel + slice_of(numel) - 1) / slice_of(numel); }

// Average k of a coordinate, whose tile and lane are given.
__device__ __forceinline__ float read_average(const SumsEntry& entry, int64_t tile, int lane, int k) {
  const unsigned char* row = global(entry.averages) + tile * entry.tile_bytes;
  const int at = k * kTile + lane;
  return entry.stored ? decode_bfloat16(reinterpret_cast<const uint16_t*>(row)[at])
                      : reinterpret_cast<const float*>(row)[at];
}

// What is not finite counts as zero: one bad coordinate must not reach the others through their tensor.
__device__ __forceinline__ double finite_product(double a, double b) {
  const double product = a * b;
  return product - product == 0. ? product : 0.;
}

template <int TableBytes>
__global__ void __launch_bounds__(kSumThreads)
    tensor_sums_kernel(const __grid_constant__ SumsArguments<TableBytes> arguments) {
  __shared__ double partial[kTensorSums][kSumThreads];
  const SumsScalars& s = arguments.scalars;
  const Table<SumsEntry> table(s.table, arguments.table.words);
  const int thread = static_cast<int>(threadIdx.x);
  for (int64_t slice = blockIdx.x; slice < s.slices; slice += gridDim.x) {
    int64_t first_slice;
    const SumsEntry& entry = table.find(slice, first_slice);
    const int64_t begin = (slice - first_slice) * entry.slice;
    const int64_t end = begin + entry.slice < entry.numel ? begin + entry.slice : entry.numel;
    double sum[kTensorSums] = {};
    for (int64_t i = begin + thread; i < end; i += kSumThreads) {
      const int64_t tile = i / kTile;
      const int lane = static_cast<int>(i % kTile);
      const float m1 = read_average(entry, tile, lane, 0), r2 = read_average(entry, tile, lane, 3);
      const double root = read_average(entry, tile, lane, 2);
      const double d = m1 * entry.correction.of[0] / (r2 * entry.correction.of[3] + kAdamEps);
      const double theta = table.read(entry.param, i), g = table.read(entry.grad, i);
      sum[0] += finite_product(theta, theta);
      sum[1] += finite_product(g, g);
      sum[2] += finite_product(root, root);
      sum[3] += finite_product(d, d);
      sum[4] += finite_product(g, d);
    }
#pragma unroll
    for (int k = 0; k < kTensorSums; k++) partial[k][thread] = sum[k];
    __syncthreads();
    for (int half = kSumThreads / 2; half > 0; half /= 2) {
      if (thread < half)
#pragma unroll
        for (int k = 0; k < kTensorSums; k++) partial[k][thread] += partial[k][thread + half];
      __syncthreads();
    }
    if (thread < kTensorSums) s.partial[slice * kTensorSums + thread] = partial[thread][0];
    __syncthreads();
  }
}

// A block per tensor: its slices together, and what is made of the sums.
template <int TableBytes>
__global__ void __launch_bounds__(32 * kTensorSums)
    tensor_totals_kernel(const __grid_constant__ SumsArguments<TableBytes> arguments) {
  __shared__ double partial[kTensorSums][32];
  const SumsScalars& s = arguments.scalars;
  const Table<SumsEntry> table(s.table, arguments.table.words);
  const SumsEntry* const entries = reinterpret_cast<const SumsEntry*>(table.words);
  const SumsEntry& entry = entries[blockIdx.x];
  const int64_t first = blockIdx.x == 0 ? 0 : entries[blockIdx.x - 1].end_tile;
  const int lane = static_cast<int>(threadIdx.x) % 32, which = static_cast<int>(threadIdx.x) / 32;
  double sum = 0.;
  for (int64_t slice = first + lane; slice < entry.end_tile; slice += 32) sum += s.partial[slice * kTensorSums + which];
  partial[which][lane] = sum;
  __syncthreads();
  for (int half = 16; half > 0; half /= 2) {
    if (lane < half) partial[which][lane] += partial[which][lane + half];
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  double* const out = s.out + static_cast<int64_t>(blockIdx.x) * (kTensorSums + 1);
  const double factor = entry.factor;
  out[0] = partial[0][0];
  out[1] = partial[1][0];
  out[2] = ((1. - s.rate) * partial[2][0] + s.rate * partial[1][0]) * factor * factor;
  out[3] = partial[3][0];
  out[4] = s.sign * partial[4][0];
  out[kTensorSums] = static_cast<double>(entry.numel);
}

// Two launches for all entries. `scalars` has everything; `words` is the table unless it is in device memory already.
inline LaunchStatus launch_tensor_sums(const SumsScalars& scalars, const std::vector<int64_t>& words,
                                       cudaStream_t stream) {
  const auto run = [&](auto bytes) -> LaunchStatus {
    constexpr int kBytes = decltype(bytes)::value;
    SumsArguments<kBytes> arguments;
    arguments.scalars = scalars;
    if (!scalars.table.device) fill_inline(arguments.table, words);
    if (scalars.slices > 0) {
      int resident = 0;
      LaunchStatus status = resident_blocks(&tensor_sums_kernel<kBytes>, kSumThreads, 0, &resident);
      if (status != cudaSuccess) return status;
      const int blocks = static_cast<int>(std::min<int64_t>(scalars.slices, resident));
      status = launch(&tensor_sums_kernel<kBytes>, blocks, kSumThreads, 0, stream, arguments);
      if (status != cudaSuccess) return status;
    }
    return launch(&tensor_totals_kernel<kBytes>, scalars.table.entries, 32 * kTensorSums, 0, stream, arguments);
  };
  if (!scalars.table.device && words.size() * 8 > kSmallTable) return run(std::integral_constant<int, kLargeTable>{});
  return run(std::integral_constant<int, kSmallTable>{});
}

}  // namespace l2l
