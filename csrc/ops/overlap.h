// Whether strided tensors share memory. Only what can be proved counts: "apart" is certain, everything else is not.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <cstdint>

namespace l2l {

// The bytes of one tensor with at least one element.
class Region {
 public:
  // `data`: the address of the tensor's first element, as its owner reads or writes it.
  Region(const at::Tensor& tensor, const void* data);
  Region(const void* data, size_t bytes) : begin_(reinterpret_cast<intptr_t>(data)), block_(bytes), extent_(bytes) {}

  intptr_t begin() const { return begin_; }
  intptr_t end() const { return begin_ + extent_; }

  // No two of its elements share memory: every stride is at least the extent of all dimensions with smaller ones.
  bool is_simple() const;

  // The two share no byte: their extents do not meet; or they lie in different places modulo the strides (columns of
  // one matrix); or that holds for every pair of rows that meet.
  bool is_apart_from(const Region& other) const;

 private:
  struct Dim {
    int64_t stride, size;  // bytes; size > 1
  };
  using Dims = c10::ArrayRef<Dim>;

  static bool are_apart(Dims a, int64_t block_a, Dims b, int64_t block_b, int64_t distance, int& budget);

  intptr_t begin_;
  int64_t block_;                  // bytes that lie side by side
  int64_t extent_;                 // from the first byte to behind the last
  c10::SmallVector<Dim, 3> dims_;  // by rising stride, without those that only repeat the same elements
  bool repeats_ = false;
};

}  // namespace l2l
