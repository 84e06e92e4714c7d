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

#include "../core/adjoint.h"
#include "backward_phases.cuh"
#include "table.cuh"

namespace l2l {

constexpr int kFlushSteps = 64;  // steps of a tile that are summed in float32

struct BackwardEntry {
  int64_t end_tile;       // tiles of this and all previous entries
  int64_t numel;          // what lies beyond in states and records reaches nothing
  int64_t record_tile;    // where its tiles start in a record
  const float* state;     // before the first step; this and the next two 16-byte aligned
  const float* grad_end;  // d loss / d state after the last step, or null for zero
  float* grad_start;      // receives d loss / d state before the first step, or null
};

// The functional step's backward: one entry, one step, its upstream gradient given. See gather.cuh.
struct FunctionalStep {
  int64_t numel;             // 0: a segment
  const float* grad_update;  // [numel]
  View grad_grad;            // dense
};

struct BackwardScalars {
  Config config;
  Features features;
  const float* phi;
  int64_t tiles;    // of all entries
  int32_t steps;    // T
  int32_t chunk;    // steps whose activations fit into a block's scratch
  int32_t segment;  // where in the table the T + 1 SegmentSteps are, in words
  FunctionalStep functional;
  float* scratch;  // backward_scratch_floats() per block, 16-byte aligned
  double* sums;    // [blocks][BackwardSums::kRow]
  TableRef table;
};

template <int Bytes>
struct BackwardArguments {
  BackwardScalars scalars;
  InlineTable<Bytes> table;
};

// Whether a multiprocessor has much more than 100 kB of shared memory: 164 (8.0, 8.7) or 228 (9.0 to 11.x), not 64
// (7.5) or 100 (8.6, 8.9, 12.x).
constexpr bool has_large_shared(int arch) { return arch == 800 || arch == 870 || (arch >= 900 && arch < 1200); }
constexpr bool kLargeShared = has_large_shared(L2L_CUDA_ARCH);
static_assert(has_large_shared(1030) && has_large_shared(1100) && !has_large_shared(890) && !has_large_shared(1210));

// Sizes and places, in floats unless said otherwise.
template <int H, int L>
struct BackwardLayout {
  static constexpr int kThreads = kSlots * H;
  // Leaves a thread 168 registers (three warps on each scheduler) where these suffice and shared memory holds as many
  // blocks, else 255.
  static constexpr int kMinBlocks = kLargeShared && (L == 1 || (L == 2 && H == 20)) ? 384 / kThreads : 1;
  static constexpr int kHRows = L * H;
  static constexpr int kXRows = 1 + kGradientFeatures + kHRows;  // ones, features, h
  static constexpr int kWeights = Packed<H>::bytes(L) / 4;
  static constexpr int kRows = (kXRows + kGates * H) * kRow;
  static constexpr int kReadOut = 3 * kThreads;
  // Larger networks read their weights from the block's scratch instead, through the cache.
  static constexpr bool kWeightsInShared = 4 * (kWeights + kRows + kReadOut) <= 64 * 1024;
  static constexpr int kSharedBytes = 4 * (kRows + kReadOut + (kWeightsInShared ? kWeights : 0));
  // One step in scratch: activations, h, c.
  static constexpr int64_t kGateFloats = static_cast<int64_t>(kGates) * kHRows * kTile;
  static constexpr int64_t kHalfState = static_cast<int64_t>(kHRows) * kTile;
  static constexpr int64_t kStep = kGateFloats + 2 * kHalfState;
  // What enters a step, for all steps of a segment: the features and d loss / d update.
  static constexpr int kInputRows = kGradientFeatures + 1;
  // Inputs of a thread in the weight phase. Those of layer 0 have room for its bias, the weight of the row of ones.
  static constexpr int kInputs0 = (1 + kGradientFeatures + H + kSlots - 1) / kSlots;
  static constexpr int kInputs = 2 * H / kSlots;

