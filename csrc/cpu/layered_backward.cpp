// Back-propagation layer by layer: through one functional step, and through a recorded segment.
//
// The gradient of an averaged h is the mean of the gradients of all coordinates of its problem, so the walk back visits
// all tiles for each layer of each step. Between them only the gradient of the state is kept; activations are computed
// again from the states before the step. Of a segment of T steps all T states are kept where they are few bytes, else
// some 2 sqrt(T): the one before every chunk of sqrt(T) steps, and those of one chunk.
#include <cmath>
#include <cstring>

#include "backend.h"
#include "dispatch.h"
#include "layered_forward.h"
#include "strided.h"

namespace l2l {
namespace {

// The walk back through single steps of all tensors, and the sums for d phi.
class LayeredBackward {
 public:
  LayeredBackward(const PackedNetwork& net, const Tiles& tiles, int64_t problems, float* grad_state)
      : net_(net.network()),
        tiles_(tiles),
        problems_(problems),
        grad_(tiles, grad_state, net_.config),
        sums_(net_.config, tiles.slices()) {}

  // From the gradient of the state after a step to that before it, in grad_state.
  //   before, after: the states; inputs(place, x) gives features and extra inputs; upstream(place, rows) the gradients
  //   of the outputs [outputs][64]; grad_inputs(place, rows) takes those of features and extra inputs, if wanted.
  template <class Inputs, class Upstream, class GradInputs>
  void step(const TileRows& before, const TileRows& after, const Inputs& inputs, const Upstream& upstream,
            const GradInputs& grad_inputs, bool need_grad_inputs) {
    const Config& config = net_.config;
    const int top = config.h_row(config.layers - 1);
    tiles_.for_each_slice([] { return 0; },
                          [&](int64_t slice, int64_t begin, int64_t end, int) {
                            alignas(64) float rows[kMaxOutputs * kTile];
                            tiles_.visit(begin, end, [&](const Tiles::Place& place) {
                              upstream(place, rows);
                              FlushDenormals flush;
                              kernels().read_out_backward(net_, after(place, top), rows, grad_(place, top),
                                                          sums_.slice(slice));
                            });
                          });
    for (int layer = config.layers - 1; layer >= 0; layer--)
      run_layer(layer, before, after, inputs, grad_inputs, need_grad_inputs);
  }

  const TileRows& grad_state() const { return grad_; }
  void write_grad_phi(float* grad_phi) { sums_.write(grad_phi); }

 private:
  // Of a thread: the tiles that go through the kernel at once.
  struct Batch {
    float* scratch;
    Floats x, dx;
    LayerBackward tiles[kLayerTiles];
    Tiles::Place places[kLayerTiles];
    int n = 0;

    Batch(const Config& config, int64_t inputs)
        : scratch(scratch_of_thread(kernels().layer_backward_scratch(config) / sizeof(float))),
          x(kLayerTiles * inputs),
          dx(kLayerTiles * inputs) {}
  };

  template <class Inputs, class GradInputs>
  void run_layer(int layer, const TileRows& before, const TileRows& after, const Inputs& inputs,
                 const GradInputs& grad_inputs, bool need_grad_inputs) {
    const Config& config = net_.config;
    const int64_t h = config.h_row(layer), c = config.c_row(layer);
    // Of the coordinates that are in the mean: those whose outgoing h is finite.
    std::vector<double> cell_sums(2 * problems_ * config.gac);
    std::vector<float> means(problems_ * config.gac);
    sum_cells(tiles_, problems_, grad_, after, h, config.gac, cell_sums.data());
    average_cells(cell_sums.data(), problems_ * config.gac, means.data());
    const bool finite = all_counted(tiles_, problems_, config.gac, cell_sums.data());

    const int64_t input_floats = static_cast<int64_t>(config.inputs(0)) * kTile;
    const auto run = [&](Batch& batch, int64_t slice) {
      {
        FlushDenormals flush;
        kernels().layer_backward(net_, layer, batch.tiles, batch.n, sums_.slice(slice), batch.scratch);
      }
      if (layer == 0 && need_grad_inputs)
        for (int i = 0; i < batch.n; i++) grad_inputs(batch.places[i], batch.tiles[i].dx);
      batch.n = 0;
    };
    const auto add = [&](Batch& batch, const Tiles::Place& place) {
      fill_cells(tiles_, place, problems_, means.data(), config.gac, finite, after(place, h), grad_(place, h));
      LayerBackward tile{place.count,     nullptr,         before(place, h), before(place, c),
                         grad_(place, h), grad_(place, c), nullptr};
      if (layer > 0) {
        tile.x = after(place, config.h_row(layer - 1));
        tile.dx = grad_(place, config.h_row(layer - 1));
      } else {
        float* x = batch.x.data() + batch.n * input_floats;
        inputs(place, x);
        tile.x = x;
        if (need_grad_inputs) {
          tile.dx = batch.dx.data() + batch.n * input_floats;
          std::memset(tile.dx, 0, sizeof(float) * input_floats);
        }
      }
      batch.places[batch.n] = place;
      batch.tiles[batch.n++] = tile;
    };
    tiles_.for_each_slice([&] { return Batch(config, input_floats); },
                          [&](int64_t slice, int64_t begin, int64_t end, Batch& batch) {
                            tiles_.visit(begin, end, [&](const Tiles::Place& place) {
                              add(batch, place);
                              if (batch.n == kLayerTiles) run(batch, slice);
                            });
                            if (batch.n > 0) run(batch, slice);
                          });
  }

