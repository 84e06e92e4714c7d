// Back-propagation through T steps of the learned optimizer for all tensors of a launch, from the recorded gradients
// and the state at the start; the functional step's backward is the case T = 1 with its upstream gradient given.
//
// Owns: a block of 8 H threads has one tile of 64 coordinates at a time and strides over the tiles of all tensors. It
//   re-runs the T steps and walks back through them (backward_phases.cuh says who owns what in which phase).
// Registers: c of 2 units x 4 coordinates per layer on the way forward; a thread's share of d phi.
// Shared memory: packed weights; rows of features and h of all layers; rows of gate gradients (on the way forward: new
// h).
//   2 layers of 20 units: 20.9 + 11.4 + 21.8 kB.
// Global memory: states and recorded gradients once (the latter twice, of which the second time likely from cache).
// Scratch
//   of the block: activations, h and c of each step, 960 bytes per coordinate and step written once and read once, each
//   number by the thread that wrote it; the gradient of the state, 320 bytes read and written at each step. Long
//   segments are cut into chunks so that it stays bounded: a first pass leaves the state at the start of each.
// Per coordinate and step: 4,820 multiply-adds forward, 4,800 to the inputs, 4,980 to the weights.
//
// d phi: a thread adds its float32 sums of some 64 steps to float64 sums of its block; reduce.cuh adds the blocks in
// order. A number is only ever added to by one thread: a run repeats bit for bit on the same kind of GPU.
#pragma once

#include "backward_layout.cuh"

namespace l2l {

// The walk of one block. Block, the class that is derived from it, knows what goes in and comes out: see PlainBackward,
// whose members are the ones that a kind of network may have its own of.
template <int H, int L, int Features, class Scalars, class Entry, class Block>
struct BackwardWalk {
  using Layout = BackwardLayout<H, L, Features>;
  using Sums = BackwardSums<H, L, Features>;
  using Weights = Packed<H, Features>;
  static constexpr int kHidden = H, kFeatures = Features;

  const Scalars& s;
  const Table<Entry>& table;
  const Owner own;
  const float4* weights;
  float* read_out;  // shared, or scratch: three sums of the thread per row, kThreads apart: d weight_out of its units,
                    // d bias_out
  float *features, *h_rows, *gate_rows;  // shared: [Features], [L * H], [4 H] rows; a row of ones before the features
  float* inputs;                         // scratch: [steps][kInputRows][64]; then the steps of a chunk, then states

  // d phi of this thread, in units of the packed weights.
  float first[4][Layout::kInputs0] = {};
  float others[L > 1 ? L - 1 : 1][4][Layout::kInputs] = {};
  float bias[L > 1 ? L - 1 : 1][4] = {};
  int unflushed = 0;  // steps since they were last added to those in memory

  // Of the current tile.
  int64_t tile = 0;  // in its tensor
  const Entry* entry = nullptr;
  float c[L][2][4] = {};   // the cells of the thread's units, on the way forward
  float below[2][4] = {};  // what the layer above adds to the gradient of their h, on the way back

  // ---- what a kind of network may have its own of

  // Of the first layer in step t, in the place of the weights' own; or null.
  __device__ __forceinline__ const float4* biases(int) const { return nullptr; }
  // After step t forward, of those that are kept: turns what is in the place of the gradients of its read-out into
  // them. h: rows of the last layer's new h.
  __device__ __forceinline__ void find_upstream(int, const float*) const {}
  __device__ __forceinline__ void wait_for_upstream() const {}
  // In the phase on weights: see weight_gradients.
  __device__ __forceinline__ void upper_weight_gradients(int l, const float* d, const float* x) {
    weight_gradients<H, true>(d, x, own.slot == 0, others[l - 1], bias[l - 1]);
  }
  __device__ __forceinline__ void first_weight_gradients(const float* d, const float* x) {
    weight_gradients<H, false>(d, x, false, first, bias[0]);
  }
  // After step t back.
  __device__ __forceinline__ void add_tensor_inputs(int) const {}

  // ---- the same for all

  __device__ __forceinline__ Block& self() { return static_cast<Block&>(*this); }
  __device__ __forceinline__ const Block& self() const { return static_cast<const Block&>(*this); }

