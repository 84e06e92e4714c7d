// Launches the step of step.cuh: how many blocks, which instance.
#pragma once

#include "launch.cuh"
#include "mma_stored_step.cuh"
#include "nominal_step.cuh"

namespace l2l {

// How coordinates are spread over threads. Few coordinates: one per thread, to keep all processors busy; many: as many
// per thread as its registers hold, to load each weight less often.
enum class StepMapping { automatic, narrow, wide };

// Coordinates of a thread in the wide mapping.
constexpr int wide_coordinates(int hidden) { return hidden <= 20 ? 4 : 2; }
// Tiles per multiprocessor from which the wide mapping is faster: two warps on each of four schedulers.
constexpr int kWideTiles = 16;
// The same of the kernels on tensor cores: the three blocks that a multiprocessor holds of the wide one.
constexpr int kMmaWideTiles = 6;

// A step kernel and the dynamic shared memory of its blocks.
template <int TableBytes, class Scalars>
struct StepInstance {
  void (*kernel)(StepArguments<TableBytes, Scalars>);
  size_t shared;
};

// BlockCoordinates: those that a block has at a time.
template <int BlockCoordinates, int TableBytes, class Scalars>
LaunchStatus launch_step_kernel(const StepInstance<TableBytes, Scalars>& instance, const Scalars& scalars,
                                const std::vector<int64_t>& words, cudaStream_t stream) {
  constexpr int kTilesPerBlock = BlockCoordinates / kTile;
  static_assert(kTilesPerBlock * kTile == BlockCoordinates, "blocks have whole tiles");
  int resident = 0;
  const LaunchStatus status = resident_blocks(instance.kernel, kStepThreads, instance.shared, &resident);
  if (status != cudaSuccess) return status;
  const int64_t needed = (scalars.tiles + kTilesPerBlock - 1) / kTilesPerBlock;
  const int blocks = static_cast<int>(std::min<int64_t>(needed, resident));
  StepArguments<TableBytes, Scalars> arguments;
  arguments.scalars = scalars;
  if (!scalars.table.device) fill_inline(arguments.table, words);
  return launch(instance.kernel, blocks, kStepThreads, instance.shared, stream, arguments);
}

// Replaces the automatic mapping by the one for this many tiles: the wide one from wide_tiles per multiprocessor on.
inline cudaError_t choose_mapping(int64_t tiles, int wide_tiles, StepMapping& mapping) {
  if (mapping != StepMapping::automatic) return cudaSuccess;
  int processors = 0;
  const cudaError_t error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  mapping = tiles >= static_cast<int64_t>(wide_tiles) * processors ? StepMapping::wide : StepMapping::narrow;
  return error;
}

// One launch for all entries. `words` is the table unless it is in device memory already. instance(H, C, TableBytes),
// all integral constants: the kernel for them.
template <class Scalars, class Instance>
LaunchStatus launch_step(const Scalars& scalars, const std::vector<int64_t>& words, StepMapping mapping,
                         cudaStream_t stream, const Instance& instance) {
  if (scalars.tiles == 0) return cudaSuccess;
  const cudaError_t error = choose_mapping(scalars.tiles, kWideTiles, mapping);
  if (error != cudaSuccess) return error;
  const bool large = !scalars.table.device && words.size() * 8 > kSmallTable;
  return dispatch_hidden(scalars.config.hidden, [&](auto hidden) {
    constexpr int kWide = wide_coordinates(decltype(hidden)::value);
    const std::integral_constant<int, 1> narrow;
    const std::integral_constant<int, kWide> wide;
    const std::integral_constant<int, kSmallTable> small_table;
    const std::integral_constant<int, kLargeTable> large_table;
    if (mapping == StepMapping::narrow && !large)
      return launch_step_kernel<kStepThreads>(instance(hidden, narrow, small_table), scalars, words, stream);
    return launch_step_kernel<kStepThreads * kWide>(instance(hidden, wide, large_table), scalars, words, stream);
  });
}

// A kernel on tensor cores, whose warps have 8 C coordinates. `served` becomes false, and nothing is launched, where it
// has no code for them: the device, or the oldest architecture of the build that it runs, is below 8.0.
template <int C, int TableBytes, class Scalars>
LaunchStatus launch_mma_kernel(const StepInstance<TableBytes, Scalars>& instance, const Scalars& scalars,
                               const std::vector<int64_t>& words, cudaStream_t stream, bool& served) {
  int version = 0;
  const LaunchStatus status = compiled_for(instance.kernel, &version);
  served = status == cudaSuccess && version >= 80;
  return served ? launch_step_kernel<kStepThreads / 32 * 8 * C>(instance, scalars, words, stream) : status;
}

template <int H, int C>
size_t mma_shared_bytes(int layers) {
  return static_cast<size_t>(mma_step_bytes(MmaWeights<H, kMmaFeatures>::quadruples(layers), H, C));
}

// On tensor cores, for sizes that has_mma_step names.
inline LaunchStatus launch_mma_step(const StepScalars& scalars, const std::vector<int64_t>& words, StepMapping mapping,
                                    cudaStream_t stream, bool& served) {
  if (scalars.tiles == 0) return cudaSuccess;
  const cudaError_t error = choose_mapping(scalars.tiles, kMmaWideTiles, mapping);
  if (error != cudaSuccess) return error;
  const bool large = !scalars.table.device && words.size() * 8 > kSmallTable;
  return dispatch_hidden(scalars.config.hidden, [&](auto hidden) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value;
    if constexpr (!has_mma_step(H)) {
      return cudaErrorInvalidValue;
    } else {
      const auto run = [&](auto coordinates, auto table) -> LaunchStatus {
        constexpr int C = decltype(coordinates)::value, Bytes = decltype(table)::value;
        const StepInstance<Bytes, StepScalars> instance{&mma_step_kernel<H, C, Bytes>,
                                                        mma_shared_bytes<H, C>(scalars.config.layers)};
        return launch_mma_kernel<C>(instance, scalars, words, stream, served);
      };
      const std::integral_constant<int, kSmallTable> small_table;
      const std::integral_constant<int, kLargeTable> large_table;
      if (mapping == StepMapping::narrow && !large) return run(std::integral_constant<int, 2>{}, small_table);
      return run(std::integral_constant<int, 4>{}, large_table);
    }
  });
}

