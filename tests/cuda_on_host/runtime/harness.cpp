// The harness of C++ test files: their cases, what fails them, and main().
#include "../include/cuda_on_host/harness.h"

#include <chrono>
#include <cstdio>
#include <map>
#include <random>
#include <stdexcept>

namespace harness {
namespace {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::map<std::string, Case>& cases() {
  static std::map<std::string, Case> all;
  return all;
}

// Returns the failure, or an empty string. A failed launch leaves no error behind for the next case.
std::string run(const std::string& name_and_variant) {
  const size_t colon = name_and_variant.find(':');
  const auto found = cases().find(name_and_variant.substr(0, colon));
  if (found == cases().end()) return "there is no case of this name";
  std::string failure;
  try {
    found->second(colon == std::string::npos ? "" : name_and_variant.substr(colon + 1));
  } catch (const Failure& error) {
    failure = error.what();
  }
  if (cuda_on_host_take_error() != cudaSuccess && failure.empty()) failure = cuda_on_host_message();
  return failure;
}

}  // namespace

Registration::Registration(const char* name, Case run) { cases()[name] = run; }

void fail(const char* file, int line, const char* condition) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + condition);
}

void check_cuda(cudaError_t error, const char* file, int line) {
  if (error == cudaSuccess) return;
  cuda_on_host_take_error();
  fail(file, line, (std::string(cudaGetErrorName(error)) + ": " + cuda_on_host_message()).c_str());
}

void check_near(double actual, double expected, double tolerance, const char* what, const char* file, int line) {
  if (std::fabs(actual - expected) <= tolerance) return;
  fail(file, line,
       (std::string(what) + " is " + std::to_string(actual) + ", expected " + std::to_string(expected)).c_str());
}

std::vector<float> random_values(size_t n, unsigned seed, float low, float high) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> draw(low, high);
  std::vector<float> values(n);
  for (float& v : values) v = draw(generator);
  return values;
}

}  // namespace harness

// Runs the cases it is given, all without any; prints one line each, "ok NAME SECONDS" or "FAILED NAME SECONDS WHY".
int main(int count, char** names) {
  std::vector<std::string> wanted(names + 1, names + count);
  if (wanted.empty())
    for (const auto& [name, run] : harness::cases()) wanted.push_back(name);
  int failures = 0;
  for (const std::string& name : wanted) {
    const auto start = std::chrono::steady_clock::now();
    const std::string failure = harness::run(name);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    failures += !failure.empty();
    std::printf("%s %s %.3fs %s\n", failure.empty() ? "ok" : "FAILED", name.c_str(), seconds.count(), failure.c_str());
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
