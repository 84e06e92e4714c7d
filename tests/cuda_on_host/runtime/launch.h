// A launch: its checks, the residency of blocks, and the loop that runs threads until all have finished or one has
// failed.
#pragma once

#include <deque>
#include <map>
#include <mutex>

#include "async_copies.h"
#include "device.h"
#include "faults.h"
#include "streams.h"
#include "warps.h"

namespace cuda_on_host {

constexpr size_t kMaxFibers = 16384;  // two memory mappings each; Linux allows 65530 by default

struct LaunchRecord {
  std::string kernel;
  dim3 grid, block;
  size_t dynamic_bytes;
  bool cooperative;
};
inline std::vector<LaunchRecord> launch_log;
inline std::vector<std::unique_ptr<Fiber>> fibers;

// The kernel has returned: nobody may be waiting for this thread.
inline void finish_thread(Thread& thread) {
  const Unwatched unwatched;
  const Block& block = *thread.block;
  Warp& warp = thread.block->warps[static_cast<size_t>(thread.warp_index)];
  if (block.barrier.arrived != 0)
    fail(cudaErrorLaunchFailure, block.barrier.site,
         format("the thread exits while %zu threads of its block wait in __syncthreads()", block.barrier.arrived));
  if (active->grid_barrier.arrived != 0)
    fail(cudaErrorLaunchFailure, active->grid_barrier.site,
         format("the thread exits while %zu threads wait in grid.sync()", active->grid_barrier.arrived));
  for (const auto& meeting : warp.meetings)
    if (meeting->arrived != 0 && (meeting->mask >> thread.lane & 1u))
      fail(cudaErrorLaunchFailure, meeting->site,
           format("lane %d exits while other lanes wait for it in %s with mask 0x%08x", thread.lane,
                  name_of(meeting->kind), meeting->mask));
  warp.finished |= 1u << thread.lane;
  thread.finished = true;
}

// The whole life of a device thread, on its own stack.
inline void thread_main() {
  Fiber::entered();
  active->begin.order_after();
  active->call->invoke(active->call->data);
  finish_thread(*current);
  active->end.order_before();
  Fiber::leave(true);
}

inline cudaError_t check_shape(const Launch& launch, size_t parameter_bytes) {
  const auto bad = [&](cudaError_t code, const std::string& what) {
    return record_error(code,
                        format("launch of %s at %s: %s", launch.name.c_str(), at(launch.site).c_str(), what.c_str()));
  };
  const dim3 g = launch.grid, b = launch.block;
  if (b.x == 0 || b.y == 0 || b.z == 0 || b.x > 1024 || b.y > 1024 || b.z > 64 || launch.threads_per_block > 1024)
    return bad(cudaErrorInvalidConfiguration,
               format("a block of %s threads; at most 1024 in all, (1024,1024,64)", text_of(b).c_str()));
  if (g.x == 0 || g.y == 0 || g.z == 0 || g.x > 2147483647u || g.y > 65535 || g.z > 65535)
    return bad(cudaErrorInvalidConfiguration,
               format("a grid of %s blocks; at most (2147483647,65535,65535)", text_of(g).c_str()));
  const void* function = launch.call->function;
  const KernelInfo& info = kernel_table.find(function);
  const int threads = static_cast<int>(launch.threads_per_block);
  if (threads > info.most_threads)
    return bad(cudaErrorInvalidConfiguration,
               format("a block of %d threads, more than the kernel's launch bound of %d", threads, info.most_threads));
  if (parameter_bytes > static_cast<size_t>(device.parameters))
    return bad(cudaErrorInvalidValue,
               format("%zu bytes of kernel parameters, more than %d", parameter_bytes, device.parameters));
  const size_t allowed = static_cast<size_t>(shared_limit(function));
  if (launch.dynamic_bytes > allowed)
    return bad(cudaErrorInvalidValue,
               format("%zu bytes of dynamic shared memory, more than the %zu allowed to this kernel, which has %zu of "
                      "static shared memory (cudaFuncSetAttribute raises it, up to %d)",
                      launch.dynamic_bytes, allowed, info.static_shared, shared_left(function, device.shared_optin)));
  const int resident = resident_blocks(function, threads, launch.dynamic_bytes);
  if (resident < 1)
    return bad(cudaErrorLaunchOutOfResources,
               format("a block of %d threads with %d registers each does not fit", threads, registers_of(threads)));
  if (!launch.cooperative) return cudaSuccess;
  if (device.cooperative == 0) return bad(cudaErrorNotSupported, "the device has no cooperative launches");
  const auto fitting = static_cast<size_t>(resident) * static_cast<size_t>(device.multiprocessors);
  if (launch.blocks > fitting)
    return bad(cudaErrorCooperativeLaunchTooLarge,
               format("a cooperative grid of %zu blocks, but %zu can be resident", launch.blocks, fitting));
  if (launch.blocks * launch.threads_per_block > kMaxFibers)
    return bad(
        cudaErrorNotSupported,
        format("a cooperative grid of %zu threads; this runtime keeps at most %zu (pretend fewer multiprocessors)",
               launch.blocks * launch.threads_per_block, kMaxFibers));
  return cudaSuccess;
}

inline cudaError_t read_attributes(const cudaLaunchConfig_t& config, Launch* launch) {
  if (config.numAttrs > 0 && config.attrs == nullptr)
    return record_error(cudaErrorInvalidValue,
                        format("launch of %s: %u launch attributes at null", launch->name.c_str(), config.numAttrs));
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeCooperative)
      launch->cooperative = attribute.val.cooperative != 0;
    else if (attribute.id != cudaLaunchAttributeIgnore &&
             attribute.id != cudaLaunchAttributeProgrammaticStreamSerialization)
      return record_error(cudaErrorNotSupported,
                          format("launch of %s: launch attribute %d", launch->name.c_str(), attribute.id));
  }
  return cudaSuccess;
}

