// Products of matrices in panels (../panels.h), of which nothing is packed: both operands of a block are read as rows
// of k, one broadcast, one as vectors. A block of accumulators in registers covers the latency of the multiply-add.
//
// An element is a chain of multiply-adds along k, in chunks that are added up: the order depends on the depth alone.
#pragma once

#include "../kernels.h"
#include "sums.h"

namespace l2l {
namespace L2L_ISA {

#if L2L_LANES == 16
constexpr int kBlockRows = 8, kBlockVectors = 3;
#elif L2L_LANES == 8
constexpr int kBlockRows = 4, kBlockVectors = 3;  // all 16 registers
#else
constexpr int kBlockRows = 4, kBlockVectors = 2;
#endif
constexpr int kPanelWidth = kBlockVectors * kLanes;
static_assert(kPanelWidth % kBlockRows == 0 && kLanes % 4 == 0, "a block's rows lie in one panel");

constexpr int64_t kDepthChunk = 256;  // so much of a panel stays near between blocks

// Rows i ... i + Rows of the block, along k from begin to end.
template <int Rows, int Vectors>
static void product_rows(const PanelProduct& a, int i, int64_t begin, int64_t end) {
  vf sum[Rows][Vectors] = {};
  const float* left = a.left + begin * a.left_stride + i;
  const float* right = a.right + begin * a.right_stride;
  for (int64_t k = begin; k < end; k++, left += a.left_stride, right += a.right_stride) {
    vf row[Vectors];
  L2L_UNROLL for (int v = 0; v < Vectors; v++) row[v] = load(right + v * kLanes);
    L2L_UNROLL for (int r = 0; r < Rows; r++) {
      const vf x = broadcast(left[r]);
      L2L_UNROLL for (int v = 0; v < Vectors; v++) sum[r][v] += x * row[v];
    }
  }
  float* out = a.out + i * a.stride;
  if (begin > 0)
    L2L_UNROLL for (int r = 0; r < Rows; r++)
      L2L_UNROLL for (int v = 0; v < Vectors; v++) sum[r][v] += load(out + r * a.stride + v * kLanes);
  if (end == a.depth) {
    const vf factor = broadcast(a.factor), base_factor = broadcast(a.base_factor);
    L2L_UNROLL for (int r = 0; r < Rows; r++)
      L2L_UNROLL for (int v = 0; v < Vectors; v++) sum[r][v] *= factor;
    const float* base = a.base + i * a.stride;
    if (a.base)
      L2L_UNROLL for (int r = 0; r < Rows; r++)
        L2L_UNROLL for (int v = 0; v < Vectors; v++)
          sum[r][v] += base_factor * load(base + r * a.stride + v * kLanes);
  }
  L2L_UNROLL for (int r = 0; r < Rows; r++)
    L2L_UNROLL for (int v = 0; v < Vectors; v++) store(out + r * a.stride + v * kLanes, sum[r][v]);
}

// The last rows by the smallest block that holds them, see padded_rows.
template <int Rows, int Vectors>
static L2L_ALWAYS_INLINE void product_rest(const PanelProduct& a, int i, int64_t begin, int64_t end) {
  if constexpr (Rows > 1) {
    if (a.rows - i <= Rows / 2) return product_rest<Rows / 2, Vectors>(a, i, begin, end);
  }
  product_rows<Rows, Vectors>(a, i, begin, end);
}

template <int Vectors>
static void product_of_vectors(const PanelProduct& a) {
  for (int64_t begin = 0; begin < a.depth; begin += kDepthChunk) {
    const int64_t end = a.depth - begin < kDepthChunk ? a.depth : begin + kDepthChunk;
    int i = 0;
    for (; i + kBlockRows <= a.rows; i += kBlockRows) product_rows<kBlockRows, Vectors>(a, i, begin, end);
    if (i < a.rows) product_rest<kBlockRows, Vectors>(a, i, begin, end);
  }
}

static void panel_product(const PanelProduct& a) {
  if (a.vectors == 1) return product_of_vectors<1>(a);
  if (a.vectors == 2) return product_of_vectors<2>(a);
  product_of_vectors<kBlockVectors>(a);
}

static void transpose_block(const float* from, long from_stride, int rows, int columns, float* to, long to_stride,
                            int width) {
  typedef float vf4_memory __attribute__((vector_size(16), aligned(4), may_alias));
  const auto interleaved = [](vf4 x, vf4 y, bool high) __attribute__((always_inline)) {
    return high ? vf4{x[2], y[2], x[3], y[3]} : vf4{x[0], y[0], x[1], y[1]};
  };
  const auto halves = [](vf4 x, vf4 y, bool high) __attribute__((always_inline)) {
    return high ? vf4{x[2], x[3], y[2], y[3]} : vf4{x[0], x[1], y[0], y[1]};
  };
  for (int r = 0; r < width; r += 4)
    for (int c = 0; c < columns; c += 4) {
      vf4 x[4] = {};
      L2L_UNROLL for (int k = 0; k < 4; k++)
        if (r + k < rows) x[k] = *(const vf4_memory*)(from + (r + k) * from_stride + c);
      const vf4 low01 = interleaved(x[0], x[1], false), low23 = interleaved(x[2], x[3], false);
      const vf4 high01 = interleaved(x[0], x[1], true), high23 = interleaved(x[2], x[3], true);
      const vf4 y[4] = {halves(low01, low23, false), halves(low01, low23, true), halves(high01, high23, false),
                        halves(high01, high23, true)};
      L2L_UNROLL for (int k = 0; k < 4; k++)
        if (c + k < columns) *(vf4_memory*)(to + (c + k) * to_stride + r) = y[k];
    }
}

static L2L_ALWAYS_INLINE vd finite(vd x) { return (vd)((vl)x & (vl)(x - x == 0.0)); }

// In as many lanes as there are in four vectors, which are added up in order.
static double sum_of_squares(const float* x, int64_t n) {
  constexpr int kChains = 4;
  vd sum[kChains] = {};
  int64_t i = 0;
  for (; i + kChains * kHalf <= n; i += kChains * kHalf)
    L2L_UNROLL for (int k = 0; k < kChains; k++) {
      const vd y = finite(widened(x + i + k * kHalf));
      sum[k] += y * y;
    }
  double total = 0.0;
  for (int k = 0; k < kChains; k++)
    for (int lane = 0; lane < kHalf; lane++) total += sum[k][lane];
  for (; i < n; i++) {
    const double y = x[i];
    total += y - y == 0.0 ? y * y : 0.0;
  }
  return total;
}

static void scale_finite(const float* x, int64_t n, double factor, float* out) {
  int64_t i = 0;
  for (; i + kHalf <= n; i += kHalf)
    *(vf_half*)(out + i) = __builtin_convertvector(finite(widened(x + i)) * factor, vf_half);
  for (; i < n; i++) {
    const double y = x[i];
    out[i] = y - y == 0.0 ? (float)(y * factor) : 0.f;
  }
}

}  // namespace L2L_ISA
}  // namespace l2l
