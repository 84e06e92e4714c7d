// Every kernel of the package in one translation unit without PyTorch, for bench/sass.py.
#include "operations.cuh"

namespace l2l {
void* every_kernel[] = {reinterpret_cast<void*>(&run_step), reinterpret_cast<void*>(&run_normalized_step),
                        reinterpret_cast<void*>(&run_segment_backward), reinterpret_cast<void*>(&run_step_backward),
                        reinterpret_cast<void*>(&upload_table)};
}
