// Products of what a tile holds, added up in float64: the part of tensor_sums.cpp that takes time. In kSumLanes
// lanes, whatever the vectors are: all instruction sets add up in one order.
#pragma once

#include "../kernels.h"
#include "simd.h"

namespace l2l {
namespace L2L_ISA {

// As many doubles as a vector has floats are two vectors.
constexpr int kHalf = kLanes / 2;
typedef float vf_half __attribute__((vector_size(kHalf * 4), aligned(4), may_alias));
typedef double vd __attribute__((vector_size(kHalf * 8)));
typedef int64_t vl __attribute__((vector_size(kHalf * 8)));
typedef double vd_memory __attribute__((vector_size(kHalf * 8), aligned(8), may_alias));

static L2L_ALWAYS_INLINE vd widened(const float* p) { return __builtin_convertvector(*(const vf_half*)p, vd); }

// a b; what is not finite counts as zero: one bad coordinate must not reach the others through their tensor.
static L2L_ALWAYS_INLINE vd finite_product(vd a, vd b) {
  const vd product = a * b;
  return (vd)((vl)product & (vl)(product - product == 0.0));
}

static void tile_sums(const Correction& correction, const float* theta, const float* grad, const float* averages,
                      int count, double* sums) {
  float q[kTile], d[kTile];
  const float* m1 = averages;
  const float *r1 = averages + 2 * kTile, *r2 = averages + 3 * kTile;
  const float m_factor = correction.of[0], r_factor = correction.of[3];
  for (int i = 0; i < kTile; i++) {
    q[i] = r1[i];
    d[i] = m1[i] * m_factor / (r2[i] * r_factor + kAdamEps);
  }
  for (int i = count; i < kTile; i++) q[i] = d[i] = 0.f;  // the padding of a state may hold anything
  static_assert(kSumLanes % kHalf == 0, "an accumulator is whole vectors");
  for (int part = 0; part < kSumLanes; part += kHalf) {
    vd own[kTensorSums];
    for (int k = 0; k < kTensorSums; k++) own[k] = *(const vd_memory*)(sums + k * kSumLanes + part);
    for (int v = part; v < kTile; v += kSumLanes) {
      const vd x = widened(theta + v), g = widened(grad + v), root = widened(q + v), direction = widened(d + v);
      own[0] += finite_product(x, x);
      own[1] += finite_product(g, g);
      own[2] += finite_product(root, root);
      own[3] += finite_product(direction, direction);
      own[4] += finite_product(g, direction);
    }
    for (int k = 0; k < kTensorSums; k++) *(vd_memory*)(sums + k * kSumLanes + part) = own[k];
  }
}

}  // namespace L2L_ISA
}  // namespace l2l
