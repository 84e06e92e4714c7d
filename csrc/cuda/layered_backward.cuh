// Back-propagation layer by layer over all tiles: through T recorded steps of all tensors, or through one functional
// step.
//
// The gradient of an averaged h is the mean of the gradients of its problem's coordinates, so the walk back passes over
// all tiles for each layer of each step, with a barrier of the whole grid between passes. One cooperative launch; the
// last pass adds the blocks' sums of d phi.
//
// Owns: a block of 256 threads strides over tiles of 64 coordinates, always the same ones; a thread has one coordinate
//   and every fourth unit or input of it.
// Shared memory: the rows of a layer's inputs, padded against bank conflicts; the gate gradients of the tile; float32
//   sums of the weight gradients of one pass. Weights are read through the cache.
// Global memory: the gradient of the state, read and written in every pass; states: the one before every chunk of
//   steps, and those of one chunk, some 2 sqrt(T) in all.
// d phi: the sums of a pass are added to float64 sums of the block, those of all blocks in order: a number is only ever
//   added to by one thread.
#pragma once

#include "layered_tiles.cuh"

namespace l2l {

// The passes on the way back.
struct LayeredWalk : LayeredTiles {
  // Adds the tile's gradients of the averaged cells of `layer`, which are complete, of the coordinates that are in the
  // averages of the states `slot` + 1.
  __device__ __forceinline__ void add_cells(int slot, int layer) const {
    if (s.problems != 1) return;
    __syncthreads();
    const int warp = static_cast<int>(threadIdx.x) / 32, half = static_cast<int>(threadIdx.x) % 32;
    const int64_t row = static_cast<int64_t>(config().h_row(layer)) * kTile;
    const float* rows = global(s.grad_state) + at * tile_floats() + row;
    const float* h = global(s.states) + ((slot + 1) * s.tiles + at) * tile_floats() + row;
    for (int k = warp; k < config().gac; k += kLayeredThreads / 32) {
      double sum = 0.;
      int left_out = 0;
      for (int i = half; i < kTile; i += 32) {
        const bool in = i < count && isfinite(h[k * kTile + i]);
        sum += in ? static_cast<double>(rows[k * kTile + i]) : 0.;
        left_out += __popc(__ballot_sync(0xffffffffu, i < count && !in));
      }
      sum = warp_sum(sum);
      if (half == 0) {
        cell_sums[k] += sum;
        cell_sums[config().gac + k] += static_cast<double>(left_out);
      }
    }
  }

  // After a pass that called add_cells(slot, layer) for every tile: the averages in `means`, or in problem_means.
  // `turn` alternates between 0 and 1.
  __device__ __forceinline__ void average(int slot, int layer, int turn, double coordinates) const {
    const int cells = config().gac, warp = static_cast<int>(threadIdx.x) / 32;
    const int half = static_cast<int>(threadIdx.x) % 32;
    if (cells == 0) return;
    __syncthreads();
    if (s.problems == 1) {
      double* rows = s.block_sums + static_cast<int64_t>(turn) * gridDim.x * 2 * cells;
      for (int k = static_cast<int>(threadIdx.x); k < 2 * cells; k += kLayeredThreads) {
        rows[static_cast<int64_t>(blockIdx.x) * 2 * cells + k] = cell_sums[k];
        cell_sums[k] = 0.;
      }
      cooperative_groups::this_grid().sync();
      for (int k = warp; k < cells; k += kLayeredThreads / 32) {
        double sum = 0., left_out = 0.;
        for (unsigned i = half; i < gridDim.x; i += 32) {
          sum += rows[static_cast<int64_t>(i) * 2 * cells + k];
          left_out += rows[static_cast<int64_t>(i) * 2 * cells + cells + k];
        }
        sum = warp_sum(sum);
        left_out = warp_sum(left_out);
        if (half == 0) means[k] = quotient_of(sum, coordinates - left_out);
      }
      __syncthreads();
      return;
    }
    cooperative_groups::this_grid().sync();
    const BackwardEntry* entries = reinterpret_cast<const BackwardEntry*>(table.words);
    const int64_t warps = static_cast<int64_t>(gridDim.x) * (kLayeredThreads / 32);
    for (int64_t g = static_cast<int64_t>(blockIdx.x) * (kLayeredThreads / 32) + warp; g < s.problems; g += warps)
      for (int k = 0; k < cells; k++) {
        double sum = 0., members = 0.;
        for (int e = 0; e < table.ref.entries; e++) {
          const int64_t size = entries[e].numel / s.problems, begin = e == 0 ? 0 : entries[e - 1].end_tile;
          const int64_t row = static_cast<int64_t>(config().h_row(layer) + k) * kTile;
          const float* rows = global(s.grad_state) + begin * tile_floats() + row;
          const float* h = global(s.states) + ((slot + 1) * s.tiles + begin) * tile_floats() + row;
          for (int64_t i = g * size + half; i < (g + 1) * size; i += 32) {
            const int64_t place = i / kTile * tile_floats() + i % kTile;
            if (isfinite(h[place])) sum += static_cast<double>(rows[place]), members += 1.;
          }
        }
        sum = warp_sum(sum);
        members = warp_sum(members);
        if (half == 0) s.problem_means[g * cells + k] = quotient_of(sum, members);
      }
    cooperative_groups::this_grid().sync();
  }

