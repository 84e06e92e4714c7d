// The state of a launch: its grid, the resident blocks, their warps and threads.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "fiber.h"
#include "memory.h"
#include "schedule.h"

namespace cuda_on_host {

struct Block;

enum class Wait : unsigned char { none, block_barrier, grid_barrier, warp };

struct PendingCopies {
  std::vector<AsyncCopy> copies;    // in order of issue
  std::vector<size_t> group_sizes;  // committed groups, oldest first
  size_t open = 0;                  // copies issued since the last commit
  void clear() {
    copies.clear(), group_sizes.clear();
    open = 0;
  }
};

struct Thread {
  Fiber* fiber = nullptr;
  Block* block = nullptr;
  uint3 index{};
  int linear = 0, warp_index = 0, lane = 0;
  bool finished = false;
  Wait wait = Wait::none;
  Site site{"", 0};        // of the call it waits in
  unsigned wait_mask = 0;  // of the warp collective it waits in
  PendingCopies pending;
};

// The lanes of one mask meet here. Values are kept for two rounds: a lane that has left may already be in the next one
// while another still reads.
struct Rendezvous {
  unsigned mask = 0, arrived = 0, round = 0;
  Collective kind = Collective::syncwarp;
  Site site{"", 0};
  OrderToken order[2]{};
  LaneSlot slots[2][32];
};

struct Warp {
  unsigned lanes = 0, finished = 0;  // which exist, and which of those have exited
  std::vector<std::unique_ptr<Rendezvous>> meetings;
};

// A barrier of all threads of a block, or of the grid.
struct Barrier {
  size_t arrived = 0;
  unsigned round = 0;
  BlockVote vote = BlockVote::none;
  Site site{"", 0};
  int votes = 0, result[2] = {0, 0};
  OrderToken order[2]{};
};

struct Block {
  uint3 index{};
  size_t linear = 0;
  bool active = false;
  size_t finished = 0;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Barrier barrier;
  ReadyList<Thread> ready;
  ExactBuffer dynamic_shared;
  std::vector<unsigned char> static_shared;  // a copy, while another block is loaded
  void* access_state = nullptr;              // the access check's
};

struct Launch {
  const KernelCall* call = nullptr;
  std::string name;
  Site site{"", 0};
  dim3 grid, block;
  size_t dynamic_bytes = 0, blocks = 0, threads_per_block = 0;
  bool cooperative = false, failed = false;
  size_t finished_threads = 0, fruitless_yields = 0;
  Barrier grid_barrier;
  OrderToken begin{}, end{};
  std::vector<std::unique_ptr<Block>> resident;
  std::vector<ExactBuffer> retired;  // under ThreadSanitizer every block gets fresh shared memory
};

inline Launch* active = nullptr;   // the launch in progress
inline Thread* current = nullptr;  // the device thread that runs, null in host code

inline bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0); }

inline void record_device_error(cudaError_t code, const std::string& where, const std::string& message) {
  record_error(code, format("kernel %s, block %s, thread %s, %s: %s", active->name.c_str(),
                            text_of(current->block->index).c_str(), text_of(current->index).c_str(), where.c_str(),
                            message.c_str()));
  active->failed = true;
  error_state.sticky = true;
}

// Back to the scheduler for good, in the midst of device code.
[[noreturn]] inline void abandon() {
  active->end.order_before();
  Fiber::leave(false);
}

// Ends the launch in error; the scheduler abandons all its threads.
[[noreturn]] inline void fail(cudaError_t code, Site site, const std::string& message) {
  record_device_error(code, at(site), message);
  abandon();
}
}  // namespace cuda_on_host

[[noreturn]] void cuda_on_host::device_error(int code, Site site, const char* format, ...) {
  const cuda_on_host::Unwatched unwatched;
  va_list arguments;
  va_start(arguments, format);
  const std::string message = format_list(format, arguments);
  va_end(arguments);
  if (current == nullptr) {
    std::fprintf(stderr, "cuda_on_host: device code was called from host code: %s: %s\n", at(site).c_str(),
                 message.c_str());
    std::abort();
  }
  record_device_error(static_cast<cudaError_t>(code), at(site), message);
  abandon();
}
