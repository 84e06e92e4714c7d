// The step with global averaging cells, extra inputs and several outputs on the CPU: functional, and in place on all
// tensors of a parameter group.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "../gac_checks.h"
#include "dispatch.h"
#include "gac.h"
#include "strided.h"

namespace l2l {
namespace {

// Lanes of row-major rows [rows][row_size] from coordinate `begin` of each; lanes beyond the last are zero.
void read_rows(const float* data, int64_t row_size, int64_t begin, int count, int rows, float* out) {
  for (int r = 0; r < rows; r++) {
    std::copy_n(data + r * row_size + begin, count, out + r * kTile);
    std::fill(out + r * kTile + count, out + (r + 1) * kTile, 0.f);
  }
}

void write_rows(const float* rows_of_64, int64_t row_size, int64_t begin, int count, int rows, float* data) {
  for (int r = 0; r < rows; r++) std::copy_n(rows_of_64 + r * kTile, count, data + r * row_size + begin);
}

std::tuple<at::Tensor, at::Tensor> gac_step(const at::Tensor& grad, const std::optional<at::Tensor>& extra,
                                            const at::Tensor& state, const at::Tensor& phi, int64_t hidden_size,
                                            int64_t num_layers, c10::string_view preprocess, double p,
                                            double output_scale, int64_t gac_cells, int64_t extra_inputs,
                                            int64_t num_outputs, int64_t groups) {
  const Config config =
      make_gac_config(hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  const int64_t numel = grad.numel();
  check_groups(groups, numel, "grad");
  check_state(config, state, tiles_for(numel), "state");
  check_rows(extra, "extra", config.extra, grad.sizes(), phi);

  const at::Tensor plain_grad = grad.resolve_neg(), dense_phi = phi.resolve_neg().contiguous();
  std::vector<int64_t> shape{config.outputs};
  shape.insert(shape.end(), grad.sizes().begin(), grad.sizes().end());
  at::Tensor out = at::empty(shape, phi.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor new_state = at::empty_like(state);
  if (numel == 0) return {out, new_state};
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const StridedView grads(plain_grad);
  const float* extras = extra ? extra->const_data_ptr<float>() : nullptr;
  float* outs = out.mutable_data_ptr<float>();
  Tiles tiles;
  tiles.add(numel);
  std::vector<float> means(config.layers * groups * config.gac);
  std::vector<double> sums(2 * groups * config.gac);
  // Only read: GacForward takes both states as one type.
  GacForward forward{net,
                     tiles,
                     groups,
                     tile_rows(tiles, const_cast<float*>(state.const_data_ptr<float>()), config.rows()),
                     tile_rows(tiles, new_state.mutable_data_ptr<float>(), config.rows()),
                     means.data(),
                     sums.data(),
                     false};
  for (int layer = 0; layer < config.layers; layer++) {
    forward.run_layer(layer, [&](const Tiles::Place& place, float* x) {
      alignas(64) float g[kTile] = {};
      grads.read(place.tile * kTile, place.count, g);
      {
        FlushDenormals flush;
        kernel.features(net.network(), g, x);
      }
      read_rows(extras, numel, place.tile * kTile, place.count, config.extra, x + config.features() * kTile);
    });
    forward.average(layer);
  }
  tiles.slices([&](int64_t, int64_t begin, int64_t end) {
    alignas(64) float rows[kMaxOutputs * kTile];
    tiles.visit(begin, end, [&](const Tiles::Place& place) {
      {
        FlushDenormals flush;
        forward.fill(config.layers - 1, place);
        kernel.read_out(net.network(), forward.to(place, config.h_row(config.layers - 1)), rows);
      }
      write_rows(rows, numel, place.tile * kTile, place.count, config.outputs, outs);
    });
  });
  return {out, new_state};
}

void gac_step_(at::TensorList params, at::TensorList grads, at::TensorList states,
               const std::optional<at::Tensor>& extra, const std::optional<at::Tensor>& out, const at::Tensor& phi,
               int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p, double output_scale,
               int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs, double lr, double weight_decay,
               bool maximize, const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles, int64_t groups,
               const at::Tensor& means, const at::Tensor& sums, int64_t first_phase, int64_t last_phase,
               bool check_only) {
  const Config config =
      make_gac_config(hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs);
  const int64_t total = check_gac_step_arguments(config, {params, grads, states, extra, out, record, means, sums}, phi,
                                                 record_tiles, groups, first_phase, last_phase);
  if (check_only) return;
  Tiles tiles;
  std::vector<int64_t> begins;  // of every tensor in extra and out
  for (size_t k = 0; k < params.size(); k++) {
    begins.push_back(tiles.coordinates());
    tiles.add(params[k].numel());
  }

  mark_written(params, states, {out, record, means, sums});
  if (tiles.total() == 0) {
    if (sums.numel() > 0) std::fill_n(sums.mutable_data_ptr<double>(), sums.numel(), 0.0);
    return;
  }

  std::vector<StridedView> views, gradients;
  std::vector<at::Tensor> plain_grads;
  std::vector<float*> recorded;
  TileRows rows;
  rows.stride = static_cast<int64_t>(config.rows()) * kTile;
  for (size_t k = 0; k < params.size(); k++) {
    plain_grads.push_back(grads[k].resolve_neg());
    params[k].mutable_data_ptr();  // materializes a lazy clone
    views.emplace_back(params[k]);
    gradients.emplace_back(plain_grads.back());
    rows.base.push_back(states[k].mutable_data_ptr<float>());
    recorded.push_back(record ? record->mutable_data_ptr<float>() + record_tiles[k] * kTile : nullptr);
  }
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const float* extras = extra ? extra->const_data_ptr<float>() : nullptr;
  float* outs = out ? out->mutable_data_ptr<float>() : nullptr;
  const float decay = static_cast<float>(1.0 - lr * weight_decay);
  GacForward forward{net, tiles, groups, rows, rows, means.mutable_data_ptr<float>(), sums.mutable_data_ptr<double>(),
                     true};

  const auto inputs = [&](const Tiles::Place& place, float* x) {
    alignas(64) float g[kTile] = {};
    const int64_t begin = place.tile * kTile;
    gradients[place.tensor].read(begin, place.count, g);
    if (maximize)
      for (int i = 0; i < place.count; i++) g[i] = -g[i];
    if (recorded[place.tensor]) std::copy(g, g + kTile, recorded[place.tensor] + begin);
    {
      FlushDenormals flush;
      kernel.features(net.network(), g, x);
    }
    read_rows(extras, total, begins[place.tensor] + begin, place.count, config.extra, x + config.features() * kTile);
  };
  for (int64_t phase = first_phase; phase < std::min<int64_t>(last_phase, config.layers); phase++) {
    forward.run_layer(static_cast<int>(phase), inputs);
    if (phase + 1 < last_phase) forward.average(static_cast<int>(phase));
  }
  if (last_phase <= config.layers) return;
  tiles.slices([&](int64_t, int64_t begin, int64_t end) {
    alignas(64) float lanes[kMaxOutputs * kTile];
    tiles.visit(begin, end, [&](const Tiles::Place& place) {
      {
        FlushDenormals flush;
        forward.fill(config.layers - 1, place);
        kernel.read_out(net.network(), rows(place, config.h_row(config.layers - 1)), lanes);
      }
      const int64_t first = place.tile * kTile;
      if (outs) write_rows(lanes, total, begins[place.tensor] + first, place.count, config.outputs, outs);
      views[place.tensor].update(first, place.count, decay, static_cast<float>(lr), lanes);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  m.impl("gac_step", &gac_step);
  m.impl("gac_step_", &gac_step_);
}

}  // namespace l2l