  __device__ __forceinline__ void clear_sums(int quadruples) const {
    __syncthreads();
    for (int q = static_cast<int>(threadIdx.x); q < quadruples; q += kLayeredThreads)
      pass_sums[q] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  // Visits every tile and sums over them: in float32 over a few, in float64 over all that the block visits, which may
  // be hundreds of thousands.
  template <class Visit, class Flush>
  __device__ __forceinline__ void sum_over_tiles(int quadruples, const Visit& visit, const Flush& flush) {
    int held = 0;
    clear_sums(quadruples);
    for_each_tile([&] {
      if (held == kTilesInFloat) {
        flush();
        clear_sums(quadruples);
        held = 0;
      }
      visit();
      held++;
    });
    flush();
  }

  // The outputs of step t: their gradients into d h of the last layer.
  __device__ __forceinline__ void read_out_tile(int t, int slot) const {
    const Config& c = config();
    const int top = c.layers - 1;
    float* upstream = reinterpret_cast<float*>(gates);  // [outputs][kLayeredRow]
    __syncthreads();
    const float* h = in(s.states, slot + 1) + static_cast<int64_t>(c.h_row(top)) * kTile;
    for (int k = part; k < c.hidden; k += kLayeredParts) inputs[k * kLayeredRow + lane] = h[k * kTile];
    if (s.total > 0) {
      for (int o = part; o < c.outputs; o += kLayeredParts)
        upstream[o * kLayeredRow + lane] = lane < count ? s.grad_out[o * s.total + tile * kTile + lane] : 0.f;
    } else if (part == 0) {
      upstream[lane] = walk_back(step(t), gradient(t), s.adjoint[at * kTile + lane]);
    }
    __syncthreads();
    const float* out = reinterpret_cast<const float*>(s.weights + layout().out(c.layers));
    float* dh = in(s.grad_state) + static_cast<int64_t>(c.h_row(top)) * kTile;
    for (int k = part; k < c.hidden; k += kLayeredParts) {
      float d = dh[k * kTile];
      for (int o = 0; o < c.outputs; o++) d += out[o * c.hidden + k] * upstream[o * kLayeredRow + lane];
      dh[k * kTile] = d;
    }
    float* sums = reinterpret_cast<float*>(pass_sums);
    for (int i = static_cast<int>(threadIdx.x); i < c.outputs * (c.hidden + 1); i += kLayeredThreads) {
      const int o = i < c.outputs * c.hidden ? i / c.hidden : i - c.outputs * c.hidden;
      const float* x = i < c.outputs * c.hidden ? inputs + i % c.hidden * kLayeredRow : nullptr;
      float sum = 0.f;
      for (int k = 0; k < kTile; k++) sum += upstream[o * kLayeredRow + k] * (x ? x[k] : 1.f);
      sums[i] += sum;
    }
    add_cells(slot, top);
  }

  __device__ __forceinline__ void flush_read_out() const {
    const Config& c = config();
    double* to = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size() + c.weight_out();
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < c.outputs * (c.hidden + 1); i += kLayeredThreads) {
      to[i] += static_cast<double>(read_out_scale(c, i) * reinterpret_cast<float*>(pass_sums)[i]);
    }
  }

