// Warp shuffles, votes and reductions. Every lane of the mask must execute the same call; a lane outside the mask, one
// that has exited, or a value taken from a lane outside the mask is an error.
#pragma once

#include <type_traits>

#include "host_api.h"
#include "interface.h"

namespace cuda_on_host {

// The slots are the runtime's, not the program's: no sanitizer is to watch them.
template <class T>
__attribute__((no_sanitize("thread"))) inline T deposit_of(const LaneSlot* slots, unsigned lane) {
  T value;
  __builtin_memcpy(&value, slots[lane].bytes, sizeof value);
  return value;
}

inline void check_width(int width, Site site) {
  if (width <= 0 || width > 32 || (width & (width - 1)) != 0)
    device_error(cudaErrorLaunchFailure, site, "shuffle of width %d: not a power of two up to 32", width);
}

template <class T>
inline T shuffle(unsigned mask, T value, unsigned source, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "shuffles take values of up to 8 bytes");
  const LaneSlot* slots = warp_exchange(mask, Collective::shuffle, &value, sizeof value, site);
  if ((mask >> source & 1u) == 0)
    device_error(cudaErrorLaunchFailure, site, "lane %u reads lane %u, which is not in the shuffle's mask 0x%08x",
                 lane_index(), source, mask);
  return deposit_of<T>(slots, source);
}

template <class T, class Merge>
inline T reduce(unsigned mask, T value, Merge merge, Site site) {
  const LaneSlot* slots = warp_exchange(mask, Collective::reduce, &value, sizeof value, site);
  const unsigned first = static_cast<unsigned>(__builtin_ctz(mask));
  T result = deposit_of<T>(slots, first);
  for (unsigned lane = first + 1; lane < 32; ++lane)
    if (mask >> lane & 1u) result = merge(result, deposit_of<T>(slots, lane));
  return result;
}

}  // namespace cuda_on_host

// Orders memory among the lanes of the mask; the other collectives exchange values only.
inline void __syncwarp(unsigned mask = 0xffffffffu, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::warp_exchange(mask, cuda_on_host::Collective::syncwarp, nullptr, 0, site);
}

template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32,
                     cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::check_width(width, site);
  const unsigned base = cuda_on_host::lane_index() & ~static_cast<unsigned>(width - 1);
  return cuda_on_host::shuffle(mask, value, base | (static_cast<unsigned>(source) & static_cast<unsigned>(width - 1)),
                               site);
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32,
                         cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::check_width(width, site);
  const unsigned lane = cuda_on_host::lane_index(), source = lane ^ static_cast<unsigned>(lane_mask);
  const unsigned end = (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
  return cuda_on_host::shuffle(mask, value, source < end ? source : lane, site);
}

template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                          cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::check_width(width, site);
  const unsigned lane = cuda_on_host::lane_index();
  const unsigned end = (lane & ~static_cast<unsigned>(width - 1)) + static_cast<unsigned>(width);
  return cuda_on_host::shuffle(mask, value, delta < end - lane ? lane + delta : lane, site);
}

template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                        cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::check_width(width, site);
  const unsigned lane = cuda_on_host::lane_index(), base = lane & ~static_cast<unsigned>(width - 1);
  return cuda_on_host::shuffle(mask, value, delta <= lane - base ? lane - delta : lane, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const auto* slots =
      cuda_on_host::warp_exchange(mask, cuda_on_host::Collective::vote, &predicate, sizeof predicate, site);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1u) && cuda_on_host::deposit_of<int>(slots, lane)) votes |= 1u << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

template <class T>
inline unsigned __match_any_sync(unsigned mask, T value, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  const auto* slots = cuda_on_host::warp_exchange(mask, cuda_on_host::Collective::match, &value, sizeof value, site);
  unsigned equal = 0;
  for (unsigned lane = 0; lane < 32; ++lane)
    if ((mask >> lane & 1u) && cuda_on_host::deposit_of<T>(slots, lane) == value) equal |= 1u << lane;
  return equal;
}

// Compute capability 8.0 and later, 32-bit integers only.
#define CUDA_ON_HOST_REDUCE(name, expression)                                                            \
  template <class T>                                                                                     \
  inline T name(unsigned mask, T value, cuda_on_host::Site site = cuda_on_host::Site::here()) {          \
    static_assert(std::is_integral_v<T> && sizeof(T) == 4, "warp reductions take 32-bit integers");      \
    return cuda_on_host::reduce(mask, value, [](T a, T b) { return static_cast<T>(expression); }, site); \
  }
CUDA_ON_HOST_REDUCE(__reduce_add_sync, static_cast<unsigned>(a) + static_cast<unsigned>(b))
CUDA_ON_HOST_REDUCE(__reduce_min_sync, a < b ? a : b)
CUDA_ON_HOST_REDUCE(__reduce_max_sync, a < b ? b : a)
#undef CUDA_ON_HOST_REDUCE
