// Conversions between float and the 16-bit formats, bit by bit, rounding to nearest even. NaN becomes 0x7FFF, as on a
// GPU.
#pragma once

#include <cstdint>

#include "interface.h"

namespace cuda_on_host {

constexpr uint16_t kNan16 = 0x7FFF;

inline uint16_t float_to_bfloat16_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return kNan16;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
inline float bfloat16_bits_to_float(uint16_t bits) { return bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

inline uint16_t float_to_half_bits(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7FFFFFFFu;
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  if (magnitude > 0x7F800000u) return kNan16;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // from 65520 on: infinity
  // Scaled so that the last bit to keep has weight 2^shift in the significand.
  const int exponent = static_cast<int>(magnitude >> 23);
  const bool normal = exponent >= 113;  // 2^-14
  const int shift = normal ? 13 : (exponent == 0 ? 25 : 126 - exponent);
  if (shift > 24) return sign;  // below half the smallest denormal
  const uint32_t significand = (magnitude & 0x7FFFFFu) | 0x800000u;
  const uint32_t half_unit = 1u << (shift - 1), odd = significand >> shift & 1u;
  const uint32_t rounded = (significand + half_unit - 1u + odd) >> shift;
  // A carry out of the significand moves into the exponent by itself.
  const uint32_t result = normal ? rounded + (static_cast<uint32_t>(exponent - 113) << 10) : rounded;
  return static_cast<uint16_t>(sign | result);
}

inline float half_bits_to_float(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16, magnitude = bits & 0x7FFFu;
  if (magnitude > 0x7C00u) return bit_cast<float>(0x7FFFFFFFu);
  if (magnitude == 0x7C00u) return bit_cast<float>(sign | 0x7F800000u);
  if (magnitude < 0x0400u) {  // denormal: exact as a float
    const float value = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

}  // namespace cuda_on_host

// What the two formats have in common. Arithmetic rounds after every operation, as the device instructions do.
#define CUDA_ON_HOST_HALF_OPERATORS(Type)                                                               \
  inline Type operator+(Type a, Type b) { return Type(static_cast<float>(a) + static_cast<float>(b)); } \
  inline Type operator-(Type a, Type b) { return Type(static_cast<float>(a) - static_cast<float>(b)); } \
  inline Type operator*(Type a, Type b) { return Type(static_cast<float>(a) * static_cast<float>(b)); } \
  inline Type operator/(Type a, Type b) { return Type(static_cast<float>(a) / static_cast<float>(b)); } \
  inline Type operator-(Type a) { return Type(-static_cast<float>(a)); }                                \
  inline bool operator==(Type a, Type b) { return static_cast<float>(a) == static_cast<float>(b); }     \
  inline bool operator!=(Type a, Type b) { return static_cast<float>(a) != static_cast<float>(b); }     \
  inline bool operator<(Type a, Type b) { return static_cast<float>(a) < static_cast<float>(b); }       \
  inline bool operator>(Type a, Type b) { return static_cast<float>(a) > static_cast<float>(b); }
