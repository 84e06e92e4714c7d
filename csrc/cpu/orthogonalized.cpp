// The Newton-Schulz iteration of Muon on every matrix of a stack; the oracle is l2l_fast/kernels/orthogonal.py.
// Products of its own, because those of torch's libraries depend on the number of threads and on the stack: here every
// sum has one order, which depends on the matrix's shape alone.
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <utility>
#include <vector>

#include "../ops/arguments.h"
#include "backend.h"
#include "dispatch.h"
#include "panels.h"
#include "tiles.h"

namespace l2l {
namespace {

constexpr double kA = 3.4445, kB = -4.7750, kC = 2.0315;
constexpr double kLeastNorm = 1e-30;
constexpr int64_t kSquares = 1 << 14;  // numbers in a partial sum

// Matrices up to so many multiply-adds in a product are each one thread's, others every thread's.
constexpr int64_t kSmall = int64_t{1} << 21;
// Floats of scratch that a thread keeps for its next call.
constexpr int64_t kKept = 1 << 17;

struct Shape {
  int64_t rows, cols;
  int64_t numel() const { return rows * cols; }
  int64_t low() const { return std::min(rows, cols); }
  int64_t high() const { return std::max(rows, cols); }
  bool tall() const { return rows > cols; }
  bool small() const { return low() * low() <= kSmall / high(); }
};

// body(begin, end) over [0, n): on the calling thread, or on all.
struct Alone {
  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    if (n > 0) body(int64_t{0}, n);
  }
};
struct Together {
  template <class Body>
  void operator()(int64_t n, const Body& body) const {
    parallel_for(n, 1, body);
  }
};

// One matrix. X is its wide form; the transpose of X and the next X take turns in the memory beside it.
template <class Run>
class Iteration {
 public:
  Iteration(const Kernels& kernels, Shape shape, Run run)
      : kernels_(kernels), shape_(shape), rows_(padded_rows(shape.low(), kernels.panels.block_rows)), run_(run) {}

  // Floats. No more than a few matrices, but for those of fewer rows or columns than a vector has lanes.
  int64_t scratch() const { return shape_.low() == 1 ? 0 : 2 * tall(nullptr).floats() + 2 * square(nullptr).floats(); }

  void operator()(const float* update, int64_t steps, float* out, float* scratch) const {
    if (shape_.low() == 1) return of_vector(update, steps, out);
    float *x = scratch, *beside = x + tall(nullptr).floats();
    const Panels gram = square(beside + tall(nullptr).floats()), mix = square(gram.at(0) + gram.floats());
    if (shape_.tall()) {
      load(update, tall(beside));
      transpose(tall(beside), wide(x));
    } else {
      load(update, wide(x));
    }
    for (int64_t step = 0; step < steps; step++) {
      if (step > 0 || !shape_.tall()) transpose(wide(x), tall(beside));
      symmetric_product(tall(beside), shape_.high(), nullptr, 1.f, 0.f, gram);
      symmetric_product(gram, shape_.low(), &gram, static_cast<float>(kC), static_cast<float>(kB), mix);
      advance(mix, wide(x), wide(beside));
      std::swap(x, beside);
    }
    if (shape_.tall()) {
      transpose(wide(x), tall(beside));
      store(tall(beside), out);
    } else {
      store(wide(x), out);
    }
  }

 private:
  Panels wide(float* data) const { return {kernels_, rows_, shape_.high(), data}; }
  Panels tall(float* data) const { return {kernels_, round_up(shape_.high(), kernels_.lanes), shape_.low(), data}; }
  Panels square(float* data) const { return {kernels_, rows_, shape_.low(), data}; }

  // Where numbers are tiny from here on, they are nothing beside the others of their matrix.
  template <class Body>
  void for_each(int64_t n, const Body& body) const {
    run_(n, [&](int64_t begin, int64_t end) {
      const FlushDenormals flush;
      for (int64_t i = begin; i < end; i++) body(i);
    });
  }

  double norm(const float* update) const {
    const int64_t parts = (shape_.numel() + kSquares - 1) / kSquares;
    std::vector<double> sums(parts);
    run_(parts, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        sums[i] = kernels_.panels.squares(update + i * kSquares, std::min(kSquares, shape_.numel() - i * kSquares));
    });
    double total = 0.0;
    for (const double sum : sums) total += sum;
    return std::sqrt(total);
  }

