// cp.async: the queue of copies each thread has issued. Under a random schedule some land at once, the others when
// waited for: the two ends of what a GPU may do.
#pragma once

#include "shared_memory.h"

namespace cuda_on_host {

bool async_copy_issue(const AsyncCopy& copy, Site site) {
  const Unwatched unwatched;
  if (current == nullptr) device_error(cudaErrorLaunchFailure, site, "cp.async exists in device code only");
  const auto address = reinterpret_cast<uintptr_t>(copy.destination) | reinterpret_cast<uintptr_t>(copy.source);
  if (address % copy.bytes != 0)
    fail(cudaErrorMisalignedAddress, site,
         format("cp.async of %u bytes from %p to %p: both must be multiples of %u", copy.bytes, copy.source,
                copy.destination, copy.bytes));
  if (!is_shared(*current->block, copy.destination))
    fail(cudaErrorIllegalAddress, site, format("cp.async to %p, which is not in shared memory", copy.destination));
  if (schedule.one_in(3)) return true;
  current->pending.copies.push_back(copy);
  ++current->pending.open;
  return false;
}

void async_copy_commit() {
  const Unwatched unwatched;
  PendingCopies& pending = current->pending;
  pending.group_sizes.push_back(pending.open);
  pending.open = 0;
}

bool async_copy_next(int groups_left, AsyncCopy* copy) {
  const Unwatched unwatched;
  PendingCopies& pending = current->pending;
  while (!pending.group_sizes.empty() && pending.group_sizes.front() == 0)
    pending.group_sizes.erase(pending.group_sizes.begin());
  if (pending.group_sizes.size() <= static_cast<size_t>(groups_left)) return false;
  --pending.group_sizes.front();
  *copy = pending.copies.front();
  pending.copies.erase(pending.copies.begin());
  return true;
}

}  // namespace cuda_on_host
