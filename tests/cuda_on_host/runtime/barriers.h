// __syncthreads and grid.sync(): every thread must arrive, at the same line, and none may have exited.
#pragma once

#include "access_check.h"
#include "threads.h"

namespace cuda_on_host {

bool launch_is_cooperative() { return active != nullptr && active->cooperative; }

inline void wait_here(Wait wait, Site site, unsigned mask = 0) {
  current->wait = wait;
  current->site = site;
  current->wait_mask = mask;
  Fiber::suspend();
}

inline void wake(Block& block, Wait wait) {
  block.ready.push_all(block.threads, [wait](Thread& thread) {
    const bool wakes = thread.wait == wait;
    if (wakes) thread.wait = Wait::none;
    return wakes;
  });
}

// Counts the arrival and returns the round it belongs to.
inline unsigned arrive(Barrier& barrier, const char* what, BlockVote vote, int predicate, Site site) {
  if (barrier.arrived == 0) {
    barrier.site = site;
    barrier.vote = vote;
    barrier.votes = 0;
  } else if (!same(barrier.site, site) || barrier.vote != vote) {
    fail(cudaErrorLaunchFailure, site,
         format("%s is reached while other threads wait in the one at %s", what, at(barrier.site).c_str()));
  }
  barrier.votes += predicate != 0;
  ++barrier.arrived;
  barrier.order[barrier.round & 1].order_before();
  return barrier.round;
}

inline void complete(Barrier& barrier, size_t threads) {
  barrier.result[barrier.round & 1] = barrier.vote == BlockVote::all   ? barrier.votes == static_cast<int>(threads)
                                      : barrier.vote == BlockVote::any ? barrier.votes != 0
                                                                       : barrier.votes;
  barrier.arrived = 0;
  ++barrier.round;
  active->fruitless_yields = 0;
}

int block_barrier(BlockVote vote, int predicate, Site site) {
  const Unwatched unwatched;
  if (current == nullptr) device_error(cudaErrorLaunchFailure, site, "__syncthreads() exists in device code only");
  Block& block = *current->block;
  if (block.finished != 0)
    fail(cudaErrorLaunchFailure, site,
         format("__syncthreads() is reached after %zu of the block's %zu threads have exited", block.finished,
                block.threads.size()));
  const unsigned round = arrive(block.barrier, "__syncthreads()", vote, predicate, site);
  current->wait = Wait::block_barrier;
  if (block.barrier.arrived == block.threads.size()) {
    complete(block.barrier, block.threads.size());
    access_check::block_barrier(block);
    wake(block, Wait::block_barrier);  // this thread too: it queues up with the others
    Fiber::suspend();
  } else {
    wait_here(Wait::block_barrier, site);
  }
  block.barrier.order[round & 1].order_after();
  return block.barrier.result[round & 1];
}

void grid_barrier(Site site) {
  const Unwatched unwatched;
  if (current == nullptr) device_error(cudaErrorLaunchFailure, site, "grid.sync() exists in device code only");
  Launch& launch = *active;
  if (!launch.cooperative)
    fail(cudaErrorLaunchFailure, site, "grid.sync() in a launch without cudaLaunchAttributeCooperative");
  if (launch.finished_threads != 0)
    fail(cudaErrorLaunchFailure, site,
         format("grid.sync() is reached after %zu threads of the grid have exited", launch.finished_threads));
  Barrier& barrier = launch.grid_barrier;
  const unsigned round = arrive(barrier, "grid.sync()", BlockVote::none, 0, site);
  current->wait = Wait::grid_barrier;
  if (barrier.arrived == launch.blocks * launch.threads_per_block) {
    complete(barrier, barrier.arrived);
    access_check::grid_barrier();
    for (auto& block : launch.resident) wake(*block, Wait::grid_barrier);
    Fiber::suspend();
  } else {
    wait_here(Wait::grid_barrier, site);
  }
  barrier.order[round & 1].order_after();
}

// A thread that may be spinning gives the others a turn. When nobody gets anywhere for long, the kernel hangs.
void yield_now() {
  const Unwatched unwatched;
  if (current == nullptr) return;
  const size_t limit = 1000000 + 100 * active->blocks * active->threads_per_block;
  if (++active->fruitless_yields > limit)
    fail(cudaErrorLaunchTimeout, Site{"yield", 0}, "threads spin and none gets any further");
  current->block->ready.push(current);
  Fiber::suspend();
}

void yield_by_chance() {
  const Unwatched unwatched;
  if (current == nullptr || !schedule.one_in(8)) return;
  current->block->ready.push(current);
  Fiber::suspend();
}

}  // namespace cuda_on_host
