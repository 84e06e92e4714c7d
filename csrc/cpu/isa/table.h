// The kernel table of one instruction set. Each .cpp of this folder defines L2L_ISA and L2L_LANES, is compiled with
// that set's flags, and includes this file and nothing else.
#include "bfloat16.h"
#include "layer.h"
#include "panels.h"
#include "sums.h"

namespace l2l {
namespace L2L_ISA {

static void vector_function(VectorFunction function, const float* x, float* y, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) {
    float lanes[kLanes];
    for (int k = 0; k < kLanes; k++) lanes[k] = i + k < n ? x[i + k] : 0.f;
    Wide<1> v = load_wide<1>(lanes);
    switch (function) {
      case VectorFunction::exp2:
        v = Math<1>::exp2(v);
        break;
      case VectorFunction::sigmoid_scaled:
        v = Math<1>::sigmoid_scaled(v);
        break;
      case VectorFunction::tanh_scaled:
        v = Math<1>::tanh_scaled(Math<1>::min(kTanhBound, v));
        break;
      case VectorFunction::log:
        v = Math<1>::log(v);
        break;
    }
    store_wide(lanes, v);
    for (int k = 0; k < kLanes && i + k < n; k++) y[i + k] = lanes[k];
  }
}

// As many independent chains as hide the latency of a multiply-add; the asm keeps the compiler from folding them.
static int64_t multiply_adds(int64_t repeats, float* sink) {
  constexpr int kChains = 12;
  vf sum[kChains], factor = broadcast(0.999f), addend = broadcast(0.001f);
  L2L_UNROLL for (int i = 0; i < kChains; i++) sum[i] = broadcast((float)i);
  for (int64_t r = 0; r < repeats; r++) {
    L2L_UNROLL for (int i = 0; i < kChains; i++) {
      sum[i] = sum[i] * factor + addend;
#if defined(__x86_64__)
      __asm__ volatile("" : "+v"(sum[i]));
#endif
    }
  }
  vf total = sum[0];
  L2L_UNROLL for (int i = 1; i < kChains; i++) total += sum[i];
  store(sink, total);
  return repeats * kChains * kLanes;
}

#define L2L_STRING_(x) #x
#define L2L_STRING(x) L2L_STRING_(x)
extern const Kernels kernels = {L2L_STRING(L2L_ISA),
                                kLanes,
                                tile_features,
                                tile_features_backward,
                                step,
                                tile_update,
                                nominal_step,
                                tile_sums,
                                stored_step,
                                decode_averages,
                                encode_averages,
                                backward_scratch,
                                backward,
                                layer_forward,
                                read_out,
                                layer_backward_scratch,
                                layer_backward,
                                read_out_backward,
                                {kBfloat16Operands, bfloat16_step, bfloat16_stored_step},
                                {kPanelWidth, kBlockRows, panel_product, transpose_block, sum_of_squares, scale_finite},
                                vector_function,
                                multiply_adds};

}  // namespace L2L_ISA
}  // namespace l2l
