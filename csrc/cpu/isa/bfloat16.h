// The step with bfloat16 products: inputs and weights of the two matrix products of a layer are rounded to the nearest
// bfloat16 (to even), what they are multiplied to is added up in float32, and so is the bias. All else is float32.
//
// Where the processor has it (L2L_BFLOAT16_DOT), a dot product of pairs does two multiply-adds in the time of one, in
// an order and with a rounding of its own; there the cell is cheaper, too, to what is left of the accuracy. Elsewhere
// the rounded operands are multiplied as floats: as slow as float32, but a network that was chosen on one machine runs
// on another.
#pragma once

#include "stored_step.h"

namespace l2l {
namespace L2L_ISA {

#if defined(L2L_BFLOAT16_DOT)

constexpr Operands kBfloat16Operands = Operands::pairs;

// Arithmetic of the cell to 1e-4: what comes out of the products is known to less. Polynomials are as short as that
// allows; divisions cost nothing beside the products, so they are exact.
template <int N>
struct ShortMath {
  using V = Wide<N>;

  // 2^x, relative error 8e-5.
  static L2L_ALWAYS_INLINE V exp2(V x) {
    // x - floor(x); the scaling instruction takes the floor of x itself.
    const V f = map(x, [](vf a) L2L_LAMBDA { return (vf)_mm512_reduce_ps((__m512)a, 9); });
    V y = 7.802453077e-2f * f + 2.260671463e-1f;
    y = y * f + 6.958335417e-1f;
    y = y * f + 9.999252188e-1f;
    return zip(y, x, [](vf a, vf b) L2L_LAMBDA { return (vf)_mm512_scalef_ps((__m512)a, (__m512)b); });
  }

  // tanh(scale x) = over / under, relative error 6e-5, also near 0; beyond 5 it is 1 - 4e-5.
  static L2L_ALWAYS_INLINE void tanh(V x, float scale, V& over, V& under) {
    const float s = scale * scale;
    x = Math<N>::max(-5.f / scale, Math<N>::min(5.f / scale, x));
    const V y = x * x;
    const V p = 6.70556452e-4f * s * s * scale * y + 1.02417302e-1f * s * scale;
    const V q = 1.28197846e-2f * s * s * y + 4.35431977e-1f * s;
    over = x * (p * y + 9.99947979e-1f * scale);
    under = q * y + 1.f;
  }
};

struct Bfloat16Products {
  static constexpr bool kCopies = true;
  struct Buffer {
    alignas(64) float rows[kMaxHidden * kTile];
  };

  // Rows of pairs; beside the last of an odd number there are zeros.
  static L2L_ALWAYS_INLINE const float* operands(const float* rows, int count, int lanes, Buffer& buffer) {
    alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                             21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                             11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i interleave = _mm512_load_si512(kInterleave);
    for (int k = 0; k < count; k += 2)
      for (int lane = 0; lane < lanes; lane += kLanes) {
        const float* row = rows + (long)k * kTile + lane;
        const __m512 low = (__m512)load(row), high = k + 1 < count ? (__m512)load(row + kTile) : _mm512_setzero_ps();
        const __m512i pairs = _mm512_permutexvar_epi16(interleave, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        _mm512_store_si512(buffer.rows + (long)k / 2 * kTile + lane, pairs);
      }
    return buffer.rows;
  }

  // Weights as Operands::pairs has them.
  template <int Units, int Vectors>
  static L2L_ALWAYS_INLINE void preactivations(const LayerForward& f, int j, int lane, Wide<Vectors> (&a)[Units][4]) {
    const int x_rows = (f.inputs + 1) / 2, h_rows = (f.recurrent + 1) / 2;
    const long unit = 4L * (1 + x_rows + h_rows), bias_unit = f.bias ? 4 : unit;
    const float* __restrict weights = f.weights + j * unit;
    const float* bias = f.bias ? f.bias + 4L * j : weights;
    L2L_UNROLL for (int u = 0; u < Units; u++)
      L2L_UNROLL for (int g = 0; g < 4; g++)
        L2L_UNROLL for (int v = 0; v < Vectors; v++) a[u][g].v[v] = broadcast(bias[u * bias_unit + g]);
    weights += 4;
    const auto accumulate = [&](const float* row) __attribute__((always_inline)) {
      __m512bh pairs[Vectors];
      L2L_UNROLL for (int v = 0; v < Vectors; v++) pairs[v] = (__m512bh)load(row + v * kLanes);
      L2L_UNROLL for (int u = 0; u < Units; u++)
        L2L_UNROLL for (int g = 0; g < 4; g++) {
          const __m512bh w = (__m512bh)broadcast(weights[u * unit + g]);
          L2L_UNROLL for (int v = 0; v < Vectors; v++)
            a[u][g].v[v] = (vf)_mm512_dpbf16_ps((__m512)a[u][g].v[v], pairs[v], w);
        }
      weights += 4;
    };
    for (int k = 0; k < x_rows; k++) accumulate(f.x + lane + (long)k * kTile);
    for (int k = 0; k < h_rows; k++) accumulate(f.h + lane + (long)k * kTile);
  }

  // cell_step of core/cell.h.
  template <int N>
  static L2L_ALWAYS_INLINE Wide<N> cell(const Wide<N> (&a)[4], Wide<N>& c) {
    using M = ShortMath<N>;
    const Wide<N> one_i = 1.f + M::exp2(a[0]), one_f = 1.f + M::exp2(a[1]), one_o = 1.f + M::exp2(a[3]);
    Wide<N> over, under;
    M::tanh(a[2], 0.5f / kLog2E, over, under);
    c = c / one_f + over / (under * one_i);
    M::tanh(c, 1.f, over, under);
    return over / (under * one_o);
  }
};

#else

constexpr Operands kBfloat16Operands = Operands::rounded;

struct Bfloat16Products : FloatProducts {
  static constexpr bool kCopies = true;
  struct Buffer {
    alignas(64) float rows[kMaxHidden * kTile];
  };

  static L2L_ALWAYS_INLINE const float* operands(const float* rows, int count, int lanes, Buffer& buffer) {
    for (int k = 0; k < count; k++)
      for (int lane = 0; lane < lanes; lane += kLanes) {
        const long at = (long)k * kTile + lane;
        store(buffer.rows + at, (vf)(nearest_bfloat16(load(rows + at)) & 0xffff0000u));
      }
    return buffer.rows;
  }
};

#endif

static void bfloat16_step(const Network& net, const TensorStep& tensor, const float* inputs, const float* state,
                          float* new_state, int count, const float* next_state, float* out) {
  step_with<Bfloat16Products>(net, tensor, inputs, state, new_state, count, next_state, out);
}

static void bfloat16_stored_step(const Network& net, const TensorStep& tensor, StateType type, const float* inputs,
                                 void* tile, int count, uint64_t seed, int64_t number, const void* next,
                                 const float* grad, const float* averages, float* out) {
  stored_step_with<Bfloat16Products>(net, tensor, type, inputs, tile, count, seed, number, next, grad, averages, out);
}

}  // namespace L2L_ISA
}  // namespace l2l