  __device__ __forceinline__ const SegmentStep& segment(int t) const {
    return reinterpret_cast<const SegmentStep*>(table.words + s.segment)[t];
  }
  // Coordinates in the tile.
  __device__ __forceinline__ int count() const {
    const int64_t rest = entry->numel - tile * kTile;
    return rest < kTile ? static_cast<int>(rest) : kTile;
  }
  // The steps of a chunk, [chunk][kStep].
  __device__ __forceinline__ float* steps() const { return inputs + s.steps * int64_t{Layout::kInputRows * kTile}; }
  // On the way back, the gradient of the state: h and c of layer l in rows 2 l H and (2 l + 1) H, as in a state.
  __device__ __forceinline__ float* state_gradient() const { return steps() + s.chunk * Layout::kStep; }
  // The state at the start of chunk k + 1.
  __device__ __forceinline__ float* checkpoint(int k) const {
    return state_gradient() + (k + 1) * (2 * Layout::kHalfState);
  }
  // The thread's sums in memory, kThreads apart.
  __device__ __forceinline__ double* sums() const {
    return s.sums + blockIdx.x * static_cast<int64_t>(Sums::kRow) + threadIdx.x;
  }
  __device__ __forceinline__ const float* weight_out() const {
    return reinterpret_cast<const float*>(weights + Weights::out(L));
  }
  // The lane's place among the gradients of the read-out of step t.
  __device__ __forceinline__ float* upstream(int t, int lane) const {
    return inputs + (t * Layout::kInputRows + Features) * kTile + lane;
  }

  // Features of step t to shared memory, by the threads that prepared them.
  __device__ __forceinline__ void copy_features(int t) const {
    for_each_lane<H, 2>([&](int lane) {
      const float* row = inputs + t * (Layout::kInputRows * kTile) + lane;
#pragma unroll
      for (int k = 0; k < Features; k++) features[k * kRow + lane] = row[k * kTile];
    });
  }

  // Reads the state at the start of a chunk: h to shared memory and to the chunk's first step, c to registers. Padding
  // becomes zero, whatever a state from outside holds there.
  __device__ __forceinline__ void load_state(const float* state) {
    const int last = count();
    state += own.at;
    float* kept_h = steps() + own.at + Layout::kGateFloats;
#pragma unroll
    for (int l = 0; l < L; l++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        float h[4];
        load4(state + (2 * l * H + u) * kTile, h);
        load4(state + ((2 * l + 1) * H + u) * kTile, c[l][u]);
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (own.lane + i >= last) h[i] = c[l][u][i] = 0.f;
        store4(h_rows + own.row + (l * H + u) * kRow, h);
        store4(kept_h + (l * H + u) * kTile, h);
      }
  }

  __device__ __forceinline__ void save_checkpoint(float* state) const {
    state += own.at;
#pragma unroll
    for (int l = 0; l < L; l++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        float h[4];
        load4(h_rows + own.row + (l * H + u) * kRow, h);
        store4(state + (2 * l * H + u) * kTile, h);
        store4(state + ((2 * l + 1) * H + u) * kTile, c[l][u]);
      }
  }

  // One layer of one step. from, to: rows of the old and the new h; kept: where the thread keeps the step (see kStep),
  // or null; more: whether another step follows that reads the new h from there; biases: see gate_sums.
  template <int Inputs>
  __device__ __forceinline__ void forward_layer(int l, const float4* biases, const float* x, const float* from,
                                                float* to, float* kept, bool more) {
    float a[2][4][4];
    gate_sums<H, Inputs, Layout::kUnroll>(weights + Weights::layer(l), biases, own, x + own.lane,
                                          from + l * H * kRow + own.lane, a);
#pragma unroll
    for (int u = 0; u < 2; u++) {
      const int row = (l * H + u) * kTile;
      if (kept) store4(kept + Layout::kGateFloats + Layout::kHalfState + row, c[l][u]);
      float h[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        Gates<float> gates;
        h[i] = cell_forward<DeviceMath>(a[u][0][i], a[u][1][i], a[u][2][i], a[u][3][i], c[l][u][i], gates);
        a[u][0][i] = gates.i, a[u][1][i] = gates.f, a[u][2][i] = gates.g, a[u][3][i] = gates.o;
      }
      store4(to + own.row + (l * H + u) * kRow, h);
      if (kept) {
#pragma unroll
        for (int g = 0; g < 4; g++) store4(kept + ((l * kGates + g) * H + u) * kTile, a[u][g]);
        if (more) store4(kept + Layout::kStep + Layout::kGateFloats + row, h);
      }
    }
  }