  const Network& net_;
  const Tiles& tiles_;
  int64_t problems_;
  TileRows grad_;
  PhiSums sums_;
};

// A copy of the states in one buffer; lanes beyond a tensor's last coordinate are zero, so that nothing comes of them.
void copy_states(const Tiles& tiles, const std::vector<const float*>& from, int64_t rows, const TileRows& to) {
  tiles.for_each(16, [&](const Tiles::Place& place) {
    copy_lanes(from[place.tensor] + place.tile * rows * kTile, rows, place.count, to(place));
  });
}

// Steps of a chunk. All T states of `size` floats are kept where they are few bytes: more is memory that the system has
// to give anew in every call, which takes longer than a second pass forward.
int chunk_length(int steps, int64_t size) {
  constexpr int64_t kBytes = int64_t{24} << 20;
  if (steps * size * static_cast<int64_t>(sizeof(float)) <= kBytes) return steps;
  return static_cast<int>(std::ceil(std::sqrt(static_cast<double>(steps))));
}

// Where the states of a segment are: that before every chunk, and those within the chunk that is walked back.
class SegmentStates {
 public:
  // size: floats of one state of all tiles.
  SegmentStates(int steps, int64_t size)
      : steps_(steps),
        chunk_(chunk_length(steps, size)),
        chunks_((steps + chunk_ - 1) / chunk_),
        size_(size),
        states_((chunks_ + chunk_) * size) {}

  int chunks() const { return chunks_; }
  // The first step of a chunk. The last chunk alone runs forward once, so the one that is shorter comes first.
  int begin(int chunk) const { return chunk == 0 ? 0 : steps_ - (chunks_ - chunk) * chunk_; }
  // The state before step t, while its chunk is walked back.
  float* at(int t) { return at(t, t - begin(chunk_of(t))); }
  // The same in the first pass forward, which keeps no more than two states of any chunk but the last.
  float* at_first(int t) { return chunk_of(t) + 1 < chunks_ ? at(t, 1 + (t & 1)) : at(t); }

 private:
  int chunk_of(int t) const { return chunks_ - 1 - (steps_ - 1 - std::min(t, steps_ - 1)) / chunk_; }
  float* at(int t, int place) {
    const int chunk = chunk_of(t);
    return states_.data() + (t == begin(chunk) ? chunk : chunks_ + place - 1) * size_;
  }

