// The only place with inline PTX: thin wrappers, and the host twins that stand in for them on the CPU.
//
// The approximate functions flush denormals (.ftz). Their errors, from the PTX ISA: ex2 2^-22.5 relative; rcp 2^-23
// relative; lg2 2^-22, absolute in (0.5, 2) and relative elsewhere. Fragments of mma and ldmatrix are laid out as the
// PTX ISA says in "Warp-level matrix multiply-accumulate instructions".
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "compat.cuh"

#if defined(__CUDACC__)

namespace l2l {
namespace ptx {

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float rcp(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Copies Bytes (4, 8 or 16) from global to shared memory, or zeros if not valid; both addresses multiples of Bytes. The
// copy has landed after cp_async_wait; before compute capability 8.0 it lands at once.
template <int Bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#if L2L_CUDA_ARCH >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int present = valid ? Bytes : 0;
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(present) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(Bytes), "r"(present)
                 : "memory");
#else
  if constexpr (Bytes == 16)
    *static_cast<int4*>(shared) = valid ? *static_cast<const int4*>(global) : make_int4(0, 0, 0, 0);
  else if constexpr (Bytes == 8)
    *static_cast<int2*>(shared) = valid ? *static_cast<const int2*>(global) : make_int2(0, 0);
  else
    *static_cast<int*>(shared) = valid ? *static_cast<const int*>(global) : 0;
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if L2L_CUDA_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most GroupsLeft of the thread's committed groups are in flight. Other threads see the data after a
// barrier.
template <int GroupsLeft>
__device__ __forceinline__ void cp_async_wait() {
#if L2L_CUDA_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(GroupsLeft) : "memory");
#endif
}

// Count 8 x 8 matrices of 16-bit elements; lanes 8j .. 8j + 7 give the addresses of the rows of matrix j.
template <int Count, bool Transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&d)[Count], const void* row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "ldmatrix loads 1, 2 or 4 matrices");
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
  if constexpr (Count == 1 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(address) : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(d[0]) : "r"(address) : "memory");
  else if constexpr (Count == 2 && !Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(d[0]), "=r"(d[1])
                 : "r"(address)
                 : "memory");
  else if constexpr (!Transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(address)
                 : "memory");
}

// Compute capability 8.0 and later. Where it is lower these are not declared, so that using them does not compile.
#if L2L_CUDA_ARCH >= 800 || L2L_CUDA_ARCH == 0
// Rounds to tf32, ties away from zero; mma_tf32 by itself would cut off.
__device__ __forceinline__ unsigned to_tf32(float x) {
  unsigned y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// d += a b with a 16 x depth by rows, b depth x 8 by columns.
#define L2L_MMA(name, shape_and_types)                                                                  \
  __device__ __forceinline__ void name(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) { \
    asm volatile("mma.sync.aligned." shape_and_types                                                    \
                 " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                   \
  }
L2L_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
L2L_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
L2L_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
#undef L2L_MMA
#endif

}  // namespace ptx
}  // namespace l2l

#else
#include <cuda_on_host/ptx.h>
#endif
