// Global averaging cells (GAC): sums over the coordinates of a problem, and averages back to them.
//
// The first `gac` units of every layer are averaged over all coordinates of a problem. A tensor's coordinates belong to
// `problems` problems of equal size, one after the other. An activation that is not finite is left out of its average
// and goes out itself: one bad gradient must not reach the other coordinates.
#pragma once

#include "tiles.h"

namespace l2l {

bool all_finite(const float* x, int count);

// Adds to sums[i] and counts[i], for i < cells, row i of one tile and how many of its coordinates are in: those whose
// activation is finite.
void add_tile(const float* rows, const float* activations, int count, int cells, double* sums, double* counts);

// sums[0][p][i] = sum over the coordinates of problem p of row `row + i`, for i < cells, and sums[1][p][i] how many
// there are, of those where that row of `activations` is finite.
void sum_cells(const Tiles& tiles, int64_t problems, const TileRows& rows, const TileRows& activations, int64_t row,
               int cells, double* sums);

// The sums of the slices, [2][slices][cells], in order.
void add_slices(const std::vector<double>& partial, int64_t slices, int cells, double* sums);

// Rows [0, cells) of one tile = the values [problems][cells] of the lanes' problems, where those of `activations`
// (perhaps the same) are finite; returns whether all are, which may be known. Lanes beyond the last coordinate keep
// what they hold.
bool fill_cells(const Tiles& tiles, const Tiles::Place& place, int64_t problems, const float* values, int cells,
                bool known_finite, const float* activations, float* rows);

// values = sums / counts, from [2][n] as sum_cells leaves them; zero where nothing was counted.
void average_cells(const double* sums, int64_t n, float* values);

// Whether nothing was left out of the sums of `cells` cells of every problem.
bool all_counted(const Tiles& tiles, int64_t problems, int cells, const double* sums);

}  // namespace l2l