  // Of which the only singular value is the norm.
  void of_vector(const float* update, int64_t steps, float* out) const {
    const double before = norm(update);
    double factor = 1.0 / std::max(before, kLeastNorm);
    for (int64_t step = 0; step < steps; step++) {
      const double square = before * factor * before * factor;
      factor *= kA + (kB + kC * square) * square;
    }
    run_((shape_.numel() + kSquares - 1) / kSquares, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kSquares, count = std::min(end * kSquares, shape_.numel()) - first;
      kernels_.panels.scale(update + first, count, factor, out + first);
    });
  }

  void load(const float* update, const Panels& to) const {
    const double factor = 1.0 / std::max(norm(update), kLeastNorm);
    run_(to.rows(), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        for (int64_t p = 0; p < to.count(); p++) {
          float* const at = to.at(p, row);
          const int64_t held = row < shape_.rows ? std::min(to.width(p), shape_.cols - to.first(p)) : 0;
          if (held > 0) kernels_.panels.scale(update + row * shape_.cols + to.first(p), held, factor, at);
          std::fill(at + held, at + to.width(p), 0.f);
        }
    });
  }

  void store(const Panels& from, float* out) const {
    run_(shape_.rows, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; row++)
        for (int64_t p = 0; p < from.count(); p++)
          std::copy_n(from.at(p, row), std::min(from.width(p), shape_.cols - from.first(p)),
                      out + row * shape_.cols + from.first(p));
    });
  }

  void transpose_one(const Panels& from, int64_t panel, int64_t block, const Panels& to) const {
    const auto columns = static_cast<int>(std::min(from.width(panel), to.rows() - from.first(panel)));
    kernels_.panels.transpose(from.at(panel, from.first(block)), from.width(panel),
                              static_cast<int>(from.block_rows(block)), columns, to.at(block, from.first(panel)),
                              to.width(block), static_cast<int>(to.width(block)));
  }

  void transpose(const Panels& from, const Panels& to) const {
    for_each(from.count() * to.count(), [&](int64_t i) { transpose_one(from, i / to.count(), i % to.count(), to); });
  }

  // A block of out = factor left^T right + base_factor base.
  void product(const Panels& left, const Panels& right, int64_t depth, const Panels* base, float factor,
               float base_factor, const Panels& out, int64_t panel, int64_t block) const {
    const int64_t row = out.first(block);
    kernels_.panels.product({left.at(block), right.at(panel), static_cast<long>(left.width(block)),
                             static_cast<long>(right.width(panel)), depth, static_cast<int>(out.block_rows(block)),
                             out.vectors(panel), base ? base->at(panel, row) : nullptr, out.at(panel, row),
                             static_cast<long>(out.width(panel)), factor, base_factor});
  }

  // out = factor m^T m + base_factor base: the blocks on and above the diagonal, the others are copies.
  void symmetric_product(const Panels& m, int64_t depth, const Panels* base, float factor, float base_factor,
                         const Panels& out) const {
    const auto triangle = [](int64_t n) { return n * (n + 1) / 2; };
    const auto for_each_pair = [&](int64_t n, const auto& body) {  // (k, i), i <= k < n
      for_each(triangle(n), [&](int64_t at) {
        auto k = static_cast<int64_t>(std::sqrt(2.0 * static_cast<double>(at)));
        while (triangle(k) > at) k--;
        while (triangle(k + 1) <= at) k++;
        body(k, at - triangle(k));
      });
    };
    for_each_pair(out.count(), [&](int64_t panel, int64_t block) {
      product(m, m, depth, base, factor, base_factor, out, panel, block);
    });
    for_each_pair(out.count() - 1, [&](int64_t k, int64_t i) { transpose_one(out, k + 1, i, out); });
  }

  // next = a x + mix x; mix is symmetric.
  void advance(const Panels& mix, const Panels& x, const Panels& next) const {
    const int64_t blocks = mix.count();
    for_each(x.count() * blocks, [&](int64_t i) {
      product(mix, x, shape_.low(), &x, 1.f, static_cast<float>(kA), next, i / blocks, i % blocks);
    });
  }

  const Kernels& kernels_;
  const Shape shape_;
  const int64_t rows_;
  const Run run_;
};

}  // namespace

at::Tensor orthogonalized(const at::Tensor& updates, int64_t steps) {
  check_orthogonalized(updates, steps);
  at::Tensor result = at::empty_like(updates);
  if (updates.numel() == 0) return result;
  const Kernels& set = kernels();
  const Shape shape{updates.size(1), updates.size(2)};
  const float* from = updates.const_data_ptr<float>();
  float* to = result.mutable_data_ptr<float>();
  if (shape.small()) {
    const Iteration iteration(set, shape, Alone{});
    const int64_t floats = iteration.scratch();
    parallel_for(updates.size(0), 1, [&](int64_t begin, int64_t end) {
      std::optional<Floats> own;
      if (floats > kKept) own.emplace(floats);
      float* const scratch = own ? own->data() : scratch_of_thread(floats);
      for (int64_t k = begin; k < end; k++) iteration(from + k * shape.numel(), steps, to + k * shape.numel(), scratch);
    });
  } else {
    const Iteration iteration(set, shape, Together{});
    Floats scratch(iteration.scratch());
    for (int64_t k = 0; k < updates.size(0); k++)
      iteration(from + k * shape.numel(), steps, to + k * shape.numel(), scratch.data());
  }
  return result;
}

}  // namespace l2l
