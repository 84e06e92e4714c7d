// The state of one tensor: [tiles][2 * layers * hidden][kTile] float32. A tile holds 64 consecutive coordinates; row r
// of a tile holds one number of each: for layer l, rows [2*l*hidden, ...) are h and rows [(2*l+1)*hidden, ...) are c. A
// row is contiguous, so it is read by SIMD lanes or by the threads of two warps at once; a tile is contiguous, so it
// streams. What a tile holds beyond the tensor's last coordinate may be anything and must reach nothing.
#pragma once

#include "config.h"

namespace l2l {

constexpr int kTile = 64;

L2L_HOST_DEVICE int64_t tiles_for(int64_t numel) { return (numel + kTile - 1) / kTile; }

// Coordinates in a tile of a tensor.
L2L_HOST_DEVICE int lanes_of(int64_t numel, int64_t tile) {
  const int64_t rest = numel - tile * kTile;
  return rest < kTile ? static_cast<int>(rest) : kTile;
}

// Floats from one tile to the next.
L2L_HOST_DEVICE int64_t tile_floats(const Config& config) { return static_cast<int64_t>(config.rows()) * kTile; }

}  // namespace l2l
