#include "overlap.h"

#include <algorithm>
#include <numeric>

namespace l2l {
namespace {

// Pairs of rows that are compared at most: more nesting than any layout met in practice.
constexpr int kBudget = 512;

int64_t floor_divide(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

template <class Dims>
int64_t extent(const Dims& dims, int64_t block) {
  for (const auto& dim : dims) block += (dim.size - 1) * dim.stride;
  return block;
}

}  // namespace

Region::Region(const at::Tensor& tensor, const void* data)
    : begin_(reinterpret_cast<intptr_t>(data)), block_(tensor.itemsize()) {
  if (tensor.is_non_overlapping_and_dense()) {
    extent_ = block_ = tensor.nbytes();
    return;
  }
  for (int64_t d = 0; d < tensor.dim(); d++) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) == 0)
      repeats_ = true;
    else
      dims_.push_back({tensor.stride(d) * block_, tensor.size(d)});
  }
  std::sort(dims_.begin(), dims_.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  // Dimensions that continue one another are one; those that continue the elements are a longer element.
  size_t kept = 0;
  for (const Dim& dim : dims_) {
    if (kept == 0 && dim.stride == block_)
      block_ *= dim.size;
    else if (kept > 0 && dim.stride == dims_[kept - 1].stride * dims_[kept - 1].size)
      dims_[kept - 1].size *= dim.size;
    else
      dims_[kept++] = dim;
  }
  dims_.resize(kept, Dim{});
  extent_ = extent(dims_, block_);
}

bool Region::is_simple() const {
  int64_t inner = block_;
  for (const Dim& dim : dims_) {
    if (dim.stride < inner) return false;
    inner += (dim.size - 1) * dim.stride;
  }
  return !repeats_;
}

bool Region::is_apart_from(const Region& other) const {
  int budget = kBudget;
  return are_apart(dims_, block_, other.dims_, other.block_, other.begin_ - begin_, budget);
}

bool Region::are_apart(Dims a, int64_t block_a, Dims b, int64_t block_b, int64_t distance, int& budget) {
  int64_t extent_a = extent(a, block_a), extent_b = extent(b, block_b);
  if (distance >= extent_a || -distance >= extent_b) return true;
  if ((a.empty() && b.empty()) || --budget < 0) return false;

  int64_t step = 0, outer = 0;
  for (const Dims dims : {a, b})
    for (const Dim& dim : dims) step = std::gcd(step, dim.stride), outer = std::max(outer, dim.stride);
  const int64_t place = distance - floor_divide(distance, step) * step;
  if (block_a <= place && place + block_b <= step) return true;

  // The rows along the longest stride: row j of b lies `distance + (j - i) outer` behind row i of a.
  int64_t first = 0, last = 0;
  if (!a.empty() && a.back().stride == outer) {
    first = 1 - a.back().size;
    extent_a -= (a.back().size - 1) * outer;
    a = a.slice(0, a.size() - 1);
  }
  if (!b.empty() && b.back().stride == outer) {
    last = b.back().size - 1;
    extent_b -= (b.back().size - 1) * outer;
    b = b.slice(0, b.size() - 1);
  }
  first = std::max(first, floor_divide(-extent_b - distance, outer) + 1);
  last = std::min(last, -floor_divide(distance - extent_a, outer) - 1);
  for (int64_t k = first; k <= last; k++)
    if (!are_apart(a, block_a, b, block_b, distance + k * outer, budget)) return false;
  return true;
}

}  // namespace l2l
