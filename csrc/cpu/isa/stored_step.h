// The step on one tile whose state is not float32. What is stored is decoded where the layer reads it and encoded as
// soon as a unit is done: while the multiply-adds of the next one keep the processor's other half busy. Where all
// coordinates of a unit are in registers at once, they are encoded from there.
#pragma once

#include "state_rows.h"
#include "step.h"

namespace l2l {
namespace L2L_ISA {

// A stream of tiles has too many rows for the processor to foresee.
template <class T>
static L2L_ALWAYS_INLINE void prefetch_rows(const T* h, const T* c) {
  L2L_UNROLL for (int i = 0; i < kTile; i += 64 / (int)sizeof(T)) {
    __builtin_prefetch(h + i, 1, 3);
    __builtin_prefetch(c + i, 1, 3);
  }
}

// The cells of one layer in a bfloat16 tile.
struct Bfloat16Cells {
  const uint16_t* h;
  uint16_t *new_h, *c;
  float* rows;  // the new h, for the layer above
  Draws& draws;
  int rounded;  // the first of the layer's rounded rows
  int computed;
  const uint16_t *next_h, *next_c;  // of the next tile, or null
  float (*cell)[kTile];  // room for two units, as so many may be computed together

  template <int N>
  L2L_ALWAYS_INLINE Wide<N> load(int unit, int lane) const {
    Wide<N> x;
    L2L_UNROLL for (int v = 0; v < N; v++) x.v[v] = load_bfloat16(c + unit * kTile + lane + v * kLanes);
    return x;
  }
  template <int N>
  L2L_ALWAYS_INLINE void store(int unit, int lane, const Wide<N>& x, const Wide<N>& out) {
    store_wide(rows + (long)unit * kTile + lane, out);
    if constexpr (N == kRowVectors)
      encode(unit, x, out);
    else
      store_wide(cell[unit & 1] + lane, x);
  }
  L2L_ALWAYS_INLINE void end(int unit) {
    if (next_h) prefetch_rows(next_h + unit * kTile, next_c + unit * kTile);
    if (kStepVectors == kRowVectors && computed == kTile) return;
    clear_lanes(cell[unit & 1], computed);
    clear_lanes(rows + (long)unit * kTile, computed);
    encode(unit, load_wide<kRowVectors>(cell[unit & 1]), load_wide<kRowVectors>(rows + (long)unit * kTile));
  }
  L2L_ALWAYS_INLINE void encode(int unit, const Wide<kRowVectors>& x, const Wide<kRowVectors>& out) {
    encode_bfloat16_row(out, new_h + unit * kTile);
    round_bfloat16_row(x, draws.of(rounded + unit), c + unit * kTile);
  }
};

// The same in an int8 tile.
struct Int8Cells {
  int8_t *h, *c, *exponents;
  float* rows;
  Draws& draws;
  int rounded, count;
  bool any_nan;  // among the layer's codes
  const int8_t *next_h, *next_c;  // of the next tile, or null
  float (*cell)[kTile];  // room for two units, as so many may be computed together

