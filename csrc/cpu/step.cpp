// The step on the CPU: functional, or in place on all tensors of a parameter group. Coordinates that do not communicate
// go through it tile by tile in one parallel region; else it is done layer by layer.
#include <torch/library.h>

#include "backend.h"
#include "dispatch.h"
#include "layered_forward.h"
#include "strided.h"
#include "tensor_steps.h"

namespace l2l {
namespace {

// Tiles a thread takes at least: some 20 microseconds of work.
constexpr int64_t kGrain = 2, kAveragesGrain = 128;  // the latter: without layers

// What comes from a call's tensors and goes to them, tile by tile.
class Coordinates {
 public:
  Coordinates(const StepCall& call, const PackedNetwork& net, const Kernels& kernel)
      : call_(call), net_(net.network()), kernel_(kernel), steps_(net, call.tensors.size()) {
    if (net_.config.averages() > 0)
      for (size_t k = 0; k < call.tensors.size(); k++) steps_.set(k, call.tensors[k].common);
    grads_.reserve(call.tensors.size());
    for (const StepTensor& tensor : call.tensors) {
      grads_.emplace_back(tensor.grad);
      if (tensor.param.defined()) params_.emplace_back(tensor.param);
    }
  }

  const Kernels& kernel() const { return kernel_; }
  const TensorStep& step_of(const Tiles::Place& place) const { return steps_[place.tensor]; }

  // The gradient g [64] and the inputs x [inputs(0)][64] of one tile; lanes beyond the last coordinate are zero.
  // Records the gradient, and takes it into the averages of the new state.
  void read(const Tiles::Place& place, float* g, float* x) const {
    const StepTensor& tensor = call_.tensors[place.tensor];
    const int64_t at = place.tile * tile_floats(net_.config) + net_.config.average_row() * kTile;
    read(place, tensor.state + at, tensor.new_state + at, g, x);
  }

  // Only the gradient.
  void read_gradient(const Tiles::Place& place, float* g) const {
    const int64_t begin = place.tile * kTile;
    std::fill_n(g, kTile, 0.f);
    grads_[place.tensor].read(begin, place.count, g);
    if (call_.maximize)
      for (int i = 0; i < place.count; i++) g[i] = -g[i];
    float* const record = call_.tensors[place.tensor].record;
    if (record) std::copy(g, g + kTile, record + begin);
  }

  // The same as read() with the tile's averages in other places.
  void read(const Tiles::Place& place, const float* averages, float* new_averages, float* g, float* x) const {
    const StepTensor& tensor = call_.tensors[place.tensor];
    const int64_t begin = place.tile * kTile;
    read_gradient(place, g);
    {
      FlushDenormals flush;
      kernel_.features(net_, step_of(place), g, averages, new_averages, x);
    }
    x += net_.config.features() * kTile;
    for (int r = 0; r < net_.config.extra; r++, x += kTile)
      copy_lanes(call_.extra + r * call_.total + tensor.first + begin, 1, place.count, x);
  }

  // The outputs [outputs][64] of one tile, and the update of its parameter.
  void write(const Tiles::Place& place, const float* out) const {
    const int64_t begin = place.tile * kTile, first = call_.tensors[place.tensor].first + begin;
    if (call_.out)
      for (int r = 0; r < net_.config.outputs; r++)
        std::copy_n(out + r * kTile, place.count, call_.out + r * call_.total + first);
    if (!params_.empty()) params_[place.tensor].update(begin, place.count, call_.decay, call_.lr, out);
  }

