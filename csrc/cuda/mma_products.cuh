// Products of float32 matrices on tensor cores, whose operands have 11 significant bits (TF32): every number is split
// into a large and a small part, x = large + small up to 2^-21 of it (2^-22 where both are rounded), and of the product
// of two such sums the three largest terms are taken; the fourth is below 2^-22 of the product.
//
// Rows are coordinates, columns gates (the product is [coordinates x inputs] [inputs x gates]), so that a NaN of one
// coordinate stays in its row. Columns are so ordered that a lane ends up with the four gates of its units and
// coordinates, and with their new h just where the next product wants its inputs: nothing is exchanged between lanes.
//
// With g = lane / 4 and t = lane % 4, a lane has C adjacent coordinates, C g .. C g + C - 1 of the 8 C of its warp, and
// of these the units t, t + 4, t + 8, ...: "group" q of inputs or units is 4 q .. 4 q + 3, of which it has 4 q + t. A
// multiplication takes two groups of inputs and 16 coordinates, two of each lane, to 8 columns, half of what the units
// of a group have: gates i and f, or g and o, of unit 4 p + g / 2.
#pragma once

#include "compat.cuh"
#include "ptx.cuh"

namespace l2l {

#if L2L_CUDA_ARCH >= 800

// To the nearest number of 11 significant bits, ties away from zero: what cvt.rna.tf32.f32 does, which is several
// instructions more for the sake of what is not finite. The largest numbers become inf, some NaN become -0.
__device__ __forceinline__ unsigned nearest_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & 0xffffe000u; }

// The small part is cut by the multiplication, which does not read its lowest 13 bits (CUTLASS relies on it, too). The
// small part of a NaN is NaN.
__device__ __forceinline__ void split(float x, unsigned& large, unsigned& small) {
  large = nearest_tf32(x);
  small = __float_as_uint(x - __uint_as_float(large));
}

// A lane's part of N groups of inputs for its C coordinates. Exact: they have no small parts, as numbers of bfloat16.
template <int N, int C, bool Exact = false>
struct MmaInputs {
  unsigned large[N][C], small[N][C];

  __device__ __forceinline__ void set(int q, const float (&x)[C]) {
#pragma unroll
    for (int i = 0; i < C; i++) {
      if constexpr (Exact)
        large[q][i] = __float_as_uint(x[i]), small[q][i] = 0;
      else
        split(x[i], large[q][i], small[q][i]);
    }
  }
};

// acc[i] += w x for coordinates 2 i and 2 i + 1 of every lane: one column block of 8 and two groups of inputs, `below`
// and `above`, for which w has a number each.
template <int C>
__device__ __forceinline__ void multiply_add(float (&acc)[C / 2][4], const unsigned (&below)[C],
                                             const unsigned (&above)[C], unsigned w_below, unsigned w_above) {
#pragma unroll
  for (int i = 0; i < C / 2; i++) {
    const unsigned a[4] = {below[2 * i], below[2 * i + 1], above[2 * i], above[2 * i + 1]};
    const unsigned b[2] = {w_below, w_above};
    ptx::mma_tf32(acc[i], a, b);
  }
}

// The same for gates i and f, and for g and o.
template <int C>
__device__ __forceinline__ void multiply_add(float (&acc)[2][C / 2][4], const unsigned (&below)[C],
                                             const unsigned (&above)[C], const uint4& w) {
  multiply_add<C>(acc[0], below, above, w.x, w.y);
  multiply_add<C>(acc[1], below, above, w.z, w.w);
}

// The pre-activations of one unit of the lane, from its biases and all inputs; weights: of the group, the lane's first.
// Coordinate c has gates i, f in acc[0][c / 2][c % 2 * 2 ...] and g, o in acc[1].
//
// Tensor cores cut sums where float32 rounds them, so errors add up. The products with small parts have sums of their
// own, which are small, and what is added last is added by rounding.
template <int C, int Below, int Own, bool Exact>
__device__ __forceinline__ void unit_products(const uint4* weights, const float4& bias, const MmaInputs<Below, C>& x,
                                              const MmaInputs<Own, C, Exact>& h, float (&acc)[2][C / 2][4]) {
  float rest[2][C / 2][4] = {};
#pragma unroll
  for (int k = 0; k < 2; k++)
#pragma unroll
    for (int i = 0; i < C / 2; i++)
#pragma unroll
      for (int n = 0; n < 4; n++) acc[k][i][n] = 0.f;
#pragma unroll
  for (int q = 0; q < Below + Own; q += 2) {
    const uint4 large = weights[32 * q], small = weights[32 * q + 32];
    const unsigned (&below)[C] = q < Below ? x.large[q] : h.large[q - Below];
    const unsigned (&above)[C] = q + 1 < Below ? x.large[q + 1] : h.large[q + 1 - Below];
    const unsigned (&small_below)[C] = q < Below ? x.small[q] : h.small[q - Below];
    const unsigned (&small_above)[C] = q + 1 < Below ? x.small[q + 1] : h.small[q + 1 - Below];
    multiply_add<C>(acc, below, above, large);
    if (!Exact || q < Below) multiply_add<C>(rest, small_below, small_above, large);
    multiply_add<C>(rest, below, above, small);
  }
#pragma unroll
  for (int i = 0; i < C / 2; i++)
#pragma unroll
    for (int n = 0; n < 4; n++) {
      acc[0][i][n] += rest[0][i][n] + (n % 2 ? bias.y : bias.x);
      acc[1][i][n] += rest[1][i][n] + (n % 2 ? bias.w : bias.z);
    }
}

#endif

}  // namespace l2l
