// The kernels behind a C interface, for kernels.py. Lists of tensors come as streams of 64-bit numbers.
#include "cuda/operations.cuh"

namespace {

using namespace l2l;

struct Memory {
  std::vector<void*> blocks;
  cudaError_t error = cudaSuccess;

  void* allocate(size_t bytes) {
    void* p = nullptr;
    const cudaError_t result = cudaMalloc(&p, bytes);
    if (result != cudaSuccess) error = result;
    blocks.push_back(p);
    return p;
  }
  Workspace workspace() {
    return {[this](size_t bytes) { return allocate(bytes); },
            [this](const std::vector<int64_t>& words) {
              int64_t* to = static_cast<int64_t*>(allocate(8 * words.size()));
              const cudaError_t result = upload_table(words, to, nullptr);
              if (result != cudaSuccess) error = result;
              return static_cast<const int64_t*>(to);
            }};
  }
  ~Memory() {
    for (void* p : blocks) cudaFree(p);
  }
};

Config config_from(const int64_t* sizes, const float* constants) {
  Config c;
  c.hidden = static_cast<int>(sizes[0]);
  c.layers = static_cast<int>(sizes[1]);
  c.preprocess = static_cast<Preprocess>(sizes[2]);
  c.p = constants[0];
  c.output_scale = constants[1];
  return c;
}

template <class T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

// Reads "address, dtype" and views of the shape that follows.
template <class Entry>
View view_from(TableBuilder<Entry>& builder, const int64_t* tensor, int64_t dims, const int64_t* sizes,
               const int64_t* strides) {
  return builder.view(pointer<void>(tensor[0]), static_cast<Dtype>(tensor[1]), sizes, strides, dims);
}

}  // namespace

extern "C" {

// Per tensor: parameter address, dtype, gradient address, dtype, state, new state, record, dims, sizes, parameter
// strides, gradient strides. options: maximize, in place, mapping. scalars: p, output_scale, lr, decay.
int step(const int64_t* sizes, const float* scalars, const float* phi, const int64_t* options, int64_t tensors,
         const int64_t* stream) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<StepEntry> builder;
  int64_t tiles = 0;
  for (int64_t k = 0; k < tensors; k++) {
    const int64_t dims = stream[7];
    const int64_t* shape = stream + 8;
    int64_t numel = 1;
    for (int64_t d = 0; d < dims; d++) numel *= shape[d];
    if (numel > 0) {
      tiles += tiles_for(numel);
      const View param = view_from(builder, stream, dims, shape, shape + dims);
      const View grad = view_from(builder, stream + 2, dims, shape, shape + 2 * dims);
      builder.add(
          {tiles, numel, param, grad, pointer<float>(stream[4]), pointer<float>(stream[5]), pointer<float>(stream[6])});
    }
    stream = shape + 3 * dims;
  }
  Memory memory;
  StepOptions o;
  o.maximize = options[0] != 0;
  o.in_place = options[1] != 0;
  o.mapping = static_cast<StepMapping>(options[2]);
  o.lr = scalars[2];
  o.decay = scalars[3];
  return run_step(config, phi, builder, o, memory.workspace(), nullptr);
}

// Per tensor: numel, record tile, state, gradient of the end state, gradient of the start state. Per step and for
// theta_T: record in `records`, weight, lr, decay in `coefficients`.
int segment_backward(const int64_t* sizes, const float* scalars, const float* phi, int64_t tensors,
                     const int64_t* stream, int64_t steps, const int64_t* records, const float* coefficients,
                     float* grad_phi, int64_t scratch_budget) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<BackwardEntry> builder;
  int64_t tiles = 0;
  for (int64_t k = 0; k < tensors; k++, stream += 5)
    if (stream[0] > 0)
      builder.add({tiles += tiles_for(stream[0]), stream[0], stream[1], pointer<float>(stream[2]),
                   pointer<float>(stream[3]), pointer<float>(stream[4])});
  std::vector<SegmentStep> segment;
  for (int64_t t = 0; t <= steps; t++)
    segment.push_back(
        {pointer<float>(records[t]), coefficients[3 * t], coefficients[3 * t + 1], coefficients[3 * t + 2], 0.f});
  Memory memory;
  return run_segment_backward(config, phi, builder, segment, grad_phi, memory.workspace(), nullptr,
                              scratch_budget > 0 ? scratch_budget : kScratchBudget);
}

// The stream: gradient address, dtype, upstream gradient address, dtype, address of the result, its dtype, state,
// gradient of the new state, gradient of the state, dims, sizes, strides of the gradient, strides of the upstream
// gradient.
int step_backward(const int64_t* sizes, const float* scalars, const float* phi, const int64_t* stream,
                  float* grad_phi) {
  const Config config = config_from(sizes, scalars);
  const int64_t dims = stream[9];
  const int64_t* shape = stream + 10;
  TableBuilder<GatherEntry> views;
  StepBackward b{};
  b.numel = 1;
  for (int64_t d = 0; d < dims; d++) b.numel *= shape[d];
  b.grad = view_from(views, stream, dims, shape, shape + dims);
  b.grad_update = view_from(views, stream + 2, dims, shape, shape + 2 * dims);
  b.grad_grad = {pointer<void>(stream[4]), static_cast<Dtype>(stream[5]), -1};
  b.state = pointer<float>(stream[6]);
  b.grad_new_state = pointer<float>(stream[7]);
  b.grad_state = pointer<float>(stream[8]);
  Memory memory;
  return run_step_backward(config, phi, views, b, grad_phi, memory.workspace(), nullptr);
}

// functions: 0 exp2, 1 sigmoid_scaled, 2 tanh_scaled, 3 log, 4 exp2_minus_1.
__global__ void math_kernel(int function, const float* x, float* y, int n) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  switch (function) {
    case 0:
      y[i] = DeviceMath::exp2(x[i]);
      break;
    case 1:
      y[i] = DeviceMath::sigmoid_scaled(x[i]);
      break;
    case 2:
      y[i] = DeviceMath::tanh_scaled(DeviceMath::min(kTanhBound, x[i]));
      break;
    case 3:
      y[i] = DeviceMath::log(x[i]);
      break;
    default:
      y[i] = DeviceMath::exp2_minus_1(DeviceMath::min(kTanhBound, x[i]));
  }
}

int math(int64_t function, const float* x, float* y, int64_t n) {
  return launch(&math_kernel, static_cast<int>((n + 127) / 128), 128, 0, nullptr, static_cast<int>(function), x, y,
                static_cast<int>(n));
}
}
