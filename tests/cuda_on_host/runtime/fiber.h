// Fibers: a stack and a saved stack pointer each. Two contexts matter at any time, the scheduler's and one fiber's.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sanitizer.h"

#if !defined(__x86_64__) && !defined(__aarch64__)
#define CUDA_ON_HOST_UCONTEXT 1
#endif
#if defined(CUDA_ON_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_host {

#if defined(CUDA_ON_HOST_UCONTEXT)
struct Context {
  ucontext_t registers;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = bytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}
#else
struct Context {
  void* stack_pointer;
};

// Saves the callee-saved registers on the current stack, stores the stack pointer in *from, continues on the stack
// `to`.
extern "C" void cuda_on_host_switch(void** from, void* to);
#if defined(__x86_64__)
asm(R"(
.text
.local cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  endbr64
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, . - cuda_on_host_switch
)");
constexpr int kSavedWords = 6, kReturnWord = 6, kFrameWords = 8;  // r15 .. rbp, the return address, padding
#else
asm(R"(
.text
.local cuda_on_host_switch
.type cuda_on_host_switch, %function
cuda_on_host_switch:
  stp x19, x20, [sp, #-160]!
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  ldp x19, x20, [sp], #160
  ret
.size cuda_on_host_switch, . - cuda_on_host_switch
)");
constexpr int kReturnWord = 11, kFrameWords = 20;  // x19 .. x28, x29, then x30: the return address
#endif
inline void switch_context(Context& from, Context& to) { cuda_on_host_switch(&from.stack_pointer, to.stack_pointer); }
inline void prepare_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  auto** frame = reinterpret_cast<void**>(stack + bytes) - kFrameWords;
  for (int i = 0; i < kFrameWords; ++i) frame[i] = nullptr;
  frame[kReturnWord] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
}
#endif

class Fiber {
 public:
  static constexpr size_t kGuard = 16384;  // of the largest page size in use, so that it is always whole pages

  // Stacks start at different offsets within a page, lest all fibers' hot lines fall into the same cache sets.
  explicit Fiber(size_t index) {
    static const size_t stack_bytes = [] {
      const char* text = std::getenv("CUDA_ON_HOST_STACK_KB");
      const size_t kb = text != nullptr ? std::strtoul(text, nullptr, 10) : (kCompilerSanitizer ? 512 : 256);
      return kb < 32 ? size_t{32} << 10 : kb << 10;
    }();
    mapping_bytes_ = stack_bytes + kGuard;
    void* mapping =
        mmap(nullptr, mapping_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, kGuard, PROT_NONE) != 0) {
      std::perror("cuda_on_host: no memory for the stack of a device thread");
      std::abort();
    }
    mapping_ = static_cast<char*>(mapping);
    usable_ = stack_bytes - (index % 13) * 320;
    sanitizer_.describe_stack(mapping_ + kGuard, stack_bytes);
  }
  ~Fiber() { munmap(mapping_, mapping_bytes_); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next resume() call entry() at the top of the stack, whatever was there.
  void prepare(void (*entry)()) {
    if (suspended_) sanitizer_.reset_stack();
    suspended_ = false;
    prepare_context(context_, mapping_ + kGuard, usable_, entry);
  }

  // From the scheduler: runs the fiber until it suspends or leaves.
  void resume() {
    Fiber* outer = running;
    running = this;
    scheduler_sanitizer.adopt_current_stack();
    scheduler_sanitizer.leave(sanitizer_, false);
    switch_context(scheduler_context, context_);
    scheduler_sanitizer.arrive(nullptr, false);
    running = outer;
  }
  // From the fiber, first thing.
  static void entered() { running->sanitizer_.arrive(&scheduler_sanitizer, true); }
  // From the fiber: back to the scheduler, until the next resume().
  static void suspend() {
    Fiber* self = running;
    self->suspended_ = true;
    self->sanitizer_.leave(scheduler_sanitizer, false);
    switch_context(self->context_, scheduler_context);
    self->sanitizer_.arrive(&scheduler_sanitizer, false);
    self->suspended_ = false;
  }
  // From the fiber: back to the scheduler for good. `complete`: all frames but the entry function's have returned.
  [[noreturn]] static void leave(bool complete) {
    Fiber* self = running;
    self->suspended_ = !complete;
    self->sanitizer_.leave(scheduler_sanitizer, complete);
    switch_context(self->context_, scheduler_context);
    std::abort();
  }

  bool guards(const void* address) const {
    const auto* p = static_cast<const char*>(address);
    return p >= mapping_ && p < mapping_ + kGuard;
  }
  bool on_stack(const void* address) const {
    const auto* p = static_cast<const char*>(address);
    return p >= mapping_ + kGuard && p < mapping_ + mapping_bytes_;
  }

 private:
  inline static Fiber* running = nullptr;
  inline static Context scheduler_context;
  inline static SanitizerContext scheduler_sanitizer;

  Context context_;
  SanitizerContext sanitizer_;
  char* mapping_;
  size_t mapping_bytes_, usable_;
  bool suspended_ = false;  // its stack holds frames that were never left
};

}  // namespace cuda_on_host
