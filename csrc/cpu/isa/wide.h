// N vectors as one value.
#pragma once

#include "simd.h"

#define L2L_LAMBDA __attribute__((always_inline))

namespace l2l {
namespace L2L_ISA {

// N vectors that go through the same arithmetic side by side. Every operation is written for all of them before the
// next, so that N chains of dependent operations are in flight within the processor's small scheduling window.
template <int N>
struct Wide {
  vf v[N];
};

#define L2L_WIDE_OPERATOR(op)                                                        \
  template <int N>                                                                   \
  static L2L_ALWAYS_INLINE Wide<N> operator op(const Wide<N>& a, const Wide<N>& b) { \
    Wide<N> r;                                                                       \
    L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = a.v[i] op b.v[i];                \
    return r;                                                                        \
  }                                                                                  \
  template <int N>                                                                   \
  static L2L_ALWAYS_INLINE Wide<N> operator op(const Wide<N>& a, float b) {          \
    Wide<N> r;                                                                       \
    L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = a.v[i] op b;                     \
    return r;                                                                        \
  }                                                                                  \
  template <int N>                                                                   \
  static L2L_ALWAYS_INLINE Wide<N> operator op(float a, const Wide<N>& b) {          \
    Wide<N> r;                                                                       \
    L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = a op b.v[i];                     \
    return r;                                                                        \
  }
L2L_WIDE_OPERATOR(+)
L2L_WIDE_OPERATOR(-)
L2L_WIDE_OPERATOR(*)
L2L_WIDE_OPERATOR(/)
#undef L2L_WIDE_OPERATOR

// f of each vector.
template <int N, class F>
static L2L_ALWAYS_INLINE Wide<N> map(const Wide<N>& a, const F& f) {
  Wide<N> r;
  L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = f(a.v[i]);
  return r;
}

// f of each pair of vectors.
template <int N, class F>
static L2L_ALWAYS_INLINE Wide<N> zip(const Wide<N>& a, const Wide<N>& b, const F& f) {
  Wide<N> r;
  L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = f(a.v[i], b.v[i]);
  return r;
}

template <int N>
static L2L_ALWAYS_INLINE Wide<N> load_wide(const float* p) {
  Wide<N> r;
  L2L_UNROLL for (int i = 0; i < N; i++) r.v[i] = load(p + i * kLanes);
  return r;
}

template <int N>
static L2L_ALWAYS_INLINE void store_wide(float* p, const Wide<N>& x) {
  L2L_UNROLL for (int i = 0; i < N; i++) store(p + i * kLanes, x.v[i]);
}

}  // namespace L2L_ISA
}  // namespace l2l
