// A small harness for C++ test files: named cases, device vectors, and a main() that runs the cases it is given.
//
//   CASE(adds) {                                 // or CASE_WITH_VARIANTS: also gets `variant`, run as "adds:variant"
//     DeviceVector<float> x(host_values), y(n);
//     LAUNCH(kernel, grid, block, dynamic_bytes, x.data(), y.data());
//     EXPECT_NEAR(y.host()[3], 7.0, 1e-6);
//   }
#pragma once

#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include "../cuda_runtime.h"
#include "control.h"

// Defined in ../../runtime/harness.cpp, which also has main(): test files stay quick to compile.
namespace harness {

using Case = void (*)(const std::string& variant);
struct Registration {
  Registration(const char* name, Case run);
};

[[noreturn]] void fail(const char* file, int line, const char* condition);
void check_cuda(cudaError_t error, const char* file, int line);
void check_near(double actual, double expected, double tolerance, const char* what, const char* file, int line);
std::vector<float> random_values(size_t n, unsigned seed = 1, float low = -2.f, float high = 2.f);

template <class T>
class DeviceVector {
 public:
  explicit DeviceVector(size_t n) : n_(n) { check_cuda(cudaMalloc(&data_, n * sizeof(T)), "DeviceVector", 0); }
  explicit DeviceVector(const std::vector<T>& values) : DeviceVector(values.size()) {
    check_cuda(cudaMemcpy(data_, values.data(), n_ * sizeof(T), cudaMemcpyHostToDevice), "DeviceVector", 0);
  }
  ~DeviceVector() { cudaFree(data_); }
  DeviceVector(const DeviceVector&) = delete;
  DeviceVector& operator=(const DeviceVector&) = delete;
  T* data() const { return data_; }
  size_t size() const { return n_; }
  std::vector<T> host() const {
    std::vector<T> values(n_);
    check_cuda(cudaMemcpy(values.data(), data_, n_ * sizeof(T), cudaMemcpyDeviceToHost), "DeviceVector", 0);
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t n_;
};

template <class K, class... A>
cudaError_t launch(bool cooperative, K kernel, dim3 grid, dim3 block, size_t dynamic_bytes, A... arguments) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = dynamic_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace harness

#define CASE_WITH_VARIANTS(name)                                               \
  static void case_##name(const std::string& variant);                         \
  static const harness::Registration registration_##name(#name, &case_##name); \
  static void case_##name(const std::string& variant)
#define CASE(name)                                                                                          \
  static void case_##name();                                                                                \
  static const harness::Registration registration_##name(#name, [](const std::string&) { case_##name(); }); \
  static void case_##name()

#define CUDA(call) harness::check_cuda((call), __FILE__, __LINE__)
#define LAUNCH(kernel, grid, block, dynamic_bytes, ...) \
  CUDA(harness::launch(false, kernel, grid, block, dynamic_bytes, __VA_ARGS__))
#define LAUNCH_COOPERATIVE(kernel, grid, block, dynamic_bytes, ...) \
  CUDA(harness::launch(true, kernel, grid, block, dynamic_bytes, __VA_ARGS__))
#define EXPECT(condition) \
  if (!(condition)) harness::fail(__FILE__, __LINE__, #condition)
#define EXPECT_NEAR(actual, expected, tolerance) \
  harness::check_near((actual), (expected), (tolerance), #actual, __FILE__, __LINE__)
