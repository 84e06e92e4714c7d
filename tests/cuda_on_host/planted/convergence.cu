// Threads that do not meet where they must: barriers, shuffles, grid synchronization.
#include "planted.h"

template <bool Fixed>
__global__ void two_barriers(float* y) {
  if (Fixed || threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  y[threadIdx.x] = 1.f;
}
PLANTED(different_barriers) {
  DeviceVector<float> out(64);
  LAUNCH_EITHER(two_barriers, 1, 64, 0, out.data());
}

template <bool Fixed>
__global__ void conditional_barrier(float* y) {
  if (Fixed || threadIdx.x < 16) __syncthreads();
  y[threadIdx.x] = 1.f;
}
PLANTED(barrier_not_reached_by_all) {
  DeviceVector<float> out(32);
  LAUNCH_EITHER(conditional_barrier, 1, 32, 0, out.data());
}

template <bool Fixed>
__global__ void early_return(float* y, int n) {
  const int i = static_cast<int>(threadIdx.x);
  if (!Fixed && i >= n) return;
  __syncthreads();
  if (i < n) y[i] = 1.f;
}
PLANTED(barrier_after_an_exit) {
  DeviceVector<float> out(50);
  LAUNCH_EITHER(early_return, 1, 64, 0, out.data(), 50);
}

template <bool Fixed>
__global__ void half_warp(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  float v = x[t];
  if (t < 16) v += __shfl_down_sync(Fixed ? 0x0000ffffu : 0xffffffffu, v, 8, 16);
  y[t] = v;
}
PLANTED(mask_of_lanes_that_do_not_come) {
  DeviceVector<float> in(random_values(32)), out(32);
  LAUNCH_EITHER(half_warp, 1, 32, 0, in.data(), out.data());
}

template <bool Fixed>
__global__ void outside_the_mask(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  float v = x[t];
  if (t < 16) v = __shfl_sync(0x0000ffffu, v, Fixed ? 15 : 16);
  y[t] = v;
}
PLANTED(shuffle_from_outside_its_mask) {
  DeviceVector<float> in(random_values(32)), out(32);
  LAUNCH_EITHER(outside_the_mask, 1, 32, 0, in.data(), out.data());
}

template <bool Fixed>
__global__ void not_in_the_mask(unsigned* y) {
  const unsigned t = threadIdx.x;
  y[t] = __ballot_sync(Fixed ? (t < 16 ? 0x0000ffffu : 0xffff0000u) : 0x0000ffffu, t % 2 == 0);
}
PLANTED(lane_outside_its_own_mask) {
  DeviceVector<unsigned> out(32);
  LAUNCH_EITHER(not_in_the_mask, 1, 32, 0, out.data());
}

template <bool Fixed>
__global__ void ragged_warp(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  y[t] = __shfl_xor_sync(Fixed && t >= 32 ? 0x0000ffffu : 0xffffffffu, x[t], 1);
}
PLANTED(lanes_that_do_not_exist) {
  DeviceVector<float> in(random_values(48)), out(48);
  LAUNCH_EITHER(ragged_warp, 1, 48, 0, in.data(), out.data());
}

template <bool Fixed>
__global__ void exited_lanes(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  const float v = x[t];
  if (!Fixed && t >= 24) return;
  y[t] = __shfl_xor_sync(0xffffffffu, v, 1);
}
PLANTED(shuffle_with_exited_lanes) {
  DeviceVector<float> in(random_values(32)), out(32);
  LAUNCH_EITHER(exited_lanes, 1, 32, 0, in.data(), out.data());
}

template <bool Fixed>
__global__ void different_operations(const float* x, float* y) {
  const unsigned t = threadIdx.x;
  float v = x[t];
  if (Fixed || t < 16)
    v = __shfl_sync(0xffffffffu, v, 0);
  else
    v = static_cast<float>(__ballot_sync(0xffffffffu, 1));
  y[t] = v;
}
PLANTED(different_warp_operations) {
  DeviceVector<float> in(random_values(32)), out(32);
  LAUNCH_EITHER(different_operations, 1, 32, 0, in.data(), out.data());
}

// Both halves wait for the other in another place.
template <bool Fixed>
__global__ void cross_wait(float* y) {
  const unsigned t = threadIdx.x;
  if (Fixed || t < 16) {
    __syncwarp();
    __syncthreads();
  } else {
    __syncthreads();
    __syncwarp();
  }
  y[t] = 1.f;
}
PLANTED(deadlock) {
  DeviceVector<float> out(32);
  LAUNCH_EITHER(cross_wait, 1, 32, 0, out.data());
}

// Waits for a flag that is never set.
template <bool Fixed>
__global__ void wait_for_flag(int* flag) {
  if (Fixed && threadIdx.x == 1) atomicExch(flag, 1);
  if (threadIdx.x == 0)
    while (atomicAdd(flag, 0) == 0) __nanosleep(100);
}
PLANTED(endless_wait) {
  DeviceVector<int> flag(std::vector<int>(1, 0));
  LAUNCH_EITHER(wait_for_flag, 1, 2, 0, flag.data());
}

__global__ void synchronize_grid(float* y) {
  y[threadIdx.x] = 1.f;
  cg::this_grid().sync();
}
PLANTED(grid_sync_without_cooperative_launch) {
  DeviceVector<float> out(32);
  CUDA(harness::launch(IS_FIXED, synchronize_grid, 1, 32, 0, out.data()));
}

template <bool Fixed>
__global__ void leave_before_grid_sync(float* y) {
  if (!Fixed && blockIdx.x == 1) return;
  cg::this_grid().sync();
  y[blockIdx.x * 32 + threadIdx.x] = 1.f;
}
PLANTED(grid_sync_not_reached_by_all) {
  DeviceVector<float> out(64);
  LAUNCH_EITHER_COOPERATIVE(leave_before_grid_sync, 2, 32, 0, out.data());
}