  // Steps [begin, begin + n) forward from what load_state left; keeps their activations if asked to.
  __device__ __forceinline__ void forward(int begin, int n, bool keep) {
    float *from = h_rows, *to = gate_rows;
    float* kept = keep ? steps() + own.at : nullptr;
#pragma unroll 1
    for (int t = 0; t < n; t++) {
      copy_features(begin + t);
      __syncthreads();  // features and the h of the step before
      const bool more = t + 1 < n;
      forward_layer<Features>(0, self().biases(begin + t), features, from, to, kept, more);
#pragma unroll
      for (int l = 1; l < L; l++) {
        __syncthreads();  // new h of the layer below
        forward_layer<H>(l, nullptr, to + (l - 1) * H * kRow, from, to, kept, more);
      }
      __syncthreads();  // all have read the features and the old h
      if (kept) {
        self().find_upstream(begin + t, to + (L - 1) * H * kRow);
        kept += Layout::kStep;
      }
      float* swap = from;
      from = to;
      to = swap;
    }
    if (keep) self().wait_for_upstream();
    if (from != h_rows) {  // every thread its own rows, which are also those of its gate gradients
#pragma unroll
      for (int l = 0; l < L; l++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
          float h[4];
          load4(gate_rows + own.row + (l * H + u) * kRow, h);
          store4(h_rows + own.row + (l * H + u) * kRow, h);
        }
    }
  }

  // The gradient of the state after the last step, the thread's rows of it.
  __device__ __forceinline__ void load_state_gradient(const float* from) const {
    const int last = count();
    float* to = state_gradient() + own.at;
#pragma unroll 1
    for (int l = 0; l < 2 * L; l++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        float d[4] = {};
        if (from) load4(from + own.at + (l * H + u) * kTile, d);
      // Padding must not reach d phi, whatever the upstream gradient holds there.
#pragma unroll
        for (int i = 0; i < 4; i++) d[i] = own.lane + i < last ? d[i] : 0.f;
        store4(to + (l * H + u) * kTile, d);
      }
  }

  __device__ __forceinline__ void store_state_gradient(float* to) const {
    const float* from = state_gradient() + own.at;
#pragma unroll 1
    for (int l = 0; l < 2 * L; l++)
#pragma unroll
      for (int u = 0; u < 2; u++) {
        float d[4];
        load4(from + (l * H + u) * kTile, d);
        store4(to + own.at + (l * H + u) * kTile, d);
      }
  }

  // One layer of a step, kept at `kept`.
  template <int Inputs>
  __device__ __forceinline__ void backward_layer(int l, const float* kept) {
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float h[4];
      load4(kept + Layout::kGateFloats + (l * H + u) * kTile, h);
      store4(h_rows + own.row + (l * H + u) * kRow, h);
    }
    float* const gradient = state_gradient() + own.at + 2 * l * H * kTile;
    cell_gradients<H>(kept + l * kGates * H * kTile, kept + Layout::kGateFloats + Layout::kHalfState + l * H * kTile,
                      gradient, below, gate_rows + own.row);
    __syncthreads();  // gate gradients, previous h, features
    input_gradients<H, Inputs, Inputs == H>(weights + Weights::layer(l), own, gate_rows + own.lane, gradient, below);
    const float* x = (Inputs == H ? h_rows + (l - 1) * H * kRow : features - kRow) + own.slot * kRow;
    if constexpr (Inputs == H)
      self().upper_weight_gradients(l, gate_rows + own.unit * kRow, x);
    else
      self().first_weight_gradients(gate_rows + own.unit * kRow, x);
    __syncthreads();  // all have read them
  }

  // Step t, kept at `kept`. h_rows hold the h after it, and then those before it.
  __device__ __forceinline__ void backward_step(int t, const float* kept) {
    float d[Layout::kReadOuts][4];
#pragma unroll
    for (int r = 0; r < Layout::kReadOuts; r++) load4(upstream(t, own.lane) + r * kTile, d[r]);
    copy_features(t);
    const float* out = weight_out() + 2 * own.pair;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float h[4];
      load4(h_rows + own.row + ((L - 1) * H + u) * kRow, h);
#pragma unroll
      for (int r = 0; r < Layout::kReadOuts; r++) {
        float sum = read_out[(3 * r + u) * Layout::kThreads];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          sum += d[r][i] * h[i];
          below[u][i] = r == 0 ? d[r][i] * out[u] : below[u][i] + d[r][i] * out[r * H + u];
        }
        read_out[(3 * r + u) * Layout::kThreads] = sum;
      }
    }
#pragma unroll
    for (int r = 0; r < Layout::kReadOuts; r++)
      read_out[(3 * r + 2) * Layout::kThreads] += (d[r][0] + d[r][1]) + (d[r][2] + d[r][3]);
