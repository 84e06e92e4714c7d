// The step on the CPU: functional, and in place on all tensors of a parameter group in one parallel region.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../checks.h"
#include "dispatch.h"
#include "packing.h"
#include "parallel.h"
#include "strided.h"

namespace l2l {
namespace {

// Tiles a thread takes at least: some 20 microseconds of work.
constexpr int64_t kGrain = 2;

// The gradients of one tile; lanes beyond the last coordinate are zero.
struct GradientTile {
  alignas(64) float lanes[kTile];

  int read(const StridedView& view, int64_t tile, bool negate) {
    const int count = static_cast<int>(std::min<int64_t>(kTile, view.numel() - tile * kTile));
    view.read(tile * kTile, count, lanes);
    std::fill(lanes + count, lanes + kTile, 0.f);
    if (negate)
      for (float& g : lanes) g = -g;
    return count;
  }
};

std::tuple<at::Tensor, at::Tensor> lstm_step(const at::Tensor& grad, const at::Tensor& state, const at::Tensor& phi,
                                             int64_t hidden_size, int64_t num_layers, c10::string_view preprocess,
                                             double p, double output_scale) {
  const Config config = make_config(hidden_size, num_layers, preprocess, p, output_scale);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  check_state(config, state, tiles_for(grad.numel()), "state");

  const at::Tensor plain_grad = grad.resolve_neg();
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  at::Tensor update = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor new_state = at::empty_like(state);
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const StridedView grads(plain_grad);
  const StridedView updates(update);
  const float* from = state.const_data_ptr<float>();
  float* to = new_state.mutable_data_ptr<float>();
  const int64_t stride = static_cast<int64_t>(config.rows()) * kTile;

  parallel_for(state.size(0), kGrain, [&](int64_t begin, int64_t end) {
    GradientTile g;
    alignas(64) float u[kTile];
    for (int64_t tile = begin; tile < end; tile++) {
      const int count = g.read(grads, tile, false);
      {
        FlushDenormals flush;
        kernel.step(net.network(), g.lanes, from + tile * stride, to + tile * stride, u);
      }
      updates.write(tile * kTile, count, u);
    }
  });
  return {update, new_state};
}

void lstm_step_(at::TensorList params, at::TensorList grads, at::TensorList states, const at::Tensor& phi,
                int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
                double lr, double weight_decay, bool maximize, const std::optional<at::Tensor>& record,
                at::IntArrayRef record_tiles, bool check_only) {
  const Config config = make_config(hidden_size, num_layers, preprocess, p, output_scale);
  check_step_arguments(config, params, grads, states, phi, record, record_tiles);
  if (check_only) return;
  mark_written(params, states, {record});

  struct Item {
    StridedView param, grad;
    float* state;
    float* record;
  };
  std::vector<Item> items;
  std::vector<int64_t> ends;  // item k has tiles [ends[k-1], ends[k]) of all
  std::vector<at::Tensor> plain_grads;
  items.reserve(params.size());
  ends.reserve(params.size());
  int64_t tiles = 0;
  for (size_t k = 0; k < params.size(); k++) {
    if (params[k].numel() == 0) continue;
    plain_grads.push_back(grads[k].resolve_neg());
    float* recorded = record ? record->mutable_data_ptr<float>() + record_tiles[k] * kTile : nullptr;
    params[k].mutable_data_ptr();  // materializes a lazy clone
    items.push_back(
        {StridedView(params[k]), StridedView(plain_grads.back()), states[k].mutable_data_ptr<float>(), recorded});
    ends.push_back(tiles += tiles_for(params[k].numel()));
  }
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const int64_t stride = static_cast<int64_t>(config.rows()) * kTile;
  const float decay = static_cast<float>(1.0 - lr * weight_decay);

  parallel_for(tiles, kGrain, [&](int64_t begin, int64_t end) {
    GradientTile g;
    alignas(64) float u[kTile];
    size_t k = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (int64_t at = begin; at < end; at++) {
      while (at >= ends[k]) k++;
      const Item& item = items[k];
      const int64_t tile = at - (k == 0 ? 0 : ends[k - 1]);
      const int count = g.read(item.grad, tile, maximize);
      if (item.record) std::copy(g.lanes, g.lanes + kTile, item.record + tile * kTile);
      {
        FlushDenormals flush;
        float* state = item.state + tile * stride;
        kernel.step(net.network(), g.lanes, state, state, u);
      }
      item.param.update(tile * kTile, count, decay, static_cast<float>(lr), u);
    }
  });
}

at::Tensor vector_math(c10::string_view function, const at::Tensor& x) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat, "x: expected dtype float32, got ", x.scalar_type());
  check_coordinates(x, "x");
  VectorFunction f = VectorFunction::exp2;
  if (function == "sigmoid_scaled") {
    f = VectorFunction::sigmoid_scaled;
  } else if (function == "tanh_scaled") {
    f = VectorFunction::tanh_scaled;
  } else if (function == "log") {
    f = VectorFunction::log;
  } else {
    TORCH_CHECK_VALUE(function == "exp2", "function: expected 'exp2', 'sigmoid_scaled', 'tanh_scaled' or 'log', got '",
                      function, "'");
  }
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  kernels().vector_function(f, in.const_data_ptr<float>(), out.mutable_data_ptr<float>(), in.numel());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  m.impl("lstm_step", &lstm_step);
  m.impl("lstm_step_", &lstm_step_);
  m.impl("_vector_math", &vector_math);
}

}  // namespace l2l
