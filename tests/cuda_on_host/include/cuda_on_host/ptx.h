// csrc/cuda/ptx.cuh as it is on the CPU: the same names, carried out by the twins.
#pragma once

#include "approximate.h"
#include "ptx_host.h"

namespace l2l::ptx {

inline float ex2(float x) { return cuda_on_host::ex2_approx(x); }
inline float rcp(float x) { return cuda_on_host::rcp_approx(x); }
inline float lg2(float x) { return cuda_on_host::lg2_approx(x); }

template <int Bytes>
inline void cp_async(void* shared, const void* global, bool valid = true,
                     cuda_on_host::Site site = cuda_on_host::Site::here()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  cuda_on_host::cp_async<Bytes>(shared, global, valid ? Bytes : 0, site);
  if constexpr (CUDA_ON_HOST_ARCH < 800) {
    cuda_on_host::cp_async_commit();
    cuda_on_host::cp_async_wait(0);
  }
}
inline void cp_async_commit() { cuda_on_host::cp_async_commit(); }
template <int GroupsLeft>
inline void cp_async_wait() {
  cuda_on_host::cp_async_wait(GroupsLeft);
}

template <int Count, bool Transposed = false>
inline void ldmatrix(unsigned (&d)[Count], const void* row, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::ldmatrix<Count, Transposed>(d, row, site);
}

#if CUDA_ON_HOST_ARCH >= 800
inline unsigned to_tf32(float x) {
  const unsigned bits = __float_as_uint(x);
  return isfinite(x) ? (bits + 0x1000u) & 0xFFFFE000u : bits;
}
inline void mma_tf32(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::mma_m16n8<cuda_on_host::Tf32>(d, a, b, site);
}
inline void mma_bf16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::mma_m16n8<cuda_on_host::Bf16>(d, a, b, site);
}
inline void mma_fp16(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2],
                     cuda_on_host::Site site = cuda_on_host::Site::here()) {
  cuda_on_host::mma_m16n8<cuda_on_host::Fp16>(d, a, b, site);
}
#endif

}  // namespace l2l::ptx