  // One layer of step t: from the gradients of its new h and c to those of the previous ones and of its inputs.
  __device__ __forceinline__ void layer_tile(int t, int slot, int layer) const {
    const Config& c = config();
    const int n = c.inputs(layer), unit = layout().unit(layer);
    const float *before = in(s.states, slot), *after = in(s.states, slot + 1);
    float* grad = in(s.grad_state);
    __syncthreads();
    load_inputs(t, layer, before, after);
    __syncthreads();
    for (int j = part; j < c.hidden; j += kLayeredParts) {
      const float4 a = preactivations(layer, j);
      const int64_t h_row = static_cast<int64_t>(c.h_row(layer) + j) * kTile;
      const int64_t c_row = static_cast<int64_t>(c.c_row(layer) + j) * kTile;
      const float previous = before[c_row];
      float cell = previous, dc = grad[c_row], dh = grad[h_row];
      if (j < c.gac && lane < count && isfinite(after[h_row]))
        dh = s.problems == 1 ? means[j] : s.problem_means[problem() * c.gac + j];
      Gates<float> kept;
      cell_forward<DeviceMath>(a.x, a.y, a.z, a.w, cell, kept);
      const GateGradients<float> d = cell_backward<float>(kept, previous, dh, dc);
      grad[c_row] = dc;
      // Divided by the scale that the packed weights have.
      gates[j * kTile + lane] =
          make_float4(d.i / gate_scale(0), d.f / gate_scale(1), d.g / gate_scale(2), d.o / gate_scale(3));
    }
    __syncthreads();
    const float4* w = global(s.weights) + layout().layer(layer) + 1;
    for (int k = part; k < n + c.hidden; k += kLayeredParts) {
      if (layer == 0 && k < n && s.total == 0) continue;
      float sum = 0.f;
      for (int j = 0; j < c.hidden; j++) {
        const float4 v = w[j * unit + k], d = gates[j * kTile + lane];
        sum += (v.x * d.x + v.y * d.y) + (v.z * d.z + v.w * d.w);
      }
      if (k >= n)
        grad[static_cast<int64_t>(c.h_row(layer) + k - n) * kTile] = sum;
      else if (layer > 0)
        grad[static_cast<int64_t>(c.h_row(layer - 1) + k) * kTile] += sum;
      else if (k < c.features())
        features[k * kTile + lane] = sum;
      else if (lane < count)
        s.grad_extra[(k - c.features()) * s.total + tile * kTile + lane] = sum;
    }
    for (int q = static_cast<int>(threadIdx.x); q < c.hidden * unit; q += kLayeredThreads) {
      const float* x = q % unit > 0 ? inputs + (q % unit - 1) * kLayeredRow : nullptr;
      const float4* d = gates + q / unit * kTile;
      float4 sum = pass_sums[q];
      for (int k = 0; k < kTile; k++) {
        const float v = x ? x[k] : 1.f;
        sum.x += d[k].x * v;
        sum.y += d[k].y * v;
        sum.z += d[k].z * v;
        sum.w += d[k].w * v;
      }
      pass_sums[q] = sum;
    }
    if (layer > 0) return add_cells(slot, layer - 1);
    __syncthreads();
    if (s.total > 0 && part == 0 && lane < count) {
      float d[kGradientFeatures];
      for (int k = 0; k < kGradientFeatures; k++) d[k] = k < c.features() ? features[k * kTile + lane] : 0.f;
      write_dense(s.grad_grad, tile * kTile + lane, features_backward<DeviceMath>(s.features, gradient(t), d));
    }
  }

  __device__ __forceinline__ void flush_layer(int layer) const {
    const Config& c = config();
    const int unit = layout().unit(layer);
    double* to = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size();
    __syncthreads();
    for (int q = static_cast<int>(threadIdx.x); q < c.hidden * unit; q += kLayeredThreads) {
      const int j = q / unit, k = q % unit;
      const float4 sum = pass_sums[q];
      for (int g = 0; g < kGates; g++) {
        const float part_sum = g == 0 ? sum.x : g == 1 ? sum.y : g == 2 ? sum.z : sum.w;
        to[phi_index(c, layer, j, k, g)] += static_cast<double>(gate_scale(g) * part_sum);
      }
    }
  }

