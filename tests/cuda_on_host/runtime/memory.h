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
#include <deque>
#include <map>
#include <string>

#include "device.h"
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
  // Lets no access through, or again. Under the compiler's sanitizers it is left to them.
  void seal(bool sealed) {
    if (mapping_ != nullptr)
      mprotect(mapping_ + kPage, mapping_bytes_ - 2 * kPage, sealed ? PROT_NONE : PROT_READ | PROT_WRITE);
  }
  // Sealed for good, its memory given back, its addresses kept.
  void retire() {
    if (mapping_ == nullptr) return release();
    madvise(mapping_ + kPage, mapping_bytes_ - 2 * kPage, MADV_DONTNEED);
    seal(true);
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

  int device = 0;  // whose memory it is

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
    std::swap(device, other.device);
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
    *pointer = nullptr;
    if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
    ExactBuffer buffer;
    if (bytes > Device::memory - bytes_ || !buffer.allocate(bytes))
      return record_error(cudaErrorMemoryAllocation,
                          format("cudaMalloc of %zu bytes, with %zu of %zu in use", bytes, bytes_, Device::memory));
    if (bytes == 0) return cudaSuccess;
    buffer.device = current_device;
    *pointer = buffer.data();
    bytes_ += bytes;
    ++version_;
    buffers_[reinterpret_cast<uintptr_t>(buffer.data())] = std::move(buffer);
    return cudaSuccess;
  }
  // Frees even when device code has failed, so that tests do not leak. The last addresses freed are not used again for
  // a while: whoever still has one faults.
  cudaError_t release(void* pointer) {
    if (pointer == nullptr) return context_error();
    const auto found = buffers_.find(reinterpret_cast<uintptr_t>(pointer));
    if (found == buffers_.end())
      return record_error(cudaErrorInvalidValue, format("cudaFree of %p, which cudaMalloc did not return", pointer));
    const bool intact = found->second.intact();
    const size_t bytes = found->second.bytes();
    bytes_ -= bytes;
    ++version_;
    found->second.retire();
    retired_.push_back(std::move(found->second));
    if (retired_.size() > kRetired) retired_.pop_front();
    buffers_.erase(found);
    if (intact) return context_error();
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
  // A freed allocation that had the address.
  const ExactBuffer* freed(const void* address) const {
    for (auto buffer = retired_.rbegin(); buffer != retired_.rend(); ++buffer)
      if (buffer->surrounds(address)) return &*buffer;
    return nullptr;
  }
  // The memory of other devices than the current one.
  void seal_others(bool sealed) {
    if (device.devices == 1) return;
    for (auto& [base, buffer] : buffers_)
      if (buffer.device != current_device) buffer.seal(sealed);
  }
  // After an error of device code nothing that was in device memory can be had.
  void poison() {
    for (auto& [base, buffer] : buffers_) buffer.poison();
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
  static constexpr size_t kRetired = 256;
  std::map<uintptr_t, ExactBuffer> buffers_;
  std::deque<ExactBuffer> retired_;
  size_t bytes_ = 0;
  uint64_t version_ = 0;
};
inline Allocations allocations;

cudaError_t allocate(void** pointer, size_t bytes) { return allocations.allocate(pointer, bytes); }
cudaError_t release(void* pointer) { return allocations.release(pointer); }

inline cudaError_t check_range(const char* call, const char* what, const void* pointer, size_t bytes, bool on_device) {
  const bool within = allocations.contains(pointer, bytes);
  if (on_device && !within)
    return record_error(
        cudaErrorInvalidValue,
        format("%s: the %zu bytes at %p, its %s, are not within one device allocation", call, bytes, pointer, what));
  if (!on_device && (pointer == nullptr || allocations.find(pointer) != nullptr))
    return record_error(cudaErrorInvalidValue, format("%s: %p, its %s, is %s, but the kind says host memory", call,
                                                      pointer, what, pointer == nullptr ? "null" : "device memory"));
  return cudaSuccess;
}

cudaError_t copy(void* destination, const void* source, size_t bytes, cudaMemcpyKind kind) {
  ++counters.copies;
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (kind < cudaMemcpyHostToHost || kind > cudaMemcpyDefault)
    return record_error(cudaErrorInvalidMemcpyDirection, format("cudaMemcpy: kind %d", kind));
  if (bytes == 0) return cudaSuccess;
  const bool any = kind == cudaMemcpyDefault;
  const bool to_device = any ? allocations.find(destination) != nullptr
                             : kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
  const bool from_device =
      any ? allocations.find(source) != nullptr : kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
  if (const auto error = check_range("cudaMemcpy", "destination", destination, bytes, to_device); error != cudaSuccess)
    return error;
  if (const auto error = check_range("cudaMemcpy", "source", source, bytes, from_device); error != cudaSuccess)
    return error;
  std::memmove(destination, source, bytes);
  return cudaSuccess;
}

cudaError_t set(void* pointer, int value, size_t bytes) {
  ++counters.copies;
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (bytes == 0) return cudaSuccess;
  if (const auto error = check_range("cudaMemset", "destination", pointer, bytes, true); error != cudaSuccess)
    return error;
  std::memset(pointer, value, bytes);
  return cudaSuccess;
}

cudaError_t copy_to_symbol(void* symbol, size_t size, const void* source, size_t bytes, size_t offset) {
  ++counters.copies;
  if (const cudaError_t error = context_error(); error != cudaSuccess) return error;
  if (offset > size || bytes > size - offset)
    return record_error(cudaErrorInvalidValue,
                        format("cudaMemcpyToSymbol: %zu bytes at offset %zu of the symbol's %zu", bytes, offset, size));
  std::memcpy(static_cast<char*>(symbol) + offset, source, bytes);
  return cudaSuccess;
}

cudaError_t synchronize() {
  ++counters.synchronizations;
  return context_error();
}

}  // namespace cuda_on_host
