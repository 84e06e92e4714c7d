#include "parallel.h"

#include <pthread.h>

#include <atomic>

namespace l2l {
namespace {

std::atomic<bool> in_child{false};

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { in_child = true; });

}  // namespace

bool forked() { return in_child.load(std::memory_order_relaxed); }

}  // namespace l2l