// The same where states are bfloat16.
inline LaunchStatus launch_mma_stored_step(const NormalizedStepScalars& scalars, const std::vector<int64_t>& words,
                                           cudaStream_t stream, bool& served) {
  if (scalars.tiles == 0) return cudaSuccess;
  return dispatch_hidden(scalars.config.hidden, [&](auto hidden) -> LaunchStatus {
    constexpr int H = decltype(hidden)::value, C = 4;
    if constexpr (!has_mma_step(H)) {
      return cudaErrorInvalidValue;
    } else {
      const StepInstance<kLargeTable, NormalizedStepScalars> instance{&mma_stored_step_kernel<H, C>,
                                                                      mma_shared_bytes<H, C>(scalars.config.layers)};
      return launch_mma_kernel<C>(instance, scalars, words, stream, served);
    }
  });
}

// tensor_cores: whether they are to be used, where they can.
inline LaunchStatus launch_step(const StepScalars& scalars, const std::vector<int64_t>& words, StepMapping mapping,
                                cudaStream_t stream, bool tensor_cores = false) {
  if (tensor_cores && has_mma_step(scalars.config.hidden)) {
    bool served = true;
    const LaunchStatus status = launch_mma_step(scalars, words, mapping, stream, served);
    if (served || status != cudaSuccess) return status;
  }
  return launch_step(scalars, words, mapping, stream, [&](auto hidden, auto coordinates, auto table) {
    constexpr int H = decltype(hidden)::value, C = decltype(coordinates)::value, Bytes = decltype(table)::value;
    return StepInstance<Bytes, StepScalars>{&step_kernel<H, C, Bytes>,
                                            static_cast<size_t>(Packed<H>::bytes(scalars.config.layers))};
  });
}

