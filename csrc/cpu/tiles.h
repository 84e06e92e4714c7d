// The tiles of several tensors in a row, and how work on them is spread: in a fixed number of slices of consecutive
// tiles. A slice adds up its tiles in order in float64 and slices are added in order, whichever thread ran them: sums
// are the same for any number of threads.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../core/state_io.h"
#include "packing.h"
#include "parallel.h"

namespace l2l {

constexpr int64_t kSlices = 64;

class Tiles {
 public:
  struct Place {
    size_t tensor;
    int64_t tile;  // in the tensor
    int64_t at;    // among all
    int count;     // coordinates in it
  };

  Tiles() = default;
  // Of anything with a numel.
  template <class Tensor>
  explicit Tiles(const std::vector<Tensor>& tensors) {
    for (const Tensor& tensor : tensors) add(tensor.numel);
  }
  void add(int64_t numel) {
    numels_.push_back(numel);
    ends_.push_back(total() + tiles_for(numel));
    coordinates_ += numel;
  }
  int64_t total() const { return ends_.empty() ? 0 : ends_.back(); }
  int64_t coordinates() const { return coordinates_; }
  size_t tensors() const { return numels_.size(); }
  int64_t numel(size_t tensor) const { return numels_[tensor]; }
  int64_t first(size_t tensor) const { return tensor == 0 ? 0 : ends_[tensor - 1]; }
  int64_t slices() const { return std::min(total(), kSlices); }

  template <class Visit>
  void visit(int64_t begin, int64_t end, const Visit& visit) const {
    size_t k = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
    for (int64_t at = begin; at < end; at++) {
      while (at >= ends_[k]) k++;
      const int64_t tile = at - first(k);
      visit(Place{k, tile, at, lanes_of(numels_[k], tile)});
    }
  }

  // visit(place) of all tiles, in parallel, at least `grain` by one thread.
  template <class Visit>
  void for_each(int64_t grain, const Visit& visit) const {
    parallel_for(total(), grain, [&](int64_t begin, int64_t end) { this->visit(begin, end, visit); });
  }

  // body(slice, begin, end, local) for every slice, in parallel; local() is made once by a thread for several slices.
  template <class Local, class Body>
  void for_each_slice(const Local& local, const Body& body) const {
    const int64_t tiles = total(), n = slices();
    parallel_for(n, 1, [&](int64_t begin, int64_t end) {
      auto own = local();
      for (int64_t slice = begin; slice < end; slice++) body(slice, tiles * slice / n, tiles * (slice + 1) / n, own);
    });
  }

 private:
  std::vector<int64_t> numels_, ends_;
  int64_t coordinates_ = 0;
};

// One row of 64 floats in every tile of every tensor: tile t of tensor k is at base[k] + t * stride.
struct TileRows {
  std::vector<float*> base;
  int64_t stride = 0;

  TileRows() = default;
  explicit TileRows(const Config& config) : stride(tile_floats(config)) {}
  // All tensors' states in one buffer.
  TileRows(const Tiles& tiles, float* buffer, const Config& config) : TileRows(config) {
    for (size_t k = 0; k < tiles.tensors(); k++) base.push_back(buffer + tiles.first(k) * stride);
  }

  float* operator()(const Tiles::Place& place, int64_t row = 0) const {
    return base[place.tensor] + place.tile * stride + row * kTile;
  }
};

// Uninitialised floats, aligned for the kernels.
class Floats {
 public:
  explicit Floats(int64_t size) {
    const size_t bytes = sizeof(float) * std::max<int64_t>(size, 1);
    data_.reset(static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
    if (!data_) throw std::bad_alloc();
  }
  float* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
};

// The calling thread's scratch of at least so many floats, kept for its next call: a small backward takes less time
// than new memory does. One at a time.
inline float* scratch_of_thread(int64_t size) {
  thread_local int64_t held = 0;
  thread_local std::unique_ptr<Floats> scratch;
  if (!scratch || held < size) {
    scratch.reset();
    scratch = std::make_unique<Floats>(size);
    held = size;
  }
  return scratch->data();
}

// Copies rows of 64 without what lies beyond the first `count` coordinates, which becomes zero.
inline void copy_lanes(const float* from, int64_t rows, int count, float* to) {
  for (int64_t r = 0; r < rows; r++)
    std::fill(std::copy_n(from + r * kTile, count, to + r * kTile), to + (r + 1) * kTile, 0.f);
}

// A state tile, or a copy of it in `copy` without what it holds beyond its last coordinate: that must reach nothing.
inline const float* without_padding(const float* tile, int64_t rows, int count, std::vector<float>& copy) {
  if (!tile || count == kTile) return tile;
  copy.resize(rows * kTile);
  copy_lanes(tile, rows, count, copy.data());
  return copy.data();
}

// The sums for d phi, one set per slice.
class PhiSums {
 public:
  PhiSums(const Config& config, int64_t slices)
      : config_(config), slices_(slices), size_(PackedLayout(config).floats(config)) {
    sums_.assign(size_ * slices, 0.0);
  }
  double* slice(int64_t k) { return sums_.data() + size_ * k; }
  void write(float* grad_phi) {
    for (int64_t k = 1; k < slices_; k++)
      for (size_t i = 0; i < size_; i++) sums_[i] += slice(k)[i];
    unpack_gradient(config_, sums_.data(), grad_phi);
  }

 private:
  const Config config_;
  const int64_t slices_;
  const size_t size_;
  std::vector<double> sums_;
};

}  // namespace l2l
