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

// sizes: hidden, layers, log_sign, gac, extra, outputs, problems. constants: p, output_scale.
Config config_from(const int64_t* sizes, const float* constants) {
  Config c;
  c.hidden = static_cast<int>(sizes[0]);
  c.layers = static_cast<int>(sizes[1]);
  c.preprocess = static_cast<Preprocess>(sizes[2]);
  c.gac = static_cast<int>(sizes[3]);
  c.extra = static_cast<int>(sizes[4]);
  c.outputs = static_cast<int>(sizes[5]);
  c.p = constants[0];
  c.output_scale = constants[1];
  return c;
}

// sizes: hidden, layers, tensor_inputs. constants: output_scale, the four rates.
Config normalized_config(const int64_t* sizes, const float* constants) {
  Config c;
  c.hidden = static_cast<int>(sizes[0]);
  c.layers = static_cast<int>(sizes[1]);
  c.preprocess = Preprocess::normalized;
  c.tensor_inputs = static_cast<int>(sizes[2]);
  c.output_scale = constants[0];
  for (int k = 0; k < kAverages; k++) c.rates.of[k] = constants[1 + k];
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

// Visits the tensors of a step that have coordinates. Of each the stream has "parameter, dtype, gradient, dtype, three
// words, dims, sizes, strides of the parameter, strides of the gradient" and `behind` words more:
// visit(numel, parameter, gradient, the three words, those behind).
template <class Entry, class Visit>
void visit_tensors(TableBuilder<Entry>& builder, int64_t tensors, const int64_t* stream, int64_t behind,
                   const Visit& visit) {
  for (int64_t k = 0; k < tensors; k++) {
    const int64_t dims = stream[7];
    const int64_t* shape = stream + 8;
    int64_t numel = 1;
    for (int64_t d = 0; d < dims; d++) numel *= shape[d];
    if (numel > 0)
      visit(numel, view_from(builder, stream, dims, shape, shape + dims),
            view_from(builder, stream + 2, dims, shape, shape + 2 * dims), stream + 4, shape + 3 * dims);
    stream = shape + 3 * dims + behind;
  }
}

// From "numel, record tile, state, gradient of the end state, gradient of the start state".
BackwardEntry backward_entry(int64_t& tiles, const int64_t* tensor) {
  return {tiles += tiles_for(tensor[0]), tensor[0], tensor[1], pointer<float>(tensor[2]), pointer<float>(tensor[3]),
          pointer<float>(tensor[4])};
}

std::vector<SegmentStep> segment_from(int64_t steps, const int64_t* records, const float* coefficients) {
  std::vector<SegmentStep> segment;
  for (int64_t t = 0; t <= steps; t++)
    segment.push_back(
        {pointer<float>(records[t]), coefficients[3 * t], coefficients[3 * t + 1], coefficients[3 * t + 2], 0.f});
  return segment;
}

// From the stream of step_backward.
StepBackward step_backward_from(TableBuilder<GatherEntry>& views, const int64_t* stream, int64_t problems) {
  const int64_t dims = stream[10];
  const int64_t* shape = stream + 11;
  StepBackward b{};
  b.numel = 1;
  for (int64_t d = 0; d < dims; d++) b.numel *= shape[d];
  b.problems = problems;
  b.grad = view_from(views, stream, dims, shape, shape + dims);
  b.grad_grad = {pointer<void>(stream[2]), static_cast<Dtype>(stream[3]), -1};
  b.extra = pointer<float>(stream[4]);
  b.grad_out = pointer<float>(stream[5]);
  b.state = pointer<float>(stream[6]);
  b.grad_new_state = pointer<float>(stream[7]);
  b.grad_extra = pointer<float>(stream[8]);
  b.grad_state = pointer<float>(stream[9]);
  return b;
}

}  // namespace

