// What the compiler's sanitizers must be told: that stacks are switched, and which threads are ordered by a barrier.
// runtime.cpp itself is compiled without instrumentation.
#pragma once

#include <cstddef>

#if defined(CUDA_ON_HOST_ADDRESS)
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack_save, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack_save, const void** bottom_old, size_t* size_old);
void __asan_unpoison_memory_region(const volatile void* address, size_t size);
}
#endif
#if defined(CUDA_ON_HOST_THREAD)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace cuda_on_host {

#if defined(CUDA_ON_HOST_ADDRESS) || defined(CUDA_ON_HOST_THREAD)
constexpr bool kCompilerSanitizer = true;
#else
constexpr bool kCompilerSanitizer = false;
#endif
#if defined(CUDA_ON_HOST_THREAD)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// While it lives, ThreadSanitizer overlooks what the running stack does: the library functions the runtime calls
// (memmove, operator new) are watched even though the runtime is not instrumented.
class Unwatched {
 public:
#if defined(CUDA_ON_HOST_THREAD)
  Unwatched() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

// A point that orders memory: what came before order_before() of a token comes before what follows order_after() of it.
struct OrderToken {
  char byte;
  void order_before() {
#if defined(CUDA_ON_HOST_THREAD)
    __tsan_release(this);
#endif
  }
  void order_after() {
#if defined(CUDA_ON_HOST_THREAD)
    __tsan_acquire(this);
#endif
  }
};

// One stack as the sanitizers know it. leave() and arrive() bracket every switch, called on the stack that is left and
// on the one that is reached.
class SanitizerContext {
 public:
  void describe_stack([[maybe_unused]] void* bottom, [[maybe_unused]] size_t size) {
#if defined(CUDA_ON_HOST_ADDRESS)
    bottom_ = bottom, size_ = size;
#endif
#if defined(CUDA_ON_HOST_THREAD)
    fiber_ = __tsan_create_fiber(0);
#endif
  }
  // The calling thread's own stack: ThreadSanitizer knows it, AddressSanitizer tells its bounds upon the first switch.
  void adopt_current_stack() {
#if defined(CUDA_ON_HOST_THREAD)
    fiber_ = __tsan_get_current_fiber();
#endif
  }
  // The stack is abandoned in the midst of its frames and will be used anew from the top. ThreadSanitizer's old view of
  // it is left behind: it may not be destroyed while an Unwatched lives on it, and abandoned stacks are rare.
  void reset_stack() {
#if defined(CUDA_ON_HOST_ADDRESS)
    __asan_unpoison_memory_region(bottom_, size_);
    fake_stack_ = nullptr;
#endif
#if defined(CUDA_ON_HOST_THREAD)
    fiber_ = __tsan_create_fiber(0);
#endif
  }
  void leave([[maybe_unused]] SanitizerContext& to, [[maybe_unused]] bool forever) {
#if defined(CUDA_ON_HOST_ADDRESS)
    __sanitizer_start_switch_fiber(forever ? nullptr : &fake_stack_, to.bottom_, to.size_);
#endif
#if defined(CUDA_ON_HOST_THREAD)
    __tsan_switch_to_fiber(to.fiber_, 1);  // 1: the switch itself orders nothing
#endif
  }
  // `from` is the scheduler's stack, which may be another thread's than the last time; null when it is the one reached.
  void arrive([[maybe_unused]] SanitizerContext* from, [[maybe_unused]] bool first_time) {
#if defined(CUDA_ON_HOST_ADDRESS)
    const void* bottom = nullptr;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(first_time ? nullptr : fake_stack_, &bottom, &size);
    if (from != nullptr) from->bottom_ = bottom, from->size_ = size;
#endif
  }

 private:
#if defined(CUDA_ON_HOST_ADDRESS)
  const void* bottom_ = nullptr;
  size_t size_ = 0;
  void* fake_stack_ = nullptr;
#endif
#if defined(CUDA_ON_HOST_THREAD)
  void* fiber_ = nullptr;
#endif
};

}  // namespace cuda_on_host
