// Atomic read-modify-write operations: compiler builtins, so that ThreadSanitizer sees them as such. They are relaxed
// in CUDA; here they are also ordered, since ThreadSanitizer does not understand the fences around them.
#pragma once

#include <type_traits>

#include "interface.h"

namespace cuda_on_host {

template <class T, class Update>
CUDA_ON_HOST_ATOMIC_CODE inline T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "no atomic operation of this size");
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0)
    device_error(716, Site{"atomics.h", __LINE__}, "atomic operation on a misaligned address %p",
                 static_cast<void*>(address));
  yield_at_random();
  note_atomic(address, sizeof(T));
  auto* bits = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(bits, __ATOMIC_RELAXED);
  for (;;) {
    const T old = bit_cast<T>(old_bits);
    const T value = update(old);
    if (__atomic_compare_exchange_n(bits, &old_bits, bit_cast<Bits>(value), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
      return old;
  }
}

template <class T>
using Same = std::common_type_t<T>;  // keeps the second argument out of template deduction

}  // namespace cuda_on_host

#define CUDA_ON_HOST_ATOMIC(name, expression)                                                           \
  template <class T>                                                                                    \
  inline T name(T* address, cuda_on_host::Same<T> value) {                                              \
    return cuda_on_host::atomic_update(address, [value](T old) { return static_cast<T>(expression); }); \
  }
CUDA_ON_HOST_ATOMIC(atomicAdd, old + value)
CUDA_ON_HOST_ATOMIC(atomicSub, old - value)
CUDA_ON_HOST_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_HOST_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_HOST_ATOMIC(atomicAnd, old& value)
CUDA_ON_HOST_ATOMIC(atomicOr, old | value)
CUDA_ON_HOST_ATOMIC(atomicXor, old ^ value)
CUDA_ON_HOST_ATOMIC(atomicExch, (static_cast<void>(old), value))
CUDA_ON_HOST_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
CUDA_ON_HOST_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef CUDA_ON_HOST_ATOMIC

template <class T>
inline T atomicCAS(T* address, cuda_on_host::Same<T> expected, cuda_on_host::Same<T> value) {
  return cuda_on_host::atomic_update(address, [=](T old) { return old == expected ? value : old; });
}
