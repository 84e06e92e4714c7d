// Back-propagation with global averaging cells on the CPU: through one functional step, and through a recorded segment.
//
// The gradient of an averaged h is the mean of the gradients of all coordinates of its group, so the walk back visits
// all tiles for each layer of each step. Between them only the gradient of the state is kept; activations are computed
// again from the states before the step. Of a segment of T steps some 2 sqrt(T) states are kept at a time: the one
// before every chunk of sqrt(T) steps, and those of one chunk.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <cmath>
#include <cstring>

#include "../gac_checks.h"
#include "dispatch.h"
#include "gac.h"
#include "strided.h"

namespace l2l {
namespace {

// Uninitialised floats, aligned for the kernels.
class Floats {
 public:
  explicit Floats(int64_t size) : tensor_(at::empty({std::max<int64_t>(size, 1)}, at::kFloat)) {}
  float* data() { return tensor_.mutable_data_ptr<float>(); }

 private:
  at::Tensor tensor_;
};

// The walk back through single steps of all tensors, and the sums for d phi.
class GacBackward {
 public:
  GacBackward(const PackedNetwork& net, const Tiles& tiles, int64_t groups, float* grad_state)
      : net_(net.network()),
        tiles_(tiles),
        groups_(groups),
        grad_(tile_rows(tiles, grad_state, net_.config.rows())),
        sums_(static_cast<size_t>(kGacSlices) * gradient_size(net_.config), 0.0) {}

  // From the gradient of the state after a step to that before it, in grad_state.
  //   before, after: the states; inputs(place, x) gives features and extra inputs; upstream(place, rows) the gradients
  //   of the outputs [outputs][64]; grad_inputs(place, rows) takes those of features and extra inputs, if wanted.
  template <class Inputs, class Upstream, class GradInputs>
  void step(const TileRows& before, const TileRows& after, const Inputs& inputs, const Upstream& upstream,
            const GradInputs& grad_inputs, bool need_grad_inputs) {
    const Config& config = net_.config;
    const int top = config.h_row(config.layers - 1);
    tiles_.slices([&](int64_t slice, int64_t begin, int64_t end) {
      alignas(64) float rows[kMaxOutputs * kTile];
      tiles_.visit(begin, end, [&](const Tiles::Place& place) {
        upstream(place, rows);
        FlushDenormals flush;
        kernels().read_out_backward(net_, after(place, top), rows, grad_(place, top), sums(slice));
      });
    });
    for (int layer = config.layers - 1; layer >= 0; layer--)
      run_layer(layer, before, after, inputs, grad_inputs, need_grad_inputs);
  }

  at::Tensor grad_phi(const at::Tensor& phi) {
    const size_t size = gradient_size(net_.config);
    for (int64_t slice = 1; slice < kGacSlices; slice++)
      for (size_t i = 0; i < size; i++) sums_[i] += sums_[size * slice + i];
    at::Tensor result = at::empty(phi.sizes(), phi.options().memory_format(at::MemoryFormat::Contiguous));
    unpack_gradient(net_.config, sums_.data(), result.mutable_data_ptr<float>());
    return result;
  }

 private:
  double* sums(int64_t slice) { return sums_.data() + slice * gradient_size(net_.config); }

  template <class Inputs, class GradInputs>
  void run_layer(int layer, const TileRows& before, const TileRows& after, const Inputs& inputs,
                 const GradInputs& grad_inputs, bool need_grad_inputs) {
    const Config& config = net_.config;
    const int64_t h = config.h_row(layer), c = config.c_row(layer);
    // Of the coordinates that are in the mean: those whose outgoing h is finite.
    std::vector<double> cell_sums(2 * groups_ * config.gac);
    std::vector<float> means(groups_ * config.gac);
    sum_cells(tiles_, groups_, grad_, after, h, config.gac, cell_sums.data());
    average_cells(cell_sums.data(), groups_ * config.gac, means.data());
    const bool finite = all_counted(tiles_, groups_, config.gac, cell_sums.data());

    const size_t input_floats = static_cast<size_t>(config.inputs(0)) * kTile;
    tiles_.slices([&](int64_t slice, int64_t begin, int64_t end) {
      Floats scratch(kernels().layer_backward_scratch(config) / sizeof(float));
      Floats x(kLayerTiles * input_floats), dx(kLayerTiles * input_floats);
      LayerBackward batch[kLayerTiles];
      Tiles::Place places[kLayerTiles];
      int n = 0;
      const auto run = [&] {
        {
          FlushDenormals flush;
          kernels().layer_backward(net_, layer, batch, n, sums(slice), scratch.data());
        }
        if (layer == 0 && need_grad_inputs)
          for (int i = 0; i < n; i++) grad_inputs(places[i], x.data() + i * input_floats, batch[i].dx);
        n = 0;
      };
      tiles_.visit(begin, end, [&](const Tiles::Place& place) {
        fill_cells(tiles_, place, groups_, means.data(), config.gac, finite, after(place, h), grad_(place, h));
        LayerBackward tile{nullptr, before(place, h), before(place, c), grad_(place, h), grad_(place, c), nullptr};
        if (layer > 0) {
          tile.x = after(place, config.h_row(layer - 1));
          tile.dx = grad_(place, config.h_row(layer - 1));
        } else {
          inputs(place, x.data() + n * input_floats);
          tile.x = x.data() + n * input_floats;
          if (need_grad_inputs) {
            tile.dx = dx.data() + n * input_floats;
            std::memset(tile.dx, 0, sizeof(float) * input_floats);
          }
        }
        places[n] = place;
        batch[n++] = tile;
        if (n == kLayerTiles) run();
      });
      if (n > 0) run();
    });
  }

