// What device code asks of the runtime: the few calls behind __syncthreads, shuffles, cp.async and launches.
// Defined in runtime/runtime.cpp, which is compiled without sanitizer instrumentation; everything a sanitizer must see
// (loads and stores of device code) stays in headers, inside the instrumented translation unit.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda_on_host {

// A place in the source of the device code. As a default argument it names the line of the caller.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Barriers. Every thread of the block (of the grid) must arrive, at the same line.
enum class BlockVote : unsigned char { none, count, all, any };
int block_barrier(BlockVote vote, int predicate, Site site);
void grid_barrier(Site site);
bool launch_is_cooperative();

// Warp collectives: each lane of the mask deposits a value and, once all have arrived, reads those of the others.
enum class Collective : unsigned char { syncwarp, shuffle, vote, match, reduce, matrix };
struct alignas(16) LaneSlot {
  unsigned char bytes[64];
};
const LaneSlot* warp_exchange(unsigned mask, Collective kind, const void* value, size_t bytes, Site site);
unsigned lane_index();

// Lets other threads run: always (where a thread may be spinning), or now and then under a random schedule.
void yield_now();
extern bool schedule_is_random;
void yield_by_chance();
inline void yield_at_random() {
  if (schedule_is_random) yield_by_chance();
}

// The dynamic shared memory of the block, of exactly the size the launch asked for.
void* dynamic_shared_memory(size_t alignment, Site site);

// cp.async: copies are queued when issued and handed out again, to be carried out, when the thread waits for them.
struct AsyncCopy {
  void* destination;
  const void* source;
  unsigned bytes;    // 4, 8 or 16, all of them written
  unsigned present;  // of those, read from the source; the rest become zero
};
bool async_copy_issue(const AsyncCopy& copy, Site site);  // true: carry it out at once (it may land at any time)
void async_copy_commit();
bool async_copy_next(int groups_left, AsyncCopy* copy);  // false: no more than groups_left groups are pending

// Reports an error of the running device thread and abandons the launch. Code is a cudaError_t.
[[noreturn]] void device_error(int code, Site site, const char* format, ...) __attribute__((format(printf, 3, 4)));

// Approximate instructions err. Their host twins err too, by this much of the documented bound (in [-1, 1], the same
// for the same argument), so that a tolerance met here is not met by luck. CUDA_ON_HOST_EXACT=1 sets the amplitude to
// zero.
extern float approximation_amplitude;
inline double approximation_error(uint32_t argument_bits) {
  uint32_t hash = argument_bits * 0x9E3779B1u;
  hash = (hash ^ (hash >> 15)) * 0x85EBCA77u;
  hash ^= hash >> 13;
  return approximation_amplitude * (static_cast<int32_t>(hash) / 2147483648.0);
}

#if defined(CUDA_ON_HOST_ACCESS_CHECK)
// Accesses the compiler's instrumentation does not see, or should see differently.
void note_atomic(const void* address, size_t bytes);
void note_undefined(void* address, size_t bytes);
#define CUDA_ON_HOST_ATOMIC_CODE __attribute__((no_sanitize("thread")))
#else
inline void note_atomic(const void*, size_t) {}
inline void note_undefined(void*, size_t) {}
#define CUDA_ON_HOST_ATOMIC_CODE
#endif

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace cuda_on_host