// How many blocks run at a time. More than one only if they must meet, or to let a random schedule mix them.
inline size_t residency(const Launch& launch) {
  if (launch.cooperative) return launch.blocks;
  const bool mix = schedule.random() && !(kThreadSanitizer && static_shared.used());
  const size_t wanted = mix ? 4 : 1;
  return std::min({wanted, launch.blocks, std::max<size_t>(1, kMaxFibers / launch.threads_per_block)});
}

class Runner {
 public:
  explicit Runner(Launch& launch)
      : launch_(launch), order_(launch.blocks > 1 && schedule.random() ? launch.blocks : 0) {
    for (size_t i = 0; i < order_.size(); ++i) order_[i] = i;
    for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[schedule.below(i)]);
    const size_t slots = residency(launch), per_block = launch.threads_per_block;
    while (fibers.size() < slots * per_block) fibers.push_back(std::make_unique<Fiber>(fibers.size()));
    for (size_t slot = 0; slot < slots; ++slot) {
      launch.resident.push_back(std::make_unique<Block>());
      Block& block = *launch.resident.back();
      block.threads.resize(per_block);
      block.warps.resize((per_block + 31) / 32);
      for (size_t t = 0; t < per_block; ++t) {
        Thread& thread = block.threads[t];
        const dim3 b = launch.block;
        const auto i = static_cast<unsigned>(t);
        thread.fiber = fibers[slot * per_block + t].get();
        thread.block = &block;
        thread.index = {i % b.x, i / b.x % b.y, i / b.x / b.y};
        thread.linear = static_cast<int>(t), thread.warp_index = static_cast<int>(t / 32),
        thread.lane = static_cast<int>(t % 32);
        block.warps[t / 32].lanes |= 1u << (t % 32);
      }
      begin(block);
    }
  }

  void run() {
    while (!launch_.failed) {
      Block* block = choose();
      if (block == nullptr) break;
      run_one(*block);
    }
    if (!launch_.failed && live_ != 0) report_deadlock();
  }

 private:
  // Gives the slot its next block, if any is left.
  void begin(Block& block) {
    block.active = started_ < launch_.blocks;
    block.ready.clear();
    if (!block.active) return;
    const size_t n = started_++;
    block.linear = !order_.empty() ? order_[n] : schedule.reverse() ? launch_.blocks - 1 - n : n;
    const dim3 g = launch_.grid;
    block.index = {static_cast<unsigned>(block.linear % g.x), static_cast<unsigned>(block.linear / g.x % g.y),
                   static_cast<unsigned>(block.linear / g.x / g.y)};
    block.finished = 0;
    block.barrier = Barrier{};
    for (Warp& warp : block.warps) {
      warp.finished = 0;
      warp.meetings.clear();
    }
    for (Thread& thread : block.threads) {
      thread.finished = false;
      thread.wait = Wait::none;
      thread.pending.clear();
      thread.fiber->prepare(&thread_main);
    }
    block.ready.push_all(block.threads, [](Thread&) { return true; });
    begin_shared_memory(block);
    launch_.begin.order_before();
    ++live_;
  }

  // The block to run a thread of: mostly the same one again.
  Block* choose() {
    const size_t n = launch_.resident.size();
    if (n > 1 && schedule.one_in(32)) slot_ = schedule.below(n);
    for (size_t i = 0; i < n; ++i) {
      Block& block = *launch_.resident[(slot_ + i) % n];
      if (block.ready.empty()) continue;
      slot_ = (slot_ + i) % n;
      return &block;
    }
    return nullptr;
  }

  void run_one(Block& block) {
    Thread* thread = block.ready.pop();
    if (!static_shared.load(block)) {
      launch_.failed = true;
      record_error(cudaErrorNotSupported,
                   format("kernel %s: ThreadSanitizer cannot tell the static __shared__ variables of several resident "
                          "blocks apart; use dynamic shared memory or the access check",
                          launch_.name.c_str()));
      return;
    }
    current = thread;
    threadIdx = thread->index;
    blockIdx = block.index;
    thread->fiber->resume();
    current = nullptr;
    if (launch_.failed || !thread->finished) return;
    launch_.fruitless_yields = 0;
    ++launch_.finished_threads;
    if (++block.finished == block.threads.size()) finish(block);
  }

  void finish(Block& block) {
    --live_;
    if (!block.dynamic_shared.intact()) {
      launch_.failed = true;
      record_error(
          cudaErrorIllegalAddress,
          format("kernel %s, block %s: bytes past the end of its %zu bytes of dynamic shared memory were written",
                 launch_.name.c_str(), text_of(block.index).c_str(), launch_.dynamic_bytes));
      return;
    }
    // Blocks follow one another in the same memory, which ThreadSanitizer would take for a race.
    if (kThreadSanitizer && static_shared.used()) launch_.end.order_after();
    if (!launch_.cooperative) begin(block);
  }

  void report_deadlock() {
    std::map<std::string, std::pair<size_t, std::string>> groups;  // where they wait -> how many, the first of them
    for (const auto& block : launch_.resident)
      for (const Thread& thread : block->threads) {
        if (!block->active || thread.finished) continue;
        const std::string where = thread.wait == Wait::block_barrier ? "__syncthreads()"
                                  : thread.wait == Wait::grid_barrier
                                      ? "grid.sync()"
                                      : format("a warp operation with mask 0x%08x", thread.wait_mask);
        auto& group = groups[where + " at " + at(thread.site)];
        if (group.first++ == 0)
          group.second = format("thread %s of block %s", text_of(thread.index).c_str(), text_of(block->index).c_str());
      }
    std::string text;
    for (const auto& [where, group] : groups)
      text +=
          format("%s%zu wait in %s (%s)", text.empty() ? "" : "; ", group.first, where.c_str(), group.second.c_str());
    launch_.failed = true;
    record_error(cudaErrorLaunchTimeout, format("kernel %s: deadlock: %s", launch_.name.c_str(), text.c_str()));
  }

  Launch& launch_;
  std::vector<size_t> order_;  // of the blocks; empty: their own
  size_t started_ = 0, live_ = 0, slot_ = 0;
};

