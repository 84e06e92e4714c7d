// The tensors of a launch, as the kernels see them: a table of entries, one per tensor, followed by the sizes and
// strides of those that are not dense. It travels as a kernel argument if it fits, else in device memory (see
// upload_table).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../core/state_io.h"
#include "compat.cuh"

namespace l2l {

enum class Dtype : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// A tensor in logical (row-major) order. shape < 0: dense. Otherwise words[shape] is the number of dimensions, followed
// by size, stride and, as the bits of a float64, 1 / size of each, the innermost first.
struct View {
  void* data;
  Dtype dtype;
  int32_t shape;
};

// A launch's kernel arguments may take 4 KB, from CUDA 12.1 on nearly 32 KB; the rest of the arguments needs a little.
constexpr int kSmallTable = 4096 - 256;
#if !defined(CUDART_VERSION) || CUDART_VERSION >= 12010
constexpr int kLargeTable = 32764 - 260;
#else
constexpr int kLargeTable = kSmallTable;
#endif

template <int Bytes>
struct InlineTable {
  static_assert(Bytes % 8 == 0, "whole words");
  int64_t words[Bytes / 8];
};

// Where a kernel finds its table: in its arguments or in device memory.
struct TableRef {
  const int64_t* device = nullptr;  // null: inline
  int32_t entries = 0;
  int32_t shapes = 0;  // first word of the sizes and strides
};

// ---- host

template <class Entry>
class TableBuilder {
  static_assert(sizeof(Entry) % 8 == 0 && alignof(Entry) == 8, "entries are made of words");

 public:
  void reserve(size_t n) { entries_.reserve(n); }
  void add(const Entry& entry) { entries_.push_back(entry); }
  const std::vector<Entry>& entries() const { return entries_; }

  // A view of a tensor with these sizes and strides (in elements, outermost first).
  View view(void* data, Dtype dtype, const int64_t* sizes, const int64_t* strides, int64_t dims) {
    std::vector<int64_t> merged;  // size, stride; the innermost first
    for (int64_t d = dims - 1; d >= 0; d--) {
      if (sizes[d] == 1) continue;
      if (!merged.empty() && strides[d] == merged.end()[-2] * merged.end()[-1]) {
        merged.end()[-2] *= sizes[d];
      } else {
        merged.push_back(sizes[d]);
        merged.push_back(strides[d]);
      }
    }
    if (merged.empty() || (merged.size() == 2 && merged[1] == 1)) return {data, dtype, -1};
    const View result{data, dtype, static_cast<int32_t>(shapes_.size())};
    shapes_.push_back(static_cast<int64_t>(merged.size() / 2));
    for (size_t d = 0; d < merged.size(); d += 2) {
      const double inverse = 1.0 / static_cast<double>(merged[d]);
      int64_t bits;
      std::memcpy(&bits, &inverse, sizeof bits);
      shapes_.insert(shapes_.end(), {merged[d], merged[d + 1], bits});
    }
    return result;
  }

  // Appends words of any other kind; returns which of the table's words is the first, valid once all entries and views
  // are in.
  size_t append(const int64_t* words, size_t count) {
    const size_t at = entry_words() + shapes_.size();
    shapes_.insert(shapes_.end(), words, words + count);
    return at;
  }

  // The table as words, and where its parts are.
  std::vector<int64_t> words() const {
    std::vector<int64_t> out(entry_words() + shapes_.size());
    if (!entries_.empty()) std::memcpy(out.data(), entries_.data(), entries_.size() * sizeof(Entry));
    std::copy(shapes_.begin(), shapes_.end(), out.begin() + entry_words());
    return out;
  }
  TableRef ref() const { return {nullptr, static_cast<int32_t>(entries_.size()), static_cast<int32_t>(entry_words())}; }

 private:
  size_t entry_words() const { return entries_.size() * (sizeof(Entry) / 8); }

  std::vector<Entry> entries_;
  std::vector<int64_t> shapes_;
};

// ---- device

// Tells the compiler that an address read from memory is one of global memory.
template <class T>
__device__ __forceinline__ T* global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// Row-major index to element. The quotient by way of float64, off by one at most (indices are below 2^52): a division
// of 64-bit integers would be a call.
__device__ __forceinline__ int64_t walk_shape(const int64_t* shape, int64_t index) {
  const int64_t* const end = shape + 1 + 3 * shape[0];
  int64_t at = 0;
#pragma unroll 1
  for (const int64_t* d = shape + 1; d != end; d += 3) {
    const int64_t size = d[0];
    int64_t quotient = static_cast<int64_t>(static_cast<double>(index) * __longlong_as_double(d[2]));
    int64_t rest = index - quotient * size;
    if (rest < 0) {
      rest += size;
      quotient--;
    } else if (rest >= size) {
      rest -= size;
      quotient++;
    }
    at += rest * d[1];
    index = quotient;
  }
  return at;
}

__device__ __forceinline__ float read_dense(const View& view, int64_t at) {
  if (view.dtype == Dtype::float32) return global(static_cast<const float*>(view.data))[at];
  const unsigned short bits = global(static_cast<const unsigned short*>(view.data))[at];
  return view.dtype == Dtype::bfloat16 ? __uint_as_float(static_cast<unsigned>(bits) << 16)
                                       : __half2float(__ushort_as_half(bits));
}

__device__ __forceinline__ void write_dense(const View& view, int64_t at, float value) {
  if (view.dtype == Dtype::float32) {
    global(static_cast<float*>(view.data))[at] = value;
    return;
  }
  global(static_cast<unsigned short*>(view.data))[at] = view.dtype == Dtype::bfloat16
                                                            ? __bfloat16_as_ushort(__float2bfloat16_rn(value))
                                                            : __half_as_ushort(__float2half_rn(value));
}

template <class Entry>
struct Table {
  const TableRef& ref;
  const int64_t* words;

  __device__ __forceinline__ Table(const TableRef& where, const int64_t* inline_words)
      : ref(where), words(where.device ? where.device : inline_words) {}

  // The entry that holds a tile of all the launch's tiles: the first whose end_tile lies beyond it.
  __device__ __forceinline__ const Entry& find(int64_t tile, int64_t& first_tile) const {
    const Entry* entries = reinterpret_cast<const Entry*>(words);
    int low = 0, high = ref.entries - 1;
    while (low < high) {
      const int middle = (low + high) / 2;
      if (tile < entries[middle].end_tile)
        high = middle;
      else
        low = middle + 1;
    }
    first_tile = low == 0 ? 0 : entries[low - 1].end_tile;
    return entries[low];
  }

  // The element of a view that is coordinate `index` in logical order.
  __device__ __forceinline__ int64_t element(const View& view, int64_t index) const {
    return view.shape < 0 ? index : walk_shape(words + ref.shapes + view.shape, index);
  }

  __device__ __forceinline__ float read(const View& view, int64_t index) const {
    return read_dense(view, element(view, index));
  }
};

}  // namespace l2l
