// The access check's entry points: the functions that code compiled with -fsanitize=thread calls.
#pragma once

#include "launch.h"

#if defined(CUDA_ON_HOST_ACCESS_CHECK)
namespace cuda_on_host::access_check {

inline const char* module_base() {
  static const char* base = [] {
    Dl_info info;
    return dladdr(reinterpret_cast<const void*>(&module_base), &info) != 0 ? static_cast<const char*>(info.dli_fbase)
                                                                           : nullptr;
  }();
  return base;
}

// The loaded segments of this module: constants, __constant__ and __device__ variables, the runtime's own.
inline bool in_module(const void* address) {
  struct Range {
    uintptr_t begin = UINTPTR_MAX, end = 0;
  };
  static const Range range = [] {
    Range r;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          const auto self = reinterpret_cast<uintptr_t>(&now);
          Range found;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
            found.begin = std::min(found.begin, begin);
            found.end = std::max<uintptr_t>(found.end, begin + info->dlpi_phdr[i].p_memsz);
          }
          if (self >= found.begin && self < found.end) *static_cast<Range*>(out) = found;
          return 0;
        },
        &r);
    return r;
  }();
  const auto p = reinterpret_cast<uintptr_t>(address);
  return p >= range.begin && p < range.end;
}

[[noreturn]] inline void report(cudaError_t code, const void* instruction, const std::string& message) {
  record_device_error(code, line_of(instruction), message);
  abandon();
}

struct Target {
  Cell* cells = nullptr;  // null: not watched
  bool shared = false;
  const char* kind = "";
  size_t offset = 0;
};

// Finds the memory an access touches; outside of device memory it is an error.
inline Target find(const unsigned char* address, size_t bytes, const void* instruction) {
  Block& block = *current->block;
  if (current->fiber->on_stack(address)) return {};
  if (block.dynamic_shared.contains(address)) {
    const ExactBuffer& buffer = block.dynamic_shared;
    const size_t offset = static_cast<size_t>(address - buffer.data());
    if (!buffer.contains(address, bytes))
      report(
          cudaErrorIllegalAddress, instruction,
          format("%zu bytes at offset %zu of the %zu bytes of dynamic shared memory", bytes, offset, buffer.bytes()));
    return {my_block().dynamic_shadow.cover(buffer.data(), buffer.bytes()) + offset, true, "dynamic shared memory",
            offset};
  }
  if (static_shared.contains(address)) {
    const size_t offset = static_cast<size_t>(address - static_shared.base());
    return {my_block().static_shadow.cover(static_shared.base(), static_shared.size()) + offset, true,
            "static shared memory", offset};
  }
  static const ExactBuffer* last = nullptr;
  static Cell* last_cells = nullptr;
  static uint64_t last_version = 0;
  if (last == nullptr || last_version != allocations.version() || !last->contains(address)) {
    last = allocations.find(address);
    last_version = allocations.version();
    if (last != nullptr) last_cells = global_shadows[last->data()].cover(last->data(), last->bytes());
  }
  if (last != nullptr) {
    if (last->device != current_device) report(cudaErrorIllegalAddress, instruction, describe_address(address));
    const size_t offset = static_cast<size_t>(address - last->data());
    if (!last->contains(address, bytes))
      report(cudaErrorIllegalAddress, instruction,
             format("%zu bytes at %p, %s", bytes, static_cast<const void*>(address),
                    last->distance(address + bytes - 1).c_str()));
    return {last_cells + offset, false, "device memory", offset};
  }
  const auto* arguments = static_cast<const unsigned char*>(active->call->data);
  if (in_module(address) || (address >= arguments && address < arguments + active->call->data_bytes)) return {};
  report(cudaErrorIllegalAddress, instruction, describe_address(address));
}

[[noreturn]] inline void report_race(const Target& target, size_t byte, const char* mine, const char* theirs,
                                     const Access& other, const void* instruction) {
  const dim3 g = active->grid, b = active->block;
  const std::string thread = text_of({other.thread % b.x, other.thread / b.x % b.y, other.thread / b.x / b.y});
  const std::string block = text_of({other.block % g.x, other.block / g.x % g.y, other.block / g.x / g.y});
  report(cudaErrorLaunchFailure, instruction,
         format("data race: %s byte %zu of %s, which %sthread %s of block %s %s at %s, with no barrier between", mine,
                target.offset + byte, target.kind, other.scope == Scope::thread ? "" : "several threads, among them ",
                thread.c_str(), block.c_str(), theirs, line_of(module_base() + other.code).c_str()));
}

// What is older than this belongs to another block or launch, and is void.
inline Tick oldest(const Target& target, const BlockState& mine) { return target.shared ? mine.begin : grid_tick; }