cudaError_t launch(const KernelCall& call, const cudaLaunchConfig_t& config, Site site) {
  const Unwatched unwatched;
  static std::mutex one_at_a_time;
  if (current != nullptr) device_error(cudaErrorNotSupported, site, "a launch from device code");
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (const cudaError_t error = check_kernel(call.function, "a launch"); error != cudaSuccess) return error;
  if (const cudaError_t error = check_stream(config.stream, "a launch"); error != cudaSuccess) return error;
  Launch launch;
  launch.call = &call;
  launch.name = kernel_name(call.function);
  launch.site = site;
  launch.grid = config.gridDim, launch.block = config.blockDim;
  launch.dynamic_bytes = config.dynamicSmemBytes;
  launch.blocks = static_cast<size_t>(launch.grid.x) * launch.grid.y * launch.grid.z;
  launch.threads_per_block = static_cast<size_t>(launch.block.x) * launch.block.y * launch.block.z;
  static_shared.enter_thread();
  if (const cudaError_t error = read_attributes(config, &launch); error != cudaSuccess) return error;
  if (const cudaError_t error = check_shape(launch, call.parameter_bytes); error != cudaSuccess) return error;
  ++counters.launches;
  launch_log.push_back({launch.name, launch.grid, launch.block, launch.dynamic_bytes, launch.cooperative});

  active = &launch;
  blockDim = launch.block;
  gridDim = launch.grid;
  access_check::begin_launch();
  allocations.seal_others(true);
  {
    const FaultHandler handler;
    Runner(launch).run();
  }
  allocations.seal_others(false);
  launch.end.order_after();
  active = nullptr;
  if (!launch.failed)
    if (const ExactBuffer* buffer = allocations.damaged()) {
      launch.failed = true;
      record_error(cudaErrorIllegalAddress, format("kernel %s: bytes past the end of an allocation of %zu bytes were "
                                                   "written",
                                                   launch.name.c_str(), buffer->bytes()));
    }
  if (!launch.failed) return cudaSuccess;
  error_state.sticky = true;
  allocations.poison();
  return error_state.code;
}

}  // namespace cuda_on_host