  L2L_HOST_DEVICE static int64_t scratch(int steps, int chunk) {
    const int64_t chunks = (steps + chunk - 1) / chunk;
    return (kWeightsInShared ? 0 : kWeights) + static_cast<int64_t>(steps) * kInputRows * kTile + chunk * kStep +
           (chunks + 1) * 2 * kHalfState;
  }
};

// The sums of the threads of a block: which of a thread's sums is which, and where an element of d phi is among those
// of all, [sum][thread].
template <int H, int L>
struct BackwardSums {
  using Layout = BackwardLayout<H, L>;
  L2L_HOST_DEVICE static constexpr int weight(int layer, int gate, int input) {
    return layer == 0 ? gate * Layout::kInputs0 + input
                      : 4 * Layout::kInputs0 + ((layer - 1) * 4 + gate) * Layout::kInputs + input;
  }
  // Of the layers above the first.
  L2L_HOST_DEVICE static constexpr int bias(int layer, int gate) { return weight(L, 0, 0) + 4 * (layer - 1) + gate; }
  L2L_HOST_DEVICE static constexpr int out(int unit) { return bias(L, 0) + unit; }
  L2L_HOST_DEVICE static constexpr int out_bias() { return out(2); }
  static constexpr int kRow = (bias(L, 0) + 3) * Layout::kThreads;
};

template <int H, int L>
struct BackwardBlock {
  using Layout = BackwardLayout<H, L>;

  const BackwardScalars& s;
  const Table<BackwardEntry>& table;
  const Owner own;
  const float4* weights;
  float* read_out;  // shared: three sums of the thread, kThreads apart: d weight_out of its units, d bias_out
  float *features, *h_rows, *gate_rows;  // shared: [2], [L * H], [4 H] rows; a row of ones before the features
  float* inputs;                         // scratch: [steps][kInputRows][64]; then the steps of a chunk, then states

  // d phi of this thread, in units of the packed weights.
  float first[4][Layout::kInputs0] = {};
  float others[L > 1 ? L - 1 : 1][4][Layout::kInputs] = {};
  float bias[L > 1 ? L - 1 : 1][4] = {};
  int unflushed = 0;  // steps since they were last added to those in memory

