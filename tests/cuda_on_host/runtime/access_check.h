// The access check: every load and store of device code, compared with what came before it. It finds data races in
// shared and global memory whatever the schedule, reads of shared memory nobody wrote, and accesses outside device
// memory.
//
// Device code is compiled with -fsanitize=thread, which calls __tsan_read4(address) and the like; these are defined in
// access_hooks.h instead of linking ThreadSanitizer. So this build runs inside any process, returns its findings as
// errors of the launch, and knows what orders memory in CUDA: launches, grid.sync, __syncthreads, __syncwarp, and
// atomic operations. Shuffles and votes do not.
//
// Time is one counter, raised at every ordering event. A byte remembers its last writer and reader and when; an access
// is ordered before the current thread if it is older than the last event that both took part in.
#pragma once

#include <algorithm>

#include "threads.h"

#if !defined(CUDA_ON_HOST_ACCESS_CHECK)
namespace cuda_on_host::access_check {
inline void begin_launch() {}
inline void begin_block(Block&) {}
inline void block_barrier(Block&) {}
inline void grid_barrier() {}
inline void warp_barrier(Block&, int, unsigned) {}
}  // namespace cuda_on_host::access_check
#else

#include <array>
#include <unordered_map>

namespace cuda_on_host::access_check {

using Tick = uint32_t;

enum class Scope : uint8_t {
  none,
  thread,
  warp,
  block,
  grid
};  // who: one thread, or several of a warp, block, the grid

struct Access {
  Tick when = 0;
  uint32_t block = 0, code = 0;  // code: the instruction, relative to the module
  uint16_t thread = 0;           // linear in the block; of several, one of them
  Scope scope = Scope::none;
  bool atomic : 1;
  bool undefined : 1;  // a write that leaves garbage: the destination of a cp.async in flight
};

// One byte of memory. The first cell of an aligned word speaks for all four bytes, until some of them are accessed
// alone.
struct Cell {
  Access write, read;
  bool split = false;  // in the first cell of a word: its bytes differ
};

// A cell for every byte of a buffer, rounded up to words; zero pages until touched.
class Shadow {
 public:
  Shadow() = default;
  Shadow(const Shadow&) = delete;
  Shadow& operator=(const Shadow&) = delete;
  ~Shadow() { release(); }
  Cell* cover(const unsigned char* base, size_t bytes) {
    bytes = (bytes + 3) / 4 * 4;
    if (base_ == base && bytes_ == bytes) return cells_;
    release();
    void* cells =
        mmap(nullptr, bytes * sizeof(Cell), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (cells == MAP_FAILED) std::abort();
    cells_ = static_cast<Cell*>(cells), base_ = base, bytes_ = bytes;
    return cells_;
  }

 private:
  void release() {
    if (cells_ != nullptr) munmap(cells_, bytes_ * sizeof(Cell));
  }
  Cell* cells_ = nullptr;
  const unsigned char* base_ = nullptr;
  size_t bytes_ = 0;
};

// The atomic operations on one address. Each publishes what its thread knows: its own accesses, those of its warp it
// has met, those of its block before the last barrier. An operation that follows has learnt all that was published
// before it.
struct Publication {
  Tick covers, at;
};
using Publications = std::vector<Publication>;  // both ascend
struct AtomicAddress {
  std::unordered_map<uint64_t, Publications> threads;
  std::unordered_map<uint32_t, Publications> blocks;
};
using Learnt = std::unordered_map<const AtomicAddress*, Tick>;  // an address -> when it was last operated on

struct BlockState {
  uint32_t block = 0;
  Tick begin = 0, barrier = 0;                               // when it started, when its last __syncthreads completed
  std::vector<std::array<std::array<Tick, 32>, 32> > lanes;  // per warp: [i][j], up to when lane i knows lane j
  std::vector<Learnt> learnt;                                // per thread, since the last barrier
  Learnt common;                                             // by any thread before it
  Shadow dynamic_shadow, static_shadow;
};

inline Tick now = 1, grid_tick = 1;  // grid_tick: the last event that ordered everything, a launch or a grid.sync()
inline std::unordered_map<const Block*, BlockState> states;
inline std::unordered_map<const void*, Shadow> global_shadows;
inline std::unordered_map<const void*, AtomicAddress> atomic_addresses;

inline void begin_launch() {
  grid_tick = ++now;
  states.clear();
  atomic_addresses.clear();
}

inline void begin_block(Block& block) {
  BlockState& state = states[&block];
  block.access_state = &state;
  state.block = static_cast<uint32_t>(block.linear);
  state.begin = state.barrier = ++now;
  state.lanes.assign(block.warps.size(), {});
  state.learnt.assign(block.threads.size(), {});
  state.common.clear();
}

inline BlockState& my_block() { return *static_cast<BlockState*>(current->block->access_state); }

inline void block_barrier(Block& block) {
  auto& state = *static_cast<BlockState*>(block.access_state);
  state.barrier = ++now;
  for (Learnt& learnt : state.learnt) {
    for (const auto& [address, when] : learnt) state.common[address] = std::max(state.common[address], when);
    learnt.clear();
  }
}

inline void grid_barrier() { grid_tick = ++now; }

inline void warp_barrier(Block& block, int warp, unsigned mask) {
  auto& lanes = static_cast<BlockState*>(block.access_state)->lanes[static_cast<size_t>(warp)];
  ++now;
  std::array<Tick, 32> joint{};
  for (size_t i = 0; i < 32; ++i)
    if (mask >> i & 1u)
      for (size_t j = 0; j < 32; ++j) joint[j] = std::max(joint[j], mask >> j & 1u ? now : lanes[i][j]);
  for (size_t i = 0; i < 32; ++i)
    if (mask >> i & 1u) lanes[i] = joint;
}

inline uint64_t thread_key(uint32_t block, size_t thread) { return static_cast<uint64_t>(block) << 16 | thread; }

inline void atomic_event(const void* address) {
  BlockState& mine = my_block();
  AtomicAddress& atomic = atomic_addresses[address];
  mine.learnt[static_cast<size_t>(current->linear)][&atomic] = ++now;
  const auto publish = [](Publications& list, Tick covers) {
    if (list.empty() || list.back().covers < covers) list.push_back({covers, now});
  };
  publish(atomic.blocks[mine.block], mine.barrier);
  const auto& known = mine.lanes[static_cast<size_t>(current->warp_index)][static_cast<size_t>(current->lane)];
  for (size_t lane = 0; lane < 32; ++lane) {
    const bool self = lane == static_cast<size_t>(current->lane);
    if (self || known[lane] != 0)
      publish(atomic.threads[thread_key(mine.block, static_cast<size_t>(current->linear - current->lane) + lane)],
              self ? now : known[lane]);
  }
}

// Was the access published through an address this thread, or its block, has operated on since?
inline bool published(const Access& access, const Learnt& learnt) {
  for (const auto& [address, learnt_at] : learnt) {
    const auto covered = [&access, learnt_at = learnt_at](const auto& map, auto key) {
      const auto found = map.find(key);
      if (found == map.end()) return false;
      const Publications& list = found->second;
      const auto first = std::upper_bound(list.begin(), list.end(), access.when,
                                          [](Tick when, const Publication& p) { return when < p.covers; });
      return first != list.end() && first->at < learnt_at;
    };
    if (covered(address->blocks, access.block)) return true;
    if (access.scope == Scope::thread && covered(address->threads, thread_key(access.block, access.thread)))
      return true;
  }
  return false;
}

// Is the earlier access ordered before whatever the current thread does now?
inline bool ordered(const Access& access, const BlockState& mine) {
  if (access.when < grid_tick) return true;
  if (access.block == mine.block && access.scope != Scope::grid) {
    if (access.when < mine.barrier) return true;
    if (access.scope == Scope::thread && access.thread == current->linear) return true;
    if (access.scope != Scope::block && access.thread / 32 == current->warp_index) {
      const auto& known = mine.lanes[static_cast<size_t>(current->warp_index)][static_cast<size_t>(current->lane)];
      if (access.scope == Scope::thread && access.when < known[access.thread % 32]) return true;
      if (access.scope == Scope::warp) {
        bool all = true;
        for (size_t lane = 0; lane < 32; ++lane)
          all &= lane == static_cast<size_t>(current->lane) || access.when < known[lane];
        if (all) return true;
      }
    }
  }
  if (access.scope == Scope::grid) return false;
  return published(access, mine.common) || published(access, mine.learnt[static_cast<size_t>(current->linear)]);
}

// Adds a read to what a byte remembers of its readers: one that follows all earlier ones replaces them.
inline void remember_read(Access& readers, const Access& mine_now, const BlockState& mine) {
  if (readers.scope >= Scope::block && readers.when == mine_now.when && readers.block == mine_now.block) return;
  if (readers.scope == Scope::none || ordered(readers, mine)) {
    readers = mine_now;
    return;
  }
  const Scope joint = readers.block != mine_now.block               ? Scope::grid
                      : readers.thread / 32 != mine_now.thread / 32 ? Scope::block
                                                                    : Scope::warp;
  readers.scope = std::max(readers.scope, joint);
  readers.when = std::max(readers.when, mine_now.when);
  readers.atomic = readers.atomic && mine_now.atomic;
}

}  // namespace cuda_on_host::access_check
#endif
