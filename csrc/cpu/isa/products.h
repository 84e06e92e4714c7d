// The three matrix products of the cell, on a tile whose rows are lanes of coordinates.
//
//   pre-activations  a[gate] = bias + sum_k w[k][gate] x[k]          weights broadcast, rows of x streamed
//   input gradients  d x[k]  = sum_r w[r][k] d a[r]                  the same with the transposed weights
//   weight gradients d w     = sum over steps and lanes of d a x     both streamed, sums kept in registers
//
// Each keeps a block of accumulators in registers that covers the latency of the multiply-add, and loads fewer operands
// than it multiplies. Weights are packed so that the operands of one block are adjacent (packing.h).
#pragma once

#include "math.h"

namespace l2l {
namespace L2L_ISA {

// A block of rows, one every `stride` floats.
struct Rows {
  const float* data;
  long stride;
};

// Pre-activations of the 4 gates of Units consecutive units for Vectors vectors of coordinates.
//   weights [Units][1 + inputs + hidden][4], the bias first; x has `inputs` rows, h has `hidden`. bias: [Units][4] in
//   the place of theirs, or null.
template <int Units, int Vectors>
static L2L_ALWAYS_INLINE void gate_preactivations(const float* __restrict weights, const float* __restrict bias, Rows x,
                                                  int inputs, Rows h, int hidden, Wide<Vectors> (&a)[Units][4]) {
  const long unit = 4L * (1 + inputs + hidden), bias_unit = bias ? 4 : unit;
  if (!bias) bias = weights;
  L2L_UNROLL for (int u = 0; u < Units; u++)
    L2L_UNROLL for (int g = 0; g < 4; g++)
      L2L_UNROLL for (int v = 0; v < Vectors; v++) a[u][g].v[v] = broadcast(bias[u * bias_unit + g]);
  weights += 4;

  const auto accumulate = [&](const float* row) __attribute__((always_inline)) {
    vf lane[Vectors];
    L2L_UNROLL for (int v = 0; v < Vectors; v++) lane[v] = load(row + v * kLanes);
    L2L_UNROLL for (int u = 0; u < Units; u++)
      L2L_UNROLL for (int g = 0; g < 4; g++) {
        const vf w = broadcast(weights[u * unit + g]);
        L2L_UNROLL for (int v = 0; v < Vectors; v++) a[u][g].v[v] += w * lane[v];
      }
    weights += 4;
  };
  for (int k = 0; k < inputs; k++) accumulate(x.data + k * x.stride);
  _Pragma("GCC unroll 2") for (int k = 0; k < hidden; k++) accumulate(h.data + k * h.stride);
}

// out[k] (+)= sum_r weights[k / 4][r][k % 4] d[r] for 4 * Blocks consecutive k; `rows` rows of d.
template <int Blocks, int Vectors, bool Add>
static L2L_ALWAYS_INLINE void transposed_product(const float* __restrict weights, const float* __restrict d, long stride,
                                                 int rows, float* __restrict out) {
  vf sum[Blocks][4][Vectors];
  L2L_UNROLL for (int b = 0; b < Blocks; b++)
    L2L_UNROLL for (int k = 0; k < 4; k++)
      L2L_UNROLL for (int v = 0; v < Vectors; v++)
        sum[b][k][v] = Add ? load(out + (4 * b + k) * stride + v * kLanes) : vf{};
  const long block = 4L * rows;
  _Pragma("GCC unroll 2") for (int r = 0; r < rows; r++) {
    vf lane[Vectors];
    L2L_UNROLL for (int v = 0; v < Vectors; v++) lane[v] = load(d + r * stride + v * kLanes);
    L2L_UNROLL for (int b = 0; b < Blocks; b++)
      L2L_UNROLL for (int k = 0; k < 4; k++) {
        const vf w = broadcast(weights[b * block + 4 * r + k]);
        L2L_UNROLL for (int v = 0; v < Vectors; v++) sum[b][k][v] += w * lane[v];
      }
  }
  L2L_UNROLL for (int b = 0; b < Blocks; b++)
    L2L_UNROLL for (int k = 0; k < 4; k++)
      L2L_UNROLL for (int v = 0; v < Vectors; v++) store(out + (4 * b + k) * stride + v * kLanes, sum[b][k][v]);
}

// One operand of a weight gradient over the steps of a segment: row r of step t is data[t * step + r * stride].
struct StepRows {
  const float* data;
  long step;
  long stride;
};

static L2L_ALWAYS_INLINE void add_to(double* out, vf4 x) {
  L2L_UNROLL for (int g = 0; g < 4; g++) out[g] += (double)x[g];
}

// out[k][gate] += sum over steps and lanes of d[gate] x[k], for the 4 gates of one unit and Columns consecutive inputs.
// A sum of one tile's steps is float32, sums of tiles are float64.
template <int Columns, int Vectors>
static L2L_ALWAYS_INLINE void weight_gradient(StepRows d, StepRows x, int steps, double* __restrict out) {
  vf sum[4][Columns] = {};
  for (int t = 0; t < steps; t++) {
    const float* dt = d.data + t * d.step;
    const float* xt = x.data + t * x.step;
    L2L_UNROLL for (int v = 0; v < Vectors; v++) {
      vf column[Columns];
      L2L_UNROLL for (int k = 0; k < Columns; k++) column[k] = load(xt + k * x.stride + v * kLanes);
      L2L_UNROLL for (int g = 0; g < 4; g++) {
        const vf gate = load(dt + g * d.stride + v * kLanes);
        L2L_UNROLL for (int k = 0; k < Columns; k++) sum[g][k] += gate * column[k];
      }
    }
  }
  L2L_UNROLL for (int k = 0; k < Columns; k++)
    add_to(out + 4 * k, sum_lanes(sum[0][k], sum[1][k], sum[2][k], sum[3][k]));
}

// out[0..3] += sums over steps and lanes of the first 4 rows of d.
template <int Vectors>
static L2L_ALWAYS_INLINE void row_sums(StepRows d, int steps, double* __restrict out) {
  vf sum[4] = {};
  for (int t = 0; t < steps; t++)
    L2L_UNROLL for (int v = 0; v < Vectors; v++)
      L2L_UNROLL for (int g = 0; g < 4; g++) sum[g] += load(d.data + t * d.step + g * d.stride + v * kLanes);
  add_to(out, sum_lanes(sum[0], sum[1], sum[2], sum[3]));
}

}  // namespace L2L_ISA
}  // namespace l2l
