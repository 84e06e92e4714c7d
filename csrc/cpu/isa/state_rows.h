// Rows of a state that is not float32 into rows of floats and back: core/state_io.h, vector by vector.
#pragma once

#include "../kernels.h"
#include "wide.h"

namespace l2l {
namespace L2L_ISA {

// Bits of vectors: shifts are logical.
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));

// One vector of what is stored, to and from 32-bit lanes. Codes of c come as 1 ... 255, or as anything below for what
// is not a number; codes of h as -127 ... 127, or as the lowest integer.
#if L2L_LANES == 16
static L2L_ALWAYS_INLINE vf load_codes(const int8_t* p) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
static L2L_ALWAYS_INLINE vf load_bfloat16(const uint16_t* p) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static L2L_ALWAYS_INLINE void store_high_halves(uint16_t* p, const vu* x) {
  alignas(64) static constexpr uint16_t kOdd[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  const __m512i odd = _mm512_load_si512(kOdd);
  for (int v = 0; v < 4; v += 2)
    _mm512_storeu_si512(p + 16 * v, _mm512_permutex2var_epi16((__m512i)x[v], odd, (__m512i)x[v + 1]));
}
// Packing goes by quarters of the registers: the order of the sixteen that come out.
static L2L_ALWAYS_INLINE __m512i in_order(__m512i packed) {
  return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), packed);
}
static L2L_ALWAYS_INLINE void store_codes_of_h(int8_t* p, const vf* x) {
  const auto whole = [&](int i) L2L_LAMBDA { return _mm512_cvtps_epi32((__m512)x[i]); };
  const __m512i low = _mm512_packs_epi32(whole(0), whole(1)), high = _mm512_packs_epi32(whole(2), whole(3));
  _mm512_storeu_si512(p, in_order(_mm512_packs_epi16(low, high)));
}
static L2L_ALWAYS_INLINE void store_codes_of_c(int8_t* p, const vf* x) {
  const auto whole = [&](int i) L2L_LAMBDA { return _mm512_cvttps_epi32((__m512)x[i]); };
  const __m512i low = _mm512_packus_epi32(whole(0), whole(1)), high = _mm512_packus_epi32(whole(2), whole(3));
  const __m512i bytes = in_order(_mm512_packus_epi16(low, high));
  _mm512_storeu_si512(p, _mm512_xor_si512(bytes, _mm512_set1_epi8((char)0x80)));
}
// Where x is infinite or not a number, itself, and a NaN quiet; else the other.
static L2L_ALWAYS_INLINE vu unless_finite(vf x, vu other) {
  const __mmask16 special = _mm512_fpclass_ps_mask((__m512)x, 0x01 | 0x80 | 0x08 | 0x10);
  return (vu)_mm512_mask_mul_ps((__m512)other, special, (__m512)x, _mm512_set1_ps(1.f));
}
static L2L_ALWAYS_INLINE uint32_t largest_lane(vu x) { return _mm512_reduce_max_epu32((__m512i)x); }
static L2L_ALWAYS_INLINE vu larger(vu a, vu b) { return (vu)_mm512_max_epu32((__m512i)a, (__m512i)b); }
#elif L2L_LANES == 8
static L2L_ALWAYS_INLINE vf load_codes(const int8_t* p) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
static L2L_ALWAYS_INLINE vf load_bfloat16(const uint16_t* p) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static L2L_ALWAYS_INLINE void store_high_halves(uint16_t* p, const vu* x) {
  for (int v = 0; v < 8; v += 2) {
    const __m256i packed =
        _mm256_packus_epi32(_mm256_srli_epi32((__m256i)x[v], 16), _mm256_srli_epi32((__m256i)x[v + 1], 16));
    _mm256_storeu_si256((__m256i*)(p + 8 * v), _mm256_permute4x64_epi64(packed, 0xd8));
  }
}
// Packing goes by halves of the registers: the order of the eight quarters that come out.
static L2L_ALWAYS_INLINE __m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
static L2L_ALWAYS_INLINE void store_codes_of_h(int8_t* p, const vf* x) {
  for (int v = 0; v < 8; v += 4) {
    const auto whole = [&](int i) L2L_LAMBDA { return _mm256_cvtps_epi32((__m256)x[v + i]); };
    const __m256i low = _mm256_packs_epi32(whole(0), whole(1)), high = _mm256_packs_epi32(whole(2), whole(3));
    _mm256_storeu_si256((__m256i*)(p + 8 * v), in_order(_mm256_packs_epi16(low, high)));
  }
}
static L2L_ALWAYS_INLINE void store_codes_of_c(int8_t* p, const vf* x) {
  for (int v = 0; v < 8; v += 4) {
    const auto whole = [&](int i) L2L_LAMBDA { return _mm256_cvttps_epi32((__m256)x[v + i]); };
    const __m256i low = _mm256_packus_epi32(whole(0), whole(1)), high = _mm256_packus_epi32(whole(2), whole(3));
    const __m256i bytes = in_order(_mm256_packus_epi16(low, high));
    _mm256_storeu_si256((__m256i*)(p + 8 * v), _mm256_xor_si256(bytes, _mm256_set1_epi8((char)0x80)));
  }
}
static L2L_ALWAYS_INLINE vu larger(vu a, vu b) { return (vu)_mm256_max_epu32((__m256i)a, (__m256i)b); }
static L2L_ALWAYS_INLINE uint32_t largest_lane(vu x) {
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1));
  return (uint32_t)_mm_cvtsi128_si32(y);
}
#else
static L2L_ALWAYS_INLINE vf load_codes(const int8_t* p) {
  vf x;
  for (int i = 0; i < kLanes; i++) x[i] = (float)p[i];
  return x;
}
static L2L_ALWAYS_INLINE vf load_bfloat16(const uint16_t* p) {
  vu x;
  for (int i = 0; i < kLanes; i++) x[i] = (uint32_t)p[i] << 16;
  return (vf)x;
}
static L2L_ALWAYS_INLINE void store_high_halves(uint16_t* p, const vu* x) {
  for (int i = 0; i < kTile; i++) p[i] = (uint16_t)(x[i / kLanes][i % kLanes] >> 16);
}
static L2L_ALWAYS_INLINE void store_codes_of_h(int8_t* p, const vf* x) {
  for (int i = 0; i < kTile; i++) {
    const float scaled = x[i / kLanes][i % kLanes];
    p[i] = (int8_t)(scaled == scaled ? encode_whole(scaled) : kNotANumber);
  }
}
static L2L_ALWAYS_INLINE void store_codes_of_c(int8_t* p, const vf* x) {
  for (int i = 0; i < kTile; i++) p[i] = (int8_t)code_of_shifted(x[i / kLanes][i % kLanes]);
}
static L2L_ALWAYS_INLINE vu larger(vu a, vu b) {
  const vu above = (vu)(a > b);
  return (above & a) | (~above & b);
}
static L2L_ALWAYS_INLINE uint32_t largest_lane(vu x) {
  uint32_t largest = 0;
  for (int i = 0; i < kLanes; i++) largest = x[i] > largest ? x[i] : largest;
  return largest;
}
#endif

