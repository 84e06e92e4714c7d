#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "overlap.h"

namespace l2l {
namespace {

struct Piece {
  Region region;
  const char* name;
  int64_t index;
  bool written;

  std::string label() const { return index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]"; }
};

// Whether both have every element at the same address.
bool are_same(const at::Tensor& a, const at::Tensor& b) {
  if (a.const_data_ptr() != b.const_data_ptr() || a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes())
    return false;
  for (int64_t d = 0; d < a.dim(); d++)
    if (a.size(d) > 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

void check_pair(const Piece& later, const Piece& earlier, at::TensorList params, at::TensorList grads) {
  if (later.region.is_apart_from(earlier.region)) return;
  const bool blame_later = !later.written || earlier.written;
  const Piece &read = blame_later ? later : earlier, &other = blame_later ? earlier : later;
  const bool is_gradient = read.name == std::string_view("grads");
  if (is_gradient && other.name == std::string_view("params") && other.index == read.index &&
      are_same(grads[read.index], params[read.index]))
    return;
  TORCH_CHECK_VALUE(false, read.label(), ": expected memory of its own",
                    is_gradient ? " or that of params[" + std::to_string(read.index) + "] with the same strides" : "",
                    ", got memory that is shared with ", other.label(), " or not provably apart from it");
}

}  // namespace

void check_aliasing(at::TensorList params, at::TensorList grads, at::TensorList states, const at::Tensor& phi,
                    const std::optional<at::Tensor>& record, at::IntArrayRef record_tiles,
                    at::ArrayRef<NamedTensor> others) {
  std::vector<Piece> pieces;
  pieces.reserve(4 * params.size() + others.size() + 1);
  for (size_t k = 0; k < params.size(); k++) {
    if (params[k].numel() == 0) continue;
    const int64_t index = static_cast<int64_t>(k);
    // mutable_data_ptr gives a lazy clone its own memory.
    pieces.push_back({{params[k], params[k].mutable_data_ptr()}, "params", index, true});
    TORCH_CHECK_VALUE(pieces.back().region.is_simple(), pieces.back().label(),
                      ": expected memory that provably does not overlap itself (an expanded tensor?), got shape ",
                      params[k].sizes(), " and strides ", params[k].strides());
    pieces.push_back({{states[k], states[k].mutable_data_ptr()}, "states", index, true});
    if (record) {
      const size_t tile = kTile * sizeof(float);
      pieces.push_back({{static_cast<char*>(record->mutable_data_ptr()) + record_tiles[k] * tile,
                         tiles_for(params[k].numel()) * tile},
                        "record_tiles",
                        index,
                        true});
    }
  }
  for (const NamedTensor& other : others)
    if (other.tensor && other.written && other.tensor->numel() > 0)
      pieces.push_back({{*other.tensor, other.tensor->mutable_data_ptr()}, other.name, -1, true});
  for (size_t k = 0; k < grads.size(); k++)
    if (grads[k].numel() > 0)
      pieces.push_back({{grads[k], grads[k].const_data_ptr()}, "grads", static_cast<int64_t>(k), false});
  for (const NamedTensor& other : others)
    if (other.tensor && !other.written && other.tensor->numel() > 0)
      pieces.push_back({{*other.tensor, other.tensor->const_data_ptr()}, other.name, -1, false});
  if (phi.defined()) pieces.push_back({{phi, phi.const_data_ptr()}, "phi", -1, false});

  // In the order of their first bytes: a tensor can meet those only that began before it and have not ended.
  std::vector<std::pair<intptr_t, const Piece*>> order;
  order.reserve(pieces.size());
  for (const Piece& piece : pieces) order.emplace_back(piece.region.begin(), &piece);
  std::sort(order.begin(), order.end());
  std::vector<const Piece*> open[2];  // read, written
  for (const auto& [begin, piece] : order) {
    for (std::vector<const Piece*>& kind : open)
      kind.erase(std::remove_if(kind.begin(), kind.end(),
                                [begin = begin](const Piece* p) { return p->region.end() <= begin; }),
                 kind.end());
    for (const Piece* other : open[true]) check_pair(*piece, *other, params, grads);
    if (piece->written)
      for (const Piece* other : open[false]) check_pair(*piece, *other, params, grads);
    open[piece->written].push_back(piece);
  }
}

}  // namespace l2l
