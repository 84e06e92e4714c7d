// How a test steers the runtime and reads its findings.
#pragma once

#include <cstddef>

extern "C" {
// The schedule: 0 in order, -1 reversed, from 1 on random. CUDA_ON_HOST_SEED sets the first one.
void cuda_on_host_set_seed(int seed);
// "sm_80,multiprocessors=8,registers=64,devices=2,cooperative=0,parameters=4096"; returns 1 if that is not understood.
int cuda_on_host_set_device(const char* text);
// What went wrong last, in full; kept until the next error.
const char* cuda_on_host_message();
// The pending cudaError_t, which it clears, even one of device code: as if a new process began.
int cuda_on_host_take_error();
// "launches", "copies" (cudaMemcpy and cudaMemset), "allocations", "synchronizations" since the last reset, and
// "live_allocations"; any other name gives the largest value.
unsigned long long cuda_on_host_counter(const char* name);
void cuda_on_host_reset_counters();
// One line per launch since the last reset: kernel, grid, block, dynamic shared memory, cooperative or not.
const char* cuda_on_host_launch_log();
void* cuda_on_host_malloc(size_t bytes);
int cuda_on_host_free(void* pointer);
}