 private:
  const StepCall& call_;
  const Network& net_;
  const Kernels& kernel_;
  TensorSteps steps_;
  std::vector<StridedView> grads_, params_;
};

// The state that is read behind that of a tile, or null. state: where a tensor has its own, `bytes` a tile.
template <class State>
const void* next_tile(const StepCall& call, const Tiles::Place& place, int64_t bytes, State StepTensor::* state) {
  const StepTensor& tensor = call.tensors[place.tensor];
  if (place.tile + 1 < tiles_for(tensor.grad.numel()))
    return reinterpret_cast<const char*>(tensor.*state) + (place.tile + 1) * bytes;
  return place.tensor + 1 < call.tensors.size() ? call.tensors[place.tensor + 1].*state : nullptr;
}

// Tile by tile: nothing is exchanged between coordinates.
void step_tiles(const StepCall& call, const PackedNetwork& net, const Tiles& tiles, const Coordinates& coordinates) {
  const Kernels& kernel = coordinates.kernel();
  const auto step_tile = call.precision == Precision::bfloat16 ? kernel.bfloat16.step : kernel.step;
  const int64_t stride = tile_floats(call.config);
  tiles.for_each(kGrain, [&](const Tiles::Place& place) {
    alignas(64) float g[kTile], x[(kMaxFeatures + kMaxExtraInputs) * kTile], out[kMaxOutputs * kTile];
    coordinates.read(place, g, x);
    {
      FlushDenormals flush;
      const StepTensor& tensor = call.tensors[place.tensor];
      const TensorStep& step = coordinates.step_of(place);
      float* new_state = tensor.new_state + place.tile * stride;
      step_tile(net.network(), step, x, tensor.state + place.tile * stride, new_state, place.count,
                static_cast<const float*>(next_tile(call, place, 4 * stride, &StepTensor::state)), out);
      if (call.config.averages() > 0)
        kernel.update(net.network(), step, g, new_state + call.config.average_row() * kTile, x, out);
    }
    coordinates.write(place, out);
  });
}

// Of a network without layers, whatever its states are: their averages are all that there is.
void step_averages(const StepCall& call, const PackedNetwork& net, const Tiles& tiles, const Coordinates& coordinates) {
  const Kernels& kernel = kernels();
  const Config& config = call.config;
  const StateType type = call.state_type;
  const int64_t floats = tile_floats(config), bytes = TileLayout(config, type).bytes;
  tiles.for_each(kAveragesGrain, [&](const Tiles::Place& place) {
    alignas(64) float g[kTile], decoded[kAverages * kTile], out[kTile];
    const StepTensor& tensor = call.tensors[place.tensor];
    coordinates.read_gradient(place, g);
    {
      FlushDenormals flush;
      const TensorStep& step = coordinates.step_of(place);
      if (type == StateType::float32) {
        const int64_t at = place.tile * floats;
        kernel.nominal_step(net.network(), step, g, tensor.state + at, tensor.new_state + at, out);
      } else {
        void* const stored = static_cast<char*>(tensor.stored) + place.tile * bytes;
        kernel.decode_averages(config, type, stored, decoded);
        kernel.nominal_step(net.network(), step, g, decoded, decoded, out);
        kernel.encode_averages(config, type, decoded, tensor.seed, place.tile, stored);
      }
    }
    coordinates.write(place, out);
  });
}

// The same as step_tiles() with states that are not float32.
void step_stored_tiles(const StepCall& call, const PackedNetwork& net, const Tiles& tiles,
                       const Coordinates& coordinates) {
  const Kernels& kernel = coordinates.kernel();
  const auto step_tile = call.precision == Precision::bfloat16 ? kernel.bfloat16.stored_step : kernel.stored_step;
  const Config& config = call.config;
  const StateType type = call.state_type;
  const int64_t stride = TileLayout(config, type).bytes;
  tiles.for_each(kGrain, [&](const Tiles::Place& place) {
    alignas(64) float g[kTile], x[kMaxFeatures * kTile], out[kNormalizedReadOuts * kTile], averages[kAverages * kTile];
    const StepTensor& tensor = call.tensors[place.tensor];
    void* const stored = static_cast<char*>(tensor.stored) + place.tile * stride;
    if (config.averages() > 0) kernel.decode_averages(config, type, stored, averages);
    coordinates.read(place, averages, averages, g, x);
    {
      FlushDenormals flush;
      const TensorStep& step = coordinates.step_of(place);
      step_tile(net.network(), step, type, x, stored, place.count, tensor.seed, place.tile,
                next_tile(call, place, stride, &StepTensor::stored), g, averages, out);
    }
    coordinates.write(place, out);
  });
}

// Layer by layer, as far as the call's phases say.
void step_layers(const StepCall& call, const PackedNetwork& net, const Tiles& tiles, const Coordinates& coordinates) {
  const int layers = call.config.layers;
  TileRows from(call.config), to(call.config);
  for (const StepTensor& tensor : call.tensors) {
    from.base.push_back(const_cast<float*>(tensor.state));  // only read, unless it is new_state
    to.base.push_back(tensor.new_state);
  }
  LayeredForward forward{net, tiles, call.problems, from, to, call.means, call.sums, call.in_place()};
  for (int layer = call.first_phase; layer < std::min(call.last_phase, layers); layer++) {
    forward.run_layer(layer, [&](const Tiles::Place& place, float* x) {
      alignas(64) float g[kTile];
      coordinates.read(place, g, x);
    });
    if (layer + 1 < call.last_phase) forward.average(layer);
  }
  if (call.last_phase <= layers || call.first_phase > layers) return;
  tiles.for_each(kGrain, [&](const Tiles::Place& place) {
    alignas(64) float out[kMaxOutputs * kTile];
    {
      FlushDenormals flush;
      forward.fill(layers - 1, place);
      kernels().read_out(net.network(), to(place, call.config.h_row(layers - 1)), out);
    }
    coordinates.write(place, out);
  });
}

}  // namespace

void cpu_step(const StepCall& call) {
  // Once: operands are packed for these kernels, whoever chooses others meanwhile.
  const Kernels& kernel = kernels();
  const Operands operands = call.precision == Precision::bfloat16 ? kernel.bfloat16.operands : Operands::floats;
  const PackedNetwork net(call.config, call.phi.const_data_ptr<float>(), Direction::forward, operands);
  Tiles tiles;
  for (const StepTensor& tensor : call.tensors) tiles.add(tensor.grad.numel());
  const Coordinates coordinates(call, net, kernel);
  if (call.config.layers == 0)
    step_averages(call, net, tiles, coordinates);
  else if (call.state_type != StateType::float32)
    step_stored_tiles(call, net, tiles, coordinates);
  else if (call.config.gac == 0 && call.is_whole())
    step_tiles(call, net, tiles, coordinates);
  else
    step_layers(call, net, tiles, coordinates);
}

}  // namespace l2l
