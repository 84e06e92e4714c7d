// The phases of back-propagation through one step of one tile, for the block that owns the tile.
//
// A block has 8 H threads, for H = 4 a single warp. In the phases on cells a thread owns the units 2 pair, 2 pair + 1
// for the four coordinates 4 quad
// .. 4 quad + 3 (16 quads): its gate sums, c and the gradients of its h and c stay in registers. In the phase on
// weights it owns the four gates of unit tid % H and every eighth input from tid / H on: those sums stay in registers
// over all steps and tiles. Between the phases data goes through rows of 64 coordinates in shared memory, 68 floats
// apart, so that eight threads on adjacent rows touch all banks once.
#pragma once

#include "math.cuh"
#include "weights.cuh"

namespace l2l {

constexpr int kRow = 68;    // floats from row to row in shared memory
constexpr int kQuads = 16;  // of a tile
constexpr int kSlots = 8;   // threads that share a unit's inputs in the weight phase

__device__ __forceinline__ void load4(const float* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}
__device__ __forceinline__ void store4(float* to, const float (&from)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

// What a thread owns. The rows of its units begin at `at` (rows of 64 floats) and `row` (in shared memory); all else
// about an address is then a constant.
struct Owner {
  int pair, lane, at, row;  // in the phases on cells; lane: the quad's first coordinate
  int unit, slot;           // in the phase on weights
  template <int H>
  __device__ __forceinline__ static Owner of_thread() {
    const int t = static_cast<int>(threadIdx.x);
    const int pair = t / kQuads, lane = t % kQuads * 4;
    return {pair, lane, 2 * pair * kTile + lane, 2 * pair * kRow + lane, t % H, t / H};
  }
};

// visit(lane) for the tile's coordinates, in the phases on inputs and read-outs: one per thread; a block with fewer
// threads has two per thread, in each phase the same. Unroll: how many at once.
template <int H, int Unroll = 1, class Visit>
__device__ __forceinline__ void for_each_lane(const Visit& visit) {
  constexpr int kThreads = kSlots * H;
  const int thread = static_cast<int>(threadIdx.x);
  if constexpr (kThreads < kTile) {
    static_assert(kTile % kThreads == 0 && kThreads % 32 == 0, "whole warps with as many coordinates each");
#pragma unroll(Unroll)
    for (int i = 0; i < kTile / kThreads; i++) visit(thread + i * kThreads);
  } else if (thread < kTile) {
    visit(thread);
  }
}

// a[unit][gate][coordinate] += weights . rows, for the two units of a thread. w: the quadruples of the first unit from
// the first of these inputs on; rows: at the thread's quad. Per row: 2 loads of weights and 1 of coordinates, 32
// multiply-adds.
template <int Rows, int Unroll>
__device__ __forceinline__ void add_products(const float4* w, int unit_quadruples, const float* rows,
                                             float (&a)[2][4][4]) {
#pragma unroll(Rows < 4 ? Rows : Rows == kNormalizedFeatures ? 1 : Rows > 20 ? 2 : Unroll)
  for (int k = 0; k < Rows; k++) {
    float x[4];
    load4(rows + k * kRow, x);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const float4 v = w[u * unit_quadruples + k];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        a[u][0][i] += v.x * x[i];
        a[u][1][i] += v.y * x[i];
        a[u][2][i] += v.z * x[i];
        a[u][3][i] += v.w * x[i];
      }
    }
  }
}

// Pre-activations of a thread's two units in a layer with Inputs inputs; x, h: rows at the thread's quad. biases: of
// the units, in the place of the weights' own, or null.
template <int H, int Inputs, int Unroll>
__device__ __forceinline__ void gate_sums(const float4* layer, const float4* biases, const Owner& own, const float* x,
                                          const float* h, float (&a)[2][4][4]) {
  constexpr int kUnit = 1 + Inputs + H;
  const float4* w = layer + 2 * own.pair * kUnit;
#pragma unroll
  for (int u = 0; u < 2; u++) {
    const float4 bias = biases ? biases[2 * own.pair + u] : w[u * kUnit];
#pragma unroll
    for (int i = 0; i < 4; i++) a[u][0][i] = bias.x, a[u][1][i] = bias.y, a[u][2][i] = bias.z, a[u][3][i] = bias.w;
  }
  add_products<Inputs, Unroll>(w + 1, kUnit, x, a);
  add_products<H, Unroll>(w + 1 + Inputs, kUnit, h, a);
}