extern "C" {

// Per tensor: parameter address, dtype, gradient address, dtype, state, new state, record, dims, sizes, parameter
// strides, gradient strides. options: maximize, in place, mapping, first phase, last phase (0: the plain kernel).
// scalars: p, output_scale, lr, decay.
int step(const int64_t* sizes, const float* scalars, const float* phi, const int64_t* options, int64_t tensors,
         const int64_t* stream, const float* extra, float* out, float* means, double* sums) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<StepEntry> builder;
  LayeredScalars call{};
  int64_t tiles = 0;
  visit_tensors(builder, tensors, stream, 0,
                [&](int64_t numel, View param, View grad, const int64_t* own, const int64_t*) {
                  builder.add({tiles += tiles_for(numel), numel, param, grad, pointer<float>(own[0]),
                               pointer<float>(own[1]), pointer<float>(own[2]), call.total});
                  call.total += numel;
                });
  Memory memory;
  call.step = {config, {}, phi, 0, scalars[2], scalars[3], options[0] != 0, options[1] != 0, TableRef{}};
  call.problems = sizes[6];
  call.extra = extra;
  call.out = out;
  call.means = means;
  call.sums = sums;
  call.first_phase = static_cast<int>(options[3]);
  call.last_phase = static_cast<int>(options[4]);
  return run_step(call, builder, memory.workspace(), nullptr, static_cast<StepMapping>(options[2]));
}

// A network with normalized inputs. The stream as of `step`, and behind every tensor's strides its age and the
// addresses of its inputs and of its nominal vector. sizes, constants: see normalized_config. options: maximize, in
// place, mapping. scalars: lr, decay.
int normalized_step(const int64_t* sizes, const float* constants, const float* scalars, const float* phi,
                    const int64_t* options, int64_t tensors, const int64_t* stream) {
  const Config config = normalized_config(sizes, constants);
  TableBuilder<NormalizedStepEntry> builder;
  int64_t tiles = 0, total = 0;
  visit_tensors(builder, tensors, stream, 3,
                [&](int64_t numel, View param, View grad, const int64_t* own, const int64_t* common) {
                  builder.add({{tiles += tiles_for(numel), numel, param, grad, pointer<float>(own[0]),
                                pointer<float>(own[1]), pointer<float>(own[2]), total},
                               make_correction(config, common[0]),
                               pointer<float>(common[1]),
                               pointer<float>(common[2])});
                  total += numel;
                });
  Memory memory;
  const NormalizedStepScalars call{
      {config, {}, phi, 0, scalars[0], scalars[1], options[0] != 0, options[1] != 0, TableRef{}}, nullptr};
  return run_normalized_step(call, builder, memory.workspace(), nullptr, static_cast<StepMapping>(options[2]));
}

// A step in place where states are not float32. The stream: parameter, dtype, gradient, dtype, state, seed, record,
// dims, sizes, strides of the parameter, strides of the gradient, age, addresses of inputs and nominal vector. options:
// maximize, state type, whether it is a network with normalized inputs (sizes and constants as for each).
int stored_step(const int64_t* sizes, const float* constants, const float* scalars, const float* phi,
                const int64_t* options, int64_t tensors, const int64_t* stream) {
  const Config config = options[2] ? normalized_config(sizes, constants) : config_from(sizes, constants);
  TableBuilder<StoredStepEntry> builder;
  int64_t tiles = 0;
  visit_tensors(builder, tensors, stream, 3,
                [&](int64_t numel, View param, View grad, const int64_t* own, const int64_t* common) {
                  builder.add({tiles += tiles_for(numel), numel, param, grad, pointer<unsigned char>(own[0]),
                               static_cast<uint64_t>(own[1]), pointer<float>(own[2]),
                               options[2] ? make_correction(config, common[0]) : Correction{},
                               pointer<float>(common[1]), pointer<float>(common[2])});
                });
  Memory memory;
  const NormalizedStepScalars call{{config, {}, phi, 0, scalars[0], scalars[1], options[0] != 0, true, TableRef{}},
                                   nullptr};
  return run_stored_step(call, static_cast<StateType>(options[1]), builder, memory.workspace(), nullptr);
}

// Sums over tensors' coordinates. Per tensor: parameter, dtype, gradient, dtype, state, its type, age, dims, sizes,
// strides of the parameter, strides of the gradient. sizes, constants: see normalized_config. out: [tensors][6].
int tensor_sums(const int64_t* sizes, const float* constants, int64_t maximize, int64_t tensors, const int64_t* stream,
                double* out) {
  const Config config = normalized_config(sizes, constants);
  TableBuilder<SumsEntry> builder;
  int64_t slices = 0;
  for (int64_t k = 0; k < tensors; k++) {
    const int64_t dims = stream[7];
    const int64_t* shape = stream + 8;
    int64_t numel = 1;
    for (int64_t d = 0; d < dims; d++) numel *= shape[d];
    const StateType type = static_cast<StateType>(stream[5]);
    const TileLayout layout(config, type);
    const int64_t age = stream[6];
    builder.add({slices += slices_of(numel), numel, slice_of(numel),
                 view_from(builder, stream, dims, shape, shape + dims),
                 view_from(builder, stream + 2, dims, shape, shape + 2 * dims),
                 pointer<unsigned char>(stream[4]) + layout.averages, layout.bytes,
                 age > 1 ? make_correction(config, age - 1) : Correction{}, type != StateType::float32,
                 make_correction(config, age).of[2]});
    stream = shape + 3 * dims;
  }
  Memory memory;
  const SumsScalars scalars{0, {}, config.rates.of[2], maximize ? -1. : 1., nullptr, out};
  return run_tensor_sums(scalars, builder, memory.workspace(), nullptr);
}

