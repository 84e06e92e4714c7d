// The C interface for tests: seeds, the device, counters, messages. Called through ctypes or declared in
// ../include/cuda_on_host/control.h.
#pragma once

#include "../include/cuda_on_host/control.h"
#include "launch.h"

extern "C" {
void cuda_on_host_set_seed(int seed) { cuda_on_host::schedule.set_seed(seed); }

int cuda_on_host_set_device(const char* text) {
  return cuda_on_host::parse_device(text, &cuda_on_host::device) ? 0 : 1;
}

const char* cuda_on_host_message() { return cuda_on_host::error_state.message.c_str(); }

int cuda_on_host_take_error() {
  cuda_on_host::error_state.sticky = false;
  return cuda_on_host::get_last_error(true);
}

unsigned long long cuda_on_host_counter(const char* name) {
  const std::string counter = name;
  if (counter == "launches") return cuda_on_host::counters.launches;
  if (counter == "copies") return cuda_on_host::counters.copies;
  if (counter == "allocations") return cuda_on_host::counters.allocations;
  if (counter == "synchronizations") return cuda_on_host::counters.synchronizations;
  if (counter == "live_allocations") return cuda_on_host::allocations.count();
  return ~0ull;
}

void cuda_on_host_reset_counters() {
  cuda_on_host::counters = cuda_on_host::Counters{};
  cuda_on_host::launch_log.clear();
}

const char* cuda_on_host_launch_log() {
  static std::string text;
  text.clear();
  for (const auto& l : cuda_on_host::launch_log)
    text += cuda_on_host::format("%s grid %s block %s shared %zu%s\n", l.kernel.c_str(),
                                 cuda_on_host::text_of(l.grid).c_str(), cuda_on_host::text_of(l.block).c_str(),
                                 l.dynamic_bytes, l.cooperative ? " cooperative" : "");
  return text.c_str();
}

void* cuda_on_host_malloc(size_t bytes) {
  void* pointer = nullptr;
  cuda_on_host::allocate(&pointer, bytes);
  return pointer;
}
int cuda_on_host_free(void* pointer) { return cuda_on_host::release(pointer); }
}
