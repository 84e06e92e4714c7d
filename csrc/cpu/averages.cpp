#include "averages.h"

#include <cmath>
#include <cstring>

namespace l2l {

bool all_finite(const float* x, int count) {
  uint32_t bad = 0;
  for (int i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    bad |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}

void add_tile(const float* rows, const float* activations, int count, int cells, double* sums, double* counts) {
  for (int i = 0; i < cells; i++) {
    const float *lanes = rows + i * kTile, *h = activations + i * kTile;
    double sum = 0.0;
    int counted = count;
    if (all_finite(h, count)) {
      for (int lane = 0; lane < count; lane++) sum += lanes[lane];
    } else {
      for (int lane = 0; lane < count; lane++) {
        if (std::isfinite(h[lane]))
          sum += lanes[lane];
        else
          counted--;
      }
    }
    sums[i] += sum;
    counts[i] += counted;
  }
}

void sum_cells(const Tiles& tiles, int64_t problems, const TileRows& rows, const TileRows& activations, int64_t row,
               int cells, double* sums) {
  double* counts = sums + problems * cells;
  std::fill(sums, sums + 2 * problems * cells, 0.0);
  if (cells == 0 || tiles.total() == 0) return;
  if (problems == 1) {
    std::vector<double> partial(2 * tiles.slices() * cells, 0.0);
    double* counted = partial.data() + tiles.slices() * cells;
    tiles.for_each_slice([] { return 0; },
                         [&](int64_t slice, int64_t begin, int64_t end, int) {
                           tiles.visit(begin, end, [&](const Tiles::Place& place) {
                             add_tile(rows(place, row), activations(place, row), place.count, cells,
                                      partial.data() + slice * cells, counted + slice * cells);
                           });
                         });
    return add_slices(partial, tiles.slices(), cells, sums);
  }
  const int64_t grain = std::max<int64_t>(1, 4096 * problems / std::max<int64_t>(tiles.coordinates(), 1));
  parallel_for(problems, grain, [&](int64_t first, int64_t last) {
    for (int64_t p = first; p < last; p++)
      for (size_t k = 0; k < tiles.tensors(); k++) {
        const int64_t size = tiles.numel(k) / problems;
        for (int64_t at = p * size; at < (p + 1) * size;) {
          const int64_t tile = at / kTile, end = std::min((p + 1) * size, (tile + 1) * kTile);
          const int64_t place = tile * rows.stride + row * kTile - tile * kTile;
          const float *lanes = rows.base[k] + place, *h = activations.base[k] + place;
          for (int i = 0; i < cells; i++)
            for (int64_t j = at; j < end; j++)
              if (std::isfinite(h[i * kTile + j])) {
                sums[p * cells + i] += lanes[i * kTile + j];
                counts[p * cells + i] += 1.0;
              }
          at = end;
        }
      }
  });
}

void add_slices(const std::vector<double>& partial, int64_t slices, int cells, double* sums) {
  std::fill(sums, sums + 2 * cells, 0.0);
  for (int64_t slice = 0; slice < slices; slice++)
    for (int i = 0; i < cells; i++) {
      sums[i] += partial[slice * cells + i];
      sums[cells + i] += partial[(slices + slice) * cells + i];
    }
}

bool fill_cells(const Tiles& tiles, const Tiles::Place& place, int64_t problems, const float* values, int cells,
                bool known_finite, const float* activations, float* rows) {
  bool all = true;
  if (cells == 0) return all;
  const int64_t size = tiles.numel(place.tensor) / problems;
  for (int lane = 0; lane < place.count;) {
    const int64_t at = place.tile * kTile + lane, p = at / size;
    const int end = static_cast<int>(std::min<int64_t>(place.count, lane + (p + 1) * size - at));
    for (int i = 0; i < cells; i++) {
      const float value = values[p * cells + i];
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

bool all_counted(const Tiles& tiles, int64_t problems, int cells, const double* sums) {
  const double expected = static_cast<double>(tiles.coordinates() / problems);
  const double* counts = sums + problems * cells;
  return std::all_of(counts, counts + problems * cells, [&](double count) { return count == expected; });
}

}  // namespace l2l
