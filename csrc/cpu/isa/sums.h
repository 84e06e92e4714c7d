// Products of what a tile holds, added up lane by lane in float64: the part of tensor_sums.cpp that takes time. Plain
// loops over lanes, which the compiler turns into vectors.
#pragma once

#include "simd.h"

namespace l2l {
namespace L2L_ISA {

// What is not finite counts as zero: one bad coordinate must not reach the others through their tensor.
static inline void add_products(const float* a, const float* b, double* sums) {
  for (int i = 0; i < kTile; i++) {
    const double product = static_cast<double>(a[i]) * static_cast<double>(b[i]);
    sums[i] += product - product == 0.0 ? product : 0.0;
  }
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
  add_products(theta, theta, sums);
  add_products(grad, grad, sums + kTile);
  add_products(q, q, sums + 2 * kTile);
  add_products(d, d, sums + 3 * kTile);
  add_products(grad, d, sums + 4 * kTile);
}

}  // namespace L2L_ISA
}  // namespace l2l
