// Device code that touches inaccessible memory: the fault becomes an error of the launch instead of the end of the
// process. Under the compiler's sanitizers faults are theirs to report.
#pragma once

#include <csignal>
#include <cstdint>

#include "shared_memory.h"

namespace cuda_on_host {

// What lies at an address device code must not touch.
inline std::string describe_address(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) < 65536) return format("illegal address %p, a null pointer", address);
  for (const auto& block : active->resident) {
    for (const Thread& thread : block->threads)
      if (thread.fiber->guards(address))
        return "stack overflow of a device thread (CUDA_ON_HOST_STACK_KB sets its size)";
    if (block->dynamic_shared.surrounds(address))
      return format("illegal address %p in %s shared memory, %s", address,
                    block.get() == current->block ? "dynamic" : "another block's",
                    block->dynamic_shared.distance(address).c_str());
  }
  if (const ExactBuffer* buffer = allocations.find(address); buffer != nullptr && buffer->device != current_device)
    return format("illegal address %p in the memory of device %d, the kernel runs on device %d", address,
                  buffer->device, current_device);
  if (const ExactBuffer* buffer = allocations.near(address))
    return format("illegal address %p in device memory, %s", address, buffer->distance(address).c_str());
  if (allocations.freed(address) != nullptr)
    return format("illegal address %p in device memory that was freed", address);
  return format("illegal address %p, which is not device memory", address);
}

class FaultHandler {
 public:
  FaultHandler() {
    if (kCompilerSanitizer) return;
    stack_t alternate{};
    alternate.ss_sp = stack();
    alternate.ss_size = kStackBytes;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action{};
    action.sa_sigaction = &FaultHandler::handle;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &old_segv_);
    sigaction(SIGBUS, &action, &old_bus_);
    installed = this;
  }
  ~FaultHandler() {
    if (kCompilerSanitizer) return;
    sigaction(SIGSEGV, &old_segv_, nullptr);
    sigaction(SIGBUS, &old_bus_, nullptr);
    sigaltstack(&old_stack_, nullptr);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;

 private:
  static constexpr size_t kStackBytes = 256 * 1024;
  static void* stack() {
    static void* memory = std::malloc(kStackBytes);
    return memory;
  }
  inline static const FaultHandler* installed = nullptr;
  static const void* instruction_of([[maybe_unused]] void* context) {
#if defined(__x86_64__)
    return reinterpret_cast<const void*>(static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP]);
#elif defined(__aarch64__)
    return reinterpret_cast<const void*>(static_cast<ucontext_t*>(context)->uc_mcontext.pc);
#else
    return nullptr;
#endif
  }
  // The fault is synchronous and its thread is never resumed, so leaving the handler by a switch of stacks is safe;
  // with SA_NODEFER the signal is not left blocked.
  static void handle(int signal, siginfo_t* info, void* context) {
    if (current == nullptr) {  // host code: as if there were no handler
      sigaction(signal, signal == SIGBUS ? &installed->old_bus_ : &installed->old_segv_, nullptr);
      return;
    }
    record_device_error(cudaErrorIllegalAddress, line_of(instruction_of(context)), describe_address(info->si_addr));
    abandon();
  }
  stack_t old_stack_{};
  struct sigaction old_segv_{}, old_bus_{};
};

}  // namespace cuda_on_host