  template <int N>
  L2L_ALWAYS_INLINE Wide<N> load(int unit, int lane) const {
    const float step = power_of_two(exponents[unit]);
    Wide<N> x;
    L2L_UNROLL for (int v = 0; v < N; v++) {
      const vf code = load_codes(c + unit * kTile + lane + v * kLanes);
      x.v[v] = any_nan ? decode_with_nan(code, step) : code * step;
    }
    return x;
  }
  template <int N>
  L2L_ALWAYS_INLINE void store(int unit, int lane, const Wide<N>& x, const Wide<N>& out) {
    store_wide(rows + (long)unit * kTile + lane, out);
    if constexpr (N == kRowVectors) {
      if (count == kTile) return encode(unit, x, out);
    }
    store_wide(cell[unit & 1] + lane, x);
  }
  L2L_ALWAYS_INLINE void end(int unit) {
    if (next_h) prefetch_rows(next_h + unit * kTile, next_c + unit * kTile);
    if (kStepVectors == kRowVectors && count == kTile) return;
    for (int i = count; i < kTile; i++) cell[unit & 1][i] = 0.f;  // the padding must not choose the row's step
    clear_lanes(rows + (long)unit * kTile, computed_lanes(count));
    encode(unit, load_wide<kRowVectors>(cell[unit & 1]), load_wide<kRowVectors>(rows + (long)unit * kTile));
  }
  L2L_ALWAYS_INLINE void encode(int unit, const Wide<kRowVectors>& x, const Wide<kRowVectors>& out) {
    encode_h_row(out, h + unit * kTile);
    exponents[unit] = (int8_t)encode_c_row(x, draws.of(rounded + unit), c + unit * kTile);
  }
};

// The moving averages of a tile, [averages][64].
static void decode_averages(const Config& config, StateType type, const void* tile, float* rows) {
  const uint16_t* from = (const uint16_t*)((const uint8_t*)tile + TileLayout(config, type).averages);
  for (int k = 0; k < config.averages(); k++) decode_bfloat16_row(from + k * kTile, rows + k * kTile);
}

static L2L_ALWAYS_INLINE void encode_averages(const Config& config, StateType type, const float* rows, Draws& draws,
                                              void* tile) {
  uint16_t* to = (uint16_t*)((uint8_t*)tile + TileLayout(config, type).averages);
  const int first = config.layers * config.hidden;
  for (int k = 0; k < config.averages(); k++)
    round_bfloat16_row(load_wide<kRowVectors>(rows + k * kTile), draws.of(first + k), to + k * kTile);
}

static void encode_averages(const Config& config, StateType type, const float* rows, uint64_t seed, int64_t number,
                            void* tile) {
  Draws draws(seed, number);
  encode_averages(config, type, rows, draws, tile);
}

// One step of all layers: inputs [inputs(0)][64], out [read_outs][64] or, of kinds with averages, the update [64] in its
// first row.
template <class Products>
static L2L_ALWAYS_INLINE void stored_step_with(const Network& net, const TensorStep& tensor, StateType type,
                                               const float* inputs, void* tile, int count, uint64_t seed,
                                               int64_t number, const void* next, const float* grad,
                                               const float* averages, float* out) {
  const Config& config = net.config;
  const TileLayout layout(config, type);
  const int hidden = config.hidden, lanes = computed_lanes(count);
  typename Products::Buffer x_buffer, h_buffer;
  alignas(64) float h[kMaxHidden * kTile], rows[2][kMaxHidden * kTile], cell[2][kTile];
  Draws draws(seed, number);
  const float* below = inputs;
  for (int l = 0; l < config.layers; l++) {
    float* new_h = rows[l & 1];
    const float* x = Products::operands(below, config.inputs(l), lanes, x_buffer);
    const auto layer = [&](auto& cells) __attribute__((always_inline)) {
      const float* old_h = Products::operands(h, hidden, lanes, h_buffer);
      forward_units<Products>({net.layer[l].forward, l == 0 ? tensor.bias : nullptr, hidden, x, config.inputs(l), old_h,
                               hidden, nullptr, nullptr, new_h, count, nullptr, nullptr},
                              cells);
    };
    if (type == StateType::int8) {
      int8_t* codes = (int8_t*)tile + config.h_row(l) * kTile;
      const bool any_nan = has_nan_code(codes, 2 * hidden);
      for (int j = 0; j < hidden; j++) decode_codes_row(codes + j * kTile, 1.f / 127.f, any_nan, h + j * kTile);
      const int8_t *next_h = next ? (const int8_t*)next + config.h_row(l) * kTile : nullptr,
                   *next_c = next ? (const int8_t*)next + config.c_row(l) * kTile : nullptr;
      Int8Cells cells{codes, codes + hidden * kTile, (int8_t*)tile + layout.exponents + l * hidden, new_h, draws,
                      l * hidden, count, any_nan, next_h, next_c, cell};
      layer(cells);
    } else {
      uint16_t* codes = (uint16_t*)tile + config.h_row(l) * kTile;
      for (int j = 0; j < hidden; j++) decode_bfloat16_row(codes + j * kTile, h + j * kTile);
      const uint16_t *next_h = next ? (const uint16_t*)next + config.h_row(l) * kTile : nullptr,
                     *next_c = next ? (const uint16_t*)next + config.c_row(l) * kTile : nullptr;
      Bfloat16Cells cells{codes, codes, codes + hidden * kTile, new_h, draws, l * hidden,
                           lanes, next_h, next_c, cell};
      layer(cells);
    }
    below = new_h;
  }
  read_out(net, below, out);
  const int64_t behind_cells = type == StateType::int8 ? layout.exponents : layout.averages;
  for (int64_t i = behind_cells; next && i < layout.bytes; i += 64) __builtin_prefetch((const char*)next + i, 1, 3);
  if (config.averages() > 0) {
    tile_update(net, tensor, grad, averages, inputs, out);
    encode_averages(config, type, averages, draws, tile);
  }
}

static void stored_step(const Network& net, const TensorStep& tensor, StateType type, const float* inputs, void* tile,
                        int count, uint64_t seed, int64_t number, const void* next, const float* grad,
                        const float* averages, float* out) {
  stored_step_with<FloatProducts>(net, tensor, type, inputs, tile, count, seed, number, next, grad, averages, out);
}

}  // namespace L2L_ISA
}  // namespace l2l