// Per tensor: numel, record tile, state, gradient of the end state, gradient of the start state. Per step and for
// theta_T: record in `records`, weight, lr, decay in `coefficients`. averages: none, or an address per step.
int segment_backward(const int64_t* sizes, const float* scalars, const float* phi, int64_t tensors,
                     const int64_t* stream, int64_t steps, const int64_t* records, const int64_t* averages,
                     const float* coefficients, float* grad_phi, int64_t scratch_budget) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<BackwardEntry> builder;
  int64_t tiles = 0;
  for (int64_t k = 0; k < tensors; k++, stream += 5)
    if (stream[0] > 0) builder.add(backward_entry(tiles, stream));
  std::vector<const float*> means;
  for (int64_t t = 0; averages && t < steps; t++) means.push_back(pointer<float>(averages[t]));
  Memory memory;
  return run_segment_backward(config, phi, builder, segment_from(steps, records, coefficients), means, sizes[6],
                              grad_phi, memory.workspace(), nullptr, scratch_budget);
}

// The same of a network with normalized inputs. Per tensor also its age and the addresses of its inputs and its nominal
// vector in the first step; `tensors` rows of each in every step.
int normalized_segment_backward(const int64_t* sizes, const float* constants, const float* phi, int64_t tensors,
                                const int64_t* stream, int64_t steps, const int64_t* records, const float* coefficients,
                                float* grad_phi, int64_t scratch_budget) {
  NormalizedBackwardScalars scalars{};
  scalars.config = normalized_config(sizes, constants);
  scalars.phi = phi;
  scalars.inputs_stride = tensors * scalars.config.tensor_inputs;
  scalars.nominal_stride = tensors * kNominal;
  TableBuilder<NormalizedBackwardEntry> builder;
  int64_t tiles = 0;
  for (int64_t k = 0; k < tensors; k++, stream += 8)
    if (stream[0] > 0)
      builder.add({backward_entry(tiles, stream), stream[5], pointer<float>(stream[6]), pointer<float>(stream[7])});
  Memory memory;
  return run_backward(scalars, builder, segment_from(steps, records, coefficients), grad_phi, memory.workspace(),
                      nullptr, scratch_budget);
}

// The stream: gradient address, dtype, address of the result, its dtype, extra inputs, gradient of the outputs
// [outputs][numel], state, gradient of the new state; results: gradient of extra, of the state; dims, sizes, strides of
// the gradient.
int step_backward(const int64_t* sizes, const float* scalars, const float* phi, const int64_t* stream,
                  float* grad_phi) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<GatherEntry> views;
  const StepBackward b = step_backward_from(views, stream, sizes[6]);
  Memory memory;
  return run_step_backward(config, phi, views, b, grad_phi, memory.workspace(), nullptr);
}

// The same of a network with normalized inputs. tensor: its age, the addresses of its inputs and its nominal vector.
int normalized_step_backward(const int64_t* sizes, const float* constants, const float* phi, const int64_t* stream,
                             const int64_t* tensor, float* grad_phi) {
  TableBuilder<GatherEntry> views;
  const StepBackward b = step_backward_from(views, stream, 1);
  Memory memory;
  return run_normalized_step_backward(normalized_config(sizes, constants), phi, views, b, tensor[0],
                                      pointer<float>(tensor[1]), pointer<float>(tensor[2]), grad_phi,
                                      memory.workspace(), nullptr);
}

// First and last step + 1 of chunk k, for each of `count` chunks.
int chunk_steps(int64_t steps, int64_t chunk, int64_t count, int64_t* bounds) {
  for (int k = 0; k < count; k++) {
    const ChunkSteps own(static_cast<int>(steps), static_cast<int>(chunk), k);
    bounds[2 * k] = own.begin;
    bounds[2 * k + 1] = own.end;
  }
  return 0;
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
