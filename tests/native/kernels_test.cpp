// The kernels of every instruction set on one tile, against the naive form, with each buffer allocated to its exact
// size so that AddressSanitizer sees any access beside it. Free of PyTorch, so that all of it is instrumented.
//
// usage: kernels_test [instruction set ...]       (default: all that this machine has)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "cpu/dispatch.h"
#include "cpu/packing.h"
#include "naive.h"

namespace {

using l2l::Config;
using l2l::Kernels;
using l2l::kTile;

int failures = 0;
int checks = 0;

// `size` elements that start at an odd multiple of the element's size: no kernel may count on more alignment.
template <class T>
class Exact {
 public:
  explicit Exact(size_t size) : size_(size), memory_(static_cast<T*>(std::malloc((size + 1) * sizeof(T)))) {
    std::fill(memory_.get(), memory_.get() + size + 1, static_cast<T>(std::nan("")));
  }
  T* data() { return memory_.get() + 1; }
  const T* data() const { return memory_.get() + 1; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data()[i]; }
  const T& operator[](size_t i) const { return data()[i]; }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  size_t size_;
  std::unique_ptr<T, Free> memory_;
};

struct Case {
  Config config;
  int steps;
  bool end_gradient, need_state, need_grads;

  void print(const char* isa, const char* what) const {
    std::printf("%s: hidden=%d layers=%d %s p=%g extra=%d outputs=%d steps=%d end=%d state=%d grads=%d: %s", isa,
                config.hidden, config.layers, l2l::kPreprocessNames[(int)config.preprocess], config.p, config.extra,
                config.outputs, steps, end_gradient, need_state, need_grads, what);
  }
};

// ||actual - expected|| <= tolerance ||expected||; a NaN fails.
template <class T>
void compare(const Case& test, const char* isa, const char* what, const T* actual, const naive::Vector& expected,
             double tolerance) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); i++) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  checks++;
  if (difference <= tolerance * tolerance * norm) return;
  failures++;
  test.print(isa, what);
  std::printf(": relative error %.2e\n", std::sqrt(difference / norm));
}

// Gradients over many orders of magnitude for log-sign, of order one for identity.
float draw_gradient(const Config& config, std::mt19937& random) {
  std::normal_distribution<float> normal;
  const float g = normal(random);
  if (config.preprocess == l2l::Preprocess::identity) return g;
  return g * std::pow(10.f, std::uniform_real_distribution<float>(-7, 2)(random));
}

// The step alone, also of networks with extra inputs and several outputs.
void check_step(const Kernels& kernels, const Case& test, const l2l::PackedNetwork& net, const naive::Vector& phi,
                const Exact<float>& grads, const Exact<float>& start, std::mt19937& random) {
  const Config& config = test.config;
  const int rows = config.rows();
  std::uniform_real_distribution<float> uniform(-1, 1);
  Exact<float> inputs((size_t)config.features() * kTile), extra((size_t)config.extra * kTile);
  for (size_t i = 0; i < extra.size(); i++) extra[i] = uniform(random);
  kernels.features(net.network(), {}, grads.data(), nullptr, nullptr, inputs.data());
  Exact<float> all((size_t)config.inputs(0) * kTile), state(start.size()), out_of_place(start.size());
  std::copy(inputs.data(), inputs.data() + inputs.size(), all.data());
  std::copy(extra.data(), extra.data() + extra.size(), all.data() + inputs.size());
  std::copy(start.data(), start.data() + start.size(), state.data());
  Exact<float> outputs((size_t)config.outputs * kTile), other_outputs(outputs.size());
  kernels.step(net.network(), {}, all.data(), start.data(), out_of_place.data(), kTile, nullptr, other_outputs.data());
  kernels.step(net.network(), {}, all.data(), state.data(), state.data(), kTile, start.data(), outputs.data());

  naive::Vector new_state(start.size()), expected(outputs.size());
  for (int lane = 0; lane < kTile; lane++) {
    naive::Vector coordinate(rows), more(config.extra);
    for (int r = 0; r < rows; r++) coordinate[r] = start[r * kTile + lane];
    for (int r = 0; r < config.extra; r++) more[r] = extra[r * kTile + lane];
    naive::Trace trace;
    const naive::Vector out = naive::step(config, phi, grads[lane], more, coordinate, trace);
    for (int o = 0; o < config.outputs; o++) expected[o * kTile + lane] = out[o];
    for (int r = 0; r < rows; r++) new_state[r * kTile + lane] = coordinate[r];
  }
  compare(test, kernels.name, "outputs", outputs.data(), expected, 2e-5);
  compare(test, kernels.name, "outputs out of place", other_outputs.data(), expected, 2e-5);
  compare(test, kernels.name, "state", state.data(), new_state, 2e-5);
  compare(test, kernels.name, "state out of place", out_of_place.data(), new_state, 2e-5);

  // With bfloat16 products, whose oracle is in Python, near to the same; every buffer has its exact size here.
  const l2l::Bfloat16Kernels& narrow = kernels.bfloat16;
  const std::vector<float> floats(phi.begin(), phi.end());
  const l2l::PackedNetwork packed(config, floats.data(), l2l::Direction::forward, narrow.operands);
  std::copy(start.data(), start.data() + start.size(), state.data());
  narrow.step(packed.network(), {}, all.data(), start.data(), out_of_place.data(), kTile, nullptr,
              other_outputs.data());
  narrow.step(packed.network(), {}, all.data(), state.data(), state.data(), kTile, start.data(), outputs.data());
  compare(test, kernels.name, "bfloat16 outputs", outputs.data(), expected, 1e-2);
  compare(test, kernels.name, "bfloat16 outputs out of place", other_outputs.data(), expected, 1e-2);
  compare(test, kernels.name, "bfloat16 state", state.data(), new_state, 1e-2);
  compare(test, kernels.name, "bfloat16 state out of place", out_of_place.data(), new_state, 1e-2);
}

