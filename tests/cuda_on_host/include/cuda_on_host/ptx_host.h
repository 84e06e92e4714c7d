// Host twins of the inline PTX in csrc/cuda/ptx.cuh: cp.async, ldmatrix, mma.sync. Fragment layouts follow the PTX ISA,
// section "Warp-level matrix multiply-accumulate instructions".
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../cuda_bf16.h"
#include "../cuda_fp16.h"
#include "interface.h"
#include "warp_intrinsics.h"

namespace cuda_on_host {

// ---- cp.async
template <unsigned Bytes>
struct alignas(Bytes) CopyUnit {
  unsigned char bytes[Bytes];
};

template <unsigned Bytes>
inline void land_unit(const AsyncCopy& copy) {
  CopyUnit<Bytes> unit{};
  if (copy.present == Bytes)
    unit = *static_cast<const CopyUnit<Bytes>*>(copy.source);
  else
    for (unsigned i = 0; i < copy.present; ++i) unit.bytes[i] = static_cast<const unsigned char*>(copy.source)[i];
  *static_cast<CopyUnit<Bytes>*>(copy.destination) = unit;
}

inline void land(const AsyncCopy& copy) {
  if (copy.bytes == 16)
    land_unit<16>(copy);
  else if (copy.bytes == 8)
    land_unit<8>(copy);
  else
    land_unit<4>(copy);
}

// Until the copy lands its destination holds garbage, so it is poisoned at once: whoever still reads the old content,
// or already reads the new one, gets NaN.
template <unsigned Bytes>
inline void cp_async(void* shared, const void* global, unsigned present, Site site) {
  const AsyncCopy copy{shared, global, Bytes, present < Bytes ? present : Bytes};
  const bool now = async_copy_issue(copy, site);
  CopyUnit<Bytes> poison;
  std::memset(poison.bytes, 0xFF, Bytes);
  *static_cast<CopyUnit<Bytes>*>(shared) = poison;
  note_undefined(shared, Bytes);
  if (now) land(copy);
}

inline void cp_async_commit() { async_copy_commit(); }

inline void cp_async_wait(int groups_left) {
  AsyncCopy copy;
  while (async_copy_next(groups_left, &copy)) land(copy);
}

// ---- matrices
struct Fragments {
  uint32_t a[4], b[2];
};

// Element (row, k) of A and (k, column) of B, from the fragments of the lanes that hold them.
template <class Format>
inline float element_of_a(const LaneSlot* slots, int row, int k) {
  const auto f = deposit_of<Fragments>(slots, static_cast<unsigned>((row & 7) * 4 + Format::lane_of(k)));
  return Format::decode(f.a[(row >> 3) + 2 * Format::half_of(k)], k);
}
template <class Format>
inline float element_of_b(const LaneSlot* slots, int k, int column) {
  const auto f = deposit_of<Fragments>(slots, static_cast<unsigned>(column * 4 + Format::lane_of(k)));
  return Format::decode(f.b[Format::half_of(k)], k);
}

struct Tf32 {  // one element a register; only the upper 19 bits are used
  static constexpr int depth = 8;
  static int lane_of(int k) { return k & 3; }
  static int half_of(int k) { return k >> 2; }
  static float decode(uint32_t word, int) { return bit_cast<float>(word & 0xFFFFE000u); }
};
struct Bf16 {  // two elements a register, the lower k in the lower half
  static constexpr int depth = 16;
  static int lane_of(int k) { return (k & 7) >> 1; }
  static int half_of(int k) { return k >> 3; }
  static float decode(uint32_t word, int k) {
    return bfloat16_bits_to_float(static_cast<uint16_t>(k & 1 ? word >> 16 : word));
  }
};
struct Fp16 : Bf16 {
  static float decode(uint32_t word, int k) {
    return half_bits_to_float(static_cast<uint16_t>(k & 1 ? word >> 16 : word));
  }
};

// The sum of the terms as tensor cores form it, of which the PTX ISA promises little: the exact terms are brought to
// the exponent of the largest, where what lies below a float's last bit is cut off, and so is what the sum has below
// its own (Fasi et al. 2021, "Numerical behavior of NVIDIA tensor cores"; GPUs from 8.0 on keep a bit or more beyond
// it, so this errs by as much as any does, or more).
template <size_t N>
inline float cut_sum(const double (&terms)[N]) {
  double largest = 0, sum = 0;
  bool finite = true;
  for (double term : terms) {
    finite = finite && std::isfinite(term);
    largest = std::fmax(largest, std::fabs(term));
    sum += term;
  }
  if (!finite || largest == 0) return static_cast<float>(sum);
  int exponent;
  std::frexp(largest, &exponent);
  const double unit = std::ldexp(1.0, exponent - 24);
  sum = 0;
  for (double term : terms) sum += std::trunc(term / unit) * unit;
  const float nearest = static_cast<float>(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafter(nearest, 0.f) : nearest;
}

// d += a b.
template <class Format>
inline void mma_m16n8(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  const Fragments mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const LaneSlot* slots = warp_exchange(0xffffffffu, Collective::matrix, &mine, sizeof mine, site);
  const int group = static_cast<int>(lane_index() >> 2), pair = static_cast<int>(lane_index() & 3u);
  for (int i = 0; i < 4; ++i) {
    const int row = group + (i >> 1) * 8, column = 2 * pair + (i & 1);
    double terms[Format::depth + 1];
    terms[Format::depth] = d[i];
    for (int k = 0; k < Format::depth; ++k)
      terms[k] = static_cast<double>(element_of_a<Format>(slots, row, k)) * element_of_b<Format>(slots, k, column);
    d[i] = cut_sum(terms);
  }
}

// ldmatrix.sync.aligned.m8n8.x{Count}.shared.b16: lanes 8j..8j+7 give the addresses of the rows of matrix j.
template <int Count, bool Transposed>
inline void ldmatrix(uint32_t (&d)[Count], const void* row, Site site) {
  if (lane_index() < 8u * Count && reinterpret_cast<uintptr_t>(row) % 16 != 0)
    device_error(716, site, "ldmatrix row address %p is not a multiple of 16", row);
  const LaneSlot* slots = warp_exchange(0xffffffffu, Collective::matrix, &row, sizeof row, site);
  const unsigned lane = lane_index();
  for (unsigned j = 0; j < Count; ++j) {
    uint32_t halves[2];
    for (unsigned e = 0; e < 2; ++e) {
      const unsigned r = Transposed ? 2 * (lane & 3u) + e : lane >> 2, c = Transposed ? lane >> 2 : 2 * (lane & 3u) + e;
      halves[e] = deposit_of<const uint16_t*>(slots, 8 * j + r)[c];
    }
    d[j] = halves[0] | halves[1] << 16;
  }
}

}  // namespace cuda_on_host
