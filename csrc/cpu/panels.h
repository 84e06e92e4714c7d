// Matrices cut into panels of columns, each panel's rows one after the other: what isa/panels.h multiplies.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels.h"

namespace l2l {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The rows that products of so many write: the last block has the smallest power of two that holds what is left.
inline int64_t padded_rows(int64_t rows, int block) {
  const int64_t rest = rows % block;
  int64_t last = rest == 0 ? 0 : 1;
  while (last < rest) last *= 2;
  return rows - rest + last;
}

// A matrix in memory of its own kind: zero beyond its columns, which are filled up to whole vectors.
class Panels {
 public:
  // rows: those that are stored.
  Panels(const Kernels& kernels, int64_t rows, int64_t columns, float* data)
      : rows_(rows),
        columns_(round_up(columns, kernels.lanes)),
        width_(kernels.panels.width),
        lanes_(kernels.lanes),
        data_(data) {}

  int64_t rows() const { return rows_; }
  int64_t count() const { return (columns_ + width_ - 1) / width_; }
  int64_t first(int64_t panel) const { return panel * width_; }  // column
  int64_t width(int64_t panel) const { return std::min(width_, columns_ - first(panel)); }
  int vectors(int64_t panel) const { return static_cast<int>(width(panel) / lanes_); }
  float* at(int64_t panel, int64_t row = 0) const { return data_ + first(panel) * rows_ + row * width(panel); }
  int64_t floats() const { return rows_ * columns_; }

  // The numbers of row blocks as high as a panel is wide, and the rows of one that are stored.
  int64_t blocks() const { return (rows_ + width_ - 1) / width_; }
  int64_t block_rows(int64_t block) const { return std::min(width_, rows_ - first(block)); }

 private:
  int64_t rows_, columns_, width_, lanes_;
  float* data_;
};

}  // namespace l2l
