// Runs tiles on PyTorch's own threads: torch.set_num_threads is honoured and no second pool competes for the cores.
#pragma once

#include <ATen/Parallel.h>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace l2l {

// Saturated gates decay to denormals, which cost 100 cycles each; they are flushed to zero while network arithmetic
// runs and only then: the caller's mode is restored, and parameters are updated outside.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }
#else
  FlushDenormals() = default;
#endif
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;

 private:
#if defined(__x86_64__)
  unsigned saved_;
#endif
};

// True in a process forked from one that had loaded this library. An OpenMP pool does not survive a fork, so there
// everything runs on the calling thread (results do not depend on the number of threads).
bool forked();

// body(begin, end) over [0, n) in ranges of at least `grain`.
template <class Body>
void parallel_for(int64_t n, int64_t grain, const Body& body) {
  if (n <= 0) return;
  if (forked()) {
    body(int64_t{0}, n);
  } else {
    at::parallel_for(0, n, grain, body);
  }
}

}  // namespace l2l
