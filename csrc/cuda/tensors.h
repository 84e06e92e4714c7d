// What the operators on CUDA tensors share: checks, views of tensors, memory, errors. Of CUDA's side of PyTorch only
// c10.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../ops/backend.h"
#include "operations.cuh"
#include "switches.h"

namespace l2l {

inline void check_cuda_config(const Config& config) {
  TORCH_CHECK_VALUE(cuda_supports(config),
                    "hidden_size, num_layers: the CUDA kernels are compiled for hidden_size 4, 8, 16, 20, 32 ",
                    "and num_layers 1, 2, 3 (0 with hidden_size 0), got hidden_size=", config.hidden,
                    ", num_layers=", config.layers, "; other sizes run on the CPU (hidden_size ", kMinHidden, "..",
                    kMaxHidden, ") and in l2l_fast.reference, on any device");
}

inline void check_launch(const LaunchStatus& status, const char* name, const Config& config) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // so that it is not reported again by the next call
  TORCH_CHECK(false, "l2l_fast::", name, ": ", launch_failure(status, config));
}

// Whether the step on tensor cores is asked for. Read once.
inline bool tensor_cores_wanted() {
  static const bool wanted = [] {
    try {
      return environment_switch("L2L_FAST_TENSOR_CORES");
    } catch (const std::invalid_argument& error) {
      TORCH_CHECK_VALUE(false, error.what());
    }
  }();
  return wanted;
}

inline Dtype dtype_of(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat      ? Dtype::float32
         : tensor.scalar_type() == at::kBFloat16 ? Dtype::bfloat16
                                                 : Dtype::float16;
}

// A tensor in logical order. The kernels write through it only where the operator may.
template <class Entry>
View view_of(TableBuilder<Entry>& builder, const at::Tensor& tensor) {
  return builder.view(const_cast<void*>(tensor.const_data_ptr()), dtype_of(tensor), tensor.sizes().data(),
                      tensor.strides().data(), tensor.dim());
}

// Memory for one operator call on the current stream. The allocator reuses it in stream order, so that it may be let go
// when the call returns, and it becomes part of a graph that is being captured.
class CallMemory {
 public:
  explicit CallMemory(const at::Tensor& like) : options_(like.options().dtype(at::kByte)) {}

  Workspace workspace() {
    return {[this](size_t bytes) { return allocate(bytes); },
            [this](const std::vector<int64_t>& words) { return upload(words); }};
  }

 private:
  void* allocate(size_t bytes) {
    held_.push_back(at::empty({static_cast<int64_t>(bytes)}, options_));
    return held_.back().mutable_data_ptr();
  }

  // The last long table of each stream stays in device memory: while no tensor moves, nothing is uploaded. A graph gets
  // a table of its own, which nothing overwrites.
  const int64_t* upload(const std::vector<int64_t>& words) {
    struct Cached {
      std::vector<int64_t> words;
      at::Tensor device;
    };
    static std::mutex mutex;
    static std::map<std::pair<int, cudaStream_t>, Cached>& cache = *new std::map<std::pair<int, cudaStream_t>, Cached>;
    const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
    const bool capturing = c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
    const std::lock_guard<std::mutex> lock(mutex);
    if (!capturing) {
      const auto found = cache.find({stream.device_index(), stream.stream()});
      if (found != cache.end() && found->second.words == words) {
        held_.push_back(found->second.device);
        return static_cast<const int64_t*>(held_.back().const_data_ptr());
      }
    }
    int64_t* const device = static_cast<int64_t*>(allocate(8 * words.size()));
    const cudaError_t error = upload_table(words, device, stream.stream());
    TORCH_CHECK(error == cudaSuccess,
                "l2l_fast: the table of tensors could not be uploaded: ", cudaGetErrorString(error));
    if (!capturing) cache[{stream.device_index(), stream.stream()}] = {words, held_.back()};
    return device;
  }

  at::TensorOptions options_;
  std::vector<at::Tensor> held_;
};

}  // namespace l2l
