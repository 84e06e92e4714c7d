// Device code is compiled with -fsanitize=undefined; instead of linking its runtime library, its reports become errors
// of the launch, with file and line. So misaligned vector accesses, indices outside an array's bounds, overflows and
// the like are found in every build and inside any process.
#pragma once

#include "threads.h"

namespace cuda_on_host {

// Every report starts with the place in the source (GCC's and Clang's libubsan, file ubsan_handlers.h).
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

struct TypeDescriptor {
  uint16_t kind, info;
  char name[1];
};

struct TypeMismatch {
  SourceLocation where;
  const TypeDescriptor* type;
  uint8_t log_alignment, check;
};

struct IndexOutOfBounds {
  SourceLocation where;
  const TypeDescriptor* array;
  const TypeDescriptor* index;
};

inline void report_undefined(cudaError_t code, const SourceLocation& where, const std::string& message) {
  const Site site{where.file, static_cast<int>(where.line)};
  if (current != nullptr) fail(code, site, message);
  std::fprintf(stderr, "%s: undefined behaviour in host code: %s\n", at(site).c_str(), message.c_str());
  record_error(code, at(site) + ": in host code: " + message);
}

}  // namespace cuda_on_host

extern "C" {
void __ubsan_handle_type_mismatch_v1(cuda_on_host::TypeMismatch* data, void* pointer) {
  using namespace cuda_on_host;
  const uintptr_t alignment = uintptr_t{1} << data->log_alignment;
  if (pointer == nullptr)
    report_undefined(cudaErrorIllegalAddress, data->where,
                     format("access through a null pointer to %s", data->type->name));
  else if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0)
    report_undefined(cudaErrorMisalignedAddress, data->where,
                     format("misaligned address %p for %s, which needs a multiple of %zu", pointer, data->type->name,
                            static_cast<size_t>(alignment)));
  else
    report_undefined(cudaErrorIllegalAddress, data->where,
                     format("address %p with too little room for %s", pointer, data->type->name));
}
void __ubsan_handle_out_of_bounds(cuda_on_host::IndexOutOfBounds* data, uintptr_t index) {
  using namespace cuda_on_host;
  report_undefined(cudaErrorIllegalAddress, data->where,
                   format("index %lld out of bounds for %s", static_cast<long long>(index), data->array->name));
}
}

#define CUDA_ON_HOST_UNDEFINED(check, what)                                     \
  extern "C" void __ubsan_handle_##check(cuda_on_host::SourceLocation* where) { \
    cuda_on_host::report_undefined(cudaErrorLaunchFailure, *where, what);       \
  }
CUDA_ON_HOST_UNDEFINED(add_overflow, "signed addition overflows")
CUDA_ON_HOST_UNDEFINED(sub_overflow, "signed subtraction overflows")
CUDA_ON_HOST_UNDEFINED(mul_overflow, "signed multiplication overflows")
CUDA_ON_HOST_UNDEFINED(negate_overflow, "negation overflows")
CUDA_ON_HOST_UNDEFINED(divrem_overflow, "division by zero, or its result overflows")
CUDA_ON_HOST_UNDEFINED(shift_out_of_bounds, "shift by a negative or too large amount, or of a negative value")
CUDA_ON_HOST_UNDEFINED(pointer_overflow, "pointer arithmetic overflows")
CUDA_ON_HOST_UNDEFINED(load_invalid_value, "a value outside the range of its type is loaded")
CUDA_ON_HOST_UNDEFINED(invalid_builtin, "invalid argument of a builtin")
CUDA_ON_HOST_UNDEFINED(vla_bound_not_positive, "array bound is not positive")
CUDA_ON_HOST_UNDEFINED(nonnull_arg, "null passed as an argument that must not be null")
CUDA_ON_HOST_UNDEFINED(builtin_unreachable, "unreachable code is reached")
CUDA_ON_HOST_UNDEFINED(missing_return, "a function ends without returning its value")
extern "C" void __ubsan_handle_nonnull_return_v1(void*, cuda_on_host::SourceLocation* where) {
  cuda_on_host::report_undefined(cudaErrorLaunchFailure, *where, "null returned where it must not be");
}
#undef CUDA_ON_HOST_UNDEFINED