inline void check_cell(Cell& cell, const Access& access, bool is_write, const Target& target, size_t byte,
                       const BlockState& mine, const void* instruction) {
  const Tick valid = oldest(target, mine);
  if (!is_write && cell.read.scope >= Scope::block && cell.read.when == access.when && cell.read.block == mine.block &&
      cell.write.when >= valid && cell.write.when < mine.barrier && !cell.write.undefined)
    return;  // what all threads read since the last barrier
  if (cell.write.when < valid) cell.write.scope = Scope::none;
  if (cell.read.when < valid) cell.read.scope = Scope::none;
  if (cell.write.scope != Scope::none && !(access.atomic && cell.write.atomic) && !ordered(cell.write, mine))
    report_race(target, byte, is_write ? "writes" : "reads", "wrote", cell.write, instruction);
  if (target.shared && (!is_write || access.atomic) && (cell.write.scope == Scope::none || cell.write.undefined))
    report(cudaErrorLaunchFailure, instruction,
           format("reads byte %zu of %s, which %s", target.offset + byte, target.kind,
                  cell.write.scope == Scope::none ? "was never written"
                                                  : "a cp.async in flight may or may not have written"));
  if (!is_write) return remember_read(cell.read, access, mine);
  if (cell.read.scope != Scope::none && !(access.atomic && cell.read.atomic) && !ordered(cell.read, mine))
    report_race(target, byte, "writes", "read", cell.read, instruction);
  cell.write = access;
  cell.read.scope = Scope::none;
}

inline void check(const void* address, size_t bytes, bool is_write, bool is_atomic, const void* instruction) {
  if (current == nullptr) return;
  const Target target = find(static_cast<const unsigned char*>(address), bytes, instruction);
  if (target.cells == nullptr) return;
  const BlockState& mine = my_block();
  Access access;
  access.when = now, access.block = mine.block, access.thread = static_cast<uint16_t>(current->linear);
  access.code = static_cast<uint32_t>(static_cast<const char*>(instruction) - module_base());
  access.scope = Scope::thread, access.atomic = is_atomic, access.undefined = false;
  for (size_t i = 0; i < bytes;) {
    const size_t in_word = (target.offset + i) % 4;
    Cell* word = target.cells + i - in_word;
    if (in_word == 0 && bytes - i >= 4 && !word->split) {
      check_cell(*word, access, is_write, target, i, mine, instruction);
      i += 4;
      continue;
    }
    if (!word->split) {
      std::fill(word + 1, word + 4, *word);
      word->split = true;
    }
    check_cell(word[in_word], access, is_write, target, i, mine, instruction);
    i += 1;
  }
}

}  // namespace cuda_on_host::access_check

// The call instruction, not the one it returns to.
#define CUDA_ON_HOST_CALLER (static_cast<const char*>(__builtin_return_address(0)) - 1)

namespace cuda_on_host {
void note_atomic(const void* address, size_t bytes) {
  if (current == nullptr) return;
  access_check::atomic_event(address);
  access_check::check(address, bytes, true, true, CUDA_ON_HOST_CALLER);
}
void note_undefined(void* address, size_t bytes) {
  if (current == nullptr) return;
  const auto target = access_check::find(static_cast<unsigned char*>(address), bytes, CUDA_ON_HOST_CALLER);
  for (size_t i = 0; target.cells != nullptr && i < bytes; ++i) target.cells[i].write.undefined = true;
}
}  // namespace cuda_on_host

#define CUDA_ON_HOST_ACCESS(name, bytes, is_write)                                           \
  extern "C" void name(void* address) {                                                      \
    cuda_on_host::access_check::check(address, bytes, is_write, false, CUDA_ON_HOST_CALLER); \
  }
#define CUDA_ON_HOST_ACCESSES(bytes)                              \
  CUDA_ON_HOST_ACCESS(__tsan_read##bytes, bytes, false)           \
  CUDA_ON_HOST_ACCESS(__tsan_write##bytes, bytes, true)           \
  CUDA_ON_HOST_ACCESS(__tsan_unaligned_read##bytes, bytes, false) \
  CUDA_ON_HOST_ACCESS(__tsan_unaligned_write##bytes, bytes, true)
CUDA_ON_HOST_ACCESSES(1)
CUDA_ON_HOST_ACCESSES(2)
CUDA_ON_HOST_ACCESSES(4)
CUDA_ON_HOST_ACCESSES(8)
CUDA_ON_HOST_ACCESSES(16)
extern "C" {
void __tsan_read_range(void* address, size_t bytes) {
  cuda_on_host::access_check::check(address, bytes, false, false, CUDA_ON_HOST_CALLER);
}
void __tsan_write_range(void* address, size_t bytes) {
  cuda_on_host::access_check::check(address, bytes, true, false, CUDA_ON_HOST_CALLER);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// Guards of function-local static variables in host code.
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) {
  return __atomic_load_n(address, __ATOMIC_ACQUIRE);
}
}
#endif
