// What the operators with global averaging cells (GAC) share: the tiles of several tensors, sums over coordinates, and
// the forward pass layer by layer.
//
// The first `gac` units of every layer are averaged over all coordinates of an optimizee, so layers are separated by a
// sum over everything. Tiles are cut into a fixed number of slices, a slice adds its tiles in order in float64 and
// slices are added in order: the means are the same for any number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "packing.h"
#include "parallel.h"

namespace l2l {

constexpr int64_t kGacSlices = 64;

// The tiles of several tensors in a row.
class Tiles {
 public:
  struct Place {
    size_t tensor;
    int64_t tile;  // in the tensor
    int64_t at;    // among all
    int count;     // coordinates in it
  };

  void add(int64_t numel) {
    numels_.push_back(numel);
    ends_.push_back(total() + tiles_for(numel));
    coordinates_ += numel;
  }
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t coordinates() const { return coordinates_; }
  size_t tensors() const { return numels_.size(); }
  int64_t numel(size_t tensor) const { return numels_[tensor]; }
  int64_t first(size_t tensor) const { return tensor == 0 ? 0 : ends_[tensor - 1]; }

  template <class Visit>
  void visit(int64_t begin, int64_t end, const Visit& visit) const {
    size_t k = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (int64_t at = begin; at < end; at++) {
      while (at >= ends_[k]) k++;
      const int64_t tile = at - first(k);
      visit(Place{k, tile, at, static_cast<int>(std::min<int64_t>(kTile, numels_[k] - tile * kTile))});
    }
  }

  // body(slice, begin, end) for every slice, in parallel.
  template <class Body>
  void slices(const Body& body) const {
    const int64_t tiles = total(), slices = std::min(tiles, kGacSlices);
    parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
      for (int64_t slice = begin; slice < end; slice++)
        body(slice, tiles * slice / slices, tiles * (slice + 1) / slices);
    });
  }

 private:
  std::vector<int64_t> numels_, ends_;
  int64_t coordinates_ = 0;
};

// One row of 64 floats in every tile of every tensor: tile t of tensor k is at base[k] + t * stride.
struct TileRows {
  std::vector<float*> base;
  int64_t stride = 0;

  float* operator()(const Tiles::Place& place, int64_t row = 0) const {
    return base[place.tensor] + place.tile * stride + row * kTile;
  }
};

// All tensors' tiles of `rows` rows in one buffer.
TileRows tile_rows(const Tiles& tiles, float* buffer, int64_t rows);

// An activation that is not finite is left out of its average and goes out itself: one bad gradient must not reach the
// other coordinates.
bool all_finite(const float* x, int count);

// sums[0][g][i] = sum over the coordinates of group g of row `row + i`, for i < cells, and sums[1][g][i] how many there
// are, of those where that row of `activations` is finite. A tensor's coordinates belong to `groups` groups of equal
// size, one after the other.
void sum_cells(const Tiles& tiles, int64_t groups, const TileRows& rows, const TileRows& activations, int64_t row,
               int cells, double* sums);

// Rows [0, cells) of one tile = the values [groups][cells] of the lanes' groups, where those of `activations` (perhaps
// the same) are finite; returns whether all are, which may be known. Lanes beyond the last coordinate keep what they
// hold.
bool fill_cells(const Tiles& tiles, const Tiles::Place& place, int64_t groups, const float* values, int cells,
                bool known_finite, const float* activations, float* rows);

// values = sums / counts, from [2][n] as sum_cells leaves them; zero where nothing was counted.
void average_cells(const double* sums, int64_t n, float* values);

// Whether nothing was left out of the sums of `cells` cells of every group.
bool all_counted(const Tiles& tiles, int64_t groups, int cells, const double* sums);

