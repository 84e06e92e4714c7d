// The kernels with global averaging cells behind a C interface, for gac_kernels.py.
#include "cuda/gac_operations.cuh"

namespace {

using namespace l2l;

struct Memory {
  std::vector<void*> blocks;

  void* allocate(size_t bytes) {
    void* p = nullptr;
    cudaMalloc(&p, bytes);
    blocks.push_back(p);
    return p;
  }
  Workspace workspace() {
    return {[this](size_t bytes) { return allocate(bytes); },
            [this](const std::vector<int64_t>& words) {
              int64_t* to = static_cast<int64_t*>(allocate(8 * words.size()));
              upload_table(words, to, nullptr);
              return static_cast<const int64_t*>(to);
            }};
  }
  ~Memory() {
    for (void* p : blocks) cudaFree(p);
  }
};

Config config_from(const int64_t* sizes, const float* scalars) {
  Config config;
  config.hidden = static_cast<int>(sizes[0]);
  config.layers = static_cast<int>(sizes[1]);
  config.preprocess = static_cast<Preprocess>(sizes[2]);
  config.gac = static_cast<int>(sizes[3]);
  config.extra = static_cast<int>(sizes[4]);
  config.outputs = static_cast<int>(sizes[5]);
  config.p = scalars[0];
  config.output_scale = scalars[1];
  return config;
}

}  // namespace

extern "C" {

// sizes: hidden, layers, log_sign, gac, extra, outputs, groups, maximize, in place, first phase, last phase.
// scalars: p, output_scale, lr, decay. Per tensor in `stream`: parameter address, dtype, gradient address, dtype,
// state, new state, record, numel; contiguous all of them.
int gac_step(const int64_t* sizes, const float* scalars, const float* phi, int64_t tensors, const int64_t* stream,
             const float* extra, float* out, float* means, double* sums) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<GacEntry> builder;
  int64_t tiles = 0, first = 0;
  for (int64_t k = 0; k < tensors; k++, stream += 8) {
    const int64_t numel = stream[7], one = 1;
    if (numel == 0) continue;
    const auto view = [&](const int64_t* at) {
      return builder.view(reinterpret_cast<void*>(at[0]), static_cast<Dtype>(at[1]), &numel, &one, 1);
    };
    tiles += tiles_for(numel);
    builder.add({{tiles, numel, view(stream), view(stream + 2), reinterpret_cast<const float*>(stream[4]),
                  reinterpret_cast<float*>(stream[5]), reinterpret_cast<float*>(stream[6])},
                 first});
    first += numel;
  }
  GacOptions options;
  options.groups = sizes[6];
  options.maximize = sizes[7] != 0;
  options.in_place = sizes[8] != 0;
  options.first_phase = static_cast<int>(sizes[9]);
  options.last_phase = static_cast<int>(sizes[10]);
  options.lr = scalars[2];
  options.decay = scalars[3];
  options.extra = extra;
  options.out = out;
  options.means = means;
  options.sums = sums;
  Memory memory;
  return run_gac_step(config, phi, builder, first, options, memory.workspace(), nullptr);
}

// sizes: hidden, layers, log_sign, gac, extra, outputs, groups. Per tensor: numel, record tile, state, gradient of the
// end state, gradient of the start state. Per step and for theta_T: record, and weight, lr, decay in `coefficients`.
int gac_segment_backward(const int64_t* sizes, const float* scalars, const float* phi, int64_t tensors,
                         const int64_t* stream, int64_t steps, const int64_t* records, const int64_t* averages,
                         const float* coefficients, float* grad_phi) {
  const Config config = config_from(sizes, scalars);
  TableBuilder<GacBackwardEntry> builder;
  int64_t tiles = 0;
  for (int64_t k = 0; k < tensors; k++, stream += 5)
    if (stream[0] > 0)
      builder.add({tiles += tiles_for(stream[0]), stream[0], stream[1], reinterpret_cast<const float*>(stream[2]),
                   reinterpret_cast<const float*>(stream[3]), reinterpret_cast<float*>(stream[4])});
  std::vector<SegmentStep> segment;
  std::vector<const float*> means;
  for (int64_t t = 0; t <= steps; t++) {
    segment.push_back({reinterpret_cast<const float*>(records[t]), coefficients[3 * t], coefficients[3 * t + 1],
                       coefficients[3 * t + 2], 0.f});
    if (t < steps) means.push_back(reinterpret_cast<const float*>(averages[t]));
  }
  Memory memory;
  return run_gac_segment_backward(config, phi, builder, segment, means, sizes[6], grad_phi, GacBackwardScalars{},
                                  memory.workspace(), nullptr);
}

// addresses: gradient, its dtype, extra, gradient of the outputs, state, gradient of the new state; results: gradient
// of the gradient (its dtype), of extra, of the state. numel coordinates, contiguous.
int gac_step_backward(const int64_t* sizes, const float* scalars, const float* phi, const int64_t* addresses,
                      int64_t numel, float* grad_phi) {
  const Config config = config_from(sizes, scalars);
  const auto dtype = static_cast<Dtype>(addresses[1]);
  const auto floats = [&](int i) { return reinterpret_cast<float*>(addresses[i]); };
  const GacStepBackward b{numel,     {floats(0), dtype, -1}, floats(2), floats(3), floats(4),
                          floats(5), {floats(6), dtype, -1}, floats(7), floats(8)};
  Memory memory;
  return run_gac_step_backward(config, phi, TableBuilder<GatherEntry>{}, b, sizes[6], grad_phi, memory.workspace(),
                               nullptr);
}
}
