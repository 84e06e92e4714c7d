// Tensors of any dtype and strides into rows as the backward kernel reads them: float32, 64 to a tile, padding zero.
//
// Owns: a thread has one coordinate of one tensor at a time. Global memory: read and written once.
#pragma once

#include "launch.cuh"

namespace l2l {

struct GatherEntry {
  int64_t end_tile;  // tiles of this and all previous entries
  int64_t numel;
  View from;
  float* to;  // [tiles][64]
};

struct GatherArguments {
  int64_t tiles;
  TableRef table;
  InlineTable<kSmallTable> words;
};

constexpr int kGatherThreads = 256;

__global__ static void __launch_bounds__(kGatherThreads)
    gather_kernel(const __grid_constant__ GatherArguments arguments) {
  const Table<GatherEntry> table(arguments.table, arguments.words.words);
  const int lane = static_cast<int>(threadIdx.x) % kTile;
  constexpr int kTiles = kGatherThreads / kTile;
  int64_t global_tile = static_cast<int64_t>(blockIdx.x) * kTiles + threadIdx.x / kTile;
  for (; global_tile < arguments.tiles; global_tile += static_cast<int64_t>(gridDim.x) * kTiles) {
    int64_t first_tile;
    const GatherEntry& entry = table.find(global_tile, first_tile);
    const int64_t at = (global_tile - first_tile) * kTile + lane;
    entry.to[at] = at < entry.numel ? table.read(entry.from, at) : 0.f;
  }
}

// Few tensors of at most some 60 dimensions: their table fits into the arguments.
inline LaunchStatus launch_gather(const TableBuilder<GatherEntry>& table, cudaStream_t stream) {
  if (table.entries().empty()) return cudaSuccess;
  const std::vector<int64_t> words = table.words();
  if (words.size() * 8 > kSmallTable) return cudaErrorInvalidValue;
  GatherArguments arguments;
  arguments.tiles = table.entries().back().end_tile;
  arguments.table = table.ref();
  fill_inline(arguments.words, words);
  int resident = 0;
  const LaunchStatus status = resident_blocks(&gather_kernel, kGatherThreads, 0, &resident);
  if (status != cudaSuccess) return status;
  const int64_t needed = (arguments.tiles * kTile + kGatherThreads - 1) / kGatherThreads;
  return launch(&gather_kernel, static_cast<int>(std::min<int64_t>(needed, resident)), kGatherThreads, 0, stream,
                arguments);
}

}  // namespace l2l
