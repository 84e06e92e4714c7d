// Planted bugs: every kernel exists with its bug and, as the variant "fixed", without. What has to catch which bug is
// the table in ../test_planted_bugs.py.
#pragma once

#include <cooperative_groups.h>

#include "cuda/ptx.cuh"
#include "cuda_on_host/harness.h"

using harness::DeviceVector;
using harness::random_values;
namespace cg = cooperative_groups;

// A case that launches kernel<true> or kernel<false> and compares its output with what is expected.
#define PLANTED(name) CASE_WITH_VARIANTS(name)
#define IS_FIXED (variant == "fixed")
#define LAUNCH_EITHER(kernel, ...)                                  \
  CUDA(IS_FIXED ? harness::launch(false, kernel<true>, __VA_ARGS__) \
                : harness::launch(false, kernel<false>, __VA_ARGS__))
#define LAUNCH_EITHER_COOPERATIVE(kernel, ...) \
  CUDA(IS_FIXED ? harness::launch(true, kernel<true>, __VA_ARGS__) : harness::launch(true, kernel<false>, __VA_ARGS__))
