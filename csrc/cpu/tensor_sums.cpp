// What networks with inputs per tensor are told of its coordinates as a whole: sums over each tensor of a list.
#include <ATen/ops/empty.h>

#include "../ops/arguments.h"
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
at::Tensor tensor_sums(at::TensorList params, at::TensorList grads, at::TensorList states, at::IntArrayRef sizes,
                       c10::string_view preprocess, at::ArrayRef<double> constants, bool maximize,
                       at::IntArrayRef ages) {
  const Config config = make_config({sizes, {preprocess.data(), preprocess.size()}, constants});
  const size_t count = params.size();
  TORCH_CHECK_VALUE(config.averages() > 0, "preprocess: expected 'normalized', got '", preprocess, "'");
  const auto as_many = [&](const char* name, size_t found) {
    TORCH_CHECK_VALUE(found == count, name, ": expected ", count, " as of params, got ", found);
  };
  as_many("grads", grads.size());
  as_many("states", states.size());
  as_many("ages", ages.size());
  for (size_t k = 0; k < count; k++) {
    const auto index = static_cast<int64_t>(k);
    check_coordinates(params[k], "params", index);
    check_coordinates(grads[k], "grads", index);
    TORCH_CHECK_VALUE(grads[k].sizes() == params[k].sizes(), "grads[", k, "]: expected shape ", params[k].sizes(),
                      ", got ", grads[k].sizes());
    check_state_of(config, states[k], params[k].numel(), index);
    TORCH_CHECK_VALUE(ages[k] >= 1, "ages: expected at least 1, got ", ages[k]);
  }
  at::Tensor out = at::empty({static_cast<int64_t>(count), kSumColumns}, at::TensorOptions().dtype(at::kDouble));
  double* const result = out.mutable_data_ptr<double>();
  const auto tile_sums = kernels().tile_sums;
  const auto decode_averages = kernels().decode_averages;
  for (size_t k = 0; k < count; k++) {
    const at::Tensor param = params[k].resolve_neg(), grad = grads[k].resolve_neg();
    const StridedView theta(param), g(grad);
    const StateType type = state_type_of(states[k], "states", static_cast<int64_t>(k));
    const char* const state = static_cast<const char*>(states[k].const_data_ptr());
    const TileLayout layout(config, type);
    // Of no steps, all averages are zero, and so is all that is made of them.
    const Correction correction = ages[k] > 1 ? make_correction(config, ages[k] - 1) : Correction{};
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
    double* const row = result + kSumColumns * k;
    for (int which = 0; which < kTensorSums; which++) {
      double sum = 0.0;
      for (const Sums& part : sums)
        for (const double lane : part.of[which]) sum += lane;
      row[which] = sum;
    }
    // r1 with the gradient in it.
    const double rate = config.rates.of[2], factor = make_correction(config, ages[k]).of[2];
    row[2] = ((1.0 - rate) * row[2] + rate * row[1]) * factor * factor;
    if (maximize) row[4] = -row[4];
    static_assert(kSumColumns == kTensorSums + 1);
    row[kTensorSums] = static_cast<double>(theta.numel());
  }
  return out;
}

}  // namespace l2l