  int steps_, chunk_, chunks_;
  int64_t size_;
  Floats states_;  // those before the chunks, then those of one; in one piece, which malloc is ready to keep
};

}  // namespace

void layered_step_backward(const StepBackwardCall& call) {
  const Config& config = call.config;
  const int64_t numel = call.numel;
  Tiles tiles;
  tiles.add(numel);
  const int64_t rows = config.rows(), size = tiles.total() * rows * kTile;
  const PackedNetwork net(config, call.phi.const_data_ptr<float>(), Direction::backward);
  const Kernels& kernel = kernels();
  const StridedView grads(call.grad), grad_grads(call.grad_grad);
  Floats before_data(size), after_data(size);
  const TileRows before(tiles, before_data.data(), config), after(tiles, after_data.data(), config);
  LayeredBackward backward(net, tiles, call.problems, call.grad_state);
  copy_states(tiles, {call.state}, rows, before);
  copy_states(tiles, {call.grad_new_state}, rows, backward.grad_state());

  const auto inputs = [&](const Tiles::Place& place, float* x) {
    alignas(64) float g[kTile] = {};
    grads.read(place.tile * kTile, place.count, g);
    FlushDenormals flush;
    kernel.features(net.network(), {}, g, nullptr, nullptr, x);
    for (int r = 0; r < config.extra; r++)
      copy_lanes(call.extra + r * numel + place.tile * kTile, 1, place.count, x + (config.features() + r) * kTile);
  };
  std::vector<float> means(config.layers * call.problems * config.gac);
  std::vector<double> sums(2 * call.problems * config.gac);
  LayeredForward forward{net, tiles, call.problems, before, after, means.data(), sums.data(), false};
  for (int layer = 0; layer < config.layers; layer++) {
    forward.run_layer(layer, inputs);
    forward.average(layer);
  }
  tiles.for_each(16, [&](const Tiles::Place& place) { forward.fill(config.layers - 1, place); });

  const auto upstream = [&](const Tiles::Place& place, float* to) {
    for (int o = 0; o < config.outputs; o++)
      copy_lanes(call.grad_out + o * numel + place.tile * kTile, 1, place.count, to + o * kTile);
  };
  const auto grad_inputs = [&](const Tiles::Place& place, const float* dx) {
    alignas(64) float g[kTile] = {}, dg[kTile];
    grads.read(place.tile * kTile, place.count, g);
    {
      FlushDenormals flush;
      kernel.features_backward(net.network(), g, dx, dg);
    }
    grad_grads.write(place.tile * kTile, place.count, dg);
    for (int r = 0; r < config.extra; r++)
      std::copy_n(dx + (config.features() + r) * kTile, place.count, call.grad_extra + r * numel + place.tile * kTile);
  };
  backward.step(before, after, inputs, upstream, grad_inputs, true);
  backward.write_grad_phi(call.grad_phi);
}

void layered_segment_backward(const SegmentCall& call) {
  const Config& config = call.config;
  const Tiles tiles(call.tensors);
  const int steps = call.length();
  const int64_t rows = config.rows(), size = tiles.total() * rows * kTile;
  const PackedNetwork net(config, call.phi.const_data_ptr<float>(), Direction::backward);
  const Kernels& kernel = kernels();
  std::vector<const float*> starts, ends;
  for (const SegmentTensor& tensor : call.tensors) {
    starts.push_back(tensor.state);
    if (tensor.grad_end) ends.push_back(tensor.grad_end);
  }

  SegmentStates states(steps, size);
  Floats grad_state(size), adjoints(tiles.total() * kTile);
  const auto state = [&](int t) { return TileRows(tiles, states.at(t), config); };
  const auto gradient = [&](int t, const Tiles::Place& place) {
    return call.steps[t].record + (call.tensors[place.tensor].record_tile + place.tile) * kTile;
  };
  const auto features = [&](int t, const Tiles::Place& place, float* x) {
    alignas(64) float masked[kTile];  // what a record holds beyond the last coordinate must not matter
    const float* g = gradient(t, place);
    if (place.count < kTile) {
      copy_lanes(g, 1, place.count, masked);
      g = masked;
    }
    FlushDenormals flush;
    kernel.features(net.network(), {}, g, nullptr, nullptr, x);
  };

  // All layers of steps [first, last) at once, tile by tile: the averages are known. at(t): the state before step t.
  const auto forward = [&](int first, int last, const auto& at) {
    tiles.for_each(2, [&](const Tiles::Place& place) {
      alignas(64) float x[kMaxFeatures * kTile];
      FlushDenormals flush;
      for (int t = first; t < last; t++) {
        const float* from = at(t) + place.at * rows * kTile;
        float* to = at(t + 1) + place.at * rows * kTile;
        features(t, place, x);
        const float* below = x;
        for (int l = 0; l < config.layers; l++) {
          float* h = to + config.h_row(l) * kTile;
          kernel.layer_forward({net.network().layer[l].forward, nullptr, config.hidden, below, config.inputs(l),
                                from + config.h_row(l) * kTile, config.hidden, from + config.c_row(l) * kTile,
                                to + config.c_row(l) * kTile, h, place.count, nullptr, nullptr});
          if (config.gac > 0)
            fill_cells(tiles, place, call.problems, call.means[t] + l * call.problems * config.gac, config.gac, false,
                       h, h);
          below = h;
        }
      }
    });
  };

  copy_states(tiles, starts, rows, state(0));
  forward(0, steps, [&](int t) { return states.at_first(t); });
  LayeredBackward backward(net, tiles, call.problems, grad_state.data());
  if (ends.empty())
    std::memset(grad_state.data(), 0, sizeof(float) * size);
  else
    copy_states(tiles, ends, rows, backward.grad_state());
  // d loss / d update of step t; takes the adjoint from theta_{t+1} to theta_t.
  const auto upstream = [&](int t, const Tiles::Place& place, float* du) {
    const float* g = gradient(t, place);
    float* adjoint = adjoints.data() + place.at * kTile;
    for (int i = 0; i < kTile; i++) du[i] = i < place.count ? walk_back(call.steps[t], g[i], adjoint[i]) : 0.f;
  };
  std::memset(adjoints.data(), 0, sizeof(float) * tiles.total() * kTile);
  tiles.for_each(64, [&](const Tiles::Place& place) {
    float unused[kTile];
    upstream(steps, place, unused);
  });

  for (int k = states.chunks() - 1; k >= 0; k--) {
    const int first = states.begin(k), last = k + 1 < states.chunks() ? states.begin(k + 1) : steps;
    // The state behind a chunk is that before the next one.
    if (last < steps) forward(first, last - 1, [&](int t) { return states.at(t); });
    for (int t = last - 1; t >= first; t--)
      backward.step(
          state(t), state(t + 1), [&](const Tiles::Place& place, float* x) { features(t, place, x); },
          [&](const Tiles::Place& place, float* du) { upstream(t, place, du); },
          [](const Tiles::Place&, const float*) {}, false);
  }
  for (size_t k = 0; k < call.tensors.size(); k++)
    if (call.tensors[k].grad_start)
      std::memcpy(call.tensors[k].grad_start, backward.grad_state().base[k],
                  sizeof(float) * rows * kTile * tiles_for(call.tensors[k].numel));
  backward.write_grad_phi(call.grad_phi);
}

}  // namespace l2l
