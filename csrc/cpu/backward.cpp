// Back-propagation on the CPU, through one functional step and through a whole recorded segment. Of a plain network
// both are the same tile kernel: a step is a segment of length one with its upstream gradient given.
#include "backend.h"
#include "dispatch.h"
#include "strided.h"
#include "tensor_steps.h"
#include "tiles.h"

namespace l2l {
namespace {

// Runs body(place, scratch, sums) for every tile and writes d phi. `steps` is the segment's length.
template <class Body>
void sum_over_tiles(const Config& config, const Tiles& tiles, int steps, float* grad_phi, const Body& body) {
  const int64_t scratch_floats = kernels().backward_scratch(config, steps) / sizeof(float);
  PhiSums sums(config, tiles.slices());
  tiles.for_each_slice([&] { return scratch_of_thread(scratch_floats); },
                       [&](int64_t slice, int64_t begin, int64_t end, float* scratch) {
                         tiles.visit(begin, end,
                                     [&](const Tiles::Place& place) { body(place, scratch, sums.slice(slice)); });
                       });
  sums.write(grad_phi);
}

// Of one tile of a segment: the recorded gradients, and d loss / d update of every step.
struct TileSegment {
  std::vector<const float*> inputs;
  std::vector<float> upstream, masked;

  TileSegment(const std::vector<SegmentStep>& steps, int64_t offset, int count)
      : inputs(steps.size()), upstream((steps.size() - 1) * kTile) {
    const int last = static_cast<int>(steps.size()) - 1;
    if (count < kTile) masked.resize(steps.size() * kTile);
    for (int t = 0; t <= last; t++) {
      inputs[t] = steps[t].record + offset;
      if (count == kTile) continue;
      copy_lanes(inputs[t], 1, count, masked.data() + t * kTile);
      inputs[t] = masked.data() + t * kTile;
    }
    float adjoint[kTile] = {};
    for (int i = 0; i < kTile; i++) walk_back(steps[last], inputs[last][i], adjoint[i]);
    for (int t = last - 1; t >= 0; t--)
      for (int i = 0; i < kTile; i++) {
        const float du = walk_back(steps[t], inputs[t][i], adjoint[i]);
        upstream[t * kTile + i] = i < count ? du : 0.f;
      }
  }
};

}  // namespace

void cpu_step_backward(const StepBackwardCall& call) {
  const Config& config = call.config;
  if (!config.is_plain()) return layered_step_backward(call);
  const PackedNetwork net(config, call.phi.const_data_ptr<float>(), Direction::backward);
  const Kernels& kernel = kernels();
  const StridedView grads(call.grad), result(call.grad_grad);
  const int64_t rows = config.rows(), stride = tile_floats(config);
  Tiles tiles;
  tiles.add(call.numel);
  TensorSteps common(net, 1);
  if (config.averages() > 0) common.set(0, call.common);
  sum_over_tiles(config, tiles, 1, call.grad_phi, [&](const Tiles::Place& place, float* scratch, double* sums) {
    alignas(64) float g[kTile] = {}, du[kTile], dg[kTile];
    const int64_t begin = place.tile * kTile, state = place.tile * stride;
    grads.read(begin, place.count, g);
    copy_lanes(call.grad_out + begin, 1, place.count, du);
    std::vector<float> masked[2];
    const float* starts = without_padding(call.state + state, rows, place.count, masked[0]);
    const float* ends = without_padding(call.grad_new_state + state, rows, place.count, masked[1]);
    const float* steps[1] = {g};
    {
      FlushDenormals flush;
      kernel.backward(net.network(),
                      {1, place.count, steps, &common[0], du, starts, ends, call.grad_state + state, dg, sums},
                      scratch);
    }
    result.write(begin, place.count, dg);
  });
}

void cpu_segment_backward(const SegmentCall& call) {
  const Config& config = call.config;
  if (!config.is_plain()) return layered_segment_backward(call);
  const PackedNetwork net(config, call.phi.const_data_ptr<float>(), Direction::backward);
  const Kernels& kernel = kernels();
  const int64_t rows = config.rows(), stride = tile_floats(config);
  const Tiles tiles(call.tensors);
  const int steps = call.length();
  TensorSteps common(net, call.tensors.size() * steps);
  for (size_t k = 0; config.averages() > 0 && k < call.tensors.size(); k++)
    for (int t = 0; t < steps; t++) common.set(k * steps + t, call.tensors[k].common[t]);
  sum_over_tiles(config, tiles, steps, call.grad_phi, [&](const Tiles::Place& place, float* scratch, double* sums) {
    const SegmentTensor& tensor = call.tensors[place.tensor];
    const TileSegment segment(call.steps, (tensor.record_tile + place.tile) * kTile, place.count);
    const int64_t state = place.tile * stride;
    std::vector<float> masked[2];
    const float* start = without_padding(tensor.state + state, rows, place.count, masked[0]);
    const float* end =
        without_padding(tensor.grad_end ? tensor.grad_end + state : nullptr, rows, place.count, masked[1]);
    FlushDenormals flush;
    kernel.backward(net.network(),
                    {steps, place.count, segment.inputs.data(), &common[place.tensor * steps], segment.upstream.data(),
                     start, end, tensor.grad_start ? tensor.grad_start + state : nullptr, nullptr, sums},
                    scratch);
  });
}

}  // namespace l2l