#if L2L_LANES != 16
static L2L_ALWAYS_INLINE vu unless_finite(vf x, vu other) {
  const vu bits = (vu)x, magnitude = bits & 0x7fffffffu;
  const vu finite = (vu)((vi)magnitude < (int32_t)kInfinity), number = (vu)(x == x);
  return (finite & other) | (~finite & (bits | (~number & 0x400000u)));
}
#endif

constexpr int kRowVectors = kTile / kLanes;

static L2L_ALWAYS_INLINE void decode_bfloat16_row(const uint16_t* from, float* to) {
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) store(to + v * kLanes, load_bfloat16(from + v * kLanes));
}

// In the high half; the low one is what is left of it.
static L2L_ALWAYS_INLINE vu nearest_bfloat16(vf x) {
  return unless_finite(x, (vu)x + 0x7fffu + (((vu)x >> 16) & 1u));
}

static L2L_ALWAYS_INLINE void encode_bfloat16_row(const Wide<kRowVectors>& row, uint16_t* to) {
  vu x[kRowVectors];
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) x[v] = nearest_bfloat16(row.v[v]);
  store_high_halves(to, x);
}

// random: 16 bits a lane. Infinities and NaNs stay.
static L2L_ALWAYS_INLINE void round_bfloat16_row(const Wide<kRowVectors>& row, const vu* random, uint16_t* to) {
  vu x[kRowVectors];
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) x[v] = unless_finite(row.v[v], (vu)row.v[v] + random[v]);
  store_high_halves(to, x);
}

