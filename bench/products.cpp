// The matrix products of the kernels without their activations: what part of the multiply-add peak they reach alone.
//
// Built by l2l_fast/benchmark/products.py, one library per instruction set: L2L_KERNELS names the translation unit of
// that set in csrc/cpu/isa, so that the products are compiled with the very code, blocking and flags of the package.
// The cell is left out; its inputs are kept alive by empty asm statements that cost nothing.
//
// Paper's network (2 layers of 20 units, log-sign), one tile after another on the same memory. Each function returns
// multiply-adds per second of the calling thread.
#include L2L_KERNELS

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <vector>

#if defined(__clang__)
#error "compile with g++: clang ends the instruction set's flags at the end of the translation unit"
#endif

namespace {

using namespace l2l;
using namespace l2l::L2L_ISA;

constexpr int kSteps = 20;

// Registers filled, nothing computed: the place of the activations.
template <int N>
L2L_ALWAYS_INLINE void consume(const Wide<N>& x) {
#if defined(__x86_64__)
  L2L_UNROLL for (int i = 0; i < N; i++) __asm__ volatile("" ::"v"(x.v[i]));
#elif defined(__aarch64__)
  L2L_UNROLL for (int i = 0; i < N; i++) __asm__ volatile("" ::"w"(x.v[i]));
#endif
}

// 64-byte aligned floats with small, harmless values.
class Buffer {
 public:
  explicit Buffer(size_t n) : data_(static_cast<float*>(std::aligned_alloc(64, (n * sizeof(float) + 63) / 64 * 64))) {
    for (size_t i = 0; i < n; i++) data_[i] = static_cast<float>(static_cast<int>(i * 7919 % 201) - 100) * 1e-3f;
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  float* get() const { return data_; }

 private:
  float* data_;
};

// A network whose packed weights are one run of memory, as in packing.cpp.
struct Weights {
  Weights() : storage(2 * 4 * 64 * 3 * 68) {
    float* next = storage.get();
    const auto take = [&next](long n) {
      float* begin = next;
      next += n;
      return begin;
    };
    net.config = Config{};
    const int hidden = net.config.hidden;
    for (int l = 0; l < net.config.layers; l++) {
      const int inputs = net.config.inputs(l);
      net.layer[l].forward = take(4L * hidden * (1 + inputs + hidden));
      net.layer[l].backward_input = take(4L * hidden * round_up(inputs, 4));
      net.layer[l].backward_h = take(4L * hidden * round_up(hidden, 4));
    }
    net.weight_out = take(hidden);
    net.bias_out = take(1);
  }
  Buffer storage;
  Network net;
};

// Units [j, j + Units) of a layer on rows of `Stride` lanes.
template <int Units, int Vectors, int Stride>
L2L_ALWAYS_INLINE void products_of_units(const LayerWeights& w, int hidden, int j, const float* x, int inputs,
                                         const float* h) {
  for (long lane = 0; lane < Stride; lane += Vectors * kLanes) {
    Wide<Vectors> a[Units][4];
    gate_preactivations<Units, Vectors>(w.forward + 4L * j * (1 + inputs + hidden), nullptr, {x + lane, Stride}, inputs,
                                        {h + lane, Stride}, hidden, a);
    L2L_UNROLL for (int u = 0; u < Units; u++)
      L2L_UNROLL for (int g = 0; g < 4; g++) consume(a[u][g]);
  }
}

// Repeats work() for `seconds`; returns `multiply_adds` (of one call) per second.
template <class Work>
double rate(double seconds, double multiply_adds, const Work& work) {
  using clock = std::chrono::steady_clock;
  work();
  long calls = 0;
  double elapsed = 0;
  const auto begin = clock::now();
  do {
    for (int i = 0; i < 20; i++) {
      work();
      __asm__ volatile("" ::: "memory");
    }
    calls += 20;
    elapsed = std::chrono::duration<double>(clock::now() - begin).count();
  } while (elapsed < seconds);
  return static_cast<double>(calls) * multiply_adds / elapsed;
}

long forward_multiply_adds(const Config& c) {
  long n = 0;
  for (int l = 0; l < c.layers; l++) n += 4L * c.hidden * (c.inputs(l) + c.hidden);
  return n;
}

}  // namespace

// Pre-activations of both layers as the step forms them, and the read-out.
extern "C" double step_products(double seconds) {
  const Weights weights;
  const Network& net = weights.net;
  const Config& config = net.config;
  const int hidden = config.hidden;
  const Buffer x(kMaxFeatures * kTile), state(static_cast<size_t>(config.rows()) * kTile);
  return rate(seconds, static_cast<double>(kTile) * (forward_multiply_adds(config) + hidden), [&] {
    const float* below = x.get();
    for (int l = 0; l < config.layers; l++) {
      const float* h = state.get() + static_cast<long>(config.h_row(l)) * kTile;
      for (int j = 0; j < hidden; j++)
        products_of_units<1, kStepVectors, kTile>(net.layer[l], hidden, j, below, config.inputs(l), h);
      below = h;
    }
    for (int lane = 0; lane < kTile; lane += kLanes) {
      Wide<1> u{{broadcast(net.bias_out[0])}};
      for (int j = 0; j < hidden; j++) u.v[0] += net.weight_out[j] * load(below + static_cast<long>(j) * kTile + lane);
      consume(u);
    }
  });
}

// Pre-activations as the segment backward forms them again, over the states of all steps.
extern "C" double segment_forward_products(double seconds) {
  const Weights weights;
  const Network& net = weights.net;
  const Config& config = net.config;
  const int hidden = config.hidden;
  const Scratch s(config, kSteps, 1);
  const Buffer base(s.total);
  return rate(seconds, static_cast<double>(kSub) * s.steps * forward_multiply_adds(config), [&] {
    for (int t = 0; t < s.steps; t++) {
      const float* below = base.get() + s.features + t * s.feature_size;
      for (int l = 0; l < config.layers; l++) {
        const float* h = base.get() + s.states + t * s.state_size + static_cast<long>(config.h_row(l)) * kSub;
        int j = 0;
        for (; j + kUnits <= hidden; j += kUnits)
          products_of_units<kUnits, kVectors, kSub>(net.layer[l], hidden, j, below, config.inputs(l), h);
        for (; j < hidden; j++)
          products_of_units<1, kVectors, kSub>(net.layer[l], hidden, j, below, config.inputs(l), h);
        below = h;
      }
    }
  });
}

// Gradients of the layers' inputs and previous h from gate gradients.
extern "C" double segment_input_gradients(double seconds) {
  const Weights weights;
  const Network& net = weights.net;
  const Config& config = net.config;
  const int hidden = config.hidden;
  const Scratch s(config, kSteps, 1);
  const Buffer base(s.total);
  const double multiply_adds = 4.0 * hidden * hidden * (2 * config.layers - 1);
  return rate(seconds, kSub * s.steps * multiply_adds, [&] {
    for (int t = s.steps - 1; t >= 0; t--)
      for (int l = config.layers - 1; l >= 0; l--) {
        const float* gates = base.get() + s.gates + t * s.gate_size + 4L * l * hidden * kSub;
        float* dh = base.get() + s.dh + l * s.dh_layer;
        input_gradients<false>(net.layer[l].backward_h, gates, hidden, hidden, dh);
        if (l == 0) continue;
        std::memset(dh - s.dh_layer, 0, sizeof(float) * s.dh_layer);  // the sums must not grow without bound
        input_gradients<true>(net.layer[l].backward_input, gates, hidden, hidden, dh - s.dh_layer);
      }
  });
}

// Gradients of all weights over the steps of a segment.
extern "C" double segment_weight_gradients(double seconds) {
  const Weights weights;
  const Network& net = weights.net;
  const Config& config = net.config;
  const Scratch s(config, kSteps, 1);
  const Buffer base(s.total), grad_updates(static_cast<size_t>(kSteps) * kTile);
  std::vector<double> sums(PackedLayout(config).floats(config), 0.0);
  const double multiply_adds = forward_multiply_adds(config) + config.hidden;
  return rate(seconds, kSub * s.steps * multiply_adds,
              [&] {
                chunk_weight_gradients(net, s, base.get(), {grad_updates.get(), kTile, kTile}, nullptr, s.steps,
                                       sums.data());
              });
}
