// Which thread runs next. Order is never promised by CUDA, so every choice here is a legal one; a kernel that is right
// under one of them and wrong under another lacks a barrier.
//
//   seed  0   threads in order of their index, blocks one after another
//   seed -1   the reverse
//   seed >= 1 at random; odd seeds draw any thread that can run, even ones run one warp as far as it gets, so that
//   warps
//             drift apart by whole phases
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <vector>

namespace cuda_on_host {

bool schedule_is_random = false;
float approximation_amplitude = std::getenv("CUDA_ON_HOST_EXACT") != nullptr ? 0.f : 1.f;

class Schedule {
 public:
  Schedule() {
    const char* text = std::getenv("CUDA_ON_HOST_SEED");
    set_seed(text == nullptr ? 0 : static_cast<int>(std::strtol(text, nullptr, 10)));
  }
  void set_seed(int seed) {
    seed_ = seed;
    generator_.seed(static_cast<uint32_t>(seed));
    schedule_is_random = seed > 0;
  }
  bool random() const { return seed_ > 0; }
  bool reverse() const { return seed_ < 0; }
  bool by_warp() const { return seed_ > 0 && seed_ % 2 == 0; }
  uint32_t below(size_t n) {
    return static_cast<uint32_t>(static_cast<uint64_t>(static_cast<uint32_t>(generator_())) * n >> 32);
  }
  bool one_in(uint32_t n) { return random() && below(n) == 0; }

 private:
  int seed_ = 0;
  std::mt19937 generator_;
};
inline Schedule schedule;

// The threads of a block that can run. T has an integer member `warp_index`.
template <class T>
class ReadyList {
 public:
  void clear() {
    waiting_.clear();
    head_ = 0;
  }
  bool empty() const { return head_ == waiting_.size(); }
  void push(T* thread) { waiting_.push_back(thread); }
  // Adds every thread for which `wanted` holds, in the order of the schedule.
  template <class Threads, class Wanted>
  void push_all(Threads& threads, Wanted wanted) {
    const size_t n = threads.size();
    for (size_t i = 0; i < n; ++i) {
      T& thread = threads[schedule.reverse() ? n - 1 - i : i];
      if (wanted(thread)) push(&thread);
    }
  }
  T* pop() {
    if (schedule.random()) std::swap(waiting_[head_], waiting_[draw()]);
    T* thread = waiting_[head_++];
    favourite_ = thread->warp_index;
    if (head_ == waiting_.size() || head_ > 4096) {
      waiting_.erase(waiting_.begin(), waiting_.begin() + static_cast<std::ptrdiff_t>(head_));
      head_ = 0;
    }
    return thread;
  }

 private:
  size_t draw() {
    const size_t count = waiting_.size() - head_, start = schedule.below(count);
    if (schedule.by_warp() && !schedule.one_in(256))
      for (size_t i = 0; i < count; ++i) {
        const size_t at = head_ + (start + i) % count;
        if (waiting_[at]->warp_index == favourite_) return at;
      }
    return head_ + start;
  }
  std::vector<T*> waiting_;
  size_t head_ = 0;
  int favourite_ = 0;
};

}  // namespace cuda_on_host