  // Of the current tile.
  int64_t tile = 0;  // in its tensor
  const BackwardEntry* entry = nullptr;
  float c[L][2][4] = {};   // the cells of the thread's units, on the way forward
  float below[2][4] = {};  // what the layer above adds to the gradient of their h, on the way back

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
    return s.sums + blockIdx.x * static_cast<int64_t>(BackwardSums<H, L>::kRow) + threadIdx.x;
  }
  // Fills `inputs` for the tile, one coordinate per thread, on the walk back of adjoint.h.
  __device__ __forceinline__ void prepare_inputs() const {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= kTile) return;
    const int64_t at = (entry->record_tile + tile) * kTile + lane;
    const bool padding = lane >= count();
    float adjoint = 0.f;
#pragma unroll 1
    for (int t = s.steps; t >= 0; t--) {
      const SegmentStep& step = segment(t);
      const float g = step.record && !padding ? global(step.record)[at] : 0.f;
      const float du = walk_back(step, g, adjoint);
      if (t < s.steps) {
        float* row = inputs + t * (Layout::kInputRows * kTile) + lane;
        float x[kGradientFeatures];
        features_of<DeviceMath>(s.features, g, x);
#pragma unroll
        for (int k = 0; k < kGradientFeatures; k++) row[k * kTile] = x[k];
        row[kGradientFeatures * kTile] = s.functional.numel == 0 ? du : padding ? 0.f : s.functional.grad_update[at];
      }
    }
  }

  // Features of step t to shared memory, by the threads that prepared them.
  __device__ __forceinline__ void copy_features(int t) const {
    if (threadIdx.x >= kTile) return;
    const float* row = inputs + t * (Layout::kInputRows * kTile) + threadIdx.x;
    features[threadIdx.x] = row[0];
    features[kRow + threadIdx.x] = row[kTile];
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
  // or null; more: whether another step follows that reads the new h from there.
  template <int Inputs>
  __device__ __forceinline__ void forward_layer(int l, const float* x, const float* from, float* to, float* kept,
                                                bool more) {
    float a[2][4][4];
    gate_sums<H, Inputs>(weights + Packed<H>::layer(l), own, x + own.lane, from + l * H * kRow + own.lane, a);
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
      forward_layer<kGradientFeatures>(0, features, from, to, kept, more);
#pragma unroll
      for (int l = 1; l < L; l++) {
        __syncthreads();  // new h of the layer below
        forward_layer<H>(l, to + (l - 1) * H * kRow, from, to, kept, more);
      }
      __syncthreads();  // all have read the features and the old h
      if (kept) kept += Layout::kStep;
      float* swap = from;
      from = to;
      to = swap;
    }
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

  // d gradient of the functional step, whose gate gradients of layer 0 are the last in shared memory; one coordinate
  // per thread.
  __device__ __forceinline__ void store_grad_grad() const {
    const int lane = static_cast<int>(threadIdx.x);
    if (lane >= count() || lane >= kTile) return;
    float d[kGradientFeatures] = {};
    for (int j = 0; j < H; j++)
      for (int k = 0; k < kGradientFeatures; k++) {
        const float4 w = weights[j * Packed<H>::unit(0) + 1 + k];
        d[k] += w.x * gate_rows[j * kRow + lane] + w.y * gate_rows[(H + j) * kRow + lane] +
                w.z * gate_rows[(2 * H + j) * kRow + lane] + w.w * gate_rows[(3 * H + j) * kRow + lane];
      }
    const int64_t at = tile * kTile + lane;
    write_dense(s.functional.grad_grad, at, features_backward<DeviceMath>(s.features, segment(0).record[at], d));
  }

  // One layer of a step, kept at `kept`.
  template <int Inputs>
  __device__ __forceinline__ void backward_layer(int l, const float* kept,
                                                 float (&sums)[4][Inputs == H ? Layout::kInputs : Layout::kInputs0]) {
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
    input_gradients<H, Inputs, Inputs == H>(weights + Packed<H>::layer(l), own, gate_rows + own.lane, gradient, below);
    const float* x = Inputs == H ? h_rows + (l - 1) * H * kRow : features - kRow;
    weight_gradients<H, Inputs == H>(gate_rows + own.unit * kRow, x + own.slot * kRow, own.slot == 0, sums,
                                     bias[l > 0 ? l - 1 : 0]);
    __syncthreads();  // all have read them
  }

  // Step t, kept at `kept`. h_rows hold the h after it, and then those before it.
  __device__ __forceinline__ void backward_step(int t, const float* kept) {
    float du[4];
    load4(inputs + (t * Layout::kInputRows + kGradientFeatures) * kTile + own.lane, du);
    copy_features(t);
    const float* weight_out = reinterpret_cast<const float*>(weights + Packed<H>::out(L)) + 2 * own.pair;
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float h[4], sum = read_out[u * Layout::kThreads];
      load4(h_rows + own.row + ((L - 1) * H + u) * kRow, h);
#pragma unroll
      for (int i = 0; i < 4; i++) {
        sum += du[i] * h[i];
        below[u][i] = du[i] * weight_out[u];
      }
      read_out[u * Layout::kThreads] = sum;
    }
    read_out[2 * Layout::kThreads] += (du[0] + du[1]) + (du[2] + du[3]);
#pragma unroll
    for (int l = L - 1; l > 0; l--) backward_layer<H>(l, kept, others[l > 0 ? l - 1 : 0]);
    backward_layer<kGradientFeatures>(0, kept, first);
  }

  __device__ __forceinline__ void run_tile(int64_t global_tile, bool last) {
    int64_t first_tile;
    entry = &table.find(global_tile, first_tile);
    tile = global_tile - first_tile;
    const int64_t offset = tile * (2 * Layout::kHalfState);

    const int chunks = (s.steps + s.chunk - 1) / s.chunk;
    prepare_inputs();
#pragma unroll 1
    for (int pass = 0; pass < 2 * chunks - 1; pass++) {
      const bool keep = pass >= chunks - 1;
      const int chunk = keep ? 2 * chunks - 2 - pass : pass;
      const int begin = chunk * s.chunk;
      const int n = min(s.chunk, s.steps - begin);
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
      if (s.functional.numel > 0) store_grad_grad();
      if (chunk == 0 && entry->grad_start) store_state_gradient(global(entry->grad_start) + offset);
      unflushed += n;
      if (unflushed >= kFlushSteps || (last && chunk == 0)) flush();
    }
  }

  // Calls visit(which of the thread's sums, sum) for each that is in a register.
  template <class Visit>
  __device__ __forceinline__ void for_each_sum(const Visit& visit) {
#pragma unroll
    for (int g = 0; g < 4; g++) {
#pragma unroll
      for (int i = 0; i < Layout::kInputs0; i++) visit(BackwardSums<H, L>::weight(0, g, i), first[g][i]);
#pragma unroll
      for (int l = 1; l < L; l++)
#pragma unroll
        for (int i = 0; i < Layout::kInputs; i++) visit(BackwardSums<H, L>::weight(l, g, i), others[l - 1][g][i]);
#pragma unroll
      for (int l = 1; l < L; l++) visit(BackwardSums<H, L>::bias(l, g), bias[l - 1][g]);
    }
  }

  // Adds the sums of this thread to its sums in memory, and clears them; those of the read-out first over the 16 quads
  // of a pair, which are half a warp. No other thread touches these: the atomic is only an addition that does not wait
  // for memory.
  __device__ __forceinline__ void flush() {
#pragma unroll
    for (int k = 0; k < 3; k++) {
      float sum = read_out[k * Layout::kThreads];
#pragma unroll
      for (int other = 1; other < kQuads; other *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      atomicAdd(&sums()[BackwardSums<H, L>::out(k) * Layout::kThreads], static_cast<double>(sum));
      read_out[k * Layout::kThreads] = 0.f;
    }
    for_each_sum([&](int which, float& sum) {
      atomicAdd(&sums()[which * Layout::kThreads], static_cast<double>(sum));
      sum = 0.f;
    });
    unflushed = 0;
  }
};