void check_case(const Kernels& kernels, const Case& test, unsigned seed) {
  const Config& config = test.config;
  const int rows = config.rows();
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const float bound = 1.2f / std::sqrt((float)config.hidden);

  Exact<float> phi(config.phi_size());
  for (size_t i = 0; i < phi.size(); i++) phi[i] = bound * uniform(random);
  const naive::Vector wide_phi(phi.data(), phi.data() + phi.size());
  const l2l::PackedNetwork net(config, phi.data(), l2l::Direction::backward);

  Exact<float> start((size_t)rows * kTile), end((size_t)rows * kTile);
  for (size_t i = 0; i < start.size(); i++) start[i] = 0.8f * uniform(random);
  for (size_t i = 0; i < end.size(); i++) end[i] = uniform(random);
  std::vector<Exact<float>> grads;
  std::vector<const float*> grad_rows;
  Exact<float> grad_updates((size_t)test.steps * kTile);
  for (int t = 0; t < test.steps; t++) {
    grads.emplace_back(kTile);
    for (int lane = 0; lane < kTile; lane++) grads.back()[lane] = draw_gradient(config, random);
  }
  for (const auto& row : grads) grad_rows.push_back(row.data());
  for (size_t i = 0; i < grad_updates.size(); i++) grad_updates[i] = uniform(random);

  check_step(kernels, test, net, wide_phi, grads[0], start, random);
  if (!config.is_plain()) return;

  // Back through the steps.
  Exact<double> sums(l2l::PackedLayout(config).floats(config));
  std::fill(sums.data(), sums.data() + sums.size(), 0.0);
  Exact<float> grad_state(start.size()), grad_grads((size_t)test.steps * kTile), grad_phi(phi.size());
  Exact<char> scratch(kernels.backward_scratch(config, test.steps) + 3);
  float* aligned = reinterpret_cast<float*>(scratch.data() + 3);  // malloc's alignment plus 4, exact at the end
  const std::vector<l2l::TensorStep> nothing(test.steps);
  kernels.backward(net.network(),
                   {test.steps, kTile, grad_rows.data(), nothing.data(), grad_updates.data(), start.data(),
                    test.end_gradient ? end.data() : nullptr, test.need_state ? grad_state.data() : nullptr,
                    test.need_grads ? grad_grads.data() : nullptr, sums.data()},
                   aligned);
  l2l::unpack_gradient(config, sums.data(), grad_phi.data());

  // The same, naively.
  naive::Vector d_phi(phi.size()), d_start(start.size());
  naive::Vector d_grads((size_t)test.steps * kTile);
  for (int lane = 0; lane < kTile; lane++) {
    naive::Vector coordinate(rows), d_state(rows);
    for (int r = 0; r < rows; r++) coordinate[r] = start[r * kTile + lane];
    std::vector<naive::Trace> traces(test.steps);
    for (int t = 0; t < test.steps; t++) naive::step(config, wide_phi, grads[t][lane], {}, coordinate, traces[t]);
    for (int r = 0; r < rows; r++) d_state[r] = test.end_gradient ? end[r * kTile + lane] : 0.0;
    for (int t = test.steps - 1; t >= 0; t--)
      d_grads[t * kTile + lane] =
          naive::step_backward(config, wide_phi, traces[t], grad_updates[t * kTile + lane], d_state, d_phi);
    for (int r = 0; r < rows; r++) d_start[r * kTile + lane] = d_state[r];
  }

  compare(test, kernels.name, "d phi", grad_phi.data(), d_phi, 5e-5);
  if (test.need_state) compare(test, kernels.name, "d state", grad_state.data(), d_start, 5e-5);
  if (test.need_grads) compare(test, kernels.name, "d grad", grad_grads.data(), d_grads, 5e-5);
}

