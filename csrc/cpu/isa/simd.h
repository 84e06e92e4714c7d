// The vector type of one instruction set, by GCC/Clang vector extensions, and the few operations they lack.
//
// Included once per translation unit with L2L_ISA (a namespace) and L2L_LANES (floats in a vector) defined. Everything
// is in that namespace and nothing here may use a standard-library template: the linker would keep one copy of an
// inline function for all translation units, perhaps the one with instructions this machine lacks.
#pragma once

#include <stdint.h>
#if defined(__x86_64__)
// GCC 12 takes the undefined vectors inside its own AVX-512 intrinsics for a mistake.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define L2L_ALWAYS_INLINE inline __attribute__((always_inline))
#define L2L_UNROLL _Pragma("GCC unroll 64")

namespace l2l {
namespace L2L_ISA {

constexpr int kLanes = L2L_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef float vf_memory __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

static L2L_ALWAYS_INLINE vf load(const float* p) { return *(const vf_memory*)p; }
static L2L_ALWAYS_INLINE void store(float* p, vf x) { *(vf_memory*)p = x; }

// min and max keep a NaN of x: x86 returns the second operand when the comparison is unordered.
#if L2L_LANES == 16
static L2L_ALWAYS_INLINE vf broadcast(float x) { return (vf)_mm512_set1_ps(x); }
static L2L_ALWAYS_INLINE vf min(float bound, vf x) { return (vf)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x); }
static L2L_ALWAYS_INLINE vf max(float bound, vf x) { return (vf)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x); }
#elif L2L_LANES == 8
static L2L_ALWAYS_INLINE vf broadcast(float x) { return (vf)_mm256_set1_ps(x); }
static L2L_ALWAYS_INLINE vf min(float bound, vf x) { return (vf)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x); }
static L2L_ALWAYS_INLINE vf max(float bound, vf x) { return (vf)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x); }
#else
static L2L_ALWAYS_INLINE vf broadcast(float x) { return x - vf{}; }
static L2L_ALWAYS_INLINE vf min(float bound, vf x) {
  const vi above = x > bound;
  return (vf)((above & (vi)broadcast(bound)) | (~above & (vi)x));
}
static L2L_ALWAYS_INLINE vf max(float bound, vf x) {
  const vi below = x < bound;
  return (vf)((below & (vi)broadcast(bound)) | (~below & (vi)x));
}
#endif

// Of x >= 0 and NaN.
static L2L_ALWAYS_INLINE vf sqrt(vf x) {
#if L2L_LANES == 16
  return (vf)_mm512_sqrt_ps((__m512)x);
#elif L2L_LANES == 8
  return (vf)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
  return (vf)_mm_sqrt_ps((__m128)x);
#else
  for (int i = 0; i < kLanes; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

#if L2L_LANES != 16
// The nearest integer of |x| < 2^22; of a NaN a multiple of 2^31, so that no payload bits reach what is made of it.
static L2L_ALWAYS_INLINE vi nearest(vf x) {
#if L2L_LANES == 8
  return (vi)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
  return (vi)_mm_cvtps_epi32((__m128)x);
#else
  const vf shift = broadcast(12582912.f);  // 1.5 * 2^23: the integer lands in the low bits
  return ((vi)(x + shift) - (vi)shift) & (vi)(x == x);
#endif
}
#endif

typedef float vf4 __attribute__((vector_size(16)));

// The sums over the lanes of four vectors, by a fixed tree.
static L2L_ALWAYS_INLINE vf4 sum_lanes(vf a, vf b, vf c, vf d) {
#if L2L_LANES == 16
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  return (vf4)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#elif L2L_LANES == 8
  const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
  const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256 abcd = _mm256_add_ps(_mm256_shuffle_ps(ab, cd, 0x44), _mm256_shuffle_ps(ab, cd, 0xee));
  return (vf4)_mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
#else
  return vf4{(a[0] + a[2]) + (a[1] + a[3]), (b[0] + b[2]) + (b[1] + b[3]), (c[0] + c[2]) + (c[1] + c[3]),
             (d[0] + d[2]) + (d[1] + d[3])};
#endif
}

}  // namespace L2L_ISA
}  // namespace l2l