#pragma unroll
    for (int l = L - 1; l > 0; l--) backward_layer<H>(l, kept);
    backward_layer<Features>(0, kept);
    self().add_tensor_inputs(t);
  }

  __device__ __forceinline__ void run_tile(int64_t global_tile, bool last) {
    int64_t first_tile;
    entry = &table.find(global_tile, first_tile);
    tile = global_tile - first_tile;
    const int64_t offset = tile * Layout::kState;

    const int chunks = chunks_of(s.steps, s.chunk);
    self().prepare_inputs();
#pragma unroll 1
    for (int pass = 0; pass < 2 * chunks - 1; pass++) {
      const bool keep = pass >= chunks - 1;
      const int chunk = keep ? 2 * chunks - 2 - pass : pass;
      const ChunkSteps own_steps(s.steps, s.chunk, chunk);
      const int begin = own_steps.begin, n = own_steps.end - begin;
      load_state(chunk == 0 ? global(entry->state) + offset : checkpoint(chunk - 1));
      forward(begin, n, keep);
      if (!keep) {
        save_checkpoint(checkpoint(chunk));
        continue;
      }
      if (chunk + 1 == chunks) load_state_gradient(entry->grad_end ? global(entry->grad_end) + offset : nullptr);
      const float* kept = steps() + own.at + n * Layout::kStep;
#pragma unroll 1
      for (int t = n - 1; t >= 0; t--) backward_step(begin + t, kept -= Layout::kStep);
      if (s.functional.numel > 0) self().store_grad_grad();
      if (chunk == 0 && entry->grad_start) self().store_state_gradient(global(entry->grad_start) + offset);
      unflushed += n;
      if (unflushed >= kFlushSteps || (last && chunk == 0)) self().flush();
    }
  }

  // Before the first tile.
  __device__ __forceinline__ void clear() {
    for_each_sum([&](int which, float&) { sums()[which * Layout::kThreads] = 0.; });
#pragma unroll
    for (int k = 0; k < 3 * Layout::kReadOuts; k++) {
      sums()[Sums::out(k) * Layout::kThreads] = 0.;
      read_out[k * Layout::kThreads] = 0.f;
    }
  }

  // Calls visit(which of the thread's sums, sum) for each that is in a register.
  template <class Visit>
  __device__ __forceinline__ void for_each_sum(const Visit& visit) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
#pragma unroll
      for (int i = 0; i < Layout::kInputs0; i++) visit(Sums::weight(0, g, i), first[g][i]);
#pragma unroll
      for (int l = 1; l < L; l++)
#pragma unroll
        for (int i = 0; i < Layout::kInputs; i++) visit(Sums::weight(l, g, i), others[l - 1][g][i]);
      if constexpr (!Layout::kNormalized)
#pragma unroll
        for (int l = 1; l < L; l++) visit(Sums::bias(l, g), bias[l - 1][g]);
    }
  }

  // Adds the sums of this thread to its sums in memory, and clears them; those of the read-out first over the 16 quads
  // of a pair, which are half a warp. No other thread touches these: the atomic is only an addition that does not wait
  // for memory.
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int k = 0; k < 3 * Layout::kReadOuts; k++) {
      float sum = read_out[k * Layout::kThreads];
#pragma unroll
      for (int other = 1; other < kQuads; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      atomicAdd(&sums()[Sums::out(k) * Layout::kThreads], static_cast<double>(sum));
      read_out[k * Layout::kThreads] = 0.f;
    }
    for_each_sum([&](int which, float& sum) {
      atomicAdd(&sums()[which * Layout::kThreads], static_cast<double>(sum));
      sum = 0.f;
    });
    unflushed = 0;
  }
};

// What a kernel does, for its blocks of class Block.
template <class Block, class Scalars, class Entry>
__device__ __forceinline__ void walk_tiles(const Scalars& s, const Table<Entry>& table, float* shared) {
  using Layout = typename Block::Layout;
  float* const scratch = s.scratch + blockIdx.x * Layout::scratch(s.steps, s.chunk);
  float* const inputs = scratch + Layout::kLeftOut;
  float* const rows = shared + (Layout::kWeightsInShared ? Layout::kWeights : 0);
  float4* const weights = reinterpret_cast<float4*>(Layout::kWeightsInShared ? shared : scratch);
  float* const sums = Layout::kSumsInShared ? rows + Layout::kRows : scratch + Layout::kWeights;
  pack_network<Block::kHidden, Block::kFeatures>(s.config, s.phi, weights);
  // The barrier behind these is that of the first step forward.
  for_each_lane<Block::kHidden>([&](int lane) { rows[lane] = 1.f; });
  Block block{{s, table, Owner::of_thread<Block::kHidden>(), weights, sums + threadIdx.x, rows + kRow,
               rows + (1 + Block::kFeatures) * kRow, rows + Layout::kXRows * kRow, inputs}};
  block.clear();
  for (int64_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) block.run_tile(tile, tile + gridDim.x >= s.tiles);
}

}  // namespace l2l