static L2L_ALWAYS_INLINE vf decode_with_nan(vf code, float step) {
  const vi number = code != (float)kNotANumber;
  return (vf)((number & (vi)(code * step)) | (~number & (int32_t)kQuietNaN));
}

// any_nan: whether there may be codes that are not a number.
static L2L_ALWAYS_INLINE void decode_codes_row(const int8_t* from, float step, bool any_nan, float* to) {
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) {
    const vf code = load_codes(from + v * kLanes);
    store(to + v * kLanes, any_nan ? decode_with_nan(code, step) : code * step);
  }
}

// Of an h that a cell gave, |h| <= 1 to rounding: there is nothing to be bounded.
static L2L_ALWAYS_INLINE void encode_h_row(const Wide<kRowVectors>& row, int8_t* to) {
  vf x[kRowVectors];
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) x[v] = row.v[v] * 127.f;
  store_codes_of_h(to, x);
}

static uint32_t finite_magnitude_of_row(const Wide<kRowVectors>& row) {
  uint32_t largest = 0;
  for (int i = 0; i < kTile; i++) {
    const uint32_t magnitude = finite_magnitude(row.v[i / kLanes][i % kLanes]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Returns the exponent of the row's step.
static L2L_ALWAYS_INLINE int encode_c_row(const Wide<kRowVectors>& row, const vu* random, int8_t* to) {
  vu magnitudes{};
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) magnitudes = larger(magnitudes, (vu)row.v[v] & 0x7fffffffu);
  uint32_t largest = largest_lane(magnitudes);
  if (largest >= kInfinity) largest = finite_magnitude_of_row(row);
  const int e = step_exponent(largest);
  const float inverse = power_of_two(-e);
  vf x[kRowVectors];
  L2L_UNROLL for (int v = 0; v < kRowVectors; v++) x[v] = row.v[v] * inverse + (vf)(random[v] | 0x43000000u);
  store_codes_of_c(to, x);
  return e;
}

// Whether a tile has a code that is not a number: hardly ever.
static bool has_nan_code(const int8_t* codes, int count) {
  typedef int8_t bytes __attribute__((vector_size(kLanes * 4)));
  typedef int8_t bytes_in_memory __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));
  bytes any{};
  for (int i = 0; i < count * kTile; i += kLanes * 4)
    any |= (bytes)(*(const bytes_in_memory*)(codes + i) == (int8_t)kNotANumber);
  uint64_t words[sizeof any / 8], all = 0;
  __builtin_memcpy(words, &any, sizeof words);
  for (const uint64_t word : words) all |= word;
  return all != 0;
}

// The random bits of the rounded rows of one tile, best asked for in order.
struct Draws {
  const RoundingKey key;
  vu lanes[kRowVectors], low[kRowVectors], high[kRowVectors];
  int pair = -1;

  L2L_ALWAYS_INLINE Draws(uint64_t seed, int64_t tile) : key(seed, tile) {
    L2L_UNROLL for (int v = 0; v < kRowVectors; v++) {
      vu lane;
      for (int i = 0; i < kLanes; i++) lane[i] = (uint32_t)(v * kLanes + i);
      lanes[v] = key.lane(lane);
    }
  }
  L2L_ALWAYS_INLINE const vu* of(int row) {
    if (row & 1 && row / 2 == pair) return high;
    pair = row / 2;
    L2L_UNROLL for (int v = 0; v < kRowVectors; v++) {
      const vu draw = key.draw(lanes[v], row / 2);
      low[v] = draw & 0xffffu;
      high[v] = draw >> 16;
    }
    return row & 1 ? high : low;
  }
};

}  // namespace L2L_ISA
}  // namespace l2l
