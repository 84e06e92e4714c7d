// The built-in vector types, with CUDA's alignments, and the index types.
#pragma once

#define CUDA_ON_HOST_VECTORS(type, base, align2, align4)                         \
  struct type##1 { base x; };                                                    \
  struct alignas(align2) type##2 { base x, y; };                                 \
  struct type##3 { base x, y, z; };                                              \
  struct alignas(align4) type##4 { base x, y, z, w; };                           \
  constexpr type##1 make_##type##1(base x) { return {x}; }                       \
  constexpr type##2 make_##type##2(base x, base y) { return {x, y}; }            \
  constexpr type##3 make_##type##3(base x, base y, base z) { return {x, y, z}; } \
  constexpr type##4 make_##type##4(base x, base y, base z, base w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(char, signed char, 2, 4)
CUDA_ON_HOST_VECTORS(uchar, unsigned char, 2, 4)
CUDA_ON_HOST_VECTORS(short, short, 4, 8)
CUDA_ON_HOST_VECTORS(ushort, unsigned short, 4, 8)
CUDA_ON_HOST_VECTORS(int, int, 8, 16)
CUDA_ON_HOST_VECTORS(uint, unsigned int, 8, 16)
CUDA_ON_HOST_VECTORS(longlong, long long, 16, 16)
CUDA_ON_HOST_VECTORS(ulonglong, unsigned long long, 16, 16)
CUDA_ON_HOST_VECTORS(float, float, 8, 16)
CUDA_ON_HOST_VECTORS(double, double, 16, 16)
#undef CUDA_ON_HOST_VECTORS

struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
  constexpr operator uint3() const { return {x, y, z}; }
};

// Constant for as long as a device thread runs; the runtime sets them at every switch.
extern uint3 threadIdx;
extern uint3 blockIdx;
extern dim3 blockDim;
extern dim3 gridDim;
constexpr int warpSize = 32;
