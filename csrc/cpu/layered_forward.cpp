#include "layered_forward.h"

#include <cstring>

#include "../core/cell.h"
#include "dispatch.h"

namespace l2l {

bool LayeredForward::same_averages(int layer) const {
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

LayeredForward::Layer LayeredForward::fold(int layer) const {
  const Config& config = net.network().config;
  const LayerWeights& w = net.network().layer[layer];
  const int hidden = config.hidden, inputs = config.inputs(layer), unit = PackedLayout(config).unit(layer);
  Layer result;
  if (!may_fold || problems != 1 || config.gac == 0 || !same_averages(layer)) return result;
  const int skip_x = layer > 0 ? config.gac : 0, skip_h = config.gac;
  result.skip_x = skip_x;
  result.skip_h = skip_h;
  result.weights.reserve(static_cast<size_t>(kGates) * hidden * unit);
  size_t first = 0;
  while (tiles.numel(first) == 0) first++;
  const float* before = from.base[first] + config.h_row(layer) * kTile;
  for (int k = 0; k < skip_h; k++) result.before.push_back(before[k * kTile]);
  for (int j = 0; j < hidden; j++) {
    const float* weights = w.forward + static_cast<size_t>(kGates) * j * unit;
    const size_t bias = result.weights.size();
    result.weights.insert(result.weights.end(), weights, weights + kGates);
    for (int k = 0; k < inputs + hidden; k++) {
      const float* column = weights + kGates * (1 + k);
      const bool averaged_x = k < skip_x, averaged_h = k >= inputs && k < inputs + skip_h;
      if (!averaged_x && !averaged_h) {
        result.weights.insert(result.weights.end(), column, column + kGates);
        continue;
      }
      const float mean = averaged_x ? means[(layer - 1) * config.gac + k] : before[(k - inputs) * kTile];
      for (int g = 0; g < kGates; g++) result.weights[bias + g] += column[g] * mean;
    }
  }
  return result;
}

bool LayeredForward::holds(const Layer& folded, int layer, const Tiles::Place& place) const {
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

void LayeredForward::run_tile(const Layer& folded, int layer, const Tiles::Place& place, const float* x) const {
  const Network& network = net.network();
  const Config& config = network.config;
  const float* weights = folded.weights.empty() ? network.layer[layer].forward : folded.weights.data();
  const float *h = from(place, config.h_row(layer)), *c = from(place, config.c_row(layer));
  float *new_h = to(place, config.h_row(layer)), *new_c = to(place, config.c_row(layer));
  if (layer > 0) x = to(place, config.h_row(layer - 1));
  alignas(64) float waiting[kMaxHidden * kTile];
  kernels().layer_forward({weights, nullptr, config.hidden, x + folded.skip_x * kTile,
                           config.inputs(layer) - folded.skip_x, h + folded.skip_h * kTile,
                           config.hidden - folded.skip_h, c, new_c, h == new_h ? waiting : new_h, place.count, nullptr,
                           nullptr});
  if (h == new_h) std::memcpy(new_h, waiting, sizeof(float) * kTile * config.hidden);
}

void LayeredForward::add_cells(const Tiles::Place& place, const float* h, double* partial, double* counts) const {
  for (int i = 0; i < net.network().config.gac; i++) {
    double lanes[8] = {};
    const float* row = h + i * kTile;
    int lane = 0;
    for (; lane + 8 <= place.count; lane += 8)
      for (int k = 0; k < 8; k++) lanes[k] += row[lane + k];
    for (int k = 0; lane + k < place.count; k++) lanes[k] += row[lane + k];
    for (int k = 1; k < 8; k++) lanes[0] += lanes[k];
    if (std::isfinite(lanes[0])) {  // as the sum of finite floats is
      partial[i] += lanes[0];
      counts[i] += place.count;
    } else {
      add_tile(row, row, place.count, 1, partial + i, counts + i);
    }
  }
}

}  // namespace l2l