// The forward pass of one step on all tensors.
struct GacForward {
  const PackedNetwork& net;
  const Tiles& tiles;
  int64_t groups;
  TileRows from, to;  // states before and after, perhaps the same
  float* means;       // [layers][groups][gac], of the new h
  double* sums;       // [2][groups][gac]: sums and counts
  // Whether averages that all coordinates of a tile have in common may become a part of the bias: less work, and other
  // rounding.
  bool may_fold;
  bool known_finite = false;  // all averaged cells of the layer that was run last; set by run_layer

  // Layer `layer` of all tiles and the sums of its cells. inputs(place, rows) gives layer 0 its features and extra
  // inputs; means of the layers below are final.
  template <class Inputs>
  void run_layer(int layer, const Inputs& inputs);

  // means[layer] from the sums.
  void average(int layer) {
    const int64_t n = groups * net.network().config.gac;
    average_cells(sums, n, means + layer * n);
  }

  // The states' finite h of `layer` get the means; returns whether all are finite.
  bool fill(int layer, const Tiles::Place& place) const {
    const Config& config = net.network().config;
    float* h = to(place, config.h_row(layer));
    return fill_cells(tiles, place, groups, means + layer * groups * config.gac, config.gac, known_finite, h, h);
  }

 private:
  struct Layer {
    std::vector<float> weights, bias, before;  // before [gac]: the averages that are in the bias
    int skip_x = 0, skip_h = 0;
  };
  // Where all coordinates of a tile read the same averaged values, they are a part of the bias.
  Layer fold(int layer) const;
  bool same_averages(int layer) const;
  bool holds(const Layer& folded, int layer, const Tiles::Place& place) const;
  void run_tile(const Layer& folded, int layer, const Tiles::Place& place, const float* x) const;
};

template <class Inputs>
void GacForward::run_layer(int layer, const Inputs& inputs) {
  const Config& config = net.network().config;
  const int cells = config.gac;
  const Layer folded = fold(layer), whole;
  // One group: the sums are taken while the tile is in the cache.
  const bool sum_here = cells > 0 && groups == 1;
  std::vector<double> partial(sum_here ? 2 * kGacSlices * cells : 0, 0.0);
  double* counts = partial.data() + kGacSlices * cells;
  tiles.slices([&](int64_t slice, int64_t begin, int64_t end) {
    alignas(64) float x[(kMaxFeatures + kMaxExtraInputs) * kTile];
    tiles.visit(begin, end, [&](const Tiles::Place& place) {
      if (layer == 0) inputs(place, x);
      {
        FlushDenormals flush;
        const bool averaged = layer == 0 || fill(layer - 1, place);
        run_tile(averaged && holds(folded, layer, place) ? folded : whole, layer, place, x);
      }
      if (!sum_here) return;
      const float* h = to(place, config.h_row(layer));
      for (int i = 0; i < cells; i++) {
        double lanes[8] = {};
        const float* row = h + i * kTile;
        int lane = 0;
        for (; lane + 8 <= place.count; lane += 8)
          for (int k = 0; k < 8; k++) lanes[k] += row[lane + k];
        for (int k = 0; lane + k < place.count; k++) lanes[k] += row[lane + k];
        for (int k = 1; k < 8; k++) lanes[0] += lanes[k];
        int count = place.count;
        if (!std::isfinite(lanes[0])) {  // as that of finite floats is
          lanes[0] = 0.0;
          for (int k = 0; k < place.count; k++) {
            if (std::isfinite(row[k]))
              lanes[0] += row[k];
            else
              count--;
          }
        }
        partial[slice * cells + i] += lanes[0];
        counts[slice * cells + i] += count;
      }
    });
  });
  if (cells == 0) return;
  if (sum_here) {
    std::fill(sums, sums + 2 * cells, 0.0);
    for (int64_t slice = 0; slice < kGacSlices; slice++)
      for (int i = 0; i < cells; i++) {
        sums[i] += partial[slice * cells + i];
        sums[cells + i] += counts[slice * cells + i];
      }
  } else {
    sum_cells(tiles, groups, to, to, config.h_row(layer), cells, sums);
  }
  known_finite = all_counted(tiles, groups, cells, sums);
}

}  // namespace l2l