  __device__ __forceinline__ void step_back(int t, int slot, double coordinates, int& turn) {
    const Config& c = config();
    sum_over_tiles((c.outputs * (c.hidden + 1) + 3) / 4, [&] { read_out_tile(t, slot); }, [&] { flush_read_out(); });
    for (int layer = c.layers - 1; layer >= 0; layer--) {
      average(slot, layer, turn, coordinates);
      turn ^= 1;
      sum_over_tiles(c.hidden * layout().unit(layer), [&] { layer_tile(t, slot, layer); }, [&] { flush_layer(layer); });
    }
  }
};

template <int TableBytes>
__global__ void __launch_bounds__(kLayeredThreads, 2)
    layered_backward_kernel(const __grid_constant__ LayeredBackwardArguments<TableBytes> arguments) {
  L2L_DYNAMIC_SHARED(float4, shared);
  __shared__ double cell_sums[2 * kMaxHidden];
  const LayeredBackwardScalars& s = arguments.scalars;
  const LayeredShared layout(s.config);
  float* floats = reinterpret_cast<float*>(shared);
  LayeredWalk walk{{s,
                    {s.table, arguments.table.words},
                    reinterpret_cast<float4*>(floats + layout.gates),
                    reinterpret_cast<float4*>(floats + layout.sums),
                    floats + layout.inputs,
                    floats + layout.features,
                    floats + layout.means,
                    cell_sums,
                    static_cast<int>(threadIdx.x) % kTile,
                    static_cast<int>(threadIdx.x) / kTile}};
  const Config& c = s.config;
  pack_for_backward(s);
  for (int i = threadIdx.x; i < 2 * kMaxHidden; i += kLayeredThreads) cell_sums[i] = 0.;
  double* own_sums = s.sums + static_cast<int64_t>(blockIdx.x) * c.phi_size();
  for (int i = threadIdx.x; i < c.phi_size(); i += kLayeredThreads) own_sums[i] = 0.;
  cooperative_groups::this_grid().sync();

  int64_t coordinates = 0;
  const BackwardEntry* entries = reinterpret_cast<const BackwardEntry*>(walk.table.words);
  for (int e = 0; e < s.table.entries; e++) coordinates += entries[e].numel;
  const double members = static_cast<double>(coordinates / s.problems);

  walk.for_each_tile([&] {
    walk.copy_in(walk.entry->grad_end, walk.in(s.grad_state));
    if (walk.part == 0 && s.total == 0) {
      float adjoint = 0.f;
      walk_back(walk.step(s.steps), walk.gradient(s.steps), adjoint);
      s.adjoint[walk.at * kTile + walk.lane] = adjoint;
    }
    walk.copy_in(walk.entry->state, walk.in(s.states));
    walk.copy_in(walk.entry->state, walk.in(s.checkpoints));
    for (int k = 0; k + 1 < s.chunks; k++) {
      __syncthreads();
      walk.forward(k * s.chunk, s.chunk);
      walk.copy(walk.in(s.states, s.chunk), walk.in(s.checkpoints, k + 1));
      walk.copy(walk.in(s.states, s.chunk), walk.in(s.states));
    }
  });
  int turn = 0;
  for (int k = s.chunks - 1; k >= 0; k--) {
    const int first = k * s.chunk, n = s.steps - first < s.chunk ? s.steps - first : s.chunk;
    walk.for_each_tile([&] {
      __syncthreads();
      walk.copy(walk.in(s.checkpoints, k), walk.in(s.states));
      __syncthreads();
      walk.forward(first, n);
    });
    for (int t = first + n - 1; t >= first; t--) walk.step_back(t, t - first, members, turn);
  }
  __syncthreads();
  walk.for_each_tile([&] {
    if (!walk.entry->grad_start) return;
    float* to = walk.entry->grad_start + walk.tile * walk.tile_floats() + walk.lane;
    walk.copy(walk.in(s.grad_state), to);
  });
  cooperative_groups::this_grid().sync();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kLayeredThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kLayeredThreads + threadIdx.x; i < c.phi_size(); i += stride) {
    double sum = 0.;
    for (unsigned b = 0; b < gridDim.x; b++) sum += s.sums[static_cast<int64_t>(b) * c.phi_size() + i];
    s.grad_phi[i] = static_cast<float>(sum);
  }
}

}  // namespace l2l
