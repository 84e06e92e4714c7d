// Every kernel of the package in one translation unit without PyTorch, for bench/sass.py.
#include "operations.cuh"

namespace l2l {
constexpr auto run_normalized_segment_backward = &run_backward<NormalizedBackwardScalars, NormalizedBackwardEntry>;
void* every_kernel[] = {
    reinterpret_cast<void*>(&run_step),          reinterpret_cast<void*>(&run_normalized_step),
    reinterpret_cast<void*>(&run_stored_step),   reinterpret_cast<void*>(&run_segment_backward),
    reinterpret_cast<void*>(&run_step_backward), reinterpret_cast<void*>(run_normalized_segment_backward),
    reinterpret_cast<void*>(&run_tensor_sums),   reinterpret_cast<void*>(&upload_table)};
}  // namespace l2l
