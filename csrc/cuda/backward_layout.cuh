// What the kernels of backward_walk.cuh are given, and where they keep what: sizes of a block, places in its scratch
// and among its sums for d phi.
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

template <int Bytes, class Scalars = BackwardScalars>
struct BackwardArguments {
  Scalars scalars;
  InlineTable<Bytes> table;
};

// Whether a multiprocessor has much more than 100 kB of shared memory: 164 (8.0, 8.7) or 228 (9.0 to 11.x), not 64
// (7.5) or 100 (8.6, 8.9, 12.x).
constexpr bool has_large_shared(int arch) { return arch == 800 || arch == 870 || (arch >= 900 && arch < 1200); }
constexpr bool kLargeShared = has_large_shared(L2L_CUDA_ARCH);
static_assert(has_large_shared(1030) && has_large_shared(1100) && !has_large_shared(890) && !has_large_shared(1210));

// A segment is cut into chunks of `chunk` steps, of which the first may be shorter: all but the last are run forward
// twice.
L2L_HOST_DEVICE int chunks_of(int steps, int chunk) { return (steps + chunk - 1) / chunk; }
struct ChunkSteps {
  int begin, end;
  L2L_HOST_DEVICE ChunkSteps(int steps, int chunk, int which)
      : end(steps - (chunks_of(steps, chunk) - 1 - which) * chunk) {
    begin = end > chunk ? end - chunk : 0;
  }
};

// Sizes and places, in floats unless said otherwise. Features: rows of inputs that are made of the gradient, which say
// whether the network has averages.
template <int H, int L, int Features = kGradientFeatures>
struct BackwardLayout {
  static constexpr bool kNormalized = Features == kNormalizedFeatures;
  static constexpr int kReadOuts = Packed<H, Features>::kReadOuts;
  static constexpr int kThreads = kSlots * H;
  // Leaves a thread 168 registers (three warps on each scheduler) where these suffice and shared memory holds as many
  // blocks, else 255.
  static constexpr int kMinBlocks = kLargeShared && (L == 1 || (L == 2 && H == 20)) ? 384 / kThreads : 1;
  // Rows of inputs whose products are formed together: with averages, 168 registers have room for fewer.
  static constexpr int kUnroll = kNormalized && L > 1 && kMinBlocks > 1 ? 2 : 4;
  static constexpr int kHRows = L * H;
  static constexpr int kXRows = 1 + Features + kHRows;  // ones, features, h
  static constexpr int kWeights = Packed<H, Features>::bytes(L) / 4;
  static constexpr int kRows = (kXRows + kGates * H) * kRow;
  static constexpr int kReadOut = 3 * kReadOuts * kThreads;
  static constexpr int kTensorSums = kNormalized ? kGates * kMaxTensorInputs * H : 0;
  static constexpr int kSums = kReadOut + kTensorSums;
  // Larger networks read their weights from the block's scratch instead, through the cache; the largest with averages
  // have these sums there, too.
  static constexpr bool kSumsInShared = 4 * (kRows + kSums) <= 64 * 1024;
  static constexpr bool kWeightsInShared = 4 * (kWeights + kRows + kSums) <= 64 * 1024;
  static constexpr int kSharedBytes = 4 * (kRows + (kSumsInShared ? kSums : 0) + (kWeightsInShared ? kWeights : 0));
  static constexpr int kLeftOut = (kWeightsInShared ? 0 : kWeights) + (kSumsInShared ? 0 : kSums);  // at its beginning
  // One step in scratch: activations, h, c.
  static constexpr int64_t kGateFloats = static_cast<int64_t>(kGates) * kHRows * kTile;
  static constexpr int64_t kHalfState = static_cast<int64_t>(kHRows) * kTile;
  static constexpr int64_t kStep = kGateFloats + 2 * kHalfState;
  static constexpr int64_t kState = 2 * kHalfState + (kNormalized ? kAverages * kTile : 0);
  // What enters a step, for all steps of a segment: the features and the gradients of the read-out; before the latter
  // are known, d loss / d update and, with averages, the direction.
  static constexpr int kInputRows = Features + kReadOuts;
  // Inputs of a thread in the weight phase. Those of layer 0 have room for its bias, the weight of the row of ones.
  static constexpr int kInputs0 = (1 + Features + H + kSlots - 1) / kSlots;
  static constexpr int kInputs = 2 * H / kSlots;

  L2L_HOST_DEVICE static int64_t scratch(int steps, int chunk) {
    const int64_t chunks = chunks_of(steps, chunk);
    return kLeftOut + static_cast<int64_t>(steps) * kInputRows * kTile + chunk * kStep + (chunks + 1) * 2 * kHalfState;
  }
};

// The sums of the threads of a block: which of a thread's sums is which, and where an element of d phi is among those
// of all, [sum][thread].
template <int H, int L, int Features = kGradientFeatures>
struct BackwardSums {
  using Layout = BackwardLayout<H, L, Features>;
  L2L_HOST_DEVICE static constexpr int weight(int layer, int gate, int input) {
    return layer == 0 ? gate * Layout::kInputs0 + input
                      : 4 * Layout::kInputs0 + ((layer - 1) * 4 + gate) * Layout::kInputs + input;
  }
  // Of the layers above the first.
  L2L_HOST_DEVICE static constexpr int bias(int layer, int gate) { return weight(L, 0, 0) + 4 * (layer - 1) + gate; }
  // Of the read-out's row `row`.
  L2L_HOST_DEVICE static constexpr int out(int unit, int row = 0) { return bias(L, 0) + 3 * row + unit; }
  L2L_HOST_DEVICE static constexpr int out_bias(int row = 0) { return out(2, row); }
  // Of input slot + 8 i per tensor.
  L2L_HOST_DEVICE static constexpr int tensor(int i, int gate) { return out(0, Layout::kReadOuts) + kGates * i + gate; }
  static constexpr int kTensorInputs = Layout::kTensorSums / (kGates * Layout::kThreads);
  static constexpr int kRow = tensor(kTensorInputs, 0) * Layout::kThreads;
};

}  // namespace l2l