void check_network_sizes(const Kernels& kernels) {
  unsigned seed = 1;
  for (int hidden : {4, 5, 6, 7, 8, 11, 15, 16, 20, 23, 33, 64})
    for (int layers = 1; layers <= l2l::kMaxLayers; layers++) {
      if (hidden * layers > 140) continue;  // the naive form takes its time
      for (auto preprocess : {l2l::Preprocess::identity, l2l::Preprocess::log_sign}) {
        const Config config{hidden, layers, preprocess, layers % 2 ? 10.f : 4.f, 0.3f};
        const int steps = 1 + (int)seed % 3;
        check_case(kernels, {config, steps, seed % 2 == 0, seed % 3 != 0, seed % 5 != 0}, seed);
        Config larger = config;
        larger.extra = (int)seed % (l2l::kMaxExtraInputs + 1);
        larger.outputs = 1 + (int)(7 * seed) % l2l::kMaxOutputs;
        if (!larger.is_plain()) check_case(kernels, {larger, 1, false, false, false}, seed);
        seed++;
      }
    }
}

// Segments that fit the scratch exactly, that need one chunk more, and many.
void check_segment_lengths(const Kernels& kernels) {
  for (const Config& config : {Config{5, 1, l2l::Preprocess::log_sign, 10.f, 0.1f}, Config{20, 2},
                               Config{33, 2, l2l::Preprocess::identity, 10.f, 1.f}}) {
    // The scratch grows by a step's activations until a chunk is full; short segments have two sub-tiles in it at once.
    const size_t activations = sizeof(float) * 32 * (size_t)(config.rows() + 5 * config.layers * config.hidden);
    const auto bytes = [&](int n) { return kernels.backward_scratch(config, n); };
    int chunk = 1, both = 1;
    for (int n = 2; n < 1000; n++) {
      if (bytes(n) >= bytes(n - 1) + activations) chunk = n;
      if (bytes(n) >= bytes(n - 1) + 2 * activations) both = n;
    }
    // Shorter chunks give the same results, only later: every chunk but the last runs forward twice. The activations of
    // a segment of the paper's length (20 steps of 2 x 20 units) stay in the scratch, all of them.
    checks++;
    if ((config.hidden == 20 && chunk < 20) || chunk < 4 || chunk / 2 != both) {
      failures++;
      std::printf("%s: hidden=%d: chunks of %d steps, of both sub-tiles %d\n", kernels.name, config.hidden, chunk,
                  both);
      continue;
    }
    const int limit = config.hidden < 10 ? 1 : 3;
    for (int steps : {both, both + 1, chunk - 1, chunk, chunk + 1, limit * chunk + 2})
      if (steps >= 1 && steps <= 340) check_case(kernels, {config, steps, true, true, true}, 1000 + steps);
  }
}

