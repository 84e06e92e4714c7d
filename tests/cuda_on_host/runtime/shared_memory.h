// Shared memory of the resident blocks. Dynamic: an exact buffer per block. Static: __shared__ variables are
// thread_local, so they make up the thread-local segment of this module; the segment holds the variables of the block
// that runs and is exchanged when another block gets its turn. Both start as 0xFF (NaN) in every block.
#pragma once

#include <link.h>

#include "access_check.h"
#include "threads.h"

namespace cuda_on_host {

// Makes sure the module has a thread-local segment, and that it exists in the calling thread.
inline thread_local volatile char segment_anchor;

class StaticShared {
 public:
  // Finds the segment of the calling thread.
  void enter_thread() {
    segment_anchor = 0;
    if (size_ == 0) locate();
    base_ = reinterpret_cast<unsigned char*>(const_cast<char*>(&segment_anchor)) + offset_;
    loaded_ = nullptr;
  }
  bool used() const { return size_ > 1; }  // more than the anchor
  unsigned char* base() const { return base_; }
  size_t size() const { return size_; }
  bool contains(const void* address) const {
    const auto* p = static_cast<const unsigned char*>(address);
    return p >= base_ && p < base_ + size_;
  }

  void begin_block(Block& block) {
    if (!used()) return;
    if (loaded_ == nullptr) loaded_ = &block;
    if (loaded_ == &block)
      std::memset(base_, kPoison, size_);
    else
      block.static_shared.assign(size_, kPoison);
  }
  // Returns false under ThreadSanitizer, to which the variables of all blocks are the same memory: it would report
  // races between resident blocks that use any.
  bool load(Block& block) {
    if (!used() || loaded_ == &block) return true;
    if (kThreadSanitizer) {
      loaded_ = &block;
      return untouched();
    }
    loaded_->static_shared.assign(base_, base_ + size_);
    loaded_ = &block;
    std::memcpy(base_, block.static_shared.data(), size_);
    return true;
  }

 private:
  bool untouched() const {
    const volatile unsigned char* bytes = base_;  // volatile: not memcmp, which ThreadSanitizer would watch
    size_t i = 0;
    while (i < size_ && bytes[i] == kPoison) ++i;
    return i == size_;
  }
  void locate() {
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* self) {
          static_cast<StaticShared*>(self)->look_at(*info);
          return 0;
        },
        this);
  }
  void look_at(const dl_phdr_info& info) {
    const auto anchor = reinterpret_cast<uintptr_t>(&segment_anchor),
               data = reinterpret_cast<uintptr_t>(info.dlpi_tls_data);
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const size_t size = info.dlpi_phdr[i].p_memsz;
      if (info.dlpi_phdr[i].p_type != PT_TLS || anchor < data || anchor >= data + size) continue;
      offset_ = static_cast<std::ptrdiff_t>(data - anchor);
      size_ = size;
    }
  }
  std::ptrdiff_t offset_ = 0;
  size_t size_ = 0;
  unsigned char* base_ = nullptr;
  Block* loaded_ = nullptr;
};
inline StaticShared static_shared;

inline void begin_shared_memory(Block& block) {
  if (kThreadSanitizer && block.dynamic_shared.bytes() != 0) {
    active->retired.push_back(std::move(block.dynamic_shared));
    block.dynamic_shared = ExactBuffer();
  }
  if (block.dynamic_shared.bytes() != active->dynamic_bytes) {
    if (!block.dynamic_shared.allocate(active->dynamic_bytes)) std::abort();
  } else {
    block.dynamic_shared.poison();
  }
  static_shared.begin_block(block);
  access_check::begin_block(block);
}

void* dynamic_shared_memory(size_t alignment, Site site) {
  if (current == nullptr)
    device_error(cudaErrorLaunchFailure, site, "dynamic shared memory exists in device code only");
  if (alignment > 16) fail(cudaErrorInvalidValue, site, "dynamic shared memory is aligned to 16 bytes, no more");
  if (active->dynamic_bytes == 0) fail(cudaErrorInvalidValue, site, "the launch asked for no dynamic shared memory");
  return current->block->dynamic_shared.data();
}

inline bool is_shared(const Block& block, const void* address) {
  return block.dynamic_shared.contains(address) || static_shared.contains(address);
}

}  // namespace cuda_on_host
