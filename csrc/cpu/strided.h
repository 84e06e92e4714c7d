// Walks a tensor of any strides and of dtype float32, bfloat16 or float16 in row-major order, 64 coordinates at a time.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/SmallVector.h>

#include "../core/state_io.h"

namespace l2l {

constexpr int kMaxDims = 64;  // as in TensorIterator; counted after merging

// The strides of a tensor with adjacent dimensions merged where one stride spans both.
class StridedView {
 public:
  explicit StridedView(const at::Tensor& tensor);

  int64_t numel() const { return numel_; }

  // Coordinates [begin, begin + count) as float32. count <= kTile.
  void read(int64_t begin, int count, float* out) const;

  // The same coordinates from float32, rounded to the dtype. Only for tensors that may be written.
  void write(int64_t begin, int count, const float* values) const;

  // coordinate = coordinate * decay + lr * update, rounded once to the dtype. Only for tensors that may be written.
  void update(int64_t begin, int count, float decay, float lr, const float* update) const;

 private:
  // Calls visit(i, pointer) for each of the coordinates.
  template <class T, class Visit>
  void walk(int64_t begin, int count, const Visit& visit) const;

  void* data_;
  at::ScalarType dtype_;
  int64_t numel_;
  c10::SmallVector<int64_t, 5> sizes_, strides_;  // innermost first
};

template <class T, class Visit>
void StridedView::walk(int64_t begin, int count, const Visit& visit) const {
  T* base = static_cast<T*>(data_);
  if (sizes_.size() == 1) {
    const int64_t stride = strides_[0];
    T* at = base + begin * stride;
    if (stride == 1)  // apart, so that the compiler makes vectors of it
      for (int i = 0; i < count; i++) visit(i, at + i);
    else
      for (int i = 0; i < count; i++, at += stride) visit(i, at);
    return;
  }
  int64_t index[kMaxDims];
  int64_t rest = begin, offset = 0;
  for (size_t d = 0; d < sizes_.size(); d++) {
    index[d] = rest % sizes_[d];
    rest /= sizes_[d];
    offset += index[d] * strides_[d];
  }
  for (int i = 0; i < count; i++) {
    visit(i, base + offset);
    for (size_t d = 0; d < sizes_.size(); d++) {
      offset += strides_[d];
      if (++index[d] < sizes_[d]) break;
      offset -= sizes_[d] * strides_[d];
      index[d] = 0;
    }
  }
}

inline StridedView::StridedView(const at::Tensor& tensor)
    // const_data_ptr: a gradient may be a lazily cloned view; parameters were made writable by their caller.
    : data_(const_cast<void*>(tensor.const_data_ptr())), dtype_(tensor.scalar_type()), numel_(tensor.numel()) {
  for (int64_t d = tensor.dim() - 1; d >= 0; d--) {
    const int64_t size = tensor.size(d), stride = tensor.stride(d);
    if (size == 1) continue;
    if (!sizes_.empty() && stride == sizes_.back() * strides_.back()) {
      sizes_.back() *= size;
    } else {
      sizes_.push_back(size);
      strides_.push_back(stride);
    }
  }
  TORCH_CHECK_VALUE(sizes_.size() <= kMaxDims, "expected a tensor of at most ", kMaxDims, " dimensions, got ",
                    sizes_.size());
  if (sizes_.empty()) {
    sizes_.push_back(1);
    strides_.push_back(1);
  }
}

inline void StridedView::read(int64_t begin, int count, float* out) const {
  switch (dtype_) {
    case at::kFloat:
      return walk<float>(begin, count, [&](int i, const float* x) { out[i] = *x; });
    case at::kBFloat16:
      return walk<c10::BFloat16>(begin, count, [&](int i, const c10::BFloat16* x) { out[i] = *x; });
    default:
      return walk<c10::Half>(begin, count, [&](int i, const c10::Half* x) { out[i] = *x; });
  }
}

inline void StridedView::write(int64_t begin, int count, const float* values) const {
  const auto assign = [&](int i, auto* x) { *x = values[i]; };
  switch (dtype_) {
    case at::kFloat:
      return walk<float>(begin, count, assign);
    case at::kBFloat16:
      return walk<c10::BFloat16>(begin, count, assign);
    default:
      return walk<c10::Half>(begin, count, assign);
  }
}

inline void StridedView::update(int64_t begin, int count, float decay, float lr, const float* u) const {
  const auto apply = [&](int i, auto* x) { *x = static_cast<float>(*x) * decay + lr * u[i]; };
  switch (dtype_) {
    case at::kFloat:
      return walk<float>(begin, count, apply);
    case at::kBFloat16:
      return walk<c10::BFloat16>(begin, count, apply);
    default:
      return walk<c10::Half>(begin, count, apply);
  }
}

}  // namespace l2l
