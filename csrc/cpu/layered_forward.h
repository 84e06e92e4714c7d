// The forward pass of one step layer by layer, for networks whose coordinates communicate: layers are separated by a
// sum over everything (averages.h), so a tile cannot go through all of them on its own.
#pragma once

#include <cmath>

#include "averages.h"

namespace l2l {

struct LayeredForward {
  const PackedNetwork& net;
  const Tiles& tiles;
  int64_t problems;
  TileRows from, to;  // states before and after, perhaps the same
  float* means;       // [layers][problems][gac], of the new h
  double* sums;       // [2][problems][gac]: sums and counts
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
    const int64_t n = problems * net.network().config.gac;
    average_cells(sums, n, means + layer * n);
  }

  // The states' finite h of `layer` get the means; returns whether all are finite.
  bool fill(int layer, const Tiles::Place& place) const {
    const Config& config = net.network().config;
    float* h = to(place, config.h_row(layer));
    return fill_cells(tiles, place, problems, means + layer * problems * config.gac, config.gac, known_finite, h, h);
  }

 private:
  struct Layer {
    std::vector<float> weights, before;  // before [gac]: the averages that are in the bias
    int skip_x = 0, skip_h = 0;
  };
  // Where all coordinates of a tile read the same averaged values, they are a part of the bias.
  Layer fold(int layer) const;
  bool same_averages(int layer) const;
  bool holds(const Layer& folded, int layer, const Tiles::Place& place) const;
  void run_tile(const Layer& folded, int layer, const Tiles::Place& place, const float* x) const;
  void add_cells(const Tiles::Place& place, const float* h, double* partial, double* counts) const;
};

template <class Inputs>
void LayeredForward::run_layer(int layer, const Inputs& inputs) {
  const Config& config = net.network().config;
  const int cells = config.gac;
  const Layer folded = fold(layer), whole;
  // One problem: the sums are taken while the tile is in the cache.
  const bool sum_here = cells > 0 && problems == 1;
  std::vector<double> partial(sum_here ? 2 * tiles.slices() * cells : 0, 0.0);
  double* counts = partial.data() + tiles.slices() * cells;
  tiles.for_each_slice([] { return 0; },
                       [&](int64_t slice, int64_t begin, int64_t end, int) {
                         alignas(64) float x[(kMaxFeatures + kMaxExtraInputs) * kTile];
                         tiles.visit(begin, end, [&](const Tiles::Place& place) {
                           if (layer == 0) inputs(place, x);
                           {
                             FlushDenormals flush;
                             const bool averaged = layer == 0 || fill(layer - 1, place);
                             run_tile(averaged && holds(folded, layer, place) ? folded : whole, layer, place, x);
                           }
                           if (sum_here)
                             add_cells(place, to(place, config.h_row(layer)), partial.data() + slice * cells,
                                       counts + slice * cells);
                         });
                       });
  if (cells == 0) return;
  if (sum_here)
    add_slices(partial, tiles.slices(), cells, sums);
  else
    sum_cells(tiles, problems, to, to, config.h_row(layer), cells, sums);
  known_finite = all_counted(tiles, problems, cells, sums);
}

}  // namespace l2l
