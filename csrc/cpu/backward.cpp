// Back-propagation on the CPU: through one functional step, and through a whole recorded segment. Both are the same
// tile kernel; a step is a segment of length one with its upstream gradient given.
//
// Tiles are cut into a fixed number of slices; a slice sums d phi in float64 in tile order and slices are added in
// order, whichever thread ran them: results are the same for any number of threads.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "packing.h"
#include "parallel.h"
#include "strided.h"

namespace l2l {
namespace {

constexpr int64_t kSlices = 64;

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<float, Free>;

Scratch allocate_scratch(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Scratch(static_cast<float*>(p));
}

// A state tile, or a copy of it in `copy` without what it holds beyond its last coordinate: that must reach nothing.
const float* mask_padding(const float* tile, int64_t rows, int count, std::vector<float>& copy) {
  if (!tile || count == kTile) return tile;
  copy.assign(tile, tile + rows * kTile);
  for (int64_t r = 0; r < rows; r++) std::fill(copy.begin() + r * kTile + count, copy.begin() + (r + 1) * kTile, 0.f);
  return copy.data();
}

// Runs body(tile, scratch, sums) for every tile and returns d phi. `steps` is the segment's length.
template <class Body>
at::Tensor sum_over_tiles(const Config& config, const at::Tensor& phi, int64_t tiles, int steps, const Body& body) {
  const int64_t slices = std::min(tiles, kSlices);
  const size_t size = gradient_size(config);
  const size_t scratch_bytes = kernels().backward_scratch(config, steps);
  std::vector<double> sums(size * std::max<int64_t>(slices, 1), 0.0);
  parallel_for(slices, 1, [&](int64_t begin, int64_t end) {
    const Scratch scratch = allocate_scratch(scratch_bytes);
    for (int64_t slice = begin; slice < end; slice++)
      for (int64_t tile = tiles * slice / slices; tile < tiles * (slice + 1) / slices; tile++)
        body(tile, scratch.get(), sums.data() + size * slice);
  });
  for (int64_t slice = 1; slice < slices; slice++)
    for (size_t i = 0; i < size; i++) sums[i] += sums[size * slice + i];
  at::Tensor grad_phi = at::empty(phi.sizes(), phi.options().memory_format(at::MemoryFormat::Contiguous));
  unpack_gradient(config, sums.data(), grad_phi.mutable_data_ptr<float>());
  return grad_phi;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_step_backward(const at::Tensor& grad_update,
                                                                  const at::Tensor& grad_new_state,
                                                                  const at::Tensor& grad, const at::Tensor& state,
                                                                  const at::Tensor& phi, int64_t hidden_size,
                                                                  int64_t num_layers, c10::string_view preprocess,
                                                                  double p, double output_scale) {
  const Config config = make_config(hidden_size, num_layers, preprocess, p, output_scale);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  check_coordinates(grad_update, "grad_update");
  TORCH_CHECK_VALUE(grad_update.sizes() == grad.sizes(), "grad_update: expected shape ", grad.sizes(), " as grad, got ",
                    grad_update.sizes());
  const int64_t numel = grad.numel(), tiles = tiles_for(numel);
  check_state(config, state, tiles, "state");
  check_state(config, grad_new_state, tiles, "grad_new_state");

  const at::Tensor plain_grad = grad.resolve_neg(), plain_upstream = grad_update.resolve_neg();
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  at::Tensor grad_grad = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_state = at::empty_like(state);
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const StridedView grads(plain_grad), upstream(plain_upstream), result(grad_grad);
  const float* from = state.const_data_ptr<float>();
  const float* end_data = grad_new_state.const_data_ptr<float>();
  float* to = grad_state.mutable_data_ptr<float>();
  const int64_t rows = config.rows(), stride = rows * kTile;

  at::Tensor grad_phi = sum_over_tiles(config, phi, tiles, 1, [&](int64_t tile, float* scratch, double* sums) {
    alignas(64) float g[kTile] = {}, du[kTile] = {}, dg[kTile];
    const int count = static_cast<int>(std::min<int64_t>(kTile, numel - tile * kTile));
    grads.read(tile * kTile, count, g);
    upstream.read(tile * kTile, count, du);
    std::vector<float> masked[2];
    const float* begins = mask_padding(from + tile * stride, rows, count, masked[0]);
    const float* ends = mask_padding(end_data + tile * stride, rows, count, masked[1]);
    const float* steps[1] = {g};
    {
      FlushDenormals flush;
      kernel.backward(net.network(), {1, steps, du, begins, ends, to + tile * stride, dg, sums}, scratch);
    }
    result.write(tile * kTile, count, dg);
  });
  return {grad_grad, grad_state, grad_phi};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> lstm_segment_backward(
    at::TensorList start_states, at::IntArrayRef numels, at::IntArrayRef record_tiles, at::TensorList records,
    at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs, at::ArrayRef<double> decays, const at::Tensor& phi,
    int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
    at::TensorList grad_end_states, bool need_grad_start) {
  const Config config = make_config(hidden_size, num_layers, preprocess, p, output_scale);
  check_segment_arguments(config, start_states, numels, record_tiles, records, loss_weights, lrs, decays, phi,
                          grad_end_states);

  struct Item {
    int64_t numel, record_tile;
    const float* state;
    const float* grad_end;
    float* grad_start;
  };
  const int steps = static_cast<int>(records.size()) - 1;
  std::vector<at::Tensor> grad_start_states;
  std::vector<Item> items;
  std::vector<int64_t> ends;
  int64_t tiles = 0;
  for (size_t k = 0; k < start_states.size(); k++) {
    if (need_grad_start) grad_start_states.push_back(at::empty_like(start_states[k]));
    if (start_states[k].size(0) == 0) continue;
    items.push_back({numels[k], record_tiles[k], start_states[k].const_data_ptr<float>(),
                     grad_end_states.empty() ? nullptr : grad_end_states[k].const_data_ptr<float>(),
                     need_grad_start ? grad_start_states.back().mutable_data_ptr<float>() : nullptr});
    ends.push_back(tiles += start_states[k].size(0));
  }
  std::vector<const float*> gradients;
  for (const at::Tensor& record : records) gradients.push_back(record.const_data_ptr<float>());
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const int64_t rows = config.rows(), stride = rows * kTile;

  at::Tensor grad_phi = sum_over_tiles(config, phi, tiles, steps, [&](int64_t at, float* scratch, double* sums) {
    const size_t k = std::upper_bound(ends.begin(), ends.end(), at) - ends.begin();
    const Item& item = items[k];
    const int64_t tile = at - (k == 0 ? 0 : ends[k - 1]);
    const int64_t offset = (item.record_tile + tile) * kTile;
    const int count = static_cast<int>(std::min<int64_t>(kTile, item.numel - tile * kTile));

    // A_t = d loss / d theta_t: A_T = w_T g_T, A_t = w_t g_t + decay_t A_{t+1}; d loss / d u_t = lr_t A_{t+1}.
    std::vector<const float*> inputs(steps + 1);
    std::vector<float> recorded, masked[2];  // of a tile with padding
    if (count < kTile) recorded.assign((steps + 1) * kTile, 0.f);
    for (int t = 0; t <= steps; t++) {
      inputs[t] = gradients[t] + offset;
      if (count < kTile) inputs[t] = std::copy_n(inputs[t], count, recorded.data() + t * kTile) - count;
    }
    std::vector<float> upstream(static_cast<size_t>(steps) * kTile);
    float adjoint[kTile];
    for (int i = 0; i < kTile; i++) adjoint[i] = static_cast<float>(loss_weights[steps - 1]) * inputs[steps][i];
    for (int t = steps - 1; t >= 0; t--) {
      const float lr = static_cast<float>(lrs[t]), decay = static_cast<float>(decays[t]);
      const float weight = t > 0 ? static_cast<float>(loss_weights[t - 1]) : 0.f;
      for (int i = 0; i < kTile; i++) {
        upstream[t * kTile + i] = i < count ? lr * adjoint[i] : 0.f;
        adjoint[i] = weight * inputs[t][i] + decay * adjoint[i];
      }
    }
    FlushDenormals flush;
    kernel.backward(
        net.network(),
        {steps, inputs.data(), upstream.data(), mask_padding(item.state + tile * stride, rows, count, masked[0]),
         mask_padding(item.grad_end ? item.grad_end + tile * stride : nullptr, rows, count, masked[1]),
         item.grad_start ? item.grad_start + tile * stride : nullptr, nullptr, sums},
        scratch);
  });
  return {grad_phi, grad_start_states};
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  m.impl("lstm_step_backward", &lstm_step_backward);
  m.impl("lstm_segment_backward", &lstm_segment_backward);
}

}  // namespace l2l
