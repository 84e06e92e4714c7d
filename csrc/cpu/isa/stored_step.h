// The step on one tile whose state is not float32. What is stored is decoded where the layer reads it and encoded as
// soon as a unit is done: while the multiply-adds of the next one keep the processor's other half busy.
#pragma once

#include "state_rows.h"
#include "step.h"

namespace l2l {
namespace L2L_ISA {

// The cells of one layer in a bfloat16 tile.
struct Bfloat16Cells {
  const uint16_t* h;
  uint16_t *new_h, *c;
  float* rows;  // the new h, for the layer above
  Draws& draws;
  int rounded;  // the first of the layer's rounded rows
  int computed;
  alignas(64) float cell[2][kTile];  // of two units, as so many may be computed together

  template <int N>
  L2L_ALWAYS_INLINE Wide<N> load(int unit, int lane) const {
    Wide<N> x;
    L2L_UNROLL for (int v = 0; v < N; v++) x.v[v] = load_bfloat16(c + unit * kTile + lane + v * kLanes);
    return x;
  }
  template <int N>
  L2L_ALWAYS_INLINE void store(int unit, int lane, const Wide<N>& x, const Wide<N>& out) {
    store_wide(cell[unit & 1] + lane, x);
    store_wide(rows + (long)unit * kTile + lane, out);
  }
  L2L_ALWAYS_INLINE void end(int unit) {
    clear_lanes(cell[unit & 1], computed);
    clear_lanes(rows + (long)unit * kTile, computed);
    encode_bfloat16_row(rows + (long)unit * kTile, new_h + unit * kTile);
    round_bfloat16_row(cell[unit & 1], draws.of(rounded + unit), c + unit * kTile);
  }
};

// The same in an int8 tile.
struct Int8Cells {
  int8_t *h, *c, *exponents;
  float* rows;
  Draws& draws;
  int rounded, count;
  bool any_nan;  // among the layer's codes
  alignas(64) float cell[2][kTile];  // of two units, as so many may be computed together

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
    store_wide(cell[unit & 1] + lane, x);
    store_wide(rows + (long)unit * kTile + lane, out);
  }
  L2L_ALWAYS_INLINE void end(int unit) {
    for (int i = count; i < kTile; i++) cell[unit & 1][i] = 0.f;  // the padding must not choose the row's step
    clear_lanes(rows + (long)unit * kTile, computed_lanes(count));
    encode_h_row(rows + (long)unit * kTile, h + unit * kTile);
    exponents[unit] = (int8_t)encode_c_row(cell[unit & 1], draws.of(rounded + unit), c + unit * kTile);
  }
};

// One step of all layers: inputs [inputs(0)][64], out [read_outs][64].
template <class Products>
static L2L_ALWAYS_INLINE void stored_step_with(const Network& net, const TensorStep& tensor, StateType type,
                                               const float* inputs, void* tile, int count, uint64_t seed,
                                               int64_t number, float* out) {
  const Config& config = net.config;
  const TileLayout layout(config, type);
  const int hidden = config.hidden, lanes = computed_lanes(count);
  alignas(64) float h[kMaxHidden * kTile], rows[2][kMaxHidden * kTile];
  typename Products::Buffer x_buffer, h_buffer;
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
      Int8Cells cells{codes, codes + hidden * kTile, (int8_t*)tile + layout.exponents + l * hidden, new_h, draws,
                      l * hidden, count, any_nan, {}};
      layer(cells);
    } else {
      uint16_t* codes = (uint16_t*)tile + config.h_row(l) * kTile;
      for (int j = 0; j < hidden; j++) decode_bfloat16_row(codes + j * kTile, h + j * kTile);
      Bfloat16Cells cells{codes, codes, codes + hidden * kTile, new_h, draws, l * hidden, lanes, {}};
      layer(cells);
    }
    below = new_h;
  }
  read_out(net, below, out);
}

static void stored_step(const Network& net, const TensorStep& tensor, StateType type, const float* inputs, void* tile,
                        int count, uint64_t seed, int64_t number, float* out) {
  stored_step_with<FloatProducts>(net, tensor, type, inputs, tile, count, seed, number, out);
}

// The moving averages of a tile, [averages][64].
static void decode_averages(const Config& config, StateType type, const void* tile, float* rows) {
  const uint16_t* from = (const uint16_t*)((const uint8_t*)tile + TileLayout(config, type).averages);
  for (int k = 0; k < config.averages(); k++) decode_bfloat16_row(from + k * kTile, rows + k * kTile);
}

static void encode_averages(const Config& config, StateType type, const float* rows, uint64_t seed, int64_t number,
                            void* tile) {
  uint16_t* to = (uint16_t*)((uint8_t*)tile + TileLayout(config, type).averages);
  Draws draws(seed, number);
  const int first = config.layers * config.hidden;
  for (int k = 0; k < config.averages(); k++) round_bfloat16_row(rows + k * kTile, draws.of(first + k), to + k * kTile);
}

}  // namespace L2L_ISA
}  // namespace l2l
