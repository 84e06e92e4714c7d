// Products on tensor cores by csrc/cuda/mma_products.cuh, done wrongly: fragments, splitting, lanes that do not
// come.
#include "cuda/mma_products.cuh"
#include "planted.h"

namespace {

// D [16 x 8] = X [16 x 8] W [8 x 8] by one warp, of two coordinates per lane. Coordinate c of the kernel is row c / 2
// of D, and c % 2 * 8 further down: that is where a multiplication takes lanes' first and second coordinates to.
struct Operands {
  unsigned large[2][2], small[2][2];  // of X: groups of four inputs, coordinates
  unsigned w_large[2], w_small[2];    // of W
};

__device__ Operands load_operands(const float* x, const float* w) {
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Operands result;
  for (unsigned q = 0; q < 2; ++q) {
    for (unsigned i = 0; i < 2; ++i) l2l::split(x[(g + 8 * i) * 8 + 4 * q + t], result.large[q][i], result.small[q][i]);
    l2l::split(w[(4 * q + t) * 8 + g], result.w_large[q], result.w_small[q]);
  }
  return result;
}

__device__ void store_product(const float (&acc)[1][4], float* d) {
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (unsigned i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[0][i];
}

__device__ void multiply(float (&acc)[1][4], const Operands& o) {
  l2l::multiply_add<2>(acc, o.small[0], o.small[1], o.w_large[0], o.w_large[1]);
  l2l::multiply_add<2>(acc, o.large[0], o.large[1], o.w_small[0], o.w_small[1]);
  l2l::multiply_add<2>(acc, o.large[0], o.large[1], o.w_large[0], o.w_large[1]);
}

using ProductKernel = void (*)(const float*, const float*, float*);

// The product must be as good as one of float32, 2^-20 of the sum of its terms' magnitudes.
void check_product(ProductKernel kernel) {
  const auto x = random_values(128, 1), w = random_values(64, 2);
  DeviceVector<float> dx(x), dw(w), out(128);
  CUDA(harness::launch(false, kernel, 1, 32, 0, dx.data(), dw.data(), out.data()));
  for (size_t i = 0; i < 16; ++i)
    for (size_t j = 0; j < 8; ++j) {
      double sum = 0, magnitude = 0;
      for (size_t k = 0; k < 8; ++k) {
        const double term = static_cast<double>(x[i * 8 + k]) * w[k * 8 + j];
        sum += term, magnitude += std::fabs(term);
      }
      EXPECT_NEAR(out.host()[i * 8 + j], sum, magnitude * 0x1p-20);
    }
}

}  // namespace

template <bool Fixed>
__global__ void swap_rows(const float* x, const float* w, float* d) {
  Operands o = load_operands(x, w);
  if (!Fixed)
    for (unsigned q = 0; q < 2; ++q) {
      const unsigned large = o.large[q][0], small = o.small[q][0];
      o.large[q][0] = o.large[q][1], o.small[q][0] = o.small[q][1];
      o.large[q][1] = large, o.small[q][1] = small;
    }
  float acc[1][4] = {};
  multiply(acc, o);
  store_product(acc, d);
}
PLANTED(swapped_fragment_rows) { check_product(IS_FIXED ? swap_rows<true> : swap_rows<false>); }

template <bool Fixed>
__global__ void swap_groups(const float* x, const float* w, float* d) {
  Operands o = load_operands(x, w);
  if (!Fixed) {
    const unsigned large = o.w_large[0], small = o.w_small[0];
    o.w_large[0] = o.w_large[1], o.w_small[0] = o.w_small[1];
    o.w_large[1] = large, o.w_small[1] = small;
  }
  float acc[1][4] = {};
  multiply(acc, o);
  store_product(acc, d);
}
PLANTED(swapped_fragment_columns) { check_product(IS_FIXED ? swap_groups<true> : swap_groups<false>); }

template <bool Fixed>
__global__ void without_small_inputs(const float* x, const float* w, float* d) {
  Operands o = load_operands(x, w);
  if (!Fixed)
    for (unsigned q = 0; q < 2; ++q) o.small[q][0] = o.small[q][1] = 0;
  float acc[1][4] = {};
  multiply(acc, o);
  store_product(acc, d);
}
PLANTED(missing_small_inputs) { check_product(IS_FIXED ? without_small_inputs<true> : without_small_inputs<false>); }

template <bool Fixed>
__global__ void without_small_weights(const float* x, const float* w, float* d) {
  Operands o = load_operands(x, w);
  if (!Fixed) o.w_small[0] = o.w_small[1] = 0;
  float acc[1][4] = {};
  multiply(acc, o);
  store_product(acc, d);
}
PLANTED(missing_small_weights) { check_product(IS_FIXED ? without_small_weights<true> : without_small_weights<false>); }

// The operands of a multiplication as they are: their lowest bits are not read.
template <bool Fixed>
__global__ void unsplit(const float* x, const float* w, float* d) {
  const unsigned lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  Operands o = load_operands(x, w);
  if (!Fixed)
    for (unsigned q = 0; q < 2; ++q) {
      for (unsigned i = 0; i < 2; ++i) {
        o.large[q][i] = __float_as_uint(x[(g + 8 * i) * 8 + 4 * q + t]);
        o.small[q][i] = 0;
      }
      o.w_large[q] = __float_as_uint(w[(4 * q + t) * 8 + g]);
      o.w_small[q] = 0;
    }
  float acc[1][4] = {};
  multiply(acc, o);
  store_product(acc, d);
}
PLANTED(operands_that_are_not_split) { check_product(IS_FIXED ? unsplit<true> : unsplit<false>); }

// As a loop over coordinates would whose end differs between lanes.
template <bool Fixed>
__global__ void half_the_lanes(const float* x, const float* w, float* d) {
  const Operands o = load_operands(x, w);
  float acc[1][4] = {};
  if (Fixed || threadIdx.x < 16) multiply(acc, o);
  store_product(acc, d);
}
PLANTED(multiplication_without_all_lanes) { check_product(IS_FIXED ? half_the_lanes<true> : half_the_lanes<false>); }

template <bool Fixed>
__global__ void two_places(const float* x, const float* w, float* d) {
  const Operands o = load_operands(x, w);
  float acc[1][4] = {};
  const unsigned a[4] = {o.large[0][0], o.large[0][1], o.large[1][0], o.large[1][1]};
  if (Fixed || threadIdx.x < 16)
    multiply(acc, o);
  else
    l2l::ptx::mma_tf32(acc[0], a, o.w_large);
  store_product(acc, d);
}
PLANTED(lanes_at_different_multiplications) { check_product(IS_FIXED ? two_places<true> : two_places<false>); }
