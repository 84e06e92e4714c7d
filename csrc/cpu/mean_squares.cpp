// The mean square of every tensor of a list, for what networks are told of a tensor as a whole.
#include <ATen/ops/empty.h>

#include <cmath>

#include "../ops/arguments.h"
#include "backend.h"
#include "strided.h"
#include "tiles.h"

namespace l2l {

// In float64, of 64 fixed slices that are added in order: the same for any number of threads. What is not finite counts
// as zero: one bad coordinate must not reach the others through their tensor.
at::Tensor mean_squares(at::TensorList tensors) {
  at::Tensor out = at::empty({static_cast<int64_t>(tensors.size())}, at::TensorOptions().dtype(at::kDouble));
  double* const means = out.mutable_data_ptr<double>();
  for (size_t k = 0; k < tensors.size(); k++) {
    check_coordinates(tensors[k], "tensors", static_cast<int64_t>(k));
    const at::Tensor tensor = tensors[k].resolve_neg();
    const StridedView view(tensor);
    Tiles tiles;
    tiles.add(view.numel());
    std::vector<double> sums(tiles.slices(), 0.0);
    tiles.for_each_slice([] { return 0; },
                         [&](int64_t slice, int64_t begin, int64_t end, int) {
                           tiles.visit(begin, end, [&](const Tiles::Place& place) {
                             float x[kTile];
                             view.read(place.tile * kTile, place.count, x);
                             for (int i = 0; i < place.count; i++)
                               if (std::isfinite(x[i])) sums[slice] += static_cast<double>(x[i]) * x[i];
                           });
                         });
    double sum = 0.0;
    for (const double part : sums) sum += part;
    means[k] = view.numel() > 0 ? sum / static_cast<double>(view.numel()) : 0.0;
  }
  return out;
}

}  // namespace l2l
