// cooperative_groups for g++: the grid and the block.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

class thread_block {
 public:
  void sync(cuda_on_host::Site site = cuda_on_host::Site::here()) const { __syncthreads(site); }
  static unsigned long long size() { return 1ull * blockDim.x * blockDim.y * blockDim.z; }
  static unsigned long long num_threads() { return size(); }
  static unsigned long long thread_rank() {
    return (1ull * threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  }
};

class grid_group {
 public:
  void sync(cuda_on_host::Site site = cuda_on_host::Site::here()) const { cuda_on_host::grid_barrier(site); }
  static bool is_valid() { return cuda_on_host::launch_is_cooperative(); }
  static unsigned long long num_blocks() { return 1ull * gridDim.x * gridDim.y * gridDim.z; }
  static unsigned long long block_rank() {
    return (1ull * blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  }
  static unsigned long long size() { return num_blocks() * thread_block::size(); }
  static unsigned long long num_threads() { return size(); }
  static unsigned long long thread_rank() { return block_rank() * thread_block::size() + thread_block::thread_rank(); }
};

inline thread_block this_thread_block() { return {}; }
inline grid_group this_grid() { return {}; }
template <class Group>
inline void sync(const Group& group, cuda_on_host::Site site = cuda_on_host::Site::here()) {
  group.sync(site);
}

}  // namespace cooperative_groups