template <int H, int L, int TableBytes>
__global__ void __launch_bounds__(BackwardLayout<H, L>::kThreads, BackwardLayout<H, L>::kMinBlocks)
    backward_kernel(const __grid_constant__ BackwardArguments<TableBytes> arguments) {
  using Layout = BackwardLayout<H, L>;
  L2L_DYNAMIC_SHARED(float, shared);
  const BackwardScalars& s = arguments.scalars;
  const Table<BackwardEntry> table(s.table, arguments.table.words);
  float* const scratch = s.scratch + blockIdx.x * Layout::scratch(s.steps, s.chunk);
  float* const inputs = scratch + (Layout::kWeightsInShared ? 0 : Layout::kWeights);
  float* const rows = shared + (Layout::kWeightsInShared ? Layout::kWeights : 0);
  float4* const weights = reinterpret_cast<float4*>(Layout::kWeightsInShared ? shared : scratch);
  pack_network<H>(s.config, s.phi, weights);
  // The barrier behind these is that of the first step forward.
  if (threadIdx.x < kTile) rows[threadIdx.x] = 1.f;
  BackwardBlock<H, L> block{s,
                            table,
                            Owner::of_thread<H>(),
                            weights,
                            rows + Layout::kRows + threadIdx.x,
                            rows + kRow,
                            rows + (1 + kGradientFeatures) * kRow,
                            rows + Layout::kXRows * kRow,
                            inputs};
  block.for_each_sum([&](int which, float&) { block.sums()[which * Layout::kThreads] = 0.; });
#pragma unroll
  for (int k = 0; k < 3; k++) {
    block.sums()[BackwardSums<H, L>::out(k) * Layout::kThreads] = 0.;
    block.read_out[k * Layout::kThreads] = 0.f;
  }
  for (int64_t tile = blockIdx.x; tile < s.tiles; tile += gridDim.x) block.run_tile(tile, tile + gridDim.x >= s.tiles);
}

}  // namespace l2l
