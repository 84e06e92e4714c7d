#include "gac.h"

#include <cstring>

#include "../core/cell.h"
#include "dispatch.h"

namespace l2l {

TileRows tile_rows(const Tiles& tiles, float* buffer, int64_t rows) {
  TileRows result;
  result.stride = rows * kTile;
  for (size_t k = 0; k < tiles.tensors(); k++) result.base.push_back(buffer + tiles.first(k) * result.stride);
  return result;
}

bool all_finite(const float* x, int count) {
  uint32_t bad = 0;
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

void sum_cells(const Tiles& tiles, int64_t groups, const TileRows& rows, const TileRows& activations, int64_t row,
               int cells, double* sums) {
  double* counts = sums + groups * cells;
  std::fill(sums, sums + 2 * groups * cells, 0.0);
  if (cells == 0 || tiles.total() == 0) return;
  if (groups == 1) {
    std::vector<double> partial(2 * kGacSlices * cells, 0.0);
    double* counted = partial.data() + kGacSlices * cells;
    tiles.slices([&](int64_t slice, int64_t begin, int64_t end) {
      tiles.visit(begin, end, [&](const Tiles::Place& place) {
        for (int i = 0; i < cells; i++) {
          const float *lanes = rows(place, row + i), *h = activations(place, row + i);
          double sum = 0.0;
          int count = place.count;
          if (all_finite(h, count)) {
            for (int lane = 0; lane < place.count; lane++) sum += lanes[lane];
          } else {
            for (int lane = 0; lane < place.count; lane++) {
              if (std::isfinite(h[lane]))
                sum += lanes[lane];
              else
                count--;
            }
          }
          partial[slice * cells + i] += sum;
          counted[slice * cells + i] += count;
        }
      });
    });
    for (int64_t slice = 0; slice < kGacSlices; slice++)
      for (int i = 0; i < cells; i++) {
        sums[i] += partial[slice * cells + i];
        counts[i] += counted[slice * cells + i];
      }
    return;
  }
  const int64_t grain = std::max<int64_t>(1, 4096 * groups / std::max<int64_t>(tiles.coordinates(), 1));
  parallel_for(groups, grain, [&](int64_t first, int64_t last) {
    for (int64_t g = first; g < last; g++)
      for (size_t k = 0; k < tiles.tensors(); k++) {
        const int64_t size = tiles.numel(k) / groups;
        for (int64_t at = g * size; at < (g + 1) * size;) {
          const int64_t tile = at / kTile, end = std::min((g + 1) * size, (tile + 1) * kTile);
          const int64_t place = tile * rows.stride + row * kTile - tile * kTile;
          const float *lanes = rows.base[k] + place, *h = activations.base[k] + place;
          for (int i = 0; i < cells; i++)
            for (int64_t j = at; j < end; j++)
              if (std::isfinite(h[i * kTile + j])) {
                sums[g * cells + i] += lanes[i * kTile + j];
                counts[g * cells + i] += 1.0;
              }
          at = end;
        }
      }
  });
}

bool fill_cells(const Tiles& tiles, const Tiles::Place& place, int64_t groups, const float* values, int cells,
                bool known_finite, const float* activations, float* rows) {
  bool all = true;
  if (cells == 0) return all;
  const int64_t size = tiles.numel(place.tensor) / groups;
  for (int lane = 0; lane < place.count;) {
    const int64_t at = place.tile * kTile + lane, g = at / size;
    const int end = static_cast<int>(std::min<int64_t>(place.count, lane + (g + 1) * size - at));
    for (int i = 0; i < cells; i++) {
      const float value = values[g * cells + i];
      const int first = i * kTile + lane, last = i * kTile + end;
      if (known_finite || all_finite(activations + first, last - first)) {
        std::fill(rows + first, rows + last, value);
        continue;
      }
      all = false;
      for (int j = first; j < last; j++)
        if (std::isfinite(activations[j])) rows[j] = value;
    }
    lane = end;
  }
  return all;
}

void average_cells(const double* sums, int64_t n, float* values) {
  for (int64_t i = 0; i < n; i++) values[i] = static_cast<float>(sums[i] / std::max(sums[n + i], 1.0));
}

bool all_counted(const Tiles& tiles, int64_t groups, int cells, const double* sums) {
  const double expected = static_cast<double>(tiles.coordinates() / groups);
  const double* counts = sums + groups * cells;
  return std::all_of(counts, counts + groups * cells, [&](double count) { return count == expected; });
}

bool GacForward::same_averages(int layer) const {
  const Config& config = net.network().config;
  const float* known = nullptr;
  for (size_t k = 0; k < tiles.tensors(); k++) {
    if (tiles.numel(k) == 0) continue;
    const float* rows = from.base[k] + config.h_row(layer) * kTile;
    for (int i = 0; known && i < config.gac; i++)
      if (std::memcmp(known + i * kTile, rows + i * kTile, sizeof(float)) != 0) return false;
    known = rows;
  }
  return known != nullptr;
}

GacForward::Layer GacForward::fold(int layer) const {
  const Config& config = net.network().config;
  const LayerWeights& w = net.network().layer[layer];
  const int hidden = config.hidden, inputs = config.inputs(layer), columns = inputs + hidden;
  Layer result;
  if (!may_fold || groups != 1 || config.gac == 0 || !same_averages(layer)) return result;
  const int skip_x = layer > 0 ? config.gac : 0, skip_h = config.gac;
  result.skip_x = skip_x;
  result.skip_h = skip_h;
  result.bias.assign(w.bias, w.bias + kGates * hidden);
  result.weights.reserve(static_cast<size_t>(kGates) * hidden * columns);
  size_t first = 0;
  while (tiles.numel(first) == 0) first++;
  const float* before = from.base[first] + config.h_row(layer) * kTile;
  for (int k = 0; k < skip_h; k++) result.before.push_back(before[k * kTile]);
  for (int j = 0; j < hidden; j++) {
    const float* unit = w.forward + static_cast<size_t>(kGates) * j * columns;
    for (int k = 0; k < columns; k++) {
      const float* column = unit + kGates * k;
      const bool averaged_x = k < skip_x, averaged_h = k >= inputs && k < inputs + skip_h;
      if (!averaged_x && !averaged_h) {
        result.weights.insert(result.weights.end(), column, column + kGates);
        continue;
      }
      const float mean = averaged_x ? means[(layer - 1) * config.gac + k] : before[(k - inputs) * kTile];
      for (int g = 0; g < kGates; g++) result.bias[kGates * j + g] += column[g] * mean;
    }
  }
  return result;
}

bool GacForward::holds(const Layer& folded, int layer, const Tiles::Place& place) const {
  const float* rows = from(place, net.network().config.h_row(layer));
  uint32_t other = 0;
  for (size_t k = 0; k < folded.before.size(); k++) {
    uint32_t expected, bits;
    std::memcpy(&expected, &folded.before[k], sizeof(bits));
    for (int lane = 0; lane < place.count; lane++) {
      std::memcpy(&bits, rows + k * kTile + lane, sizeof(bits));
      other |= bits ^ expected;
    }
  }
  return other == 0;
}

void GacForward::run_tile(const Layer& folded, int layer, const Tiles::Place& place, const float* x) const {
  const Network& network = net.network();
  const Config& config = network.config;
  const bool is_folded = !folded.bias.empty();
  const float *h = from(place, config.h_row(layer)), *c = from(place, config.c_row(layer));
  float *new_h = to(place, config.h_row(layer)), *new_c = to(place, config.c_row(layer));
  if (layer > 0) x = to(place, config.h_row(layer - 1));
  alignas(64) float waiting[kMaxHidden * kTile];
  kernels().layer_forward({is_folded ? folded.weights.data() : network.layer[layer].forward,
                           is_folded ? folded.bias.data() : network.layer[layer].bias, config.hidden,
                           x + folded.skip_x * kTile, config.inputs(layer) - folded.skip_x, h + folded.skip_h * kTile,
                           config.hidden - folded.skip_h, c, new_c, h == new_h ? waiting : new_h});
  if (h == new_h) std::memcpy(new_h, waiting, sizeof(float) * kTile * config.hidden);
}

}  // namespace l2l
