// What the compiler knows about a kernel and a launch depends on: that it is one, its static shared memory and its
// launch bounds.
//
// Static shared memory, from the symbol table of this module's file: a __shared__ variable is a thread-local symbol,
// and the mangled name of one declared inside a function holds that function's name. So the variables of a kernel are
// known with their sizes before it has ever run. Those declared elsewhere (in a __device__ function, at namespace
// scope) may be used by any kernel and count in all of them.
//
// Kernels: __global__ puts a no-operation before the function's entry, __launch_bounds__(n) n of them, of one byte each
// (on aarch64 of four), and the compiler lists where they begin in a section of its own; see qualifiers.h.
#pragma once

#include <elf.h>
#include <link.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "errors.h"

// The section's ends, from the linker; null in a module without kernels.
extern "C" {
extern const char* const cuda_on_host_kernels_begin[] __asm__("__start___patchable_function_entries")
    __attribute__((weak, visibility("hidden")));
extern const char* const cuda_on_host_kernels_end[] __asm__("__stop___patchable_function_entries")
    __attribute__((weak, visibility("hidden")));
}

namespace cuda_on_host {

struct KernelInfo {
  bool known = false;  // false: this module has no function there, or its file has no symbols
  size_t static_shared = 0;
  int most_threads = 1024;  // of a block
};

class KernelTable {
 public:
  const KernelInfo& find(const void* function) {
    if (!read_) read();
    const auto [found, fresh] = infos_.try_emplace(function);
    if (fresh) found->second = make(function);
    return found->second;
  }

 private:
  struct Variable {
    std::string name;
    size_t bytes;
  };

  // The mangled name of what is declared in a function: _ZZ, the function's own without its _Z, E, ...
  static std::string scope_of(const std::string& function) {
    return function.rfind("_Z", 0) == 0 ? function.substr(2)
                                        : std::to_string(function.size()) + function;  // extern "C"
  }
  static bool declared_in(const std::string& variable, const std::string& scope) {
    const size_t begin = variable.find_first_not_of('Z', 1);  // once more for every lambda in between
    return begin != std::string::npos && begin > 2 && variable.compare(begin, scope.size(), scope) == 0 &&
           variable.size() > begin + scope.size() && variable[begin + scope.size()] == 'E';
  }

  KernelInfo make(const void* function) const {
    KernelInfo info;
    const auto address = reinterpret_cast<uintptr_t>(function);
    const auto bound = kernels_.find(address);
    info.known = bound != kernels_.end();
    if (!info.known) return info;
    if (bound->second > 1) info.most_threads = std::min(bound->second, 1024);
    const auto range = functions_.equal_range(address);
    size_t own = 0;
    for (auto name = range.first; name != range.second; ++name)  // several: the compiler has merged equal functions
      own = std::max(own, bytes_declared_in(name->second));
    info.static_shared = own + unowned_;
    return info;
  }
  size_t bytes_declared_in(const std::string& function) const {
    size_t bytes = 0;
    const std::string scope = scope_of(function);
    for (const Variable& variable : variables_)
      if (declared_in(variable.name, scope)) bytes += variable.bytes;
    return bytes;
  }

  void read() {
    read_ = true;
    dl_iterate_phdr(
        [](dl_phdr_info* module, size_t, void* self) {
          const auto here = reinterpret_cast<uintptr_t>(&cuda_on_host::error_state);
          for (int i = 0; i < module->dlpi_phnum; ++i) {
            const uintptr_t begin = module->dlpi_addr + module->dlpi_phdr[i].p_vaddr;
            if (module->dlpi_phdr[i].p_type != PT_LOAD || here < begin || here >= begin + module->dlpi_phdr[i].p_memsz)
              continue;
            const bool program = module->dlpi_name == nullptr || module->dlpi_name[0] == '\0';
            static_cast<KernelTable*>(self)->read_file(program ? "/proc/self/exe" : module->dlpi_name,
                                                       module->dlpi_addr);
            return 1;
          }
          return 0;
        },
        this);
#if defined(__aarch64__)
    constexpr uintptr_t kUnit = 4;
#else
    constexpr uintptr_t kUnit = 1;
#endif
    for (const char* const* entry = cuda_on_host_kernels_begin; entry != cuda_on_host_kernels_end; ++entry) {
      const auto begin = reinterpret_cast<uintptr_t>(*entry);
      const auto function = functions_.upper_bound(begin);
      if (function != functions_.end()) kernels_[function->first] = static_cast<int>((function->first - begin) / kUnit);
    }
    for (const Variable& variable : variables_)
      if (std::none_of(kernels_.begin(), kernels_.end(), [&](const auto& kernel) {
            const auto range = functions_.equal_range(kernel.first);
            return std::any_of(range.first, range.second, [&](const auto& function) {
              return declared_in(variable.name, scope_of(function.second));
            });
          }))
        unowned_ += variable.bytes;
  }

  void read_file(const char* path, uintptr_t base) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (bytes.size() < sizeof(ElfW(Ehdr))) return;
    const auto* header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
    const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
    for (int s = 0; s < header->e_shnum; ++s) {
      if (sections[s].sh_type != SHT_SYMTAB) continue;
      const char* names = bytes.data() + sections[sections[s].sh_link].sh_offset;
      const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
      for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
        const ElfW(Sym) & symbol = symbols[i];
        if (symbol.st_shndx == SHN_UNDEF) continue;
        const std::string name = names + symbol.st_name;
        if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC) functions_.emplace(base + symbol.st_value, name);
        if (ELF64_ST_TYPE(symbol.st_info) == STT_TLS && name.find("segment_anchor") == std::string::npos)
          variables_.push_back({name, symbol.st_size});
      }
    }
  }

  bool read_ = false;
  size_t unowned_ = 0;
  std::map<uintptr_t, int> kernels_;  // their entries -> no-operations before them
  std::multimap<uintptr_t, std::string> functions_;
  std::vector<Variable> variables_;
  std::map<const void*, KernelInfo> infos_;
};
inline KernelTable kernel_table;

}  // namespace cuda_on_host
