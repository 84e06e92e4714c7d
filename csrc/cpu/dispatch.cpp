#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace l2l {
namespace {

#if defined(__x86_64__)
// Put together here, by code that every machine can run.
const Kernels& avx512_with_bfloat16() {
  static const Kernels kernels = [] {
    Kernels result = avx512::kernels;
    result.name = "avx512bf16";
    result.bfloat16 = avx512bf16::bfloat16;
    return result;
  }();
  return kernels;
}
#endif

std::vector<const Kernels*> supported() {
  std::vector<const Kernels*> sets{&baseline::kernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    sets.push_back(&avx2::kernels);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl")) {
      sets.push_back(&avx512::kernels);
      if (__builtin_cpu_supports("avx512bf16")) sets.push_back(&avx512_with_bfloat16());
    }
  }
#endif
  return sets;
}

const Kernels* find(const std::string& name, const char* origin) {
  std::string names;
  for (const Kernels* set : supported()) {
    if (name == set->name) return set;
    names += (names.empty() ? "" : ", ") + std::string(set->name);
  }
  const bool known = name == "avx2" || name == "avx512" || name == "avx512bf16";
  throw std::invalid_argument(std::string(origin) + ": instruction set '" + name + "' is " +
                              (known ? "not available on this machine" : "unknown") + "; expected one of: " + names);
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> set{[] {
    const char* name = std::getenv("L2L_FAST_ISA");
    return name && *name ? find(name, "L2L_FAST_ISA") : supported().back();
  }()};
  return set;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_relaxed); }

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* set : supported()) names.emplace_back(set->name);
  return names;
}

void set_instruction_set(const std::string& name) { selected() = find(name, "set_isa(name)"); }

}  // namespace l2l