// Gradients of the gates of a thread's two units from those of its h and c; moves the latter on to the previous c. They
// are divided by gate_scale: multiplied by the packed (scaled) weights they give gradients of inputs, and multiplied by
// inputs they give gradients of the weights, to be scaled at the end. gates, c, gradient: the thread's rows of the
// activations, the previous c, and the gradients of h and, H rows further, of c; above is added to the gradient of h.
// out: its rows of the gate gradients in shared memory, rows gate * H + unit.
template <int H>
__device__ __forceinline__ void cell_gradients(const float* gates, const float* c, float* gradient,
                                               const float (&above)[2][4], float* out) {
#pragma unroll
  for (int u = 0; u < 2; u++) {
    float activation[4][4], previous[4], dh[4], dc[4], da[4][4];
#pragma unroll
    for (int g = 0; g < 4; g++) load4(gates + (g * H + u) * kTile, activation[g]);
    load4(c + u * kTile, previous);
    load4(gradient + u * kTile, dh);
    load4(gradient + (H + u) * kTile, dc);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      Gates<float> gate{activation[0][i], activation[1][i], activation[2][i], activation[3][i], 0.f};
      const float cell = gate.f * previous[i] + gate.i * gate.g;  // as cell_forward had it
      gate.tanh_c = DeviceMath::tanh_scaled(DeviceMath::min(kTanhBound, cell * (2.f * kLog2E)));
      const GateGradients<float> d = cell_backward<float>(gate, previous[i], dh[i] + above[u][i], dc[i]);
      da[0][i] = d.i * (1.f / gate_scale(0));
      da[1][i] = d.f * (1.f / gate_scale(1));
      da[2][i] = d.g * (1.f / gate_scale(2));
      da[3][i] = d.o * (1.f / gate_scale(3));
    }
    store4(gradient + (H + u) * kTile, dc);
#pragma unroll
    for (int g = 0; g < 4; g++) store4(out + (g * H + u) * kRow, da[g]);
  }
}

__device__ __forceinline__ void add_transposed(const float4& w, const float (&d)[4][4], float (&dx)[4]) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    dx[i] += w.x * d[0][i];
    dx[i] += w.y * d[1][i];
    dx[i] += w.z * d[2][i];
    dx[i] += w.w * d[3][i];
  }
}

// Gradients of a thread's two units as inputs of a layer: as its previous h, to the thread's rows of `gradient`; and,
// if Below (then Inputs == H), as the units of the layer below. d: the gate gradients at the thread's quad. Per unit of
// the layer: 4 loads of gradients and 2 or 4 of weights, 32 or 64 multiply-adds.
template <int H, int Inputs, bool Below>
__device__ __forceinline__ void input_gradients(const float4* layer, const Owner& own, const float* d, float* gradient,
                                                float (&below)[2][4]) {
  constexpr int kUnit = 1 + Inputs + H;
  const float4* w = layer + 1 + 2 * own.pair;
  float dh[2][4] = {}, dx[2][4] = {};
#pragma unroll(H > 20 ? 1 : 2)
  for (int j = 0; j < H; j++) {
    float dj[4][4];
#pragma unroll
    for (int g = 0; g < 4; g++) load4(d + (g * H + j) * kRow, dj[g]);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      add_transposed(w[j * kUnit + Inputs + u], dj, dh[u]);
      if constexpr (Below) add_transposed(w[j * kUnit + u], dj, dx[u]);
    }
  }
#pragma unroll
  for (int u = 0; u < 2; u++) {
    store4(gradient + u * kTile, dh[u]);
#pragma unroll
    for (int i = 0; i < 4; i++) below[u][i] = dx[u][i];
  }
}

// sums[gate][i] += gate gradients of the thread's unit times input slot + 8 i, over the tile's coordinates, and the
// bias by slot 0 (in layer 0 the bias is the weight of a row of ones). d: row `unit` of the gate gradients; x: row
// `slot` of the inputs. Per quad: 4 + Inputs loads, 16 Inputs multiply-adds. Inputs past the layer's last are summed
// too, and discarded when the sums are stored.
template <int H, bool Bias, int Inputs>
__device__ __forceinline__ void weight_gradients(const float* d, const float* x, bool first_slot,
                                                 float (&sums)[4][Inputs], float (&bias)[4]) {
#pragma unroll(H > 20 ? 1 : 2)
  for (int quad = 0; quad < kQuads; quad++) {
    float dq[4][4];
#pragma unroll
    for (int g = 0; g < 4; g++) load4(d + g * H * kRow + 4 * quad, dq[g]);
#pragma unroll
    for (int k = 0; k < Inputs; k++) {
      float xq[4];
      load4(x + kSlots * k * kRow + 4 * quad, xq);
#pragma unroll
      for (int g = 0; g < 4; g++)
#pragma unroll
        for (int i = 0; i < 4; i++) sums[g][k] += dq[g][i] * xq[i];
    }
  }
  if constexpr (Bias) {
    if (!first_slot) return;
#pragma unroll 1
    for (int quad = 0; quad < kQuads; quad++)
#pragma unroll
      for (int g = 0; g < 4; g++) {
        float dq[4];
        load4(d + g * H * kRow + 4 * quad, dq);
#pragma unroll
        for (int i = 0; i < 4; i++) bias[g] += dq[i];
      }
  }
}

}  // namespace l2l