// Networks with normalized inputs, of which the oracle is in Python: every buffer has its exact size here, so that an
// access beside one shows, and everything that comes out is a number.
void check_normalized(const Kernels& kernels, const Config& config, int steps, unsigned seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<float> uniform(-1, 1);
  const auto filled = [&](size_t size) {
    Exact<float> x(size);
    for (size_t i = 0; i < size; i++) x[i] = uniform(random);
    return x;
  };
  const Exact<float> phi = filled(config.phi_size()), inputs = filled(config.tensor_inputs);
  const Exact<float> bias = filled((size_t)l2l::kGates * config.hidden), updates = filled((size_t)steps * kTile);
  const Exact<float> start = filled((size_t)config.rows() * kTile), end = filled(start.size());
  const l2l::PackedNetwork net(config, phi.data(), l2l::Direction::backward);
  l2l::TensorStep tensor{inputs.data(), config.tensor_inputs > 0 ? bias.data() : nullptr, {}, {}};
  std::vector<l2l::TensorStep> tensors;
  std::vector<Exact<float>> grads;
  std::vector<const float*> rows;
  for (int t = 0; t < steps; t++) {
    tensor.correction = l2l::make_correction(config, 1 + t);
    tensors.push_back(tensor);
    grads.push_back(filled(kTile));
  }
  for (const auto& row : grads) rows.push_back(row.data());

  Exact<float> x((size_t)config.features() * kTile), out((size_t)config.read_outs() * kTile);
  const size_t averages = (size_t)config.average_row() * kTile;
  Exact<float> after(start.size());
  kernels.features(net.network(), tensors[0], rows[0], start.data() + averages, after.data() + averages, x.data());
  kernels.step(net.network(), tensors[0], x.data(), start.data(), after.data(), kTile, nullptr, out.data());
  kernels.update(net.network(), tensors[0], rows[0], after.data() + averages, x.data(), out.data());

  Exact<double> sums(l2l::PackedLayout(config).floats(config));
  std::fill(sums.data(), sums.data() + sums.size(), 0.0);
  Exact<float> grad_state(start.size()), grad_grads(updates.size()), grad_phi(phi.size());
  Exact<char> scratch(kernels.backward_scratch(config, steps) + 3);
  kernels.backward(net.network(),
                   {steps, kTile, rows.data(), tensors.data(), updates.data(), start.data(), end.data(),
                    grad_state.data(), grad_grads.data(), sums.data()},
                   reinterpret_cast<float*>(scratch.data() + 3));
  l2l::unpack_gradient(config, sums.data(), grad_phi.data());
  for (const Exact<float>* each : {&after, &grad_state, &grad_grads, &grad_phi}) {
    checks++;
    bool finite = true;
    for (size_t i = 0; i < each->size(); i++) finite = finite && std::isfinite((*each)[i]);
    if (finite) continue;
    failures++;
    std::printf("%s: normalized, hidden=%d layers=%d inputs=%d steps=%d: not a number\n", kernels.name, config.hidden,
                config.layers, config.tensor_inputs, steps);
  }
}

void check_normalized_sizes(const Kernels& kernels) {
  unsigned seed = 1;
  for (int hidden : {4, 7, 20, 33, 64})
    for (int layers : {1, 2})
      for (int inputs : {0, 1, l2l::kMaxTensorInputs})
        for (int steps : {1, 3, 45}) {
          Config config{hidden, layers, l2l::Preprocess::normalized};
          config.tensor_inputs = inputs;
          config.rates = {{0.1f, 0.01f, 0.05f, 0.001f}};
          check_normalized(kernels, config, steps, seed++);
        }
}

void check_vector_functions(const Kernels& kernels) {
  for (int n = 0; n <= 2 * kernels.lanes + 1; n++)
    for (auto function : {l2l::VectorFunction::exp2, l2l::VectorFunction::sigmoid_scaled,
                          l2l::VectorFunction::tanh_scaled, l2l::VectorFunction::log}) {
      Exact<float> x(n), y(n);
      std::fill(x.data(), x.data() + n, 1.f);
      kernels.vector_function(function, x.data(), y.data(), n);
      for (int i = 0; i < n; i++) {
        checks++;
        if (std::isfinite(y[i])) continue;
        failures++;
        std::printf("%s: vector function %d of %d numbers\n", kernels.name, (int)function, n);
      }
    }
  Exact<float> sink(kernels.lanes);
  checks++;
  if (kernels.multiply_adds(10, sink.data()) <= 0) failures++;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.empty()) names = l2l::available_instruction_sets();
  for (const std::string& name : names) {
    l2l::set_instruction_set(name);
    check_network_sizes(l2l::kernels());
    check_segment_lengths(l2l::kernels());
    check_normalized_sizes(l2l::kernels());
    check_vector_functions(l2l::kernels());
    std::printf("%s: %d comparisons so far, %d failures\n", name.c_str(), checks, failures);
  }
  return failures > 0;
}
