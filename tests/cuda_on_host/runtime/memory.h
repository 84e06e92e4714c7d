// Device memory: exact-size buffers between inaccessible pages, filled with 0xFF, and the registry of those that
// cudaMalloc handed out.
//
// A buffer ends at an inaccessible page, so that the first access past its end faults; since it starts at a multiple of
// 16, up to 15 bytes may lie between. Writes to those are found when the buffer is released. Under the compiler's
// sanitizers a buffer is an ordinary heap block of exact size, whose surroundings AddressSanitizer watches.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>

#include "errors.h"
#include "sanitizer.h"

namespace cuda_on_host {

constexpr size_t kPage = 65536;  // a multiple of any page size in use
constexpr unsigned char kPoison = 0xFF, kCanary = 0xA5;

class ExactBuffer {
 public:
  ExactBuffer() = default;
  ExactBuffer(ExactBuffer&& other) noexcept { swap(other); }
  ExactBuffer& operator=(ExactBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~ExactBuffer() { release(); }

  bool allocate(size_t bytes) {
    release();
    if (bytes == 0) return true;
    const size_t padded = (bytes + 15) / 16 * 16;
    if constexpr (kCompilerSanitizer) {
      void* block = nullptr;
      if (posix_memalign(&block, 16, bytes) != 0) return false;
      data_ = static_cast<unsigned char*>(block);
    } else {
      const size_t body = (padded + kPage - 1) / kPage * kPage;
      void* mapping = mmap(nullptr, body + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapping == MAP_FAILED) return false;
      mapping_ = static_cast<unsigned char*>(mapping), mapping_bytes_ = body + 2 * kPage;
      if (mprotect(mapping_ + kPage, body, PROT_READ | PROT_WRITE) != 0) return false;
      data_ = mapping_ + kPage + body - padded;
      std::memset(data_ + bytes, kCanary, padded - bytes);
    }
    bytes_ = bytes;
    poison();
    return true;
  }
  void poison() {
    if (bytes_ != 0) std::memset(data_, kPoison, bytes_);
  }
  // False if something wrote into the bytes between the end of the buffer and the inaccessible page.
  bool intact() const {
    if (kCompilerSanitizer || bytes_ == 0) return true;
    for (size_t i = bytes_; i % 16 != 0; ++i)
      if (data_[i] != kCanary) return false;
    return true;
  }
  void release() {
    const Unwatched unwatched;  // a failed launch leaves its threads' accesses unordered
    if (bytes_ != 0) {
      if constexpr (kCompilerSanitizer)
        std::free(data_);
      else
        munmap(mapping_, mapping_bytes_);
    }
    data_ = mapping_ = nullptr, bytes_ = mapping_bytes_ = 0;
  }

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool contains(const void* address, size_t bytes = 1) const {
    const auto p = reinterpret_cast<uintptr_t>(address), begin = reinterpret_cast<uintptr_t>(data_);
    return bytes_ != 0 && p >= begin && bytes <= bytes_ && p - begin <= bytes_ - bytes;
  }
  bool surrounds(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return mapping_ != nullptr && p >= mapping_ && p < mapping_ + mapping_bytes_;
  }
  // "12 bytes past the end of the 400 bytes at 0x..."
  std::string distance(const void* address) const {
    const auto p = reinterpret_cast<intptr_t>(address), begin = reinterpret_cast<intptr_t>(data_);
    const auto end = begin + static_cast<intptr_t>(bytes_);
    const long long past = p >= end ? p - end : begin - p;
    return format("%lld bytes %s the %zu bytes at %p", past, p >= end ? "past the end of" : "before", bytes_,
                  static_cast<void*>(data_));
  }

 private:
  void swap(ExactBuffer& other) noexcept {
    std::swap(data_, other.data_), std::swap(mapping_, other.mapping_);
    std::swap(bytes_, other.bytes_), std::swap(mapping_bytes_, other.mapping_bytes_);
  }
  unsigned char* data_ = nullptr;
  unsigned char* mapping_ = nullptr;
  size_t bytes_ = 0, mapping_bytes_ = 0;
};

struct Counters {
  uint64_t launches = 0, copies = 0, allocations = 0, synchronizations = 0;
};
inline Counters counters;

class Allocations {
 public:
  cudaError_t allocate(void** pointer, size_t bytes) {
    ++counters.allocations;
    ExactBuffer buffer;
    *pointer = nullptr;
    if (!buffer.allocate(bytes))
      return record_error(cudaErrorMemoryAllocation, format("cudaMalloc of %zu bytes", bytes));
    if (bytes == 0) return cudaSuccess;
    *pointer = buffer.data();
    ++version_;
    buffers_[reinterpret_cast<uintptr_t>(buffer.data())] = std::move(buffer);
    return cudaSuccess;
  }
  cudaError_t release(void* pointer) {
    if (pointer == nullptr) return cudaSuccess;
    const auto found = buffers_.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == buffers_.end())
      return record_error(cudaErrorInvalidValue, format("cudaFree of %p, which cudaMalloc did not return", pointer));
    const bool intact = found->second.intact();
    const size_t bytes = found->second.bytes();
    ++version_;
    buffers_.erase(found);
    if (intact) return cudaSuccess;
    return record_error(cudaErrorIllegalAddress,
                        format("bytes past the end of an allocation of %zu bytes were written", bytes));
  }
  const ExactBuffer* find(const void* address) const {
    auto next = buffers_.upper_bound(reinterpret_cast<uintptr_t>(address));
    if (next == buffers_.begin()) return nullptr;
    --next;
    return next->second.contains(address) ? &next->second : nullptr;
  }
  // The allocation whose inaccessible surroundings hold the address.
  const ExactBuffer* near(const void* address) const {
    for (const auto& [base, buffer] : buffers_)
      if (buffer.surrounds(address)) return &buffer;
    return nullptr;
  }
  bool contains(const void* address, size_t bytes) const {
    const ExactBuffer* buffer = find(address);
    return buffer != nullptr && buffer->contains(address, bytes);
  }
  size_t count() const { return buffers_.size(); }
  uint64_t version() const { return version_; }  // another one after every change
  const ExactBuffer* damaged() const {
    for (const auto& [base, buffer] : buffers_)
      if (!buffer.intact()) return &buffer;
    return nullptr;
  }

 private:
  std::map<uintptr_t, ExactBuffer> buffers_;
  uint64_t version_ = 0;
};
inline Allocations allocations;

cudaError_t allocate(void** pointer, size_t bytes) { return allocations.allocate(pointer, bytes); }
cudaError_t release(void* pointer) { return allocations.release(pointer); }

cudaError_t copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  ++counters.copies;
  if (bytes == 0) return cudaSuccess;
  const bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (to_device && !allocations.contains(destination, bytes))
    return record_error(cudaErrorInvalidValue,
                        format("cudaMemcpy: the %zu bytes at %p, its destination, are not within one device allocation",
                               bytes, destination));
  if (from_device && !allocations.contains(source, bytes))
    return record_error(
        cudaErrorInvalidValue,
        format("cudaMemcpy: the %zu bytes at %p, its source, are not within one device allocation", bytes, source));
  std::memmove(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t set(void* pointer, int value, size_t bytes) {
  ++counters.copies;
  if (bytes == 0) return cudaSuccess;
  if (!allocations.contains(pointer, bytes))
    return record_error(cudaErrorInvalidValue,
                        format("cudaMemset: the %zu bytes at %p are not within one device allocation", bytes, pointer));
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t synchronize() {
  ++counters.synchronizations;
  return error_state.code;
}

}  // namespace cuda_on_host
