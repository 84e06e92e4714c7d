// What networks with inputs per tensor are told of its coordinates as a whole: sums over each tensor of a list.
#include "backend.h"
#include "dispatch.h"
#include "strided.h"
#include "tiles.h"

namespace l2l {
namespace {

// Tiles that are fetched beforehand: averages lie apart, behind each tile's cells, and go by faster than memory
// answers.
constexpr int64_t kAhead = 4;

void prefetch(const char* begin, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(begin + i, 0, 3);
}

struct Sums {
  double of[kTensorSums][kSumLanes] = {};
};

}  // namespace

// Of 64 fixed slices that are added in order: the same for any number of threads.
void cpu_tensor_sums(const SumsCall& call) {
  const Config& config = call.config;
  const auto tile_sums = kernels().tile_sums;
  const auto decode_averages = kernels().decode_averages;
  double* row = call.out;
  for (const SumsTensor& tensor : call.tensors) {
    const StridedView theta(tensor.param), g(tensor.grad);
    const StateType type = tensor.type;
    const char* const state = static_cast<const char*>(tensor.state);
    const TileLayout layout(config, type);
    const Correction correction = tensor.before(config);
    const int64_t count_of_tiles = tiles_for(theta.numel());
    Tiles tiles;
    tiles.add(theta.numel());
    std::vector<Sums> sums(tiles.slices());
    tiles.for_each_slice([] { return 0; },
                         [&](int64_t slice, int64_t begin, int64_t end, int) {
                           tiles.visit(begin, end, [&](const Tiles::Place& place) {
                             float x[kTile], y[kTile];
                             std::fill(x + place.count, x + kTile, 0.f);
                             std::fill(y + place.count, y + kTile, 0.f);
                             theta.read(place.tile * kTile, place.count, x);
                             g.read(place.tile * kTile, place.count, y);
                             const char* const tile = state + place.tile * layout.bytes;
                             if (place.tile + kAhead < count_of_tiles)
                               prefetch(tile + kAhead * layout.bytes + layout.averages, layout.bytes - layout.averages);
                             float decoded[kAverages * kTile];
                             const float* rows = reinterpret_cast<const float*>(tile + layout.averages);
                             if (type != StateType::float32) {
                               decode_averages(config, type, tile, decoded);
                               rows = decoded;
                             }
                             tile_sums(correction, x, y, rows, place.count, sums[slice].of[0]);
                           });
                         });
    for (int which = 0; which < kTensorSums; which++) {
      double sum = 0.0;
      for (const Sums& part : sums)
        for (const double lane : part.of[which]) sum += lane;
      row[which] = sum;
    }
    // r1 with the gradient in it.
    const double rate = config.rates.of[2], factor = make_correction(config, tensor.age).of[2];
    row[2] = ((1.0 - rate) * row[2] + rate * row[1]) * factor * factor;
    if (call.maximize) row[4] = -row[4];
    row[kTensorSums] = static_cast<double>(theta.numel());
    row += kTensorSums + 1;
  }
}

}  // namespace l2l
