// Where the lanes of a warp meet: shuffles, votes, __syncwarp, mma.sync.
#pragma once

#include "barriers.h"

namespace cuda_on_host {

inline const char* name_of(Collective kind) {
  switch (kind) {
    case Collective::syncwarp:
      return "__syncwarp";
    case Collective::shuffle:
      return "a shuffle";
    case Collective::vote:
      return "a vote";
    case Collective::match:
      return "a match";
    case Collective::reduce:
      return "a reduction";
    case Collective::matrix:
      return "a matrix operation";
  }
  return "?";
}

unsigned lane_index() { return current == nullptr ? 0u : static_cast<unsigned>(current->lane); }

inline void check_mask(const Warp& warp, unsigned mask, Collective kind, Site site) {
  if ((mask >> current->lane & 1u) == 0)
    fail(cudaErrorLaunchFailure, site,
         format("lane %d executes %s whose mask 0x%08x does not name it", current->lane, name_of(kind), mask));
  if ((mask & ~warp.lanes) != 0)
    fail(cudaErrorLaunchFailure, site,
         format("the mask 0x%08x of %s names lanes that do not exist: the warp has 0x%08x", mask, name_of(kind),
                warp.lanes));
  if ((mask & warp.finished) != 0)
    fail(cudaErrorLaunchFailure, site,
         format("the mask 0x%08x of %s names lanes that have exited: 0x%08x", mask, name_of(kind),
                mask & warp.finished));
}

inline Rendezvous& meeting_of(Warp& warp, unsigned mask) {
  for (auto& meeting : warp.meetings)
    if (meeting->mask == mask) return *meeting;
  warp.meetings.push_back(std::make_unique<Rendezvous>());
  warp.meetings.back()->mask = mask;
  return *warp.meetings.back();
}

// Plain word copies: a call of memcpy would be an access in the eyes of ThreadSanitizer.
inline void deposit(LaneSlot& slot, const void* value, size_t bytes) {
  const auto* from = static_cast<const volatile unsigned char*>(value);
  for (size_t i = 0; i < bytes; ++i) slot.bytes[i] = from[i];
}

const LaneSlot* warp_exchange(unsigned mask, Collective kind, const void* value, size_t bytes, Site site) {
  const Unwatched unwatched;
  if (current == nullptr) device_error(cudaErrorLaunchFailure, site, "%s exists in device code only", name_of(kind));
  Block& block = *current->block;
  Warp& warp = block.warps[static_cast<size_t>(current->warp_index)];
  check_mask(warp, mask, kind, site);
  Rendezvous& meeting = meeting_of(warp, mask);
  if (meeting.arrived == 0) {
    meeting.kind = kind;
    meeting.site = site;
  } else if (meeting.kind != kind || (kind != Collective::syncwarp && !same(meeting.site, site))) {
    fail(cudaErrorLaunchFailure, site,
         format("lane %d executes %s while other lanes of the mask 0x%08x wait in %s at %s", current->lane,
                name_of(kind), mask, name_of(meeting.kind), at(meeting.site).c_str()));
  }
  const unsigned round = meeting.round & 1;
  deposit(meeting.slots[round][current->lane], value, bytes);
  meeting.arrived |= 1u << current->lane;
  if (kind == Collective::syncwarp) meeting.order[round].order_before();
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.round;
    active->fruitless_yields = 0;
    if (kind == Collective::syncwarp) access_check::warp_barrier(block, current->warp_index, mask);
    const size_t first = static_cast<size_t>(current->warp_index) * 32;
    for (size_t lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1u) == 0 || first + lane == static_cast<size_t>(current->linear)) continue;
      Thread& other = block.threads[first + lane];
      other.wait = Wait::none;
      block.ready.push(&other);
    }
    yield_at_random();
  } else {
    wait_here(Wait::warp, site, mask);
  }
  if (kind == Collective::syncwarp) meeting.order[round].order_after();
  return meeting.slots[round];
}

}  // namespace cuda_on_host