// Networks without layers.
template <bool Stored>
LaunchStatus launch_nominal_step(const NormalizedStepScalars& scalars, const std::vector<int64_t>& words,
                                 cudaStream_t stream) {
  constexpr int C = 4;
  if (scalars.tiles == 0) return cudaSuccess;
  const auto run = [&](auto table) {
    constexpr int Bytes = decltype(table)::value;
    const StepInstance<Bytes, NormalizedStepScalars> instance{&nominal_step_kernel<C, Stored, Bytes>, 0};
    return launch_step_kernel<kStepThreads * C>(instance, scalars, words, stream);
  };
  if (!scalars.table.device && words.size() * 8 > kSmallTable) return run(std::integral_constant<int, kLargeTable>{});
  return run(std::integral_constant<int, kSmallTable>{});
}

inline LaunchStatus launch_normalized_step(const NormalizedStepScalars& scalars, const std::vector<int64_t>& words,
                                           StepMapping mapping, cudaStream_t stream) {
  if (scalars.config.layers == 0) return launch_nominal_step<false>(scalars, words, stream);
  return launch_step(scalars, words, mapping, stream, [&](auto hidden, auto coordinates, auto table) {
    constexpr int H = decltype(hidden)::value, C = decltype(coordinates)::value, Bytes = decltype(table)::value;
    return StepInstance<Bytes, NormalizedStepScalars>{
        &normalized_step_kernel<H, C, Bytes>,
        static_cast<size_t>(Packed<H, kNormalizedFeatures>::bytes(scalars.config.layers))};
  });
}

// Up to which hidden size there are kernels for states that are not float32. Larger ones need more registers or more
// shared memory than some architectures have.
constexpr int largest_stored_hidden(bool normalized) { return normalized ? 16 : 20; }

// States that are not float32: the wide mapping alone, in which one warp has all of a tile (on tensor cores half).
inline LaunchStatus launch_stored_step(const NormalizedStepScalars& scalars, StateType type,
                                       const std::vector<int64_t>& words, cudaStream_t stream,
                                       bool tensor_cores = false) {
  if (scalars.config.layers == 0) return launch_nominal_step<true>(scalars, words, stream);
  const bool plain = scalars.config.averages() == 0;
  if (tensor_cores && plain && type == StateType::bfloat16 && has_mma_step(scalars.config.hidden)) {
    bool served = true;
    const LaunchStatus status = launch_mma_stored_step(scalars, words, stream, served);
    if (served || status != cudaSuccess) return status;
  }
  if (scalars.tiles == 0) return cudaSuccess;
  return dispatch_hidden(scalars.config.hidden, [&](auto hidden) {
    constexpr int H = decltype(hidden)::value, C = wide_coordinates(H);
    const auto run = [&](auto features) -> LaunchStatus {
      constexpr int F = decltype(features)::value;
      if constexpr (H > largest_stored_hidden(F == kNormalizedFeatures)) {
        return cudaErrorInvalidValue;
      } else {
        const size_t shared = static_cast<size_t>(stored_step_bytes<H, C, F>(scalars.config.layers));
        const StepInstance<kLargeTable, NormalizedStepScalars> instance{
            type == StateType::int8 ? &stored_step_kernel<H, C, F, static_cast<int>(StateType::int8)>
                                    : &stored_step_kernel<H, C, F, static_cast<int>(StateType::bfloat16)>,
            shared};
        return launch_step_kernel<kStepThreads * C>(instance, scalars, words, stream);
      }
    };
    return scalars.config.averages() > 0 ? run(std::integral_constant<int, kNormalizedFeatures>{})
                                         : run(std::integral_constant<int, kGradientFeatures>{});
  });
}

// Fills scalars.biases, [entries][hidden][4].
template <class Entry>
LaunchStatus launch_tensor_biases(const NormalizedStepScalars& scalars, const std::vector<int64_t>& words, int entries,
                                  cudaStream_t stream) {
  StepArguments<kLargeTable, NormalizedStepScalars> arguments;
  arguments.scalars = scalars;
  if (!scalars.table.device) fill_inline(arguments.table, words);
  return launch(&tensor_bias_kernel<kLargeTable, Entry>, entries, kBiasThreads, 0, stream, arguments);
}

}  // namespace l2l