  const Network& net_;
  const Tiles& tiles_;
  int64_t groups_;
  TileRows grad_;
  std::vector<double> sums_;
};

// A copy of the states in one buffer; lanes beyond a tensor's last coordinate are zero, so that nothing comes of them.
void copy_states(const Tiles& tiles, const std::vector<const float*>& from, int64_t rows, const TileRows& to) {
  parallel_for(tiles.total(), 16, [&](int64_t begin, int64_t end) {
    tiles.visit(begin, end, [&](const Tiles::Place& place) {
      float* tile = to(place);
      std::memcpy(tile, from[place.tensor] + place.tile * rows * kTile, sizeof(float) * rows * kTile);
      if (place.count < kTile)
        for (int64_t r = 0; r < rows; r++) std::fill(tile + r * kTile + place.count, tile + (r + 1) * kTile, 0.f);
    });
  });
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> gac_step_backward(
    const at::Tensor& grad_out, const at::Tensor& grad_new_state, const at::Tensor& grad,
    const std::optional<at::Tensor>& extra, const at::Tensor& state, const at::Tensor& phi, int64_t hidden_size,
    int64_t num_layers, c10::string_view preprocess, double p, double output_scale, int64_t gac_cells,
    int64_t extra_inputs, int64_t num_outputs, int64_t groups) {
  const Config config =
      make_gac_config(hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs);
  check_phi(config, phi);
  check_coordinates(grad, "grad");
  const int64_t numel = grad.numel();
  check_groups(groups, numel, "grad");
  check_state(config, state, tiles_for(numel), "state");
  check_state(config, grad_new_state, tiles_for(numel), "grad_new_state");
  check_rows(extra, "extra", config.extra, grad.sizes(), phi);
  check_rows(grad_out, "grad_out", config.outputs, grad.sizes(), phi);

  std::vector<int64_t> extra_shape{config.extra};
  extra_shape.insert(extra_shape.end(), grad.sizes().begin(), grad.sizes().end());
  const at::Tensor plain_grad = grad.resolve_neg(), dense_phi = phi.resolve_neg().contiguous();
  at::Tensor grad_grad = at::empty(grad.sizes(), grad.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_extra = at::empty(extra_shape, phi.options().memory_format(at::MemoryFormat::Contiguous));
  at::Tensor grad_state = at::empty_like(state);
  Tiles tiles;
  tiles.add(numel);
  const int64_t rows = config.rows(), size = tiles.total() * rows * kTile;
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  const StridedView grads(plain_grad), grad_grads(grad_grad);
  const float* extras = extra ? extra->const_data_ptr<float>() : nullptr;
  const float* upstreams = grad_out.const_data_ptr<float>();
  float* grad_extras = grad_extra.mutable_data_ptr<float>();
  Floats before_data(size), after_data(size);
  const TileRows before = tile_rows(tiles, before_data.data(), rows), after = tile_rows(tiles, after_data.data(), rows);
  GacBackward backward(net, tiles, groups, grad_state.mutable_data_ptr<float>());
  if (numel == 0) return {grad_grad, grad_extra, grad_state, backward.grad_phi(phi)};
  copy_states(tiles, {state.const_data_ptr<float>()}, rows, before);
  copy_states(tiles, {grad_new_state.const_data_ptr<float>()}, rows,
              tile_rows(tiles, grad_state.mutable_data_ptr<float>(), rows));

  const auto inputs = [&](const Tiles::Place& place, float* x) {
    alignas(64) float g[kTile] = {};
    grads.read(place.tile * kTile, place.count, g);
    FlushDenormals flush;
    kernel.features(net.network(), g, x);
    for (int r = 0; r < config.extra; r++) {
      float* row = x + (config.features() + r) * kTile;
      std::copy_n(extras + r * numel + place.tile * kTile, place.count, row);
      std::fill(row + place.count, row + kTile, 0.f);
    }
  };
  std::vector<float> means(config.layers * groups * config.gac);
  std::vector<double> sums(2 * groups * config.gac);
  GacForward forward{net, tiles, groups, before, after, means.data(), sums.data(), false};
  for (int layer = 0; layer < config.layers; layer++) {
    forward.run_layer(layer, inputs);
    forward.average(layer);
  }
  parallel_for(tiles.total(), 16, [&](int64_t begin, int64_t end) {
    tiles.visit(begin, end, [&](const Tiles::Place& place) { forward.fill(config.layers - 1, place); });
  });

  const auto upstream = [&](const Tiles::Place& place, float* to) {
    for (int o = 0; o < config.outputs; o++) {
      std::copy_n(upstreams + o * numel + place.tile * kTile, place.count, to + o * kTile);
      std::fill(to + o * kTile + place.count, to + (o + 1) * kTile, 0.f);
    }
  };
  const auto grad_inputs = [&](const Tiles::Place& place, const float*, const float* dx) {
    alignas(64) float g[kTile] = {}, dg[kTile];
    grads.read(place.tile * kTile, place.count, g);
    {
      FlushDenormals flush;
      kernel.features_backward(net.network(), g, dx, dg);
    }
    grad_grads.write(place.tile * kTile, place.count, dg);
    for (int r = 0; r < config.extra; r++)
      std::copy_n(dx + (config.features() + r) * kTile, place.count, grad_extras + r * numel + place.tile * kTile);
  };
  backward.step(before, after, inputs, upstream, grad_inputs, true);
  return {grad_grad, grad_extra, grad_state, backward.grad_phi(phi)};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> gac_segment_backward(
    at::TensorList start_states, at::IntArrayRef numels, at::IntArrayRef record_tiles, at::TensorList records,
    at::TensorList means, at::ArrayRef<double> loss_weights, at::ArrayRef<double> lrs, at::ArrayRef<double> decays,
    const at::Tensor& phi, int64_t hidden_size, int64_t num_layers, c10::string_view preprocess, double p,
    double output_scale, int64_t gac_cells, int64_t extra_inputs, int64_t num_outputs, int64_t groups,
    at::TensorList grad_end_states, bool need_grad_start) {
  const Config config =
      make_gac_config(hidden_size, num_layers, preprocess, p, output_scale, gac_cells, extra_inputs, num_outputs);
  check_segment_arguments(config, start_states, numels, record_tiles, records, loss_weights, lrs, decays, phi,
                          grad_end_states);
  check_gac_segment(config, numels, records, means, groups, phi);

  Tiles tiles;
  std::vector<const float*> starts, ends;
  for (size_t k = 0; k < start_states.size(); k++) {
    tiles.add(numels[k]);
    starts.push_back(start_states[k].const_data_ptr<float>());
    if (!grad_end_states.empty()) ends.push_back(grad_end_states[k].const_data_ptr<float>());
  }
  const int steps = static_cast<int>(records.size()) - 1;
  const int chunk = static_cast<int>(std::ceil(std::sqrt(static_cast<double>(steps))));
  const int chunks = (steps + chunk - 1) / chunk;
  const int64_t rows = config.rows(), size = tiles.total() * rows * kTile, lanes = tiles.total() * kTile;
  const at::Tensor dense_phi = phi.resolve_neg().contiguous();
  const PackedNetwork net(config, dense_phi.const_data_ptr<float>());
  const Kernels& kernel = kernels();
  std::vector<const float*> gradients, averages;
  for (const at::Tensor& record : records) gradients.push_back(record.const_data_ptr<float>());
  for (const at::Tensor& mean : means) averages.push_back(mean.const_data_ptr<float>());

  Floats grad_state(size), checkpoints(chunks * size), states((chunk + 1) * size), adjoint(lanes);
  const auto state = [&](int t) { return tile_rows(tiles, states.data() + t * size, rows); };
  const auto gradient = [&](int t, const Tiles::Place& place) {
    return gradients[t] + (record_tiles[place.tensor] + place.tile) * kTile;
  };

  const auto features = [&](int t, const Tiles::Place& place, float* x) {
    alignas(64) float masked[kTile];
    const float* g = gradient(t, place);
    if (place.count < kTile) {  // what a record holds beyond the last coordinate must not matter
      std::fill(std::copy_n(g, place.count, masked), masked + kTile, 0.f);
      g = masked;
    }
    FlushDenormals flush;
    kernel.features(net.network(), g, x);
  };

  // All layers of steps [first, first + count) at once: the averages are known.
  const auto forward = [&](int first, int count) {
    parallel_for(tiles.total(), 2, [&](int64_t begin, int64_t end) {
      alignas(64) float x[kMaxFeatures * kTile];
      tiles.visit(begin, end, [&](const Tiles::Place& place) {
        FlushDenormals flush;
        for (int t = 0; t < count; t++) {
          const float* from = states.data() + t * size + place.at * rows * kTile;
          float* to = states.data() + (t + 1) * size + place.at * rows * kTile;
          features(first + t, place, x);
          const float* below = x;
          for (int l = 0; l < config.layers; l++) {
            const LayerWeights& w = net.network().layer[l];
            float* h = to + config.h_row(l) * kTile;
            kernel.layer_forward({w.forward, w.bias, config.hidden, below, config.inputs(l),
                                  from + config.h_row(l) * kTile, config.hidden, from + config.c_row(l) * kTile,
                                  to + config.c_row(l) * kTile, h});
            fill_cells(tiles, place, groups, averages[first + t] + l * groups * config.gac, config.gac, false, h, h);
            below = h;
          }
        }
      });
    });
  };

  copy_states(tiles, starts, rows, state(0));
  for (int k = 0; k < chunks; k++) {
    std::memcpy(checkpoints.data() + k * size, states.data(), sizeof(float) * size);
    if (k + 1 == chunks) break;
    forward(k * chunk, chunk);
    std::memcpy(states.data(), states.data() + chunk * size, sizeof(float) * size);
  }
  const TileRows grads = tile_rows(tiles, grad_state.data(), rows);
  if (ends.empty())
    std::memset(grad_state.data(), 0, sizeof(float) * size);
  else
    copy_states(tiles, ends, rows, grads);
  // A_T = w_T g_T, A_t = w_t g_t + decay_t A_{t+1}; d loss / d u_t = lr_t A_{t+1}.
  tiles.visit(0, tiles.total(), [&](const Tiles::Place& place) {
    const float *g = gradient(steps, place), w = static_cast<float>(loss_weights[steps - 1]);
    for (int i = 0; i < kTile; i++) adjoint.data()[place.at * kTile + i] = i < place.count ? w * g[i] : 0.f;
  });

  GacBackward backward(net, tiles, groups, grad_state.data());
  for (int k = chunks - 1; k >= 0; k--) {
    const int first = k * chunk, count = std::min(chunk, steps - first);
    std::memcpy(states.data(), checkpoints.data() + k * size, sizeof(float) * size);
    forward(first, count);
    for (int t = first + count - 1; t >= first; t--) {
      const float lr = static_cast<float>(lrs[t]), decay = static_cast<float>(decays[t]);
      const float weight = t > 0 ? static_cast<float>(loss_weights[t - 1]) : 0.f;
      const auto inputs = [&](const Tiles::Place& place, float* x) { features(t, place, x); };
      const auto upstream = [&](const Tiles::Place& place, float* du) {
        const float* g = gradient(t, place);
        float* a = adjoint.data() + place.at * kTile;
        for (int i = 0; i < kTile; i++) {
          du[i] = lr * a[i];
          a[i] = i < place.count ? weight * g[i] + decay * a[i] : 0.f;
        }
      };
      backward.step(
          state(t - first), state(t - first + 1), inputs, upstream,
          [](const Tiles::Place&, const float*, const float*) {}, false);
    }
  }

  std::vector<at::Tensor> grad_start_states;
  for (size_t k = 0; need_grad_start && k < start_states.size(); k++) {
    grad_start_states.push_back(at::empty_like(start_states[k]));
    if (grad_start_states.back().numel() > 0)
      std::memcpy(grad_start_states.back().mutable_data_ptr<float>(), grads.base[k],
                  sizeof(float) * grad_start_states.back().numel());
  }
  return {backward.grad_phi(phi), grad_start_states};
}

}  // namespace

TORCH_LIBRARY_IMPL(l2l_fast, CPU, m) {
  m.impl("gac_step_backward", &gac_step_backward);
  m.impl("gac_segment_backward", &gac_segment_backward);
}

}  // namespace l2l
