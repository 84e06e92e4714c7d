// The state of one tensor, in tiles of 64 consecutive coordinates: row r of a tile holds one number of each. For layer
// l, rows [2*l*hidden, ...) are h and rows [(2*l+1)*hidden, ...) are c; then come the moving averages. A row is
// contiguous, so it is read by SIMD lanes or by the threads of two warps at once; a tile is contiguous, so it streams.
// What a tile holds beyond the tensor's last coordinate may be anything and must reach nothing.
//
// float32: rows of 64 floats, what arithmetic is done on. The other two only store; a step decodes a tile, computes as
// with float32, and encodes.
//
// bfloat16: rows of 64 bfloat16. h is rounded to the nearest, c and averages stochastically.
//
// int8: a byte per h, round(127 h), and per c, [rows of h and c][64] as above; then a byte per row of c, the exponent e
// of its step 2^e, [layers][hidden], filled up to a multiple of 16 bytes; then the averages, bfloat16. A row of c has
// the smallest step that brings its finite numbers into -127..127, and is rounded stochastically. Code -128 is not a
// number. (Cells of one unit are alike in all coordinates and unlike those of another, by factors of up to 10^4: a step
// per coordinate, or one for all, loses the small ones.)
//
// Stochastic rounding goes up with a probability of the part that is cut off, in 2^16ths: to the nearest, an average
// would stop where what it gains in a step is less than half a unit in the last place. The random numbers are a
// function of the step's seed for the tensor, the coordinate and the row: the same whoever computes them.
#pragma once

#include "config.h"

namespace l2l {

constexpr int kTile = 64;

L2L_HOST_DEVICE int64_t tiles_for(int64_t numel) { return (numel + kTile - 1) / kTile; }

// Coordinates in a tile of a tensor.
L2L_HOST_DEVICE int lanes_of(int64_t numel, int64_t tile) {
  const int64_t rest = numel - tile * kTile;
  return rest < kTile ? static_cast<int>(rest) : kTile;
}

// Floats from one tile to the next.
L2L_HOST_DEVICE int64_t tile_floats(const Config& config) { return static_cast<int64_t>(config.rows()) * kTile; }

enum class StateType : int { float32 = 0, bfloat16 = 1, int8 = 2 };

// Where the parts of a tile are, in bytes.
struct TileLayout {
  int exponents, averages;  // int8: of the rows of c; of the first average
  int64_t bytes;            // from one tile to the next

  L2L_HOST_DEVICE TileLayout(const Config& config, StateType type) {
    const int numbers = config.average_row() * kTile, row = (type == StateType::float32 ? 4 : 2) * kTile;
    exponents = numbers;
    averages = type == StateType::float32    ? 4 * numbers
               : type == StateType::bfloat16 ? 2 * numbers
                                             : numbers + (config.layers * config.hidden + 15) / 16 * 16;
    bytes = static_cast<int64_t>(averages) + config.averages() * row;
  }
};

// ---- random numbers

// A bijection that leaves no pattern (Steele et al. 2014, the finalizer of SplitMix).
L2L_HOST_DEVICE uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The same for 32 bits (Wellons' lowbias32). U: uint32_t, or a vector of such.
template <class U>
L2L_HOST_DEVICE U mix32(U x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

constexpr uint32_t kGolden32 = 0x9e3779b9u;
constexpr uint64_t kGolden64 = 0x9e3779b97f4a7c15u;

// Of one tile in one step.
struct RoundingKey {
  uint32_t lanes, rows;

  L2L_HOST_DEVICE RoundingKey(uint64_t seed, int64_t tile) {
    const uint64_t key = mix64(seed + kGolden64 * static_cast<uint64_t>(tile));
    lanes = static_cast<uint32_t>(key);
    rows = static_cast<uint32_t>(key >> 32);
  }
  // What a coordinate keeps for its rows.
  template <class U>
  L2L_HOST_DEVICE U lane(U lane) const {
    return mix32(lanes + kGolden32 * lane);
  }
  // 16 bits for rounded row 2 * pair, the low ones, and for row 2 * pair + 1. Rounded rows are counted from 0: those of
  // c, layer by layer, then the averages.
  template <class U>
  L2L_HOST_DEVICE U draw(U lane, int pair) const {
    const uint32_t row = mix32(rows + kGolden32 * static_cast<uint32_t>(pair));
    const U x = (lane ^ row) * 0x7feb352du;
    return x ^ (x >> 16);
  }
};

// ---- codes

L2L_HOST_DEVICE uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

L2L_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

constexpr int kNotANumber = -128;
constexpr uint32_t kQuietNaN = 0x7fc00000u, kInfinity = 0x7f800000u;

L2L_HOST_DEVICE float decode_bfloat16(uint32_t code) { return float_of(code << 16); }

L2L_HOST_DEVICE uint32_t nearest_bfloat16(float x) {
  const uint32_t bits = bits_of(x);
  return (x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : bits | (kQuietNaN & ~kInfinity)) >> 16;
}

// random: 16 bits.
L2L_HOST_DEVICE uint32_t stochastic_bfloat16(float x, uint32_t random) {
  const uint32_t bits = bits_of(x);
  const bool finite = (bits & kInfinity) != kInfinity;
  const uint32_t rounded = bits + (finite ? random : 0u);
  return (x == x ? rounded : bits | (kQuietNaN & ~kInfinity)) >> 16;
}

L2L_HOST_DEVICE float decode_h(int code) {
  const float x = static_cast<float>(code) * (1.f / 127.f);
  return float_of(code == kNotANumber ? kQuietNaN : bits_of(x));
}

// The nearest whole number of |x| < 2^22.
L2L_HOST_DEVICE int encode_whole(float x) {
  const float shift = 12582912.f;  // 1.5 * 2^23: rounds to whole numbers, which land in the low bits
  return static_cast<int>(bits_of(x + shift) - bits_of(shift));
}

L2L_HOST_DEVICE int encode_h(float h) {
  const float scaled = h * 127.f;
  const float low = scaled < -127.f ? -127.f : scaled, bounded = low > 127.f ? 127.f : low;
  return h == h ? encode_whole(bounded) : kNotANumber;
}

// |x| as bits, which compare like numbers; 0 if it is not finite.
L2L_HOST_DEVICE uint32_t finite_magnitude(float x) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  return magnitude < kInfinity ? magnitude : 0u;
}

// e of a row of c from the largest of its magnitudes. 127 * 2^e = 1.984375 * 2^(e + 6).
L2L_HOST_DEVICE int step_exponent(uint32_t largest) {
  const int e = static_cast<int>((largest + 0x1ffffu) >> 23) - (127 + 6);
  return e < -120 ? -120 : e;
}

L2L_HOST_DEVICE float power_of_two(int e) { return float_of(static_cast<uint32_t>(127 + e) << 23); }

// step: 2^e.
L2L_HOST_DEVICE float decode_c(int code, float step) {
  const float x = static_cast<float>(code) * step;
  return float_of(code == kNotANumber ? kQuietNaN : bits_of(x));
}

// The code of 128 + a number of steps, which is 1 ... 256 unless it is no number.
L2L_HOST_DEVICE int code_of_shifted(float x) {
  const bool counts = x >= 1.f && x < 256.f;
  return static_cast<int>(counts ? x : 0.f) - 128;
}

// inverse: 2^-e, so that the product is exact; random: 16 bits, which make 128 + random * 2^-16.
L2L_HOST_DEVICE int encode_c(float c, float inverse, uint32_t random) {
  return code_of_shifted(c * inverse + float_of(0x43000000u | random));
}

}  // namespace l2l
